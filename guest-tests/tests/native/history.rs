//! What has happened is known after the deaths of the processes that it happened to, and each line
//! of the log can be read by a program.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::daemon::{Control, Daemon, run_daemon};
use rustix::process::Signal;
use serde_json::{Value, json};

const RAMDISK: [&str; 4] = ["--domain", "ramdisk", "--param", "size=4M"];

fn history(daemon: &Daemon) -> Vec<Value> {
    daemon.call(&["history"]).as_array().expect("a list").clone()
}

fn upgrade(daemon: &Daemon) {
    daemon.call(&["upgrade", "ramdisk_v2"]);
}

fn watch(daemon: &Daemon) -> Control {
    let mut control = daemon.rpc();
    control.request("watch", json!({})).expect("a watch");
    control
}

/// The next event's number and name.
fn next(watch: &mut Control) -> (u64, String) {
    let event = watch.receive().expect("an event").expect("a connection");
    let params = &event["params"];
    let name = params["event"].as_str().unwrap_or_else(|| panic!("no name: {event}"));
    assert!(params["time_ms"].as_u64().is_some(), "no time: {event}");
    (params["sequence"].as_u64().expect("a number"), name.to_owned())
}

#[test]
fn history_goes_on_over_the_deaths_and_exchanges_of_both_processes() {
    let daemon = Daemon::start(&RAMDISK);
    let mut watch = watch(&daemon);
    upgrade(&daemon);
    assert_eq!([next(&mut watch), next(&mut watch)], [(1, "started".into()), (2, "ended".into())]);
    let mut before = history(&daemon);
    assert_eq!(before.len(), 1);
    for what in ["kill", "server", "supervisor", "kill"] {
        match what {
            "kill" => daemon.end_server(Signal::KILL),
            part => drop(daemon.call(&["upgrade-daemon", "--only", part])),
        }
        assert_eq!(history(&daemon), before, "{what}");
        upgrade(&daemon);
        let now = history(&daemon);
        assert_eq!(now.len(), before.len() + 1, "{what}");
        assert_eq!(now[..before.len()], before, "{what}");
        before = now;
    }
    // Numbers of the history are those of the events: none is missing, and none comes twice.
    let last = before.last().expect("an entry")["sequence"].as_u64().expect("a number");
    let mut events = vec![(2, String::new())];
    while events.last().is_some_and(|(number, _)| *number < last) {
        events.push(next(&mut watch));
        let [.., (before, _), (now, _)] = &events[..] else { unreachable!("there are two") };
        assert_eq!(*now, before + 1, "{events:?}");
    }
    let names: BTreeSet<_> = events.iter().map(|(_, name)| name.as_str()).collect();
    for name in
        ["started", "ended", "server_died", "recovered", "server_exchanged", "supervisor_exchanged"]
    {
        assert!(names.contains(name), "no {name}: {events:?}");
    }
}

#[test]
fn history_is_there_while_no_server_lives() {
    let daemon = Daemon::start(&RAMDISK);
    upgrade(&daemon);
    let server = daemon.server();
    server.signal(Signal::STOP);
    assert_eq!(history(&daemon).len(), 1, "a server that hangs is not asked");
    server.signal(Signal::CONT);
}

fn kept(directory: &Path) -> Daemon {
    let directory = directory.to_str().expect("a path");
    Daemon::start(&[&RAMDISK[..], &["--state-dir", directory]].concat())
}

#[test]
fn a_state_directory_keeps_history_over_the_end_of_everything() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut daemon = kept(directory.path());
    upgrade(&daemon);
    daemon.call(&["upgrade-daemon", "--only", "supervisor"]);
    daemon.call(&["rollback"]);
    let before = history(&daemon);
    assert_eq!(before.len(), 2);
    // A thread writes down what is answered already.
    let file = directory.path().join("history.jsonl");
    let deadline = Instant::now() + PATIENCE;
    let is_last = |line: &str| {
        serde_json::from_str(line)
            .is_ok_and(|line: Value| line["sequence"] == before[1]["sequence"])
    };
    while !fs::read_to_string(&file).expect("the file").lines().any(is_last) {
        assert!(Instant::now() < deadline, "it is not written down");
        thread::sleep(Duration::from_millis(1));
    }
    daemon.end_whole();
    drop(daemon);
    // A loss of power takes a part of the last line.
    let text = fs::read(&file).expect("the file");
    let mut torn = text.clone();
    torn.extend_from_slice(b"{\"sequence\":99,\"event\":\"ended\",\"cha");
    fs::write(&file, torn).expect("the file can be written");
    let daemon = kept(directory.path());
    assert_eq!(history(&daemon), before);
    let mut watch = watch(&daemon);
    upgrade(&daemon);
    let (first, _) = next(&mut watch);
    assert!(first > before[1]["sequence"].as_u64().expect("a number"), "{first}: {before:?}");
    assert!(first < 99, "a torn line counts for nothing");
    assert_eq!(history(&daemon).len(), 3);
    // Another daemon has a directory of its own.
    let socket = daemon.directory().join("other.sock");
    let path = |path: &Path| path.to_str().expect("a path").to_owned();
    let refused =
        run_daemon(&["--socket-path", &path(&socket), "--state-dir", &path(directory.path())]);
    assert_eq!(refused.status, 1, "{refused:?}");
    assert!(refused.stderr.contains("in use by another daemon"), "{}", refused.stderr);
}

#[test]
fn each_line_of_a_log_for_programs_is_an_object() {
    let mut daemon = Daemon::start(&[&RAMDISK[..], &["--log-format", "json"]].concat());
    upgrade(&daemon);
    daemon.refuse(&["upgrade", "nowhere"]);
    daemon.end_server(Signal::KILL);
    daemon.call(&["upgrade-daemon"]);
    assert_eq!(daemon.stop().0, 0);
    let log = daemon.log();
    let mut processes = BTreeSet::new();
    let mut upgrades = 0;
    for line in log.lines() {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        for member in ["time", "level", "target", "message"] {
            assert!(object[member].as_str().is_some_and(|it| !it.is_empty()), "{member}: {line}");
        }
        assert!(object["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{line}");
        assert!(object["fields"].is_object(), "{line}");
        processes.insert(object["pid"].as_u64().expect("a number"));
        let is_upgrade = object["fields"]["change"] == "upgrade";
        upgrades += usize::from(is_upgrade && object["fields"]["generation"] == 2);
        if is_upgrade && object["level"] == "WARN" {
            assert_eq!(object["fields"]["code"], "module_not_found", "{line}");
        }
    }
    assert_eq!(upgrades, 1, "{log}");
    // The supervisor, before and after its exchange, and three servers.
    assert!(processes.len() >= 4, "{processes:?}\n{log}");
}

#[test]
fn a_sentence_that_ends_a_daemon_is_an_object_as_well() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("s");
    let socket = socket.to_str().expect("a path");
    let args = ["--socket-path", socket, "--domain", "nowhere", "--log-format", "json"];
    let refused = run_daemon(&args);
    assert_eq!(refused.status, 1, "{refused:?}");
    for line in refused.stderr.lines() {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(object["message"].as_str().is_some(), "{line}");
    }
    assert!(refused.stderr.contains("nowhere"), "{}", refused.stderr);
}
