//! What both versions share: the region, what is announced, and the way of a request.
//!
//! The region's length is the capacity, whatever the parameters said: when the disk is resized the
//! region grows, where it is, and every instance goes by it, also one that was prepared before.
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
    /// Of a disk that is not there yet.
    size: u64,
    serial: String,
    /// Set by `activate`; the host's mapping stays where it is, so a second `activate`, after a
    /// rollback, has only to look how long it is.
    region: OnceLock<Region>,
}

impl Disk {
    pub(crate) fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        let there = host.storage().region_len(REGION);
        let size = params.size("size", if there == 0 { DEFAULT_SIZE } else { there })?;
        if size == 0 || !size.is_multiple_of(u64::from(BLOCK_SIZE)) {
            return Err(DomainError::new(format!(
                "parameter `size` is {size} bytes; it must be a positive multiple of {BLOCK_SIZE}"
            )));
        }
        if there != 0 && there != size {
            return Err(DomainError::new(format!(
                "parameter `size` is {size} bytes, but the disk in storage has {there}; give size={there} or leave it out"
            )));
        }
        Ok(Self { host, size, serial: params.serial()?, region: OnceLock::new() })
    }

    fn capacity(&self) -> u64 {
        match self.host.storage().region_len(REGION) {
            0 => self.size,
            there => there,
        }
    }

    pub(crate) fn info(&self) -> DeviceInfo {
        DeviceInfo {
            capacity: self.capacity(),
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
        let (storage, capacity) = (self.host.storage(), self.capacity());
        match self.region.get() {
            Some(region) => storage.grow_region(REGION, region, capacity)?,
            None => _ = self.region.set(storage.region(REGION, capacity)?),
        }
        storage.set_schema(schema)
    }

    pub(crate) fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        let region = self.region.get().ok_or_else(|| DomainError::new("it does not serve yet"))?;
        self.host.storage().grow_region(REGION, region, capacity)
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
