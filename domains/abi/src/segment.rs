//! A piece of guest memory, as it is named in requests.

/// One piece of guest memory. Same layout as `struct iovec`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RawSegment {
    base: *mut u8,
    len: usize,
}

impl RawSegment {
    /// Names a piece of guest memory.
    ///
    /// # Safety
    /// `base..base + len` stays mapped readable and writable until the request that uses it has
    /// completed, and no Rust reference into it is made.
    #[must_use]
    pub const unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self { base, len }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same piece without its first `count` bytes.
    ///
    /// # Panics
    /// If it has fewer.
    #[must_use]
    pub const fn without_first(self, count: usize) -> Self {
        assert!(count <= self.len, "more bytes than the piece has");
        Self { base: self.base.wrapping_add(count), len: self.len - count }
    }

    /// Address of the first byte, e.g. to find where the next piece would continue it.
    #[must_use]
    pub const fn base(&self) -> *mut u8 {
        self.base
    }
}

// SAFETY: an address and a length; what made it answers for the memory (`new`), which belongs to
// no thread.
unsafe impl Send for RawSegment {}
// SAFETY: as above.
unsafe impl Sync for RawSegment {}
