//! Which mode the write cache is in: how long a driver may rely on what it believes.
//!
//! A driver that was told "write-back" flushes; one that was told "write-through" does not, and
//! loses data if the device caches all the same. What the driver believes is the `writeback` byte
//! as its frontend has it. Frontends read the configuration space when they connect first. They do
//! not read it again when they reconnect or when the guest is reset, and never say again what a
//! driver wrote to it.
//!
//! So the device's default, write-back, is only good for a driver whose frontend has read it here.
//! For all others the mode is write-through, which is right whatever a driver believes, until a
//! driver says otherwise. A reset changes nothing: the frontend keeps its copy.

use crate::features::{CONFIG_WCE, FLUSH};

/// What a driver believes of its device, as far as the device's mode depends on it. It outlives the
/// process that serves the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Belief {
    /// What it finds in `writeback`, as far as that is known.
    pub write_cache: Option<bool>,
    /// No ring has been started since the session began or the device was reset.
    pub is_fresh: bool,
}

impl Default for Belief {
    /// That of a driver whose session begins.
    fn default() -> Self {
        Self { write_cache: None, is_fresh: true }
    }
}

/// The mode of a device's write cache within one session. The table of the rule is this module's
/// test.
#[derive(Debug, Clone)]
pub(crate) struct WriteCache {
    /// The device has one.
    exists: bool,
    /// What the driver has acknowledged, once it has.
    acked: Option<u64>,
    /// What a driver that reads `writeback` finds at its frontend, as far as that is known.
    believed: Option<bool>,
    /// No ring has been started since the session began or the device was reset: who reads the
    /// configuration now begins with what it says.
    is_fresh: bool,
}

impl WriteCache {
    /// That of a device which has a cache, or none, at the start of a session. It is off.
    pub(crate) const fn new(exists: bool) -> Self {
        Self { exists, acked: None, believed: None, is_fresh: true }
    }

    /// The driver of a session that another process had goes on with this one.
    pub(crate) const fn resume(&mut self, belief: Belief) {
        self.believed = belief.write_cache;
        self.is_fresh = belief.is_fresh;
    }

    /// What its driver believes.
    pub(crate) const fn belief(&self) -> Belief {
        Belief { write_cache: self.believed, is_fresh: self.is_fresh }
    }

    /// Whether it is on: a completed write may be lost until it is flushed.
    ///
    /// With `FLUSH` alone it is: such a driver expects a cache (5.2.5.1) and cannot turn it off.
    /// Without `FLUSH` it is off: each write has to be stable when it completes (5.2.6.2), and
    /// `writeback` has to begin with 0 (5.2.5.2).
    pub(crate) fn is_on(&self) -> bool {
        let believed = self.believed == Some(true);
        self.exists
            && self.acked.map_or(believed, |acked| {
                acked & FLUSH != 0 && (believed || acked & CONFIG_WCE == 0)
            })
    }

    /// The driver has acknowledged these features. What it believes of the cache is not changed by
    /// that.
    pub(crate) const fn acked(&mut self, features: u64) {
        self.acked = Some(features);
    }

    /// The frontend reads the configuration space, and has a copy of `writeback` from now on. Ask
    /// [`is_on`](Self::is_on) for the byte afterwards.
    pub(crate) fn read(&mut self) {
        if self.is_fresh {
            self.believed = Some(self.exists);
        }
        if !self.is_on() {
            self.believed = Some(false);
        }
    }

    /// The driver has written to `writeback`, which was negotiated.
    pub(crate) const fn wrote(&mut self, on: bool) {
        self.believed = Some(on);
        self.is_fresh = false;
    }

    /// A ring starts. If the configuration was not read by then, the frontend has its copy from
    /// elsewhere: it stays off for want of knowing better, which is said by `true`.
    pub(crate) const fn ring_starts(&mut self) -> bool {
        let is_unknown = self.believed.is_none();
        if is_unknown {
            self.believed = Some(false);
        }
        self.is_fresh = false;
        is_unknown
    }

    /// A ring is to go on at a position that this session has not left it at: its driver comes from
    /// another session, or another host. Returns whether it was not off for that driver already.
    pub(crate) fn ring_comes_from_elsewhere(&mut self) -> bool {
        self.is_fresh = false;
        self.believed.replace(false) != Some(false)
    }

