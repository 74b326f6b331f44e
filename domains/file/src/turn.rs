//! One sync of a queue at a time, for all requests that wait for it.
//!
//! Linux reports a failed write-back once to each open file description. Were two syncs of one
//! description under way together, the one would be told of it and the other answer well, though
//! both owe the same data. So a queue has one sync under way, through a description of its own;
//! what comes meanwhile waits for the next, which serves all that wait. A sync covers what had
//! ended before it began, so nobody is let in who comes later.

use domain_api::Request;

/// Who is served by the sync that is under way, and who waits for the next.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    running: bool,
    /// Served by it, beside the request that went with it.
    riders: Vec<Request>,
    waiting: Vec<Request>,
}

impl Turn {
    /// A request that is to be synced: it comes back if its sync is to begin now.
    pub(crate) fn join(&mut self, request: Request) -> Option<Request> {
        if self.running {
            self.waiting.push(request);
            return None;
        }
        self.running = true;
        Some(request)
    }

    /// How many requests wait here, beside the one that went with the sync.
    pub(crate) const fn len(&self) -> usize {
        self.riders.len() + self.waiting.len()
    }

    /// The sync has ended: takes those that it has served beside the request that went with it.
    pub(crate) fn riders(&mut self) -> Vec<Request> {
        self.running = false;
        std::mem::take(&mut self.riders)
    }

    /// The request that the next sync begins with, if anybody waits.
    pub(crate) fn next(&mut self) -> Option<Request> {
        debug_assert!(!self.running, "one at a time");
        let first = self.waiting.pop()?;
        self.running = true;
        std::mem::swap(&mut self.riders, &mut self.waiting);
        Some(first)
    }
}
