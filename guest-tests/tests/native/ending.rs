//! How the daemon ends, and what must not keep it from ending or from going on.

use std::fs;
use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::raw::{FREE, GUEST_BASE, RawSession, WRITE};
use guest_tests::client::{Client, Options, Request, Status, features};
use guest_tests::daemon::{Daemon, binary};
use rustix::process::{Pid, Signal, kill_process};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn sighup_ends_as_sigterm_does() {
    // The caller of this test may have it ignored (`nohup`).
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP").arg(binary("vhost-hotswap"));
    let mut daemon = Daemon::start_command(command, &["--domain", "ramdisk"]);
    let (code, took) = daemon.stop_with(Signal::HUP);
    assert_eq!(code, 0, "{}", daemon.log());
    assert!(took < 5 * SECOND, "{took:?}");
    assert!(!daemon.socket().exists() && !daemon.control().exists(), "the sockets are left");
}

#[test]
fn sighup_is_nothing_to_a_daemon_that_was_told_so() {
    // As `nohup` does it.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(binary("vhost-hotswap"));
    let daemon = Daemon::start_command(command, &["--domain", "ramdisk"]);
    daemon.signal(Signal::HUP);
    thread::sleep(SECOND / 5);
    assert_eq!(daemon.status()["state"], "serving");
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn sigterm_while_a_domain_is_being_prepared_ends_at_once() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("vhost.sock");
    let mut child = Command::new(binary("vhost-hotswap"))
        .arg("--socket-path")
        .arg(&socket)
        .args(["--domain", "faulty", "--param", "fault=prepare:hang"])
        .stderr(Stdio::null())
        .spawn()
        .expect("vhost-hotswap can be started");
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() {
        assert!(Instant::now() < deadline, "no socket");
        thread::sleep(Duration::from_millis(2));
    }
    thread::sleep(Duration::from_millis(200));
    let asked = Instant::now();
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it lives");
    let status = child.wait().expect("the child can be waited for");
    assert!(asked.elapsed() < SECOND, "it waited for its domain: {:?}", asked.elapsed());
    assert_eq!(status.code(), Some(0));
    assert!(!socket.exists(), "the socket is left");
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let (mut unread, log) = io::pipe().expect("a pipe");
    let mut daemon =
        Daemon::start_with_stderr(log.into(), &["--domain", "ramdisk", "--param", "size=1M"]);
    let mut control = daemon.rpc();
    // 1000 lines of 100 bytes and more: what a pipe holds is 64 KiB.
    for _ in 0..1000 {
        let error = control.request("upgrade", serde_json::json!({"name": "no_such_domain"}));
        assert_eq!(error.expect_err("there is none").name(), "module_not_found");
    }
    control.request("upgrade", serde_json::json!({"name": "ramdisk_v2"})).expect("an upgrade");
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a session");
    let read = Request::Read { offset: 0, len: 4096 };
    assert_eq!(client.queue(0).execute(read, PATIENCE).expect("an answer").0, Status::Ok);
    drop(client);
    let (code, took) = daemon.stop();
    assert_eq!(code, 0);
    assert!(took < 5 * SECOND, "{took:?}");
    let mut said = String::new();
    unread.read_to_string(&mut said).expect("text");
    assert!(said.contains("no_such_domain"), "{said}");
}

#[test]
fn a_frontend_that_cannot_be_served_costs_next_to_nothing() {
    let daemon = Daemon::start_with_ulimit("-n 40", &["--domain", "empty", "--queues", "64"]);
    let waiting = std::os::unix::net::UnixStream::connect(daemon.socket()).expect("a connection");
    thread::sleep(SECOND / 5);
    let before = cpu_time(&daemon);
    thread::sleep(SECOND);
    let spent = cpu_time(&daemon) - before;
    drop(waiting);
    let log = daemon.log();
    assert!(log.contains("Too many open files"), "{log}");
    assert!(log.lines().count() < 40, "{log}");
    assert!(spent < SECOND / 4, "{spent:?} of CPU time in a second");
    assert_eq!(daemon.status()["state"], "serving");
    assert_eq!(daemon.terminate(), 0);
}

