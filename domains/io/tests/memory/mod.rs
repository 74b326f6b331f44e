//! A disk in memory behind a port that keeps each job for a while and ends them in order.
//!
//! In order is the worst there is for changes that are carried out by reading, changing and
//! writing: of several in one block all would read before the first one writes.

use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Op, Params,
    QueueContext, QueueIndex, Region, Request, Status, Swap,
};
use domain_io::Aligned;
use domain_io::engine::modify::{self, MOST_ALIGNED, Transfer};
use domain_io::engine::{
    AfterSync, Backend, Engine, JobKind, Opens, Port, PortEnd, Queue, QueueState, SECTOR, Shared,
    Step, ranges,
};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How long a job takes.
const LATENCY: Duration = Duration::from_micros(20);
/// Jobs that a port has room for: fewer than the suite has in flight.
const ROOM: usize = 24;
/// What follows the first sync of an instance, by one queue at a time.
const WITNESS: Range<u64> = u64::MAX - 1..u64::MAX;
/// Counters.
pub const SYNCS: &str = "syncs";
pub const WITNESS_SYNCS: &str = "witness_syncs";

const ECANCELED: i32 = 125;

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum What {
    Read,
    Write,
    Zeros,
    Sync,
    SyncWitness,
    ReadAligned,
    WriteAligned,
}

pub struct MemoryJob {
    what: What,
    aligned: Option<Box<Aligned>>,
}

impl MemoryJob {
    const fn new(what: What) -> Self {
        Self { what, aligned: None }
    }
}

/// What the data is in.
struct Medium {
    host: Host,
    region: OnceLock<Region>,
    /// Reads that go beyond this byte fail.
    bad_from: u64,
}

impl Medium {
    fn region(&self) -> Region {
        self.region.get().expect("it is activated").clone()
    }

    fn carry_out(&self, request: &Request, job: &mut MemoryJob) -> io::Result<()> {
        let region = self.region();
        match job.what {
            What::Read if request.offset() + request.len() > self.bad_from => {
                return Err(io::Error::other("a bad block"));
            }
            What::Read => region.read(request.offset(), &request.buffer()),
            What::Write => region.write(request.offset(), &request.buffer()),
            What::Zeros => region.zero(request.offset(), request.len()),
            What::Sync => self.host.count(SYNCS, 1),
            What::SyncWitness => self.host.count(WITNESS_SYNCS, 1),
            What::ReadAligned | What::WriteAligned => {
                let aligned = job.aligned.as_mut().expect("it comes with it");
                let (bytes, at) = aligned.rest_mut();
                match job.what {
                    What::ReadAligned => region.copy_to_slice(at, bytes),
                    _ => region.copy_from_slice(at, bytes),
                }
                let len = bytes.len();
                aligned.moved_more(len);
            }
        }
        Ok(())
    }
}

/// A queue's way to the medium, as slow as a device.
pub struct SlowPort {
    host: Host,
    index: QueueIndex,
    medium: Arc<Medium>,
    jobs: VecDeque<(Duration, Request, MemoryJob)>,
    /// How many of these are given up.
    given_up: usize,
}

impl Port for SlowPort {
    type Job = MemoryJob;

    fn kind(job: &MemoryJob) -> JobKind {
        match job.what {
            What::Sync | What::SyncWitness => JobKind::Sync,
            What::Write | What::Zeros | What::WriteAligned => JobKind::Change,
            What::Read | What::ReadAligned => JobKind::Other,
        }
    }

    fn capacity(&self) -> usize {
        ROOM
    }

    fn in_flight(&self) -> usize {
        self.jobs.len()
    }

    fn has_room(&self) -> bool {
        self.jobs.len() < ROOM
    }

    fn push(&mut self, request: Request, job: MemoryJob) {
        assert!(self.has_room(), "the engine pushes more than there is room for");
        let (host, index) = (self.host, self.index);
        self.jobs.push_back((host.clock() + LATENCY, request, job));
        host.after(LATENCY, move || host.notify(index)).expect("the instance lives");
    }

