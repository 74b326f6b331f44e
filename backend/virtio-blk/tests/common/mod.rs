//! A ring written by hand, as a driver that keeps no rule would write it.

#![allow(dead_code)]

use domain_abi::RawSegment;
use virtio_blk::{
    Blocks, DescriptorTable, Limits, Parsed, StatusSlot, Translator, Usual, WireStatus, features,
    parse, usual,
};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub const QUEUE_SIZE: u16 = 16;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const TABLE: u64 = 0;
pub const QUEUE: DescriptorTable = DescriptorTable { addr: TABLE, size: QUEUE_SIZE };
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

/// Where the tests put things.
pub const HEADER: u64 = 0x3000;
pub const RANGE: u64 = 0x3800;
pub const STATUS: u64 = 0x3f00;
pub const DATA: u64 = 0x4000;
pub const INDIRECT_TABLE: u64 = 0x8000;
/// Two regions adjoin here, in guest memory though not in ours.
pub const SEAM: u64 = 0x10000;
/// Guest memory ends here.
pub const END: u64 = 0x20000;
/// And there is an island.
pub const ISLAND: u64 = 0x40000;
pub const ISLAND_END: u64 = 0x41000;

/// 1000 sectors.
pub const CAPACITY: u64 = 512_000;

pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), SEAM as usize),
        (GuestAddress(SEAM), (END - SEAM) as usize),
        (GuestAddress(ISLAND), (ISLAND_END - ISLAND) as usize),
    ])
    .unwrap()
}

pub fn limits() -> Limits {
    Limits {
        capacity: CAPACITY.into(),
        blocks: Blocks::of(512),
        features: features::FLUSH | features::DISCARD | features::WRITE_ZEROES,
        read_only: false,
        serial: *b"serial-number-of-20b",
    }
}

/// Address, length, flags, next.
pub type Desc = (u64, u32, u16, u16);

pub fn write_table(memory: &GuestMemoryMmap, table: u64, descriptors: &[Desc]) {
    for (i, &(addr, len, flags, next)) in (0u64..).zip(descriptors) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        memory.write_slice(&bytes, GuestAddress(table + 16 * i)).unwrap();
    }
}

/// Makes `head` available in a fresh queue and pops it: the chain as virtio-queue sees it.
pub fn chain(memory: &GuestMemoryMmap, head: u16) -> DescriptorChain<&GuestMemoryMmap> {
    memory.write_obj(1u16.to_le(), GuestAddress(AVAIL + 2)).unwrap();
    memory.write_obj(head.to_le(), GuestAddress(AVAIL + 4)).unwrap();
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    queue.iter(memory).unwrap().next().unwrap()
}

pub fn parse_head(
    memory: &GuestMemoryMmap,
    head: u16,
    limits: &Limits,
    segments: &mut Vec<RawSegment>,
) -> Parsed {
    // SAFETY: the tests keep `memory` longer than anything that comes out of the parse.
    let mut translator = unsafe { Translator::new(memory) };
    let parsed = parse(QUEUE, head, &mut translator, limits, segments);
    // What is seen at a glance is what is found by looking at everything.
    if let Some(seen) = glance(head, &mut translator, limits) {
        let Usual { op, offset, data, status_at } = seen;
        let len = data.len() as u64;
        assert_eq!(parsed, Parsed::Request { op, flags: 0, offset, len, status_at, head });
        let found: Vec<_> = segments.iter().map(|s| (s.base(), s.len())).collect();
        assert_eq!(found, [(data.base(), data.len())], "{parsed:?}");
    }
    parsed
}

/// The chain at a glance, with the regions that a parse has left there.
pub fn glance(
    head: u16,
    translator: &mut Translator<&GuestMemoryMmap>,
    limits: &Limits,
) -> Option<Usual> {
    translator.begin(QUEUE);
    usual(head, translator, limits)
}