/// A session with a read in flight that ends after 3 s.
fn with_a_stalled_read(daemon: &Daemon) -> RawSession {
    let mut raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    raw.put(FREE, &[0; 16]).expect("memory");
    let at = GUEST_BASE + FREE;
    raw.chain(0, &[(at, 16, 0), (at + 0x2000, 512, WRITE), (at + 0x1000, 1, WRITE)])
        .expect("memory");
    raw.offer(0).expect("a kick");
    let deadline = Instant::now() + PATIENCE;
    while daemon.status()["queues"][0]["in_flight"] != 1 {
        assert!(Instant::now() < deadline, "it is not in flight");
    }
    raw
}

/// `stall`: the worker goes on meanwhile; `hang`: it does not.
fn slow(kind: &str) -> Daemon {
    Daemon::start(&["--domain", "faulty", "--param", &format!("fault=request:{kind}")])
}

/// A frontend that reconnects takes the used index that it finds for the place to go on at.
#[test]
fn what_is_in_flight_at_the_end_is_answered_before_the_frontend_is_let_go() {
    for kind in ["stall", "hang"] {
        let daemon = slow(kind);
        let mut raw = with_a_stalled_read(&daemon);
        daemon.signal(Signal::TERM);
        assert!(raw.wait_for_end(PATIENCE).expect("a socket"), "it goes on");
        let used = raw.used(Duration::ZERO).expect("memory");
        assert_eq!(used, Some((0, 513)), "{kind}: let go without its answer");
    }
}

/// Its commands are not heard any more: that is no standstill.
#[test]
fn a_server_that_ends_has_its_time_whatever_the_timeout_of_a_standstill_is() {
    let stall = ["--domain", "faulty", "--param", "fault=request:stall"];
    let mut daemon = Daemon::start(&[&stall[..], &["--hang-timeout-ms", "500"]].concat());
    let mut raw = with_a_stalled_read(&daemon);
    let (status, _) = daemon.stop();
    assert_eq!(status, 0, "{}", daemon.log());
    assert_eq!(raw.used(Duration::ZERO).expect("memory"), Some((0, 513)), "it is unanswered");
}

/// The server is being stopped for another one, and waits for what is in flight.
#[test]
fn what_is_in_flight_at_the_end_amid_an_exchange_is_answered() {
    let mut daemon = slow("stall");
    let mut raw = with_a_stalled_read(&daemon);
    let mut control = daemon.rpc();
    let call = serde_json::json!({"jsonrpc": "2.0", "id": 1, "method": "upgrade_daemon",
        "params": {"only": "server"}});
    control.send_raw(format!("{call}\n").as_bytes()).expect("a request");
    thread::sleep(SECOND / 2);
    let (status, _) = daemon.stop();
    assert_eq!(status, 0, "{}", daemon.log());
    assert_eq!(raw.used(Duration::ZERO).expect("memory"), Some((0, 513)), "it is unanswered");
}

#[test]
fn nothing_is_published_to_a_frontend_that_is_gone() {
    for kind in ["stall", "hang"] {
        let daemon = slow(kind);
        let mut raw = with_a_stalled_read(&daemon);
        raw.hang_up().expect("a socket");
        // The next session begins when nothing of this one is left.
        let deadline = Instant::now() + PATIENCE;
        while daemon.status()["queues"][0]["in_flight"] != 0 {
            assert!(Instant::now() < deadline, "{kind}: it never ends");
            thread::sleep(SECOND / 50);
        }
        RawSession::start(daemon.socket(), features::USUAL, 64).expect("the next session");
        let used = raw.used(Duration::ZERO).expect("memory");
        assert_eq!(used, None, "{kind}: a frontend that comes back would have it twice");
    }
}

/// What the daemon has had of the CPUs (`utime` and `stime` in proc(5), hundredths of a second).
fn cpu_time(daemon: &Daemon) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.server_pid()))
        .expect("the daemon lives");
    let after_name = stat.rsplit_once(')').expect("a name in parentheses").1;
    let ticks: u64 = after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|n| n.parse::<u64>().expect("ticks"))
        .sum();
    Duration::from_millis(10 * ticks)
}