    fn advance(&mut self) -> Option<PortEnd<MemoryJob>> {
        if self.jobs.front()?.0 > self.host.clock() {
            return None;
        }
        let (_, request, mut job) = self.jobs.pop_front()?;
        let result = if self.given_up > 0 {
            self.given_up -= 1;
            Err(io::Error::from_raw_os_error(ECANCELED))
        } else {
            self.medium.carry_out(&request, &mut job)
        };
        Some(PortEnd { request, job, result })
    }

    fn cancel(&mut self) {
        self.given_up = self.jobs.len();
    }
}

/// What maps requests to jobs.
pub struct Memory {
    host: Host,
    shared: Shared,
    medium: Arc<Medium>,
    opens: Opens,
    alignment: AtomicU64,
    first_alignment: u64,
    /// How many requests are begun until the alignment grows; 0 for never.
    grows_after: AtomicU64,
    witnessed: AtomicBool,
}

impl Memory {
    fn transfer(&self, request: &Request, transfer: Transfer) -> Step<MemoryJob> {
        let push = |what, aligned| Step::Push(MemoryJob { what, aligned: Some(aligned) });
        match transfer {
            Transfer::Read(aligned) => push(What::ReadAligned, aligned),
            Transfer::Write(aligned) => push(What::WriteAligned, aligned),
            Transfer::Done => Step::Done(Status::Ok),
            Transfer::CutShort => {
                let error = io::ErrorKind::UnexpectedEof.into();
                Step::Done(self.shared.failed(request, &error))
            }
        }
    }
}

impl Backend for Memory {
    type Port = SlowPort;
    type Local = ();

    fn shared(&self) -> &Shared {
        &self.shared
    }

    fn opens(&self) -> Opens {
        self.opens
    }

    fn local(&self, _: QueueIndex) {}

    fn open(&self, (): &(), index: QueueIndex) -> Option<SlowPort> {
        let medium = Arc::clone(&self.medium);
        Some(SlowPort { host: self.host, index, medium, jobs: VecDeque::new(), given_up: 0 })
    }

    fn begin(&self, queue: &mut QueueState<Self>, request: &Request) -> Step<MemoryJob> {
        if self.grows_after.load(Ordering::Relaxed) > 0
            && self.grows_after.fetch_sub(1, Ordering::Relaxed) == 1
        {
            self.alignment.store(4096, Ordering::SeqCst);
        }
        let Some(op) = request.op() else { return Step::Done(Status::Unsupported) };
        let alignment = self.alignment();
        match op {
            Op::Flush => Step::Sync,
            Op::Read => Step::Push(MemoryJob::new(What::Read)),
            Op::Discard => {
                let region = self.medium.region();
                let (offset, len) = (request.offset(), request.len());
                Step::Offload(Box::new(move || region.punch_hole(offset, len)))
            }
            Op::Write | Op::WriteZeroes { .. }
                if ranges::needs_range(alignment)
                    && !queue.take_range(self, request, alignment) =>
            {
                Step::Blocked
            }
            // Some of them by the worker, so that both ways meet.
            Op::WriteZeroes { .. } if request.len() > 16 * SECTOR => Step::Serve,
            Op::WriteZeroes { .. } => Step::Push(MemoryJob::new(What::Zeros)),
            Op::Write => {
                let range = queue.range(self, request);
                let len = range.end - range.start;
                if len <= MOST_ALIGNED && ranges::has_edges(request, alignment) {
                    let transfer = modify::begin(request, &range, alignment.min(len));
                    return self.transfer(request, transfer);
                }
                Step::Push(MemoryJob::new(What::Write))
            }
        }
    }

    fn ended(
        &self,
        _: &mut QueueState<Self>,
        request: &Request,
        job: MemoryJob,
        result: io::Result<()>,
    ) -> Step<MemoryJob> {
        match (result, job) {
            (Ok(()), MemoryJob { what: What::ReadAligned, aligned: Some(aligned) }) => {
                self.transfer(request, modify::read_ended(request, aligned))
            }
            (result, _) => Step::Done(self.shared.status(request, result)),
        }
    }

