//! The daemon's own program is exchanged under a frontend and under clients that do not know.
//!
//! The supervisor goes on in the same process, with every connection; the server is another one. A
//! program that is of no use changes nothing.

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::daemon::{Control, Daemon, binary, disk_directory};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::Signal;
use serde_json::{Value, json};

const RAMDISK: [&str; 6] = ["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"];

fn pid(status: &Value, part: &str) -> u64 {
    status[part]["pid"].as_u64().unwrap_or_else(|| panic!("no {part}: {status}"))
}

/// Copies a program that is to be run. Not by this process: it starts others all the time, which
/// have the copy open for writing until they are another program, and as long it cannot be run.
fn copy_program(from: &Path, to: &Path) {
    let status = Command::new("cp").args([from, to]).status().expect("cp runs");
    assert!(status.success(), "cp {} {}: {status}", from.display(), to.display());
}

/// A program that does `what` instead of what it is asked for.
fn impostor(directory: &Path, what: &str) -> PathBuf {
    let path = directory.join(format!("impostor-{what}"));
    copy_program(Path::new(env!("CARGO_BIN_EXE_impostor")), &path);
    path
}

/// The events of a watch, until `last` has come; each number is higher than the one before.
fn events_until(watch: &mut Control, last: &str) -> Vec<String> {
    let mut events = Vec::new();
    let mut number = 0;
    loop {
        let event = watch.receive().expect("an event").expect("a connection");
        let next = event["params"]["sequence"].as_u64().expect("a number");
        assert!(next > number, "{event} after {number}");
        number = next;
        events.push(event["params"]["event"].as_str().expect("a name").to_owned());
        if events.last().is_some_and(|event| event == last) {
            return events;
        }
    }
}

/// Number of open descriptors of the supervisor.
fn descriptors(daemon: &Daemon) -> usize {
    fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("the daemon lives").count()
}

/// Waits until the supervisor has at most so many descriptors, and one child: what was replaced
/// leaves by itself.
fn assert_leaves(daemon: &Daemon, most: usize) {
    let deadline = Instant::now() + PATIENCE;
    while descriptors(daemon) > most || children(daemon) != 1 {
        let now = (descriptors(daemon), children(daemon));
        assert!(Instant::now() < deadline, "{now:?}, not {most}:\n{}", daemon.log());
        thread::sleep(Duration::from_millis(5));
    }
}

fn children(daemon: &Daemon) -> usize {
    let list = fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.pid()));
    list.expect("the children").split_whitespace().count()
}

