//! One walk over a descriptor chain: header, data, status, whatever descriptors they are spread
//! over.
//!
//! A device must not assume how a message is cut into descriptors (2.7.4.1): the first 16 readable
//! bytes are the header and the last writable byte is the status, wherever descriptors begin and
//! end. What is between is data.
//!
//! The walk sorts what can be wrong into two kinds. If the chain's shape is broken, no byte of it
//! can be trusted to be the status byte: [`MalformedChain`]. If only its contents are wrong, the
//! status byte is known and the driver can be told: [`Layout::faulty`].
//!
//! Why not `virtio_queue::DescriptorChain`: it looks each descriptor up in the memory map anew,
//! which alone costs twice as much as a whole parse here (`benches/parse.rs`), and it ends in
//! silence where the chain is broken. It serves as the yardstick in the tests instead.
//!
//! The walk knows nothing of request types.

use crate::memory::{DescriptorTable, Gather, StatusSlot, Translator, split_status};
use domain_abi::RawSegment;
use std::ops::Deref;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::GuestMemoryBackend;

pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// `struct virtq_desc` (2.7.5).
const DESCRIPTOR_SIZE: u32 = 16;

/// Most pieces of guest memory that the data of a request may consist of. More are refused: no
/// kernel interface takes more than `IOV_MAX` in a call, and `seg_max` announces far fewer.
pub const MAX_SEGMENTS: usize = 1024;

/// Most descriptors in a chain: each segment its own, and two more for header and status. A device
/// may limit it (2.7.4.1), and must, where the chain sits in an indirect table that can hold a loop
/// of 65535 and be offered again and again.
pub const MAX_DESCRIPTORS: usize = MAX_SEGMENTS + 2;

/// Why a chain has no place for a status byte, so that nothing in it can be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum MalformedChain {
    /// The head, or the `next` of a descriptor, is not in the table.
    #[error("descriptor {index} is not in its table of {size}")]
    Index {
        /// The descriptor.
        index: u16,
        /// How many there are.
        size: u16,
    },
    /// More descriptors than the table has: it runs in a circle (2.7.5.2).
    #[error("the descriptor chain is a loop")]
    Loop,
    /// A descriptor table is not in guest memory.
    #[error("a descriptor table is outside of guest memory")]
    TableOutside,
    /// An indirect table in an indirect table, one that is not the end of its chain, or one whose
    /// length is not that of 1 to 65535 descriptors (2.7.5.3).
    #[error(
        "an indirect descriptor table is nested, has a successor, or has a length of {len} bytes"
    )]
    Indirect {
        /// The length that its descriptor gives.
        len: u32,
    },
    /// 2^32 bytes or more in all (2.7.5.2).
    #[error("the descriptor chain describes 4 GiB or more")]
    TooLarge,
    /// More than [`MAX_DESCRIPTORS`].
    #[error("the descriptor chain is longer than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// A device-readable descriptor after a device-writable one (2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    Order,
    /// No device-writable byte.
    #[error("the descriptor chain has no room for a status byte")]
    NoStatus,
    /// The last device-writable byte is not in guest memory.
    #[error("the status byte is outside of guest memory")]
    StatusOutside,
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// The descriptors of one chain, in order.
struct Descriptors {
    table: DescriptorTable,
    /// The next one, unless the chain is at its end.
    next: Option<u16>,
    /// How many more the table can have without a loop.
    left: u16,
    is_indirect: bool,
}

impl Descriptors {
    /// The next descriptor that is no reference to an indirect table. Each is read once.
    #[inline]
    fn next<A: Deref<Target: GuestMemoryBackend>>(
        &mut self,
        translator: &mut Translator<A>,
    ) -> Option<Result<Descriptor, MalformedChain>> {
        let mut index = self.next?;
        loop {
            let descriptor = match self.read(index, translator) {
                Ok(descriptor) => descriptor,
                Err(reason) => return Some(Err(reason)),
            };
            if descriptor.flags & INDIRECT == 0 {
                self.next = (descriptor.flags & NEXT != 0).then_some(descriptor.next);
                return Some(Ok(descriptor));
            }
            if let Err(reason) = self.enter(&descriptor) {
                return Some(Err(reason));
            }
            index = 0;
        }
    }

