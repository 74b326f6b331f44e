//! A hostile guest: rings, chains and messages that break the rules, one at a time and at random.
//!
//! Whatever it does, the daemon must live, must never say OK to what it did not do, and must serve
//! the next well-formed request, on the same ring where the ring is still one, and on a new session
//! always.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::client::features;
use guest_tests::client::raw::{
    Descriptor, FREE, GUEST_BASE, INDIRECT, MEMORY_BYTES, NEXT, RawSession, WRITE,
};
use guest_tests::daemon::Daemon;
use guest_tests::stamp::{LoadOptions, run_load};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const DISK_BYTES: u64 = 16 << 20;
const SECTORS: u64 = DISK_BYTES / 512;
const QUEUE_SIZE: u16 = 64;
const SERIAL: &str = "hostile-guest";
const ANSWER: Duration = Duration::from_secs(5);

/// Where the parts of a request are, guest-physical.
const HEADER: u64 = GUEST_BASE + FREE;
const STATUS: u64 = HEADER + 0x1000;
const DATA: u64 = HEADER + 0x2000;
const TABLE: u64 = HEADER + 0x4000;
/// Where the well-formed request has its parts.
const GOOD: u64 = FREE + 0x2_0000;
/// First table entries of the request under test and of the well-formed one.
const HEAD: u16 = 8;
const GOOD_HEAD: u16 = 0;
/// A status byte that was not written.
const UNWRITTEN: u8 = 0xee;

const READ: u32 = 0;
const WRITE_OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn start() -> Daemon {
    let serial = format!("serial={SERIAL}");
    Daemon::start(&[
        "--domain", "ramdisk", "--param", "size=16M", "--param", &serial, "--queues", "2",
    ])
}

