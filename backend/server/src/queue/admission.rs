//! How a queue waits for its rate limit: what is not let through goes back to the ring, as what the
//! domain does not take does, and the worker sleeps until there may be a token.
//!
//! Invariants: what waits is in flight nowhere, and marked nowhere; a worker that waits is asleep,
//! and does not poll; what has ended is given back meanwhile; what an earlier process had in flight
//! was let through there, and is not held up. (Of one that died between taking a batch and giving
//! back what has to wait, that is let through, too.)

use super::worker::QueueWorker;
use crate::limiter::Limiter;
use std::time::Instant;

impl QueueWorker {
    /// How many requests of the batch, from the front, are let through.
    #[cold]
    pub(super) fn admit(&mut self, limiter: &Limiter) -> usize {
        if self.tracking.replay.is_some() {
            return self.batch.len();
        }
        let admitted = limiter.admit(&self.batch, Instant::now());
        self.throttled = admitted.next;
        admitted.requests
    }

    /// The domain took fewer than were let through.
    #[cold]
    pub(super) fn take_back(&self, limiter: &Limiter, accepted: usize, offered: usize) {
        if self.tracking.replay.is_none() {
            limiter.give_back(&self.batch[accepted..offered]);
        }
    }

    /// When the worker is to be woken because of its rate limit.
    pub(crate) const fn throttled(&self) -> Option<Instant> {
        self.throttled
    }
}

#[cfg(test)]
#[path = "admission_tests.rs"]
mod tests;
