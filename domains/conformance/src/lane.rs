//! One queue, driven as a worker drives it: submit what fits, reap, wait for a notification, count
//! everything.

use super::guest::GuestMemory;
use super::test_host::TestHost;
use super::{Violation, ensure};
use domain_abi::{self as abi, RawCompletion, RawRequest};
use domain_api::{QueueIndex, Status};
use domain_host::{CompletionBuffer, Instance, QueueHandle};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most requests in flight on a lane.
const DEPTH: usize = 128;
/// Most requests in one submit.
const BATCH: usize = 32;

/// A request to make.
#[derive(Debug, Clone)]
pub struct Job {
    op: u32,
    flags: u32,
    offset: u64,
    len: u64,
    data: Option<Vec<u8>>,
    pieces: Vec<usize>,
}

impl Job {
    fn new(op: u32, offset: u64, len: u64) -> Self {
        Self { op, flags: 0, offset, len, data: None, pieces: Vec::new() }
    }

    /// Reads `len` bytes at `offset`.
    #[must_use]
    pub fn read(offset: u64, len: u64) -> Self {
        Self { pieces: vec![len as usize], ..Self::new(abi::op::READ, offset, len) }
    }

    /// Writes `data` at `offset`.
    #[must_use]
    pub fn write(offset: u64, data: Vec<u8>) -> Self {
        Self {
            pieces: vec![data.len()],
            len: data.len() as u64,
            data: Some(data),
            ..Self::new(abi::op::WRITE, offset, 0)
        }
    }

    /// Flushes.
    #[must_use]
    pub fn flush() -> Self {
        Self::new(abi::op::FLUSH, 0, 0)
    }

    /// Discards `len` bytes at `offset`.
    #[must_use]
    pub fn discard(offset: u64, len: u64) -> Self {
        Self::new(abi::op::DISCARD, offset, len)
    }

    /// Zeroes `len` bytes at `offset`.
    #[must_use]
    pub fn write_zeroes(offset: u64, len: u64, may_unmap: bool) -> Self {
        let flags = if may_unmap { abi::REQUEST_MAY_UNMAP } else { 0 };
        Self { flags, ..Self::new(abi::op::WRITE_ZEROES, offset, len) }
    }

    /// A request of a kind that may not exist.
    #[must_use]
    pub fn of_kind(op: u32) -> Self {
        Self::new(op, 0, 0)
    }

    /// Spreads the data over pieces of these lengths, which repeat until all of it is covered. A
    /// piece may have any length.
    ///
    /// # Panics
    /// If all lengths are 0.
    #[must_use]
    pub fn in_pieces(mut self, lengths: &[usize]) -> Self {
        assert!(lengths.iter().any(|&len| len > 0), "pieces of nothing");
        let mut left = self.len as usize;
        self.pieces.clear();
        for &len in lengths.iter().cycle() {
            if left == 0 {
                break;
            }
            self.pieces.push(len.min(left));
            left -= len.min(left);
        }
        self
    }
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// As what.
    pub status: Status,
    /// What was read; empty for other requests.
    pub data: Vec<u8>,
}

impl Done {
    /// The data, if it went well.
    ///
    /// # Errors
    /// Another status.
    pub fn ok(self) -> Result<Vec<u8>, Violation> {
        match self.status {
            Status::Ok => Ok(self.data),
            status => Err(Violation::new(format!("a request ended with {status:?}"))),
        }
    }
}

/// A request that was made, and its memory.
struct Issued {
    /// Which of the jobs it is.
    job: usize,
    op: u32,
    written: Option<Vec<u8>>,
    len: u64,
    memory: GuestMemory,
    raw: RawRequest,
}

