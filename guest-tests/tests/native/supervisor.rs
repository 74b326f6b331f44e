//! The process that serves dies or is exchanged under a frontend that does not know.
//!
//! Under a load that checks every block, on one connection: no error, no mismatch, no request
//! without an answer and none that is answered twice, however often the server is killed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::raw::{FREE, GUEST_BASE, RawSession, WRITE};
use guest_tests::client::{Client, Options, Request, Status, features};
use guest_tests::daemon::Daemon;
use guest_tests::stamp::{Load, LoadOptions, LoadReport, assert_intact};
use rustix::process::Signal;
use serde_json::json;

const SECOND: Duration = Duration::from_secs(1);

fn supervised(args: &[&str]) -> Daemon {
    Daemon::start(args)
}

/// Milliseconds that recoveries took, as the log has them.
fn say_pauses(daemon: &Daemon) {
    let log = daemon.log();
    let pause = |line: &str| {
        let (_, rest) = line.split_once("another server serves ")?;
        rest.split_once(" ms")?.0.parse::<u64>().ok()
    };
    let mut pauses: Vec<u64> = log.lines().filter_map(pause).collect();
    pauses.sort_unstable();
    let at = |part: usize| pauses.get(pauses.len() * part / 100).copied().unwrap_or(0);
    println!("recoveries in ms: median {}, 90 % {}, most {}", at(50), at(90), at(99));
}

fn killed_a_hundred_times(args: &[&str]) {
    let mut daemon = supervised(&[args, &["--queues", "2"]].concat());
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    for round in 1..=100 {
        load.wait_for(200);
        daemon.end_server(Signal::KILL);
        assert_eq!(load.faults(), 0, "in round {round}:\n{}", daemon.log());
    }
    load.wait_for(2000);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    say_pauses(&daemon);
    let now = daemon.status();
    assert_eq!(now["server"]["deaths"], 100, "{now}");
    assert_eq!(now["server"]["quarantined"], 0, "{now}");
    assert_eq!(now["generation"], 1, "{now}");
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn a_server_of_a_ramdisk_is_killed_a_hundred_times() {
    killed_a_hundred_times(&["--domain", "ramdisk", "--param", "size=64M"]);
}

/// Its requests end in any order.
#[test]
fn a_server_of_a_file_is_killed_a_hundred_times() {
    let file = image(64 << 20);
    let path = file.path().to_str().expect("UTF-8");
    killed_a_hundred_times(&["--blk-file", path, "--param", "direct=true"]);
}

/// Kills the server while the oldest request of its queue is in flight and younger ones have ended.
/// What became of the load, if it went on.
fn killed_out_of_order(loses_marks: bool) -> LoadReport {
    // In flight for three seconds; the next server has the same again.
    let args = ["--domain", "faulty", "--param", "fault=request:stall:200"];
    let daemon = supervised(&args);
    let options = LoadOptions { patience: 12 * SECOND, ..LoadOptions::new(1, 16) };
    let load = Load::start(daemon.socket(), &options);
    load.wait_for(400);
    // A stopped supervisor answers nothing.
    let server = daemon.server();
    daemon.signal(Signal::STOP);
    server.signal(Signal::KILL);
    while server.runs() {
        thread::sleep(Duration::from_millis(1));
    }
    if loses_marks {
        lose_marks(&daemon);
    }
    daemon.signal(Signal::CONT);
    thread::sleep(6 * SECOND);
    load.stop()
}

/// Zeroes the in-flight region, which the supervisor has.
fn lose_marks(daemon: &Daemon) {
    let fds = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("the daemon lives");
    let mut count = 0;
    for fd in fds.flatten().map(|fd| fd.path()) {
        let target = fs::read_link(&fd).unwrap_or_default();
        if target.to_string_lossy().contains("memfd:hotswap-inflight") {
            let file = File::options().write(true).open(&fd).expect("the region");
            let len = file.metadata().expect("its length").len();
            file.write_all_at(&vec![0; len as usize], 0).expect("zeroed");
            count += 1;
        }
    }
    assert_eq!(count, 1, "in-flight regions");
}

#[test]
fn requests_that_ended_out_of_order_are_told_from_those_that_did_not_end() {
    killed_out_of_order(false).assert_clean();
}

/// So that the test before can fail.
#[test]
fn without_marks_a_request_is_lost() {
    let report = killed_out_of_order(true);
    let faults = report.errors + report.mismatches + report.unanswered + report.spurious;
    assert!(faults > 0, "what was in flight was not looked up, and nothing is missing: {report:?}");
}

fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let file = file.expect("a file");
    file.as_file().set_len(bytes).expect("its size");
    file
}

