//! What is to be done for a request, and what has become of it so far.

use domain_api::{QueueIndex, Request};
use domain_io::engine::{JobKind, PortEnd};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What is asked of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Read,
    Write,
    Flush,
    Trim,
    Zeroes { may_unmap: bool },
}

impl Work {
    /// Whether it changes data.
    pub(crate) const fn is_change(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::Zeroes { .. })
    }
}

/// What is to be done for a request.
#[derive(Debug)]
pub struct Job {
    pub(crate) work: Work,
    /// Bytes that are done: of a request that is larger than a server takes.
    pub(crate) done: u64,
    /// How many connections have died on it.
    pub(crate) deaths: u32,
    /// The newest connection that there was when one of these ended.
    blamed_until: u32,
    /// How often a server has said that it is going down, instead of an answer.
    pub(crate) refusals: u32,
    /// It was sent before: nothing newer than it was sent since to the same place.
    pub(crate) is_repeated: bool,
    /// It is counted among those that may be what connections die of.
    pub(crate) suspect: Option<Suspect>,
}

impl Job {
    pub(crate) const fn new(work: Work) -> Self {
        Self {
            work,
            done: 0,
            deaths: 0,
            blamed_until: 0,
            refusals: 0,
            is_repeated: false,
            suspect: None,
        }
    }

    /// Whether the end of connection `link`, when `newest` was the last that was made, is held
    /// against it. That of one is not which was there already when another one ended on it: all of
    /// them end with their server, one after the other.
    pub(crate) const fn is_to_blame(&mut self, link: u32, newest: u32) -> bool {
        let is_new = link > self.blamed_until;
        if is_new {
            self.blamed_until = newest;
        }
        is_new
    }

    /// How many bytes there are to be done for `request`: none for a flush, also of one that has
    /// written.
    pub(crate) const fn total(&self, request: &Request) -> u64 {
        if matches!(self.work, Work::Flush) { 0 } else { request.len() }
    }

    pub(crate) const fn kind(&self) -> JobKind {
        match self.work {
            Work::Flush => JobKind::Sync,
            Work::Read => JobKind::Other,
            Work::Write | Work::Trim | Work::Zeroes { .. } => JobKind::Change,
        }
    }
}

/// Counts a request among the suspects, until it is dropped.
#[derive(Debug)]
pub(crate) struct Suspect(Arc<AtomicUsize>);

impl Suspect {
    pub(crate) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Suspect {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A request and its job, on its way.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) request: Request,
    pub(crate) job: Job,
}

/// What a queue's own thread has: what waits to be sent, and what has ended.
#[derive(Debug)]
pub(crate) struct Lists {
    pub(crate) queue: QueueIndex,
    pub(crate) waiting: VecDeque<Item>,
    pub(crate) done: VecDeque<PortEnd<Job>>,
}

impl Lists {
    pub(crate) fn new(queue: QueueIndex) -> Self {
        Self { queue, waiting: VecDeque::new(), done: VecDeque::new() }
    }
}

/// What comes to a queue from other threads.
#[derive(Debug)]
pub(crate) enum Mail {
    /// To be sent, once more or further.
    Again(Item),
    /// Ended.
    Done(PortEnd<Job>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_end_with_their_server_count_once() {
        let mut job = Job::new(Work::Write);
        // Four were there, and end in any order; then two that came later.
        let ends = [(2, 4), (4, 4), (1, 4), (3, 5), (5, 5), (6, 6)];
        let counted = ends.map(|(link, newest)| job.is_to_blame(link, newest));
        assert_eq!(counted, [true, false, false, false, true, true]);
    }
}