/// One queue of one instance, on one thread.
pub struct Lane {
    handle: Option<QueueHandle>,
    host: Arc<TestHost>,
    queue: QueueIndex,
    deadline: Duration,
    completions: CompletionBuffer,
    next_tag: u64,
    in_flight: HashMap<u64, Issued>,
    done_before: HashSet<u64>,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Lane {
    pub(super) fn attach(
        host: &Arc<TestHost>,
        instance: &Arc<Instance>,
        queue: QueueIndex,
        deadline: Duration,
    ) -> Result<Self, Violation> {
        let handle = instance.attach(queue).map_err(|error| {
            Violation::new(format!("attaching queue {} failed: {error}", queue.0))
        })?;
        Ok(Self {
            handle: Some(handle),
            host: Arc::clone(host),
            queue,
            deadline,
            // More room than can be in flight: a domain that completes twice shall be seen, not
            // stopped.
            completions: CompletionBuffer::new(2 * DEPTH),
            // Tags that no other queue, and nothing that counts from 0, comes by.
            next_tag: 0x7a60_0000_0000_0000 | u64::from(queue.0) << 32,
            in_flight: HashMap::new(),
            done_before: HashSet::new(),
        })
    }

    /// Makes one request and waits for its end.
    ///
    /// # Errors
    /// See [`run`](Self::run).
    pub fn one(&mut self, job: Job) -> Result<Done, Violation> {
        Ok(self.run(vec![job])?.remove(0))
    }

    /// Makes all requests, up to 128 at a time, and waits for their ends.
    ///
    /// # Errors
    /// A request that is lost, ends twice or was never made; one that ends without a notification;
    /// a failing call; bytes that were changed where the domain had no business.
    pub fn run(&mut self, jobs: Vec<Job>) -> Result<Vec<Done>, Violation> {
        let mut results: Vec<Option<Done>> = jobs.iter().map(|_| None).collect();
        let mut jobs = jobs.into_iter().enumerate();
        let mut waiting: VecDeque<(u64, Issued)> = VecDeque::new();
        loop {
            while waiting.len() < BATCH
                && let Some((number, job)) = jobs.next()
            {
                self.next_tag += 1;
                waiting.push_back((self.next_tag, self.issue(number, job)));
            }
            // Read before the calls: a notification that comes after them must not be missed.
            let seen = self.host.notifications(self.queue);
            let moved = self.submit(&mut waiting, &mut results)? + self.reap(&mut results)?;
            if waiting.is_empty() && self.in_flight.is_empty() && jobs.len() == 0 {
                break;
            }
            if moved > 0 {
                continue;
            }
            ensure(!self.in_flight.is_empty(), || {
                format!("it took none of {} requests while nothing was in flight", waiting.len())
            })?;
            self.wait(seen, &mut results)?;
        }
        ensure(self.reap(&mut results)? == 0, || {
            "it completed a request that was never made".to_owned()
        })?;
        results
            .into_iter()
            .map(|done| done.ok_or_else(|| Violation::new("a request has no result")))
            .collect()
    }

    fn issue(&self, number: usize, job: Job) -> Issued {
        let mut memory = GuestMemory::new(&job.pieces);
        if let Some(data) = &job.data {
            memory.fill(data);
        }
        // SAFETY: the list is a box of `memory`, which `Issued` keeps until the request has
        // completed, or leaks (Drop).
        let mut raw =
            unsafe { RawRequest::new(job.op, job.flags, job.offset, job.len, memory.segments()) };
        raw.tag = self.next_tag;
        raw.generation = self.handle().instance().generation();
        Issued { job: number, op: job.op, written: job.data, len: job.len, memory, raw }
    }

    fn handle(&self) -> &QueueHandle {
        self.handle.as_ref().expect("taken in drop only")
    }

    /// Offers what waits; returns how many requests were taken or ended.
    fn submit(
        &mut self,
        waiting: &mut VecDeque<(u64, Issued)>,
        results: &mut [Option<Done>],
    ) -> Result<usize, Violation> {
        let room = (DEPTH - self.in_flight.len()).min(BATCH);
        let offered: Vec<RawRequest> =
            waiting.iter().take(room).map(|(_, issued)| issued.raw).collect();
        if offered.is_empty() {
            return Ok(0);
        }
        let handle = self.handle.as_mut().expect("taken in drop only");
        match handle.submit(&offered, &mut self.completions) {
            Ok(taken) => {
                ensure(taken <= offered.len(), || {
                    format!("it says that it took {taken} of {} requests", offered.len())
                })?;
                self.in_flight.extend(waiting.drain(..taken));
                Ok(taken + self.settle(results)?)
            }
            Err(error) => {
                // How many it took is unknown: it may have them all.
                self.in_flight.extend(waiting.drain(..offered.len()));
                Err(Violation::new(format!("submit failed: {error}")))
            }
        }
    }

    fn reap(&mut self, results: &mut [Option<Done>]) -> Result<usize, Violation> {
        let handle = self.handle.as_mut().expect("taken in drop only");
        handle
            .reap(&mut self.completions)
            .map_err(|error| Violation::new(format!("reap failed: {error}")))?;
        self.settle(results)
    }

    /// Waits for a notification. What only turns up afterwards, or never, is a violation.
    fn wait(&mut self, seen: u64, results: &mut [Option<Done>]) -> Result<(), Violation> {
        if self.host.wait_notified(self.queue, seen, Instant::now() + self.deadline) {
            return Ok(());
        }
        let late = self.reap(results)?;
        let after = self.deadline;
        Err(Violation::new(if late > 0 {
            format!(
                "{late} requests ended without a notification; a sleeping worker would not have noticed"
            )
        } else {
            format!("{} requests were not answered within {after:?}", self.in_flight.len())
        }))
    }

    /// Matches completions with what is in flight; returns how many there were.
    fn settle(&mut self, results: &mut [Option<Done>]) -> Result<usize, Violation> {
        let completed: Vec<RawCompletion> = self.completions.completed().to_vec();
        let generation = self.handle().instance().generation();
        for completion in &completed {
            let Some(issued) = self.in_flight.remove(&completion.tag) else {
                return Err(Violation::new(if self.done_before.contains(&completion.tag) {
                    format!("it completed request {:#x} twice", completion.tag)
                } else {
                    format!("it completed request {:#x}, which it does not have", completion.tag)
                }));
            };
            self.done_before.insert(completion.tag);
            ensure(completion.generation == generation, || {
                format!("it completed for generation {}, not {generation}", completion.generation)
            })?;
            results[issued.job] = Some(outcome(completion, &issued)?);
        }
        Ok(completed.len())
    }
}

fn outcome(completion: &RawCompletion, issued: &Issued) -> Result<Done, Violation> {
    let status = match completion.status {
        abi::status::OK => Status::Ok,
        abi::status::IO_ERROR => Status::IoError,
        abi::status::UNSUPPORTED => Status::Unsupported,
        other => {
            return Err(Violation::new(format!("it completed with the unknown status {other}")));
        }
    };
    let read = issued.op == abi::op::READ;
    let expected = if read && status == Status::Ok { issued.len } else { 0 };
    ensure(u64::from(completion.written) == expected, || {
        format!("it says that it wrote {} bytes, not {expected}", completion.written)
    })?;
    let now = issued.memory.take()?;
    if let Some(written) = &issued.written {
        ensure(now == *written, || "it changed the data that it was to write".to_owned())?;
    }
    Ok(Done { status, data: if read { now } else { Vec::new() } })
}

impl Drop for Lane {
    fn drop(&mut self) {
        drop(self.handle.take());
        // What never ended may still be used by the domain, for ever: its memory must stay.
        for (_, issued) in self.in_flight.drain() {
            std::mem::forget(issued);
        }
    }
}
