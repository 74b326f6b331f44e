//! Upgrades that take themselves back, under a load that checks every block: new code that fails
//! requests, that is slow, that dies, and that is good.
//!
//! The slow ones are slow by their parameters, by more than a busy machine is.

use std::fs;
use std::thread;
use std::time::Duration;

use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::{Daemon, RpcError};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::Signal;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

fn start(domain: &str, params: &[&str]) -> Daemon {
    let mut args = vec!["--domain", domain, "--queues", "2", "--param", "size=64M"];
    params.iter().for_each(|param| args.extend(["--param", param]));
    Daemon::start(&args)
}

/// An upgrade on trial, whose verdict is waited for.
fn try_out(daemon: &Daemon, name: &str, params: Value, canary: Value) -> Result<Value, RpcError> {
    let params = json!({
        "name": name, "params": params, "canary": canary, "drain_timeout_ms": 20_000
    });
    daemon.rpc().request("upgrade", params)
}

/// The same in a thread of its own, when the canary serves.
fn begin(
    daemon: &Daemon,
    name: &str,
    canary: Value,
) -> thread::JoinHandle<Result<Value, RpcError>> {
    let (mut control, name) = (daemon.rpc(), name.to_owned());
    let waits =
        thread::spawn(move || control.request("upgrade", json!({"name": name, "canary": canary})));
    daemon.wait_until("it does not serve", |now| now["canary"]["state"] == "running");
    waits
}

/// What served before serves again, and is known to.
#[track_caller]
fn assert_taken_back(daemon: &Daemon, refused: &RpcError, name: &str, saying: &str) {
    println!("{}", refused.message);
    assert_eq!(refused.name(), "taken_back", "{refused:?}");
    assert!(refused.message.contains(saying), "{refused:?}");
    let now = daemon.status();
    assert_eq!(
        (&now["state"], &now["domain"]["name"], &now["generation"]),
        (&json!("serving"), &json!(name), &json!(3)),
        "{now}"
    );
    assert_eq!(now["canary"], refused.data["canary"], "{now}");
    let canary = &now["canary"];
    assert_eq!((&canary["state"], &canary["generation"]), (&json!("taken_back"), &json!(2)));
}

