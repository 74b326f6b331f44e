//! A migration's log: each page of guest memory that was written for a request is marked when its
//! answer is there, whatever has written it, and nothing is marked that was not written.
//!
//! Random requests of every kind go over a ring by hand. Memory is compared page by page with what
//! it was before, so that nothing here has to know which pages a device writes: a page that has
//! changed and is not marked would be old where the guest is migrated to.

use std::collections::BTreeSet;
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::dirty::{DirtyLog, PAGE};
use guest_tests::client::features;
use guest_tests::client::raw::{
    FREE, GUEST_BASE, MEMORY_BYTES, PLUGGED_BASE, RawSession, USED, WRITE,
};
use guest_tests::daemon::{Daemon, disk_directory};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::NamedTempFile;

const SECOND: Duration = Duration::from_secs(1);
/// Descriptors of the ring: its used ring has four pages.
const SIZE: u16 = 1024;
/// Requests in flight at once.
const SLOTS: u64 = 8;
/// Bytes of a request's part of the memory: a page for the header, one for the status, 20 for data.
const SLOT: u64 = 22 * PAGE;
/// Descriptors of a request's chain, at most.
const CHAIN: u16 = 8;
const DISK: u64 = 16 << 20;

/// What is logged in a test: memory that is there at first, and memory that is plugged in.
const END: u64 = PLUGGED_BASE + (8 << 20);

/// A small generator, the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Unknown,
    Outside,
    Malformed,
}

const KINDS: [Kind; 7] = [
    Kind::Read,
    Kind::Write,
    Kind::Flush,
    Kind::GetId,
    Kind::Unknown,
    Kind::Outside,
    Kind::Malformed,
];

/// Writes a request of a kind into its slot. The status byte is on a page of its own, or directly
/// behind the data. Returns the head of its chain.
fn prepare(raw: &RawSession, slot: u64, kind: Kind, random: &mut Random) -> u16 {
    let at = FREE + slot * SLOT;
    raw.put(at, &vec![0xa5; SLOT as usize]).expect("memory");
    let (code, sector) = match kind {
        Kind::Read => (0_u32, random.next(DISK / 512 - 256)),
        Kind::Write => (1, random.next(DISK / 512 - 256)),
        Kind::Flush => (4, 0),
        Kind::GetId => (8, 0),
        Kind::Unknown => (77, 0),
        Kind::Outside => (0, DISK / 512),
        Kind::Malformed => (0, 0),
    };
    let mut header = [0; 16];
    header[..4].copy_from_slice(&code.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    raw.put(at, &header).expect("memory");
    let base = GUEST_BASE + at;
    let mut chain = vec![(base, 16, 0)];
    let flags = if kind == Kind::Write { 0 } else { WRITE };
    let mut data = base + 2 * PAGE + random.next(PAGE);
    let len = match kind {
        Kind::Read | Kind::Write | Kind::Outside => 512 * (1 + random.next(100)),
        Kind::GetId => 20,
        Kind::Flush | Kind::Unknown | Kind::Malformed => 0,
    };
    let mut left = len;
    while left > 0 {
        let piece = if chain.len() < 5 { 1 + random.next(left) } else { left };
        chain.push((data, piece as u32, flags));
        // With a hole between two pieces, now and then.
        data += piece + random.next(2) * random.next(1000);
        left -= piece;
    }
    match kind {
        // There is no place for a status.
        Kind::Malformed => {}
        _ if random.next(2) == 0 => chain.push((data, 1, WRITE)),
        _ => chain.push((base + PAGE + random.next(PAGE), 1, WRITE)),
    }
    let head = slot as u16 * CHAIN;
    raw.chain(head, &chain).expect("memory");
    head
}

/// Waits for so many answers.
fn wait(raw: &mut RawSession, answers: usize, daemon: &Daemon) {
    for _ in 0..answers {
        let used = raw.used(20 * SECOND).expect("memory");
        assert!(used.is_some(), "no answer:\n{}", daemon.log());
    }
}

/// What memory holds, and the pages in which that is not what it was.
fn changed(raw: &RawSession, before: &[u8]) -> BTreeSet<u64> {
    let now = raw.get(0, MEMORY_BYTES as usize).expect("memory");
    let pages = before.chunks(PAGE as usize).zip(now.chunks(PAGE as usize));
    let first = GUEST_BASE / PAGE;
    (first..).zip(pages).filter(|(_, (before, now))| before != now).map(|(page, _)| page).collect()
}

/// Pages of each sort that had changed, and were marked.
#[derive(Debug, Default)]
struct Seen {
    data: usize,
    status: usize,
    ring: usize,
    identity: usize,
}

/// Rounds of random requests with the log on.
fn rounds(raw: &mut RawSession, log: &DirtyLog, daemon: &Daemon, count: u64, seed: u64) -> Seen {
    let (mut random, mut seen) = (Random(seed), Seen::default());
    for round in 0..count {
        let slots = 1 + random.next(SLOTS);
        let kinds: Vec<Kind> =
            (0..slots).map(|_| KINDS[random.next(KINDS.len() as u64) as usize]).collect();
        let heads: Vec<u16> = (0..slots)
            .zip(&kinds)
            .map(|(slot, &kind)| prepare(raw, slot, kind, &mut random))
            .collect();
        log.clear().expect("a log");
        let before = raw.get(0, MEMORY_BYTES as usize).expect("memory");
        raw.offer_all(&heads).expect("a kick");
        wait(raw, heads.len(), daemon);
        // The used ring is marked when it was written.
        let ring = (GUEST_BASE + USED) / PAGE..(GUEST_BASE + USED) / PAGE + 3;
        let changed: BTreeSet<u64> = changed(raw, &before)
            .into_iter()
            // What the driver writes.
            .filter(|page| *page >= ring.start)
            .collect();
        let deadline = Instant::now() + PATIENCE;
        let mut marked = log.pages().expect("a log");
        while !changed.is_subset(&marked) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
            marked = log.pages().expect("a log");
        }
        let lost: Vec<_> = changed.difference(&marked).map(|page| format!("{page:#x}")).collect();
        assert!(
            lost.is_empty(),
            "seed {seed}, round {round}: {kinds:?} have changed pages {lost:?}, which are not marked\n{}",
            daemon.log()
        );
        for page in &marked {
            let offset = page * PAGE - GUEST_BASE;
            let slot = offset.wrapping_sub(FREE) / SLOT;
            let place = offset.wrapping_sub(FREE) % SLOT / PAGE;
            let is_ring = ring.contains(page);
            let kind = kinds.get(slot as usize).copied().filter(|_| offset >= FREE);
            assert!(
                is_ring || kind.is_some() && place != 0,
                "seed {seed}, round {round}: page {page:#x} is marked, and nothing was written there: {kinds:?}"
            );
            if !changed.contains(page) {
                continue;
            }
            match kind {
                _ if is_ring => seen.ring += 1,
                _ if place == 1 => seen.status += 1,
                Some(Kind::GetId) => seen.identity += 1,
                Some(Kind::Read) => seen.data += 1,
                // A status behind what would be data.
                _ => seen.status += 1,
            }
        }
    }
    seen
}

