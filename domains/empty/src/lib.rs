//! The null disk: reads give zeros, writes vanish.
//!
//! It is the yardstick: what a request costs here is what everything around a domain costs. So it
//! does nothing that a request does not need, and its only state is what it announces. It also
//! shows the least that a domain has to be, and to be resized: the new capacity is in storage, and
//! what is there wins.
//!
//! Two of them can serve side by side, since there is no data on which they could disagree.

#![forbid(unsafe_code)]

use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Op, Params,
    QueueContext, Status, Swap,
};

/// Size without the parameter `size`, in bytes.
const DEFAULT_SIZE: u64 = 64 << 20;
const BLOCK_SIZE: u32 = 512;
/// Storage key of the capacity, in bytes, of a disk that was resized.
const CAPACITY: &str = "capacity";

/// The null disk.
#[derive(Debug)]
pub struct Empty {
    host: Host,
    size: u64,
    serial: String,
}

impl BlockDomain for Empty {
    const NAME: &'static str = "empty";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "null";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] = &["size", "serial"];
    const INHERITED: &'static [&'static str] = &["size", "serial"];

    type Queue = ();

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let resized = resized(host);
        let size = params.size("size", resized.unwrap_or(DEFAULT_SIZE))?;
        if size == 0 || !size.is_multiple_of(u64::from(BLOCK_SIZE)) {
            return Err(DomainError::new(format!(
                "parameter `size` is {size} bytes; it must be a positive multiple of {BLOCK_SIZE}"
            )));
        }
        if let Some(capacity) = resized.filter(|&capacity| capacity != size) {
            return Err(DomainError::new(format!(
                "parameter `size` is {size} bytes, but the disk was resized to {capacity}; leave it out"
            )));
        }
        Ok(Self { host, size, serial: params.serial()? })
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            capacity: resized(self.host).unwrap_or(self.size),
            block_size: BLOCK_SIZE,
            physical_block_size: BLOCK_SIZE,
            optimal_io_size: 0,
            discard_granularity: BLOCK_SIZE,
            capabilities: Capabilities::FLUSH
                .with(Capabilities::DISCARD)
                .with(Capabilities::WRITE_ZEROES),
            swap: Swap::SameBacking,
            backing_kind: "null".to_owned(),
            backing_id: (0, 0),
            backing_cache: 0,
            serial: self.serial.clone(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        let storage = self.host.storage();
        if storage.schema() == Self::SCHEMA {
            // A predecessor has set it, and in a swap it may still own the storage.
            return Ok(());
        }
        storage.set_schema(Self::SCHEMA)
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        Ok(())
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        self.host.storage().set_bytes(CAPACITY, capacity.to_string().as_bytes())
    }

    fn attach_queue(&self, _: QueueContext) -> Result<(), DomainError> {
        Ok(())
    }

    #[inline]
    fn submit(&self, (): &mut (), batch: &mut Batch<'_>, completions: &mut Completions<'_>) {
        while let Some(request) = batch.next() {
            let status = match request.op() {
                Some(Op::Read) => {
                    request.buffer().zero();
                    Status::Ok
                }
                Some(Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes { .. }) => Status::Ok,
                None => Status::Unsupported,
            };
            completions.complete(request, status);
        }
    }
}

fn resized(host: Host) -> Option<u64> {
    String::from_utf8(host.storage().bytes(CAPACITY)?).ok()?.parse().ok()
}

domain_api::export_domain!(Empty);
