//! Which chains are seen at a glance. That what is seen is what a parse finds, `parse_head` checks
//! of every chain of these tests.

use crate::common::*;
use domain_abi::op;
use virtio_blk::{Blocks, DescriptorTable, Translator, parse, usual};
use vm_memory::{Bytes, GuestAddress};

const IN: u32 = 0;
const OUT: u32 = 1;

/// What the chain of these descriptors is seen to ask for, if it is.
fn seen(guest: &mut Guest, table: &[Desc]) -> Option<(u32, u64, usize)> {
    // So that it is held against the parser.
    guest.parse_table(table);
    // SAFETY: nothing that comes out of it is used without `guest`.
    let mut translator = unsafe { Translator::new(&guest.memory) };
    let _ = parse(QUEUE, 0, &mut translator, &guest.limits, &mut Vec::new());
    let usual = glance(0, &mut translator, &guest.limits)?;
    Some((usual.op, usual.offset, usual.data.len()))
}

const READ: [Desc; 3] =
    [(HEADER, 16, NEXT, 1), (DATA, 4096, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)];
const WRITTEN: [Desc; 3] = [(HEADER, 16, NEXT, 1), (DATA, 512, NEXT, 2), (STATUS, 1, WRITE, 0)];

/// The same chain in an indirect table.
fn indirect(guest: &Guest, at: u64, chain: &[Desc]) -> [Desc; 1] {
    write_table(&guest.memory, at, chain);
    [(at, 16 * chain.len() as u32, INDIRECT, 0)]
}

#[test]
fn reads_and_writes_of_one_piece_are_usual() {
    let mut guest = Guest::new();
    for (kind, chain, expected) in
        [(IN, READ, (op::READ, 7 * 512, 4096)), (OUT, WRITTEN, (op::WRITE, 7 * 512, 512))]
    {
        guest.header(kind, 7);
        assert_eq!(seen(&mut guest, &chain), Some(expected));
        let table = indirect(&guest, INDIRECT_TABLE, &chain);
        assert_eq!(seen(&mut guest, &table), Some(expected), "indirect");
        // In any order.
        let [header, data, status] = chain;
        let mixed = [
            (header.0, header.1, header.2, 2),
            (status.0, 1, WRITE, 99),
            (data.0, data.1, data.2, 1),
        ];
        assert_eq!(seen(&mut guest, &mixed), Some(expected), "in another order");
    }
    // Nothing has to be aligned.
    guest.header_at(HEADER + 3, IN, 7);
    let table =
        indirect(&guest, INDIRECT_TABLE + 5, &[(HEADER + 3, 16, NEXT, 1), READ[1], READ[2]]);
    assert_eq!(seen(&mut guest, &table), Some((op::READ, 7 * 512, 4096)));
    // The end of the disk, and of a region.
    guest.header(IN, CAPACITY / 512 - 8);
    let last = [READ[0], (SEAM - 4096, 4096, NEXT | WRITE, 2), READ[2]];
    assert_eq!(seen(&mut guest, &last), Some((op::READ, CAPACITY - 4096, 4096)));
    let elsewhere = [READ[0], (ISLAND, 4096, NEXT | WRITE, 2), (ISLAND_END - 1, 1, WRITE, 0)];
    assert_eq!(seen(&mut guest, &elsewhere), Some((op::READ, CAPACITY - 4096, 4096)));
}