    fn serve(&self, (): &mut (), request: &Request) -> Status {
        let carry_out = |what| self.medium.carry_out(request, &mut MemoryJob::new(what));
        let result = match request.op() {
            None => return Status::Unsupported,
            Some(Op::Discard) => Ok(()),
            Some(Op::Read) => carry_out(What::Read),
            Some(Op::Flush) => carry_out(What::Sync),
            Some(Op::Write) => self.change_at_worker(request, |_| carry_out(What::Write)),
            Some(Op::WriteZeroes { .. }) => {
                self.change_at_worker(request, |_| carry_out(What::Zeros))
            }
        };
        self.shared.status(request, result)
    }

    fn sync_job(&self) -> MemoryJob {
        MemoryJob::new(What::Sync)
    }

    fn synced(&self, job: MemoryJob, result: io::Result<()>) -> AfterSync<MemoryJob> {
        if job.what == What::SyncWitness && result.is_ok() {
            self.witnessed.store(true, Ordering::Relaxed);
        } else if result.is_ok() && !self.witnessed.load(Ordering::Relaxed) {
            return AfterSync::Then(MemoryJob::new(What::SyncWitness), WITNESS);
        }
        AfterSync::Done(result)
    }

    fn alignment(&self) -> u64 {
        self.alignment.load(Ordering::SeqCst)
    }

    fn may_grow(&self) -> bool {
        true
    }

    fn has_grown(&self) -> bool {
        self.alignment() > self.first_alignment
    }
}

/// The domain around it: what a domain has to pass on.
pub struct MemoryDisk {
    host: Host,
    engine: Engine<Memory>,
    size: u64,
}

impl BlockDomain for MemoryDisk {
    const NAME: &'static str = "memory";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "memory";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] = &["size", "opens", "block", "grows", "bad"];
    const INHERITED: &'static [&'static str] = Self::PARAMS;
    type Queue = Queue<Memory>;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let size = params.size("size", 1 << 20)?;
        if size == 0 || !size.is_multiple_of(4096) {
            return Err(DomainError::new("`size` must be a positive multiple of 4096"));
        }
        let opens = match params.get("opens") {
            Some("never") => Opens::Never,
            Some("at_once") => Opens::AtOnce,
            _ => Opens::WhenNeeded,
        };
        let alignment = params.size("block", SECTOR)?;
        let bad_from = params.size("bad", u64::MAX)?;
        let backend = Memory {
            host,
            shared: Shared::new(host),
            medium: Arc::new(Medium { host, region: OnceLock::new(), bad_from }),
            opens,
            alignment: AtomicU64::new(alignment),
            first_alignment: alignment,
            grows_after: AtomicU64::new(params.size("grows", 0)?),
            witnessed: AtomicBool::new(false),
        };
        Ok(Self { host, engine: Engine::new(host, backend), size })
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            capacity: self.size,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 0,
            discard_granularity: 4096,
            capabilities: Capabilities::FLUSH
                .with(Capabilities::DISCARD)
                .with(Capabilities::WRITE_ZEROES),
            swap: Swap::No,
            backing_kind: "memory".to_owned(),
            backing_id: (0, 0),
            backing_cache: 0,
            serial: String::new(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        let storage = self.host.storage();
        let _ = self.engine.backend().medium.region.set(storage.region("disk", self.size)?);
        storage.set_schema(Self::SCHEMA)
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        Ok(())
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Self::Queue, DomainError> {
        Ok(self.engine.attach(context.queue))
    }

    fn detach_queue(&self, queue: Self::Queue) {
        self.engine.detach(queue);
    }

    fn submit(
        &self,
        queue: &mut Self::Queue,
        batch: &mut Batch<'_>,
        completions: &mut Completions<'_>,
    ) {
        self.engine.submit(queue, batch, completions);
    }

    fn reap(&self, queue: &mut Self::Queue, completions: &mut Completions<'_>) {
        self.engine.reap(queue, completions);
    }

    fn cancel(&self) {
        self.engine.cancel();
    }
}
