//! What both versions share: the region, what is announced, and the way of a request.
//!
//! Deliberately unknown here: what becomes of memory that the guest does not need. That is the
//! versions' difference: [`Reclaim`].

use crate::reclaim::{PAGE_SIZE, Reclaim};
use domain_api::{
    Capabilities, DeviceInfo, DomainError, Host, Op, Params, Region, Request, Status, Swap,
};
use std::sync::OnceLock;

/// The storage key of the region.
const REGION: &str = "disk";
/// Size without the parameter `size`, in bytes.
const DEFAULT_SIZE: u64 = 64 << 20;
const BLOCK_SIZE: u32 = 512;

#[derive(Debug)]
pub(crate) struct Disk {
    host: Host,
    size: u64,
    serial: String,
    /// Set by `activate`; the host's mapping stays where it is, so a second `activate`, after a
    /// rollback, finds it right.
    region: OnceLock<Region>,
}

impl Disk {
    pub(crate) fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let size = params.size("size", DEFAULT_SIZE)?;
        if size == 0 || !size.is_multiple_of(u64::from(BLOCK_SIZE)) {
            return Err(DomainError::new(format!(
                "parameter `size` is {size} bytes; it must be a positive multiple of {BLOCK_SIZE}"
            )));
        }
        let there = host.storage().region_len(REGION);
        if there != 0 && there != size {
            return Err(DomainError::new(format!(
                "parameter `size` is {size} bytes, but the disk in storage has {there}; give size={there} or leave it out"
            )));
        }
        Ok(Self { host, size, serial: params.serial()?, region: OnceLock::new() })
    }

    pub(crate) fn info(&self) -> DeviceInfo {
        DeviceInfo {
            capacity: self.size,
            block_size: BLOCK_SIZE,
            physical_block_size: PAGE_SIZE,
            optimal_io_size: 0,
            // Of both versions, though the first makes no use of it: the guest has been told.
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

    pub(crate) fn activate(&self, schema: u32) -> Result<(), DomainError> {
        let storage = self.host.storage();
        let region = storage.region(REGION, self.size)?;
        let _ = self.region.set(region);
        storage.set_schema(schema)
    }

    /// Executes a request.
    #[inline]
    pub(crate) fn serve<R: Reclaim>(&self, request: &Request) -> Status {
        let Some(region) = self.region.get() else { return Status::IoError };
        match request.op() {
            Some(Op::Read) => region.read(request.offset(), &request.buffer()),
            Some(Op::Write) => region.write(request.offset(), &request.buffer()),
            // Memory is as durable as it gets.
            Some(Op::Flush) => {}
            Some(Op::Discard) => R::discard(region, request.offset(), request.len()),
            Some(Op::WriteZeroes { may_unmap }) => {
                R::write_zeroes(region, request.offset(), request.len(), may_unmap);
            }
            None => return Status::Unsupported,
        }
        Status::Ok
    }
}
