//! Where a queue's two rings are in guest memory.
//!
//! The rings are looked up once per snapshot and layout, not once per access: [`RingView`] checks
//! both of them whole and then knows their host addresses. Everything in them is read and written
//! with atomic accesses, because the driver does so at the same time; what is read may be any
//! number at all.
//!
//! Deliberately absent: what the numbers mean, and in which order they are to be written
//! (`ring.rs`).

use crate::dirty::GuestMemory;
#[cfg(test)]
use crate::inflight::trace;
use crate::memory::Snapshot;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::GuestAddress;

/// A chain that goes back to the driver: an element of the used ring (2.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor.
    pub head: u16,
    /// Bytes that the device wrote.
    pub len: u32,
}

/// Bytes before the first element of either ring: `flags`, `idx` (virtio 1.2, 2.7.6 and 2.7.8).
const RING_HEADER: usize = 4;
/// Bytes of an element of the available ring (2.7.6).
const AVAIL_ELEMENT: usize = 2;
/// Bytes of an element of the used ring: `id`, `len` (2.7.8).
const USED_ELEMENT: usize = 8;
/// Bytes of a descriptor (2.7.5).
const DESCRIPTOR: usize = 16;

/// What the frontend said about a queue's rings: as long as it is the same, a view stays good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    desc: u64,
    avail: u64,
    used: u64,
    size: u16,
    event_idx: bool,
}

impl Layout {
    fn of(queue: &Queue) -> Self {
        Self {
            desc: queue.desc_table(),
            avail: queue.avail_ring(),
            used: queue.used_ring(),
            size: queue.size(),
            event_idx: queue.event_idx_enabled(),
        }
    }
}

/// Where the used ring of `queue` is in guest memory, and how long, event index included.
#[must_use]
pub fn used_ring(queue: &Queue) -> (GuestAddress, usize) {
    let len = RING_HEADER + usize::from(queue.size()) * USED_ELEMENT + size_of::<u16>();
    (GuestAddress(queue.used_ring()), len)
}

/// A queue's two rings, mapped.
///
/// A ring that is not whole in one region is refused. A frontend names a ring by its own address
/// for the ring's beginning, so it has it in one piece, and the other backends of this protocol
/// translate that one address only.
pub struct RingView {
    layout: Layout,
    /// The size, less one: what positions are cut off with.
    mask: u16,
    avail: *const AtomicU16,
    used: *const AtomicU16,
    /// Null if it is not in one region: only a hint is taken from it.
    desc: *const u8,
    /// Keeps both rings mapped, whatever the frontend does to the map.
    memory: Arc<GuestMemory>,
}

// SAFETY: what the pointers point to belongs to no thread, is only accessed through atomics, and
// stays mapped (`memory`).
unsafe impl Send for RingView {}

impl RingView {
    /// Looks the rings of `queue` up.
    ///
    /// # Errors
    /// They are not set, not in guest memory, or not in one piece.
    pub fn new(snapshot: &Snapshot, queue: &Queue) -> Result<Self, Error> {
        let layout = Layout::of(queue);
        if layout.avail == 0 || layout.size == 0 {
            return Err(Error::QueueNotReady);
        }
        if !layout.size.is_power_of_two() {
            return Err(Error::InvalidSize);
        }
        let size = usize::from(layout.size);
        // 2.7.7.1 and 2.7.7.2: the other side's event index lies behind the elements, if it was
        // negotiated.
        let event = if layout.event_idx { size_of::<u16>() } else { 0 };
        let avail =
            snapshot.place::<AtomicU16>(layout.avail, RING_HEADER + size * AVAIL_ELEMENT + event);
        let used =
            snapshot.place::<AtomicU32>(layout.used, RING_HEADER + size * USED_ELEMENT + event);
        let desc = snapshot.place::<u8>(layout.desc, size * DESCRIPTOR);
        let (avail, used) = avail.zip(used).ok_or_else(|| {
            let is_aligned = layout.avail.is_multiple_of(2) && layout.used.is_multiple_of(4);
            if is_aligned { Error::FindMemoryRegion } else { Error::InvalidUsedRingAlign }
        })?;
        Ok(Self {
            layout,
            mask: layout.size - 1,
            avail: avail.cast_const(),
            used: used.cast(),
            desc: desc.map_or(std::ptr::null(), <*mut u8>::cast_const),
            memory: Arc::clone(snapshot.memory()),
        })
    }

    /// Whether this is still where the rings of `queue` are.
    #[inline]
    pub fn is_of(&self, queue: &Queue) -> bool {
        self.layout == Layout::of(queue)
    }

    /// Whether it was looked up in `snapshot`.
    #[inline]
    fn is_in(&self, snapshot: &Snapshot) -> bool {
        Arc::ptr_eq(&self.memory, snapshot.memory())
    }

    /// Number of elements of either ring.
    #[inline]
    pub const fn size(&self) -> u16 {
        self.layout.size
    }

    /// Whether the event indices are there.
    #[inline]
    pub const fn event_idx(&self) -> bool {
        self.layout.event_idx
    }

