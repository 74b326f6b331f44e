//! Where each number of a region is (vhost-user, "Inflight I/O tracking": `QueueRegionSplit`,
//! `DescStateSplit`), and how it is stored.
//!
//! All numbers are the processor's own, as the specification leaves them to it.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

/// The version of a region that was never used. What keeps the region may make it so again when
/// the frontend has been told where a ring has stopped.
pub(super) const FRESH: u16 = 0;

/// The version of the layout.
pub(super) const VERSION: u16 = 1;

/// What a queue's part begins at: a multiple of this. The specification leaves it open; QEMU's
/// library, whose regions may come here, has it so.
const ALIGNMENT: usize = 64;

/// The beginning of a queue's part (`QueueRegionSplit`).
#[repr(C)]
pub(super) struct Header {
    /// 0, for the future. A process that gives the region to another one may write something else,
    /// to see when the queue is taken up.
    pub(super) features: AtomicU64,
    pub(super) version: AtomicU16,
    /// How many entries there are.
    pub(super) desc_num: AtomicU16,
    /// The head of the request that was published last, or is about to be.
    pub(super) last_batch_head: AtomicU16,
    /// The ring's used index when marks were last cleared.
    pub(super) used_idx: AtomicU16,
}

/// What is known of the chain that begins with one descriptor (`DescStateSplit`).
#[repr(C)]
pub(super) struct Entry {
    /// The mark: 1 if the chain has been taken and not answered.
    pub(super) inflight: AtomicU8,
    _padding: [u8; 5],
    /// The head that was published before this one.
    pub(super) next: AtomicU16,
    /// The chains' order.
    pub(super) counter: AtomicU64,
}

const _: () = assert!(size_of::<Header>() == 16 && size_of::<Entry>() == 16);

/// Bytes of a queue's part, with `desc_num` entries.
pub(super) const fn queue_bytes(desc_num: u16) -> usize {
    let bytes = size_of::<Header>() + desc_num as usize * size_of::<Entry>();
    bytes.next_multiple_of(ALIGNMENT)
}

/// A number in the region.
pub(super) trait Cell<T> {
    /// Stores it, after every store before.
    fn put(&self, value: T);
    /// As [`put`](Self::put), but before or after any other store.
    fn put_anywhere(&self, value: T);
    /// What is there.
    fn get(&self) -> T;
}

macro_rules! cell {
    ($atomic:ty, $number:ty) => {
        impl Cell<$number> for $atomic {
            #[inline(always)]
            fn put(&self, value: $number) {
                self.store(value, Ordering::Release);
                #[cfg(test)]
                super::trace::note(self, u64::from(value));
            }

            #[inline(always)]
            fn put_anywhere(&self, value: $number) {
                self.store(value, Ordering::Relaxed);
                #[cfg(test)]
                super::trace::note(self, u64::from(value));
            }

            #[inline(always)]
            fn get(&self) -> $number {
                self.load(Ordering::Relaxed)
            }
        }
    };
}

cell!(AtomicU8, u8);
cell!(AtomicU16, u16);
cell!(AtomicU64, u64);
