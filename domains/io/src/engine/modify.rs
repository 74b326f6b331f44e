//! A request that does not fit, by way of memory of its own: read the blocks at its edges, put the
//! guest's data between them, write all of it. A read is the first half of that.
//!
//! Pure steps: which read or write it is that moves the memory is the backend's, and so is what it
//! does to the bytes between two steps (a cipher, say). Of a change the range is the request's own
//! from the first step to the last ([`ranges`](super::ranges)).

use crate::aligned::Aligned;
use domain_api::{Op, Request};
use std::ops::Range;

/// Most bytes of memory for one request; what is longer the worker moves in pieces
/// ([`Bounce`](super::Bounce)).
pub const MOST_ALIGNED: u64 = 1 << 20;

/// What follows.
#[derive(Debug)]
pub enum Transfer {
    /// Read the window of this memory, then call [`read_ended`].
    Read(Box<Aligned>),
    /// Write all of this memory, which is filled; then the request is done.
    Write(Box<Aligned>),
    /// The guest has its data.
    Done,
    /// The storage had less than that.
    CutShort,
}

/// The first step of a request that is carried out on `range`, at most [`MOST_ALIGNED`] bytes, on
/// storage with blocks of `block` bytes.
#[must_use]
pub fn begin(request: &Request, range: &Range<u64>, block: u64) -> Transfer {
    let len = (range.end - range.start) as usize;
    let mut aligned = Box::new(Aligned::new(range.start, len));
    if request.op() == Some(Op::Read) {
        return Transfer::Read(aligned);
    }
    let (head, tail) =
        (request.offset() > range.start, request.offset() + request.len() < range.end);
    let block = block as usize;
    match (head, tail) {
        (false, false) => return fill(request, aligned),
        // Both blocks at once, where they are neighbours.
        _ if len <= 2 * block => {}
        (true, _) => aligned.set_window(0..block),
        (false, true) => aligned.set_window(len - block..len),
    }
    Transfer::Read(aligned)
}

/// The step after a read of `aligned` that has ended well.
#[must_use]
pub fn read_ended(request: &Request, mut aligned: Box<Aligned>) -> Transfer {
    let from = (request.offset() - aligned.offset()) as usize;
    let (to, len) = (from + request.len() as usize, aligned.bytes().len());
    if request.op() == Some(Op::Read) {
        if aligned.moved() < to {
            return Transfer::CutShort;
        }
        request.buffer().copy_from_slice(0, &aligned.bytes()[from..to]);
        return Transfer::Done;
    }
    let window = aligned.window();
    if aligned.moved() < window.len() {
        return Transfer::CutShort;
    }
    // The first block has been read, and the last one is still to come.
    if window.start == 0 && window.end < len && to < len {
        aligned.set_window(len - window.end..len);
        return Transfer::Read(aligned);
    }
    fill(request, aligned)
}

/// Puts the guest's data between the edges.
fn fill(request: &Request, mut aligned: Box<Aligned>) -> Transfer {
    let from = (request.offset() - aligned.offset()) as usize;
    let (to, len) = (from + request.len() as usize, aligned.bytes().len());
    request.buffer().copy_to_slice(0, &mut aligned.bytes_mut()[from..to]);
    aligned.set_window(0..len);
    Transfer::Write(aligned)
}
