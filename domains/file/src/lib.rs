//! A disk in a raw file or block device.
//!
//! The data is where it is: in the file, reached through the page cache or, with `direct=true`,
//! past it. An instance holds no data and, as a rule, does no read-modify-write, so two of them on
//! the same file serve side by side, and an upgrade pauses nobody. For that the storage keeps the
//! first instance's descriptor, and a successor works on a dup of it; see `image` for when it
//! cannot, and why. Where direct I/O is to be aligned to more than the guest's blocks (`edges`), an
//! upgrade is a handover.
//!
//! Data moves straight from and to guest memory. What only has to be copied is served in the call
//! that submits it; whatever may wait for a device goes through io_uring, one ring per queue, and
//! ends later (`queue`). Where io_uring cannot be had, each worker serves its requests itself, one
//! after the other (`engine`, `disk`).

#![forbid(unsafe_code)]

mod announced;
mod bounce;
mod disk;
mod edges;
mod engine;
mod image;
mod offload;
mod pace;
mod queue;
mod trouble;
mod turn;

use disk::Disk;
use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Params,
    QueueContext, QueueIndex, Swap,
};
use domain_io::file_io::OpenMode;
use engine::Engine;
use image::{Image, Wanted};
use queue::{Queue, Remains};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// The disk in a file.
#[derive(Debug)]
pub struct FileDisk {
    host: Host,
    disk: Disk,
    engine: Engine,
    /// One bit for each queue that is attached.
    attached: AtomicU64,
    /// What is left of queues that were let go of, the last one of each. To end a ring takes long,
    /// and to close a descriptor may write all back (NFS, FUSE), and their worker has a guest to
    /// serve; they end with the instance.
    detached: Mutex<Vec<(QueueIndex, Remains)>>,
    serial: String,
}

impl BlockDomain for FileDisk {
    const NAME: &'static str = "file";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "file";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] =
        &["path", "direct", "readonly", "locking", "block_size", "serial", "aio"];
    const INHERITED: &'static [&'static str] = Self::PARAMS;

    type Queue = Queue;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let path = params.get("path").filter(|path| !path.is_empty()).ok_or_else(|| {
            DomainError::new(
                "parameter `path` is missing; name a raw image file or a block device with path=PATH",
            )
        })?;
        let mode = OpenMode {
            write: !params.flag("readonly", false)?,
            direct: params.flag("direct", false)?,
        };
        let locks = params.flag("locking", true)?;
        let block_size = match params.get("block_size") {
            None => None,
            Some("512") => Some(512),
            Some("4096") => Some(4096),
            Some(other) => {
                return Err(DomainError::new(format!(
                    "parameter `block_size` is `{other}`; it must be 512 or 4096"
                )));
            }
        };
        let serial = params.serial()?;
        let image = Image::prepare(host, path, Wanted { mode, locks, block_size })?;
        let disk = Disk::new(host, image).map_err(|error| {
            DomainError::new(format!("no descriptor to sync `{path}` through: {error}"))
        })?;
        let engine = Engine::choose(host, disk.image(), params)?;
        Ok(Self {
            host,
            disk,
            engine,
            attached: AtomicU64::new(0),
            detached: Mutex::default(),
            serial,
        })
    }

    fn info(&self) -> DeviceInfo {
        let image = self.disk.image();
        let announced = image.announced();
        let capabilities = if image.mode().write {
            let takes_discard =
                Capabilities(if announced.discard { Capabilities::DISCARD.0 } else { 0 });
            Capabilities::FLUSH
                .with(Capabilities::WRITE_CACHE)
                .with(Capabilities::WRITE_ZEROES)
                .with(takes_discard)
        } else {
            Capabilities::READ_ONLY.with(Capabilities::FLUSH)
        };
        DeviceInfo {
            capacity: announced.capacity,
            block_size: announced.block_size,
            physical_block_size: announced.physical_block_size,
            optimal_io_size: 0,
            discard_granularity: announced.physical_block_size,
            capabilities,
            swap: if image.may_modify() { Swap::No } else { Swap::SameBacking },
            backing_kind: "file".to_owned(),
            backing_id: announced.id,
            backing_cache: u64::from(image.mode().direct),
            serial: self.serial.clone(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        self.disk.image().keep(self.host)?;
        self.disk.activated();
        // A standby may have been prepared long ago.
        self.disk.image().follow_alignment();
        let storage = self.host.storage();
        if storage.schema() == Self::SCHEMA { Ok(()) } else { storage.set_schema(Self::SCHEMA) }
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        // What was written is in the kernel's hands, whoever flushes it.
        Ok(())
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Queue, DomainError> {
        let index = context.queue;
        let queue = Queue::new(&self.engine, &self.disk, index);
        self.attached.fetch_or(1 << index.0, Ordering::Relaxed);
        Ok(queue)
    }

    fn detach_queue(&self, queue: Queue) {
        let index = queue.index();
        self.attached.fetch_and(!(1 << index.0), Ordering::Relaxed);
        let remains = queue.into_remains();
        let mut detached = self.detached.lock().unwrap_or_else(PoisonError::into_inner);
        // Queues may come and go as often as they like: one is kept, and the one before ends here,
        // when the others can go on.
        let before =
            detached.iter().position(|(of, _)| *of == index).map(|at| detached.swap_remove(at));
        detached.push((index, remains));
        drop(detached);
        drop(before);
    }

    fn submit(&self, queue: &mut Queue, batch: &mut Batch<'_>, completions: &mut Completions<'_>) {
        queue.submit(&self.engine, &self.disk, batch, completions);
    }

    fn reap(&self, queue: &mut Queue, completions: &mut Completions<'_>) {
        queue.reap(&self.engine, &self.disk, completions);
    }

    fn cancel(&self) {
        self.disk.cancel();
        // Only a queue's own worker may use its ring, so it is woken to do so.
        let attached = self.attached.load(Ordering::Relaxed);
        (0..u64::BITS)
            .filter(|index| attached & 1 << index != 0)
            .for_each(|index| self.host.notify(QueueIndex(index)));
    }

    fn set_write_cache(&self, on: bool) {
        self.disk.set_write_cache(on);
    }
}

domain_api::export_domain!(FileDisk);