fn assert_all_seen(seen: &Seen, rounds: usize) {
    assert!(
        seen.data > rounds && seen.status > rounds && seen.ring >= rounds,
        "hardly anything was looked at: {seen:?}"
    );
    assert!(seen.identity > rounds / 4, "no identity was looked at: {seen:?}");
}

/// A disk image with nothing in it that memory is filled with.
fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new_in(disk_directory().keep()).expect("a file");
    file.write_all(&vec![0x3c; DISK as usize]).expect("an image");
    file.as_file().sync_all().expect("an image");
    file
}

fn start(daemon: &Daemon, log: &DirtyLog) -> RawSession {
    let wanted = features::USUAL & !features::EVENT_IDX;
    let raw = RawSession::start(daemon.socket(), wanted, SIZE).expect("a session");
    raw.give_log(log).expect("a log is taken");
    raw.turn_log(true).expect("it is turned on");
    raw
}

fn every_page_is_marked(args: &[&str]) {
    let daemon = Daemon::start(args);
    let log = DirtyLog::new(END).expect("a log");
    let mut raw = start(&daemon, &log);
    let seen = rounds(&mut raw, &log, &daemon, 120, 0x5eed);
    println!("{args:?}: {seen:?}");
    assert_all_seen(&seen, 120);
    raw.turn_log(false).expect("it is turned off");
    // What was answered before may have been marked until then.
    log.clear().expect("a log");
    let head = prepare(&raw, 0, Kind::Read, &mut Random(7));
    raw.offer_all(&[head]).expect("a kick");
    wait(&mut raw, 1, &daemon);
    assert_eq!(log.pages().expect("a log"), BTreeSet::new(), "it is off");
}

const RAMDISK: &[&str] = &["--domain", "ramdisk", "--param", "size=16M"];

#[test]
fn a_copy_is_marked() {
    every_page_is_marked(RAMDISK);
}

#[test]
fn a_copy_is_marked_without_a_supervisor() {
    every_page_is_marked(&[RAMDISK, &["--no-supervisor"]].concat());
}