fn session(daemon: &Daemon) -> RawSession {
    RawSession::start(daemon.socket(), features::USUAL, QUEUE_SIZE).expect("a session")
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// The bytes of a discard or write-zeroes range.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Writes and reads back one sector through the first descriptors of the ring; `salt` makes it new.
fn well_formed_works(raw: &mut RawSession, salt: u8, what: &str) {
    let address = GUEST_BASE + GOOD;
    for (kind, direction, fill) in [(WRITE_OUT, 0, salt), (READ, WRITE, 0)] {
        raw.put(GOOD, &header(kind, 100)).expect("memory");
        raw.put(GOOD + 0x1000, &[UNWRITTEN]).expect("memory");
        raw.put(GOOD + 0x2000, &[fill; 512]).expect("memory");
        let chain =
            [(address, 16, 0), (address + 0x2000, 512, direction), (address + 0x1000, 1, WRITE)];
        raw.chain(GOOD_HEAD, &chain).expect("memory");
        raw.offer(GOOD_HEAD).expect("a kick");
        loop {
            let used = raw.used(ANSWER).expect("memory");
            let (head, len) = used
                .unwrap_or_else(|| panic!("after {what}: a well-formed request is not answered"));
            if head == u32::from(GOOD_HEAD) {
                let wanted = if kind == READ { 513 } else { 1 };
                assert_eq!(len, wanted, "after {what}: wrong length in the used ring");
                break;
            }
            assert_eq!(
                head,
                u32::from(HEAD),
                "after {what}: an answer to a request that was never made"
            );
        }
        assert_eq!(raw.get(GOOD + 0x1000, 1).expect("memory"), [0], "after {what}: status");
    }
    assert_eq!(
        raw.get(GOOD + 0x2000, 512).expect("memory"),
        [salt; 512],
        "after {what}: what was read"
    );
}

/// A new client on a new session does verified I/O.
fn good_client_works(daemon: &Daemon) {
    // After a hostile guest the disk may hold anything.
    let options =
        LoadOptions { blocks_per_queue: 1024, ..LoadOptions::new(2, 16) }.on_unknown_content();
    run_load(daemon.socket(), &options, Duration::from_millis(200)).assert_clean();
    assert_eq!(daemon.status()["state"], "serving");
}

/// What must be in the status byte.
#[derive(Clone, Copy, Debug)]
enum Expect {
    Ok,
    IoError,
    Unsupported,
    /// Refused or dropped.
    NotOk,
    /// The specification leaves it open.
    Anything,
}

type Buffers = Vec<(u64, u32, u16)>;

struct Case {
    name: &'static str,
    header: [u8; 16],
    data: Vec<u8>,
    chain: Buffers,
    expect: Expect,
}

fn case(
    name: &'static str,
    header: [u8; 16],
    data: &[u8],
    chain: &[(u64, u32, u16)],
    expect: Expect,
) -> Case {
    Case { name, header, data: data.to_vec(), chain: chain.to_vec(), expect }
}

/// One request with the usual shape: header, `len` bytes of data, status.
fn usual(
    name: &'static str,
    kind: u32,
    sector: u64,
    len: u32,
    direction: u16,
    expect: Expect,
) -> Case {
    let chain = [(HEADER, 16, 0), (DATA, len, direction), (STATUS, 1, WRITE)];
    case(name, header(kind, sector), &[], &chain, expect)
}

/// A discard or write-zeroes request with `data` as its ranges.
fn ranges(name: &'static str, kind: u32, data: &[u8], expect: Expect) -> Case {
    let chain = [(HEADER, 16, 0), (DATA, data.len() as u32, 0), (STATUS, 1, WRITE)];
    case(name, header(kind, 0), data, &chain, expect)
}

fn shapes() -> Vec<Case> {
    use Expect::*;
    let read = header(READ, 0);
    let write = header(WRITE_OUT, 0);
    let (h, d, s) = ((HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE));
    vec![
        case("a chain of a status alone", read, &[], &[s], NotOk),
        case("a header of 8 bytes", read, &[], &[(HEADER, 8, 0), d, s], NotOk),
        case("an empty header", read, &[], &[(HEADER, 0, 0), d, s], NotOk),
        case("a writable header", read, &[], &[(HEADER, 16, WRITE), d, s], NotOk),
        case("a header in two pieces", read, &[], &[(HEADER, 8, 0), (HEADER + 8, 8, 0), d, s], Ok),
        case("no status", write, &[], &[h, (DATA, 512, 0)], NotOk),
        case("a header and nothing else", read, &[], &[h], NotOk),
        case("a status of no length", read, &[], &[h, d, (STATUS, 0, WRITE)], NotOk),
        case("a read-only status", write, &[], &[h, (DATA, 512, 0), (STATUS, 1, 0)], NotOk),
        case("a read into a read-only buffer", read, &[], &[h, (DATA, 512, 0), s], Anything),
        case("a write from a writable buffer", write, &[], &[h, d, s], Anything),
        case("an empty piece of data", read, &[], &[h, (DATA, 0, WRITE), d, s], Anything),
        case("a read of nothing", read, &[], &[h, s], Anything),
        case(
            "a readable buffer after a writable one",
            write,
            &[],
            &[h, s, (DATA, 512, 0)],
            Anything,
        ),
        usual("a read of 100 bytes", READ, 0, 100, WRITE, IoError),
        usual("a write of 513 bytes", WRITE_OUT, 0, 513, 0, IoError),
        usual("a read at the end of the disk", READ, SECTORS, 512, WRITE, IoError),
        usual("a read over the end", READ, SECTORS - 1, 1024, WRITE, IoError),
        usual("a write over the end", WRITE_OUT, SECTORS - 1, 1024, 0, IoError),
        usual("a write beyond the end", WRITE_OUT, SECTORS + 1, 512, 0, IoError),
        usual("a sector that overflows in bytes", READ, u64::MAX / 512, 1024, WRITE, IoError),
        usual("the last sector of all", WRITE_OUT, u64::MAX, 512, 0, IoError),
        usual("an unknown type", 77, 0, 512, WRITE, Unsupported),
        usual("a type from before the specification", 0x8000_0000, 0, 512, 0, Unsupported),
        usual("a flush of a strange place", FLUSH, u64::MAX, 0, 0, Anything),
    ]
}

fn addresses() -> Vec<Case> {
    use Expect::*;
    let end = GUEST_BASE + MEMORY_BYTES;
    let read = header(READ, 0);
    let (h, s) = ((HEADER, 16, 0), (STATUS, 1, WRITE));
    let at = |name, data: (u64, u32, u16)| case(name, read, &[], &[h, data, s], NotOk);
    vec![
        at("data where there is no memory", (0x1000, 512, WRITE)),
        at("data over the end of memory", (end - 256, 512, WRITE)),
        at("data just behind memory", (end, 512, WRITE)),
        at("data that wraps around", (u64::MAX - 255, 512, WRITE)),
        at("4 GiB of data", (DATA, 0xffff_fe00, WRITE)),
        case("4 GiB to write", header(WRITE_OUT, 0), &[], &[h, (DATA, 0xffff_fe00, 0), s], NotOk),
        case(
            "a header where there is no memory",
            read,
            &[],
            &[(8, 16, 0), (DATA, 512, WRITE), s],
            NotOk,
        ),
        case(
            "a header that wraps around",
            read,
            &[],
            &[(u64::MAX - 7, 16, 0), (DATA, 512, WRITE), s],
            NotOk,
        ),
        case("a status behind memory", read, &[], &[h, (DATA, 512, WRITE), (end, 1, WRITE)], NotOk),
        case(
            "a status at the end of the world",
            read,
            &[],
            &[h, (DATA, 512, WRITE), (u64::MAX, 1, WRITE)],
            NotOk,
        ),
    ]
}

fn range_requests() -> Vec<Case> {
    use Expect::*;
    let one = range(0, 1, 0);
    vec![
        ranges("a discard of 8 bytes of range", DISCARD, &one[..8], NotOk),
        ranges("a discard of a range and a byte", DISCARD, &[&one[..], &[0]].concat(), NotOk),
        ranges("a discard at the end", DISCARD, &range(SECTORS, 1, 0), IoError),
        ranges("a discard that overflows", DISCARD, &range(u64::MAX, u32::MAX, 0), IoError),
        ranges("a discard with the unmap flag", DISCARD, &range(0, 1, 1), Unsupported),
        ranges("a discard with unknown flags", DISCARD, &range(0, 1, 0x8000_0000), Unsupported),
        ranges("two discards in one", DISCARD, &one.repeat(2), Unsupported),
        ranges("200 discards in one", DISCARD, &one.repeat(200), Unsupported),
        ranges("two write-zeroes in one", WRITE_ZEROES, &one.repeat(2), Unsupported),
        ranges("zeroes over the end", WRITE_ZEROES, &range(SECTORS - 1, 2, 0), IoError),
        ranges("zeroes with unknown flags", WRITE_ZEROES, &range(0, 1, 0xfffe), Unsupported),
        case(
            "a discard of nothing",
            header(DISCARD, 0),
            &[],
            &[(HEADER, 16, 0), (STATUS, 1, WRITE)],
            NotOk,
        ),
        usual("a short serial", GET_ID, 0, 8, WRITE, Anything),
        usual("a serial read-only", GET_ID, 0, 20, 0, NotOk),
    ]
}

#[test]
fn malformed_requests_are_refused_and_the_ring_goes_on() {
    let daemon = start();
    let mut raw = session(&daemon);
    let last_sector = |raw: &mut RawSession| {
        let read = usual("the last sector", READ, SECTORS - 1, 512, WRITE, Expect::Ok);
        try_case(raw, &read);
        raw.get(DATA - GUEST_BASE, 512).expect("memory")
    };
    let before = last_sector(&mut raw);
    for (index, case) in shapes().into_iter().chain(addresses()).chain(range_requests()).enumerate()
    {
        try_case(&mut raw, &case);
        well_formed_works(&mut raw, index as u8 + 1, case.name);
    }
    assert_eq!(last_sector(&mut raw), before, "a write over the end was done in part");
    drop(raw);
    good_client_works(&daemon);
}

fn try_case(raw: &mut RawSession, case: &Case) {
    raw.put(HEADER - GUEST_BASE, &case.header).expect("memory");
    raw.put(STATUS - GUEST_BASE, &[UNWRITTEN]).expect("memory");
    raw.put(DATA - GUEST_BASE, &[0x77; 1024]).expect("memory");
    raw.put(DATA - GUEST_BASE, &case.data).expect("memory");
    raw.chain(HEAD, &case.chain).expect("memory");
    raw.offer(HEAD).expect("a kick");
    let used = raw.used(Duration::from_millis(300)).expect("memory");
    if let Some((head, _)) = used {
        assert_eq!(head, u32::from(HEAD), "{}: an answer to something else", case.name);
    }
    let status = raw.get(STATUS - GUEST_BASE, 1).expect("memory")[0];
    let right = match case.expect {
        Expect::Ok => status == 0,
        Expect::IoError => status == 1,
        Expect::Unsupported => status == 2,
        Expect::NotOk => [1, 2, UNWRITTEN].contains(&status),
        Expect::Anything => [0, 1, 2, UNWRITTEN].contains(&status),
    };
    assert!(
        right,
        "{}: status {status:#x}, but expected {:?} (used: {used:?})",
        case.name, case.expect
    );
    if status != UNWRITTEN {
        assert!(used.is_some(), "{}: a status, but no used entry", case.name);
    }
}

#[test]
fn chains_that_do_not_end_or_lead_nowhere_are_survived() {
    let daemon = start();
    let table =
        |entries: &[Descriptor]| entries.iter().flat_map(Descriptor::bytes).collect::<Vec<u8>>();
    let entry = |addr, len, flags, next| Descriptor { addr, len, flags, next };
    let request = table(&[
        entry(HEADER, 16, NEXT, 1),
        entry(DATA, 512, NEXT | WRITE, 2),
        entry(STATUS, 1, WRITE, 0),
    ]);
    let nested = table(&[entry(TABLE, 48, INDIRECT, 0)]);
    let endless = table(&[entry(HEADER, 16, NEXT, 0)]);
    let outside = table(&[entry(HEADER, 16, NEXT, 7)]);
    let cases: Vec<(&str, Descriptor, Vec<u8>, bool)> = vec![
        ("a well-formed indirect table", entry(TABLE, 48, INDIRECT, 0), request.clone(), true),
        ("a loop of one", entry(HEADER, 16, NEXT, HEAD), vec![], false),
        ("a writable loop of one", entry(DATA, 512, NEXT | WRITE, HEAD), vec![], false),
        ("a chain out of the table", entry(HEADER, 16, NEXT, 60_000), vec![], false),
        ("an indirect table of no length", entry(TABLE, 0, INDIRECT, 0), request.clone(), false),
        ("an indirect table of 8 bytes", entry(TABLE, 8, INDIRECT, 0), request.clone(), false),
        ("an indirect table of 47 bytes", entry(TABLE, 47, INDIRECT, 0), request.clone(), false),
        (
            "an indirect table of 4 GiB",
            entry(TABLE, 0xffff_fff0, INDIRECT, 0),
            endless.clone(),
            false,
        ),
        (
            "an indirect table with a successor",
            entry(TABLE, 48, INDIRECT | NEXT, HEAD),
            request.clone(),
            false,
        ),
        ("an indirect table where there is no memory", entry(16, 48, INDIRECT, 0), vec![], false),
        ("an indirect table that is its own entry", entry(TABLE, 16, INDIRECT, 0), nested, false),
        ("an endless indirect table", entry(TABLE, 16, INDIRECT, 0), endless, false),
        ("an indirect chain out of its table", entry(TABLE, 16, INDIRECT, 0), outside, false),
    ];
    for (index, (name, head, bytes, is_good)) in cases.iter().enumerate() {
        let mut raw = session(&daemon);
        raw.put(HEADER - GUEST_BASE, &header(READ, 0)).expect("memory");
        raw.put(STATUS - GUEST_BASE, &[UNWRITTEN]).expect("memory");
        raw.put(TABLE - GUEST_BASE, bytes).expect("memory");
        raw.describe(HEAD, *head).expect("memory");
        raw.offer(HEAD).expect("a kick");
        let used =
            raw.used(if *is_good { ANSWER } else { Duration::from_millis(100) }).expect("memory");
        let status = raw.get(STATUS - GUEST_BASE, 1).expect("memory")[0];
        assert_eq!(status == 0, *is_good, "{name}: status {status:#x}, used {used:?}");
        well_formed_works(&mut raw, index as u8 + 1, name);
    }
    good_client_works(&daemon);
}

#[test]
fn broken_rings_end_with_their_session_at_worst() {
    let daemon = start();
    type Break = fn(&mut RawSession);
    let broken: [(&str, Break); 9] = [
        ("a head outside of the table", |raw| drop(raw.offer(60_000))),
        ("more available than the ring has", |raw| drop(raw.jump(QUEUE_SIZE + 1))),
        ("an available index that ran backwards", |raw| drop(raw.jump(u16::MAX))),
        ("a ring outside of memory", |raw| {
            drop(raw.place_ring(MEMORY_BYTES - 8, MEMORY_BYTES, MEMORY_BYTES * 2))
        }),
        ("a ring at the end of the address space", |raw| {
            drop(raw.place_ring(u64::MAX, u64::MAX, u64::MAX))
        }),
        ("a misaligned ring", |raw| drop(raw.place_ring(3, 5, 7))),
        ("a queue size of three", |raw| drop(raw.frontend.set_vring_num(0, 3))),
        ("a queue size of none", |raw| drop(raw.frontend.set_vring_num(0, 0))),
        ("a queue that is not there", |raw| drop(raw.frontend.set_vring_enable(63, true))),
    ];
    for (name, do_it) in broken {
        println!("{name}");
        let mut raw = session(&daemon);
        do_it(&mut raw);
        let _ = raw.offer(GOOD_HEAD);
        let _ = raw.used(Duration::from_millis(20));
        drop(raw);
        good_client_works(&daemon);
    }
}

#[test]
fn get_id_answers_the_serial_and_get_config_any_range_that_there_is() {
    let daemon = start();
    let mut raw = session(&daemon);
    try_case(&mut raw, &usual("the serial", GET_ID, 0, 20, WRITE, Expect::Ok));
    let serial = raw.get(DATA - GUEST_BASE, 20).expect("memory");
    assert_eq!(serial, [SERIAL.as_bytes(), &[0; 20][SERIAL.len()..]].concat());

    let flags = VhostUserConfigFlags::WRITABLE;
    let mut ask =
        |offset, size: u32| raw.frontend.get_config(offset, size, flags, &vec![0; size as usize]);
    let (_, whole) = ask(0, 60).expect("the configuration space");
    assert_eq!(whole[..8], SECTORS.to_le_bytes(), "the capacity");
    for size in [1, 2, 8, 20, 24, 36, 56, 60] {
        let (_, part) = ask(0, size).unwrap_or_else(|e| panic!("GET_CONFIG of {size} bytes: {e}"));
        assert_eq!(part, whole[..size as usize], "GET_CONFIG of {size} bytes");
    }
    let (_, middle) = ask(20, 4).expect("the block size");
    assert_eq!(middle, whole[20..24]);
    let (_, padded) = ask(0, 256).expect("the largest configuration space");
    assert_eq!((&padded[..60], &padded[72..]), (&whole[..], &[0; 184][..]));
    // As Cloud Hypervisor up to v50 counts.
    let (_, from_mmio) = ask(0x100, 60).expect("the configuration space");
    assert_eq!(from_mmio, whole);
    let (_, middle) = ask(0x114, 4).expect("the block size");
    assert_eq!(middle, whole[20..24]);
    // Zeros would be a disk of no size.
    drop(raw);
    for (offset, size) in [(72, 4), (250, 6), (0, 257), (0x100 + 72, 4), (0x200, 60), (4000, 96)] {
        let mut raw = RawSession::connect(daemon.socket(), features::USUAL).expect("a connection");
        let answer = raw.frontend.get_config(offset, size, flags, &vec![0; size as usize]);
        assert!(answer.is_err(), "{size} bytes at {offset} are answered");
        let log = daemon.log();
        let wanted = format!("{size} bytes at {offset} of the configuration space, which has 72");
        assert!(offset != 72 || log.contains(&wanted), "{log}");
    }
    good_client_works(&daemon);
}

#[test]
fn memory_that_changes_under_the_request_is_survived() {
    let daemon = start();
    let mut raw = session(&daemon);
    let chain = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    let beyond = [(HEADER, 16, 0), (GUEST_BASE + MEMORY_BYTES - 8, 512, WRITE), (STATUS, 1, WRITE)];
    let deadline = Instant::now() + Duration::from_secs(1);
    let mut rounds = 0_u64;
    while Instant::now() < deadline {
        raw.put(HEADER - GUEST_BASE, &header(READ, 0)).expect("memory");
        raw.chain(HEAD, &chain).expect("memory");
        raw.offer(HEAD).expect("a kick");
        // The device is at work now: every write below races with its reads.
        for _ in 0..4 {
            raw.put(HEADER - GUEST_BASE, &header(WRITE_OUT, u64::MAX)).expect("memory");
            raw.chain(HEAD, &beyond).expect("memory");
            raw.put(HEADER - GUEST_BASE, &header(GET_ID, 3)).expect("memory");
            raw.chain(HEAD, &chain).expect("memory");
        }
        let _ = raw.used(Duration::from_millis(2)).expect("memory");
        rounds += 1;
    }
    assert!(rounds > 100, "only {rounds} rounds");
    drop(raw);
    good_client_works(&daemon);
}

#[test]
fn random_chains_are_survived() {
    let daemon = start();
    let mut random: u64 = std::env::var("HOTSWAP_SEED")
        .map_or(0x1234_5678_9abc_def1, |s| s.parse().expect("a number"));
    println!("HOTSWAP_SEED={random}");
    let mut below = move |limit: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % limit
    };
    for _session in 0..20 {
        let mut raw = session(&daemon);
        for _ in 0..200 {
            let kind =
                [READ, WRITE_OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99][below(7) as usize];
            raw.put(
                HEADER - GUEST_BASE,
                &header(kind, [0, 1, SECTORS - 1, SECTORS, below(u64::MAX)][below(5) as usize]),
            )
            .expect("memory");
            for index in 0..QUEUE_SIZE {
                let addr = [
                    HEADER,
                    DATA,
                    STATUS,
                    TABLE,
                    GUEST_BASE,
                    GUEST_BASE + MEMORY_BYTES - below(600),
                    below(u64::MAX),
                ];
                let len = [0, 1, 8, 16, 17, 512, 513, 4096, 0xffff_ffff][below(9) as usize];
                let (addr, flags, next) =
                    (addr[below(7) as usize], below(8) as u16, below(70) as u16);
                let bytes = Descriptor { addr, len, flags, next };
                raw.describe(index, bytes).expect("memory");
                raw.put(TABLE - GUEST_BASE + u64::from(index) * 16, &bytes.bytes())
                    .expect("memory");
            }
            if raw.offer(below(u64::from(QUEUE_SIZE)) as u16).is_err() {
                break;
            }
            let _ = raw.used(Duration::from_micros(300));
        }
    }
    good_client_works(&daemon);
}