    /// `avail.flags`.
    #[inline]
    pub fn avail_flags(&self) -> u16 {
        u16::from_le(self.avail_word(0).load(Ordering::Relaxed))
    }

    /// `avail.idx`.
    #[inline]
    pub fn avail_idx(&self) -> u16 {
        // Acquire pairs with the driver's barrier before it stores the index (2.7.13.3): its
        // descriptors and elements are visible.
        u16::from_le(self.avail_word(1).load(Ordering::Acquire))
    }

    /// `avail.ring[position]`, for any position: it is taken modulo the size.
    #[inline]
    pub fn avail_entry(&self, position: u16) -> u16 {
        u16::from_le(self.avail_word(2 + usize::from(position & self.mask)).load(Ordering::Relaxed))
    }

    /// `used_event`, behind the available ring; only with event indices.
    #[inline]
    pub fn used_event(&self) -> u16 {
        assert!(self.layout.event_idx);
        u16::from_le(self.avail_word(2 + usize::from(self.layout.size)).load(Ordering::Relaxed))
    }

    /// Writes `used.ring[position]`, for any position: it is taken modulo the size.
    #[inline]
    pub fn set_used(&self, position: u16, entry: Used) {
        let first = 1 + 2 * usize::from(position & self.mask);
        let word = |index: usize| {
            // SAFETY: `new` has checked that 4 + 8 * size bytes, aligned to 4, are mapped from
            // `used` on, and `first` is at most 2 * size - 1.
            unsafe { &*self.used.cast::<AtomicU32>().add(index) }
        };
        word(first).store(u32::from(entry.head).to_le(), Ordering::Relaxed);
        word(first + 1).store(entry.len.to_le(), Ordering::Relaxed);
        #[cfg(test)]
        {
            trace::note(word(first), u64::from(u32::from(entry.head).to_le()));
            trace::note(word(first + 1), u64::from(entry.len.to_le()));
        }
    }

    /// Writes `used.idx`.
    #[inline]
    pub fn set_used_idx(&self, idx: u16) {
        // Release: the driver that sees the index sees the elements, the data and the status bytes
        // (2.7.8.2).
        self.used_word(1).store(idx.to_le(), Ordering::Release);
        #[cfg(test)]
        trace::note(self.used_word(1), u64::from(idx.to_le()));
    }

    /// Writes `used.flags`.
    #[inline]
    pub fn set_used_flags(&self, flags: u16) {
        self.used_word(0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Writes `avail_event`, behind the used ring; only with event indices.
    #[inline]
    pub fn set_avail_event(&self, idx: u16) {
        assert!(self.layout.event_idx);
        self.used_word(2 + 4 * usize::from(self.layout.size)).store(idx.to_le(), Ordering::Relaxed);
    }

    /// Calls `each` with what was written in guest memory when the used index went from `first` to
    /// `next`: address and length.
    pub fn written(&self, first: u16, next: u16, mut each: impl FnMut(u64, usize)) {
        each(self.layout.used, RING_HEADER);
        let (count, at) = (next.wrapping_sub(first).min(self.layout.size), first & self.mask);
        let until_end = count.min(self.layout.size - at);
        for (at, count) in [(at, until_end), (0, count - until_end)] {
            let addr = self.layout.used + (RING_HEADER + usize::from(at) * USED_ELEMENT) as u64;
            each(addr, usize::from(count) * USED_ELEMENT);
        }
    }

    /// Tells the CPU that the chain at `position` will be looked at soon. Says nothing and changes
    /// nothing.
    #[inline]
    pub fn prefetch(&self, position: u16) {
        let head = self.avail_entry(position);
        if !self.desc.is_null() && head < self.layout.size {
            prefetch(self.desc.wrapping_add(usize::from(head) * DESCRIPTOR));
        }
    }

    #[inline]
    fn avail_word(&self, index: usize) -> &AtomicU16 {
        // SAFETY: `new` has checked that 4 + 2 * size bytes, aligned to 2, are mapped from `avail`
        // on, and 2 more with event indices; the callers ask for words 0 to size + 1, and for size
        // + 2 only with event indices.
        unsafe { &*self.avail.add(index) }
    }

    #[inline]
    fn used_word(&self, index: usize) -> &AtomicU16 {
        // SAFETY: `new` has checked that 4 + 8 * size bytes, aligned to 4, are mapped from `used`
        // on, and 2 more with event indices; the callers ask for words 0 and 1, and for 4 * size +
        // 2 only with event indices.
        unsafe { &*self.used.add(index) }
    }
}

#[inline]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it does not fault, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The view of a queue's rings, looked up when it is first needed, and again when the rings are
/// elsewhere.
#[derive(Default)]
pub struct ViewCache(Option<RingView>);

impl ViewCache {
    /// The view of `queue` in `snapshot`.
    ///
    /// # Errors
    /// As for [`RingView::new`].
    #[inline]
    pub fn view(&mut self, snapshot: &Snapshot, queue: &Queue) -> Result<&RingView, Error> {
        if !self.0.as_ref().is_some_and(|view| view.is_in(snapshot) && view.is_of(queue)) {
            self.0 = Some(RingView::new(snapshot, queue)?);
        }
        Ok(self.0.as_ref().expect("just put there"))
    }

    /// The view of the last time. The rings may be elsewhere by now, but its own stay mapped.
    #[must_use]
    #[inline]
    pub const fn last(&self) -> Option<&RingView> {
        self.0.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};

    /// Two regions that adjoin at 0x4000.
    fn snapshot() -> Snapshot {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)];
        let memory = GuestMemoryAtomic::new(GuestMemory::from_ranges(&ranges).unwrap());
        Snapshot::take(&memory, 1)
    }

