//! The usual chain, seen at a glance: header, one piece of data, status, each in a descriptor of
//! its own, in the queue's table or in an indirect one of three; a read or a write that the limits
//! allow. It is what drivers send in practice, and what [`parse`](crate::parse) costs most of its
//! instructions for is everything that a chain may be besides.
//!
//! What is found here is what `parse` would find, and everything else is left to it, errors above
//! all: this says of no chain what is wrong with it. Each check that `parse` makes of such a chain
//! is made here, of a chain that is narrower than it has to be:
//!
//! | `parse` | here |
//! |---|---|
//! | a descriptor is in its table | so (`Descriptors::read`) |
//! | no more descriptors than the table has: no loop | three are read, which are three kinds |
//! | an indirect table is the end, not nested, whole | its flags and length are the usual ones |
//! | readable before writable, a status byte, a header | flags and lengths of first and last |
//! | less than 4 GiB in all | data of a multiple of 512 bytes leaves room for 17 |
//! | each buffer is in guest memory | wholly in one of two regions that are remembered |
//! | direction, read-only, blocks, most bytes, capacity | so |
//!
//! Each byte is read from guest memory once. A chain that is left to `parse` is read there anew,
//! and nothing that was read here has any part in what is found then.

use crate::chain::{INDIRECT, NEXT, WRITE};
use crate::memory::{Descriptors, StatusSlot, Translator};
use crate::request::{Limits, MAX_TRANSFER};
use domain_abi::{RawSegment, op};
use std::ops::Deref;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::GuestMemoryBackend;

/// A read or a write.
#[derive(Debug, Clone, Copy)]
pub struct Usual {
    /// [`op::READ`] or [`op::WRITE`].
    pub op: u32,
    /// First byte on the disk; a multiple of the block size.
    pub offset: u64,
    /// Its data: a positive number of blocks.
    pub data: RawSegment,
    /// Where the status goes.
    pub status_at: StatusSlot,
}

// What is said of a kind here holds for both.
const _: () = assert!(op::READ == VIRTIO_BLK_T_IN && op::WRITE == VIRTIO_BLK_T_OUT);
const _: () = assert!(VIRTIO_BLK_T_IN == 0 && VIRTIO_BLK_T_OUT == 1);

/// `{ len: le32, flags: le16 }` of a descriptor: all but its address and its `next` (2.7.5).
const fn what(len: u32, flags: u16) -> u64 {
    len as u64 | (flags as u64) << 32
}

/// Without `next`.
const fn what_of(rest: u64) -> u64 {
    rest & (u64::MAX >> 16)
}

const fn next_of(rest: u64) -> u16 {
    (rest >> 48) as u16
}

/// The three descriptors of a chain that begins with the first of a table, or further on.
#[inline(always)]
fn three(table: Descriptors<'_>, head: u16) -> Option<[(u64, u64); 3]> {
    let first = table.read(head)?;
    let second = table.read(next_of(first.1))?;
    let third = table.read(next_of(second.1))?;
    Some([first, second, third])
}

/// Sees what the chain asks for that begins with descriptor `head` of the table that the translator
/// has [begun](Translator::begin) with, if it is a usual one.
#[inline(always)]
pub fn usual<A: Deref<Target: GuestMemoryBackend>>(
    head: u16,
    translator: &Translator<A>,
    limits: &Limits,
) -> Option<Usual> {
    const HEADER: u64 = what(16, NEXT);
    const TABLE: u64 = what(3 * 16, INDIRECT);
    const STATUS: u64 = what(1, WRITE);
    const MOST: u32 = MAX_TRANSFER as u32;
    const { assert!(MOST as u64 == MAX_TRANSFER) };
    let table = translator.descriptors();
    let (addr, rest) = table.read(head)?;
    let [header, data, status] = if what_of(rest) == TABLE {
        three(translator.indirect(addr, 3)?, 0)?
    } else {
        let data = table.read(next_of(rest))?;
        [(addr, rest), data, table.read(next_of(data.1))?]
    };
    let (len, flags) = (data.1 as u32, (data.1 >> 32) as u16);
    let is_usual =
        what_of(header.1) == HEADER && flags & !WRITE == NEXT && what_of(status.1) == STATUS;
    let (kind, sector) = if is_usual { translator.header(header.0)? } else { return None };
    let op = kind as u32;
    // A read has a buffer to be filled, and a write has one to be read.
    let fits = u32::from(flags & WRITE == 0) == op && !(op == op::WRITE && limits.read_only);
    // Not 0, which wraps around.
    let len_fits = len.wrapping_sub(1) < MOST;
    if !fits || !len_fits {
        return None;
    }
    let offset = limits.offset(sector, u64::from(len))?;
    let (data, status_at) =
        (translator.segment(data.0, len)?, translator.near_status_slot(status.0)?);
    Some(Usual { op, offset, data, status_at })
}
