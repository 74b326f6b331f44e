//! The request parser: a descriptor chain in, one of three answers out.
//!
//! What reaches a domain has been checked here completely: direction, length, range, flags,
//! negotiated features. What the device can answer itself (serial number, unknown commands,
//! requests that make no sense) never reaches one. What the driver did wrong is told to it in the
//! status byte where there is one (5.2.6: `IOERR` is for "device or driver error").
//!
//! The blocks that the device announces (5.2.4, `blk_size`) are only advice by the standard, but a
//! disk that has larger ones has no smaller ones: as with QEMU's own device, a request for a part
//! of one fails. It fails here, so that it is no error of the domain's.
//!
//! Order of the checks, where more than one fails: the chain's shape, its addresses, the command,
//! the features, read-only, lengths, flags, range.

use crate::chain::{self, Layout, MalformedChain};
use crate::config::{
    MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE, SEG_MAX, SIZE_MAX,
};
use crate::features::{DISCARD, FLUSH, RO, WRITE_ZEROES};
use crate::memory::{DescriptorTable, Gather, StatusSlot, Translator, copy_to_segments};
use crate::status::WireStatus;
use domain_abi::{Capabilities, DeviceInfo};
use domain_abi::{REQUEST_MAY_UNMAP, RawSegment, op};
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestMemoryBackend;

/// Size of `struct virtio_blk_discard_write_zeroes` (5.2.6).
const RANGE_SIZE: u64 = 16;

/// How many bytes the driver was told that the disk has. It grows while requests are held against
/// it: each is held against what it is at that moment, so one that a driver sends after it was told
/// of more is never refused for what it was before.
#[derive(Debug)]
pub struct Capacity(AtomicU64);

impl From<u64> for Capacity {
    fn from(bytes: u64) -> Self {
        Self(AtomicU64::new(bytes))
    }
}

impl Capacity {
    /// In bytes.
    #[inline]
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// To be called before the driver is told, and after the disk is as large.
    pub fn set(&self, bytes: u64) {
        // Release pairs with the Acquire in `get`: what is sent there finds a disk of that size.
        self.0.store(bytes, Ordering::Release);
    }
}

/// The blocks that the driver was told of, which a request has whole ones of.
#[derive(Debug, Clone, Copy)]
pub struct Blocks {
    /// The bits of an offset or a length that are within a block; those within a sector are.
    within: u64,
}

impl Blocks {
    /// Blocks of so many bytes, which are a power of two, and 512 at least.
    #[must_use]
    pub const fn of(bytes: u32) -> Self {
        let sector = SECTOR_SIZE as u32;
        let bytes = if bytes < sector { sector } else { bytes };
        // A range that has whole ones of no power of two has whole ones of the largest one in it.
        Self { within: (1 << bytes.ilog2()) - 1 }
    }

    /// Whether a range has whole blocks only.
    #[inline(always)]
    const fn fit(self, offset: u64, len: u64) -> bool {
        (offset | len) & self.within == 0
    }
}

/// What a request is held against. Made anew when the driver acknowledges features.
#[derive(Debug)]
pub struct Limits {
    /// Bytes on the disk, as announced.
    pub capacity: Capacity,
    /// Its blocks, as announced.
    pub blocks: Blocks,
    /// Acknowledged feature bits.
    pub features: u64,
    /// Nothing may be written.
    pub read_only: bool,
    /// Serial number, zero-padded: up to 20 bytes, and a zero only if there is room for one
    /// (5.2.6).
    pub serial: [u8; 20],
}

impl Limits {
    /// Those of a device with this domain and these acknowledged features. Of a longer serial
    /// number, the first 20 bytes.
    #[must_use]
    pub fn new(info: &DeviceInfo, acked_features: u64) -> Self {
        let mut serial = [0; 20];
        let len = info.serial.len().min(serial.len());
        serial[..len].copy_from_slice(&info.serial.as_bytes()[..len]);
        Self {
            capacity: info.capacity.into(),
            blocks: Blocks::of(info.block_size),
            features: acked_features,
            read_only: info.capabilities.contains(Capabilities::READ_ONLY)
                || acked_features & RO != 0,
            serial,
        }
    }

    /// Where `len` bytes at `sector` begin, if they are whole blocks of the disk.
    #[inline]
    pub(crate) fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR_SIZE)?;
        let is_there = offset.checked_add(len)? <= self.capacity.get();
        (is_there && self.blocks.fit(offset, len)).then_some(offset)
    }
}

/// Most bytes of a read or write: no request may be for more than was announced, since an upgrade
/// waits for it.
pub(crate) const MAX_TRANSFER: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

/// What a chain asks for that is answered without a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// One of [`op`].
    Request(u32),
    /// The serial number.
    Serial,
    /// What the device does not know, or what cannot be read.
    Unknown,
}

