//! The live domain dies in the middle of a request, and the guest does not know.
//!
//! `faulty` is upgraded to under a load that checks every block, panics at a request of its own
//! choice, and the standby takes over: what was unanswered is run again, so the load must see no
//! error, no mismatch and no request without an answer. Where there is no standby, or it dies as
//! well, the errors are bounded, the state says `faulted`, and an upgrade brings the device back
//! with its data.

use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::features;
use guest_tests::client::raw::{FREE, GUEST_BASE, RawSession, WRITE};
use guest_tests::daemon::{Control, Daemon};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use serde_json::{Value, json};

fn ramdisk() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"])
}

fn faulty(fault: &str) -> Value {
    json!({"name": "faulty", "params": {"fault": fault}})
}

fn status(control: &mut Control) -> Value {
    control.request("status", json!({})).expect("a status")
}

/// Waits until `done` says so of the status.
fn wait_until(control: &mut Control, what: &str, done: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = status(control);
        if done(&now) {
            return now;
        }
        assert!(Instant::now() < deadline, "{what}: {now}");
        thread::sleep(Duration::from_micros(300));
    }
}

#[test]
fn a_thousand_panics_lose_nothing() {
    let daemon = ramdisk();
    let mut control = daemon.rpc();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    for round in 1..=1000u64 {
        let fault = format!("request:panic:{}", 1 + round * 7 % 90);
        let reply =
            control.request("upgrade", faulty(&fault)).expect("faulty becomes the live domain");
        assert_eq!(reply["to"]["name"], "faulty");
        let now =
            wait_until(&mut control, "no takeover", |now| now["upgrades"]["takeovers"] == round);
        assert_eq!(
            (&now["state"], &now["domain"]["name"]),
            (&json!("serving"), &json!("ramdisk")),
            "{now}"
        );
        assert_eq!(now["generation"], 1 + 2 * round);
        assert_eq!(now["standby"], Value::Null, "a dead instance is no standby");
        assert_eq!(load.faults(), 0, "in round {round}: {now}");
    }
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    let now = status(&mut control);
    let sum = |field: &str| -> u64 {
        now["queues"]
            .as_array()
            .expect("queues")
            .iter()
            .map(|queue| queue[field].as_u64().expect("a number"))
            .sum()
    };
    println!(
        "1000 panics under {} requests, {} of them run again",
        sum("requests"),
        sum("replayed")
    );
    assert!(sum("replayed") >= 1000, "each panic left a request at least: {now}");
    assert_eq!(sum("errors"), 0);
    assert_eq!(now["resident_modules"], json!([]));
    let history = control.request("history", json!({})).expect("a history");
    let told: Vec<_> = history
        .as_array()
        .expect("entries")
        .iter()
        .map(|entry| {
            let word = |field: &str| entry[field].as_str().expect("a word");
            (entry["generation"].as_u64().expect("a number"), word("change"), word("mode"))
        })
        .collect();
    let (last, ..) = *told.last().expect("an entry");
    let expected: Vec<_> = (last + 1 - told.len() as u64..=last)
        .map(|generation| match generation % 2 {
            0 => (generation, "upgrade", "handover"),
            _ => (generation, "takeover", "takeover"),
        })
        .collect();
    assert_eq!(last, 2001);
    assert_eq!(told, expected, "in the order in which they came about");
}

