//! The guest memory that the frontend shares.

use crate::sync::lock;
use proxy::DomainProxy;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use virtqueue::GuestMemory;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion};

/// A region of it: where it is mapped, and its length.
type Range = (usize, usize);

/// The memory map of one session, with a number for each version of it.
pub(super) struct SharedMemory {
    map: GuestMemoryAtomic<GuestMemory>,
    version: AtomicU64,
    /// What domains have been told of.
    told: Mutex<Vec<Range>>,
}

impl SharedMemory {
    pub(super) fn new(map: GuestMemoryAtomic<GuestMemory>) -> Self {
        Self { map, version: AtomicU64::new(1), told: Mutex::default() }
    }

    pub(super) const fn map(&self) -> &GuestMemoryAtomic<GuestMemory> {
        &self.map
    }

    /// Acquire pairs with the Release in [`update`](Self::update): a thread that sees the version
    /// finds the map.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The version, to be loaded with Acquire.
    pub(super) const fn newest(&self) -> &AtomicU64 {
        &self.version
    }

    /// Whether the frontend has shared any.
    pub(super) fn was_shared(&self) -> bool {
        self.version.load(Ordering::Relaxed) > 1
    }

    /// The map has been replaced: tells domains what has gone and what has come.
    pub(super) fn update(&self, map: &GuestMemoryAtomic<GuestMemory>, proxy: &Arc<DomainProxy>) {
        let now: Vec<Range> = map
            .memory()
            .iter()
            .map(|region| (region.as_ptr() as usize, region.len() as usize))
            .collect();
        let before = std::mem::replace(&mut *lock(&self.told), now.clone());
        for &(address, len) in before.iter().filter(|range| !now.contains(range)) {
            proxy.memory_changed(address, len, false);
        }
        for &(address, len) in now.iter().filter(|range| !before.contains(range)) {
            proxy.memory_changed(address, len, true);
        }
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The session is over: tells domains that all of it is gone.
    pub(super) fn withdraw(&self, proxy: &Arc<DomainProxy>) {
        for (address, len) in std::mem::take(&mut *lock(&self.told)) {
            proxy.memory_changed(address, len, false);
        }
    }
}
