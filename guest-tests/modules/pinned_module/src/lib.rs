//! A ramdisk that does what a domain should not: it leaves something behind that keeps its module
//! mapped.
//!
//! `keeps=tls` a thread-local with a destructor, on a worker's thread; `keeps=thread` a thread of
//! its own; `keeps=host-thread` a thread of the host's that does not end; `keeps=timer` a timer
//! that is not due for an hour, which is harmless, because the host frees it. A thread ends after
//! `seconds`, if they are given.
//!
//! `keeps=request` its first request, for three seconds, while it goes on with others;
//! `keeps=nothing` is for what follows it. These two serve side by side, which a ramdisk can
//! because the region is the host's and nothing of it is kept anywhere else.

#![forbid(unsafe_code)]

use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Level, Op,
    Params, QueueContext, QueueIndex, Region, Request, Status, Swap,
};
use std::cell::RefCell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

thread_local! {
    /// A `Vec` has a destructor, which is registered with the thread at its first use and points
    /// into this module.
    static KEPT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How long a request is kept.
const LATE: Duration = Duration::from_secs(3);

/// A queue, and the request that it keeps.
pub struct Queue {
    index: QueueIndex,
    kept: Option<(Duration, Request)>,
}

/// The domain.
pub struct PinnedModule {
    host: Host,
    size: u64,
    serial: String,
    keeps_tls: bool,
    /// Whether the next request is the one that is kept.
    keeps_next: AtomicBool,
    swaps: Swap,
    region: OnceLock<Region>,
}

impl BlockDomain for PinnedModule {
    const NAME: &'static str = "pinned_module";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "ramdisk";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] = &["size", "serial", "keeps", "seconds"];
    const INHERITED: &'static [&'static str] = &["size", "serial"];

    type Queue = Queue;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let left =
            params.get("seconds").and_then(|text| text.parse::<u64>().ok()).unwrap_or(u64::MAX);
        let forever = move || (0..left).for_each(|_| std::thread::sleep(Duration::from_secs(1)));
        match params.get("keeps") {
            Some("tls" | "request" | "nothing") => {}
            Some("thread") => drop(std::thread::spawn(forever)),
            Some("host-thread") => host.spawn("pinned_module", forever)?,
            Some("timer") => host.after(Duration::from_secs(3600), || {})?,
            other => {
                return Err(DomainError::new(format!(
                    "keeps={other:?}; say tls, thread, host-thread, timer, request or nothing"
                )));
            }
        }
        Ok(Self {
            host,
            size: params.size("size", 64 << 20)?,
            serial: params.serial()?,
            keeps_tls: params.get("keeps") == Some("tls"),
            keeps_next: AtomicBool::new(params.get("keeps") == Some("request")),
            swaps: match params.get("keeps") {
                Some("request" | "nothing") => Swap::SameBacking,
                _ => Swap::No,
            },
            region: OnceLock::new(),
        })
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
            swap: self.swaps,
            backing_kind: "memory".to_owned(),
            backing_id: (0, 0),
            backing_cache: 0,
            serial: self.serial.clone(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        let storage = self.host.storage();
        let region = storage.region("disk", self.size)?;
        storage.set_schema(Self::SCHEMA)?;
        let _ = self.region.set(region);
        Ok(())
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        Ok(())
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Queue, DomainError> {
        Ok(Queue { index: context.queue, kept: None })
    }

    fn submit(&self, queue: &mut Queue, batch: &mut Batch<'_>, completions: &mut Completions<'_>) {
        if self.keeps_tls {
            KEPT.with_borrow_mut(|kept| kept.push(1));
        }
        while let Some(request) = batch.next() {
            if self.keeps_next.swap(false, Ordering::Relaxed) {
                let (host, index) = (self.host, queue.index);
                queue.kept = Some((host.clock() + LATE, request));
                if let Err(error) = host.after(LATE, move || host.notify(index)) {
                    host.log(Level::Error, &format!("a request is kept for good: {error}"));
                }
                continue;
            }
            self.serve(request, completions);
        }
    }

    fn reap(&self, queue: &mut Queue, completions: &mut Completions<'_>) {
        if let Some((_, request)) = queue.kept.take_if(|(due, _)| *due <= self.host.clock()) {
            self.serve(request, completions);
        }
    }
}

impl PinnedModule {
    fn serve(&self, request: Request, completions: &mut Completions<'_>) {
        let region = self.region.get().expect("activated before the first request");
        match request.op() {
            Some(Op::Read) => region.read(request.offset(), &request.buffer()),
            Some(Op::Write) => region.write(request.offset(), &request.buffer()),
            Some(Op::WriteZeroes { .. }) => region.zero(request.offset(), request.len()),
            _ => {}
        }
        completions.complete(request, Status::Ok);
    }
}

domain_api::export_domain!(PinnedModule);
