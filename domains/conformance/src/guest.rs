//! Guest memory of our own: the pieces of one request, with marked bytes between them.
//!
//! The marks show whether a domain wrote outside of the pieces that it was given. The memory is
//! only ever accessed through raw pointers while a domain may have it, as real guest memory is.

use super::Violation;
use domain_abi::RawSegment;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

const PAGE: usize = 4096;
/// Bytes between two pieces, and in front of the first: odd, so that pieces start at odd addresses.
const GAP: usize = 61;
const MARK: u8 = 0xa5;

/// The memory of one request.
#[derive(Debug)]
pub(super) struct GuestMemory {
    base: *mut u8,
    layout: Layout,
    /// Where each piece starts in the memory, and how long it is.
    pieces: Vec<(usize, usize)>,
    /// A `Vec`, because requests point into it while this is moved: a `Box` that is moved says that
    /// nothing else points into it.
    segments: Vec<RawSegment>,
}

// SAFETY: it owns the memory, and hands out no references to it.
unsafe impl Send for GuestMemory {}

impl GuestMemory {
    /// Memory for pieces of these lengths: one piece alone starts at a page, several do not.
    pub(super) fn new(lengths: &[usize]) -> Self {
        let mut pieces = Vec::with_capacity(lengths.len());
        let mut at = if lengths.len() == 1 { PAGE } else { GAP };
        for &len in lengths {
            pieces.push((at, len));
            at += len + GAP;
        }
        let layout = Layout::from_size_align(at, PAGE).expect("a few megabytes");
        // SAFETY: the layout is not empty, it has the gap.
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: `base` has `at` bytes.
        unsafe { base.write_bytes(MARK, at) };
        let segments = pieces
            .iter()
            // SAFETY: inside the allocation, which lives until the request has completed (Lane
            // keeps or leaks it) and is accessed by raw pointers only.
            .map(|&(start, len)| unsafe { RawSegment::new(base.add(start), len) })
            .collect();
        Self { base, layout, pieces, segments }
    }

    pub(super) fn segments(&self) -> &[RawSegment] {
        &self.segments
    }

    /// Puts `bytes` into the pieces. Only before a domain gets them.
    pub(super) fn fill(&mut self, bytes: &[u8]) {
        let mut from = bytes;
        for &(start, len) in &self.pieces {
            let (piece, rest) = from.split_at(len);
            // SAFETY: the piece is inside our allocation, and `bytes` is not.
            unsafe { self.base.add(start).copy_from_nonoverlapping(piece.as_ptr(), len) };
            from = rest;
        }
        assert!(from.is_empty(), "as many bytes as the pieces have");
    }

    /// What is in the pieces now. Only after the domain has given them back.
    ///
    /// # Errors
    /// A byte outside of the pieces was changed.
    pub(super) fn take(&self) -> Result<Vec<u8>, Violation> {
        // SAFETY: the allocation is as long as its layout, initialised in `new`, and nothing else
        // has it now (caller's promise).
        let all = unsafe { std::slice::from_raw_parts(self.base, self.layout.size()) };
        let mut bytes = Vec::new();
        let mut marked_from = 0;
        for &(start, len) in &self.pieces {
            marks(&all[marked_from..start])?;
            bytes.extend_from_slice(&all[start..start + len]);
            marked_from = start + len;
        }
        marks(&all[marked_from..])?;
        Ok(bytes)
    }
}

fn marks(between: &[u8]) -> Result<(), Violation> {
    if between.iter().all(|&byte| byte == MARK) {
        Ok(())
    } else {
        Err(Violation::new("it wrote outside of the segments"))
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base, self.layout) };
    }
}
