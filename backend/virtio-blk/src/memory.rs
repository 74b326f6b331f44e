//! Guest addresses to host addresses, and the few bytes that the parser itself reads and writes
//! there.
//!
//! The only file of this crate with `unsafe` in it. Guest memory is never seen as a slice: other
//! CPUs change it while we look. What is read for a decision is read once, with volatile loads, so
//! that the compiler cannot fetch it again after it was checked.
//!
//! A request touches three or more buffers, nearly always in one or two regions of guest memory
//! (one with the rings and headers, one with the data), so the last two regions are remembered, and
//! the search through the memory map is left out when they are hit.

use crate::status::WireStatus;
use domain_abi::RawSegment;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// Translates guest addresses within one snapshot of the memory map.
///
/// Cheap to make: one per batch is right, and it does not have to be kept.
#[derive(Debug)]
pub struct Translator<'m, M> {
    memory: &'m M,
    /// The region that was found last, and the one before.
    known: [Region; 2],
    /// The first address that was asked for in vain.
    outside: Option<u64>,
}

/// A region of guest memory: first guest address, length, where it is mapped. Length 0 is none.
#[derive(Debug, Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    base: *mut u8,
}

impl Region {
    const NONE: Self = Self { start: 0, len: 0, base: std::ptr::null_mut() };

    /// Where `addr` is mapped, and how many bytes from there on are contiguous, `len` at most.
    #[inline]
    fn piece(&self, addr: u64, len: usize) -> Option<(*mut u8, usize)> {
        let at = addr.wrapping_sub(self.start);
        let left = self.len.checked_sub(at).filter(|left| *left > 0)?;
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        Some((self.base.wrapping_add(at as usize), len.min(left)))
    }
}

impl<'m, M: GuestMemoryBackend> Translator<'m, M> {
    /// Begins with no region remembered.
    ///
    /// # Safety
    /// The caller keeps this snapshot of the memory map, with every region mapped readable and
    /// writable, until the last use of any [`RawSegment`] or [`StatusSlot`] that comes out of a
    /// parse with this translator; `memory` itself may go earlier. No code in this process holds a
    /// Rust reference into guest memory.
    #[must_use]
    pub const unsafe fn new(memory: &'m M) -> Self {
        Self { memory, known: [Region::NONE; 2], outside: None }
    }

    /// The first address that was asked for since the last time and is outside of guest memory. A
    /// chain with such an address ends as an answer or as malformed, so this is to be asked then.
    pub const fn take_outside(&mut self) -> Option<u64> {
        self.outside.take()
    }

    /// Where `addr` is mapped, and how many bytes from there on are contiguous, `len` at most.
    /// `None` outside of guest memory.
    #[inline]
    fn piece(&mut self, addr: u64, len: usize) -> Option<(*mut u8, usize)> {
        match self.known[0].piece(addr, len) {
            None => self.known[1].piece(addr, len).or_else(|| self.find(addr, len)),
            piece => piece,
        }
    }

    #[cold]
    fn find(&mut self, addr: u64, len: usize) -> Option<(*mut u8, usize)> {
        let Some(region) = self.memory.find_region(GuestAddress(addr)) else {
            self.outside.get_or_insert(addr);
            return None;
        };
        let base = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        self.known =
            [Region { start: region.start_addr().0, len: region.len(), base }, self.known[0]];
        self.known[0].piece(addr, len)
    }

    /// Calls `each` with the contiguous pieces of `len` bytes at `addr`, in order. `None` if some
    /// of them are outside of guest memory.
    #[inline]
    fn pieces(
        &mut self,
        addr: u64,
        len: usize,
        mut each: impl FnMut(*mut u8, usize),
    ) -> Option<()> {
        let (base, piece) = self.piece(addr, len)?;
        each(base, piece);
        if piece == len { Some(()) } else { self.more_pieces(addr, len, piece, each) }
    }

    /// The rest of [`pieces`](Self::pieces), where regions adjoin: rare, so out of the way of what
    /// is inlined.
    #[cold]
    fn more_pieces(
        &mut self,
        addr: u64,
        len: usize,
        mut done: usize,
        mut each: impl FnMut(*mut u8, usize),
    ) -> Option<()> {
        while done < len {
            let (base, piece) = self.piece(addr.checked_add(done as u64)?, len - done)?;
            each(base, piece);
            done += piece;
        }
        Some(())
    }

    /// Adds `len` bytes at `addr` to `segments`, one segment for each region that they touch.
    #[inline]
    pub(crate) fn push_segments(
        &mut self,
        addr: u64,
        len: usize,
        segments: &mut Vec<RawSegment>,
    ) -> Option<()> {
        self.pieces(addr, len, |base, len| {
            // SAFETY: `base..base + len` lies in a region of the snapshot, which `new`'s caller
            // keeps until the request has completed.
            segments.push(unsafe { RawSegment::new(base, len) });
        })
    }