#[test]
fn panics_while_upgrades_come_and_go_lose_nothing() {
    let daemon = ramdisk();
    let mut control = daemon.rpc();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    for round in 0..150u64 {
        let fault = format!("request:panic:{}", 1 + round * 13 % 120);
        control.request("upgrade", faulty(&fault)).expect("faulty becomes the live domain");
        // The panic comes before, in the middle of, or after the gate; and in `replace` of one
        // thread while another drains.
        thread::sleep(Duration::from_micros(round * 37 % 900));
        let replies: Vec<_> = thread::scope(|scope| {
            let calls = ["ramdisk_v2", "ramdisk"].map(|name| {
                let mut control = daemon.rpc();
                scope.spawn(move || control.request("upgrade", json!({"name": name})))
            });
            calls.into_iter().map(|call| call.join().expect("no panic")).collect()
        });
        for reply in replies {
            // A takeover that comes first is waited for.
            reply.unwrap_or_else(|error| panic!("in round {round}: {error:?}\n{}", daemon.log()));
        }
        let now = wait_until(&mut control, "not serving", |now| now["state"] == "serving");
        assert_eq!(load.faults(), 0, "in round {round}: {now}");
        if now["domain"]["name"] == "faulty" {
            control
                .request("upgrade", json!({"name": "ramdisk"}))
                .expect("an upgrade away from it");
        }
    }
    println!("{}", status(&mut control)["upgrades"]);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn a_standby_that_dies_too_ends_the_circle_with_errors() {
    let daemon = ramdisk();
    let mut control = daemon.rpc();
    // Two in a row: the second one's standby is the first, whose panic is still to come.
    control
        .request("upgrade", faulty("request:panic:1"))
        .expect("nothing is there to make it panic");
    control.request("upgrade", faulty("request:panic:1")).expect("nor here");
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    let now = wait_until(&mut control, "never faulted", |now| now["state"] == "faulted");
    assert_eq!(now["upgrades"]["takeovers"], 1, "one takeover was possible: {now}");
    assert!(now["fault"].as_str().is_some_and(|why| why.contains("no standby")), "{now}");
    let error =
        control.request("rollback", json!({})).expect_err("there is nothing to roll back to");
    assert_eq!(error.name(), "no_standby");
    thread::sleep(Duration::from_millis(50));
    let report = load.stop();
    assert!(report.errors > 0, "no domain served");
    assert_eq!(report.unanswered, 0, "faulted is errors, not silence");
    let reply = control
        .request("upgrade", json!({"name": "ramdisk"}))
        .expect("an upgrade brings the device back");
    assert_eq!(reply["from"]["name"], "faulty");
    assert_eq!(status(&mut control)["state"], "serving");
    assert_intact(daemon.socket(), &report.ledgers);
}

/// The first request is the domain's when it dies; the second comes while it is not known yet what
/// the domain may still do with the first. It turns out that it can never be ended, so the first
/// stays unanswered for good, and alone.
#[test]
fn what_comes_while_a_dead_domain_is_being_ended_is_not_left_with_what_it_had() {
    for poll in ["0", "50"] {
        let mut daemon =
            Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--poll-us", poll]);
        let mut control = daemon.rpc();
        control
            .request("upgrade", faulty("request:panic,end:stall,end:panic"))
            .expect("faulty becomes the live domain");
        let mut raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
        let ask = |raw: &mut RawSession, number: u16| {
            let [header, data, status] =
                [0, 0x1000, 0x200].map(|at| FREE + at + 0x2000 * u64::from(number));
            raw.put(header, &[0; 16]).expect("memory");
            raw.put(status, &[0xff]).expect("memory");
            let at = |offset| GUEST_BASE + offset;
            let buffers = [(at(header), 16, 0), (at(data), 512, WRITE), (at(status), 1, WRITE)];
            raw.chain(3 * number, &buffers).expect("memory");
            raw.offer(3 * number).expect("a kick");
            status
        };
        // Which request is answered next, and how.
        let answer = |raw: &mut RawSession, status: u64| {
            let used = raw.used(Duration::from_secs(10)).expect("memory");
            (used.map(|(head, _)| head / 3), raw.get(status, 1).expect("memory")[0])
        };
        let first = ask(&mut raw, 0);
        wait_until(&mut control, "no domain has died", |now| now["state"] == "upgrading");
        let second = ask(&mut raw, 1);
        assert_eq!(
            answer(&mut raw, second),
            (Some(1), 1),
            "an I/O error: {}",
            status(&mut control)
        );
        assert_eq!(status(&mut control)["state"], "faulted");
        control.request("upgrade", json!({"name": "ramdisk"})).expect("ramdisk serves");
        let third = ask(&mut raw, 2);
        assert_eq!(answer(&mut raw, third), (Some(2), 0), "{}", status(&mut control));
        // What may still be written to stays mapped, and holds up no change of the guest's memory.
        raw.plug(0).expect("room for one more region");
        let fourth = ask(&mut raw, 3);
        assert_eq!(answer(&mut raw, fourth), (Some(3), 0), "{}", status(&mut control));
        assert_eq!(raw.get(first, 1).expect("memory"), [0xff], "the first is not answered");
        let stopping = Instant::now();
        raw.stop_ring().expect_err("a ring is not said to be empty when it is not");
        assert!(
            stopping.elapsed() < Duration::from_secs(5),
            "a guest stood still: {:?}",
            stopping.elapsed()
        );
        let (code, took) = daemon.stop();
        assert!(took < Duration::from_secs(5), "it waits for what never comes: {took:?}");
        assert_ne!(code, 0, "something was left, and is said to be");
    }
}

#[test]
fn a_worker_that_hangs_inside_the_domain_is_named_and_waited_for() {
    let daemon = ramdisk();
    let mut control = daemon.rpc();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    load.wait_for(100);
    // A hang keeps one worker inside the domain for 3 s; nothing may be run again before it has
    // come out.
    control.request("upgrade", faulty("request:hang:50")).expect("faulty becomes the live domain");
    thread::sleep(Duration::from_millis(200));
    let error = control
        .request("upgrade", json!({"name": "ramdisk", "drain_timeout_ms": 100}))
        .expect_err("a worker is inside the domain");
    assert_eq!(error.name(), "drain_timeout");
    assert!(error.message.contains("queue") && error.message.contains("in flight"), "{error:?}");
    load.wait_for(100);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
}