#[test]
fn the_supervisor_is_exchanged_twenty_times_under_load() {
    let daemon = Daemon::start(&RAMDISK);
    daemon.call(&["upgrade-daemon", "--only", "supervisor"]);
    let (most, before) = (descriptors(&daemon), daemon.status());
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    for _ in 0..20 {
        load.wait_for(200);
        let since = daemon.status()["supervisor"]["since"].as_u64();
        let reply = daemon.call(&["upgrade-daemon", "--only", "supervisor"]);
        assert_eq!(reply["what"], json!(["supervisor"]), "{reply}");
        assert_eq!(reply["phases_us"]["pause"], 0, "{reply}");
        let now = daemon.status();
        assert!(now["supervisor"]["since"].as_u64() > since, "the same program: {now}");
        assert_eq!(load.faults(), 0, "{}", daemon.log());
    }
    load.wait_for(2000);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    let now = daemon.status();
    assert_eq!(pid(&now, "supervisor"), u64::from(daemon.pid()));
    assert_eq!(pid(&now, "server"), pid(&before, "server"), "the server is another");
    assert_leaves(&daemon, most);
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn both_are_exchanged_ten_times_under_load_and_watched() {
    let daemon = Daemon::start(&RAMDISK);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    let mut watch = daemon.rpc();
    watch.request("watch", json!({})).expect("a watch");
    for round in 1..=10 {
        load.wait_for(200);
        let before = daemon.status();
        let reply = daemon.call(&["upgrade-daemon"]);
        assert_eq!(reply["what"], json!(["supervisor", "server"]), "{reply}");
        for phase in ["start", "prepare", "stop", "replay", "pause"] {
            assert!(reply["phases_us"][phase].is_u64(), "no {phase}: {reply}");
        }
        let now = daemon.status();
        assert_eq!(pid(&now, "supervisor"), u64::from(daemon.pid()));
        assert_ne!(pid(&now, "server"), pid(&before, "server"), "the same server: {reply}");
        assert_eq!(load.faults(), 0, "in round {round}: {}", daemon.log());
        println!("{}", reply["phases_us"]);
    }
    load.stop().assert_clean();
    daemon.signal_server(Signal::KILL);
    let events = events_until(&mut watch, "recovered");
    let count = |name: &str| events.iter().filter(|event| *event == name).count();
    assert_eq!(count("supervisor_exchanged"), 10, "{events:?}");
    assert_eq!(count("server_exchanged"), 10, "{events:?}");
    assert_eq!(count("server_died"), 1, "{events:?}");
    // It is answered beside.
    assert!(watch.send_raw(b"{\"jsonrpc\":\"2.0\",\"id\":9,\"method\":\"history\"}\n").is_ok());
    while watch.receive().expect("an answer").expect("a connection")["id"] != 9 {}
}

#[test]
fn clients_do_not_notice() {
    let daemon = Daemon::start(&RAMDISK);
    let mut half = daemon.rpc();
    half.send_raw(br#"{"jsonrpc":"2.0","id":7,"met"#).expect("half a line");
    // Its answers come from two programs, in the order of its requests.
    let mut many = daemon.rpc();
    let line = |id: u64, method: &str| {
        format!("{}\n", json!({"jsonrpc": "2.0", "id": id, "method": method}))
    };
    let lines: Vec<_> = ["status", "upgrade_daemon", "history", "upgrade_daemon", "status"]
        .iter()
        .zip(1..)
        .map(|(method, id)| line(id, method))
        .collect();
    many.send_raw(lines.concat().as_bytes()).expect("lines");
    for id in 1..=5 {
        let answer = many.receive().expect("an answer").expect("a connection");
        assert_eq!((&answer["id"], &answer["error"]), (&json!(id), &Value::Null), "{answer}");
    }
    half.send_raw(b"hod\":\"status\"}\n").expect("the other half");
    let answer = half.receive().expect("an answer").expect("a connection");
    assert_eq!((&answer["id"], &answer["result"]["state"]), (&json!(7), &json!("serving")));
}

/// What is refused, with which code, and how much of it in how long.
#[test]
fn a_program_of_no_use_changes_nothing() {
    let daemon = Daemon::start(&RAMDISK);
    let most = descriptors(&daemon);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 8));
    let directory = disk_directory();
    let before = daemon.status();
    let text = directory.path().join("text");
    fs::write(&text, "no program").expect("a file");
    let of = |what: &str| impostor(directory.path(), what);
    let cases: [(PathBuf, &[&str], &str); 11] = [
        ("/nonexistent".into(), &[], "program_unusable"),
        ("/nonexistent".into(), &["--only", "server"], "program_unusable"),
        (text, &[], "program_unusable"),
        ("/bin/true".into(), &[], "program_unusable"),
        (of("talks"), &[], "program_unusable"),
        (of("dies"), &[], "program_unusable"),
        (of("of-another-version"), &["--only", "supervisor"], "program_unusable"),
        (of("refuses"), &["--only", "supervisor"], "state_refused"),
        (of("silent"), &[], "program_silent"),
        (of("dies"), &["--only", "server"], "exchange_failed"),
        ("/bin/true".into(), &["--only", "server"], "exchange_failed"),
    ];
    for (path, only, code) in cases {
        let path = path.to_str().expect("UTF-8");
        let sentence = daemon.refuse(&[&["upgrade-daemon", path], only].concat());
        assert!(sentence.contains(&format!("({code})")), "{path} {only:?}: {sentence}");
        let now = daemon.status();
        for part in ["supervisor", "server"] {
            assert_eq!(now[part], before[part], "{path} has changed the {part}");
        }
    }
    load.wait_for(200);
    load.stop().assert_clean();
    daemon.call(&["upgrade-daemon"]);
    // The program before is kept open.
    assert_leaves(&daemon, most + 1);
}

