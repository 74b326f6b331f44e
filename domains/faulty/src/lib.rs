//! A disk in memory that breaks on demand, for testing what is around a domain.
//!
//! It has the storage layout of `ramdisk` and announces the same device, so that it can follow a
//! ramdisk and be followed by one. With the parameter `fault=PHASE:KIND[:N]` it breaks once, at the
//! N-th time (default: the first) that this instance comes to PHASE; see `fault`. Several, with
//! commas between them, come each at their time, and in their order. The fault is not inherited, so
//! a successor, or a rollback, does not break again because its predecessor did.
//!
//! It can also be worse than it should be all the time: with `error_every=N` each N-th request ends
//! with an I/O error, with `bad=SIZE` reads of the first SIZE bytes do, and with `delay_ms=N` each
//! request is answered so much later. None of these is inherited either.
//!
//! With `fault=PHASE:reach` it reaches for what is outside of a disk: all that `reach=WHAT` says,
//! with commas between them; see `reach`. What came of it is logged and counted. `path`, `aio` and
//! `uri` mean nothing to it: they are what a host gives other disks more for.
//!
//! What is the same as in `ramdisk` is written down again, for domains do not depend on each other;
//! it is kept to what tests need.

#![forbid(unsafe_code)]

mod fault;
mod reach;

use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Op, Params,
    QueueContext, QueueIndex, Region, Request, Status, Swap,
};
use fault::{Fault, FaultKind, LATE, Phase};
use reach::Reach;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const REGION: &str = "disk";
const DEFAULT_SIZE: u64 = 64 << 20;
const BLOCK_SIZE: u32 = 512;
const PAGE_SIZE: u32 = 4096;

/// The disk that breaks.
#[derive(Debug)]
pub struct Faulty {
    host: Host,
    size: u64,
    serial: String,
    region: OnceLock<Region>,
    faults: Vec<Fault>,
    /// What it reaches for when that is its fault.
    reach: Vec<Reach>,
    /// Each so-manieth request fails; 0 is none.
    error_every: u64,
    requests: AtomicU64,
    /// Reads that begin before fail.
    bad: u64,
    /// Each request is answered so much later.
    delay: Duration,
    /// Set by `cancel`: what is stalled fails now.
    cancelled: AtomicBool,
    /// Bit per queue that has something stalled, for `cancel` to notify.
    stalled_queues: AtomicU64,
}

/// A queue, and the requests that it holds back.
#[derive(Debug)]
pub struct Queue {
    index: QueueIndex,
    stalled: Vec<(Duration, Request)>,
}

impl BlockDomain for Faulty {
    const NAME: &'static str = "faulty";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "ramdisk";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    // The last ones are for the host, which gives a domain what it has them for.
    const PARAMS: &'static [&'static str] = &[
        "size",
        "serial",
        "fault",
        "reach",
        "error_every",
        "bad",
        "delay_ms",
        "path",
        "aio",
        "uri",
    ];
    const INHERITED: &'static [&'static str] = &["size", "serial"];

    type Queue = Queue;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let there = host.storage().region_len(REGION);
        let size = params.size("size", if there == 0 { DEFAULT_SIZE } else { there })?;
        if size == 0 || !size.is_multiple_of(u64::from(BLOCK_SIZE)) || (there != 0 && there != size)
        {
            return Err(DomainError::new(format!(
                "parameter `size` is {size} bytes; it must be a positive multiple of {BLOCK_SIZE}, and that of the disk in storage (now {there}, 0 for none)"
            )));
        }
        let faults = params
            .get("fault")
            .map_or(Ok(Vec::new()), |list| list.split(',').map(str::parse).collect())?;
        let reach = params
            .get("reach")
            .map_or(Ok(Vec::new()), |list| list.split(',').map(str::parse).collect())?;
        let serial = params.serial()?;
        let delay = Duration::from_millis(number(params, "delay_ms")?);
        let new = Self {
            host,
            size,
            serial,
            region: OnceLock::new(),
            faults,
            reach,
            error_every: number(params, "error_every")?,
            requests: AtomicU64::new(0),
            bad: params.size("bad", 0)?,
            delay,
            cancelled: AtomicBool::new(false),
            stalled_queues: AtomicU64::new(0),
        };
        new.break_in(Phase::Prepare)?;
        Ok(new)
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            capacity: self.capacity(),
            block_size: BLOCK_SIZE,
            physical_block_size: PAGE_SIZE,
            optimal_io_size: 0,
            discard_granularity: PAGE_SIZE,
            capabilities: Capabilities::FLUSH
                .with(Capabilities::DISCARD)
                .with(Capabilities::WRITE_ZEROES),
            swap: Swap::No,
            backing_kind: "memory".to_owned(),
            backing_id: (0, 0),
            backing_cache: 0,
            serial: self.serial.clone(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        self.break_in(Phase::Activate)?;
        let (storage, capacity) = (self.host.storage(), self.capacity());
        match self.region.get() {
            Some(region) => storage.grow_region(REGION, region, capacity)?,
            None => _ = self.region.set(storage.region(REGION, capacity)?),
        }
        storage.set_schema(Self::SCHEMA)
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        self.break_in(Phase::Resize)?;
        let region = self.region.get().ok_or_else(|| DomainError::new("it does not serve yet"))?;
        self.host.storage().grow_region(REGION, region, capacity)
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        self.break_in(Phase::Quiesce)
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Queue, DomainError> {
        Ok(Queue { index: context.queue, stalled: Vec::new() })
    }

    fn submit(&self, queue: &mut Queue, batch: &mut Batch<'_>, completions: &mut Completions<'_>) {
        while let Some(request) = batch.next() {
            // Every one of them is counted.
            match self.faults.iter().map(|fault| fault.comes(Phase::Request)).fold(None, Option::or)
            {
                None => {}
                Some(FaultKind::Fail) => {
                    completions.complete(request, Status::IoError);
                    continue;
                }
                Some(FaultKind::Panic) => panic!("fault=request:panic"),
                Some(FaultKind::Stall) => {
                    self.stall(queue, request, LATE, completions);
                    continue;
                }
                Some(FaultKind::Hang) => std::thread::sleep(LATE),
                Some(FaultKind::Reach) => self.reach_out(),
            }
            if !self.delay.is_zero() {
                self.stall(queue, request, self.delay, completions);
                continue;
            }
            let status = self.serve(&request);
            completions.complete(request, status);
        }
    }

    fn reap(&self, queue: &mut Queue, completions: &mut Completions<'_>) {
        if queue.stalled.is_empty() {
            return;
        }
        let now = self.host.clock();
        // Acquire pairs with the Release in `cancel`.
        let cancelled = self.cancelled.load(Ordering::Acquire);
        for (due, request) in std::mem::take(&mut queue.stalled) {
            if cancelled {
                completions.complete(request, Status::IoError);
            } else if due <= now {
                let status = self.serve(&request);
                completions.complete(request, status);
            } else {
                queue.stalled.push((due, request));
            }
        }
    }

    fn cancel(&self) {
        let queues = self.stalled_queues.swap(0, Ordering::AcqRel);
        if queues == 0 {
            return;
        }
        // Release pairs with the Acquire in `reap`.
        self.cancelled.store(true, Ordering::Release);
        for queue in (0..u64::BITS).filter(|bit| queues & 1 << bit != 0) {
            self.host.notify(QueueIndex(queue));
        }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        // An end cannot report a failure to anything.
        let _ = self.break_in(Phase::End);
    }
}

