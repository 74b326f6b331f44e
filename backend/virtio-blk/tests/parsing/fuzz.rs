//! Random descriptor tables and headers: whatever a guest writes, nothing panics and nothing leaves
//! the bounds.
//!
//! Seeded, so that a failure comes again. Half of the chains are arbitrary; the others are good
//! ones with a few numbers changed, because arbitrary ones seldom get past the first check. That
//! all outcomes came up is checked at the end: a fuzzer that reaches nothing proves nothing.

use crate::common::*;
use domain_abi::{RawSegment, op};
use std::collections::BTreeMap;
use virtio_blk::{
    Blocks, Limits, MAX_DISCARD_SECTORS, MAX_SEGMENTS, MalformedChain, Parsed, WireStatus, features,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const ROUNDS: u32 = 500_000;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn address(&mut self) -> u64 {
        let near =
            self.pick(&[0, HEADER, RANGE, DATA, SEAM, END, ISLAND, ISLAND_END, 1 << 63, u64::MAX]);
        match self.below(4) {
            0 => self.below(END),
            1 => near,
            2 => near.wrapping_sub(self.below(600)),
            _ => self.pick(&[HEADER, DATA, RANGE]),
        }
    }

    fn length(&mut self) -> u32 {
        let any = self.next() as u32;
        self.pick(&[
            0,
            1,
            8,
            15,
            16,
            17,
            20,
            511,
            512,
            513,
            1024,
            4096,
            4097,
            any % 5000,
            any,
            u32::MAX,
        ])
    }

    fn descriptor(&mut self) -> Desc {
        let flags = self.pick(&[
            0,
            NEXT,
            NEXT,
            NEXT,
            WRITE,
            NEXT | WRITE,
            NEXT | WRITE,
            INDIRECT,
            7,
            0xfff8,
        ]);
        (self.address(), self.length(), flags, self.below(18) as u16)
    }

    fn arbitrary(&mut self) -> Vec<Desc> {
        (0..QUEUE_SIZE).map(|_| self.descriptor()).collect()
    }

    /// Header, data, status, in order.
    fn good(&mut self) -> Vec<Desc> {
        let direction = self.pick(&[0, WRITE]);
        let pieces = self.below(4) as u16;
        let mut table = vec![(HEADER, 16, NEXT, 1)];
        if self.below(3) == 0 {
            return vec![table[0], (RANGE, 16, NEXT, 2), (STATUS, 1, WRITE, 0)];
        }
        for i in 0..pieces {
            let base = self.pick(&[DATA, RANGE, SEAM - 256, ISLAND]);
            let len = self.pick(&[16, 20, 512, 512, 1024, 4096, 4096]);
            table.push((base, len, direction | NEXT, i + 2));
        }
        table.push((STATUS, 1, WRITE, 0));
        table
    }

    fn damage(&mut self, table: &mut [Desc]) {
        for _ in 0..self.below(3) {
            let at = self.below(table.len() as u64) as usize;
            match self.below(4) {
                0 => table[at].0 = self.address(),
                1 => table[at].1 = self.length(),
                2 => table[at].2 = self.below(8) as u16,
                _ => table[at].3 = self.below(18) as u16,
            }
        }
    }

    fn contents(&mut self, memory: &GuestMemoryMmap) {
        let sector = match self.below(4) {
            0 => self.next(),
            1 => self.pick(&[(1 << 55) - 1, 1 << 55, u64::MAX]),
            2 => 8 * self.below(CAPACITY / 4096),
            _ => self.below(CAPACITY / 512 + 2),
        };
        let any = self.next() as u32;
        let kind = self.pick(&[0, 0, 1, 1, 4, 8, 11, 13, 14, any]);
        memory.write_obj(kind.to_le(), GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector.to_le(), GuestAddress(HEADER + 8)).unwrap();
        memory.write_obj(self.below(1002).to_le(), GuestAddress(RANGE)).unwrap();
        memory
            .write_obj(self.pick(&[0, 1, 8, 1001, any]).to_le(), GuestAddress(RANGE + 8))
            .unwrap();
        memory.write_obj(self.pick(&[0, 0, 1, 2, any]).to_le(), GuestAddress(RANGE + 12)).unwrap();
    }
}

/// virtio-queue must see the same chain: as many bytes, and an end where we see one. It ends in
/// silence where a chain is broken, but then its last descriptor asks for one more.
fn check_against_virtio_queue(memory: &GuestMemoryMmap, parsed: Parsed) {
    let (mut bytes, mut ends, mut ordered, mut writable) = (0u64, false, true, false);
    for descriptor in chain(memory, 0) {
        bytes += u64::from(descriptor.len());
        ends = !descriptor.has_next();
        ordered &= descriptor.is_write_only() || !writable;
        writable |= descriptor.is_write_only();
    }
    match parsed {
        Parsed::Malformed { reason: MalformedChain::Order, .. } => assert!(!ordered),
        Parsed::Malformed {
            reason: MalformedChain::NoStatus | MalformedChain::StatusOutside,
            ..
        } => {
            assert!(ends && ordered);
        }
        // We are stricter: a limit of our own, and an indirect table that has a successor
        // (2.7.5.3.1).
        Parsed::Malformed {
            reason: MalformedChain::TooLong | MalformedChain::Indirect { .. },
            ..
        } => {}
        Parsed::Malformed { .. } => assert!(!ends, "{parsed:?}"),
        Parsed::Request { op: op::READ | op::WRITE, len, .. } => {
            assert!(ends && ordered);
            assert_eq!(bytes, 16 + len + 1);
        }
        _ => assert!(ends && ordered, "{parsed:?}"),
    }
}