#[test]
fn a_server_is_killed_at_every_step_of_the_set_up() {
    let daemon = supervised(&["--domain", "ramdisk", "--param", "size=1M"]);
    daemon.end_server(Signal::KILL);
    let mut raw = RawSession::connect(daemon.socket(), features::USUAL).expect("a connection");
    daemon.end_server(Signal::KILL);
    raw.share_memory().expect("memory shared");
    daemon.end_server(Signal::KILL);
    raw.start_ring(64).expect("a ring");
    daemon.end_server(Signal::KILL);
    raw.assert_one_read();
    daemon.end_server(Signal::KILL);
    raw.assert_one_read();
    daemon.end_server(Signal::KILL);
    assert_eq!(raw.stop_ring().expect("stopped"), 2, "the next chain to be taken");
    daemon.end_server(Signal::KILL);
    raw.start_ring(64).expect("started again");
    raw.assert_one_read();
    drop(raw);
    daemon.end_server(Signal::KILL);
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn a_ring_is_stopped_while_no_server_lives() {
    let daemon = supervised(&["--domain", "ramdisk", "--param", "size=1M"]);
    let mut raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    for round in 1..=20 {
        raw.assert_one_read();
        daemon.signal_server(Signal::KILL);
        // It may be before the death is known, or after it.
        thread::sleep(Duration::from_micros(round * 100));
        assert_eq!(raw.stop_ring().expect("stopped"), 1, "the next chain to be taken");
        raw.start_ring(64).expect("started again");
    }
    raw.assert_one_read();
}

#[test]
fn a_server_is_exchanged_fifty_times() {
    let file = image(64 << 20);
    let path = file.path().to_str().expect("UTF-8");
    for args in [
        &["--domain", "ramdisk", "--param", "size=64M"][..],
        &["--blk-file", path, "--param", "direct=true"],
    ] {
        let daemon = supervised(&[args, &["--queues", "2"]].concat());
        let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
        let mut pauses = Vec::new();
        for _ in 0..25 {
            load.wait_for(200);
            let before = daemon.server_pid();
            let reply = daemon.call(&["upgrade-daemon", "--only", "server"]);
            pauses.push(reply["phases_us"]["pause"].as_f64().expect("a number"));
            assert_ne!(daemon.server_pid(), before, "{reply}");
            assert_eq!(load.faults(), 0, "{}", daemon.log());
        }
        load.wait_for(2000);
        let report = load.stop();
        report.assert_clean();
        assert_intact(daemon.socket(), &report.ledgers);
        pauses.sort_by(f64::total_cmp);
        println!("pauses in us: median {}, most {}", pauses[12], pauses[24]);
        let now = daemon.status();
        assert_eq!(now["server"]["deaths"], 0, "{now}");
        assert_eq!(daemon.terminate(), 0);
    }
}

/// The servers of an exchange have the same kick descriptors: those of the old one are not to take
/// a kick that is meant for the new one, while both live.
#[test]
fn rings_that_rest_are_kicked_around_each_exchange() {
    let daemon = supervised(&["--domain", "ramdisk", "--param", "size=1M", "--queues", "2"]);
    let options = Options { queues: 2, ..Options::default() };
    let mut client = Client::connect(daemon.socket(), &options).expect("connected");
    thread::scope(|scope| {
        let daemon = &daemon;
        let exchanges = scope.spawn(move || {
            for _ in 0..200 {
                daemon.call(&["upgrade-daemon", "--only", "server"]);
            }
        });
        let mut round = 0;
        while !exchanges.is_finished() {
            round += 1;
            let request = Request::Write { offset: round % 64 * 4096, data: &[7; 4096] };
            let answer = client.queue(round as usize % 2).execute(request, PATIENCE);
            let answer = answer.unwrap_or_else(|error| panic!("{error}:\n{}", daemon.log()));
            assert_eq!(answer.0, Status::Ok);
            thread::sleep(Duration::from_micros(round * 37 % 3000));
        }
        exchanges.join().expect("no exchange fails");
    });
    assert_eq!(daemon.status()["server"]["deaths"], 0);
}

#[test]
fn a_server_that_is_killed_has_a_spare() {
    let args = ["--domain", "ramdisk", "--param", "size=64M", "--queues", "2", "--spare"];
    let daemon = supervised(&args);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    for _ in 1..=20 {
        load.wait_for(200);
        daemon.end_server(Signal::KILL);
    }
    load.wait_for(2000);
    load.stop().assert_clean();
    say_pauses(&daemon);
}

/// Waits until a spare is ready that is none of the `others`. Returns its process.
fn spare(daemon: &Daemon, others: &[u64]) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    let pid = |line: &str| {
        let (before, _) = line.split_once(" is the spare")?;
        before.rsplit_once(' ')?.1.parse().ok()
    };
    loop {
        let log = daemon.log();
        match log.lines().filter_map(pid).find(|pid| !others.contains(pid)) {
            Some(pid) => return pid,
            None => assert!(Instant::now() < deadline, "no spare:\n{log}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// The one that is ready is the one that serves next.
fn assert_serves_next(daemon: &Daemon, spare: u64) {
    daemon.end_server(Signal::KILL);
    let now = daemon.status();
    assert_eq!(now["server"]["pid"], spare, "{now}\n{}", daemon.log());
}

#[test]
fn a_spare_is_of_the_generation_that_serves() {
    let daemon = supervised(&["--domain", "ramdisk", "--param", "size=1M", "--spare"]);
    let first = spare(&daemon, &[]);
    daemon.call(&["upgrade", "ramdisk_v2"]);
    let second = spare(&daemon, &[first]);
    assert_serves_next(&daemon, second);
    assert_eq!(daemon.status()["generation"], 2);
    let third = spare(&daemon, &[first, second]);
    assert_serves_next(&daemon, third);
}

#[test]
fn a_spare_that_dies_is_replaced() {
    let daemon = supervised(&["--domain", "ramdisk", "--param", "size=1M", "--spare"]);
    let first = spare(&daemon, &[]);
    let pid = i32::try_from(first).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.expect("a process"), Signal::KILL).expect("a signal");
    let second = spare(&daemon, &[first]);
    assert_serves_next(&daemon, second);
    assert_eq!(daemon.status()["server"]["deaths"], 1);
}

#[test]
fn sessions_and_servers_leave_nothing_behind_in_the_supervisor() {
    let daemon = supervised(&["--domain", "ramdisk", "--param", "size=1M", "--queues", "2"]);
    let descriptors = || {
        thread::sleep(SECOND / 5);
        fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("the daemon lives").count()
    };
    let sessions = |count| {
        for _ in 0..count {
            let mut raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("one");
            raw.assert_one_read();
        }
    };
    sessions(10);
    daemon.end_server(Signal::KILL);
    let before = descriptors();
    sessions(200);
    for _ in 2..=10 {
        let mut raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("one");
        raw.assert_one_read();
        daemon.end_server(Signal::KILL);
        raw.assert_one_read();
    }
    daemon.call(&["upgrade-daemon", "--only", "server"]);
    daemon.end_server(Signal::KILL);
    assert!(descriptors() <= before + 1, "{before} descriptors, and now {}", descriptors());
    // The dead are reaped when nothing goes on, and before another program takes the process over.
    let children = || {
        let path = format!("/proc/{0}/task/{0}/children", daemon.pid());
        fs::read_to_string(path).expect("the daemon lives").split_whitespace().count()
    };
    daemon.wait_until("the dead stay", |_| children() == 1);
    daemon.end_server(Signal::KILL);
    daemon.call(&["upgrade-daemon", "--only", "supervisor"]);
    assert_eq!(children(), 1, "what has died is not known any more");
}

#[test]
fn a_domain_that_ends_its_server_twice_is_replaced_by_the_standby() {
    let args = ["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"];
    let daemon = supervised(&args);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    load.wait_for(200);
    let live = |daemon: &Daemon| daemon.status()["domain"]["version"].clone();
    let first = live(&daemon);
    daemon.call(&["upgrade", "ramdisk_v2"]);
    let second = live(&daemon);
    assert_ne!(first, second);
    daemon.end_server(Signal::ABORT);
    load.wait_for(200);
    assert_eq!(live(&daemon), second);
    daemon.end_server(Signal::ABORT);
    load.wait_for(2000);
    assert_eq!(live(&daemon), first, "{}", daemon.log());
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.terminate(), 0);
}

/// Its rings stand still meanwhile: nothing of the load is answered with an error.
#[test]
fn a_device_that_was_given_up_is_brought_back_by_an_upgrade() {
    let args = ["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"];
    let daemon = supervised(&args);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    load.wait_for(200);
    for _ in 1..=9 {
        daemon.end_server(Signal::ABORT);
    }
    daemon.signal_server(Signal::ABORT);
    let now = daemon.wait_until("it is not given up", |now| now["state"] == "faulted");
    assert_eq!(now["server"]["deaths"], 10, "{now}");
    let done = load.ios();
    thread::sleep(SECOND / 4);
    assert_eq!((load.ios(), load.faults()), (done, 0), "the rings do not stand still");
    let reply = daemon.call(&["upgrade", "ramdisk_v2"]);
    assert_eq!(reply["to"]["name"], "ramdisk", "{reply}");
    load.wait_for(2000);
    assert_eq!(daemon.status()["state"], "serving");
    // And the next death is one as any; nine were recovered from, and one by the upgrade.
    daemon.end_server(Signal::KILL);
    load.wait_for(2000);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.terminate(), 0);
}

/// The first request of each server's life is held back for three seconds, and its server is ended
/// each time while that is in flight.
#[test]
fn a_request_that_ends_its_server_again_and_again_is_not_run_any_more() {
    let args = ["--domain", "faulty", "--param", "size=1M", "--param", "fault=request:stall"];
    let daemon = supervised(&args);
    let mut raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    raw.put(FREE, &[0; 16]).expect("memory");
    let at = GUEST_BASE + FREE;
    let chain = |raw: &mut RawSession, head: u16| {
        let status = 0x1000 + u64::from(head);
        raw.put(FREE + status, &[0xee]).expect("memory");
        raw.chain(head, &[(at, 16, 0), (at + 0x2000, 512, WRITE), (at + status, 1, WRITE)])
            .expect("memory");
        raw.offer(head).expect("a kick");
    };
    let answer = |raw: &mut RawSession, head: u16| {
        let (used, _) = raw.used(PATIENCE).expect("memory").expect("an answer");
        let status = raw.get(FREE + 0x1000 + u64::from(head), 1).expect("memory")[0];
        (used, status)
    };
    chain(&mut raw, 0);
    chain(&mut raw, 8);
    assert_eq!(answer(&mut raw, 8), (8, 0), "another one is answered");
    for _ in 1..=3 {
        daemon.wait_until("it is not run again", |now| now["queues"][0]["in_flight"] == 1);
        daemon.end_server(Signal::ABORT);
    }
    assert_eq!(answer(&mut raw, 0), (0, 1), "an I/O error: {}", daemon.log());
    let now = daemon.status();
    assert_eq!(now["server"]["quarantined"], 1, "{now}");
    assert_eq!((&now["server"]["deaths"], &now["state"]), (&json!(3), &json!("serving")), "{now}");
    // The next ones are run, the first of them late.
    for head in [0, 8] {
        chain(&mut raw, head);
        assert_eq!(answer(&mut raw, head), (u32::from(head), 0), "{}", daemon.log());
    }
}

#[test]
fn a_server_that_does_not_move_is_ended_if_that_is_asked_for() {
    let args = ["--domain", "ramdisk", "--param", "size=64M", "--hang-timeout-ms", "1000"];
    let daemon = supervised(&args);
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 16));
    load.wait_for(200);
    daemon.signal_server(Signal::STOP);
    let deadline = Instant::now() + PATIENCE;
    while !daemon.log().contains("another server serves") {
        assert!(Instant::now() < deadline, "{}", daemon.log());
        thread::sleep(Duration::from_millis(10));
    }
    load.wait_for(2000);
    load.stop().assert_clean();
}

