//! A worker's snapshot of guest memory, and what it promises to those who get addresses in it.
//!
//! The frontend may replace the memory map at any time. A worker holds one snapshot, and takes a new one only when nothing is in flight, so every
//! address that was handed out stays mapped until the request has ended. The only file of this crate where guest addresses become pointers.

use domain_api::abi::{RawRequest, RawSegment};
use std::sync::Arc;
use virtio_blk::Translator;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

/// One snapshot of the memory map.
pub(crate) struct Snapshot {
    memory: Arc<GuestMemoryMmap>,
    /// Which version of the map it is.
    version: u64,
}

impl Snapshot {
    pub(crate) fn take(memory: &GuestMemoryAtomic<GuestMemoryMmap>, version: u64) -> Self {
        Self { memory: memory.memory().into_inner(), version }
    }

    pub(crate) const fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    pub(crate) fn translator(&self) -> Translator<'_, GuestMemoryMmap> {
        // SAFETY: the worker replaces or drops its snapshot only with nothing in flight (`QueueWorker::refresh`, and `Drop` below the proxy's worker, which
        // keeps a snapshot for ever if requests never ended); regions are mapped read-write by vhost-user-backend; nobody makes references into them.
        unsafe { Translator::new(&*self.memory) }
    }

    /// Keeps the mapping until the process ends, because something in flight may still use it.
    pub(crate) fn leak(&self) {
        std::mem::forget(Arc::clone(&self.memory));
    }
}

/// Describes a request whose segments lie in a worker's slot.
pub(crate) fn request(op: u32, flags: u32, offset: u64, len: u64, segments: &[RawSegment]) -> RawRequest {
    // SAFETY: the slot that owns the list is not touched until the request has ended: slots are handed out by `Slots::take` and come back
    // with the completion, and the table of slots never moves or shrinks (`Box<[Slot]>`; the list inside is not pushed to meanwhile).
    unsafe { RawRequest::new(op, flags, offset, len, segments) }
}
