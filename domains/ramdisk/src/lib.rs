//! A disk in host-owned memory: the example of a domain with state.
//!
//! The whole disk is one storage region, and the region is all there is: no header, no index,
//! nothing cached in the instance. So the storage is valid at every instant, handing it over takes
//! no time whatever its size, and an instance that dies loses nothing that it has completed.
//! Requests of several queues run at the same time without a lock: the region is copied to and
//! from, never borrowed.
//!
//! There are two versions, built from this crate, of one storage layout (schema 1), so that each
//! can follow the other:
//!
//! * 1.0.0 ([`Keep`]) takes discards as the hint that they are, and writes zeros to zero;
//! * 2.0.0 ([`GiveBack`], exported with the feature `v2`) gives the memory behind both back to the
//!   host.
//!
//! What they announce is the same, for a guest must not see which one serves it. All that differs
//! is in `reclaim.rs`.

#![forbid(unsafe_code)]

mod disk;
mod reclaim;

pub use reclaim::{GiveBack, Keep, Reclaim};

use disk::Disk;
use domain_api::{
    Batch, BlockDomain, Completions, DeviceInfo, DomainError, Host, Params, QueueContext,
};
use std::marker::PhantomData;

/// The version that this build exports.
#[cfg(not(feature = "v2"))]
pub type Exported = Keep;
/// The version that this build exports.
#[cfg(feature = "v2")]
pub type Exported = GiveBack;

/// The disk in memory. Both versions are in every build, so that they can be tested against each
/// other; a module exports one.
#[derive(Debug)]
pub struct Ramdisk<R = Exported> {
    disk: Disk,
    reclaim: PhantomData<fn() -> R>,
}

impl<R: Reclaim> BlockDomain for Ramdisk<R> {
    const NAME: &'static str = "ramdisk";
    const VERSION: &'static str = R::VERSION;
    const SCHEMA_NAME: &'static str = "ramdisk";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] = &["size", "serial"];
    const INHERITED: &'static [&'static str] = &["size", "serial"];

    type Queue = ();

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        Ok(Self { disk: Disk::prepare(host, params)?, reclaim: PhantomData })
    }

    fn info(&self) -> DeviceInfo {
        self.disk.info()
    }

    fn activate(&self) -> Result<(), DomainError> {
        self.disk.activate(Self::SCHEMA)
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        // All that there is to know is in the region.
        Ok(())
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        self.disk.resize(capacity)
    }

    fn attach_queue(&self, _: QueueContext) -> Result<(), DomainError> {
        Ok(())
    }

    fn submit(&self, (): &mut (), batch: &mut Batch<'_>, completions: &mut Completions<'_>) {
        while let Some(request) = batch.next() {
            let status = self.disk.serve::<R>(&request);
            completions.complete(request, status);
        }
    }
}

domain_api::export_domain!(Ramdisk);