/// What became of a chain. Each of them takes one entry in the used ring, with `head` as its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// For the domain. Its data is in the segments, which are `len` bytes for a read or a write and
    /// none for everything else.
    Request {
        /// One of [`op`].
        op: u32,
        /// [`REQUEST_MAY_UNMAP`], or 0.
        flags: u32,
        /// First byte on the disk; a multiple of the block size.
        offset: u64,
        /// Bytes; a multiple of the block size, and 0 for a flush only.
        len: u64,
        /// Where the status goes.
        status_at: StatusSlot,
        /// The chain's first descriptor.
        head: u16,
    },
    /// Answered here: `status` is yet to be written to `status_at`.
    Answer {
        /// The chain's first descriptor.
        head: u16,
        /// Where the status goes.
        status_at: StatusSlot,
        /// The status.
        status: WireStatus,
        /// `len` for the used ring.
        written: u32,
        /// What was asked for.
        asked: Asked,
    },
    /// Cannot be answered; goes into the used ring with `len` 0, so that the driver gets its
    /// descriptors back.
    Malformed {
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        reason: MalformedChain,
    },
}

/// `len` for the used ring when a request of the domain's has ended and its status byte was
/// written. `written` is the completion's.
///
/// The driver may rely on so many bytes from the front of the device-writable part (2.7.8.2). The
/// status byte is at its end, so a read that failed has not written "one byte" but, from the front,
/// none.
#[must_use]
#[inline]
pub const fn used_len(op: u32, len: u64, written: u32) -> u32 {
    if op != op::READ {
        return 1;
    }
    // No overflow: a chain has 2^32 - 1 bytes at most, of which 17 are header and status.
    if written as u64 >= len { len as u32 + 1 } else { written }
}

/// Parses the chain that begins with descriptor `head` of a queue's `table`. `segments` is cleared
/// and, for a read or a write, filled. An answer that brings data leaves what it may have written
/// in there.
#[inline]
pub fn parse<A: Deref<Target: GuestMemoryBackend>>(
    table: DescriptorTable,
    head: u16,
    translator: &mut Translator<A>,
    limits: &Limits,
    segments: &mut Vec<RawSegment>,
) -> Parsed {
    segments.clear();
    let layout = match chain::walk(table, head, translator, segments) {
        Ok(layout) => layout,
        Err(reason) => {
            segments.clear();
            return Parsed::Malformed { head, reason };
        }
    };
    let status_at = layout.status_at;
    match judge(&layout, limits, segments) {
        Verdict::Submit { op, flags, offset, len } => {
            Parsed::Request { op, flags, offset, len, status_at, head }
        }
        Verdict::Answer { status, data_written } => {
            if data_written == 0 {
                segments.clear();
            }
            // As in `used_len`: the status counts only if there is no gap before it.
            let written =
                if data_written == layout.writable { data_written + 1 } else { data_written };
            let asked = asked(&layout);
            Parsed::Answer { head, status_at, status, written: written as u32, asked }
        }
    }
}

/// What a chain asks for that is answered without a domain.
#[cold]
fn asked(layout: &Layout) -> Asked {
    match layout.header.get().map_or(u32::MAX, |(kind, _)| kind as u32) {
        VIRTIO_BLK_T_IN => Asked::Request(op::READ),
        VIRTIO_BLK_T_OUT => Asked::Request(op::WRITE),
        VIRTIO_BLK_T_FLUSH => Asked::Request(op::FLUSH),
        VIRTIO_BLK_T_DISCARD => Asked::Request(op::DISCARD),
        VIRTIO_BLK_T_WRITE_ZEROES => Asked::Request(op::WRITE_ZEROES),
        VIRTIO_BLK_T_GET_ID => Asked::Serial,
        _ => Asked::Unknown,
    }
}

enum Verdict {
    Submit { op: u32, flags: u32, offset: u64, len: u64 },
    Answer { status: WireStatus, data_written: u64 },
}

impl Verdict {
    const IO_ERROR: Self = Self::answer(WireStatus::IoError);
    const UNSUPPORTED: Self = Self::answer(WireStatus::Unsupported);
    /// Nothing to do, and well done.
    const DONE: Self = Self::answer(WireStatus::Ok);

    const fn answer(status: WireStatus) -> Self {
        Self::Answer { status, data_written: 0 }
    }
}

/// Decides what a well-formed chain asks for. The header is `{ type: le32, reserved: le32, sector:
/// le64 }` (5.2.6).
#[inline]
fn judge(layout: &Layout, limits: &Limits, segments: &mut Vec<RawSegment>) -> Verdict {
    if layout.faulty {
        return Verdict::IO_ERROR;
    }
    let Some((kind, sector)) = layout.header.get() else {
        return Verdict::IO_ERROR;
    };
    match kind as u32 {
        VIRTIO_BLK_T_IN => transfer(op::READ, sector, layout.writable, layout.readable, limits),
        VIRTIO_BLK_T_OUT if limits.read_only => Verdict::IO_ERROR,
        VIRTIO_BLK_T_OUT => transfer(op::WRITE, sector, layout.readable, layout.writable, limits),
        VIRTIO_BLK_T_FLUSH => flush(layout, limits, segments),
        VIRTIO_BLK_T_DISCARD => range(op::DISCARD, layout, limits, segments),
        VIRTIO_BLK_T_WRITE_ZEROES => range(op::WRITE_ZEROES, layout, limits, segments),
        VIRTIO_BLK_T_GET_ID => get_id(layout, limits, segments),
        // 5.2.6: a request that the device does not know. SECURE_ERASE, GET_LIFETIME and zones
        // among them.
        _ => Verdict::UNSUPPORTED,
    }
}

