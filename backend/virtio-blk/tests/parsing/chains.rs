//! What a chain may look like, and what becomes of one that does not.

use crate::common::*;
use domain_abi::op;
use virtio_blk::{
    DescriptorTable, MAX_DESCRIPTORS, MAX_SEGMENTS, MalformedChain, Parsed, Translator, WireStatus,
    parse,
};
use vm_memory::{Bytes, GuestAddress};

const IN: u32 = 0;
const OUT: u32 = 1;
const IO_ERROR: WireStatus = WireStatus::IoError;

#[track_caller]
fn malformed(parsed: Parsed) -> MalformedChain {
    match parsed {
        Parsed::Malformed { reason, .. } => reason,
        other => panic!("not malformed but {other:?}"),
    }
}

fn slot(parsed: Parsed) -> virtio_blk::StatusSlot {
    match parsed {
        Parsed::Request { status_at, .. } | Parsed::Answer { status_at, .. } => status_at,
        other => panic!("no status in {other:?}"),
    }
}

#[test]
fn the_usual_read_and_write() {
    let mut guest = Guest::new();
    guest.header(IN, 7);
    let read = guest.parse(&[(HEADER, 16, 0), (DATA, 4096, WRITE), (STATUS, 1, WRITE)]);
    assert_eq!(request(read), (op::READ, 0, 7 * 512, 4096));
    assert_eq!(guest.segments(), [(DATA, 4096)]);
    assert!(guest.status_lands_at(slot(read), STATUS));

    guest.header(OUT, 8);
    let write =
        guest.parse(&[(HEADER, 16, 0), (DATA, 512, 0), (0x6000, 1024, 0), (STATUS, 1, WRITE)]);
    assert_eq!(request(write), (op::WRITE, 0, 8 * 512, 1536));
    assert_eq!(guest.segments(), [(DATA, 512), (0x6000, 1024)]);
    assert!(guest.status_lands_at(slot(write), STATUS));
}

#[test]
fn the_head_comes_back() {
    let mut guest = Guest::new();
    guest.header(IN, 0);
    write_table(&guest.memory, TABLE + 16 * 5, &[(HEADER, 16, NEXT, 6), (STATUS, 513, WRITE, 0)]);
    let parsed = parse_head(&guest.memory, 5, &guest.limits, &mut guest.segments);
    assert!(matches!(parsed, Parsed::Request { head: 5, len: 512, .. }), "{parsed:?}");
}

#[test]
fn a_header_may_be_cut_anywhere() {
    for cut in 1..16 {
        let mut guest = Guest::new();
        guest.header(IN, 3);
        let parts = [
            (HEADER, cut, 0),
            (HEADER + u64::from(cut), 16 - cut, 0),
            (DATA, 512, WRITE),
            (STATUS, 1, WRITE),
        ];
        assert_eq!(request(guest.parse(&parts)), (op::READ, 0, 3 * 512, 512), "cut at {cut}");
    }
}