/// It has said that it can go on with the state, and has it no more: what ran goes on, as it was.
#[test]
fn a_program_that_cannot_go_on_after_all_gives_the_process_back() {
    let daemon = Daemon::start(&RAMDISK);
    daemon.call(&["upgrade-daemon", "--only", "supervisor"]);
    let (most, before) = (descriptors(&daemon), daemon.status());
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 8));
    let directory = disk_directory();
    let path = impostor(directory.path(), "forgets");
    symlink(binary("vhost-hotswap"), directory.path().join("vhost-hotswap")).expect("a link");
    let mut watch = daemon.rpc();
    watch.request("watch", json!({})).expect("a watch");
    for only in [&[][..], &["--only", "supervisor"]] {
        load.wait_for(200);
        let path = path.to_str().expect("UTF-8");
        let sentence = daemon.refuse(&[&["upgrade-daemon", path], only].concat());
        assert!(sentence.contains("(program_unusable)"), "{sentence}");
        assert!(sentence.contains("it could not go on after all"), "{sentence}");
        let now = daemon.status();
        assert_eq!(now["server"], before["server"], "{sentence}");
        assert_eq!(pid(&now, "supervisor"), u64::from(daemon.pid()));
    }
    let reply = daemon.call(&["upgrade-daemon"]);
    assert_eq!(reply["what"], json!(["supervisor", "server"]), "{reply}");
    let events = events_until(&mut watch, "server_exchanged");
    let exchanges = events.iter().filter(|event| *event == "supervisor_exchanged").count();
    assert_eq!(exchanges, 1, "those that failed are none: {events:?}");
    load.wait_for(200);
    assert!(!daemon.log().contains("the frontend has disconnected"), "{}", daemon.log());
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    drop(watch);
    assert_leaves(&daemon, most + 1);
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn a_silent_program_holds_up_no_client_and_no_other_exchange_begins() {
    let daemon = Daemon::start(&RAMDISK);
    let directory = disk_directory();
    let silent = impostor(directory.path(), "silent");
    let path = silent.to_str().expect("UTF-8");
    thread::scope(|scope| {
        let refused = scope.spawn(|| daemon.refuse(&["upgrade-daemon", path]));
        let deadline = Instant::now() + PATIENCE;
        while children(&daemon) < 2 {
            assert!(Instant::now() < deadline, "it is not asked");
            thread::sleep(Duration::from_millis(5));
        }
        let sentence = daemon.refuse(&["upgrade-daemon"]);
        assert!(sentence.contains("(exchange_runs)"), "{sentence}");
        let sentence = daemon.refuse(&["upgrade-daemon", "--only", "server"]);
        assert!(sentence.contains("(exchange_runs)"), "{sentence}");
        // A death meanwhile is dealt with.
        daemon.end_server(Signal::KILL);
        assert!(Instant::now() < deadline, "the recovery waits: {}", daemon.log());
        assert!(refused.join().expect("a sentence").contains("(program_silent)"));
    });
}

/// A signal at any moment of an exchange ends the daemon in its order.
fn assert_that_a_signal_is_not_lost(only: &str, moments: impl Iterator<Item = Duration>) {
    for moment in moments {
        let mut daemon = Daemon::start(&RAMDISK);
        let mut control = daemon.rpc();
        let call = json!({"jsonrpc": "2.0", "id": 1, "method": "upgrade_daemon",
            "params": {"only": only}});
        control.send_raw(format!("{call}\n").as_bytes()).expect("a request");
        thread::sleep(moment);
        let (status, took) = daemon.stop();
        assert_eq!(status, 0, "after {moment:?}, {took:?}:\n{}", daemon.log());
        assert!(!daemon.socket().exists() && !daemon.control().exists(), "a socket is left");
    }
}

#[test]
fn a_signal_is_not_lost() {
    assert_that_a_signal_is_not_lost("supervisor", (0..25).map(Duration::from_millis));
}

#[test]
fn a_signal_is_not_lost_while_the_server_is_exchanged() {
    assert_that_a_signal_is_not_lost("server", (0..40).map(Duration::from_millis));
}

#[test]
fn the_program_that_lies_in_the_place_of_the_running_one_is_taken() {
    let directory = disk_directory();
    let place = directory.path().join("vhost-hotswap");
    copy_program(&binary("vhost-hotswap"), &place);
    let modules = binary("vhost-hotswap");
    let modules = modules.parent().and_then(|path| path.to_str()).expect("UTF-8").to_owned();
    let daemon = Daemon::start_command(
        Command::new(&place),
        &[&["--domain-dir", &modules], &RAMDISK[..]].concat(),
    );
    let other = directory.path().join("new");
    copy_program(&binary("vhost-hotswap"), &other);
    fs::rename(&other, &place).expect("the new one in its place");
    let exe = || {
        let link = fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("a program");
        link.to_str().expect("UTF-8").to_owned()
    };
    assert!(exe().ends_with(" (deleted)"));
    for _ in 0..2 {
        daemon.call(&["upgrade-daemon"]);
        assert_eq!(exe(), place.to_str().expect("UTF-8"));
    }
    // People who look see its name, and what it was called with.
    for pid in [pid(&daemon.status(), "server"), u64::from(daemon.pid())] {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).expect("a process");
        assert_eq!(name.trim(), "vhost-hotswap");
    }
    let mut line = String::new();
    let file = fs::File::open(format!("/proc/{}/cmdline", daemon.pid())).expect("a process");
    { file }.read_to_string(&mut line).expect("UTF-8");
    let words: Vec<_> = line.split('\0').collect();
    assert!(words[0].ends_with("vhost-hotswap") && words.contains(&"size=64M"), "{words:?}");
    assert_eq!(words.iter().filter(|word| **word == "--resume-state").count(), 1, "{words:?}");
}