#[test]
fn garbage_on_the_vhost_user_socket_ends_that_connection_only() {
    let daemon = start();
    let message = |request: u32, flags: u32, size: u32, body: &[u8]| {
        [&request.to_le_bytes()[..], &flags.to_le_bytes(), &size.to_le_bytes(), body].concat()
    };
    let garbage: Vec<(&str, Vec<u8>)> = vec![
        ("nothing at all", vec![]),
        ("half a header", vec![1, 0, 0, 0, 1]),
        ("text", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
        ("0xff for ever", vec![0xff; 64 << 10]),
        ("an unknown request", message(9999, 1, 0, &[])),
        ("a wrong version", message(1, 3, 0, &[])),
        ("a body of 4 GiB", message(2, 1, u32::MAX, &[0; 64])),
        ("a body that never comes", message(2, 1, 8, &[0; 3])),
        (
            "memory without descriptors",
            message(5, 1, 40, &[&1_u64.to_le_bytes()[..], &[0xff; 32]].concat()),
        ),
        ("a kick for a ring without a descriptor", message(12, 1, 8, &0x1ff_u64.to_le_bytes())),
        ("a ring address before memory", message(9, 1, 40, &[0x41; 40])),
    ];
    for (name, bytes) in garbage {
        println!("{name}");
        let mut stream = UnixStream::connect(daemon.socket()).expect("a connection");
        // The daemon may hang up in the middle of it.
        let _ = stream.write_all(&bytes);
        thread::sleep(Duration::from_millis(20));
        drop(stream);
        good_client_works(&daemon);
    }
}

/// Copying is what upgrades wait for: 16 requests of 3 GiB each shut every gate for longer than
/// a driver waits.
#[test]
fn no_more_is_done_in_a_request_than_was_announced() {
    const MOST: u64 = 126 << 20;
    const PIECE: u32 = 512 << 10;
    let daemon =
        Daemon::start(&["--domain", "ramdisk", "--param", "size=256M", "--queue-size", "512"]);
    let mut raw = RawSession::start(daemon.socket(), features::USUAL, 512).expect("a session");
    let (header_at, status_at, data_at) = (FREE, FREE + 0x100, FREE + 0x1000);
    let pieces = MOST / u64::from(PIECE);
    for (pieces, expected) in [(pieces, 0), (pieces + 1, 1)] {
        raw.put(header_at, &header(READ, 0)).expect("memory");
        raw.put(status_at, &[UNWRITTEN]).expect("memory");
        let mut chain = vec![(GUEST_BASE + header_at, 16, 0)];
        chain.extend((0..pieces).map(|_| (GUEST_BASE + data_at, PIECE, WRITE)));
        chain.push((GUEST_BASE + status_at, 1, WRITE));
        raw.chain(0, &chain).expect("memory");
        raw.offer(0).expect("a kick");
        assert!(raw.used(ANSWER).expect("memory").is_some(), "no answer to {pieces} pieces");
        assert_eq!(raw.get(status_at, 1).expect("memory"), [expected], "{pieces} pieces");
    }
    // A deep queue of the largest: an upgrade gets its turn between two of them.
    raw.put(header_at, &header(READ, 0)).expect("memory");
    let pieces = MOST / (1 << 20) * 2;
    let mut chain = vec![(GUEST_BASE + header_at, 16, 0)];
    chain.extend((0..pieces).map(|_| (GUEST_BASE + data_at, PIECE, WRITE)));
    chain.push((GUEST_BASE + status_at, 1, WRITE));
    raw.chain(0, &chain).expect("memory");
    for _ in 0..64 {
        raw.offer(0).expect("a kick");
    }
    let reply = daemon.call(&["upgrade", "ramdisk_v2"]);
    let pause = reply["phases_us"]["pause"].as_u64().expect("a number");
    println!("gate shut for {pause} us under requests of 126 MiB");
    for _ in 0..64 {
        assert!(raw.used(ANSWER).expect("memory").is_some(), "no answer");
    }
    assert_eq!(daemon.status()["state"], "serving");
}

/// A guest writes what it likes to the configuration space; QEMU passes it on.
#[test]
fn writes_to_the_configuration_space_end_no_session() {
    use vhost::vhost_user::VhostUserFrontend;
    use vhost::vhost_user::message::VhostUserConfigFlags;
    let daemon = start();
    let mut raw = session(&daemon);
    for (offset, bytes) in [(32, &[1][..]), (32, &[7]), (0, &[0; 8]), (33, &[1])] {
        // Whatever the answer is.
        let _ = raw.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes);
        well_formed_works(&mut raw, offset as u8 + bytes[0], &format!("{bytes:?} at {offset}"));
    }
    let (_, config) =
        raw.frontend.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).expect("the space");
    assert_eq!(config[..8], (16u64 << 20 >> 9).to_le_bytes(), "what is read-only was written");
    // But no frontend lets a guest write where there is nothing.
    let beyond = raw.frontend.set_config(72, VhostUserConfigFlags::WRITABLE, &[1]);
    assert!(beyond.is_err(), "a write behind the end was acknowledged");
    drop(raw);
    good_client_works(&daemon);
}

/// What was published while no descriptor was there was meant for a driver: one that waits for its
/// interrupt would wait for ever.
#[test]
fn who_is_given_a_call_descriptor_is_called() {
    let daemon = start();
    let mut raw = session(&daemon);
    well_formed_works(&mut raw, 1, "the start");
    assert!(raw.was_called(ANSWER).expect("a descriptor"));
    assert!(
        !raw.was_called(Duration::from_millis(50)).expect("a descriptor"),
        "nothing has happened"
    );
    raw.renew_call().expect("a new descriptor");
    assert!(
        raw.was_called(ANSWER).expect("a descriptor"),
        "no call says that there is something in the used ring"
    );
    well_formed_works(&mut raw, 2, "a new call descriptor");
}
