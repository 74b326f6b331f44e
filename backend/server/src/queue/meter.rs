//! What a worker counts of its requests, if anything is to be counted.
//!
//! A request takes from when its chain is seen in the ring until its answer is there. The clock is
//! read once for each batch of answers. Where the worker goes from one batch to the next without a
//! break, the time of the one's answers is when the other was taken; after a break, in which
//! nothing waited for it, it looks once more.
//!
//! A batch that is all of one kind and ended in its call, as most are, is counted at once, however
//! many requests it has. Of any other, each request is.

use domain_abi::{RawRequest, Status};
use proxy::Ended;
use rustix::time::{ClockId, clock_gettime};
use telemetry::{Line, Operation};
use virtqueue::{RequestTable, Used};

/// A batch that is counted at once: of which kind, how many requests, and how many bytes.
pub(super) type Uniform = (u32, u64, u64);

/// A worker's.
#[derive(Default)]
pub(super) struct Meter {
    /// Where it counts; nowhere, and nothing, without.
    pub(super) line: Option<&'static Line>,
    /// When the worker was last known to look at its ring, if it has had no break since.
    pub(super) looked_ns: Option<u64>,
    /// When the batch was taken.
    pub(super) taken_ns: u64,
    /// The batch, if it can be counted at once.
    pub(super) uniform: Option<Uniform>,
    /// By head: when it was taken.
    pub(super) since_ns: Vec<u64>,
}

impl Meter {
    pub(super) const fn new(line: Option<&'static Line>) -> Self {
        Self { line, looked_ns: None, taken_ns: 0, uniform: None, since_ns: Vec::new() }
    }

    /// The worker has a break.
    #[inline]
    pub(super) const fn rest(&mut self) {
        self.looked_ns = None;
    }

    /// A batch is taken.
    #[inline]
    pub(super) fn take(&mut self) {
        if self.line.is_some() {
            self.taken_ns = self.looked_ns.unwrap_or_else(now_ns);
        }
    }

    /// Where failures are counted.
    #[inline]
    pub(super) const fn line(&self) -> Option<&'static Line> {
        self.line
    }
}

impl Meter {
    pub(super) fn note(&mut self, head: usize, ns: u64) {
        if head >= self.since_ns.len() {
            self.since_ns.resize(head + 1, 0);
        }
        self.since_ns[head] = ns;
    }
}

/// Counts a request that has ended with an error.
#[cold]
pub(super) fn count_failed(requests: &RequestTable, line: Option<&'static Line>, head: usize) {
    if let (Some(line), Some((kind, _))) = (line, requests.asked(head)) {
        line.failed(operation(kind));
    }
}

/// If all are of one kind: which, how many, and how many bytes together.
#[inline]
pub(super) fn uniform(batch: &[RawRequest]) -> Option<Uniform> {
    let kind = batch.first()?.op();
    let (mut bytes, mut others) = (0, 0);
    for request in batch {
        bytes += request.len();
        others |= request.op() ^ kind;
    }
    (others == 0).then_some((kind, batch.len() as u64, bytes))
}

/// What `RequestTable::asked` calls it.
#[inline]
pub(super) fn operation(kind: u32) -> Operation {
    Operation::ALL.get(kind as usize).copied().unwrap_or(Operation::Other)
}

#[inline]
pub(super) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

/// Turns a request that has ended into its element of the used ring.
#[inline(always)]
pub(super) fn end(
    requests: &mut RequestTable,
    used: &mut Vec<Used>,
    line: Option<&'static Line>,
    ended: Ended,
) {
    if ended.status != Status::Ok {
        count_failed(requests, line, ended.slot);
    }
    if let Some(element) = requests.end(ended.slot, ended.status as u32, ended.written) {
        used.push(element);
    }
}