#[test]
fn a_header_may_be_at_an_odd_address() {
    let mut guest = Guest::new();
    guest.header_at(HEADER + 3, IN, 5);
    let parsed = guest.parse(&[(HEADER + 3, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    assert_eq!(request(parsed), (op::READ, 0, 5 * 512, 512));
}

#[test]
fn a_header_may_share_its_descriptor_with_data() {
    let mut guest = Guest::new();
    guest.header(OUT, 2);
    let parsed = guest.parse(&[(HEADER, 16 + 100, 0), (DATA, 412, 0), (STATUS, 1, WRITE)]);
    assert_eq!(request(parsed), (op::WRITE, 0, 1024, 512));
    assert_eq!(guest.segments(), [(HEADER + 16, 100), (DATA, 412)]);
}

#[test]
fn the_status_is_the_last_writable_byte() {
    let mut guest = Guest::new();
    guest.header(IN, 0);
    let shared = guest.parse(&[(HEADER, 16, 0), (DATA, 513, WRITE)]);
    assert_eq!(request(shared), (op::READ, 0, 0, 512));
    assert_eq!(guest.segments(), [(DATA, 512)]);
    assert!(guest.status_lands_at(slot(shared), DATA + 512));

    let alone =
        guest.parse(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE), (DATA, 0, WRITE)]);
    assert_eq!(guest.segments(), [(DATA, 512)]);
    assert!(guest.status_lands_at(slot(alone), STATUS));
}

#[test]
fn empty_descriptors_are_passed_over_wherever_they_point() {
    let mut guest = Guest::new();
    guest.header(IN, 1);
    let parsed = guest.parse(&[
        (u64::MAX, 0, 0),
        (HEADER, 16, 0),
        (END, 0, 0),
        (END, 0, WRITE),
        (DATA, 512, WRITE),
        (0, 0, WRITE),
        (STATUS, 1, WRITE),
        (u64::MAX, 0, WRITE),
    ]);
    assert_eq!(request(parsed), (op::READ, 0, 512, 512));
    assert_eq!(guest.segments(), [(DATA, 512)]);
}

#[test]
fn buffers_across_regions_become_one_segment_each() {
    let mut guest = Guest::new();
    guest.header_at(SEAM - 5, OUT, 1);
    let parsed = guest.parse(&[(SEAM - 5, 16, 0), (SEAM - 100, 512, 0), (STATUS, 1, WRITE)]);
    assert_eq!(request(parsed), (op::WRITE, 0, 512, 512));
    assert_eq!(guest.segments(), [(SEAM - 100, 100), (SEAM, 412)]);

    guest.header(IN, 1);
    let parsed = guest.parse(&[(HEADER, 16, 0), (SEAM - 512, 513, WRITE)]);
    assert_eq!(guest.segments(), [(SEAM - 512, 512)]);
    assert!(guest.status_lands_at(slot(parsed), SEAM));
}

#[test]
fn data_outside_of_guest_memory_is_an_error_that_the_driver_is_told() {
    for (addr, len) in [
        (END, 512),
        (END - 511, 512),
        (ISLAND - 1, 512),
        (ISLAND_END - 256, 512),
        (1 << 60, 512),
        (u64::MAX - 100, 512),
        (u64::MAX, 512),
    ] {
        let mut guest = Guest::new();
        guest.header(IN, 0);
        let parsed = guest.parse(&[(HEADER, 16, 0), (addr, len, WRITE), (STATUS, 1, WRITE)]);
        assert_eq!(answer(parsed), (IO_ERROR, 0), "{addr:#x}");
        assert!(guest.segments.is_empty());
        assert!(guest.status_lands_at(slot(parsed), STATUS));
        guest.header(OUT, 0);
        let parsed = guest.parse(&[(HEADER, 16, 0), (addr, len, 0), (STATUS, 1, WRITE)]);
        assert_eq!(answer(parsed), (IO_ERROR, 1), "{addr:#x}");
    }
}

#[test]
fn data_may_fail_while_the_status_behind_it_is_reachable() {
    let mut guest = Guest::new();
    guest.header(IN, 0);
    let parsed = guest.parse(&[(HEADER, 16, 0), (ISLAND - 512, 513, WRITE)]);
    assert_eq!(answer(parsed), (IO_ERROR, 0));
    assert!(guest.status_lands_at(slot(parsed), ISLAND));
}

#[test]
fn a_header_outside_of_guest_memory_is_an_error_that_the_driver_is_told() {
    for (addr, len) in [(END, 16), (END - 8, 16), (ISLAND - 4, 16), (u64::MAX - 3, 16)] {
        let mut guest = Guest::new();
        let parsed = guest.parse(&[(addr, len, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        assert_eq!(answer(parsed), (IO_ERROR, 0), "{addr:#x}");
        assert!(guest.status_lands_at(slot(parsed), STATUS));
    }
}

#[test]
fn a_short_header_is_an_error_that_the_driver_is_told() {
    let mut guest = Guest::new();
    guest.header(IN, 0);
    assert_eq!(
        answer(guest.parse(&[(HEADER, 15, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])),
        (IO_ERROR, 0)
    );
    assert_eq!(answer(guest.parse(&[(STATUS, 1, WRITE)])), (IO_ERROR, 1));
}

#[test]
fn a_status_outside_of_guest_memory_cannot_be_answered() {
    for addr in [END, ISLAND - 1, u64::MAX] {
        let mut guest = Guest::new();
        guest.header(IN, 0);
        let parsed = guest.parse(&[(HEADER, 16, 0), (DATA, 512, WRITE), (addr, 1, WRITE)]);
        assert_eq!(malformed(parsed), MalformedChain::StatusOutside);
        assert!(guest.segments.is_empty());
    }
    let mut guest = Guest::new();
    guest.header(IN, 0);
    let parsed = guest.parse(&[(HEADER, 16, 0), (END - 512, 513, WRITE)]);
    assert_eq!(malformed(parsed), MalformedChain::StatusOutside);
    let parsed = guest.parse(&[(HEADER, 16, 0), (u64::MAX, u32::MAX - 16, WRITE)]);
    assert_eq!(malformed(parsed), MalformedChain::StatusOutside);
}

#[test]
fn no_writable_byte_cannot_be_answered() {
    let mut guest = Guest::new();
    guest.header(OUT, 0);
    assert_eq!(
        malformed(guest.parse(&[(HEADER, 16, 0), (DATA, 512, 0)])),
        MalformedChain::NoStatus
    );
    assert_eq!(
        malformed(guest.parse(&[(HEADER, 16, 0), (STATUS, 0, WRITE)])),
        MalformedChain::NoStatus
    );
}

#[test]
fn readable_after_writable_cannot_be_answered() {
    let mut guest = Guest::new();
    guest.header(IN, 0);
    for stray in [(DATA, 512, 0), (DATA, 0, 0)] {
        let parsed = guest.parse(&[(HEADER, 16, 0), (DATA, 512, WRITE), stray, (STATUS, 1, WRITE)]);
        assert_eq!(malformed(parsed), MalformedChain::Order);
        assert!(guest.segments.is_empty());
    }
}

#[test]
fn a_chain_that_does_not_end_cannot_be_answered() {
    let mut guest = Guest::new();
    guest.header(IN, 0);
    let good = [(HEADER, 16, NEXT, 1), (DATA, 513, WRITE, 0)];
    assert_eq!(request(guest.parse_table(&good)).3, 512);

    let looping = [good[0], (DATA, 513, WRITE | NEXT, 1)];
    assert_eq!(malformed(guest.parse_table(&looping)), MalformedChain::Loop);
    let index = |index| MalformedChain::Index { index, size: QUEUE_SIZE };
    for next in [QUEUE_SIZE, u16::MAX] {
        let astray = [good[0], (DATA, 513, WRITE | NEXT, next)];
        assert_eq!(malformed(guest.parse_table(&astray)), index(next));
        let parsed = parse_head(&guest.memory, next, &guest.limits, &mut guest.segments);
        assert_eq!(malformed(parsed), index(next), "the head");
    }
}

#[test]
fn a_chain_may_use_the_whole_table() {
    let mut guest = Guest::new();
    guest.header(OUT, 0);
    let mut table: Vec<Desc> = (0..QUEUE_SIZE - 1).map(|i| (DATA, 512, NEXT, i + 1)).collect();
    table[0] = (HEADER, 16, NEXT, 1);
    table.push((STATUS, 1, WRITE, 0));
    assert_eq!(request(guest.parse_table(&table)).3, 14 * 512);
}

#[test]
fn a_chain_of_4_gib_cannot_be_answered() {
    let mut guest = Guest::new();
    guest.header(IN, 0);
    let data = [(HEADER, 16, 0), (DATA, u32::MAX - 17, WRITE), (STATUS, 1, WRITE)];
    assert_eq!(answer(guest.parse(&data)), (IO_ERROR, 0), "one byte less");
    let data = [(HEADER, 16, 0), (DATA, u32::MAX - 16, WRITE), (STATUS, 1, WRITE)];
    assert_eq!(malformed(guest.parse(&data)), MalformedChain::TooLarge);
}

#[test]
fn a_descriptor_table_is_in_guest_memory() {
    let mut guest = Guest::new();
    for addr in [END, END - 8, u64::MAX - 15, u64::MAX] {
        // SAFETY: `guest` outlives what is parsed.
        let mut translator = unsafe { Translator::new(&guest.memory) };
        let table = DescriptorTable { addr, size: 4 };
        for head in [0, 3] {
            let parsed = parse(table, head, &mut translator, &guest.limits, &mut guest.segments);
            assert_eq!(malformed(parsed), MalformedChain::TableOutside, "{addr:#x}, {head}");
        }
    }
}

#[test]
fn indirect_tables_are_followed_wherever_they_are() {
    let mut guest = Guest::new();
    guest.header(IN, 9);
    let inner = [(HEADER, 16, NEXT, 1), (DATA, 512, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)];
    // At an odd address, and across regions: no alignment is asked of it (2.7.5.3).
    for at in [INDIRECT_TABLE, INDIRECT_TABLE + 3, SEAM - 16, SEAM - 21] {
        write_table(&guest.memory, at, &inner);
        assert_eq!(
            request(guest.parse_table(&[(at, 48, INDIRECT, 0)])),
            (op::READ, 0, 9 * 512, 512)
        );
        // 2.7.5.3.2: what else its flags say is ignored.
        assert_eq!(request(guest.parse_table(&[(at, 48, INDIRECT | WRITE, 99)])).3, 512);
    }
    // Some descriptors of the queue, then the table (2.7.5.3.2).
    write_table(
        &guest.memory,
        INDIRECT_TABLE,
        &[(DATA, 512, WRITE | NEXT, 1), (STATUS, 1, WRITE, 0)],
    );
    let mixed = [(HEADER, 16, NEXT, 1), (INDIRECT_TABLE, 32, INDIRECT, 0)];
    assert_eq!(request(guest.parse_table(&mixed)).3, 512);
}

#[test]
fn bad_indirect_tables_cannot_be_answered() {
    let mut guest = Guest::new();
    guest.header(IN, 9);
    let inner = [(HEADER, 16, NEXT, 1), (DATA, 512, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)];
    write_table(&guest.memory, INDIRECT_TABLE, &inner);
    let table = |len| [(INDIRECT_TABLE, len, INDIRECT, 0)];
    assert_eq!(
        malformed(guest.parse_table(&table(32))),
        MalformedChain::Index { index: 2, size: 2 }
    );
    for len in [0, 15, 47, 65536 * 16, u32::MAX] {
        assert_eq!(malformed(guest.parse_table(&table(len))), MalformedChain::Indirect { len });
    }
    assert_eq!(
        malformed(guest.parse_table(&[(END, 48, INDIRECT, 0)])),
        MalformedChain::TableOutside
    );
    let looping = [(HEADER, 16, NEXT, 1), (DATA, 512, WRITE | NEXT, 1)];
    write_table(&guest.memory, INDIRECT_TABLE, &looping);
    assert_eq!(malformed(guest.parse_table(&table(32))), MalformedChain::Loop);
    let followed = [(INDIRECT_TABLE, 48, INDIRECT | NEXT, 1), (STATUS, 1, WRITE, 0)];
    assert_eq!(malformed(guest.parse_table(&followed)), MalformedChain::Indirect { len: 48 });
    let nested = [(HEADER, 16, NEXT, 1), (INDIRECT_TABLE, 48, INDIRECT, 0)];
    write_table(&guest.memory, INDIRECT_TABLE, &nested);
    assert_eq!(malformed(guest.parse_table(&table(48))), MalformedChain::Indirect { len: 48 });
}

/// A chain in an indirect table: header, `count` writable buffers of `len` bytes, status.
fn long_chain(count: usize, len: u32) -> (Guest, Parsed) {
    let mut guest = Guest::new();
    guest.header(IN, 0);
    let mut inner = vec![(HEADER, 16, NEXT, 1)];
    for i in 0..count {
        inner.push((DATA, len, WRITE | NEXT, i as u16 + 2));
    }
    inner.push((STATUS, 1, WRITE, 0));
    write_table(&guest.memory, SEAM, &inner);
    let parsed = guest.parse_table(&[(SEAM, 16 * inner.len() as u32, INDIRECT, 0)]);
    (guest, parsed)
}

#[test]
fn the_number_of_segments_is_bounded() {
    let (guest, parsed) = long_chain(MAX_SEGMENTS, 64);
    assert_eq!(request(parsed).3, 64 * MAX_SEGMENTS as u64);
    assert_eq!(guest.segments.len(), MAX_SEGMENTS);

    // One piece more, without one descriptor more: the last of them crosses regions.
    let mut guest = Guest::new();
    guest.header(OUT, 0);
    let mut inner: Vec<Desc> = vec![(HEADER, 16, NEXT, 1)];
    inner.extend((0..MAX_SEGMENTS as u16).map(|i| (DATA, 64, NEXT, i + 2)));
    inner.push((STATUS, 1, WRITE, 0));
    inner[MAX_SEGMENTS].0 = SEAM - 32;
    write_table(&guest.memory, SEAM + 0x100, &inner);
    let parsed = guest.parse_table(&[(SEAM + 0x100, 16 * inner.len() as u32, INDIRECT, 0)]);
    assert_eq!(answer(parsed), (IO_ERROR, 1));
    assert!(guest.status_lands_at(slot(parsed), STATUS));
    inner[MAX_SEGMENTS].0 = DATA;
    write_table(&guest.memory, SEAM + 0x100, &inner);
    let parsed = guest.parse_table(&[(SEAM + 0x100, 16 * inner.len() as u32, INDIRECT, 0)]);
    assert_eq!(request(parsed).3, 64 * MAX_SEGMENTS as u64);
}

#[test]
fn the_number_of_descriptors_is_bounded() {
    let (_, parsed) = long_chain(MAX_DESCRIPTORS - 1, 0);
    assert_eq!(malformed(parsed), MalformedChain::TooLong);
    let (_, parsed) = long_chain(MAX_DESCRIPTORS - 2, 0);
    assert_eq!(answer(parsed), (WireStatus::Ok, 1));
}

#[test]
fn segments_of_the_last_request_do_not_stay() {
    let mut guest = Guest::new();
    guest.header(IN, 0);
    guest.parse(&[(HEADER, 16, 0), (DATA, 4096, WRITE), (STATUS, 1, WRITE)]);
    assert_eq!(guest.segments.len(), 1);
    guest.memory.write_obj(4u32.to_le(), GuestAddress(HEADER)).unwrap();
    let parsed = guest.parse(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
    assert_eq!(request(parsed).0, op::FLUSH);
    assert!(guest.segments.is_empty());
}