fn check(
    memory: &GuestMemoryMmap,
    limits: &Limits,
    block: u64,
    parsed: Parsed,
    segments: &[RawSegment],
) -> String {
    let total: u64 = segments.iter().map(|s| s.len() as u64).sum();
    for segment in segments {
        assert!(!segment.is_empty());
        guest_address(memory, segment.base(), segment.len());
    }
    assert!(segments.len() <= MAX_SEGMENTS);
    match parsed {
        Parsed::Request { op, flags, offset, len, status_at, head } => {
            assert_eq!(head, 0);
            assert!(offset % block == 0 && len % block == 0, "{parsed:?}");
            assert!(offset.checked_add(len).unwrap() <= limits.capacity.get(), "{parsed:?}");
            assert!(!limits.read_only || matches!(op, op::READ | op::FLUSH), "{parsed:?}");
            match op {
                op::READ | op::WRITE => assert_eq!((total, flags), (len, 0), "{parsed:?}"),
                op::FLUSH => assert_eq!((total, flags, offset, len), (0, 0, 0, 0)),
                _ => assert!(total == 0 && len <= u64::from(MAX_DISCARD_SECTORS) * 512 && len > 0),
            }
            status_at.write(WireStatus::Ok);
            format!("request {op}")
        }
        Parsed::Answer { status_at, status, written, .. } => {
            assert!(total == 0 || written > 0, "{parsed:?} of {total}");
            assert!(written <= 21);
            status_at.write(status);
            format!("answer {status:?}")
        }
        Parsed::Malformed { reason, .. } => {
            assert_eq!(total, 0);
            let name = format!("malformed {reason:?}");
            name.split(" {").next().unwrap_or(&name).to_owned()
        }
    }
}

#[test]
fn whatever_the_guest_writes() {
    let memory = memory();
    let mut random = Random(0x0bad_d15c);
    let mut segments = Vec::new();
    let mut outcomes = BTreeMap::<String, u32>::new();

    for round in 0..ROUNDS {
        let mut limits = limits();
        if random.below(4) == 0 {
            limits.features =
                random.pick(&[0, features::FLUSH, features::DISCARD, features::WRITE_ZEROES]);
            limits.read_only = random.below(2) == 0;
        }
        let block = random.pick(&[512, 512, 1024, 4096]);
        limits.blocks = Blocks::of(block);
        let mut table = if round % 2 == 0 { random.arbitrary() } else { random.good() };
        if round % 2 == 1 {
            random.damage(&mut table);
        }
        if random.below(3) == 0 {
            let len = random.pick(&[table.len() as u32 * 16, 16, 15, u32::MAX]);
            write_table(&memory, INDIRECT_TABLE, &table);
            table = vec![(INDIRECT_TABLE, len, INDIRECT, 0)];
        }
        write_table(&memory, TABLE, &table);
        random.contents(&memory);

        let parsed = parse_head(&memory, 0, &limits, &mut segments);
        check_against_virtio_queue(&memory, parsed);
        if is_usual(&memory, &limits) {
            let is_indirect = table[0].2 & INDIRECT != 0;
            *outcomes.entry(format!("usual, indirect: {is_indirect}")).or_default() += 1;
            *outcomes.entry(format!("usual, blocks of {block}")).or_default() += 1;
        }
        let outcome = check(&memory, &limits, block.into(), parsed, &segments);
        if outcome == "answer IoError" && block > 512 {
            limits.blocks = Blocks::of(512);
            if matches!(parse_head(&memory, 0, &limits, &mut segments), Parsed::Request { .. }) {
                *outcomes.entry(format!("refused for blocks of {block}")).or_default() += 1;
            }
        }
        *outcomes.entry(outcome).or_default() += 1;
    }

    println!("{outcomes:#?}");
    for expected in [
        "request 0",
        "request 1",
        "request 2",
        "request 3",
        "request 4",
        "usual, indirect: false",
        "usual, indirect: true",
        "usual, blocks of 512",
        "usual, blocks of 1024",
        "usual, blocks of 4096",
        "refused for blocks of 1024",
        "refused for blocks of 4096",
        "answer Ok",
        "answer IoError",
        "answer Unsupported",
        "malformed NoStatus",
        "malformed Order",
        "malformed StatusOutside",
        "malformed Index",
        "malformed Loop",
        "malformed Indirect",
        "malformed TooLarge",
        "malformed TableOutside",
    ] {
        let count = outcomes.get(expected).copied().unwrap_or(0);
        assert!(count >= 20, "{expected} came up {count} times only");
    }
}
