//! The log of a live migration: which pages of guest memory were written from here.
//!
//! The frontend shares a bitmap, one bit for each 4 KiB of guest-physical address space, holes
//! included, and clears bits as it sends the pages again. Whatever is written into guest memory,
//! by this process or by the kernel for it, is marked there after it was written: a bit that is
//! set before its page is written may be cleared, and the page sent, in between.
//!
//! By type: [`DirtyLog`] is what a session has, whether it marks or not; a [`LogSlot`] is in each
//! region of guest memory, where `vhost-user-backend` brings the bitmap to. A worker's
//! [`Marker`](crate::Marker) marks.
//!
//! **Ordering.** The frontend clears a bit with an atomic exchange and then reads the page. A
//! marker passes a full fence between what was written and its look at the bits. So either it sees
//! a bit that is clear, and sets it, or the frontend's exchange comes behind its look, and the page
//! is read with all that was written before the fence. A bit that is set already is therefore left
//! alone, which spares a locked access for pages that are written again and again (status bytes,
//! the used ring).
//!
//! The library's bitmap takes a lock at each write whether it is used or not, goes on when the
//! frontend has turned the log off, and is not in regions that come later.

use std::fmt::Debug;
use std::io;
use std::ops::Index;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vhost_user_backend::bitmap::{AtomicBitmapMmap, BitmapReplace, MemRegionBitmap, MmapLogReg};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A guest's memory, which can be logged.
pub type GuestMemory = GuestMemoryMmap<LogSlot>;

/// Bytes that a bit stands for (vhost-user, "Migration": `VHOST_LOG_PAGE`).
const PAGE: u64 = 0x1000;

/// Where the bits are.
pub(crate) trait Bits: Index<usize, Output = AtomicU8> + Debug + Send + Sync {}

impl<T: Index<usize, Output = AtomicU8> + Debug + Send + Sync> Bits for T {}

/// What a session's writes are marked in, if they are.
#[derive(Debug, Default)]
pub struct DirtyLog {
    /// Changes with all that a marker has to know; 0 as long as nothing is to be marked.
    version: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    changes: u64,
    is_on: bool,
    memory: Option<Arc<MmapLogReg>>,
}

impl DirtyLog {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The frontend wants writes to be marked (`VHOST_F_LOG_ALL`), or does not any more. Returns
    /// whether that is a change.
    pub fn turn(&self, on: bool) -> bool {
        let mut state = self.lock();
        let is_change = std::mem::replace(&mut state.is_on, on) != on;
        self.changed(&mut state);
        is_change
    }

    /// All regions of a new map know of this log from now on.
    pub fn bind(self: &Arc<Self>, memory: &GuestMemory) {
        let mut state = self.lock();
        for region in memory.iter() {
            let slot = region.bitmap();
            let _ =
                slot.slot.home.set(Home { log: Arc::clone(self), start: region.start_addr().0 });
            if let Some(memory) = &state.memory
                && has_room_for(region, memory)
            {
                slot.set_bits(Arc::clone(memory) as Arc<dyn Bits>);
            }
        }
        self.changed(&mut state);
    }

    /// The frontend has brought a bitmap.
    fn replace(&self, memory: &Arc<MmapLogReg>) {
        let mut state = self.lock();
        if !state.memory.as_ref().is_some_and(|known| Arc::ptr_eq(known, memory)) {
            state.memory = Some(Arc::clone(memory));
        }
        self.changed(&mut state);
    }

    fn changed(&self, state: &mut State) {
        state.changes += 1;
        let version = if state.is_on { state.changes } else { 0 };
        // Release pairs with the Acquire in `version`: what a region's slot has is there.
        self.version.store(version, Ordering::Release);
    }

    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }
}

/// Whether all of a region has its bits in the bitmap.
fn has_room_for<R: GuestMemoryRegion>(region: &R, memory: &Arc<MmapLogReg>) -> bool {
    AtomicBitmapMmap::new(region, Arc::clone(memory)).is_ok()
}

/// Where a region's log is known, and where the region begins.
#[derive(Debug)]
struct Home {
    log: Arc<DirtyLog>,
    start: u64,
}

#[derive(Debug, Default)]
struct Slot {
    home: OnceLock<Home>,
    /// The bitmap that has this region's bits.
    bits: Mutex<Option<Arc<dyn Bits>>>,
}

/// What a region of guest memory, or a part of it, has of the log.
#[derive(Debug, Clone, Default)]
pub struct LogSlot {
    slot: Arc<Slot>,
    /// Bytes of the region before the part.
    offset: usize,
}

impl LogSlot {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<dyn Bits>>> {
        self.slot.bits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bits(&self) -> Option<Arc<dyn Bits>> {
        self.lock().clone()
    }

    pub(crate) fn set_bits(&self, bits: Arc<dyn Bits>) {
        *self.lock() = Some(bits);
    }
}

/// A bitmap that has the bits of one region.
#[derive(Debug)]
pub struct RegionBits(Arc<MmapLogReg>);

impl MemRegionBitmap for RegionBits {
    fn new<R: GuestMemoryRegion>(region: &R, memory: Arc<MmapLogReg>) -> io::Result<Self> {
        if has_room_for(region, &memory) {
            return Ok(Self(memory));
        }
        let end = region.start_addr().0.saturating_add(region.len());
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the migration's log has no room for guest memory that ends at {end:#x}"),
        ))
    }
}

impl BitmapReplace for LogSlot {
    type InnerBitmap = RegionBits;

    fn replace(&self, RegionBits(memory): RegionBits) {
        self.set_bits(Arc::clone(&memory) as Arc<dyn Bits>);
        if let Some(home) = self.slot.home.get() {
            home.log.replace(&memory);
        }
    }
}

impl NewBitmap for LogSlot {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

impl WithBitmapSlice<'_> for LogSlot {
    type S = Self;
}

impl BitmapSlice for LogSlot {}

/// What is written through `vm-memory` is marked here. Nothing is, but by tests.
impl Bitmap for LogSlot {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let (Some(home), Some(bits)) = (self.slot.home.get(), self.bits()) else { return };
        if home.log.version() != 0 {
            fence(Ordering::SeqCst);
            mark(&*bits, home.start.saturating_add((self.offset + offset) as u64), len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let (Some(home), Some(bits)) = (self.slot.home.get(), self.bits()) else {
            return false;
        };
        let page = home.start.saturating_add((self.offset + offset) as u64) / PAGE;
        bits[(page / 8) as usize].load(Ordering::Acquire) & 1 << (page % 8) != 0
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { slot: Arc::clone(&self.slot), offset: self.offset.saturating_add(offset) }
    }
}

/// Sets the bits of `len` bytes from guest address `start` on, which must have some.
#[inline]
pub(crate) fn mark(bits: &dyn Bits, start: u64, len: usize) {
    if len == 0 {
        return;
    }
    for page in start / PAGE..=start.saturating_add(len as u64 - 1) / PAGE {
        let (byte, bit) = (&bits[(page / 8) as usize], 1 << (page % 8));
        if byte.load(Ordering::Relaxed) & bit == 0 {
            byte.fetch_or(bit, Ordering::SeqCst);
        }
    }
}