#[test]
fn one_that_fails_requests_is_taken_back() {
    let daemon = start("ramdisk", &[]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    load.wait_for(200);
    let params = json!({"error_every": "100"});
    let refused = try_out(&daemon, "faulty", params, json!({"seconds": 3})).expect_err("it fails");
    assert_taken_back(&daemon, &refused, "ramdisk", "requests with errors");
    let after = load.faults();
    load.wait_for(2_000);
    assert_eq!(load.faults(), after, "errors go on after it was taken back");
    let report = load.stop();
    // Some were answered before the gate was shut.
    assert!(report.errors > 0, "{report:?}");
    assert_eq!((report.mismatches, report.unanswered, report.spurious), (0, 0, 0), "{report:?}");
    assert_intact(daemon.socket(), &report.ledgers);
    let changes: Vec<_> = daemon.call(&["history"]).as_array().expect("entries").clone();
    let told: Vec<_> = changes.iter().map(|entry| entry["change"].clone()).collect();
    assert_eq!(told, ["upgrade", "rollback"]);
}

#[test]
fn one_that_is_three_times_slower_is_taken_back_without_an_error() {
    let daemon = start("faulty", &["delay_ms=200"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 64));
    let canary = json!({"seconds": 60, "max_latency_ratio": 1.5});
    let refused = try_out(&daemon, "faulty", json!({"delay_ms": "600"}), canary);
    assert_taken_back(&daemon, &refused.expect_err("slow"), "faulty", "times as slow");
    let canary = daemon.status()["canary"].take();
    println!("{canary}");
    assert!(canary["latency_ratio"].as_f64() > Some(1.5), "{canary}");
    assert!(canary["time_us"] == 60_000_000 && canary["judged"].as_u64() > Some(0), "{canary}");
    load.wait_for(500);
    let report = load.stop();
    report.assert_clean();
    daemon.call(&["upgrade", "ramdisk"]);
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn one_that_is_good_is_kept() {
    let daemon = start("faulty", &["delay_ms=200"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 64));
    let canary = json!({"seconds": 10, "max_latency_ratio": 3.0});
    let reply = try_out(&daemon, "faulty", json!({"delay_ms": "200"}), canary).expect("kept");
    println!("{}", reply["canary"]);
    let canary = daemon.status()["canary"].take();
    assert_eq!((&reply["canary"], &canary["state"]), (&canary, &json!("kept")));
    assert_eq!((&canary["why"], &canary["errors"]), (&Value::Null, &json!(0)));
    assert!(canary["judged"].as_u64() > Some(0), "{canary}");
    assert_eq!(daemon.status()["generation"], 2);
    // It is an upgrade as any other then.
    daemon.call(&["rollback", "--drain-timeout-ms", "20000"]);
    let report = load.stop();
    report.assert_clean();
    daemon.call(&["upgrade", "ramdisk"]);
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn one_that_dies_is_taken_over_and_that_is_the_verdict() {
    let daemon = start("ramdisk", &[]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    load.wait_for(200);
    let params = json!({"fault": "request:panic:500"});
    let refused = try_out(&daemon, "faulty", params, json!({"seconds": 3})).expect_err("it dies");
    assert_taken_back(&daemon, &refused, "ramdisk", "its standby took over");
    load.wait_for(200);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn a_bad_sector_that_both_have_is_no_fault_of_the_new_one() {
    let daemon = start("faulty", &["bad=1M"]);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a session");
    let mut read = |offset: u64| {
        let read = Request::Read { offset, len: 4096 };
        client.queue(0).execute(read, LIMIT).expect("an answer").0
    };
    assert_eq!((read(0), read(2 << 20)), (Status::IoError, Status::Ok));
    let waits = {
        let mut control = daemon.rpc();
        let params = json!({"name": "faulty", "params": {"bad": "4M"}, "canary": {"seconds": 30}});
        thread::spawn(move || control.request("upgrade", params))
    };
    daemon.wait_until("it does not serve", |now| now["canary"]["state"] == "running");
    assert_eq!(read(0), Status::IoError);
    daemon.wait_until("it is not explained", |now| now["canary"]["errors_explained"] == 1);
    assert_eq!(daemon.status()["canary"]["errors"], 0);
    assert_eq!(read(2 << 20), Status::IoError, "this one is its own");
    let refused = waits.join().expect("no panic").expect_err("it fails");
    assert_taken_back(&daemon, &refused, "faulty", "had none: 1, and 0 may be");
    assert_eq!(read(2 << 20), Status::Ok);
    // As many as are allowed.
    let waits = begin(&daemon, "faulty", json!({"seconds": 2, "max_errors": 0}));
    assert_eq!(read(0), Status::Ok, "faults are not inherited");
    assert_eq!(waits.join().expect("no panic").expect("it is good")["canary"]["state"], "kept");
}

#[test]
fn what_the_guest_asks_for_against_the_disks_blocks_is_no_fault_of_the_new_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk");
    fs::File::create(&path).and_then(|file| file.set_len(4 << 20)).expect("a file");
    let param = format!("path={}", path.to_str().expect("UTF-8"));
    let args = ["--domain", "file", "--param", &param, "--param", "block_size=4096"];
    let daemon = Daemon::start(&args);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a session");
    let waits = begin(&daemon, "file", json!({"seconds": 3}));
    let block = [0; 512];
    for offset in [512, 3584, 4096] {
        for request in [Request::Read { offset, len: 512 }, Request::Write { offset, data: &block }]
        {
            let status = client.queue(0).execute(request, LIMIT).expect("an answer").0;
            assert_eq!(status, Status::IoError, "at {offset}");
        }
    }
    let canary = &waits.join().expect("no panic").expect("it is good")["canary"];
    assert_eq!((&canary["state"], &canary["errors"]), (&json!("kept"), &json!(0)), "{canary}");
    assert_eq!(daemon.status()["queues"][0]["errors"], 6, "the guest's own");
}

#[test]
fn so_many_errors_as_are_allowed_are_allowed() {
    let daemon = start("ramdisk", &[]);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a session");
    let waits = {
        let mut control = daemon.rpc();
        let canary = json!({"seconds": 3, "max_errors": 2});
        let params = json!({"name": "faulty", "params": {"bad": "4M"}, "canary": canary});
        thread::spawn(move || control.request("upgrade", params))
    };
    daemon.wait_until("it does not serve", |now| now["canary"]["state"] == "running");
    for offset in [0, 1 << 20] {
        let read = Request::Read { offset, len: 4096 };
        let status = client.queue(0).execute(read, LIMIT).expect("an answer").0;
        assert_eq!(status, Status::IoError);
    }
    let reply = waits.join().expect("no panic").expect("it may fail two");
    assert_eq!(
        (&reply["canary"]["state"], &reply["canary"]["errors"]),
        (&json!("kept"), &json!(2))
    );
    assert_eq!(daemon.status()["domain"]["name"], "faulty");
}

#[test]
fn nothing_that_would_take_its_standby_is_begun_and_a_rollback_ends_it() {
    let daemon = start("ramdisk", &[]);
    let waits = begin(&daemon, "ramdisk_v2", json!({"seconds": 600}));
    for args in [
        &["upgrade", "ramdisk"][..],
        &["upgrade", "ramdisk", "--canary", "1"],
        &["upgrade", "ramdisk", "--no-queue"],
    ] {
        let sentence = daemon.refuse(args);
        assert!(sentence.contains("(canary_runs)"), "{sentence}");
    }
    // A check says what the upgrade would.
    let upgrade = daemon.refuse(&["upgrade", "ramdisk"]);
    assert_eq!(daemon.refuse(&["check", "ramdisk"]), upgrade);
    let sentence = daemon.refuse(&["upgrade-daemon", "--only", "server"]);
    assert!(sentence.contains("on trial"), "{sentence}");
    let sentence = daemon.refuse(&["resize", "65M"]);
    assert!(sentence.contains("(canary_runs)"), "{sentence}");
    assert_eq!(daemon.status()["canary"]["state"], "running");
    daemon.call(&["rollback"]);
    let refused = waits.join().expect("no panic").expect_err("it was rolled back");
    assert_taken_back(&daemon, &refused, "ramdisk", "rolled back by a command");
    daemon.call(&["upgrade", "ramdisk_v2"]);
    daemon.call(&["resize", "65M"]);
    daemon.call(&["upgrade-daemon", "--only", "server"]);
}

#[test]
fn what_could_not_be_taken_back_is_refused_before() {
    let daemon = start("faulty", &["fault=request:panic:1"]);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a session");
    let read = Request::Read { offset: 0, len: 4096 };
    let (status, _) = client.queue(0).execute(read, LIMIT).expect("an answer");
    assert_eq!(status, Status::IoError);
    daemon.wait_until("it is not faulted", |now| now["state"] == "faulted");
    let sentence = daemon.refuse(&["upgrade", "ramdisk", "--canary", "5"]);
    assert!(sentence.contains("(no_way_back)") && sentence.contains("--canary"), "{sentence}");
    assert_eq!(daemon.status()["canary"], Value::Null);
    daemon.call(&["upgrade", "ramdisk"]);
    // What an upgrade is refused for, a canary is, and is none then.
    let sentence = daemon.refuse(&["upgrade", "empty", "--canary", "5"]);
    assert!(sentence.contains("(schema_not_accepted)"), "{sentence}");
    assert_eq!(daemon.status()["canary"], Value::Null);
    for bad in [
        &["--canary", "0"][..],
        &["--max-errors", "1"],
        &["--canary", "1", "--max-latency-ratio", "0.5"],
    ] {
        assert_eq!(daemon.ctl(&[&["upgrade", "ramdisk"], bad].concat()).status, 2, "{bad:?}");
    }
}

#[test]
fn it_goes_on_when_its_client_leaves() {
    let daemon = start("ramdisk", &[]);
    let mut control = daemon.rpc();
    let call = json!({"jsonrpc": "2.0", "id": 1, "method": "upgrade",
                      "params": {"name": "ramdisk_v2", "canary": {"seconds": 3}}});
    control.send_raw(format!("{call}\n").as_bytes()).expect("a call");
    daemon.wait_until("it does not serve", |now| now["canary"]["state"] == "running");
    drop(control);
    let now = daemon.wait_until("no verdict", |now| now["canary"]["state"] == "kept");
    let why = now["canary"]["why"].as_str().expect("why");
    assert!(why.contains("too few"), "nothing was judged without a load: {now}");
    assert_eq!(now["domain"]["version"], "2.0.0");
}

#[test]
fn a_server_that_dies_during_a_trial_is_followed_by_the_one_before() {
    let daemon = start("ramdisk", &[]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    load.wait_for(200);
    let waits = begin(&daemon, "ramdisk_v2", json!({"seconds": 600, "max_latency_ratio": 1000.0}));
    load.wait_for(200);
    daemon.end_server(Signal::KILL);
    let refused = waits.join().expect("no panic").expect_err("its server has died");
    assert_eq!(refused.name(), "server_died");
    let now = daemon.status();
    assert_eq!(
        (&now["state"], &now["domain"]["version"], &now["generation"]),
        (&json!("serving"), &json!("1.0.0"), &json!(3)),
        "{now}"
    );
    let canary = &now["canary"];
    assert_eq!((&canary["state"], &canary["generation"]), (&json!("taken_back"), &json!(2)));
    assert!(canary["why"].as_str().is_some_and(|why| why.contains("server")), "{canary}");
    load.wait_for(200);
    daemon.end_server(Signal::KILL);
    assert_eq!(daemon.status()["generation"], 3, "once");
    load.wait_for(200);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    daemon.call(&["upgrade", "ramdisk_v2"]);
}

#[test]
fn where_the_one_before_cannot_go_on_the_one_on_trial_does() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name).to_str().expect("UTF-8").to_owned();
    let (one, other) = (path("one"), path("other"));
    fs::File::create(&one).and_then(|file| file.set_len(64 << 20)).expect("a file");
    fs::hard_link(&one, &other).expect("another name of it");
    let param = format!("path={one}");
    let daemon = Daemon::start(&["--domain", "file", "--queues", "2", "--param", &param]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    load.wait_for(200);
    let waits = {
        let mut control = daemon.rpc();
        let canary = json!({"seconds": 600, "max_latency_ratio": 1000.0});
        let params = json!({"name": "file", "params": {"path": other}, "canary": canary});
        thread::spawn(move || control.request("upgrade", params))
    };
    daemon.wait_until("it does not serve", |now| now["canary"]["state"] == "running");
    // What the one before would open.
    fs::remove_file(&one).expect("it is there");
    daemon.end_server(Signal::KILL);
    let refused = waits.join().expect("no panic").expect_err("its server has died");
    assert_eq!(refused.name(), "server_died");
    let now = daemon.status();
    assert_eq!((&now["state"], &now["generation"]), (&json!("serving"), &json!(2)), "{now}");
    let canary = &now["canary"];
    assert_eq!((&canary["state"], &canary["generation"]), (&json!("stuck"), &json!(2)));
    assert!(canary["why"].as_str().is_some_and(|why| why.contains("prepare_failed")), "{canary}");
    load.wait_for(200);
    daemon.end_server(Signal::KILL);
    assert_eq!(daemon.status()["generation"], 2, "it is on trial no more");
    load.wait_for(200);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
}