#[test]
fn no_process_and_no_socket_is_left() {
    let mut daemon = supervised(&["--domain", "ramdisk", "--param", "size=1M", "--spare"]);
    daemon.end_server(Signal::KILL);
    let children = format!("/proc/{0}/task/{0}/children", daemon.pid());
    let pids = fs::read_to_string(children).expect("the children");
    assert!(!pids.trim().is_empty());
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
    assert!(!daemon.socket().exists() && !daemon.control().exists(), "a socket is left");
    let deadline = Instant::now() + PATIENCE;
    for pid in pids.split_whitespace() {
        while Path::new(&format!("/proc/{pid}")).exists() {
            assert!(Instant::now() < deadline, "process {pid} is left:\n{}", daemon.log());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Nothing is done about it: it may have been stopped on purpose.
#[test]
fn a_server_that_does_not_answer_is_said_to_be_that() {
    let daemon = supervised(&["--domain", "ramdisk", "--param", "size=1M"]);
    let server = daemon.signal_server(Signal::STOP);
    let deadline = Instant::now() + PATIENCE;
    while !daemon.log().contains("has not answered for 10s") {
        assert!(Instant::now() < deadline, "{}", daemon.log());
        thread::sleep(SECOND / 10);
    }
    assert!(daemon.log().contains(&format!("process {}, has not", server.pid)), "{}", daemon.log());
    server.signal(Signal::CONT);
    let now = daemon.status();
    assert_eq!(
        (&now["server"]["deaths"], &now["server"]["stuck"]),
        (&json!(0), &json!([])),
        "{now}"
    );
}
