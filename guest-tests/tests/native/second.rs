//! A second frontend on a socket in use: it is answered, and its rings run when those of the first
//! have stopped. What cannot wait is turned away, and never left standing.

use std::io;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::features;
use guest_tests::client::raw::RawSession;
use guest_tests::daemon::Daemon;
use rustix::process::{Pid, Signal, kill_process};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

const SOON: Duration = Duration::from_secs(10);

fn ramdisk() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--param", "size=16M"])
}

fn guest(daemon: &Daemon) -> RawSession {
    let mut guest = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    guest.assert_one_read();
    guest
}

/// Whether its other side ends this connection within `limit`.
fn is_ended(stream: &UnixStream, limit: Duration) -> bool {
    use std::io::Read;
    stream.set_read_timeout(Some(limit)).expect("a socket");
    match (&mut &*stream).read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
    }
}

#[track_caller]
fn says(daemon: &Daemon, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !daemon.log().contains(what) {
        assert!(Instant::now() < deadline, "`{what}` is not in {}", daemon.log());
        thread::sleep(Duration::from_millis(5));
    }
}

/// Asks all that QEMU asks before it starts a ring, in `limit`.
fn asks(session: &mut RawSession, limit: Duration) {
    use vhost::vhost_user::message::VhostUserConfigFlags;
    let began = Instant::now();
    let frontend = &mut session.frontend;
    assert_ne!(frontend.get_features().expect("features"), 0);
    assert_eq!(frontend.get_queue_num().expect("queues"), 1);
    let (_, config) = frontend
        .get_config(0, 57, VhostUserConfigFlags::empty(), &[0; 57])
        .expect("a configuration");
    let sectors = u64::from_le_bytes(config[..8].try_into().expect("8 bytes"));
    assert_eq!(sectors, (16 << 20) / 512);
    assert!(began.elapsed() < limit, "{:?}", began.elapsed());
}

/// As QEMU does that begins: a reset, which is to touch no other session's rings, and memory.
fn sets_up(session: &mut RawSession) {
    let frontend = &mut session.frontend;
    let offered = frontend.get_features().expect("features");
    frontend.reset_device().expect("a reset");
    frontend.set_features(offered & features::USUAL | 1 << 30).expect("features");
    session.share_memory().expect("memory");
}

#[test]
fn two_frontends_take_turns() {
    let daemon = ramdisk();
    let mut first = guest(&daemon);
    let mut second =
        RawSession::connect(daemon.socket(), features::USUAL).expect("a second session");
    asks(&mut second, Duration::from_secs(5));
    sets_up(&mut second);
    first.assert_one_read();
    // As QEMU does that takes the guest over: its ring is where the other one has left it.
    second.start_ring(64).expect("a ring");
    second.offer_read().expect("a read");
    assert!(second.used(Duration::from_millis(300)).expect("memory").is_none(), "both run");
    first.assert_one_read();
    first.stop_ring().expect("a stop");
    assert!(second.used(PATIENCE).expect("memory").is_some(), "{}", daemon.log());
    second.assert_one_read();
    // The first one is there still, and answered; and its guest goes on if the other has failed.
    asks(&mut first, Duration::from_secs(5));
    sets_up(&mut first);
    first.start_ring(64).expect("a ring");
    first.offer_read().expect("a read");
    assert!(first.used(Duration::from_millis(300)).expect("memory").is_none(), "both run");
    drop(second);
    assert!(first.used(PATIENCE).expect("memory").is_some(), "{}", daemon.log());
    // And once more to and fro, by its leaving.
    let mut third = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    third.offer_read().expect("a read");
    assert!(third.used(Duration::from_millis(100)).expect("memory").is_none());
    drop(first);
    assert!(third.used(PATIENCE).expect("memory").is_some(), "{}", daemon.log());
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn a_ring_that_waits_is_stopped_where_it_was_to_begin() {
    let daemon = ramdisk();
    let mut first = guest(&daemon);
    let mut second = RawSession::connect(daemon.socket(), features::USUAL).expect("a session");
    second.share_memory().expect("memory");
    second.start_ring_at(64, 17).expect("a ring");
    assert_eq!(second.stop_ring().expect("a stop"), 17);
    first.stop_ring().expect("a stop");
    first.start_ring(64).expect("a ring");
    first.assert_one_read();
}

/// As one that does not wait is, in the log of whoever started it.
#[test]
fn a_ring_that_waits_and_is_too_large_is_refused_with_the_name_of_the_option() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queue-size", "256"]);
    let mut first = guest(&daemon);
    for (size, cure) in
        [(512, "start the daemon with --queue-size 512"), (100, "100 entries, which is no power")]
    {
        let second = RawSession::start(daemon.socket(), features::USUAL, size);
        assert!(second.is_err(), "{size} is accepted");
        says(&daemon, cure);
        drop(second);
        daemon.wait_until("it still waits", |_| {
            let log = daemon.log();
            log.matches("a second frontend has connected").count()
                == log.matches("the session that waited ended").count()
        });
    }
    first.assert_one_read();
}