#[test]
fn what_the_kernel_writes_is_marked() {
    let image = image();
    let path = image.path().to_str().expect("UTF-8");
    for params in
        [&["direct=true"][..], &["direct=false"], &["aio=sync"], &["aio=sync", "direct=true"]]
    {
        let params = params.iter().flat_map(|param| ["--param", param]);
        let args: Vec<&str> = ["--blk-file", path].into_iter().chain(params).collect();
        every_page_is_marked(&args);
    }
}

/// A request that was taken before the log was turned on is answered after it.
#[test]
fn what_was_in_flight_before_is_marked() {
    let args = ["--domain", "faulty", "--param", "fault=request:stall:2", "--param", "size=16M"];
    for more in [&[][..], &["--no-supervisor"]] {
        let daemon = Daemon::start(&[&args[..], more].concat());
        let log = DirtyLog::new(END).expect("a log");
        let wanted = features::USUAL & !features::EVENT_IDX;
        let mut raw = RawSession::start(daemon.socket(), wanted, SIZE).expect("a session");
        let mut random = Random(3);
        let heads = [0, 1].map(|slot| prepare(&raw, slot, Kind::Read, &mut random));
        let before = raw.get(0, MEMORY_BYTES as usize).expect("memory");
        raw.offer_all(&heads).expect("a kick");
        wait(&mut raw, 1, &daemon);
        let first = changed(&raw, &before);
        raw.give_log(&log).expect("a log is taken");
        raw.turn_log(true).expect("it is turned on");
        let before = raw.get(0, MEMORY_BYTES as usize).expect("memory");
        assert_eq!(raw.used(Duration::ZERO).expect("memory"), None, "it stalls for three seconds");
        wait(&mut raw, 1, &daemon);
        let _ = raw.stop_ring().expect("an answer");
        let (changed, marked) = (changed(&raw, &before), log.pages().expect("a log"));
        assert!(changed.len() > 1, "{changed:?} after {first:?}");
        assert!(changed.is_subset(&marked), "{changed:?} are not all in {marked:?}");
    }
}

/// A read into memory that came while the log was on.
#[test]
fn memory_that_comes_later_is_logged() {
    for more in [&[][..], &["--no-supervisor"]] {
        let daemon = Daemon::start(&[RAMDISK, more].concat());
        let log = DirtyLog::new(END).expect("a log");
        let mut raw = start(&daemon, &log);
        raw.plug(0).expect("memory");
        raw.put_plugged(0, &[0xa5; 4 << 12]).expect("memory");
        raw.put(FREE, &[0; 16]).expect("memory");
        let (at, plugged) = (GUEST_BASE + FREE, PLUGGED_BASE + 4000);
        raw.chain(0, &[(at, 16, 0), (plugged, 8192, WRITE), (PLUGGED_BASE + 3 * PAGE, 1, WRITE)])
            .expect("memory");
        log.clear().expect("a log");
        raw.offer(0).expect("a kick");
        wait(&mut raw, 1, &daemon);
        let first = PLUGGED_BASE / PAGE;
        let marked: Vec<u64> =
            log.pages().expect("a log").into_iter().filter(|page| *page >= first).collect();
        assert_eq!(marked, [first, first + 1, first + 2, first + 3]);
    }
}

#[test]
fn a_log_that_is_too_small_is_refused() {
    for more in [&[][..], &["--no-supervisor"]] {
        let daemon = Daemon::start(&[RAMDISK, more].concat());
        let raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
        let log = DirtyLog::new(GUEST_BASE).expect("a log");
        assert!(raw.give_log(&log).is_err(), "it has no bit for any page of this guest");
        assert!(raw.wait_for_end(PATIENCE).expect("a socket"));
        drop(raw);
        RawSession::start(daemon.socket(), features::USUAL, 64)
            .expect("the next session")
            .assert_one_read();
        let log = daemon.log();
        assert!(log.contains("no room for guest memory"), "{log}");
    }
}

/// A file that is shorter than the frontend says would be a signal to whom marks in it.
#[test]
fn a_log_that_is_shorter_than_it_says_is_refused_by_the_supervisor() {
    let daemon = Daemon::start(RAMDISK);
    let raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    let log = DirtyLog::new(GUEST_BASE).expect("a log");
    assert!(raw.give_log_of(&log, 1 << 20).is_err());
    assert!(raw.wait_for_end(PATIENCE).expect("a socket"));
    assert_eq!(daemon.status()["server"]["deaths"], 0);
    assert!(daemon.log().contains("its file at"), "{}", daemon.log());
}

