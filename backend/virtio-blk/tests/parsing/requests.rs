//! What a request may ask for, and what the driver is told otherwise.

use crate::common::*;
use domain_abi::{Capabilities, DeviceInfo, Swap};
use domain_abi::{REQUEST_MAY_UNMAP, op};
use virtio_blk::{
    Blocks, Limits, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, Parsed, WireStatus, features,
    used_len,
};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: WireStatus = WireStatus::Ok;
const IO_ERROR: WireStatus = WireStatus::IoError;
const UNSUPPORTED: WireStatus = WireStatus::Unsupported;

fn read(guest: &mut Guest, sector: u64, len: u32) -> Parsed {
    guest.header(IN, sector);
    guest.parse(&[(HEADER, 16, 0), (DATA, len, WRITE), (STATUS, 1, WRITE)])
}

fn write(guest: &mut Guest, sector: u64, len: u32) -> Parsed {
    guest.header(OUT, sector);
    guest.parse(&[(HEADER, 16, 0), (DATA, len, 0), (STATUS, 1, WRITE)])
}

fn range(guest: &mut Guest, kind: u32, sector: u64, sectors: u32, flags: u32) -> Parsed {
    guest.header(kind, u64::MAX);
    guest.range(sector, sectors, flags);
    guest.parse(&[(HEADER, 16, 0), (RANGE, 16, 0), (STATUS, 1, WRITE)])
}

#[test]
fn reads_and_writes_stay_on_the_disk() {
    let mut guest = Guest::new();
    assert_eq!(request(read(&mut guest, 999, 512)), (op::READ, 0, 999 * 512, 512));
    assert_eq!(request(write(&mut guest, 996, 2048)), (op::WRITE, 0, 996 * 512, 2048));
    // 2^55 sectors are 2^64 bytes: the product and the sum must not wrap.
    for sector in [999, 1000, 1 << 54, (1 << 55) - 1, 1 << 55, (1 << 55) + 1, u64::MAX] {
        assert_eq!(answer(read(&mut guest, sector, 1024)), (IO_ERROR, 0), "sector {sector}");
        assert_eq!(answer(write(&mut guest, sector, 1024)), (IO_ERROR, 1), "sector {sector}");
        assert!(guest.segments.is_empty());
    }
}

#[test]
fn lengths_are_whole_sectors() {
    let mut guest = Guest::new();
    for len in [1, 511, 513, 1000] {
        assert_eq!(answer(read(&mut guest, 0, len)), (IO_ERROR, 0), "length {len}");
        assert_eq!(answer(write(&mut guest, 0, len)), (IO_ERROR, 1), "length {len}");
    }
    // Odd pieces of a whole are fine.
    guest.header(IN, 0);
    let parsed =
        guest.parse(&[(HEADER, 16, 0), (DATA, 1, WRITE), (DATA, 511, WRITE), (STATUS, 1, WRITE)]);
    assert_eq!(request(parsed).3, 512);
}

#[test]
fn ranges_are_whole_blocks() {
    for block in [1024, 4096, 1 << 20] {
        let mut guest = Guest::new();
        guest.limits.capacity.set(1 << 30);
        guest.limits.blocks = Blocks::of(block);
        let sectors = block / 512;
        for (sector, len) in [(1, block), (0, block / 2), (sectors.into(), 512), (1, 512)] {
            if len > 4096 {
                continue;
            }
            assert_eq!(answer(read(&mut guest, sector, len)), (IO_ERROR, 0), "{len} at {sector}");
            assert_eq!(answer(write(&mut guest, sector, len)), (IO_ERROR, 1), "{len} at {sector}");
        }
        for (sector, count) in [(1, sectors), (0, sectors - 1), (u64::from(sectors) / 2, 1)] {
            for kind in [DISCARD, WRITE_ZEROES] {
                let parsed = range(&mut guest, kind, sector, count, 0);
                assert_eq!(answer(parsed), (IO_ERROR, 1), "{count} at {sector}, type {kind}");
            }
        }
        let zeroed = range(&mut guest, WRITE_ZEROES, sectors.into(), sectors, 0);
        let block = u64::from(block);
        assert_eq!(request(zeroed), (op::WRITE_ZEROES, 0, block, block));
        if block <= 4096 {
            let parsed = read(&mut guest, sectors.into(), 4096);
            assert_eq!(request(parsed), (op::READ, 0, block, 4096));
        }
    }
}