#[test]
fn what_is_not_usual_is_left_to_the_parser() {
    let mut guest = Guest::new();
    guest.header(IN, 7);
    let with = |at: usize, desc: Desc| {
        let mut chain = READ;
        chain[at] = desc;
        chain
    };
    for (what, chain) in [
        ("a header of 15 bytes", with(0, (HEADER, 15, NEXT, 1))),
        ("a header of 17 bytes", with(0, (HEADER, 17, NEXT, 1))),
        ("a header that is to be written", with(0, (HEADER, 16, NEXT | WRITE, 1))),
        ("a header outside of memory", with(0, (END - 8, 16, NEXT, 1))),
        ("a header with an unknown flag", with(0, (HEADER, 16, NEXT | 8, 1))),
        ("a next one that is not there", with(0, (HEADER, 16, NEXT, QUEUE_SIZE))),
        ("a loop", with(1, (DATA, 4096, NEXT | WRITE, 1))),
        ("no data", with(1, (DATA, 0, NEXT | WRITE, 2))),
        ("half a sector", with(1, (DATA, 4096 + 256, NEXT | WRITE, 2))),
        ("data to be read", with(1, (DATA, 4096, NEXT, 2))),
        ("data that is the last", with(1, (DATA, 4097, WRITE, 2))),
        ("data across regions", with(1, (SEAM - 2048, 4096, NEXT | WRITE, 2))),
        ("data that ends outside", with(1, (END - 2048, 4096, NEXT | WRITE, 2))),
        ("data at the end of all addresses", with(1, (u64::MAX - 511, 512, NEXT | WRITE, 2))),
        ("data in an indirect table", with(1, (DATA, 48, NEXT | INDIRECT, 2))),
        ("a status of two bytes", with(2, (STATUS, 2, WRITE, 0))),
        ("a status that is not to be written", with(2, (STATUS, 1, 0, 0))),
        ("more behind the status", with(2, (STATUS, 1, NEXT | WRITE, 3))),
        ("a status outside of memory", with(2, (END, 1, WRITE, 0))),
    ] {
        assert_eq!(seen(&mut guest, &chain), None, "{what}");
    }
    let table = indirect(&guest, SEAM - 16, &READ);
    assert_eq!(seen(&mut guest, &table), None, "an indirect table across regions");
    let four = [READ[0], READ[1], READ[2], (0, 0, 0, 0)];
    let table = indirect(&guest, INDIRECT_TABLE, &four);
    assert_eq!(seen(&mut guest, &table), None, "an indirect table of four");
    let table = indirect(&guest, INDIRECT_TABLE, &READ);
    for flags in [INDIRECT | WRITE, INDIRECT | NEXT] {
        let table = [(table[0].0, table[0].1, flags, 1)];
        assert_eq!(seen(&mut guest, &table), None, "an indirect table with flags {flags}");
    }
    let nested = indirect(&guest, DATA, &[table[0], READ[1], READ[2]]);
    assert_eq!(seen(&mut guest, &nested), None, "a nested table");
}

#[test]
fn limits_are_kept_at_a_glance() {
    let mut guest = Guest::new();
    for (what, kind, sector, chain) in [
        ("a write whose buffer is to be filled", OUT, 7, READ),
        ("a read whose buffer is not", IN, 7, WRITTEN),
        ("a flush with data", 4, 0, WRITTEN),
        ("the serial number", 8, 0, READ),
        ("behind the end", IN, CAPACITY / 512 - 7, READ),
        ("far behind the end", IN, u64::MAX / 512, READ),
        ("a sector that is none", IN, u64::MAX, READ),
    ] {
        guest.header(kind, sector);
        assert_eq!(seen(&mut guest, &chain), None, "{what}");
    }
    guest.header(OUT, 7);
    assert!(seen(&mut guest, &WRITTEN).is_some());
    guest.limits.read_only = true;
    assert_eq!(seen(&mut guest, &WRITTEN), None, "a write to a disk that is read-only");
    guest.header(IN, 7);
    assert!(seen(&mut guest, &READ).is_some());
    guest.limits.blocks = Blocks::of(4096);
    assert_eq!(seen(&mut guest, &READ), None, "a part of two blocks");
    guest.header(IN, 8);
    assert!(seen(&mut guest, &READ).is_some());
    let half = [READ[0], (DATA, 2048, NEXT | WRITE, 2), READ[2]];
    assert_eq!(seen(&mut guest, &half), None, "half of a block");
}

#[test]
fn a_table_is_read_only_where_it_is_whole_and_its_own() {
    let guest = Guest::new();
    guest.header(IN, 7);
    // SAFETY: `guest` is kept.
    let mut translator = unsafe { Translator::new(&guest.memory) };
    let _ = parse(QUEUE, 0, &mut translator, &guest.limits, &mut Vec::new());
    let mut sees = |table: DescriptorTable, head: u16| {
        write_table(&guest.memory, table.addr, &READ);
        translator.begin(table);
        usual(head, &translator, &guest.limits).is_some()
    };
    let fine = DescriptorTable { addr: 0x9000, size: 4 };
    assert!(sees(fine, 0));
    assert!(!sees(fine, 4) && !sees(fine, u16::MAX), "a head that is not in it");
    assert!(!sees(DescriptorTable { size: 2, ..fine }, 0), "a chain that is longer");
    assert!(sees(DescriptorTable { addr: 0x9004, ..fine }, 0), "wherever it is");
    assert!(!sees(DescriptorTable { addr: SEAM - 48, ..fine }, 0), "across regions");
    assert!(!sees(DescriptorTable { addr: END - 48, size: 4 }, 0), "not all of it");
    assert!(sees(fine, 0), "and again");
    // The one before is not looked at any more.
    let other = DescriptorTable { addr: 0xa000, size: 4 };
    assert!(sees(other, 0));
    guest.memory.write_slice(&[0; 48], GuestAddress(other.addr)).unwrap();
    assert!(usual(0, &translator, &guest.limits).is_none());
}