/// The log is turned on and off while requests run, and none is lost or answered twice.
#[test]
fn the_log_is_turned_on_and_off_under_a_load() {
    let image = image();
    let path = image.path().to_str().expect("UTF-8");
    let file = ["--blk-file", path, "--param", "direct=true"];
    for args in [RAMDISK.to_vec(), file.to_vec(), [RAMDISK, &["--no-supervisor"]].concat()] {
        let daemon = Daemon::start(&args);
        let log = DirtyLog::new(END).expect("a log");
        let mut raw = start(&daemon, &log);
        let mut random = Random(11);
        for round in 0..400_u32 {
            let heads: Vec<u16> =
                (0..SLOTS).map(|slot| prepare(&raw, slot, Kind::Read, &mut random)).collect();
            raw.offer_all(&heads).expect("a kick");
            if round % 10 == 0 {
                raw.give_log(&log).expect("a log is taken");
            }
            raw.turn_log(round % 2 == 0).expect("an answer");
            let mut answered: Vec<u32> = (0..SLOTS)
                .map(|_| raw.used(PATIENCE).expect("memory").expect("an answer").0)
                .collect();
            answered.sort_unstable();
            let expected: Vec<u32> = heads.iter().map(|&head| u32::from(head)).collect();
            assert_eq!(answered, expected, "round {round}\n{}", daemon.log());
        }
        assert_eq!(raw.used(Duration::from_millis(50)).expect("memory"), None, "one too many");
    }
}

/// The log outlives what serves: upgrades, a domain's death, the server's, and both exchanges.
#[test]
fn the_log_is_kept() {
    let daemon = Daemon::start(RAMDISK);
    let log = DirtyLog::new(END).expect("a log");
    let mut raw = start(&daemon, &log);
    let mut seed = 1;
    let mut look = |raw: &mut RawSession, what: &str| {
        seed += 1;
        println!("after {what}: {:?}", rounds(raw, &log, &daemon, 10, seed));
    };
    look(&mut raw, "nothing");
    daemon.call(&["upgrade", "ramdisk"]);
    look(&mut raw, "an upgrade");
    for kills in 1..=3_u64 {
        let pid = Pid::from_raw(daemon.server_pid() as i32).expect("a process");
        kill_process(pid, Signal::KILL).expect("it lives");
        let deadline = Instant::now() + PATIENCE;
        while daemon.status()["server"]["recoveries"] != json!(kills) {
            assert!(Instant::now() < deadline, "no recovery:\n{}", daemon.log());
            thread::sleep(Duration::from_millis(5));
        }
        look(&mut raw, "a death");
    }
    for only in ["server", "supervisor"] {
        daemon.call(&["upgrade-daemon", "--only", only]);
        look(&mut raw, only);
    }
    daemon.call(&["upgrade-daemon"]);
    look(&mut raw, "an exchange of both");
    // A migration that is over leaves nothing behind that a later server could stumble over.
    raw.turn_log(false).expect("an answer");
    raw.plug(16 << 20).expect("memory that the log has no bits for");
    daemon.call(&["upgrade-daemon", "--only", "server"]);
    raw.assert_one_read();
}

/// Requests that a server had in flight when it was killed are run and marked by the next.
#[test]
fn what_a_dead_server_had_in_flight_is_marked() {
    let args = ["--domain", "faulty", "--param", "fault=request:stall:1", "--param", "size=16M"];
    let daemon = Daemon::start(&args);
    let log = DirtyLog::new(END).expect("a log");
    let mut raw = start(&daemon, &log);
    let mut random = Random(5);
    let heads: Vec<u16> =
        (0..SLOTS).map(|slot| prepare(&raw, slot, Kind::Read, &mut random)).collect();
    let before = raw.get(0, MEMORY_BYTES as usize).expect("memory");
    raw.offer_all(&heads).expect("a kick");
    wait(&mut raw, heads.len() - 1, &daemon);
    log.clear().expect("a log");
    let pid = Pid::from_raw(daemon.server_pid() as i32).expect("a process");
    kill_process(pid, Signal::KILL).expect("it lives");
    wait(&mut raw, 1, &daemon);
    let head = GUEST_BASE / PAGE + FREE / PAGE;
    let stalled: BTreeSet<u64> =
        changed(&raw, &before).into_iter().filter(|page| *page >= head).collect();
    let marked = log.pages().expect("a log");
    // The used ring is marked whole, because the dead server may not have marked its last answers.
    let ring = (GUEST_BASE + USED) / PAGE;
    assert!([ring, ring + 1, ring + 2].iter().all(|page| marked.contains(page)), "{marked:?}");
    let again: Vec<_> = stalled.intersection(&marked).collect();
    assert!(again.len() > 1, "{marked:?} has nothing of {stalled:?}");
}
