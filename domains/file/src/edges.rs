//! Requests that do not fit the storage's alignment: the aligned range around each, and who may change it.
//!
//! A guest's disk has blocks of 512 bytes whatever the storage asks for. A write whose edges are inside
//! a block of the storage is carried out by reading that block, changing a part of it, and writing it
//! back. Two such writes may be about different sectors of one block, on different queues: without
//! more, one would write back what the other has just changed. So each has its range to itself.
//!
//! Requests that fit take no lock: one that overlaps such a block overlaps the guest's own sectors
//! in it, and requests that overlap have no order on any disk. Reads take none either.
//!
//! A replaced instance must not do this beside its successor, which knows nothing of its locks: such a
//! disk is upgraded by a handover.

use domain_api::{Host, QueueIndex, Request};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a worker waits for a range that it cannot wait for otherwise. Who has one gives it back
/// when the device answers, or its instance has died.
const PATIENCE: Duration = Duration::from_secs(30);

/// The range of the file that a request is carried out on.
pub(crate) fn hull(request: &Request, alignment: u64) -> Range<u64> {
    let end = request.offset() + request.len();
    request.offset() / alignment * alignment..end.next_multiple_of(alignment)
}

/// Whether a request begins or ends inside a block.
pub(crate) fn has_edges(request: &Request, alignment: u64) -> bool {
    (request.offset() | request.len()) & (alignment - 1) != 0
}

#[derive(Debug, Default)]
struct Inner {
    /// A few: those of requests in flight that do not fit.
    held: Vec<Range<u64>>,
    /// Queues that wait for one of them, one bit each.
    waiting: u64,
}

/// Ranges of the file that somebody is about to change.
#[derive(Debug)]
pub(crate) struct Ranges {
    host: Host,
    inner: Mutex<Inner>,
    released: Condvar,
}

impl Ranges {
    pub(crate) fn new(host: Host) -> Self {
        Self { host, inner: Mutex::default(), released: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `range`, or has `queue` notified when it may be free.
    pub(crate) fn try_take(&self, range: &Range<u64>, queue: QueueIndex) -> bool {
        let mut inner = self.lock();
        let taken = inner.take(range);
        if !taken {
            inner.waiting |= 1 << queue.0;
        }
        taken
    }

    /// Takes `range` when it is free; `false` if that takes too long.
    pub(crate) fn take(&self, range: &Range<u64>) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut inner = self.lock();
        while !inner.take(range) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            inner = self.released.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Gives `range` back.
    pub(crate) fn give_back(&self, range: &Range<u64>) {
        let mut inner = self.lock();
        if let Some(at) = inner.held.iter().position(|held| held == range) {
            inner.held.swap_remove(at);
        }
        let waiting = std::mem::take(&mut inner.waiting);
        drop(inner);
        self.released.notify_all();
        (0..u64::BITS)
            .filter(|queue| waiting & 1 << queue != 0)
            .for_each(|queue| self.host.notify(QueueIndex(queue)));
    }
}

impl Inner {
    fn take(&mut self, range: &Range<u64>) -> bool {
        let overlaps = |held: &Range<u64>| held.start < range.end && range.start < held.end;
        if self.held.iter().any(overlaps) {
            return false;
        }
        self.held.push(range.clone());
        true
    }
}
