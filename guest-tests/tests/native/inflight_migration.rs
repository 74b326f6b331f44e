//! A guest is migrated away from storage that hangs: its ring stops at once, what is in flight
//! stays in the in-flight region, and the daemon that it is migrated to runs it.
//!
//! Memory goes over as QEMU sends it: all of it when the log is turned on, and what is marked when
//! the ring has stopped.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::client::dirty::{DirtyLog, PAGE};
use guest_tests::client::features;
use guest_tests::client::raw::{FREE, GUEST_BASE, MEMORY_BYTES, RawSession, USED, WRITE};
use guest_tests::daemon::Daemon;
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};

const SECOND: Duration = Duration::from_secs(1);
const SIZE: u16 = 64;
/// Requests that are in flight.
const REQUESTS: u16 = 8;
/// How long requests are held up.
const HELD_UP: Duration = Duration::from_secs(3);

fn connect(daemon: &Daemon) -> RawSession {
    let more = VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT;
    let wanted = features::USUAL & !features::EVENT_IDX;
    let mut session = RawSession::connect_with(daemon.socket(), wanted, more).expect("a session");
    let offered = session.frontend.get_protocol_features().expect("an answer");
    assert!(offered.contains(more), "{offered:?}");
    session
}

/// Writes the requests down and offers them: reads with a page each, and a page for the status.
fn offer(raw: &mut RawSession) {
    let heads: Vec<u16> = (0..REQUESTS).map(|number| number * 3).collect();
    for (number, &head) in (0..).zip(&heads) {
        let at = FREE + number * 4 * PAGE;
        raw.put(at, &[0; 8]).expect("memory");
        raw.put(at + 8, &(number * 8).to_le_bytes()).expect("memory");
        raw.put(at + PAGE, &[0xa5; 4096]).expect("memory");
        raw.put(at + 2 * PAGE, &[0xee]).expect("memory");
        let base = GUEST_BASE + at;
        raw.chain(head, &[(base, 16, 0), (base + PAGE, 4096, WRITE), (base + 2 * PAGE, 1, WRITE)])
            .expect("memory");
    }
    raw.offer_all(&heads).expect("a kick");
}

/// The status of each request in memory, and whether its data has come.
fn answers(raw: &RawSession) -> Vec<(u8, bool)> {
    let answer = |number| {
        let at = FREE + number * 4 * PAGE;
        let data = raw.get(at + PAGE, 4096).expect("memory");
        (raw.get(at + 2 * PAGE, 1).expect("memory")[0], data == [0; 4096])
    };
    (0..u64::from(REQUESTS)).map(answer).collect()
}