#[test]
fn a_third_and_a_silent_one_are_turned_away() {
    let daemon = ramdisk();
    let mut first = guest(&daemon);
    let silent = UnixStream::connect(daemon.socket()).expect("a socket");
    let third = UnixStream::connect(daemon.socket()).expect("a socket");
    let began = Instant::now();
    assert!(is_ended(&third, Duration::from_secs(2)), "a third is left standing");
    says(&daemon, "a third frontend has connected, and is turned away");
    assert!(is_ended(&silent, SOON), "one that says nothing is left standing");
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    says(&daemon, "a second frontend has said nothing, and is turned away");
    first.assert_one_read();
    // There is room again.
    let mut second = RawSession::connect(daemon.socket(), features::USUAL).expect("a session");
    asks(&mut second, Duration::from_secs(5));
    thread::sleep(Duration::from_secs(3));
    asks(&mut second, Duration::from_secs(5));
    drop(second);
    says(&daemon, "the frontend that waited has disconnected");
    first.assert_one_read();
}

#[test]
fn a_second_frontend_waits_over_deaths_and_exchanges() {
    let daemon = ramdisk();
    let mut first = guest(&daemon);
    let mut second = RawSession::connect(daemon.socket(), features::USUAL).expect("a session");
    sets_up(&mut second);
    second.start_ring(64).expect("a ring");
    second.offer_read().expect("a read");
    let kill = || {
        let server = Pid::from_raw(daemon.server_pid() as i32).expect("a process");
        kill_process(server, Signal::KILL).expect("a kill");
    };
    for exchange in [true, false] {
        if exchange {
            assert_eq!(daemon.ctl(&["upgrade-daemon"]).status, 0);
        } else {
            kill();
        }
        first.assert_one_read();
        asks(&mut second, SOON);
        assert!(second.used(Duration::from_millis(100)).expect("memory").is_none(), "{exchange}");
    }
    first.stop_ring().expect("a stop");
    assert!(second.used(PATIENCE).expect("memory").is_some(), "{}", daemon.log());
    kill();
    second.assert_one_read();
    asks(&mut first, SOON);
    assert_eq!(daemon.ctl(&["upgrade-daemon"]).status, 0);
    second.assert_one_read();
}

#[test]
fn without_a_supervisor_a_second_one_is_turned_away() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--no-supervisor"]);
    let mut first = guest(&daemon);
    for _ in 0..2 {
        let second = UnixStream::connect(daemon.socket()).expect("a socket");
        assert!(is_ended(&second, Duration::from_secs(5)), "it is left standing");
    }
    says(&daemon, "a second frontend has connected, and is turned away");
    first.assert_one_read();
    // One that hangs up and comes again at once is none.
    for _ in 0..20 {
        drop(first);
        first = guest(&daemon);
    }
    assert_eq!(daemon.terminate(), 0);
}
