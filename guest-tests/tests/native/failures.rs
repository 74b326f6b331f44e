//! Domains that fail, panic and stall on demand, at every step of an upgrade and in the middle of
//! I/O.
//!
//! The table in the design says what must hold after each failure; every row that a module can
//! cause is played here under a load that checks every block. `faulty` is a ramdisk with the same
//! storage and schema, so what it breaks is the ramdisk's own data.

use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::Daemon;
use guest_tests::stamp::{Load, LoadOptions, assert_intact, run_load};
use serde_json::{Value, json};

const SECOND: Duration = Duration::from_secs(1);

fn ramdisk() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"])
}

fn faulty(fault: &str) -> Value {
    json!({"name": "faulty", "params": {"fault": fault}})
}

/// Waits until the daemon's state is `state`.
fn wait_for_state(daemon: &Daemon, state: &str) {
    let deadline = Instant::now() + PATIENCE;
    let mut control = daemon.rpc();
    loop {
        let status = control.request("status", json!({})).expect("a status");
        if status["state"] == state {
            return;
        }
        assert!(Instant::now() < deadline, "the state is never {state}: {status}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_failing_upgrade_leaves_the_device_as_it_was() {
    let daemon = ramdisk();
    let mut control = daemon.rpc();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    for fault in [
        "prepare:fail",
        "prepare:panic",
        "activate:fail",
        "activate:panic",
        "prepare:fail",
        "activate:fail",
        "activate:panic",
    ] {
        load.wait_for(200);
        let error = control.request("upgrade", faulty(fault)).expect_err(fault);
        assert!(!error.name().is_empty() && error.message.len() > 10, "{fault}: {error:?}");
        let status = control.request("status", json!({})).expect("a status");
        assert_eq!(
            (&status["generation"], &status["state"]),
            (&json!(1), &json!("serving")),
            "{fault}: {status}"
        );
        load.wait_for(200);
        assert_eq!(load.faults(), 0, "after {fault}");
    }
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.status()["upgrades"]["refused"], 7);
    assert_eq!(daemon.call(&["upgrade", "ramdisk_v2"])["generation"], 2);
}

#[test]
fn a_domain_that_cannot_quiesce_goes_on_serving() {
    for fault in ["quiesce:fail", "quiesce:panic"] {
        let daemon = ramdisk();
        let mut control = daemon.rpc();
        let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
        load.wait_for(200);
        control.request("upgrade", faulty(fault)).unwrap_or_else(|e| panic!("{fault}: {e:?}"));
        load.wait_for(200);
        let error = control.request("upgrade", json!({"name": "ramdisk"})).expect_err(fault);
        assert!(!error.name().is_empty(), "{fault}: {error:?}");
        let status = control.request("status", json!({})).expect("a status");
        assert_eq!(
            (&status["generation"], &status["state"]),
            (&json!(2), &json!("serving")),
            "{fault}: {status}"
        );
        load.wait_for(200);
        // The fault is over, so the second attempt gets through.
        let reply = control
            .request("upgrade", json!({"name": "ramdisk"}))
            .unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(reply["generation"], 3, "{fault}: {reply}");
        load.wait_for(200);
        let report = load.stop();
        report.assert_clean();
        assert_intact(daemon.socket(), &report.ledgers);
    }
}

#[test]
fn a_stalled_request_ends_the_upgrade_and_not_the_io() {
    let daemon = ramdisk();
    let mut control = daemon.rpc();
    // The request after the next 100 comes 3 s late, without keeping its worker from the others.
    control.request("upgrade", faulty("request:stall:100")).expect("faulty takes over");
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    load.wait_for(1000);
    let started = Instant::now();
    let error = control
        .request("upgrade", json!({"name": "ramdisk", "drain_timeout_ms": 300}))
        .expect_err("a request is in flight for 3 s");
    let took = started.elapsed();
    assert!(
        took >= Duration::from_millis(250) && took < 2 * SECOND,
        "the drain deadline came after {took:?}"
    );
    let words = format!("{} {}", error.message, error.data);
    assert!(words.contains("queue"), "the report names no queue: {error:?}");
    assert!(
        words.chars().any(|c| c.is_ascii_digit()),
        "the report has no count and no age: {error:?}"
    );
    println!("{}: {} {}", error.name(), error.message, error.data);
    // The gate is open again: others are served while the one is still late.
    load.wait_for(1000);
    let status = control.request("status", json!({})).expect("a status");
    assert_eq!(
        (&status["generation"], &status["state"]),
        (&json!(2), &json!("serving")),
        "{status}"
    );
    thread::sleep(3 * SECOND);
    let reply =
        control.request("upgrade", json!({"name": "ramdisk"})).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(reply["generation"], 3, "{reply}");
    load.wait_for(1000);
    let report = load.stop();
    report.assert_clean();
    let max = report.latency.quantile(1.0);
    assert!(max > 2 * SECOND, "the stalled request has come, late; but the slowest took {max:?}");
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn a_stalled_request_within_the_deadline_is_waited_for() {
    let daemon = ramdisk();
    let mut control = daemon.rpc();
    control.request("upgrade", faulty("request:stall:50")).expect("faulty takes over");
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 8));
    load.wait_for(100);
    let params = json!({"name": "ramdisk", "drain_timeout_ms": 10_000});
    let reply = control.request("upgrade", params).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(reply["generation"], 3, "{reply}");
    load.wait_for(500);
    let report = load.stop();
    report.assert_clean();
    assert!(report.latency.quantile(1.0) > 2 * SECOND, "nothing was stalled: {report:?}");
}

