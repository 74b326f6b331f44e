//! Waiting for takeovers: what is asked of the live domain is not asked of one that has died.

use crate::device::{Changing, DomainProxy};
use crate::domain::{Domain, LoadedDomain};
use domain_host::CallError;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long a takeover is waited for by what has to tell the guest how something ended.
pub(crate) const TAKEOVER_PATIENCE: Duration = Duration::from_secs(10);

/// How long what has seen a domain die takes to say so, at most.
const NOTICE_AFTER: Duration = Duration::from_millis(10);

impl DomainProxy {
    /// Waits until no domain is dead that is still to be replaced; `false` after `deadline`, or
    /// when the device is about to end.
    fn wait_alive(self: &Arc<Self>, deadline: Instant) -> bool {
        let is_alive = || (!self.is_dying()).then_some(());
        self.wait_for_takeover(deadline, || self.is_stopping(), is_alive).is_some()
    }

    /// Takes the lock of changes while no domain is dead that is still to be replaced: the live one
    /// lives, or none could take over.
    ///
    /// Returns `None` after `deadline`, or if `give_up` says so.
    pub(crate) fn lock_alive(
        self: &Arc<Self>,
        deadline: Instant,
        give_up: impl Fn() -> bool,
    ) -> Option<Changing<'_>> {
        self.wait_for_takeover(deadline, give_up, || {
            // Looked at first: to let the lock go would be announced, a reason to look again.
            if self.is_dying() {
                return None;
            }
            let changing = self.try_lock_changes()?;
            // If not, it is let go of: a takeover waits for the lock.
            (!self.is_dying()).then_some(changing)
        })
    }

    /// Waits for what comes after a takeover; `None` after `deadline`, or if `give_up` says so.
    fn wait_for_takeover<T>(
        self: &Arc<Self>,
        deadline: Instant,
        give_up: impl Fn() -> bool,
        look: impl Fn() -> Option<T>,
    ) -> Option<T> {
        let began = Instant::now();
        let found = self.signal.wait(deadline, || {
            // What saw it die says so in a moment, and knows how. Again and again, because there
            // may have been no thread for the takeover.
            if began.elapsed() >= NOTICE_AFTER {
                self.notice_death();
            }
            match look() {
                Some(found) => Some(Some(found)),
                None => give_up().then_some(None),
            }
        });
        found.flatten()
    }

    /// Turns the write cache of the live domain, and of every successor, on or off.
    ///
    /// When it comes back from turning it off, what was completed before is durable. If the live
    /// domain dies meanwhile, it waits for the takeover, which sees to that. What could not be done
    /// is logged, and left behind at the end. Not to be called by a worker: a takeover waits for
    /// it.
    pub fn set_write_cache(self: &Arc<Self>, on: bool) {
        let (is_new, failed) = self.environment.set_write_cache(on);
        self.notice_deaths(failed.iter().map(|(domain, _)| domain));
        if on || !is_new || failed.is_empty() && !self.is_dying() {
            return;
        }
        let why = match self.catch_up_on(&failed) {
            Ok(()) => return,
            // The last flush is asked of what lives then.
            Err(_) if self.is_stopping() => return,
            Err(why) => why,
        };
        let sentence = format!(
            "the write cache was turned off, and what was written before may not be on the disk: {why}"
        );
        log::error!("{sentence}");
        self.leave_behind(&sentence);
    }

    /// Waits until no domain is dead that is still to be replaced, and has the live one see to what
    /// those left that `failed`.
    fn catch_up_on(self: &Arc<Self>, failed: &[(Weak<Domain>, CallError)]) -> Result<(), String> {
        let deadline = Instant::now() + TAKEOVER_PATIENCE;
        loop {
            if !self.wait_alive(deadline) {
                return Err("a takeover is under way, and does not end".to_owned());
            }
            let Some(live) = self.live() else {
                // What brings the device back sees to it.
                log::error!(
                    "the write cache is off, and what was written before may not be on the disk yet"
                );
                return Ok(());
            };
            // It was told, and has said why not; asking once more would not make it so.
            let is_live = |domain: &Weak<Domain>| domain.as_ptr() == Arc::as_ptr(&live);
            if let Some((_, error)) = failed.iter().find(|(domain, _)| is_live(domain)) {
                return Err(error.to_string());
            }
            // Others may have completed something after it was told.
            let Err(error) = self.environment.catch_up(&live) else { return Ok(()) };
            if !live.is_dead() {
                return Err(error.to_string());
            }
            drop(live);
            self.notice_death();
        }
    }

    /// Has a successor make durable what the dead one had completed, if nothing may be volatile.
    pub(crate) fn catch_up(&self, next: &LoadedDomain) -> Result<(), CallError> {
        self.environment.catch_up(next).or_else(|error| {
            if next.is_dead() {
                return Err(error);
            }
            // It can serve all the same.
            let sentence = format!(
                "what the dead domain wrote last, with its write cache off, may not be on the disk: {error}"
            );
            log::error!("{sentence}");
            self.leave_behind(&sentence);
            Ok(())
        })
    }

    /// Tells the live domain, and every successor, of guest memory that was mapped or is about to
    /// be unmapped.
    pub fn memory_changed(self: &Arc<Self>, address: usize, len: usize, added: bool) {
        let dead = self.environment.memory_changed(address, len, added);
        self.notice_deaths(&dead);
    }
}
