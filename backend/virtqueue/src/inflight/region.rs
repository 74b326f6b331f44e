//! The memory of a region.

use super::layout::{Entry, Header, queue_bytes};
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use vm_memory::{FileOffset, MmapRegion};

/// Why there is no region, or none for a ring.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The file cannot be asked or mapped.
    #[error("the in-flight region cannot be mapped: {0}")]
    Unmappable(#[source] io::Error),
    /// It does not begin with a page.
    #[error("the in-flight region begins at {0}, which is not where a page begins")]
    Misaligned(u64),
    /// It ends behind the file's end, where every access is a fault.
    #[error("the in-flight region ends at {end}, and its file at {len}")]
    BehindTheEnd {
        /// Where the region ends.
        end: u64,
        /// Where the file ends.
        len: u64,
    },
    /// So many queues of so many entries do not fit.
    #[error("the in-flight region has {size} bytes, and {needed} are needed")]
    TooSmall {
        /// What there is.
        size: u64,
        /// What its queues need.
        needed: u64,
    },
    /// It has no part for this queue.
    #[error("the in-flight region has parts for {queues} queues, and none for queue {queue}")]
    NoSuchQueue {
        /// The queue.
        queue: usize,
        /// How many there are.
        queues: u16,
    },
    /// A ring has more entries than the region.
    #[error("the ring has {size} entries, and the in-flight region {desc_num}")]
    RingIsLarger {
        /// The ring's size.
        size: u16,
        /// The region's.
        desc_num: u16,
    },
    /// It was written by a program that knows another layout.
    #[error("the in-flight region has version {version} and {desc_num} entries a queue")]
    OtherLayout {
        /// The version in it.
        version: u16,
        /// The number of entries in it.
        desc_num: u16,
    },
}

/// A region, mapped: a part for each queue, one behind the other.
///
/// Its file must keep its length: what gives it out seals it against shrinking.
#[derive(Debug)]
pub struct Region {
    pub(super) map: MmapRegion<()>,
    queues: u16,
    desc_num: u16,
}

impl Region {
    /// Maps the region of `queues` queues of `desc_num` entries that is `size` bytes of `file` from
    /// `offset` on, as a frontend's message says.
    ///
    /// # Errors
    /// It is not all in the file, or too small for its queues.
    pub fn map(
        file: File,
        offset: u64,
        size: u64,
        queues: u16,
        desc_num: u16,
    ) -> Result<Self, RegionError> {
        const PAGE: u64 = 4096;
        if !offset.is_multiple_of(PAGE) {
            return Err(RegionError::Misaligned(offset));
        }
        let len = file.metadata().map_err(RegionError::Unmappable)?.len();
        let end = offset.saturating_add(size);
        if end > len {
            return Err(RegionError::BehindTheEnd { end, len });
        }
        let needed = Self::bytes(queues, desc_num);
        if size < needed || needed == 0 {
            return Err(RegionError::TooSmall { size, needed });
        }
        // No more than is needed, so that it fits into any address space.
        let map = MmapRegion::from_file(FileOffset::new(file, offset), needed as usize)
            .map_err(|error| RegionError::Unmappable(io::Error::other(error)))?;
        Ok(Self { map, queues, desc_num })
    }

    /// How many bytes a region of `queues` queues of `desc_num` entries has.
    #[must_use]
    pub const fn bytes(queues: u16, desc_num: u16) -> u64 {
        queues as u64 * queue_bytes(desc_num) as u64
    }
}

/// A queue's part of a region, for a ring. One thread at a time writes to it.
pub(super) struct Part {
    header: *const Header,
    entries: *const Entry,
    /// The ring's size, less one. It is a power of two, and no more than there are entries.
    mask: u16,
    /// Keeps it mapped.
    region: Arc<Region>,
}

// SAFETY: what the pointers point to belongs to no thread, is only accessed through atomics, and
// stays mapped (`region`).
unsafe impl Send for Part {}

impl Part {
    /// The part of `queue`, whose ring has `size` entries.
    pub(super) fn new(region: &Arc<Region>, queue: usize, size: u16) -> Result<Self, RegionError> {
        let (queues, desc_num) = (region.queues, region.desc_num);
        if queue >= usize::from(queues) {
            return Err(RegionError::NoSuchQueue { queue, queues });
        }
        if size > desc_num || !size.is_power_of_two() {
            return Err(RegionError::RingIsLarger { size, desc_num });
        }
        let header = region.map.as_ptr().wrapping_add(queue * queue_bytes(region.desc_num));
        let entries = header.wrapping_add(size_of::<Header>());
        Ok(Self {
            header: header.cast(),
            entries: entries.cast(),
            mask: size - 1,
            region: Arc::clone(region),
        })
    }

    pub(super) const fn header(&self) -> &Header {
        // SAFETY: `Region::map` has mapped `queue_bytes` bytes for each queue, and `new` has
        // checked that this is one of them; the mapping begins with a page and a part with a
        // multiple of 64, so it is aligned. Everything in it is atomic, or never looked at.
        unsafe { &*self.header }
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> u16 {
        self.region.desc_num
    }

    /// The entry of a head.
    pub(super) fn entry(&self, head: u16) -> &Entry {
        assert!(head < self.len(), "head {head} has no entry");
        // SAFETY: it is in bounds: a part has `len` entries behind its header. The rest is as in
        // `header`.
        unsafe { &*self.entries.add(usize::from(head)) }
    }

    /// Whether a chain of the ring may begin there.
    #[inline(always)]
    pub(super) const fn has(&self, head: u16) -> bool {
        head <= self.mask
    }

    /// The entries of the ring's heads.
    #[inline(always)]
    pub(super) const fn entries(&self) -> Entries<'_> {
        Entries { first: self.entries, mask: self.mask, part: PhantomData }
    }
}

/// The entries of a part, by any head: it is cut off with the ring's size.
#[derive(Clone, Copy)]
pub(super) struct Entries<'p> {
    first: *const Entry,
    mask: u16,
    part: PhantomData<&'p Part>,
}

impl<'p> Entries<'p> {
    #[inline(always)]
    pub(super) const fn at(self, head: u16) -> &'p Entry {
        // SAFETY: `Part::new` has checked that there are more entries than `mask`, and what is cut
        // off with it is no more. The rest is as in `Part::header`; the part is borrowed.
        unsafe { &*self.first.add((head & self.mask) as usize) }
    }
}