impl Faulty {
    fn capacity(&self) -> u64 {
        match self.host.storage().region_len(REGION) {
            0 => self.size,
            there => there,
        }
    }

    /// Breaks in a phase other than a request, if it is time to.
    fn break_in(&self, phase: Phase) -> Result<(), DomainError> {
        for kind in self.faults.iter().filter_map(|fault| fault.comes(phase)) {
            match kind {
                FaultKind::Fail => return Err(DomainError::new(format!("fault={phase}:fail"))),
                FaultKind::Panic => panic!("fault={phase}:panic"),
                // Nothing but the calling thread can be late here.
                FaultKind::Stall | FaultKind::Hang => std::thread::sleep(LATE),
                FaultKind::Reach => self.reach_out(),
            }
        }
        Ok(())
    }

    fn reach_out(&self) {
        for reach in &self.reach {
            reach.reach_out(self.host);
        }
    }

    /// Keeps a request in flight, and lets the worker go on.
    fn stall(
        &self,
        queue: &mut Queue,
        request: Request,
        late: Duration,
        completions: &mut Completions<'_>,
    ) {
        let (host, index) = (self.host, queue.index);
        let due = host.clock() + late;
        if let Err(error) = host.after(late, move || host.notify(index)) {
            host.log(domain_api::Level::Error, &format!("cannot stall a request: {error}"));
            completions.complete(request, Status::IoError);
            return;
        }
        queue.stalled.push((due, request));
        self.stalled_queues.fetch_or(1 << index.0, Ordering::AcqRel);
    }

    fn serve(&self, request: &Request) -> Status {
        // A counter by itself: Relaxed.
        let number = 1 + self.requests.fetch_add(1, Ordering::Relaxed);
        let is_bad = request.op() == Some(Op::Read) && request.offset() < self.bad;
        if is_bad || self.error_every != 0 && number.is_multiple_of(self.error_every) {
            return Status::IoError;
        }
        let Some(region) = self.region.get() else { return Status::IoError };
        match request.op() {
            Some(Op::Read) => region.read(request.offset(), &request.buffer()),
            Some(Op::Write) => region.write(request.offset(), &request.buffer()),
            Some(Op::Flush | Op::Discard) => {}
            Some(Op::WriteZeroes { .. }) => region.zero(request.offset(), request.len()),
            None => return Status::Unsupported,
        }
        Status::Ok
    }
}

/// A whole number at `key`; 0 if there is none.
fn number(params: &Params, key: &str) -> Result<u64, DomainError> {
    let Some(text) = params.get(key) else { return Ok(0) };
    text.parse().map_err(|_| {
        DomainError::new(format!("parameter `{key}` is `{text}`; it must be a whole number"))
    })
}

domain_api::export_domain!(Faulty);