    /// Feeds up to `len` bytes at `addr` to `header`. Returns how many it took.
    #[inline]
    pub(crate) fn gather(&mut self, addr: u64, len: usize, header: &mut Gather) -> Option<usize> {
        let len = len.min(header.missing());
        self.pieces(addr, len, |base, len| {
            // SAFETY: in a region of the snapshot (`new`), and no longer than what is missing.
            unsafe { header.take(base, len) };
        })?;
        Some(len)
    }

    /// Sixteen bytes at `addr`, as two numbers.
    #[inline]
    pub(crate) fn read(&mut self, addr: u64) -> Option<(u64, u64)> {
        let mut words = Gather::default();
        self.gather(addr, 16, &mut words)?;
        words.get()
    }

    /// The status byte at `addr`.
    pub(crate) fn status_slot(&mut self, addr: u64) -> Option<StatusSlot> {
        self.piece(addr, 1).map(|(base, _)| StatusSlot(base))
    }
}

/// Where a request's status byte goes in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusSlot(*mut u8);

// SAFETY: the address of a byte that belongs to no thread; `Translator::new`'s caller answers for
// it being mapped.
unsafe impl Send for StatusSlot {}

impl StatusSlot {
    /// Tells the guest how the request ended. Visible to it before the used ring's index is,
    /// because that is stored with Release (2.7.8.2).
    #[inline]
    pub fn write(self, status: WireStatus) {
        // SAFETY: slots come from a `Translator` only, whose maker keeps the byte mapped writable
        // until it was used for the last time.
        unsafe { self.0.write_volatile(status.as_byte()) };
    }

    /// Where the byte is.
    #[must_use]
    pub const fn at(self) -> *const u8 {
        self.0
    }
}

/// Takes the last byte off `segments`, whose last segment must not be empty: it is where the status
/// goes.
pub(crate) fn split_status(segments: &mut Vec<RawSegment>) -> Option<StatusSlot> {
    let last = segments.pop()?;
    let data = last.len().checked_sub(1)?;
    if data > 0 {
        // SAFETY: the front of a segment is as good as the segment.
        segments.push(unsafe { RawSegment::new(last.base(), data) });
    }
    Some(StatusSlot(last.base().wrapping_add(data)))
}

/// Sixteen bytes that may be scattered over the guest's buffers: the size of a descriptor, of a
/// request header, and of a discard's range.
///
/// Kept as two numbers, so that they stay in registers; everything in virtio is little-endian
/// (1.4).
#[derive(Debug, Default)]
pub(crate) struct Gather {
    low: u64,
    high: u64,
    filled: usize,
}

impl Gather {
    #[inline]
    pub(crate) const fn missing(&self) -> usize {
        16 - self.filled
    }

    /// The first and the second eight bytes, if all are there.
    #[inline]
    pub(crate) const fn get(&self) -> Option<(u64, u64)> {
        if self.missing() == 0 { Some((self.low, self.high)) } else { None }
    }

    /// Appends what `segments` begin with.
    pub(crate) fn take_segments(&mut self, segments: &[RawSegment]) {
        for segment in segments {
            // SAFETY: a segment is mapped (`RawSegment::new`), and no more is taken than is
            // missing.
            unsafe { self.take(segment.base(), segment.len().min(self.missing())) };
        }
    }

    /// Appends `len` bytes, read once each.
    ///
    /// # Safety
    /// `from..from + len` is mapped, and `len` is at most what is missing.
    #[inline]
    unsafe fn take(&mut self, from: *const u8, len: usize) {
        let words = from.cast::<u64>();
        if len == 16 && words.is_aligned() {
            // Where drivers put them in practice: two loads in place of sixteen.
            // SAFETY: 16 mapped bytes, and aligned.
            let (low, high) = unsafe { (words.read_volatile(), words.add(1).read_volatile()) };
            *self = Self { low: u64::from_le(low), high: u64::from_le(high), filled: 16 };
            return;
        }
        // SAFETY: as promised to us.
        unsafe { self.take_bytes(from, len) };
    }

    /// # Safety
    /// As for [`take`](Self::take).
    #[cold]
    unsafe fn take_bytes(&mut self, from: *const u8, len: usize) {
        for i in 0..len {
            // SAFETY: `i < len`.
            let byte = u64::from(unsafe { from.add(i).read_volatile() });
            let word = if self.filled < 8 { &mut self.low } else { &mut self.high };
            *word |= byte << (self.filled % 8 * 8);
            self.filled += 1;
        }
    }
}

/// Copies `from` to the front of `segments`, as much as fits. Returns how much that was.
pub(crate) fn copy_to_segments(from: &[u8], segments: &[RawSegment]) -> usize {
    let mut done = 0usize;
    for segment in segments {
        let piece = &from[done..from.len().min(done.saturating_add(segment.len()))];
        // SAFETY: the segment is mapped writable (`RawSegment::new`) and at least as long as
        // `piece`, which is private and cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), segment.base(), piece.len()) };
        done += piece.len();
    }
    done
}
