//! Scratch memory of the host's that a callee fills in: room for completions, and for one sentence.
//!
//! The structures that the ABI passes are kept filled in from call to call, because some calls are
//! made for every batch. Where the memory is the owner knows by itself, so that whatever a callee
//! writes into such a structure, the host looks at nothing but its own.

use crate::CallError;
use domain_abi::{self as abi, RawCompletion, RawCompletions, RawMessage};
use std::ptr::NonNull;

/// Memory on the heap, for as long as its owner lives, that raw pointers may be kept to.
#[derive(Debug)]
struct HeapSlice<T>(NonNull<[T]>);

// SAFETY: it owns its content, as a box does.
unsafe impl<T: Send> Send for HeapSlice<T> {}

impl<T: Copy> HeapSlice<T> {
    fn of(content: T, count: usize) -> Self {
        Self(NonNull::from(Box::leak(vec![content; count].into_boxed_slice())))
    }

    const fn base(&self) -> *mut T {
        self.0.as_ptr().cast()
    }

    const fn len(&self) -> usize {
        self.0.len()
    }

    /// The first `len`, or all if there are not so many.
    #[inline]
    fn first(&self, len: usize) -> &[T] {
        // SAFETY: ours until we are dropped, and callees write it only in calls for which the owner
        // is borrowed mutably.
        unsafe { std::slice::from_raw_parts(self.base(), len.min(self.len())) }
    }
}

impl<T> Drop for HeapSlice<T> {
    fn drop(&mut self) {
        // SAFETY: it was a box (`of`), and nothing else frees it.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// Host memory for completions.
#[derive(Debug)]
pub struct CompletionBuffer {
    scratch: RawCompletions,
    entries: HeapSlice<RawCompletion>,
}

// SAFETY: the structure points to the entries, which are ours.
unsafe impl Send for CompletionBuffer {}

impl CompletionBuffer {
    /// Room for `capacity` completions: as many as can be in flight on the queue.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let entries = HeapSlice::of(RawCompletion::default(), capacity);
        Self { scratch: Self::all_of(&entries), entries }
    }

    fn all_of(entries: &HeapSlice<RawCompletion>) -> RawCompletions {
        RawCompletions { entries: entries.base(), capacity: entries.len(), len: 0 }
    }

    /// Fills in the structure afresh, for another instance: this one may have left anything there.
    pub fn renew(&mut self) {
        self.scratch = Self::all_of(&self.entries);
    }

    /// What the last call completed.
    #[must_use]
    #[inline]
    pub fn completed(&self) -> &[RawCompletion] {
        self.entries.first(self.scratch.len)
    }

    /// What the last call completed, if it completed `count` requests.
    #[must_use]
    #[inline]
    pub fn all(&self, count: usize) -> Option<&[RawCompletion]> {
        (self.scratch.len == count && count <= self.entries.len())
            .then(|| self.entries.first(count))
    }

    /// For one call. Nothing is completed yet.
    #[inline(always)]
    pub(crate) const fn scratch(&mut self) -> &mut RawCompletions {
        self.scratch.len = 0;
        &mut self.scratch
    }

    /// What a module is given for one call, for a benchmark that calls a domain directly.
    ///
    /// # Safety
    /// The caller leaves `entries` and `capacity` as they are, and `len` covers valid entries only.
    #[inline]
    pub const unsafe fn raw(&mut self) -> &mut RawCompletions {
        self.scratch()
    }
}

/// A sentence's worth of host memory for a callee. Kept by a caller that calls often, so that it is
/// not cleared for each call.
#[derive(Debug)]
pub(crate) struct MessageBuffer {
    scratch: RawMessage,
    text: HeapSlice<u8>,
}

// SAFETY: the structure points to the text, which is ours.
unsafe impl Send for MessageBuffer {}

impl MessageBuffer {
    pub(crate) fn new() -> Self {
        let text = HeapSlice::of(0, 512);
        Self { scratch: RawMessage { bytes: text.base(), capacity: text.len(), len: 0 }, text }
    }

    /// Makes one call with a buffer of its own.
    pub(crate) fn call(f: impl FnOnce(*mut RawMessage) -> u32) -> Result<(), CallError> {
        let mut buffer = Self::new();
        let code = f(buffer.scratch());
        if code == abi::CALL_OK { Ok(()) } else { Err(buffer.error(code)) }
    }

    /// For one call.
    #[inline(always)]
    pub(crate) const fn scratch(&mut self) -> &mut RawMessage {
        &mut self.scratch
    }

    /// Why the last call did not do what it should.
    #[cold]
    #[inline(never)]
    pub(crate) fn error(&mut self, code: u32) -> CallError {
        // A callee that says nothing leaves the length alone.
        let len = std::mem::take(&mut self.scratch.len);
        let text = String::from_utf8_lossy(self.text.first(len)).into_owned();
        if code == abi::CALL_PANICKED { CallError::Panicked(text) } else { CallError::Failed(text) }
    }
}