fn used_index(raw: &RawSession) -> u16 {
    let bytes = raw.get(USED + 2, 2).expect("memory");
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// Heads that are answered within `limit`, of so many.
fn take(raw: &mut RawSession, most: usize, limit: Duration) -> Vec<u32> {
    let deadline = Instant::now() + limit;
    let mut heads = Vec::new();
    while heads.len() < most {
        match raw.used(deadline.saturating_duration_since(Instant::now())).expect("memory") {
            Some((head, _)) => heads.push(head),
            None => break,
        }
    }
    heads
}

/// A session that was stopped with requests in flight.
struct Stopped {
    daemon: Daemon,
    raw: RawSession,
    log: DirtyLog,
    place: VhostUserInflight,
    region: File,
    /// As it was when the log was turned on, and afterwards where that says so.
    memory: Vec<u8>,
    base: u16,
    answered: Vec<u32>,
}

impl Stopped {
    /// The first three requests are answered, or as many as there are before one is held up.
    fn new(fault: &str) -> Self {
        let daemon =
            Daemon::start(&["--domain", "faulty", "--param", fault, "--param", "size=16M"]);
        let mut raw = connect(&daemon);
        let wanted = VhostUserInflight::new(0, 0, 1, SIZE);
        let (place, region) = raw.frontend.get_inflight_fd(&wanted).expect("a region");
        raw.frontend.set_inflight_fd(&place, region.as_raw_fd()).expect("it is taken");
        raw.share_memory().expect("memory");
        raw.start_ring(SIZE).expect("a ring");
        let log = DirtyLog::new(GUEST_BASE + MEMORY_BYTES).expect("a log");
        raw.give_log(&log).expect("it is taken");
        raw.turn_log(true).expect("it is on");
        offer(&mut raw);
        // A driver's writes are logged by the frontend itself.
        let memory = raw.get(0, MEMORY_BYTES as usize).expect("memory");
        let answered = take(&mut raw, usize::from(REQUESTS), SECOND);
        let began = Instant::now();
        let base = raw.stop_ring().expect("an answer") as u16;
        let took = began.elapsed();
        println!("{fault}: answered {answered:?}; the ring stopped within {took:?} at {base}");
        assert!(took < SECOND, "{took:?}, and it is held up for {HELD_UP:?}");
        assert!(answered.len() < usize::from(REQUESTS), "nothing was held up");
        let mut stopped = Self { daemon, raw, log, place, region, memory, base, answered };
        stopped.copy_marked();
        stopped
    }

    fn copy_marked(&mut self) {
        for page in self.log.pages().expect("a log") {
            let at = page * PAGE - GUEST_BASE;
            let now = self.raw.get(at, PAGE as usize).expect("memory");
            self.memory[at as usize..][..PAGE as usize].copy_from_slice(&now);
        }
    }

    /// What must be run still.
    fn left(&self) -> Vec<u32> {
        let heads = (0..u32::from(REQUESTS)).map(|number| number * 3);
        heads.filter(|head| !self.answered.contains(head)).collect()
    }

    /// The daemon that the guest is migrated to runs what is left.
    fn goes_on_elsewhere(&self) {
        let other = Daemon::start(&["--domain", "ramdisk", "--param", "size=16M"]);
        let mut raw = connect(&other);
        let file = File::from(memfd_create("inflight", MemfdFlags::CLOEXEC).expect("a memfd"));
        let mut bytes = vec![0; self.place.mmap_size as usize];
        self.region.read_exact_at(&mut bytes, self.place.mmap_offset).expect("a region");
        file.write_all_at(&bytes, 0).expect("a region");
        let place = VhostUserInflight::new(bytes.len() as u64, 0, 1, SIZE);
        raw.frontend.set_inflight_fd(&place, file.as_raw_fd()).expect("it is taken");
        raw.put(0, &self.memory).expect("memory");
        raw.share_memory().expect("memory");
        raw.resume_ring(SIZE, self.base, self.answered.len() as u16).expect("a ring");
        let left = self.left();
        let mut heads = take(&mut raw, usize::from(REQUESTS), 2 * SECOND);
        heads.sort_unstable();
        assert_eq!(heads, left, "{}", other.log());
        assert_eq!(answers(&raw), vec![(0, true); usize::from(REQUESTS)]);
    }

    /// Nothing was answered in the memory that the guest has left.
    fn stays_silent(&self, fault: &str) {
        thread::sleep(HELD_UP + SECOND / 2);
        assert_eq!(usize::from(used_index(&self.raw)), self.answered.len());
        if fault == HANG {
            // A worker that comes back late writes them; its buffers are its own still.
            return;
        }
        let now = answers(&self.raw);
        for head in self.left() {
            assert_eq!(now[head as usize / 3].0, 0xee, "the status of {head} was written");
        }
    }

    /// The migration has failed, and the ring goes on here.
    fn goes_on_here(&mut self) {
        self.raw.turn_log(false).expect("an answer");
        self.raw
            .resume_ring(SIZE, self.base, self.answered.len() as u16)
            .expect("the ring goes on");
        let left = self.left();
        let mut heads = take(&mut self.raw, left.len() + 1, HELD_UP + 2 * SECOND);
        heads.sort_unstable();
        assert_eq!(heads, left, "{}", self.daemon.log());
        assert_eq!(answers(&self.raw), vec![(0, true); usize::from(REQUESTS)]);
    }
}

/// One request stays with the domain; the others end.
const STALL: &str = "fault=request:stall:3";
/// The worker does not come back from the domain.
const HANG: &str = "fault=request:hang:3";

#[test]
fn what_is_in_flight_is_run_where_the_guest_is_migrated_to() {
    for fault in [STALL, HANG] {
        let stopped = Stopped::new(fault);
        stopped.goes_on_elsewhere();
        stopped.stays_silent(fault);
    }
}

#[test]
fn what_is_in_flight_is_run_here_if_the_migration_fails() {
    for fault in [STALL, HANG] {
        Stopped::new(fault).goes_on_here();
    }
}

/// After the answer to what was in flight has come in vain, too.
#[test]
fn what_has_ended_meanwhile_is_run_again() {
    let mut stopped = Stopped::new(STALL);
    stopped.stays_silent(STALL);
    stopped.goes_on_here();
}

/// Without a migration a ring that stops has nothing in flight: its memory may get another use.
#[test]
fn without_a_log_a_ring_is_waited_for() {
    let daemon = Daemon::start(&["--domain", "faulty", "--param", STALL, "--param", "size=16M"]);
    let mut raw = connect(&daemon);
    raw.share_memory().expect("memory");
    raw.start_ring(SIZE).expect("a ring");
    offer(&mut raw);
    let answered = take(&mut raw, usize::from(REQUESTS), SECOND);
    assert_eq!(raw.stop_ring().expect("an answer"), u32::from(REQUESTS));
    assert_eq!(usize::from(used_index(&raw)), usize::from(REQUESTS), "after {answered:?}");
}
