//! One sync of a queue at a time, for all requests that wait for it.
//!
//! Linux reports a failed write-back once to each open file description. Were two syncs of one
//! description under way together, the one would be told of it and the other answer well, though
//! both owe the same data. So a queue has one sync under way, through a description of its own;
//! what comes meanwhile waits for the next, which serves all that wait. A sync covers what had
//! ended before it began, so a request that comes later does not join it.

use domain_api::Request;

/// Which requests the sync that is under way serves, and which wait for the next.
#[derive(Debug, Default)]
pub(super) struct SyncTurn {
    running: bool,
    /// Served by it, beside the request that went with it.
    riders: Vec<Request>,
    waiting: Vec<Request>,
}

impl SyncTurn {
    /// A request that is to be synced: it comes back if its sync is to begin now.
    pub(super) fn join(&mut self, request: Request) -> Option<Request> {
        if self.running {
            self.waiting.push(request);
            return None;
        }
        self.running = true;
        Some(request)
    }

    /// How many requests wait here, beside the one that went with the sync.
    #[inline]
    pub(super) const fn len(&self) -> usize {
        self.riders.len() + self.waiting.len()
    }

    /// The sync has ended: takes the requests that it has served beside the one that went with it.
    pub(super) fn riders(&mut self) -> Vec<Request> {
        self.running = false;
        std::mem::take(&mut self.riders)
    }

    /// The request that the next sync begins with, if any waits.
    pub(super) fn next(&mut self) -> Option<Request> {
        debug_assert!(!self.running, "one at a time");
        let first = self.waiting.pop()?;
        self.running = true;
        std::mem::swap(&mut self.riders, &mut self.waiting);
        Some(first)
    }
}
