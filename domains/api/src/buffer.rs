//! The guest's data of one request, as a domain may touch it: by copy, never as a slice.
//!
//! Guest memory changes while the host looks at it (another vCPU, a malicious driver), so no
//! `&[u8]` to it may exist. Every access here goes through raw pointers; what is copied out is a
//! private value, and the bytes of a racing write may come out in any mixture, as they do for a
//! real disk's DMA.

use domain_abi::RawSegment;

/// The segments of one request, in order: `len` bytes of guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Buffer<'r> {
    segments: &'r [RawSegment],
}

impl<'r> Buffer<'r> {
    /// Wraps segments of guest memory.
    ///
    /// # Safety
    /// Each segment is mapped readable and writable for as long as `'r`, and there is no Rust
    /// reference into it.
    #[must_use]
    pub const unsafe fn from_segments(segments: &'r [RawSegment]) -> Self {
        Self { segments }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.segments.iter().map(|s| s.len()).sum()
    }

    /// Whether there are no bytes at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether every piece starts at a multiple of `align` and is a multiple of it long, as direct
    /// I/O wants it.
    ///
    /// # Panics
    /// If `align` is no power of two.
    #[must_use]
    pub fn is_aligned(&self, align: usize) -> bool {
        assert!(align.is_power_of_two(), "an alignment of {align}");
        self.segments.iter().all(|s| (s.base().addr() | s.len()) & (align - 1) == 0)
    }

    /// The pieces, to be handed to the kernel or copied from.
    #[must_use]
    pub const fn segments(&self) -> &'r [RawSegment] {
        self.segments
    }

    /// Copies `from` into the buffer, starting `at` bytes in. Returns how many bytes fitted.
    pub fn copy_from_slice(&self, at: usize, from: &[u8]) -> usize {
        let mut done = 0;
        self.for_range(at, from.len(), |base, len| {
            // SAFETY: `base..base + len` is inside a mapped segment (constructor's contract), `done
            // + len <= from.len()` because `for_range` yields `from.len()` bytes at most, and a
            // private slice cannot overlap guest memory.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(done), base, len) };
            done += len;
        });
        done
    }

    /// Copies the buffer's bytes from `at` on to `to`. Returns how many bytes there were.
    pub fn copy_to_slice(&self, at: usize, to: &mut [u8]) -> usize {
        let mut done = 0;
        let wanted = to.len();
        self.for_range(at, wanted, |base, len| {
            // SAFETY: as in `copy_from_slice`, in the other direction.
            unsafe {
                std::ptr::copy_nonoverlapping(base.cast_const(), to.as_mut_ptr().add(done), len)
            };
            done += len;
        });
        done
    }

    /// Fills the whole buffer with zeros.
    #[inline]
    pub fn zero(&self) {
        match self.segments {
            [one] => Self::zero_segment(one),
            all => Self::zero_each(all),
        }
    }

    /// Apart, because a loop of many calls is made ready for with more than one call takes.
    #[inline(never)]
    fn zero_each(segments: &[RawSegment]) {
        segments.iter().for_each(Self::zero_segment);
    }

    #[inline(always)]
    fn zero_segment(segment: &RawSegment) {
        // SAFETY: the segment is mapped writable for `len` bytes (constructor's contract).
        unsafe { std::ptr::write_bytes(segment.base(), 0, segment.len()) };
    }

    /// Calls `f` with address and length of each contiguous piece of the `len` bytes from `at` on;
    /// less where the buffer ends.
    pub fn for_range(&self, at: usize, len: usize, mut f: impl FnMut(*mut u8, usize)) {
        let mut skip = at;
        let mut left = len;
        for segment in self.segments {
            if left == 0 {
                return;
            }
            if skip >= segment.len() {
                skip -= segment.len();
                continue;
            }
            let piece = (segment.len() - skip).min(left);
            f(segment.base().wrapping_add(skip), piece);
            left -= piece;
            skip = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_is_of_every_address_and_length() {
        let at =
            // SAFETY: only looked at, never accessed.
            |base: usize, len| unsafe { RawSegment::new(std::ptr::without_provenance_mut(base), len) };
        let aligned = |segments: &[RawSegment]| {
            // SAFETY: the segments are only looked at, never followed.
            unsafe { Buffer::from_segments(segments) }.is_aligned(512)
        };
        assert!(aligned(&[]));
        assert!(aligned(&[at(4096, 512), at(512, 1024)]));
        assert!(!aligned(&[at(4096, 512), at(4097, 512)]));
        assert!(!aligned(&[at(4096, 511), at(8192, 513)]));
    }

    #[test]
    fn copies_cross_segments_and_stop_at_the_end() {
        let mut a = [0u8; 3];
        let mut b = [0u8; 5];
        let segments = [
            // SAFETY: the vectors outlive the buffer and are not touched meanwhile.
            unsafe { RawSegment::new(a.as_mut_ptr(), a.len()) },
            // SAFETY: as above.
            unsafe { RawSegment::new(b.as_mut_ptr(), b.len()) },
        ];
        // SAFETY: both arrays outlive the buffer and are not touched through their names meanwhile.
        let buffer = unsafe { Buffer::from_segments(&segments) };
        assert_eq!(buffer.len(), 8);
        assert_eq!(buffer.copy_from_slice(1, &[1, 2, 3, 4, 5, 6, 7, 8, 9]), 7);
        let mut out = [9u8; 10];
        assert_eq!(buffer.copy_to_slice(0, &mut out), 8);
        assert_eq!(out, [0, 1, 2, 3, 4, 5, 6, 7, 9, 9]);
        buffer.zero();
        assert_eq!(buffer.copy_to_slice(2, &mut out[..4]), 4);
        assert_eq!(out[..4], [0; 4]);
    }
}
