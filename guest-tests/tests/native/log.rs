//! What the log says about what goes wrong outside of the daemon: a line, with what to do, and not
//! the same line again and again.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::features;
use guest_tests::client::raw::{FREE, GUEST_BASE, RawSession, WRITE};
use guest_tests::daemon::Daemon;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{self, VhostUserFrontend};
use vhost::{Error, VhostBackend};

const QUEUE_SIZE: u16 = 64;
const ANSWER: Duration = Duration::from_secs(20);
/// Where there is no memory.
const OUTSIDE: u64 = 0x1000;
/// How often things are done that would be said each time.
const OFTEN: usize = 5;

fn start() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--param", "size=1M"])
}

fn session(daemon: &Daemon) -> RawSession {
    RawSession::start(daemon.socket(), features::USUAL, QUEUE_SIZE).expect("a session")
}

/// The lines of the log that hold `what`.
fn lines(daemon: &Daemon, what: &str) -> Vec<String> {
    daemon.log().lines().filter(|line| line.contains(what)).map(str::to_owned).collect()
}

/// Waits for a line that holds `what`, which must not be there more often than every ten seconds.
fn the_line(daemon: &Daemon, since: Instant, what: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let lines = lines(daemon, what);
        assert!(lines.len() as u64 <= most(since), "{what:?} is too often in\n{}", daemon.log());
        match lines.into_iter().next() {
            Some(line) => return line,
            None => assert!(Instant::now() < deadline, "{what:?} is not in\n{}", daemon.log()),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// How often a line may be there.
fn most(since: Instant) -> u64 {
    1 + since.elapsed().as_secs() / 10
}

/// A read with its data and its status there. Returns the length in the used ring.
fn read(raw: &mut RawSession, data: u64, status: u64) -> u32 {
    raw.put(FREE, &[0; 16]).expect("memory");
    raw.chain(0, &[(GUEST_BASE + FREE, 16, 0), (data, 512, WRITE), (status, 1, WRITE)])
        .expect("memory");
    raw.offer(0).expect("a kick");
    raw.used(ANSWER).expect("memory").expect("an answer").1
}

const DATA: u64 = GUEST_BASE + FREE + 0x2000;
const STATUS: u64 = GUEST_BASE + FREE + 0x1000;

/// Memory that was plugged in without `share=on`, say.
#[test]
fn buffers_outside_of_shared_memory_are_said_once() {
    let (daemon, since) = (start(), Instant::now());
    let mut raw = session(&daemon);
    assert_eq!(read(&mut raw, DATA, STATUS), 513);
    for _ in 0..OFTEN {
        read(&mut raw, OUTSIDE, STATUS);
        assert_eq!(raw.get(STATUS - GUEST_BASE, 1).expect("memory"), [1]);
    }
    let line = the_line(&daemon, since, "buffer at guest address 0x1000");
    assert!(line.contains("WARN") && line.contains("share=on"), "{line}");
    assert!(lines(&daemon, "WARN").len() as u64 <= most(since), "{}", daemon.log());
}

/// The firmware of a microvm has its status byte in memory that QEMU does not share. How often it
/// connects is the frontend's to say.
#[test]
fn malformed_chains_are_said_once() {
    let (daemon, since) = (start(), Instant::now());
    for _ in 0..2 {
        let mut raw = session(&daemon);
        for _ in 0..OFTEN {
            read(&mut raw, DATA, OUTSIDE);
        }
        assert_eq!(read(&mut raw, DATA, STATUS), 513);
        let line = the_line(&daemon, since, "chain 0 is malformed");
        assert!(line.contains("WARN") && line.contains("the status byte is outside"), "{line}");
        assert!(line.contains("0x1000") && line.contains("aux-ram-share=on"), "{line}");
    }
}

/// The size is the frontend's to choose, and there are more than there are kinds to remember.
#[test]
fn refused_rings_are_said_once_whatever_their_sizes() {
    let (daemon, since) = (start(), Instant::now());
    let mut refused = (0..2000).map(|n| 3 + 2 * (n % 200));
    let mut sent = 0;
    while sent <= 64 {
        let raw = RawSession::connect(daemon.socket(), features::USUAL).expect("a connection");
        // Refused, or, without a supervisor, acknowledged all the same.
        let is_heard = |size| match raw.frontend.set_vring_num(0, size) {
            Ok(()) | Err(Error::VhostUserProtocol(vhost_user::Error::BackendInternalError)) => true,
            Err(_) => false,
        };
        // The first one ends the session, though not at once.
        let heard = refused.by_ref().take_while(|&size| is_heard(size)).count();
        assert!(heard > 0, "nothing more is heard:\n{}", daemon.log());
        sent += heard;
        assert!(raw.wait_for_end(ANSWER).expect("a connection"), "the session goes on");
    }
    let line = the_line(&daemon, since, "is refused: the frontend wants a ring");
    assert!(line.contains("ERROR") && line.contains("of 3 entries"), "{line}");
}

/// A session that ends before memory is shared does not end for want of that.
#[test]
fn a_bad_write_to_the_configuration_is_said_once_as_what_it_is() {
    let (daemon, since) = (start(), Instant::now());
    for offset in 200..200 + OFTEN as u32 {
        let mut raw = RawSession::connect(daemon.socket(), features::USUAL).expect("a connection");
        let _ = raw.frontend.set_config(offset, VhostUserConfigFlags::empty(), &[0]);
        assert!(raw.wait_for_end(ANSWER).expect("a connection"), "the session goes on");
    }
    let line = the_line(&daemon, since, "the session ended: ");
    assert!(line.contains("200") && !line.contains("share=on"), "{line}");
    // Nor does one in which a ring is to have no entry.
    let daemon = start();
    let raw = RawSession::connect(daemon.socket(), features::USUAL).expect("a connection");
    let _ = raw.frontend.set_vring_num(0, 0);
    assert!(raw.wait_for_end(ANSWER).expect("a connection"), "the session goes on");
    let line = the_line(&daemon, Instant::now(), "the session ended: ");
    assert!(!line.contains("share=on"), "{line}");
}

/// QEMU without a memory backend shares nothing, and sets up the rings all the same.
#[test]
fn a_guest_without_shared_memory_is_said_once() {
    let (daemon, since) = (start(), Instant::now());
    for _ in 0..OFTEN {
        let raw = RawSession::connect(daemon.socket(), features::USUAL).expect("a connection");
        raw.frontend.set_vring_num(0, QUEUE_SIZE).expect("a size");
        raw.place_ring(0, 0x1_0000, 0x2_0000).expect_err("a ring without memory");
    }
    let line = the_line(&daemon, since, "none of the guest's memory is shared");
    assert!(line.contains("share=on") && line.contains("memory-backend="), "{line}");
    for _ in 0..OFTEN {
        let raw = session(&daemon);
        raw.stop_ring().expect("stopped");
        raw.place_ring(1 << 40, 1 << 40, 1 << 40).expect_err("a ring outside of memory");
        drop(raw);
    }
    let line = the_line(&daemon, since, "a ring is outside of the guest's memory");
    assert!(line.contains("share=on"), "{line}");
    assert!(lines(&daemon, "WARN").len() as u64 <= 2 * most(since), "{}", daemon.log());
}

/// QEMU with a memfd and `share=off` shares memory that its guest does not use.
#[test]
fn a_ring_in_which_nothing_ever_comes_is_said_once() {
    let (daemon, good, since) = (start(), start(), Instant::now());
    // It has the time that the other one has, and more.
    let mut served = session(&good);
    assert_eq!(read(&mut served, DATA, STATUS), 513);
    let mut raw = session(&daemon);
    raw.jump(0).expect("a kick");
    let line = the_line(&daemon, since, "nothing in the guest's first ring");
    assert!(line.contains("WARN") && line.contains("share=on"), "{line}");
    assert!(lines(&good, "WARN").is_empty(), "{}", good.log());
}

#[test]
fn a_lack_of_descriptors_is_said_once_with_its_cure() {
    let daemon = Daemon::start_with_ulimit("-n 60", &["--domain", "empty", "--queues", "64"]);
    let since = Instant::now();
    // Each try takes a tenth of a second.
    let waiting = UnixStream::connect(daemon.socket()).expect("a connection");
    thread::sleep(Duration::from_secs(1));
    let line = the_line(&daemon, since, "Too many open files");
    assert!(line.contains("LimitNOFILE=") && line.contains("--queues"), "{line}");
    drop(waiting);
    // And as many clients as the control socket takes.
    let daemon = Daemon::start_with_ulimit("-n 30", &["--domain", "empty"]);
    let since = Instant::now();
    let clients: Vec<_> = (0..30).map(|_| UnixStream::connect(daemon.control())).collect();
    let line = the_line(&daemon, since, "cannot accept a client");
    thread::sleep(Duration::from_secs(1));
    assert!(line.contains("LimitNOFILE="), "{line}");
    the_line(&daemon, since, "cannot accept a client");
    drop(clients);
}