/// Whether the chain that begins with the first descriptor is seen at a glance.
pub fn is_usual(memory: &GuestMemoryMmap, limits: &Limits) -> bool {
    // SAFETY: as in `parse_head`.
    let mut translator = unsafe { Translator::new(memory) };
    let _ = parse(QUEUE, 0, &mut translator, limits, &mut Vec::new());
    glance(0, &mut translator, limits).is_some()
}

/// A guest with one request.
pub struct Guest {
    pub memory: GuestMemoryMmap,
    pub limits: Limits,
    pub segments: Vec<RawSegment>,
}

impl Guest {
    pub fn new() -> Self {
        let guest = Self { memory: memory(), limits: limits(), segments: Vec::new() };
        guest.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        guest
    }

    pub fn header(&self, kind: u32, sector: u64) -> &Self {
        self.header_at(HEADER, kind, sector)
    }

    pub fn header_at(&self, at: u64, kind: u32, sector: u64) -> &Self {
        let mut bytes = [0xaa; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        self
    }

    /// The range of a discard or a write zeroes, at `RANGE`.
    pub fn range(&self, sector: u64, sectors: u32, flags: u32) -> &Self {
        self.range_at(RANGE, sector, sectors, flags)
    }

    pub fn range_at(&self, at: u64, sector: u64, sectors: u32, flags: u32) -> &Self {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        self
    }

    /// Parses a chain of these buffers: address, length, `WRITE` or 0.
    pub fn parse(&mut self, buffers: &[(u64, u32, u16)]) -> Parsed {
        let last = buffers.len() - 1;
        let descriptors: Vec<Desc> = (0u16..)
            .zip(buffers)
            .map(|(i, &(addr, len, flags))| {
                let next = if usize::from(i) < last { NEXT } else { 0 };
                (addr, len, flags | next, i + 1)
            })
            .collect();
        self.parse_table(&descriptors)
    }

    /// Parses the chain that begins with the first of these descriptors.
    pub fn parse_table(&mut self, descriptors: &[Desc]) -> Parsed {
        write_table(&self.memory, TABLE, descriptors);
        parse_head(&self.memory, 0, &self.limits, &mut self.segments)
    }

    /// The segments as guest addresses and lengths.
    pub fn segments(&self) -> Vec<(u64, usize)> {
        self.segments
            .iter()
            .map(|s| (guest_address(&self.memory, s.base(), s.len()), s.len()))
            .collect()
    }

    pub fn memory_fill(&self, at: u64, len: usize) {
        self.memory.write_slice(&vec![0xee; len], GuestAddress(at)).unwrap();
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Whether what is written through the slot shows at `at`.
    pub fn status_lands_at(&self, slot: StatusSlot, at: u64) -> bool {
        [WireStatus::Unsupported, WireStatus::Ok].iter().all(|&status| {
            slot.write(status);
            self.bytes(at, 1) == [status.as_byte()]
        })
    }
}

/// The guest address of host memory. Panics if it is not inside one region.
pub fn guest_address(memory: &GuestMemoryMmap, base: *mut u8, len: usize) -> u64 {
    for region in memory.iter() {
        let at = (base as usize).wrapping_sub(region.as_ptr() as usize) as u64;
        if at < region.len() {
            assert!(at + len as u64 <= region.len(), "a segment reaches beyond its region");
            return region.start_addr().0 + at;
        }
    }
    panic!("a segment is outside of guest memory");
}

/// (status, written) of an answer.
#[track_caller]
pub fn answer(parsed: Parsed) -> (WireStatus, u32) {
    match parsed {
        Parsed::Answer { status, written, .. } => (status, written),
        other => panic!("no answer but {other:?}"),
    }
}

/// (op, flags, offset, len) of a request.
#[track_caller]
pub fn request(parsed: Parsed) -> (u32, u32, u64, u64) {
    match parsed {
        Parsed::Request { op, flags, offset, len, .. } => (op, flags, offset, len),
        other => panic!("no request but {other:?}"),
    }
}
