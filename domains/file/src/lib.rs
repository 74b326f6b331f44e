//! A disk in a raw file or block device.
//!
//! The data is where it is: in the file, reached through the page cache or, with `direct=true`, past it. An instance holds no data and does no
//! read-modify-write, so two of them on the same file serve side by side, and an upgrade pauses nobody. For that the storage
//! keeps the first instance's descriptor, and a successor works on a dup of it; see [`image`] for when it cannot, and why.
//!
//! Requests are executed by the worker that submits them, one after the other, with `preadv` and `pwritev` straight from and to guest
//! memory ([`disk`]).

#![forbid(unsafe_code)]

mod bounce;
mod disk;
mod image;
mod trouble;

use bounce::Bounce;
use disk::Disk;
use domain_api::file_io::OpenMode;
use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Params, QueueContext, Swap,
};
use image::Image;

/// The disk in a file.
#[derive(Debug)]
pub struct FileDisk {
    host: Host,
    disk: Disk,
    serial: String,
}

impl BlockDomain for FileDisk {
    const NAME: &'static str = "file";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "file";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] = &["path", "direct", "readonly", "serial"];
    const INHERITED: &'static [&'static str] = &["path", "direct", "readonly", "serial"];

    type Queue = Bounce;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let path = params.get("path").filter(|path| !path.is_empty()).ok_or_else(|| {
            DomainError::new(
                "parameter `path` is missing; name a raw image file or a block device with path=PATH",
            )
        })?;
        let mode =
            OpenMode { write: !params.flag("readonly", false)?, direct: params.flag("direct", false)? };
        let serial = params.serial()?;
        Ok(Self { host, disk: Disk::new(host, Image::prepare(host, path, mode)?), serial })
    }

    fn info(&self) -> DeviceInfo {
        let image = self.disk.image();
        let capabilities = if image.mode().write {
            Capabilities::FLUSH
                .with(Capabilities::WRITE_CACHE)
                .with(Capabilities::DISCARD)
                .with(Capabilities::WRITE_ZEROES)
        } else {
            Capabilities::READ_ONLY.with(Capabilities::FLUSH)
        };
        DeviceInfo {
            capacity: image.size(),
            block_size: image.block_size(),
            physical_block_size: image.physical_block_size(),
            optimal_io_size: 0,
            discard_granularity: image.physical_block_size(),
            capabilities,
            swap: Swap::SameBacking,
            backing_kind: "file".to_owned(),
            backing_id: image.id(),
            backing_cache: u64::from(image.mode().direct),
            serial: self.serial.clone(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        self.disk.image().keep(self.host)?;
        let storage = self.host.storage();
        if storage.schema() == Self::SCHEMA { Ok(()) } else { storage.set_schema(Self::SCHEMA) }
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        // What was written is in the kernel's hands, whoever flushes it.
        Ok(())
    }

    fn attach_queue(&self, _: QueueContext) -> Result<Bounce, DomainError> {
        Ok(Bounce::new())
    }

    fn submit(&self, bounce: &mut Bounce, batch: &mut Batch<'_>, completions: &mut Completions<'_>) {
        while let Some(request) = batch.next() {
            let status = self.disk.serve(bounce, &request);
            completions.complete(request, status);
        }
    }

    fn set_write_cache(&self, on: bool) {
        self.disk.set_write_cache(on);
    }
}

domain_api::export_domain!(FileDisk);
