//! Memory for data that the kernel does not take from where the guest has it, or not in these
//! pieces.
//!
//! Direct I/O wants offsets, lengths and addresses to be multiples of what the storage asks for. A
//! request that does not fit is carried out on the aligned range around it, in memory of our own.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;

/// What addresses are aligned to: the most that direct I/O asks for.
const ALIGN: usize = 4096;

/// A range of the file, and memory for it.
///
/// While a ring has it the kernel may read or write the memory, and the ring alone owns it.
#[derive(Debug)]
pub struct Aligned {
    memory: NonNull<u8>,
    len: usize,
    offset: u64,
    /// The part that the next work is about.
    pub(crate) window: Range<usize>,
    /// How much of the window has been moved.
    pub(crate) moved: usize,
}

// SAFETY: memory that it owns.
unsafe impl Send for Aligned {}

impl Aligned {
    /// Zeroed memory for `len` bytes of the file from `offset` on; the window is all of it.
    ///
    /// # Panics
    /// If `len` is 0 or more than 4 GiB: one call to the kernel moves it.
    #[must_use]
    pub fn new(offset: u64, len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        let memory = NonNull::new(memory).unwrap_or_else(|| handle_alloc_error(layout));
        Self { memory, len, offset, window: 0..len, moved: 0 }
    }

    fn layout(len: usize) -> Layout {
        assert!(len > 0 && u32::try_from(len).is_ok(), "memory for {len} bytes");
        Layout::from_size_align(len, ALIGN).expect("a power of two, and not near the end of memory")
    }

    /// First byte in the file.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// The memory.
    #[must_use]
    pub const fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this length, initialised, and nothing writes while we are
        // borrowed.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }

    /// The memory, to be changed.
    #[must_use]
    pub const fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and we are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }

    /// Says which bytes the next work is about.
    ///
    /// # Panics
    /// If they are not inside the memory.
    pub fn set_window(&mut self, window: Range<usize>) {
        assert!(window.start <= window.end && window.end <= self.len, "{window:?} of {}", self.len);
        (self.window, self.moved) = (window, 0);
    }

    /// Which bytes the last work was about.
    #[must_use]
    pub fn window(&self) -> Range<usize> {
        self.window.clone()
    }

    /// How many bytes of the window the last work has moved. Reading at the end of the file moves
    /// less than all.
    #[must_use]
    pub const fn moved(&self) -> usize {
        self.moved
    }

    /// The bytes of the window that are left to be moved, and where they are in the file.
    #[must_use]
    pub fn rest_mut(&mut self) -> (&mut [u8], u64) {
        let (range, at) = (self.window.start + self.moved..self.window.end, self.offset);
        let start = range.start as u64;
        (&mut self.bytes_mut()[range], at + start)
    }

    /// Says that `count` more bytes of the window have been moved.
    ///
    /// # Panics
    /// If there are not so many left.
    pub fn moved_more(&mut self, count: usize) {
        assert!(count <= self.window.len() - self.moved, "{count} more than the window has");
        self.moved += count;
    }

    /// What is left of the window: address, length, offset in the file.
    pub(crate) fn left(&mut self) -> (*mut u8, u32, u64) {
        let start = self.window.start + self.moved;
        // SAFETY: inside the allocation: `moved` is at most the window's length.
        let base = unsafe { self.memory.as_ptr().add(start) };
        (base, (self.window.end - start) as u32, self.offset + start as u64)
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.memory.as_ptr(), Self::layout(self.len)) };
    }
}