    /// The device was reset. No features are acknowledged. The frontend's copy stays as it is,
    /// unless it reads the configuration again before the next ring starts.
    pub(crate) const fn reset(&mut self) {
        self.acked = None;
        self.is_fresh = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy)]
    enum Event {
        /// GET_CONFIG.
        Read,
        /// SET_FEATURES with these.
        Acked(u64),
        /// SET_CONFIG by the driver.
        Wrote(bool),
        /// A ring starts, at 0 or where it was left.
        Ring,
        /// A ring starts at another place.
        Elsewhere,
        /// RESET_DEVICE.
        Reset,
    }
    use Event::{Acked, Elsewhere, Read, Reset, Ring, Wrote};

    const BOTH: Event = Acked(FLUSH | CONFIG_WCE);
    const NONE: Event = Acked(0);

    fn after(exists: bool, events: &[Event]) -> bool {
        let mut cache = WriteCache::new(exists);
        for event in events {
            match *event {
                Read => cache.read(),
                Acked(features) => cache.acked(features),
                Wrote(on) => cache.wrote(on),
                Ring => _ = cache.ring_starts(),
                Elsewhere => {
                    cache.ring_comes_from_elsewhere();
                    assert!(!cache.ring_starts(), "it is said once");
                }
                Reset => cache.reset(),
            }
        }
        cache.is_on()
    }

    #[test]
    fn the_rule() {
        let table: &[(&str, &[Event], bool)] = &[
            ("a session begins", &[], false),
            ("a frontend reads", &[Read], true),
            ("a fresh guest", &[Read, BOTH, Ring], true),
            ("a fresh guest whose frontend reads after the features", &[BOTH, Read, Ring], true),
            ("its driver turns the cache off", &[Read, BOTH, Ring, Wrote(false)], false),
            ("and on again", &[Read, BOTH, Ring, Wrote(false), Wrote(true)], true),
            ("a frontend that never asks", &[BOTH, Ring], false),
            ("and asks too late", &[BOTH, Ring, Read], false),
            ("and its driver turns it on", &[BOTH, Ring, Wrote(true)], true),
            ("a reconnect", &[BOTH, Elsewhere], false),
            ("a reconnect, and its driver turns it on", &[BOTH, Elsewhere, Wrote(true)], true),
            ("a reconnect between two drivers", &[Reset, BOTH, Ring], false),
            ("a reconnect, stop and cont", &[BOTH, Elsewhere, BOTH, Ring], false),
            ("a reconnect, and a reset", &[BOTH, Elsewhere, Reset, BOTH, Ring], false),
            ("a guest that comes from another host", &[Read, Reset, BOTH, Elsewhere], false),
            ("one ring of several comes from there", &[Read, BOTH, Ring, Elsewhere, Ring], false),
            ("stop and cont", &[Read, BOTH, Ring, BOTH, Ring], true),
            (
                "stop and cont, with the cache off",
                &[Read, BOTH, Wrote(false), Ring, BOTH, Ring],
                false,
            ),
            ("resets before the first driver", &[Read, Reset, Reset, BOTH, Ring], true),
            ("a reset", &[Read, BOTH, Ring, Reset, BOTH, Ring], true),
            (
                "a reset, with the cache off",
                &[Read, BOTH, Ring, Wrote(false), Reset, BOTH, Ring],
                false,
            ),
            ("the same, before the next driver", &[Read, BOTH, Ring, Wrote(false), Reset], false),
            (
                "a reset that the frontend reads after",
                &[Read, BOTH, Wrote(false), Reset, Read, BOTH],
                true,
            ),
            (
                "a frontend that reads while rings run",
                &[Read, BOTH, Ring, Wrote(false), Read],
                false,
            ),
            (
                "a reset, and a read when rings run again",
                &[Read, BOTH, Wrote(false), Reset, BOTH, Ring, Read],
                false,
            ),
            ("a driver that cannot flush", &[Read, NONE, Ring], false),
            ("one that cannot flush, and one that can", &[Read, NONE, Ring, BOTH, Ring], true),
            (
                "the cache off, firmware, the same guest",
                &[Read, BOTH, Wrote(false), NONE, BOTH, Ring],
                false,
            ),
            ("read while firmware runs", &[Read, NONE, Ring, Read, BOTH, Ring], false),
            ("a driver that flushes and cannot switch", &[Read, Acked(FLUSH), Ring], true),
            ("the same after a reconnect", &[Acked(FLUSH), Elsewhere], true),
            ("a switch without a flush", &[Read, Acked(CONFIG_WCE), Ring], false),
        ];
        for &(what, events, on) in table {
            assert_eq!(after(true, events), on, "{what}: {events:?}");
            assert!(!after(false, events), "{what}, without a cache: {events:?}");
        }
    }
}