#[test]
fn nothing_is_done_at_once_but_only_on_the_disk() {
    let mut guest = Guest::new();
    assert_eq!(answer(read(&mut guest, 1000, 0)), (OK, 1));
    assert_eq!(answer(write(&mut guest, 0, 0)), (OK, 1));
    assert_eq!(answer(read(&mut guest, 1001, 0)), (IO_ERROR, 1));
    assert_eq!(answer(range(&mut guest, DISCARD, 1000, 0, 0)), (OK, 1));
    assert_eq!(answer(range(&mut guest, DISCARD, 1001, 0, 0)), (IO_ERROR, 1));
}

#[test]
fn data_goes_one_way() {
    let mut guest = Guest::new();
    let both = [(HEADER, 16, 0), (DATA, 512, 0), (0x5000, 512, WRITE), (STATUS, 1, WRITE)];
    for kind in [IN, OUT, GET_ID] {
        guest.header(kind, 0);
        assert_eq!(answer(guest.parse(&both)), (IO_ERROR, 0), "type {kind}");
    }
    guest.header(IN, 0);
    assert_eq!(
        answer(guest.parse(&[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)])),
        (IO_ERROR, 1)
    );
    guest.header(OUT, 0);
    assert_eq!(
        answer(guest.parse(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])),
        (IO_ERROR, 0)
    );
}

#[test]
fn flush_ignores_its_sector_and_what_is_to_be_written() {
    let mut guest = Guest::new();
    guest.header(FLUSH, u64::MAX);
    assert_eq!(request(guest.parse(&[(HEADER, 16, 0), (STATUS, 1, WRITE)])), (op::FLUSH, 0, 0, 0));
    assert_eq!(
        request(guest.parse(&[(HEADER, 16, 0), (DATA, 5, 0), (STATUS, 1, WRITE)])),
        (op::FLUSH, 0, 0, 0)
    );
    assert!(guest.segments.is_empty());
    assert_eq!(
        answer(guest.parse(&[(HEADER, 16, 0), (DATA, 5, WRITE), (STATUS, 1, WRITE)])),
        (IO_ERROR, 0)
    );
}

#[test]
fn ranges_become_requests_without_segments() {
    let mut guest = Guest::new();
    assert_eq!(request(range(&mut guest, DISCARD, 3, 5, 0)), (op::DISCARD, 0, 1536, 2560));
    assert!(guest.segments.is_empty());
    assert_eq!(
        request(range(&mut guest, WRITE_ZEROES, 3, 5, 0)),
        (op::WRITE_ZEROES, 0, 1536, 2560)
    );
    assert_eq!(
        request(range(&mut guest, WRITE_ZEROES, 999, 1, 1)),
        (op::WRITE_ZEROES, REQUEST_MAY_UNMAP, 999 * 512, 512)
    );
}

#[test]
fn a_range_may_be_cut_anywhere() {
    for cut in 1..16 {
        let mut guest = Guest::new();
        guest.header(DISCARD, 0).range(4, 2, 0);
        let parts = [
            (HEADER, 16, 0),
            (RANGE, cut, 0),
            (RANGE + u64::from(cut), 16 - cut, 0),
            (STATUS, 1, WRITE),
        ];
        assert_eq!(request(guest.parse(&parts)), (op::DISCARD, 0, 2048, 1024), "cut at {cut}");
    }
}

#[test]
fn ranges_stay_on_the_disk() {
    let mut guest = Guest::new();
    for kind in [DISCARD, WRITE_ZEROES] {
        for (sector, sectors) in
            [(999, 2), (1000, 1), (1 << 55, 1), ((1 << 55) - 1, 1), (u64::MAX, 1)]
        {
            let parsed = range(&mut guest, kind, sector, sectors, 0);
            assert_eq!(answer(parsed), (IO_ERROR, 1), "{sectors} sectors at {sector}");
        }
    }
}

#[test]
fn ranges_are_no_longer_than_announced() {
    let mut guest = Guest::new();
    guest.limits.capacity.set(1 << 50);
    for (kind, most) in [(DISCARD, MAX_DISCARD_SECTORS), (WRITE_ZEROES, MAX_WRITE_ZEROES_SECTORS)] {
        assert_eq!(request(range(&mut guest, kind, 0, most, 0)).3, u64::from(most) * 512);
        assert_eq!(answer(range(&mut guest, kind, 0, most + 1, 0)), (IO_ERROR, 1));
        assert_eq!(answer(range(&mut guest, kind, 0, u32::MAX, 0)), (IO_ERROR, 1));
    }
}