/// A read or a write of `len` bytes. `stray` is data in the other direction, of which there must be
/// none.
#[inline]
fn transfer(op: u32, sector: u64, len: u64, stray: u64, limits: &Limits) -> Verdict {
    // 5.2.4: no more than seg_max segments, of size_max each.
    if stray != 0 || len > MAX_TRANSFER {
        return Verdict::IO_ERROR;
    }
    match limits.offset(sector, len) {
        // 5.2.6.1: the length is a multiple of 512, and a driver does not reach beyond the
        // capacity.
        None => Verdict::IO_ERROR,
        Some(_) if len == 0 => Verdict::DONE,
        Some(offset) => Verdict::Submit { op, flags: 0, offset, len },
    }
}

/// A flush of the whole device: `sector` means nothing. Data after the header is only advised
/// against (5.2.6.1), so it is ignored; a buffer to be filled is beyond what can be meant.
#[cold]
fn flush(layout: &Layout, limits: &Limits, segments: &mut Vec<RawSegment>) -> Verdict {
    if limits.features & FLUSH == 0 {
        return Verdict::UNSUPPORTED;
    }
    if layout.writable != 0 {
        return Verdict::IO_ERROR;
    }
    segments.clear();
    Verdict::Submit { op: op::FLUSH, flags: 0, offset: 0, len: 0 }
}

/// A discard or a write zeroes: its range is the data, `{ sector: le64, num_sectors: le32, flags:
/// le32 }` (5.2.6). `sector` in the header means nothing.
///
/// What virtio 1.3 says of one that is malformed, in the order in which it is looked at. Where it
/// says nothing, the answer is QEMU's own device's.
///
/// | what is wrong | status | |
/// |---|---|---|
/// | the feature was not negotiated | UNSUPP | 5.2.6: not supported by the device |
/// | a buffer to be filled; no range, or part of one | IOERR | 5.2.6.1, an error of the driver |
/// | more ranges than `max_..._seg`, which is one | UNSUPP | 5.2.6.1 forbids it; as QEMU answers |
/// | an unknown flag; in a discard, the unmap flag | UNSUPP | 5.2.6.2 |
/// | the device is read-only | IOERR | 5.2.6.2 |
/// | more sectors than `max_..._sectors` | IOERR | 5.2.6.1 forbids it; as QEMU answers |
/// | sectors behind the capacity | IOERR | 5.2.6.1 forbids it; as QEMU answers |
/// | sectors that are no whole blocks | IOERR | as QEMU answers |
#[cold]
fn range(op: u32, layout: &Layout, limits: &Limits, segments: &mut Vec<RawSegment>) -> Verdict {
    let (feature, max_sectors, known_flags) = match op {
        op::DISCARD => (DISCARD, MAX_DISCARD_SECTORS, 0),
        _ => (WRITE_ZEROES, MAX_WRITE_ZEROES_SECTORS, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
    };
    if limits.features & feature == 0 {
        return Verdict::UNSUPPORTED;
    }
    let is_whole = layout.readable != 0 && layout.readable.is_multiple_of(RANGE_SIZE);
    if layout.writable != 0 || !is_whole {
        return Verdict::IO_ERROR;
    }
    if layout.readable > RANGE_SIZE {
        return Verdict::UNSUPPORTED;
    }
    let mut data = Gather::default();
    data.take_segments(segments);
    segments.clear();
    let Some((sector, rest)) = data.get() else {
        return Verdict::IO_ERROR;
    };
    let (sectors, wire_flags) = (rest as u32, (rest >> 32) as u32);
    if wire_flags & !known_flags != 0 {
        return Verdict::UNSUPPORTED;
    }
    if limits.read_only || sectors > max_sectors {
        return Verdict::IO_ERROR;
    }
    let len = u64::from(sectors) * SECTOR_SIZE;
    let flags =
        if wire_flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 { REQUEST_MAY_UNMAP } else { 0 };
    match limits.offset(sector, len) {
        None => Verdict::IO_ERROR,
        Some(_) if len == 0 => Verdict::DONE,
        Some(offset) => Verdict::Submit { op, flags, offset, len },
    }
}

/// The serial number. A driver asks with 20 bytes (5.2.6.1); one that asks with more or less gets
/// what fits.
#[cold]
fn get_id(layout: &Layout, limits: &Limits, segments: &[RawSegment]) -> Verdict {
    if layout.readable != 0 {
        return Verdict::IO_ERROR;
    }
    let written = copy_to_segments(&limits.serial, segments);
    Verdict::Answer { status: WireStatus::Ok, data_written: written as u64 }
}
