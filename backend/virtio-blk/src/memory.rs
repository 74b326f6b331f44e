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
use std::marker::PhantomData;
use std::ops::Deref;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// The size of a descriptor (2.7.5), of a request's header and of a discard's range (5.2.6).
const SIXTEEN: usize = size_of::<Sixteen>();

/// Where a queue's descriptors are. Copied out of the queue, it holds until the queue is
/// reconfigured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Guest address of the first descriptor.
    pub addr: u64,
    /// Number of descriptors: the queue's size.
    pub size: u16,
}

/// Translates guest addresses within one snapshot of the memory map.
///
/// Kept as long as the snapshot, so that what is remembered is good for the next batch as well.
#[derive(Debug)]
pub struct Translator<A> {
    memory: A,
    /// The region that was found last, and the one before.
    known: [Region; 2],
    /// The queue's descriptors.
    table: DescriptorTable,
    /// Where they are mapped, and how many may be read there.
    mapped: (*const u8, u16),
    /// The first address that was asked for in vain.
    outside: Option<u64>,
}

// SAFETY: besides the map, addresses of memory that belongs to no thread.
unsafe impl<A: Send> Send for Translator<A> {}

/// A region of guest memory: first guest address, length, where it is mapped. Length 0 is none.
#[derive(Debug, Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    base: *mut u8,
}

impl Region {
    const NONE: Self = Self { start: 0, len: 0, base: std::ptr::null_mut() };

    /// Where all of `len` bytes at `addr` are mapped, one after the other. None if `len` is 0.
    #[inline(always)]
    fn place(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let at = addr.wrapping_sub(self.start);
        // The first and the last of them; `at + len` may be anything if the first is outside.
        (at < self.len && self.len - at >= len).then(|| self.base.wrapping_add(at as usize))
    }

    /// Where `addr` is mapped, and how many bytes from there on are contiguous, `len` at most.
    #[inline]
    fn piece(&self, addr: u64, len: usize) -> Option<(*mut u8, usize)> {
        let at = addr.wrapping_sub(self.start);
        let left = self.len.checked_sub(at).filter(|left| *left > 0)?;
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        Some((self.base.wrapping_add(at as usize), len.min(left)))
    }
}

impl<A: Deref<Target: GuestMemoryBackend>> Translator<A> {
    const UNMAPPED: (*const u8, u16) = (std::ptr::null(), 0);

    /// Begins with no region remembered.
    ///
    /// # Safety
    /// The caller keeps this snapshot of the memory map, with every region mapped readable and
    /// writable, until the last use of any [`RawSegment`] or [`StatusSlot`] that comes out of a
    /// parse with this translator; `memory` itself may go earlier. It refers to the same map each
    /// time that it is asked. No code in this process holds a Rust reference into guest memory.
    #[must_use]
    pub const unsafe fn new(memory: A) -> Self {
        Self {
            memory,
            known: [Region::NONE; 2],
            table: DescriptorTable { addr: 0, size: 0 },
            mapped: Self::UNMAPPED,
            outside: None,
        }
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

    /// Where all of `len` bytes at `addr` are mapped, if they lie in one of the regions that are
    /// remembered. `None` says nothing about others.
    #[inline(always)]
    fn place(&self, addr: u64, len: u64) -> Option<*mut u8> {
        self.known[0].place(addr, len).or_else(|| self.known[1].place(addr, len))
    }

    /// The chains that are parsed next begin in this table. Whether it is in guest memory, and
    /// how, is found out here; where it is not as drivers have it, nothing is refused: its
    /// descriptors are looked up one by one.
    #[inline]
    pub fn begin(&mut self, table: DescriptorTable) {
        if table != self.table {
            self.look_up(table);
        }
    }

    #[cold]
    fn look_up(&mut self, table: DescriptorTable) {
        let len = usize::from(table.size) * SIXTEEN;
        let place = self.piece(table.addr, len).filter(|&(_, piece)| piece == len);
        self.outside = None;
        self.mapped = place.map_or(Self::UNMAPPED, |(first, _)| (first.cast_const(), table.size));
        self.table = table;
    }

    /// What the chains begin in.
    #[inline(always)]
    #[must_use]
    pub const fn table(&self) -> DescriptorTable {
        self.table
    }

    /// The descriptors of that table; none, if they are not all in one region.
    #[inline(always)]
    pub(crate) const fn descriptors(&self) -> Descriptors<'_> {
        let (first, size) = self.mapped;
        Descriptors { first, size, memory: PhantomData }
    }

    /// `size` descriptors that are a chain's own, if they are where [`place`](Self::place) finds
    /// them.
    #[inline(always)]
    pub(crate) fn indirect(&self, addr: u64, size: u16) -> Option<Descriptors<'_>> {
        let first = self.place(addr, u64::from(size) * SIXTEEN as u64)?;
        Some(Descriptors { first, size, memory: PhantomData })
    }

    /// The sixteen bytes at `addr` as two numbers, if they are where [`place`](Self::place) finds
    /// them.
    #[inline(always)]
    pub(crate) fn header(&self, addr: u64) -> Option<(u64, u64)> {
        let at = self.place(addr, SIXTEEN as u64)?;
        // SAFETY: in a region of the snapshot (`new`).
        Some(unsafe { read_sixteen(at) })
    }

    /// The `len` bytes at `addr`, if they are where [`place`](Self::place) finds them.
    #[inline(always)]
    pub(crate) fn segment(&self, addr: u64, len: u32) -> Option<RawSegment> {
        let base = self.place(addr, u64::from(len))?;
        // SAFETY: `base..base + len` lies in a region of the snapshot, which `new`'s caller keeps
        // until the request has completed.
        Some(unsafe { RawSegment::new(base, len as usize) })
    }

    /// The status byte at `addr`, if it is where [`place`](Self::place) finds it.
    #[inline(always)]
    pub(crate) fn near_status_slot(&self, addr: u64) -> Option<StatusSlot> {
        self.place(addr, 1).map(StatusSlot)
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

/// Sixteen bytes at any address: a volatile read of this is two loads, where one of an array of
/// bytes is sixteen.
#[repr(C, packed)]
struct Sixteen(u64, u64);

/// Sixteen bytes of guest memory as two numbers, read once each.
///
/// # Safety
/// They are mapped.
#[inline(always)]
unsafe fn read_sixteen(from: *const u8) -> (u64, u64) {
    // SAFETY: as promised to us; it is aligned everywhere, and any bytes are one.
    let Sixteen(low, high) = unsafe { from.cast::<Sixteen>().read_volatile() };
    (u64::from_le(low), u64::from_le(high))
}

/// Descriptors one behind the other, mapped.
#[derive(Clone, Copy)]
pub(crate) struct Descriptors<'m> {
    first: *const u8,
    size: u16,
    /// The map that they are in stays.
    memory: PhantomData<&'m ()>,
}

impl Descriptors<'_> {
    /// One of them, as two numbers. None if there are not so many.
    #[inline(always)]
    pub(crate) fn read(&self, index: u16) -> Option<(u64, u64)> {
        let at = self.first.wrapping_add(usize::from(index) * SIXTEEN);
        // SAFETY: what makes one of these has looked up `size` of them in the snapshot of the
        // translator that is borrowed; `index` is below that.
        (index < self.size).then(|| unsafe { read_sixteen(at) })
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
        if len == SIXTEEN {
            // As drivers have it in practice: two loads in place of sixteen.
            // SAFETY: 16 mapped bytes.
            let (low, high) = unsafe { read_sixteen(from) };
            *self = Self { low, high, filled: SIXTEEN };
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
