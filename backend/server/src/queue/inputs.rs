//! What a worker is given for each batch.

use crate::inflight::SharedInflight;
use crate::limiter::Limiter;
use std::sync::atomic::AtomicU64;
use virtio_blk::Limits;
use virtqueue::GuestMemory;
use vm_memory::GuestMemoryAtomic;

/// Guest memory, as the frontend's messages replace it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemory>;

/// What the session says to a worker between two batches.
#[derive(Clone, Copy)]
pub(crate) struct BatchInputs<'a> {
    /// Take nothing more.
    pub(crate) stop_popping: bool,
    /// What requests are held against.
    pub(crate) limits: &'a Limits,
    /// Version of the memory map when the batch begins.
    pub(crate) memory_version: u64,
    /// Version of the memory map at any time, to be loaded with Acquire.
    pub(crate) newest_version: &'a AtomicU64,
    /// The memory map.
    pub(crate) memory: &'a Memory,
    /// Where what is in flight is marked.
    pub(crate) inflight: &'a SharedInflight,
    /// What is let through in a second.
    pub(crate) limiter: &'a Limiter,
}
