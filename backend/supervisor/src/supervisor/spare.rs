//! A spare: a second server that is prepared while the other serves, and goes on after its death.
//!
//! It is one of a generation, so an upgrade makes it stale: then another one takes its place.

use super::Supervisor;
use std::time::{Duration, Instant};

/// How long after the start, a recovery, an exchange or an upgrade a spare is begun. To prepare one
/// takes a CPU for some milliseconds, in which the guest's requests come first.
const AFTER_A_CHANGE: Duration = Duration::from_millis(20);
/// How long after a spare has died, or could not be started.
const AFTER_A_DEATH: Duration = Duration::from_secs(1);

impl Supervisor {
    /// What the guest waits for comes before a spare.
    pub(super) fn put_spare_off(&mut self) {
        self.spare_at = Instant::now() + AFTER_A_CHANGE;
    }

    pub(super) fn spare_has_died(&mut self, why: &str) {
        log::warn!("the spare server is gone: {why}");
        self.spare_at = Instant::now() + AFTER_A_DEATH;
    }

    /// When a spare is to be begun, if one is missing.
    pub(super) fn spare_deadline(&self) -> Option<Instant> {
        let is_quiet = self.exchange.is_none() && self.reexecution.is_none();
        let is_wanted = self.options.supervision.has_spare && self.ending.is_none();
        let is_missing = self.candidate.is_none() && self.vault.live().is_some();
        let is_due = is_wanted && is_quiet && is_missing && self.serving().is_some();
        is_due.then_some(self.spare_at)
    }

    pub(super) fn settle_spare(&mut self, now: Instant) {
        let is_stale = |live: Option<&str>| live != self.vault.live();
        let is_a_spare = self.exchange.is_none();
        if is_a_spare && self.candidate.as_ref().is_some_and(|one| is_stale(one.live())) {
            self.dismiss_candidate();
            self.put_spare_off();
        }
        if self.spare_deadline().is_none_or(|at| at > now) {
            return;
        }
        match self.start_candidate(&self.options.program) {
            Ok(candidate) => self.candidate = Some(candidate),
            Err(error) => {
                log::warn!("there is no spare server: {error}");
                self.spare_at = now + AFTER_A_DEATH;
            }
        }
    }
}