    #[inline]
    fn read<A: Deref<Target: GuestMemoryBackend>>(
        &mut self,
        index: u16,
        translator: &mut Translator<A>,
    ) -> Result<Descriptor, MalformedChain> {
        if index >= self.table.size {
            return Err(MalformedChain::Index { index, size: self.table.size });
        }
        self.left = self.left.checked_sub(1).ok_or(MalformedChain::Loop)?;
        let offset = u64::from(index) * u64::from(DESCRIPTOR_SIZE);
        let words = self.table.addr.checked_add(offset).and_then(|addr| translator.read(addr));
        // `{ addr: le64, len: le32, flags: le16, next: le16 }` (2.7.5).
        let (addr, rest) = words.ok_or(MalformedChain::TableOutside)?;
        Ok(Descriptor {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }

    /// Goes on in an indirect table, from its first descriptor, whatever the reference says about
    /// writing (2.7.5.3.2). It must be the chain's last: with a next one it would mean something
    /// else to a reader that follows that (2.7.5.3.1 forbids it).
    fn enter(&mut self, reference: &Descriptor) -> Result<(), MalformedChain> {
        let len = reference.len;
        let size = u16::try_from(len / DESCRIPTOR_SIZE).unwrap_or(0);
        let last = reference.flags & NEXT == 0;
        if self.is_indirect || !last || size == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(MalformedChain::Indirect { len });
        }
        self.table = DescriptorTable { addr: reference.addr, size };
        self.left = size;
        self.is_indirect = true;
        Ok(())
    }
}

/// What a well-formed chain holds. The data is in the segments that the walk filled: readable ones
/// first.
#[derive(Debug)]
pub(crate) struct Layout {
    /// The first 16 device-readable bytes, or fewer if there are fewer.
    pub header: Gather,
    /// Device-readable bytes after the header.
    pub readable: u64,
    /// Device-writable bytes before the status byte.
    pub writable: u64,
    /// Where the status byte goes.
    pub status_at: StatusSlot,
    /// Some of the header or data is outside of guest memory, or in more than [`MAX_SEGMENTS`]
    /// pieces. The segments are incomplete.
    pub faulty: bool,
}

/// Walks the chain once. `segments` must be empty; after an error its contents mean nothing.
#[inline]
pub(crate) fn walk<A: Deref<Target: GuestMemoryBackend>>(
    table: DescriptorTable,
    head: u16,
    translator: &mut Translator<A>,
    segments: &mut Vec<RawSegment>,
) -> Result<Layout, MalformedChain> {
    let mut descriptors =
        Descriptors { table, next: Some(head), left: table.size, is_indirect: false };
    let mut header = Gather::default();
    let (mut readable, mut writable, mut total) = (0u64, 0u64, 0u32);
    let mut status_addr = None;
    let mut in_writable_part = false;
    let mut faulty = false;
    let mut count = 0;

    while let Some(descriptor) = descriptors.next(translator) {
        let Descriptor { mut addr, len, flags, .. } = descriptor?;
        count += 1;
        if count > MAX_DESCRIPTORS {
            return Err(MalformedChain::TooLong);
        }
        total = total.checked_add(len).ok_or(MalformedChain::TooLarge)?;
        let mut len = len as usize;

        if flags & WRITE != 0 {
            in_writable_part = true;
            if len > 0 {
                // Saturating: an address beyond the end of the address space is outside of guest
                // memory, so saying u64::MAX is as good.
                status_addr = Some(addr.saturating_add(len as u64 - 1));
                writable += len as u64;
            }
        } else {
            if in_writable_part {
                return Err(MalformedChain::Order);
            }
            if header.missing() > 0 && len > 0 && !faulty {
                let Some(taken) = translator.gather(addr, len, &mut header) else {
                    faulty = true;
                    continue;
                };
                // Cannot overflow unless nothing is left of the descriptor, and then the address is
                // not used.
                addr = addr.wrapping_add(taken as u64);
                len -= taken;
            }
            readable += len as u64;
        }
        if len > 0 && !faulty {
            faulty = translator.push_segments(addr, len, segments).is_none();
        }
    }

    let status_addr = status_addr.ok_or(MalformedChain::NoStatus)?;
    let status_at =
        if faulty { translator.status_slot(status_addr) } else { split_status(segments) };
    let status_at = status_at.ok_or(MalformedChain::StatusOutside)?;
    faulty |= segments.len() > MAX_SEGMENTS;
    Ok(Layout { header, readable, writable: writable - 1, status_at, faulty })
}
