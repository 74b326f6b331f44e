//! The log of a live migration: which pages of guest memory were written from here.
//!
//! The frontend shares a bitmap, one bit for each 4 KiB of guest-physical address space, holes
//! included, and clears bits as it sends the pages again. Whatever is written into guest memory,
//! by this process or by the kernel for it, is marked there after it was written: a bit that is
//! set before its page is written may be cleared, and the page sent, in between.
//!
//! By type: [`DirtyLog`] is what a session has, whether it marks or not; a [`LogSlot`] is in each
//! region of guest memory, where `vhost-user-backend` brings the bitmap to. A worker's
//! [`Marker`](crate::Marker) marks, always in the bitmap that came last: a region of an earlier
//! memory map, which a request may still be written to, is told of no other.
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

use std::fmt::{Debug, Formatter};
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vhost_user_backend::bitmap::{AtomicBitmapMmap, BitmapReplace, MemRegionBitmap, MmapLogReg};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// A guest's memory, which can be logged.
pub type GuestMemory = GuestMemoryMmap<LogSlot>;

/// Bytes that a bit stands for (vhost-user, "Migration": `VHOST_LOG_PAGE`).
const PAGE: u64 = 0x1000;

/// A bitmap.
pub(crate) trait Bits: Debug + Send + Sync {
    /// The bits of eight pages, of which there must be some.
    fn byte(&self, index: usize) -> &AtomicU8;

    /// Whether all of a region has its bits here.
    fn has_room_for(&self, region: &GuestRegionMmap<LogSlot>) -> bool;
}

impl Bits for Arc<MmapLogReg> {
    fn byte(&self, index: usize) -> &AtomicU8 {
        &self[index]
    }

    fn has_room_for(&self, region: &GuestRegionMmap<LogSlot>) -> bool {
        has_room_for(region, self)
    }
}

/// What a session's writes are marked in, if they are.
#[derive(Default)]
pub struct DirtyLog {
    /// Changes with all that a marker has to know; 0 as long as nothing is to be marked.
    version: AtomicU64,
    state: Mutex<State>,
    /// Told when there is another bitmap while writes are marked.
    hook: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Debug, Default)]
struct State {
    changes: u64,
    is_on: bool,
    /// The newest bitmap: an earlier one is read no more, for whatever region.
    bits: Option<Arc<dyn Bits>>,
}

impl Debug for DirtyLog {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyLog").field("state", &self.state).finish_non_exhaustive()
    }
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
            if let Some(bits) = state.bits.as_ref().filter(|bits| bits.has_room_for(region)) {
                slot.set_bits(Arc::clone(bits));
            }
        }
        self.changed(&mut state);
    }

    /// Has `hook` called whenever the frontend has brought another bitmap while writes are marked,
    /// before that is acknowledged: what marks in an earlier one then is to be waited for. A second
    /// hook is not called.
    pub fn on_replaced(&self, hook: impl Fn() + Send + Sync + 'static) {
        let _ = self.hook.set(Box::new(hook));
    }

    /// The frontend has brought a bitmap. It comes once for each region.
    pub(crate) fn replace(&self, bits: Arc<dyn Bits>) {
        let mut state = self.lock();
        let is_same = |known: &Arc<dyn Bits>| std::ptr::eq(known.byte(0), bits.byte(0));
        if state.bits.as_ref().is_some_and(is_same) {
            return;
        }
        state.bits = Some(bits);
        self.changed(&mut state);
        let is_on = state.is_on;
        drop(state);
        if is_on {
            self.hook.get().into_iter().for_each(|hook| hook());
        }
    }

    /// Where a region's writes are marked, be it of the memory map or of an earlier one; `None` if
    /// there is no place.
    pub(crate) fn bits_of(&self, region: &GuestRegionMmap<LogSlot>) -> Option<Arc<dyn Bits>> {
        self.lock().bits.clone().filter(|bits| bits.has_room_for(region))
    }

    fn changed(&self, state: &mut State) {
        state.changes += 1;
        let version = if state.is_on { state.changes } else { 0 };
        // Release pairs with the Acquire in `version`: what a worker looks up then is as new.
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
    /// The bitmap that has this region's bits, as long as it is in the memory map.
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

    fn bits(&self) -> Option<Arc<dyn Bits>> {
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
        let bits: Arc<dyn Bits> = Arc::new(memory);
        self.set_bits(Arc::clone(&bits));
        if let Some(home) = self.slot.home.get() {
            home.log.replace(bits);
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
        bits.byte((page / 8) as usize).load(Ordering::Acquire) & 1 << (page % 8) != 0
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
        let (byte, bit) = (bits.byte((page / 8) as usize), 1 << (page % 8));
        if byte.load(Ordering::Relaxed) & bit == 0 {
            byte.fetch_or(bit, Ordering::SeqCst);
        }
    }
}
