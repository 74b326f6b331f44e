//! Rate limits: a device is never faster than it may be, what waits does so in the ring, and
//! nothing that is not a request waits at all.
//!
//! The verdicts hold on a machine that is busy: what is counted is held against the clock in one
//! direction only. How near a limit a disk comes is printed.

use std::fs;
use std::time::{Duration, Instant};

use guest_tests::client::{Client, Options, Queue, Request, Status, features};
use guest_tests::daemon::{Daemon, run_daemon};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::Signal;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);
const KIB: usize = 1024;

fn ramdisk(more: &[&str]) -> Daemon {
    Daemon::start(
        &[&["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"], more].concat(),
    )
}

fn connect(daemon: &Daemon, queues: usize) -> Client {
    let options = Options { queues, slot_bytes: 1 << 20, ..Options::default() };
    Client::connect(daemon.socket(), &options)
        .unwrap_or_else(|error| panic!("{error}\n{}", daemon.log()))
}

/// What a pump does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Reads,
    Writes,
    Both,
}

/// Keeps 16 requests of `len` bytes in each queue for `time`. Returns how many were answered, and
/// by when the last was.
fn pump(queues: &mut [Queue], kind: Kind, len: usize, time: Duration) -> (u64, Duration) {
    let (data, began) = (vec![7; len], Instant::now());
    let (mut number, mut answered, mut last) = (0, 0, Duration::ZERO);
    while began.elapsed() < time {
        for queue in queues.iter_mut() {
            let reaped = queue.reap(|done| assert_eq!(done.status, Status::Ok));
            if reaped > 0 {
                (answered, last) = (answered + reaped as u64, began.elapsed());
            }
            while queue.in_flight() < 16 {
                number += 1;
                let offset = number % 16 * (1 << 20);
                let is_read = kind == Kind::Reads || kind == Kind::Both && number % 2 == 0;
                let request = match is_read {
                    true => Request::Read { offset, len },
                    false => Request::Write { offset, data: &data },
                };
                queue.submit(request, number).expect("room");
            }
            queue.kick().expect("a kick");
        }
        queues[0].wait(Duration::from_millis(1)).expect("a wait");
    }
    (answered, last)
}

/// What the server has used of the CPUs.
fn cpu_time(daemon: &Daemon) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.server_pid())).expect("it lives");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<u64>().expect("a number");
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

#[test]
fn it_is_never_faster_than_it_may_be() {
    let daemon = ramdisk(&[]);
    let mut queues = connect(&daemon, 2).into_queues();
    let time = Duration::from_secs(10);
    for (kind, len, option, rate) in [
        (Kind::Reads, 4 * KIB, "--iops", 500),
        (Kind::Writes, 4 * KIB, "--iops", 2000),
        (Kind::Both, 512, "--iops", 20_000),
        (Kind::Reads, 4 * KIB, "--bandwidth", 4 << 20),
        (Kind::Writes, 64 * KIB, "--bandwidth", 16 << 20),
        (Kind::Both, 1024 * KIB, "--bandwidth", 32 << 20),
    ] {
        let told = daemon.call(&["limit", "--off", option, &rate.to_string()]);
        let burst = told["limits"][format!("{}_burst", &option[2..])].as_u64().expect("a burst");
        let unit = if option == "--iops" { 1 } else { len as u64 };
        let (answered, took) = pump(&mut queues, kind, len, time);
        let earned = rate as f64 * took.as_secs_f64();
        let ratio = (answered * unit) as f64 / earned;
        println!("{kind:?} of {len}, {option} {rate}: {ratio:.4} of it in {took:?}");
        // What is at the ring when the limit changes has been let through before.
        let before = 2 * 16 * unit;
        let most = earned + (burst + unit + before) as f64;
        assert!((answered * unit) as f64 <= most, "{kind:?}: {answered} in {took:?}");
        assert!(answered > 0 && daemon.status()["limits"]["held_up"] != 0, "it was not held up");
        daemon.call(&["limit", "--off"]);
        settle(&mut queues);
    }
}

/// Waits for what is out.
fn settle(queues: &mut [Queue]) {
    let deadline = Instant::now() + LIMIT;
    for queue in queues {
        while queue.in_flight() > 0 {
            assert!(Instant::now() < deadline, "{} are not answered", queue.in_flight());
            queue.wait(Duration::from_millis(20)).expect("a wait");
            queue.reap(|done| assert_eq!(done.status, Status::Ok));
        }
    }
}

/// After this nothing but what is free passes for 25 s: a request has left the bucket in debt.
fn into_debt(daemon: &Daemon, queue: &mut Queue) {
    daemon.call(&["limit", "--off", "--bandwidth", "4K"]);
    let read = Request::Read { offset: 0, len: 100 * KIB };
    assert_eq!(queue.execute(read, LIMIT).expect("an answer").0, Status::Ok);
}

