//! The domain `file`, and a panic at the first flush: what a fault in a file's domain leaves to its
//! successor.
//!
//! The flush has been given to the kernel by then. `panics=reap` waits for the kernel's answer
//! first and keeps it to itself; `panics=submit` does not wait.

#![forbid(unsafe_code)]

use domain_api::{
    Batch, BlockDomain, Completions, DeviceInfo, DomainError, Host, Params, QueueContext,
};
use domain_file::FileDisk;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// The domain.
pub struct Fragile {
    file: FileDisk,
    in_reap: bool,
    /// How many calls of `submit` go well.
    calls: AtomicU32,
    is_due: AtomicBool,
}

impl BlockDomain for Fragile {
    const NAME: &'static str = "fragile";
    const VERSION: &'static str = FileDisk::VERSION;
    const SCHEMA_NAME: &'static str = FileDisk::SCHEMA_NAME;
    const SCHEMA: u32 = FileDisk::SCHEMA;
    const ACCEPTED_SCHEMAS: &'static [u32] = FileDisk::ACCEPTED_SCHEMAS;
    const PARAMS: &'static [&'static str] = &[
        "path",
        "direct",
        "readonly",
        "locking",
        "block_size",
        "serial",
        "aio",
        "panics",
        "calls",
    ];
    const INHERITED: &'static [&'static str] = FileDisk::INHERITED;

    type Queue = <FileDisk as BlockDomain>::Queue;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let in_reap = match params.get("panics") {
            Some("reap") => true,
            Some("submit") => false,
            other => return Err(DomainError::new(format!("panics={other:?}; say reap or submit"))),
        };
        let calls = params.get("calls").and_then(|text| text.parse().ok()).unwrap_or(0);
        let file = FileDisk::prepare(host, params)?;
        Ok(Self { file, in_reap, calls: AtomicU32::new(calls), is_due: AtomicBool::new(false) })
    }

    fn info(&self) -> DeviceInfo {
        self.file.info()
    }

    fn activate(&self) -> Result<(), DomainError> {
        self.file.activate()
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        self.file.quiesce()
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Self::Queue, DomainError> {
        self.file.attach_queue(context)
    }

    fn detach_queue(&self, queue: Self::Queue) {
        self.file.detach_queue(queue);
    }

    fn submit(
        &self,
        queue: &mut Self::Queue,
        batch: &mut Batch<'_>,
        completions: &mut Completions<'_>,
    ) {
        let room = completions.room();
        self.file.submit(queue, batch, completions);
        let left = self
            .calls
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |calls| calls.checked_sub(1));
        if left.is_err() {
            // On a busy machine the kernel may have answered by now, so that nothing is reaped.
            assert!(self.in_reap && completions.room() == room, "as it was told to");
            self.is_due.store(true, Ordering::Relaxed);
        }
    }

    fn reap(&self, queue: &mut Self::Queue, completions: &mut Completions<'_>) {
        if self.is_due.load(Ordering::Relaxed) {
            // Long enough for the kernel to have told this instance, and no other.
            std::thread::sleep(std::time::Duration::from_millis(100));
            panic!("as it was told to");
        }
        self.file.reap(queue, completions);
    }

    fn cancel(&self) {
        self.file.cancel();
    }

    fn set_write_cache(&self, on: bool) {
        self.file.set_write_cache(on);
    }
}

domain_api::export_domain!(Fragile);
