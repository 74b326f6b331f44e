//! The region in which a session's queues keep what they have in flight, as the session is given
//! it.
//!
//! Each worker has its own part of it (`virtqueue`), and takes it up when its ring is turned on:
//! what the part says is in flight runs again before anything new. A region that replaces another
//! under a ring that is on is taken up as a memory map is: when what is in flight has ended, and
//! before anything more is taken.
//!
//! Deliberately absent: where the memory comes from, and who keeps it when this process ends.

use crate::sync::lock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use virtqueue::inflight::Region;

/// A request that was in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quarantined {
    /// Its queue.
    pub queue: usize,
    /// The head of its chain.
    pub head: u16,
    /// Its number in the queue's order, by which it is told from others with this head.
    pub counter: u64,
}

/// A region, and what to do with what is in flight there.
#[derive(Debug, Clone)]
pub struct Inflight {
    /// The region.
    pub region: Arc<Region>,
    /// Requests that were in flight run again one at a time, oldest first; nothing new is taken
    /// before all of them have ended.
    pub cautious: bool,
    /// A ring that is stopped while the guest is migrated leaves what is in flight marked here.
    pub leaves: bool,
    /// Requests that do not run again, and are answered with an I/O error.
    pub quarantine: Vec<Quarantined>,
}

/// What has become of requests that were in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InflightCounts {
    /// So many were found.
    pub found: u64,
    /// So many of them were answered with an error, because they are quarantined.
    pub quarantined: u64,
}

#[derive(Default)]
struct Shared {
    /// 0 before the first change.
    version: AtomicU64,
    inflight: Mutex<Option<Arc<Inflight>>>,
    found: AtomicU64,
    quarantined: AtomicU64,
}

/// The region of the sessions that are given this, now and later; none at first.
#[derive(Clone, Default)]
pub struct SharedInflight(Arc<Shared>);

impl std::fmt::Debug for SharedInflight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SharedInflight").field(&*lock(&self.0.inflight)).finish()
    }
}

impl SharedInflight {
    /// Replaces the region. Every ring that is turned on after this has returned uses it; one that
    /// is on goes over to it before it takes anything more.
    pub fn set(&self, inflight: Option<Inflight>) {
        let mut slot = lock(&self.0.inflight);
        *slot = inflight.map(Arc::new);
        // Release pairs with the Acquire in `version`: who sees it finds the region.
        self.0.version.fetch_add(1, Ordering::Release);
    }

    /// Has the region looked at anew, as after [`set`](Self::set).
    pub(crate) fn renew(&self) {
        let _slot = lock(&self.0.inflight);
        self.0.version.fetch_add(1, Ordering::Release);
    }

    /// What has become of requests that were in flight, in all sessions.
    #[must_use]
    pub fn counts(&self) -> InflightCounts {
        InflightCounts {
            found: self.0.found.load(Ordering::Relaxed),
            quarantined: self.0.quarantined.load(Ordering::Relaxed),
        }
    }

    /// A number that changes with each [`set`](Self::set).
    #[inline]
    pub(crate) fn version(&self) -> u64 {
        self.0.version.load(Ordering::Acquire)
    }

    /// The region, with its version.
    pub(crate) fn get(&self) -> (u64, Option<Arc<Inflight>>) {
        let slot = lock(&self.0.inflight);
        (self.version(), slot.clone())
    }

    /// A queue has found so many requests in flight.
    pub(crate) fn count_found(&self, requests: usize) {
        self.0.found.fetch_add(requests as u64, Ordering::Relaxed);
    }

    /// A request has been answered with an error because it is quarantined.
    pub(crate) fn count_quarantined(&self) {
        self.0.quarantined.fetch_add(1, Ordering::Relaxed);
    }
}