#[test]
fn flags_that_are_unknown_or_out_of_place_are_unsupported() {
    let mut guest = Guest::new();
    assert_eq!(answer(range(&mut guest, DISCARD, 0, 1, 1)), (UNSUPPORTED, 1), "unmap in a discard");
    for flags in [2, 3, 1 << 31, u32::MAX] {
        assert_eq!(answer(range(&mut guest, DISCARD, 0, 1, flags)), (UNSUPPORTED, 1), "{flags:#x}");
        assert_eq!(
            answer(range(&mut guest, WRITE_ZEROES, 0, 1, flags)),
            (UNSUPPORTED, 1),
            "{flags:#x}"
        );
    }
}

/// What is wrong with a discard or a write zeroes, and what the driver is told: the table at
/// `range` in `src/request.rs`, by virtio 1.3.
#[test]
fn a_malformed_discard_or_write_zeroes_has_its_status() {
    /// Data bytes, sector, sectors, flags.
    type Asked = (u32, u64, u32, u32);
    const BOTH: [u32; 2] = [DISCARD, WRITE_ZEROES];
    let more = MAX_DISCARD_SECTORS.max(MAX_WRITE_ZEROES_SECTORS) + 1;
    let table: [(&str, &[u32], Asked, WireStatus); 15] = [
        ("no range", &BOTH, (0, 0, 1, 0), IO_ERROR),
        ("half of a range", &BOTH, (8, 0, 1, 0), IO_ERROR),
        ("a range less a byte", &BOTH, (15, 0, 1, 0), IO_ERROR),
        ("a range and a byte", &BOTH, (17, 0, 1, 0), IO_ERROR),
        ("a range and a half", &BOTH, (24, 0, 1, 0), IO_ERROR),
        ("two ranges", &BOTH, (32, 0, 1, 0), UNSUPPORTED),
        ("two ranges with unknown flags", &BOTH, (32, 0, 1, 1 << 31), UNSUPPORTED),
        ("a hundred ranges", &BOTH, (1600, 0, 1, 0), UNSUPPORTED),
        ("unmap", &[DISCARD], (16, 0, 1, 1), UNSUPPORTED),
        ("unknown flags", &BOTH, (16, 0, 1, 2), UNSUPPORTED),
        ("unknown flags beside a known one", &BOTH, (16, 0, 1, u32::MAX), UNSUPPORTED),
        ("unknown flags, and behind the end", &BOTH, (16, 1000, 1, 2), UNSUPPORTED),
        ("too many sectors", &BOTH, (16, 0, more, 0), IO_ERROR),
        ("over the end", &BOTH, (16, 999, 2, 0), IO_ERROR),
        ("beyond what 64 bits can count", &BOTH, (16, u64::MAX, 1, 0), IO_ERROR),
    ];
    for (what, kinds, (len, sector, sectors, flags), status) in table {
        for &kind in kinds {
            let mut guest = Guest::new();
            guest.header(kind, 0);
            // As many ranges as fit, all alike.
            for at in 0..100 {
                guest.range_at(DATA + at * 16, sector, sectors, flags);
            }
            let parsed = guest.parse(&[(HEADER, 16, 0), (DATA, len, 0), (STATUS, 1, WRITE)]);
            assert_eq!(answer(parsed), (status, 1), "{what}, type {kind}");
            assert!(guest.segments.is_empty(), "{what}, type {kind}");
        }
    }
    for kind in BOTH {
        let mut guest = Guest::new();
        guest.header(kind, 0).range(0, 1, 0);
        let parsed =
            guest.parse(&[(HEADER, 16, 0), (RANGE, 16, 0), (DATA, 1, WRITE), (STATUS, 1, WRITE)]);
        assert_eq!(answer(parsed), (IO_ERROR, 0), "a buffer to be filled, type {kind}");
        // Without the feature, and on a disk that is not written, flags or not.
        for (flags, status) in [(0, IO_ERROR), (2, UNSUPPORTED)] {
            guest.limits.read_only = true;
            assert_eq!(answer(range(&mut guest, kind, 0, 1, flags)), (status, 1), "read-only");
        }
        guest.limits.features = 0;
        assert_eq!(answer(range(&mut guest, kind, 0, 1, 0)), (UNSUPPORTED, 1), "no feature");
    }
}

#[test]
fn commands_need_their_feature() {
    let mut guest = Guest::new();
    let all = guest.limits.features;
    guest.limits.features = all & !features::DISCARD;
    assert_eq!(answer(range(&mut guest, DISCARD, 0, 1, 0)), (UNSUPPORTED, 1));
    guest.limits.features = all & !features::WRITE_ZEROES;
    assert_eq!(answer(range(&mut guest, WRITE_ZEROES, 0, 1, 0)), (UNSUPPORTED, 1));
    guest.limits.features = all & !features::FLUSH;
    guest.header(FLUSH, 0);
    assert_eq!(answer(guest.parse(&[(HEADER, 16, 0), (STATUS, 1, WRITE)])), (UNSUPPORTED, 1));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut guest = Guest::new();
    guest.limits.read_only = true;
    assert_eq!(answer(write(&mut guest, 0, 512)), (IO_ERROR, 1));
    assert_eq!(answer(range(&mut guest, DISCARD, 0, 1, 0)), (IO_ERROR, 1));
    assert_eq!(answer(range(&mut guest, WRITE_ZEROES, 0, 1, 0)), (IO_ERROR, 1));
    assert_eq!(request(read(&mut guest, 0, 512)).0, op::READ);
}

