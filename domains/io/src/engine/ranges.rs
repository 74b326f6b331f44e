//! Requests that do not fit the storage's alignment: the aligned range around each, and which
//! request may change it.
//!
//! A guest's disk has blocks of 512 bytes whatever the storage asks for. A write whose edges are
//! inside a block of the storage is carried out by reading that block, changing a part of it, and
//! writing it back. What another request has changed in that block meanwhile would be lost, be it
//! another sector or a sector of a larger write. So on such storage each change has its range to
//! itself, whether it fits or not. On storage that asks for no more than a sector no change takes a
//! range. Reads take none.
//!
//! Storage may begin to ask for more (`cp --reflink` of an image on XFS, `losetup --sector-size`).
//! A change that was begun before has no range. It is *plain*, and a change that needs a range
//! waits until nothing plain is left. Both sides count in first and then look, in one order that
//! all see (SeqCst):
//!
//! 1. a plain change is counted, then the alignment is looked at again, and if it has grown the
//!    change begins anew, with a range;
//! 2. the alignment has grown, then the plain changes are looked at.
//!
//! Either 1 sees the growth, or 2 sees the count.
//!
//! A replaced instance and its successor do not know each other's ranges: such a disk is upgraded
//! by a handover. Not covered is storage that begins to ask for more in the very milliseconds of a
//! swap.

use domain_api::{Host, QueueIndex, Request};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a guest's requests are multiples of, and what storage asks for if it asks for nothing else.
pub const SECTOR: u64 = 512;

/// How long a worker waits for a range that it cannot wait for otherwise. The request that has one
/// gives it back when the device answers, or its instance has died.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most queues that there are.
const QUEUES: usize = u64::BITS as usize;

/// The range of the storage that a request is carried out on.
#[must_use]
#[inline]
pub fn hull(request: &Request, alignment: u64) -> Range<u64> {
    let end = request.offset() + request.len();
    request.offset() / alignment * alignment..end.next_multiple_of(alignment)
}

/// Whether a request begins or ends inside a block.
#[must_use]
#[inline]
pub fn has_edges(request: &Request, alignment: u64) -> bool {
    (request.offset() | request.len()) & (alignment - 1) != 0
}

/// Whether a change has to have its range to itself on storage with this alignment.
#[must_use]
#[inline]
pub const fn needs_range(alignment: u64) -> bool {
    alignment > SECTOR
}

#[derive(Debug, Default)]
struct Taken {
    /// Ranges of changes in flight.
    ranges: Vec<Range<u64>>,
    /// Queues that wait for one of them, one bit each.
    waiting: u64,
}

/// Ranges of the storage that a request is about to change.
#[derive(Debug)]
pub struct Ranges {
    host: Host,
    taken: Mutex<Taken>,
    released: Condvar,
    /// Changes in flight that have no range: of each queue's port, which only its worker counts,
    /// and of all workers.
    plain: [AtomicU32; QUEUES],
    plain_at_workers: AtomicU32,
}

impl Ranges {
    pub(super) fn new(host: Host) -> Self {
        Self {
            host,
            taken: Mutex::default(),
            released: Condvar::new(),
            plain: [const { AtomicU32::new(0) }; QUEUES],
            plain_at_workers: AtomicU32::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how many plain changes `queue` has in its port.
    #[inline]
    pub(super) fn set_plain(&self, queue: QueueIndex, count: u32) {
        self.plain[queue.0 as usize].store(count, Ordering::SeqCst);
    }

    /// Counts a plain change that a worker makes itself, until it is dropped.
    pub(super) fn plain_at_worker(&self) -> PlainAtWorker<'_> {
        self.plain_at_workers.fetch_add(1, Ordering::SeqCst);
        PlainAtWorker(self)
    }

    fn has_plain(&self) -> bool {
        self.plain_at_workers.load(Ordering::SeqCst) > 0
            || self.plain.iter().any(|count| count.load(Ordering::SeqCst) > 0)
    }

    /// Takes `range`, or has `queue` notified when it may be free. `plain_too`: not while anything
    /// is plain.
    pub(super) fn try_take(&self, range: &Range<u64>, plain_too: bool, queue: QueueIndex) -> bool {
        let mut taken = self.lock();
        let before = taken.waiting;
        taken.waiting |= 1 << queue.0;
        // After the bit is set: what ends the last plain change sees it, or is seen.
        let took = !(plain_too && self.has_plain()) && taken.take(range);
        if took {
            // Unless something else of the queue waits.
            taken.waiting = before;
        }
        took
    }

    /// Takes `range` when it is free, and when nothing is plain if `plain_too`; `false` if that
    /// takes too long. For a change that a worker makes itself: it holds up the worker.
    pub fn take(&self, range: &Range<u64>, plain_too: bool) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut taken = self.lock();
        while (plain_too && self.has_plain()) || !taken.take(range) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            taken =
                self.released.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Gives `range` back.
    pub fn give_back(&self, range: &Range<u64>) {
        let mut taken = self.lock();
        if let Some(at) = taken.ranges.iter().position(|one| one == range) {
            taken.ranges.swap_remove(at);
        }
        self.wake(taken);
    }

    /// Has all that wait look again: something plain has ended.
    #[cold]
    pub(super) fn look_again(&self) {
        self.wake(self.lock());
    }

    fn wake(&self, mut taken: MutexGuard<'_, Taken>) {
        let waiting = std::mem::take(&mut taken.waiting);
        drop(taken);
        self.released.notify_all();
        (0..u64::BITS)
            .filter(|queue| waiting & 1 << queue != 0)
            .for_each(|queue| self.host.notify(QueueIndex(queue)));
    }
}

impl Taken {
    fn take(&mut self, range: &Range<u64>) -> bool {
        let overlaps = |one: &Range<u64>| one.start < range.end && range.start < one.end;
        if self.ranges.iter().any(overlaps) {
            return false;
        }
        self.ranges.push(range.clone());
        true
    }
}

/// A plain change of a worker's.
#[derive(Debug)]
#[must_use = "it is counted until it is dropped"]
pub(super) struct PlainAtWorker<'a>(&'a Ranges);

impl Drop for PlainAtWorker<'_> {
    fn drop(&mut self) {
        if self.0.plain_at_workers.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.look_again();
        }
    }
}