#[test]
fn a_flush_an_upgrade_and_the_end_do_not_wait_and_nothing_spins() {
    let mut daemon = ramdisk(&[]);
    let mut client = connect(&daemon, 2);
    let began = Instant::now();
    into_debt(&daemon, client.queue(0));
    let (status, _) = client.queue(1).execute(Request::Flush, LIMIT).expect("an answer");
    assert_eq!(status, Status::Ok);
    for number in 0..16 {
        let read = Request::Read { offset: 0, len: 512 };
        client.queue(0).submit(read, number).expect("room");
    }
    client.queue(0).kick().expect("a kick");
    daemon.wait_until("nothing waits", |now| now["limits"]["held_up"] != 0);
    // What waits is in the ring: nothing is in flight, and an upgrade has nothing to wait for.
    assert_eq!(daemon.status()["queues"][0]["in_flight"], 0);
    for name in ["ramdisk_v2", "ramdisk"] {
        let reply = daemon.call(&["upgrade", name, "--mode", "handover"]);
        println!("{}", reply["phases_us"]);
    }
    daemon.call(&["rollback"]);
    let before = cpu_time(&daemon);
    std::thread::sleep(Duration::from_secs(3));
    let used = cpu_time(&daemon) - before;
    assert!(used < Duration::from_millis(300), "it spins: {used:?} in 3 s");
    assert_eq!(client.queue(0).reap(|_| ()), 0, "something passed");
    drop(client);
    daemon.wait_until("the session does not end", |now| now["connected"] == false);
    let (code, _) = daemon.stop();
    assert_eq!(code, 0);
    assert!(began.elapsed() < Duration::from_secs(20), "they waited for a token: {began:?}");
}

#[test]
fn what_waits_goes_on_when_the_limit_is_changed() {
    let daemon = ramdisk(&[]);
    let mut client = connect(&daemon, 1);
    into_debt(&daemon, client.queue(0));
    let began = Instant::now();
    client.queue(0).submit(Request::Read { offset: 0, len: 512 }, 1).expect("room");
    client.queue(0).kick().expect("a kick");
    daemon.wait_until("nothing waits", |now| now["limits"]["held_up"] != 0);
    assert_eq!(daemon.call(&["limit", "--off"])["limits"], Value::Null);
    settle(std::slice::from_mut(client.queue(0)));
    assert!(began.elapsed() < Duration::from_secs(20), "it waited for its token");
    assert_eq!(daemon.status()["limits"], Value::Null);
}

#[test]
fn limits_hold_through_everything_under_a_checked_load() {
    let daemon = ramdisk(&["--iops", "300", "--bandwidth", "64M"]);
    let limits = |daemon: &Daemon| {
        let mut limits = daemon.status()["limits"].take();
        limits.as_object_mut().expect("limits").remove("held_up");
        limits
    };
    assert_eq!(limits(&daemon)["iops"], 300);
    daemon.call(&["limit", "--iops", "400", "--iops-burst", "50"]);
    let wanted = limits(&daemon);
    assert_eq!(
        wanted,
        json!({"iops": 400, "iops_burst": 50, "bandwidth": 64 << 20, "bandwidth_burst": (64 << 20) / 10})
    );
    // Before the load, whose threads may run for a while before this one does.
    let began = Instant::now();
    let mut options = LoadOptions::new(2, 16);
    // A flush is free.
    options.client.features &= !features::FLUSH;
    let load = Load::start(daemon.socket(), &options);
    let (mut bursts, mut left) = (1, 0);
    let mut step = |what: &str, is_new_server: bool| {
        load.wait_for(150);
        bursts += u64::from(is_new_server);
        // What a server had taken when it died, which may not have been let through yet.
        left += if what.contains("death") { 2 * 16 } else { 0 };
        assert_eq!(limits(&daemon), wanted, "after {what}");
        let (ios, most) = (load.ios(), 400.0 * began.elapsed().as_secs_f64());
        let most = most + (bursts * 51 + left) as f64;
        assert!(ios as f64 <= most, "after {what}: {ios} of {most}");
    };
    step("the start", false);
    daemon.call(&["upgrade", "ramdisk_v2"]);
    step("an upgrade", false);
    daemon.call(&["rollback"]);
    step("a rollback", false);
    // A server that goes on begins with a full bucket.
    daemon.end_server(Signal::KILL);
    step("a death", true);
    daemon.call(&["upgrade-daemon", "--only", "server"]);
    step("an exchange", true);
    daemon.call(&["upgrade-daemon", "--only", "supervisor"]);
    step("another supervisor", false);
    daemon.end_server(Signal::KILL);
    step("a death after that", true);
    let report = load.stop();
    report.assert_clean();
    daemon.call(&["limit", "--off"]);
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn what_makes_no_sense_is_refused_in_a_sentence() {
    let daemon = ramdisk(&[]);
    for (args, word) in [
        (&["--iops", "2000000000"][..], "1000000000"),
        (&["--bandwidth", "100"], "4096"),
        (&["--iops-burst", "100"], "without `iops`"),
        (&["--iops", "1000", "--iops-burst", "1"], "hundredth"),
        (&["--iops", "1", "--iops-burst", "4000"], "an hour"),
    ] {
        let sentence = daemon.refuse(&[&["limit"], args].concat());
        assert!(sentence.contains("(bad_limit)") && sentence.contains(word), "{sentence}");
        assert_eq!(daemon.status()["limits"], Value::Null);
        let daemon = run_daemon(&[&["--socket-path", "s"], args].concat());
        assert!(daemon.status == 2 && daemon.stderr.contains(word), "{}", daemon.stderr);
    }
    for args in [&["limit", "--iops", "-1"][..], &["limit", "--iops", "1K"], &["limit", "--what"]] {
        assert_eq!(daemon.ctl(args).status, 2, "{args:?}");
    }
}
