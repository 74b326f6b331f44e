//! The drain of a queue: one thread asks, and waits for the queue's thread to say how it went.
//!
//! Each request has a ticket. The queue's thread reads the newest ticket before it looks at
//! anything, and completes it when it has seen that nothing is popped and nothing is awaited any
//! more; that completes all tickets before it.

use crate::sync::lock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All that was in flight has been answered.
    Clean,
    /// All but so many requests, which are left unanswered for good.
    Unanswerable(usize),
    /// It has not ended yet.
    TimedOut,
}

impl Outcome {
    /// Nothing is awaited, and so many requests are left unanswered for good.
    pub(super) const fn after(unanswerable: usize) -> Self {
        match unanswerable {
            0 => Self::Clean,
            more => Self::Unanswerable(more),
        }
    }
}

/// One request to drain; a later one is greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// What has been completed.
#[derive(Debug)]
struct DrainState {
    newest: Ticket,
    outcome: Outcome,
    /// Nothing is completed any more, and nothing is in flight.
    is_closed: bool,
}

/// The drains of one queue.
#[derive(Debug)]
pub(super) struct Drain {
    requested: AtomicU64,
    state: Mutex<DrainState>,
    changed: Condvar,
}

impl Drain {
    pub(super) const fn new() -> Self {
        let (newest, outcome) = (Ticket(0), Outcome::Clean);
        Self {
            requested: AtomicU64::new(0),
            state: Mutex::new(DrainState { newest, outcome, is_closed: false }),
            changed: Condvar::new(),
        }
    }

    /// Asks for a drain. The queue's thread has to be woken.
    pub(super) fn request(&self) -> Ticket {
        Ticket(self.requested.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// The newest request. What is looked at after this is looked at after it.
    #[inline]
    pub(super) fn newest(&self) -> Ticket {
        Ticket(self.requested.load(Ordering::Acquire))
    }

    /// Completes `ticket` and all before it.
    pub(super) fn complete(&self, ticket: Ticket, outcome: Outcome) {
        let mut state = lock(&self.state);
        if state.newest < ticket {
            (state.newest, state.outcome) = (ticket, outcome);
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Completes all tickets that there are and will be: the queue's thread is gone.
    pub(super) fn close(&self) {
        lock(&self.state).is_closed = true;
        self.changed.notify_all();
    }

    /// Waits until `ticket` is complete, and until `deadline` at most, if there is one.
    pub(super) fn wait(&self, ticket: Ticket, deadline: Option<Instant>) -> Outcome {
        let mut state = lock(&self.state);
        while state.newest < ticket && !state.is_closed {
            let Some(deadline) = deadline else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Outcome::TimedOut;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn now() -> Option<Instant> {
        Some(Instant::now())
    }

    #[test]
    fn a_ticket_is_completed_by_itself_or_a_later_one() {
        let drain = Drain::new();
        let (first, second) = (drain.request(), drain.request());
        assert!(first < second);
        assert_eq!(drain.newest(), second);
        assert_eq!(drain.wait(first, now()), Outcome::TimedOut);
        drain.complete(first, Outcome::Clean);
        assert_eq!(drain.wait(first, now()), Outcome::Clean);
        assert_eq!(drain.wait(second, now()), Outcome::TimedOut);
        let third = drain.request();
        drain.complete(third, Outcome::Unanswerable(2));
        assert_eq!(drain.wait(second, now()), Outcome::Unanswerable(2));
        assert_eq!(drain.wait(third, None), Outcome::Unanswerable(2));
    }

    #[test]
    fn an_old_ticket_does_not_undo_a_newer_one() {
        let drain = Drain::new();
        let (first, second) = (drain.request(), drain.request());
        drain.complete(second, Outcome::Unanswerable(1));
        drain.complete(first, Outcome::Clean);
        drain.complete(second, Outcome::Clean);
        assert_eq!(drain.wait(second, now()), Outcome::Unanswerable(1));
    }

    #[test]
    fn a_ticket_that_was_read_before_a_request_does_not_complete_it() {
        let drain = Drain::new();
        let seen = drain.newest();
        let ticket = drain.request();
        drain.complete(seen, Outcome::Clean);
        assert_eq!(drain.wait(ticket, now()), Outcome::TimedOut);
    }

    #[test]
    fn after_the_end_nothing_is_waited_for() {
        let drain = Drain::new();
        let ticket = drain.request();
        drain.complete(ticket, Outcome::Unanswerable(3));
        let later = drain.request();
        drain.close();
        assert_eq!(drain.wait(later, None), Outcome::Unanswerable(3));
        assert_eq!(drain.wait(drain.request(), None), Outcome::Unanswerable(3));
    }

    #[test]
    fn a_deadline_is_kept_and_a_completion_ends_the_wait() {
        let drain = &Drain::new();
        let ticket = drain.request();
        let started = Instant::now();
        let patience = Duration::from_millis(20);
        assert_eq!(drain.wait(ticket, Some(started + patience)), Outcome::TimedOut);
        assert!(started.elapsed() >= patience);
        std::thread::scope(|scope| {
            let far = Some(Instant::now() + Duration::from_secs(600));
            let waits = [far, None].map(|end| scope.spawn(move || drain.wait(ticket, end)));
            drain.complete(ticket, Outcome::Clean);
            for wait in waits {
                assert_eq!(wait.join().expect("no panic"), Outcome::Clean);
            }
        });
    }
}
