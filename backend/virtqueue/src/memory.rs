//! A snapshot of guest memory.
//!
//! The frontend may replace the memory map at any time. A queue holds one snapshot of it, and goes
//! over to another only between requests.

use crate::dirty::GuestMemory;
use std::sync::Arc;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion,
    MemoryRegionAddress,
};

/// One snapshot of the memory map. What is mapped in it stays mapped as long as it, or a
/// [`RingView`](crate::RingView) of it, exists.
#[derive(Debug)]
pub struct Snapshot {
    memory: Arc<GuestMemory>,
    version: u64,
}

impl Snapshot {
    /// The map as it is now, which the caller knows as `version`.
    #[must_use]
    pub fn take(memory: &GuestMemoryAtomic<GuestMemory>, version: u64) -> Self {
        Self { memory: memory.memory().into_inner(), version }
    }

    /// Which version of the map it is.
    #[must_use]
    #[inline]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// The map.
    pub(crate) const fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Keeps the mapping until the process ends.
    pub(crate) fn leak(&self) {
        std::mem::forget(Arc::clone(&self.memory));
    }

    /// Where `len` bytes at `addr` are mapped, if they are in one region and aligned for a `T`.
    pub(crate) fn place<T>(&self, addr: u64, len: usize) -> Option<*mut T> {
        let region = self.memory.find_region(GuestAddress(addr))?;
        let at = addr - region.start_addr().0;
        let first = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        let fits = at.checked_add(len as u64).is_some_and(|end| end <= region.len());
        let place = first.wrapping_add(at as usize).cast::<T>();
        (fits && place.is_aligned()).then_some(place)
    }
}
