//! A disk in a raw file or block device.
//!
//! The data is where it is: in the file, reached through the page cache or, with `direct=true`,
//! past it. An instance holds no data and, as a rule, does no read-modify-write, so two of them on
//! the same file serve side by side, and an upgrade pauses no request. For that the storage keeps
//! the first instance's descriptor, and a successor works on a dup of it; see `image` for when it
//! cannot, and why. Where direct I/O is to be aligned to more than the guest's blocks
//! (`domain_io::engine::ranges`), an upgrade is a handover.
//!
//! Data moves straight from and to guest memory. What only has to be copied is served in the call
//! that submits it; whatever may wait for a device goes through io_uring, one ring per queue, and
//! ends later (`backend`). Where io_uring cannot be had, each worker serves its requests itself,
//! one after the other (`rings`, `serve`).
//!
//! What is here is policy: which file, opened how, and what each request maps to. What is in
//! flight, and what has to wait for what, is the engine's (`domain_io::engine`).

#![forbid(unsafe_code)]

mod announced;
mod backend;
mod disk;
mod fence;
mod format;
mod image;
mod open;
mod rings;
mod serve;

use disk::Disk;
use domain_api::{
    Batch, BlockDomain, Capabilities, Claim, Completions, DeviceInfo, DomainError, Host, Params,
    QueueContext, Swap,
};
use domain_io::engine::{Engine, Queue};
use domain_io::file_io::OpenMode;
use image::{Image, Wanted};
use open::Locking;
use rings::Rings;

/// The disk in a file.
#[derive(Debug)]
pub struct FileDisk {
    host: Host,
    engine: Engine<Disk>,
    serial: String,
}

impl BlockDomain for FileDisk {
    const NAME: &'static str = "file";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "file";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] =
        &["path", "format", "direct", "readonly", "locking", "block_size", "serial", "aio"];
    const INHERITED: &'static [&'static str] = Self::PARAMS;

    type Queue = Queue<Disk>;

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
        let locking = Locking::of(params)?;
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
        let is_raw = match params.get("format") {
            None => false,
            Some("raw") => true,
            Some(other) => {
                return Err(DomainError::new(format!(
                    "parameter `format` is `{other}`; it must be raw: other formats are served by `qemu-nbd`, with --domain nbd"
                )));
            }
        };
        let serial = params.serial()?;
        let image = Image::prepare(host, path, Wanted { mode, locking, block_size, is_raw })?;
        let own_sync = image.sync_file(host).map_err(|error| {
            DomainError::new(format!("no descriptor to sync `{path}` through: {error}"))
        })?;
        let rings = Rings::choose(host, &image, params)?;
        let disk = Disk::new(host, image, own_sync, rings);
        Ok(Self { host, engine: Engine::new(host, disk), serial })
    }

    fn info(&self) -> DeviceInfo {
        let image = self.disk().image();
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
            capacity: image.capacity(self.host),
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
        let disk = self.disk();
        fence::begin(self.host)?;
        disk.image().keep(self.host)?;
        disk.activated();
        // A standby may have been prepared long ago.
        disk.image().follow_alignment();
        let storage = self.host.storage();
        if storage.schema() == Self::SCHEMA { Ok(()) } else { storage.set_schema(Self::SCHEMA) }
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        // What was written is in the kernel's hands, and a flush of any instance covers it.
        fence::end(self.host)
    }

    fn resume(&self) -> Result<(), DomainError> {
        fence::resume(self.host)
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        self.disk().image().resize(self.host, capacity)
    }

    fn claim(&self) -> Result<Claim, DomainError> {
        fence::check(self.host)?;
        self.disk().image().claim(self.host)
    }

    fn release(&self) -> Result<(), DomainError> {
        let disk = self.disk();
        // Else another program would write beside the kernel.
        fence::check(self.host)?;
        if disk.image().may_be_written() {
            disk.sync_all().map_err(|error| {
                DomainError::new(format!("what was written may not be on the disk: {error}"))
            })?;
        }
        disk.image().release(self.host)
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Queue<Disk>, DomainError> {
        Ok(self.engine.attach(context.queue))
    }

    fn detach_queue(&self, queue: Queue<Disk>) {
        self.engine.detach(queue);
    }

    fn submit(
        &self,
        queue: &mut Queue<Disk>,
        batch: &mut Batch<'_>,
        completions: &mut Completions<'_>,
    ) {
        self.engine.submit(queue, batch, completions);
    }

    fn reap(&self, queue: &mut Queue<Disk>, completions: &mut Completions<'_>) {
        self.engine.reap(queue, completions);
    }

    fn cancel(&self) {
        self.engine.cancel();
    }

    fn set_write_cache(&self, on: bool) {
        self.disk().set_write_cache(on);
    }
}

impl FileDisk {
    fn disk(&self) -> &Disk {
        self.engine.backend()
    }
}

domain_api::export_domain!(FileDisk);
