//! A disk in a file whose requests end 20 to 300 ms after they came, in any order: what is in
//! flight is never what came last.

#![forbid(unsafe_code)]

use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Level, Op,
    Params, QueueContext, QueueIndex, Request, Status, Swap,
};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// The shortest time that a request takes, and how many milliseconds it may be longer.
const SHORTEST: Duration = Duration::from_millis(20);
const SPREAD_MS: u64 = 280;

/// The disk.
pub struct Tardy {
    host: Host,
    file: File,
    size: u64,
}

/// A queue, and what is in flight of it.
pub struct Queue {
    index: QueueIndex,
    random: u64,
    waiting: Vec<(Duration, Request)>,
}

impl Queue {
    /// xorshift64: any numbers will do.
    fn delay(&mut self) -> Duration {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        SHORTEST + Duration::from_millis(self.random % SPREAD_MS)
    }
}

impl BlockDomain for Tardy {
    const NAME: &'static str = "tardy";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "tardy";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] = &["path"];
    const INHERITED: &'static [&'static str] = &["path"];

    type Queue = Queue;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let path = params.get("path").unwrap_or_default();
        let open = File::options().read(true).write(true).open(path);
        let file = open.map_err(|error| DomainError::new(format!("`{path}`: {error}")))?;
        let metadata = file.metadata();
        let size = metadata.map_err(|error| DomainError::new(format!("`{path}`: {error}")))?.len();
        Ok(Self { host, file, size })
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            capacity: self.size,
            block_size: 512,
            physical_block_size: 512,
            optimal_io_size: 0,
            discard_granularity: 512,
            capabilities: Capabilities::FLUSH,
            swap: Swap::No,
            backing_kind: "file".to_owned(),
            backing_id: (0, 0),
            backing_cache: 0,
            serial: String::new(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        self.host.storage().set_schema(Self::SCHEMA)
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        Ok(())
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Queue, DomainError> {
        let random = self.host.clock().as_nanos() as u64 | 1;
        Ok(Queue { index: context.queue, random, waiting: Vec::new() })
    }

    fn submit(&self, queue: &mut Queue, batch: &mut Batch<'_>, completions: &mut Completions<'_>) {
        while let Some(request) = batch.next() {
            let (host, index, delay) = (self.host, queue.index, queue.delay());
            // Looked at before the timer is set, so that it is due when the timer comes.
            let due = host.clock() + delay;
            match host.after(delay, move || host.notify(index)) {
                Ok(()) => queue.waiting.push((due, request)),
                Err(error) => {
                    host.log(Level::Error, &format!("a request cannot wait: {error}"));
                    completions.complete(request, Status::IoError);
                }
            }
        }
    }

    fn reap(&self, queue: &mut Queue, completions: &mut Completions<'_>) {
        let now = self.host.clock();
        for (due, request) in std::mem::take(&mut queue.waiting) {
            if due > now {
                queue.waiting.push((due, request));
                continue;
            }
            let status = self.serve(&request).map_or(Status::IoError, |()| Status::Ok);
            completions.complete(request, status);
        }
    }
}

impl Tardy {
    fn serve(&self, request: &Request) -> io::Result<()> {
        let mut bytes = vec![0; request.buffer().len()];
        match request.op() {
            Some(Op::Read) => {
                self.file.read_exact_at(&mut bytes, request.offset())?;
                request.buffer().copy_from_slice(0, &bytes);
                Ok(())
            }
            Some(Op::Write) => {
                request.buffer().copy_to_slice(0, &mut bytes);
                self.file.write_all_at(&bytes, request.offset())
            }
            Some(Op::Flush) => self.file.sync_data(),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

domain_api::export_domain!(Tardy);
