//! Requests, and how they reach a domain and end.
//!
//! Requests are owned values. A domain has a [`Request`] until it completes it, and completing
//! consumes it; so safe code can neither answer a request twice nor touch its buffer after the
//! guest was told that it is done.

use crate::buffer::Buffer;
use domain_abi::{self as abi, RawCompletion, RawCompletions, RawRequest, Status};

/// What a request wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Disk to buffer.
    Read,
    /// Buffer to disk.
    Write,
    /// Make every write that completed before durable.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range is to read as zeros.
    WriteZeroes {
        /// The space may be given back.
        may_unmap: bool,
    },
}

/// The host's name for a request, for a domain's own tables and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId {
    /// Unique among what is in flight on one queue.
    pub tag: u64,
    /// The generation that it was submitted to.
    pub generation: u64,
}

/// One request, checked by the host: range inside the capacity, multiples of 512, segments that add
/// up.
#[derive(Debug)]
#[must_use = "a request must be completed, or the guest waits for ever"]
pub struct Request(RawRequest);

// SAFETY: the segments that it points to are host memory that does not change until the request has
// completed, and guest memory that is accessed by raw copies only; neither belongs to a thread.
unsafe impl Send for Request {}

impl Request {
    pub(crate) const fn raw(&self) -> &RawRequest {
        &self.0
    }

    /// The host's name for it.
    #[must_use]
    pub const fn id(&self) -> RequestId {
        RequestId { tag: self.0.tag, generation: self.0.generation }
    }

    /// What it wants done; `None` for a kind that a newer host knows and we do not.
    #[must_use]
    #[inline]
    pub const fn op(&self) -> Option<Op> {
        Some(match self.0.op() {
            abi::op::READ => Op::Read,
            abi::op::WRITE => Op::Write,
            abi::op::FLUSH => Op::Flush,
            abi::op::DISCARD => Op::Discard,
            abi::op::WRITE_ZEROES => {
                Op::WriteZeroes { may_unmap: self.0.flags() & abi::REQUEST_MAY_UNMAP != 0 }
            }
            _ => return None,
        })
    }

    /// First byte on the disk.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.0.offset()
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether it is about no bytes, like a flush.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The guest's memory for it.
    #[must_use]
    #[inline]
    pub fn buffer(&self) -> Buffer<'_> {
        let (segments, count) = self.0.segments();
        if count == 0 {
            // SAFETY: no segment, nothing to uphold.
            return unsafe { Buffer::from_segments(&[]) };
        }
        // SAFETY: the host keeps the segment list and the memory behind it until the request has
        // completed (abi::RawRequest), and completing consumes `self`, which the buffer borrows.
        unsafe { Buffer::from_segments(std::slice::from_raw_parts(segments, count)) }
    }
}

/// The requests of one `submit`, oldest first.
#[derive(Debug)]
pub struct Batch<'a> {
    requests: &'a [RawRequest],
    accepted: &'a mut usize,
}

impl<'a> Batch<'a> {
    /// Offers `requests`; `accepted` counts those that are taken. Meant for what calls a domain.
    ///
    /// # Safety
    /// `accepted` is at most their number. What each points to is as `RawRequest::new` has it until
    /// the `Request` that is taken has completed: so one that was taken is not offered again, but
    /// to another instance after this one is destroyed.
    #[doc(hidden)]
    pub const unsafe fn new(requests: &'a [RawRequest], accepted: &'a mut usize) -> Self {
        Self { requests, accepted }
    }

    /// How many are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len() - *self.accepted
    }

    /// Whether none is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the next one. Not an `Iterator`: what is not taken stays with the host, and that
    /// should be read in the code.
    #[allow(clippy::should_implement_trait)]
    #[inline]
    pub fn next(&mut self) -> Option<Request> {
        let raw = self.requests.get(*self.accepted)?;
        *self.accepted += 1;
        Some(Request(*raw))
    }
}

/// Where completions go.
#[derive(Debug)]
pub struct Completions<'a> {
    raw: &'a mut RawCompletions,
}

impl<'a> Completions<'a> {
    /// Wraps the host's list. Meant for what calls a domain.
    ///
    /// # Safety
    /// `entries` has room for `capacity` completions, and `len` of them are valid.
    #[doc(hidden)]
    pub const unsafe fn new(raw: &'a mut RawCompletions) -> Self {
        Self { raw }
    }

    /// How many more fit. The host makes room for everything that can be in flight on the queue.
    #[must_use]
    pub const fn room(&self) -> usize {
        self.raw.capacity - self.raw.len
    }

    /// Ends a request.
    ///
    /// # Panics
    /// If there is no room, which takes a domain that completes what it was never given.
    #[inline]
    pub fn complete(&mut self, request: Request, status: Status) {
        assert!(
            self.raw.len < self.raw.capacity,
            "completed more requests than the host has in flight"
        );
        let read = matches!(request.op(), Some(Op::Read)) && matches!(status, Status::Ok);
        let completion = RawCompletion {
            tag: request.0.tag,
            generation: request.0.generation,
            status: status as u32,
            written: if read { request.0.len() as u32 } else { 0 },
        };
        // SAFETY: `entries` has room for `capacity` completions (host's contract), and `len` is
        // below it.
        unsafe { self.raw.entries.add(self.raw.len).write(completion) };
        self.raw.len += 1;
    }
}
