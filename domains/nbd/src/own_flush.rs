//! A flush that no request has asked for: whether one is to be sent, is on its way, or has been
//! answered, and who waits for that.
//!
//! One at a time is on its way. What is asked for meanwhile is the next one's, because a flush
//! covers only what was answered before it was sent. One whose connection breaks is sent again.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often it is looked whether a wait is in vain.
const SLICE: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct State {
    /// How many were asked for.
    asked: u64,
    /// How many of them those cover that were sent, and those that were answered. They differ while
    /// one is on its way.
    sent: u64,
    answered: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct OwnFlush {
    state: Mutex<State>,
    rung: Condvar,
}

impl OwnFlush {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for one. Returns its number.
    pub(crate) fn ask(&self) -> u64 {
        let mut state = self.lock();
        state.asked += 1;
        state.asked
    }

    /// Whether one is to be sent now.
    pub(crate) fn is_wanted(&self) -> bool {
        let state = self.lock();
        state.sent == state.answered && state.asked > state.sent
    }

    /// Whether one is on its way.
    pub(crate) fn is_in_flight(&self) -> bool {
        let state = self.lock();
        state.sent > state.answered
    }

    /// Whether one is to be sent, or on its way.
    pub(crate) fn is_pending(&self) -> bool {
        let state = self.lock();
        state.asked > state.answered
    }

    /// One is sent, which covers all that were asked for.
    pub(crate) fn sent(&self) {
        let mut state = self.lock();
        state.sent = state.asked;
    }

    /// The one on its way was answered, well or not.
    pub(crate) fn answered(&self) {
        let mut state = self.lock();
        state.answered = state.sent;
        self.rung.notify_all();
    }

    /// The one on its way was not carried out: it is to be sent again.
    pub(crate) fn undone(&self) {
        let mut state = self.lock();
        state.sent = state.answered;
    }

    /// Waits until the one with this number was answered, for `limit` at most, or until
    /// `is_in_vain` says so. Returns whether it was.
    pub(crate) fn wait(&self, number: u64, limit: Duration, is_in_vain: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.answered < number {
            if Instant::now() >= deadline || is_in_vain() {
                return false;
            }
            let waited = self.rung.wait_timeout(state, SLICE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_asked_for_before_it_was_sent() {
        let flush = OwnFlush::default();
        assert!(!flush.is_wanted() && !flush.is_pending());
        let (first, second) = (flush.ask(), flush.ask());
        assert!(flush.is_wanted() && !flush.is_in_flight());
        flush.sent();
        assert!(!flush.is_wanted() && flush.is_in_flight());
        let third = flush.ask();
        assert!(!flush.is_wanted(), "one at a time");
        flush.answered();
        let is_answered = |number| flush.wait(number, Duration::ZERO, || true);
        assert!(is_answered(first) && is_answered(second) && !is_answered(third));
        assert!(flush.is_wanted());
        flush.sent();
        flush.undone();
        assert!(flush.is_wanted() && !is_answered(third), "it is sent again");
        flush.sent();
        flush.answered();
        assert!(is_answered(third) && !flush.is_pending());
    }
}