#[test]
fn a_live_domain_that_panics_brings_errors_and_the_next_upgrade_brings_the_device_back() {
    // Started with `faulty`, so that there is no standby that could take over.
    let daemon = Daemon::start(&[
        "--domain",
        "faulty",
        "--param",
        "size=64M",
        "--param",
        "fault=request:panic:20000",
        "--queues",
        "2",
    ]);
    let mut control = daemon.rpc();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    wait_for_state(&daemon, "faulted");
    let deadline = Instant::now() + PATIENCE;
    while load.faults() == 0 {
        assert!(Instant::now() < deadline, "faulted, but no request has failed");
        thread::sleep(Duration::from_millis(1));
    }
    let reply =
        control.request("upgrade", json!({"name": "ramdisk"})).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(reply["generation"], 2, "{reply}");
    wait_for_state(&daemon, "serving");
    load.wait_for(2000);
    let faults = load.faults();
    load.wait_for(2000);
    assert_eq!(load.faults(), faults, "errors go on after the upgrade");
    let report = load.stop();
    assert!(report.errors > 0, "{report:?}");
    assert_eq!((report.mismatches, report.unanswered, report.spurious), (0, 0, 0), "{report:?}");
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn a_live_domain_that_fails_one_request_fails_that_one_only() {
    let daemon = ramdisk();
    let mut control = daemon.rpc();
    control.request("upgrade", faulty("request:fail:5")).expect("faulty takes over");
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("connected");
    let read = Request::Read { offset: 0, len: 4096 };
    let answers: Vec<Status> =
        (0..20).map(|_| client.queue(0).execute(read, PATIENCE).expect("an answer").0).collect();
    let failed = answers.iter().filter(|&&status| status == Status::IoError).count();
    assert_eq!(failed, 1, "{answers:?}");
    assert!(
        answers.iter().all(|status| matches!(status, Status::Ok | Status::IoError)),
        "{answers:?}"
    );
    assert_eq!(daemon.status()["state"], "serving");
}

#[test]
fn upgrades_at_the_same_time_never_interleave() {
    let daemon = ramdisk();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    let mut generations = Vec::new();
    for _ in 0..20 {
        load.wait_for(20);
        let replies: Vec<_> = thread::scope(|scope| {
            let names = ["ramdisk_v2", "ramdisk", "ramdisk_v2", "ramdisk"];
            let calls = names.map(|name| {
                let mut control = daemon.rpc();
                scope.spawn(move || control.request("upgrade", json!({"name": name})))
            });
            calls.into_iter().map(|call| call.join().expect("no panic")).collect()
        });
        for reply in replies {
            match reply {
                Ok(reply) => generations.push(reply["generation"].as_u64().expect("a generation")),
                Err(error) => {
                    assert!(!error.name().is_empty(), "refused without a code: {error:?}")
                }
            }
        }
    }
    generations.sort_unstable();
    let expected: Vec<u64> = (2..2 + generations.len() as u64).collect();
    assert_eq!(generations, expected, "two upgrades have got one number, or one has got none");
    assert!(generations.len() >= 20, "each round commits one at least");
    load.stop().assert_clean();
    assert_eq!(daemon.status()["generation"], *generations.last().expect("some"));
}

#[test]
fn sigterm_with_a_stalled_request_is_bounded_and_says_if_something_was_left() {
    let mut daemon = ramdisk();
    daemon.rpc().request("upgrade", faulty("request:stall")).expect("faulty takes over");
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("connected");
    let queue = client.queue(0);
    queue.submit(Request::Read { offset: 0, len: 4096 }, 0).expect("submitted");
    queue.kick().expect("kicked");
    thread::sleep(SECOND / 2);
    assert_eq!(queue.reap(|_| {}), 0, "the request was to be stalled");
    let (code, took) = daemon.stop();
    assert!(took < 5 * SECOND, "SIGTERM took {took:?}");
    assert!(!daemon.socket().exists() && !daemon.control().exists(), "the sockets are left");
    let mut statuses = Vec::new();
    queue.reap(|done| statuses.push(done.status));
    // Either the daemon waited and the request was done, or it was left and the exit status says
    // so.
    assert_eq!(code == 0, statuses == [Status::Ok], "exit {code}, answers {statuses:?}");
}

#[test]
fn a_hanging_prepare_pauses_nobody() {
    let daemon = ramdisk();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    load.wait_for(100);
    thread::scope(|scope| {
        let upgrade = scope.spawn(|| {
            let started = Instant::now();
            let reply = daemon.rpc().request("upgrade", faulty("prepare:hang"));
            println!("{reply:?}");
            started.elapsed()
        });
        thread::sleep(SECOND / 2);
        // The one that is being prepared hangs; the live one does not, and `status` is answered.
        load.wait_for(1000);
        assert!(daemon.rpc().request("status", json!({})).is_ok());
        let refuse = json!({"name": "ramdisk", "when_busy": "refuse"});
        assert_eq!(
            daemon.rpc().request("upgrade", refuse).expect_err("one is under way").name(),
            "busy"
        );
        let took = upgrade.join().expect("no panic");
        assert!(took > 2 * SECOND, "the upgrade was to hang for 3 s, but took {took:?}");
    });
    load.wait_for(100);
    let report = load.stop();
    report.assert_clean();
    let max = report.latency.quantile(1.0);
    assert!(max < SECOND, "a request was paused for {max:?} while a successor was prepared");
    run_load(daemon.socket(), &LoadOptions::new(2, 8).on_unknown_content(), SECOND / 10)
        .assert_clean();
}