#[test]
fn commands_that_this_device_does_not_know_are_unsupported() {
    let mut guest = Guest::new();
    // SCSI, FLUSH_OUT, GET_LIFETIME, SECURE_ERASE, zones, BARRIER.
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 26, 1 << 31, u32::MAX] {
        guest.header(kind, 0);
        let parsed = guest.parse(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        assert_eq!(answer(parsed), (UNSUPPORTED, 0), "type {kind}");
        let parsed = guest.parse(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
        assert_eq!(answer(parsed), (UNSUPPORTED, 1), "type {kind}");
    }
}

#[test]
fn the_serial_number_is_copied_as_far_as_it_fits() {
    for (len, written) in [(20, 21), (0, 1), (7, 8), (64, 20)] {
        let mut guest = Guest::new();
        guest.memory_fill(DATA, 64);
        guest.header(GET_ID, 0);
        // In two pieces, so that it crosses from one to the other.
        let first = len.min(3);
        let parsed = guest.parse(&[
            (HEADER, 16, 0),
            (DATA, first, WRITE),
            (DATA + u64::from(first), len - first, WRITE),
            (STATUS, 1, WRITE),
        ]);
        assert_eq!(answer(parsed), (OK, written), "length {len}");
        let copied = len.min(20) as usize;
        let bytes = guest.bytes(DATA, 64);
        assert_eq!(bytes[..copied], guest.limits.serial[..copied]);
        assert!(bytes[copied..].iter().all(|&b| b == 0xee), "nothing beyond it is touched");
        let left: usize = guest.segments.iter().map(|segment| segment.len()).sum();
        assert_eq!(left, len as usize, "where it was written");
    }
}

#[test]
fn the_status_does_not_fall_into_the_serial_number() {
    let mut guest = Guest::new();
    guest.header(GET_ID, 0);
    let Parsed::Answer { status_at, status, written, .. } =
        guest.parse(&[(HEADER, 16, 0), (DATA, 21, WRITE)])
    else {
        panic!("no answer");
    };
    status_at.write(status);
    assert_eq!(written, 21);
    assert_eq!(guest.bytes(DATA, 20), guest.limits.serial);
    assert_eq!(guest.bytes(DATA + 20, 1), [0]);
}

#[test]
fn limits_come_from_what_the_domain_announces() {
    let mut info = DeviceInfo {
        capacity: 4096,
        block_size: 512,
        physical_block_size: 512,
        optimal_io_size: 0,
        discard_granularity: 0,
        capabilities: Capabilities(0),
        swap: Swap::No,
        backing_kind: String::new(),
        backing_id: (0, 0),
        backing_cache: 0,
        serial: "short".into(),
    };
    let limits = Limits::new(&info, features::FLUSH);
    assert_eq!(
        (limits.capacity.get(), limits.features, limits.read_only),
        (4096, features::FLUSH, false)
    );
    assert_eq!(&limits.serial, b"short\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    info.serial = "a serial number that is too long".into();
    info.capabilities = Capabilities::READ_ONLY;
    let limits = Limits::new(&info, 0);
    assert!(limits.read_only, "offered is enough, 5.2.6.2");
    assert_eq!(&limits.serial, b"a serial number that");
    assert!(
        Limits::new(&DeviceInfo { capabilities: Capabilities(0), ..info }, features::RO).read_only
    );
}

#[test]
fn the_used_length_counts_from_the_front() {
    assert_eq!(used_len(op::READ, 4096, 4096), 4097);
    assert_eq!(used_len(op::READ, 4096, 0), 0, "the status is not at the front");
    assert_eq!(used_len(op::READ, 4096, 512), 512);
    assert_eq!(used_len(op::WRITE, 4096, 0), 1);
    assert_eq!(used_len(op::FLUSH, 0, 0), 1);
    assert_eq!(used_len(op::DISCARD, 4096, 0), 1);
    let most = u64::from(u32::MAX) & !511;
    assert_eq!(used_len(op::READ, most, u32::MAX), u32::MAX - 510);
}