    fn queue(avail: u32, used: u32, event_idx: bool) -> Queue {
        let mut queue = Queue::new(8).unwrap();
        queue.set_desc_table_address(Some(0x100), None);
        queue.set_avail_ring_address(Some(avail), None);
        queue.set_used_ring_address(Some(used), None);
        queue.set_event_idx(event_idx);
        queue
    }

    #[test]
    fn every_word_is_where_the_specification_puts_it() {
        let snapshot = snapshot();
        let view = RingView::new(&snapshot, &queue(0x1000, 0x5000, true)).unwrap();
        let memory = &**snapshot.memory();
        for (index, value) in (0..11u16).zip(100..) {
            memory.write_obj(value, GuestAddress(0x1000 + 2 * u64::from(index))).unwrap();
        }
        assert_eq!((view.avail_flags(), view.avail_idx(), view.used_event()), (100, 101, 110));
        assert_eq!([0, 7, 8, 65535].map(|at| view.avail_entry(at)), [102, 109, 102, 109]);

        view.set_used(15, Used { head: 3, len: 0x0102_0304 });
        view.set_used_flags(1);
        view.set_used_idx(0x1234);
        view.set_avail_event(0x5678);
        let used = |at: u64| memory.read_obj::<u16>(GuestAddress(0x5000 + at)).unwrap();
        assert_eq!([used(0), used(2), used(4 + 64)], [1, 0x1234, 0x5678]);
        assert_eq!(
            [used(4 + 56), used(4 + 58), used(4 + 60), used(4 + 62)],
            [3, 0, 0x0304, 0x0102]
        );
    }

    #[test]
    fn a_ring_must_be_in_one_region_to_its_last_byte() {
        let snapshot = snapshot();
        let is_fine = |avail, used, event_idx| {
            RingView::new(&snapshot, &queue(avail, used, event_idx)).is_ok()
        };
        // 4 + 8 * 2 and 4 + 8 * 8 bytes, and 2 more with event indices.
        assert!(is_fine(0x4000 - 20, 0x8000 - 68, false));
        assert!(!is_fine(0x4000 - 20, 0x7000, true), "the event index is across the border");
        assert!(!is_fine(0x1000, 0x8000 - 68, true), "the event index is behind the end");
        assert!(!is_fine(0x4000 - 18, 0x7000, false), "across the border");
        assert!(!is_fine(0x1000, 0x8000, false), "outside");
        assert!(!is_fine(0, 0x7000, false), "never set");
    }

    #[test]
    fn a_view_is_of_one_layout() {
        let snapshot = snapshot();
        let view = RingView::new(&snapshot, &queue(0x1000, 0x5000, true)).unwrap();
        assert!(view.is_of(&queue(0x1000, 0x5000, true)));
        assert!(!view.is_of(&queue(0x1002, 0x5000, true)));
        assert!(!view.is_of(&queue(0x1000, 0x5004, true)));
        assert!(!view.is_of(&queue(0x1000, 0x5000, false)));
        let mut smaller = queue(0x1000, 0x5000, true);
        smaller.set_size(4);
        assert!(!view.is_of(&smaller));
    }

    #[test]
    fn a_cached_view_is_of_this_layout_and_this_snapshot() {
        let (mut cache, first, second) = (ViewCache::default(), snapshot(), snapshot());
        assert!(cache.last().is_none());
        let here = queue(0x1000, 0x5000, false);
        let place = |view: &RingView| view.avail as usize;
        let at = place(cache.view(&first, &here).unwrap());
        assert_eq!(place(cache.view(&first, &here).unwrap()), at);
        let there = queue(0x1800, 0x5000, false);
        assert_eq!(place(cache.view(&first, &there).unwrap()), at + 0x800);
        let elsewhere = place(cache.view(&second, &there).unwrap());
        assert_ne!(elsewhere, at + 0x800, "the same layout in another map");
        assert_eq!(cache.last().map(place), Some(elsewhere));
        assert!(cache.view(&second, &queue(0x1000, 0x8000, false)).is_err());
    }

    #[test]
    fn a_view_keeps_its_memory_and_hints_are_harmless() {
        let snapshot = snapshot();
        let mut lost = queue(0x1000, 0x5000, false);
        lost.set_desc_table_address(Some(0x10_0000), None);
        let (view, lost) = (
            RingView::new(&snapshot, &queue(0x1000, 0x5000, false)).unwrap(),
            RingView::new(&snapshot, &lost).unwrap(),
        );
        drop(snapshot);
        assert_eq!(view.avail_idx(), 0);
        (0..20).for_each(|position| view.prefetch(position));
        lost.prefetch(0);
    }
}
