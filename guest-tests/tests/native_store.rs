//! A disk in memory outlives both processes, where a service manager keeps its descriptors; and
//! what is lost is said.
//!
//! A program of its own, because descriptors are handed over by being inherited: daemons of other
//! tests would have them, too.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::{Daemon, run_daemon};
use guest_tests::manager::Manager;
use guest_tests::signer::Signer;
use guest_tests::stamp::{Ledger, Load, LoadOptions, assert_intact, damage};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};
use serde_json::{Value, json};

const RAMDISK: [&str; 6] = ["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"];

/// What `status` says of the store, once the manager has looked at everything.
fn settled(daemon: &Daemon) -> Value {
    let is_settled = |now: &Value| now["supervisor"]["store"]["state"] != "storing";
    daemon.wait_until("the store", is_settled)["supervisor"]["store"].clone()
}

/// A disk in a manager's store.
fn start(manager: &mut Manager) -> Daemon {
    let daemon = Daemon::start_command(manager.command(), &RAMDISK);
    assert_eq!(settled(&daemon)["state"], "held", "{}", daemon.status());
    daemon
}

/// Loads the disk for a while; what it has to hold then.
fn written(daemon: &Daemon) -> Vec<Ledger> {
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    load.wait_for(3000);
    let report = load.stop();
    report.assert_clean();
    report.ledgers
}

#[test]
fn a_ramdisk_outlives_kills_of_everything_under_load() {
    let mut manager = Manager::new(64);
    let mut daemon = start(&mut manager);
    let options = LoadOptions::new(2, 32);
    let mut ledgers = None;
    for round in 1..=10 {
        let load = match ledgers.take() {
            None => Load::start(daemon.socket(), &options),
            Some(ledgers) => Load::resume(daemon.socket(), &options, ledgers),
        };
        load.wait_for(500);
        if round % 3 == 0 {
            // What serves is another module, in other processes.
            let next = if round % 2 == 0 { "ramdisk" } else { "ramdisk_v2" };
            daemon.call(&["upgrade", next]);
            daemon.call(&["upgrade-daemon"]);
            daemon.end_server(Signal::KILL);
        }
        // A server that comes after another one loads the standby while it serves.
        let has_standby = |now: &Value| round < 3 || now["standby"] != Value::Null;
        let before = daemon.wait_until("the standby", has_standby);
        assert_eq!(settled(&daemon)["state"], "held", "in round {round}");
        daemon.end_whole();
        let mut left = load.abandon().ledgers;
        left.iter_mut().for_each(Ledger::may_be_torn);
        daemon.start_again_by(manager.command());
        assert_intact(daemon.socket(), &left);
        ledgers = Some(left);
        let now = daemon.wait_until("the standby", has_standby);
        for member in ["generation", "domain", "standby", "capacity"] {
            assert_eq!(now[member], before[member], "`{member}` in round {round}");
        }
        assert_eq!(settled(&daemon)["lost"], Value::Null);
        // Two modules at most, the region, the record.
        assert!(manager.names().len() <= 4, "{:?}", manager.names());
    }
    manager.wait_for("READY=1\nSTATUS=serving `ramdisk`");
    // What came with the store does not get to servers.
    let server = format!("/proc/{}/environ", daemon.server_pid());
    let environment = std::fs::read(server).expect("the server lives");
    let environment = String::from_utf8_lossy(&environment);
    assert!(!environment.contains("LISTEN_") && !environment.contains("NOTIFY_"), "{environment}");
}

#[test]
fn a_ramdisk_outlives_a_restart_of_the_service() {
    let mut manager = Manager::new(64);
    let mut daemon = start(&mut manager);
    let ledgers = written(&daemon);
    daemon.call(&["resize", "96M"]);
    for _ in 0..2 {
        assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
        manager.wait_for("STOPPING=1");
        daemon.start_again_by(manager.command());
        assert_intact(daemon.socket(), &ledgers);
        assert_eq!(daemon.status()["capacity"], 96 << 20);
    }
}

#[test]
fn without_a_store_a_ramdisk_is_lost_and_that_is_said_before() {
    let mut daemon = Daemon::start(&RAMDISK);
    assert_eq!(settled(&daemon)["state"], "none");
    let ledgers = written(&daemon);
    daemon.end_whole();
    daemon.start_again();
    // So that the tests before can fail.
    assert!(!damage(daemon.socket(), &ledgers).is_empty());
}

#[test]
fn a_store_that_is_too_small_or_says_nothing_is_not_relied_on() {
    let mut small = Manager::new(2);
    let daemon = Daemon::start_command(small.command(), &RAMDISK);
    let store = settled(&daemon);
    assert_eq!((&store["state"], &store["entries"]), (&"failed".into(), &0.into()), "{store}");
    let why = store["why"].as_str().expect("a reason");
    assert!(why.contains("FileDescriptorStoreMax"), "{why}");
    assert!(daemon.log().contains("does not keep the disk"), "{}", daemon.log());
    let mut silent = Manager::new(64).without_a_word();
    let daemon = Daemon::start_command(silent.command(), &RAMDISK);
    assert_eq!(settled(&daemon)["state"], "unconfirmed");
}

#[test]
fn a_disk_in_a_file_is_not_stored() {
    let mut manager = Manager::new(64);
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    image.as_file().set_len(64 << 20).expect("its size");
    let path = image.path().to_str().expect("UTF-8");
    let daemon = Daemon::start_command(manager.command(), &["--blk-file", path]);
    assert_eq!(settled(&daemon)["state"], "not_needed");
    assert_eq!(manager.names(), [""; 0]);
    // Its lock goes with the processes that have it.
    manager.wait_for("READY=1");
}

/// A disk whose entries something has been at, started again.
fn started_after(spoil: impl FnOnce(&mut Vec<(String, File)>)) -> (Manager, Daemon, Vec<Ledger>) {
    let mut manager = Manager::new(64);
    let mut daemon = start(&mut manager);
    let ledgers = written(&daemon);
    daemon.end_whole();
    manager.spoil(spoil);
    daemon.start_again_by(manager.command());
    (manager, daemon, ledgers)
}

fn is_record(name: &str) -> bool {
    name.starts_with("record-")
}

/// The entry that is the disk's data: the largest.
fn region(entries: &mut [(String, File)]) -> &mut (String, File) {
    let len = |(_, file): &&mut (String, File)| file.metadata().expect("a file").len();
    entries.iter_mut().max_by_key(len).expect("entries")
}

#[test]
fn what_is_lost_is_said_and_the_disk_begins_anew() {
    for (why, spoil) in [
        (
            "is not there any more",
            (|entries| {
                let name = region(entries).0.clone();
                entries.retain(|(other, _)| *other != name);
            }) as fn(&mut Vec<(String, File)>),
        ),
        ("the record is not there", |entries| entries.retain(|(name, _)| !is_record(name))),
        ("is another file", |entries| {
            let (_, file) = region(entries);
            let len = file.metadata().expect("a file").len();
            *file = tempfile::tempfile().expect("a file");
            file.set_len(len).expect("its size");
        }),
        ("the record is not understood", |entries| {
            let record = entries.iter_mut().find(|(name, _)| is_record(name)).expect("a record");
            record.1 = tempfile::tempfile().expect("a file");
            record.1.write_all_at(b"{}", 0).expect("written");
        }),
    ] {
        let (manager, daemon, ledgers) = started_after(spoil);
        let store = settled(&daemon);
        assert!(store["lost"].as_str().is_some_and(|lost| lost.contains(why)), "{why}: {store}");
        assert_eq!(store["state"], "held", "the new one is kept: {store}");
        assert!(daemon.log().contains("is lost"), "{}", daemon.log());
        assert!(!damage(daemon.socket(), &ledgers).is_empty(), "{why}: it is there after all");
        assert_eq!(manager.names().len(), 3, "{:?}", manager.names());
    }
}

#[test]
fn what_is_foreign_is_let_be() {
    let (manager, daemon, ledgers) = started_after(|entries| {
        let other = || tempfile::tempfile().expect("a file");
        entries.insert(0, ("stored".into(), other()));
        entries.push((String::new(), other()));
        let double = entries.iter().find(|(name, _)| !is_record(name)).expect("one").0.clone();
        entries.push((double, other()));
    });
    assert_intact(daemon.socket(), &ledgers);
    assert_eq!(settled(&daemon)["lost"], Value::Null);
    assert!(manager.names().contains(&"stored".to_owned()));
    assert!(daemon.log().contains("`stored`, which is none of this daemon's"), "{}", daemon.log());
}

/// The data is there for the program that can read it.
#[test]
fn a_record_of_another_version_is_refused_and_stays() {
    let mut manager = Manager::new(64);
    let mut daemon = start(&mut manager);
    daemon.end_whole();
    let before = manager.names();
    manager.spoil(|entries| {
        let record = entries.iter_mut().find(|(name, _)| is_record(name)).expect("a record");
        record.1 = tempfile::tempfile().expect("a file");
        let text = br#"{"version":99,"program":"9.9","record":{}}"#;
        record.1.write_all_at(text, 0).expect("written");
    });
    let mut command = manager.command();
    command.args(["--socket-path", "/nowhere/x.sock"]).args(RAMDISK);
    let output = command.output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("version 99 (of program 9.9)"), "{said}");
    assert_eq!(manager.names(), before);
}

/// Not even a command line that asks for another disk has one thrown away.
#[test]
fn the_disk_that_was_kept_goes_on_whatever_the_command_line_says() {
    let mut manager = Manager::new(64);
    let mut daemon = start(&mut manager);
    let ledgers = written(&daemon);
    daemon.end_whole();
    drop(daemon);
    for _ in 0..2 {
        let other = ["--domain", "empty", "--param", "size=1M"];
        let mut daemon = Daemon::start_command(manager.command(), &other);
        assert_intact(daemon.socket(), &ledgers);
        assert!(daemon.log().contains("asks for another disk"), "{}", daemon.log());
        daemon.end_whole();
    }
}

/// Changes what the record says of the live module, so that no server gets ready with it.
fn spoil_live(entries: &mut [(String, File)]) {
    let (_, file) = entries.iter_mut().find(|(name, _)| is_record(name)).expect("a record");
    let mut text = vec![0; file.metadata().expect("a file").len() as usize];
    file.read_exact_at(&mut text, 0).expect("it can be read");
    let mut record: Value = serde_json::from_slice(&text).expect("JSON");
    record["record"]["list"]["live"]["params"]["size"] = "no size".into();
    *file = tempfile::tempfile().expect("a file");
    file.write_all_at(record.to_string().as_bytes(), 0).expect("written");
}

#[test]
fn a_kept_disk_whose_module_does_not_start_waits_for_an_upgrade() {
    let (manager, mut daemon, ledgers) = started_after(|entries| spoil_live(entries));
    let now = daemon.wait_until("it is not given up", |now| now["state"] == "faulted");
    assert_eq!(now["server"]["deaths"], 5, "{now}");
    // So that the manager does not start it again for ever.
    manager.wait_for("READY=1\nSTATUS=faulted");
    daemon.call(&["upgrade", "ramdisk"]);
    assert_intact(daemon.socket(), &ledgers);
    assert_eq!(settled(&daemon)["state"], "held");
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn a_kept_disk_whose_module_does_not_start_goes_on_with_the_standby() {
    let mut manager = Manager::new(64);
    let mut daemon = start(&mut manager);
    let ledgers = written(&daemon);
    daemon.call(&["upgrade", "ramdisk_v2"]);
    assert_eq!(settled(&daemon)["state"], "held");
    daemon.end_whole();
    manager.spoil(|entries| spoil_live(entries));
    daemon.start_again_by(manager.command());
    let now = daemon.wait_until("no standby goes on", |now| now["state"] == "serving");
    assert_eq!(now["domain"]["version"], "1.0.0", "{now}");
    assert_intact(daemon.socket(), &ledgers);
    assert_eq!(settled(&daemon)["state"], "held");
}

/// Not even the deaths of both processes give it away, while the upgrade has not come.
#[test]
fn a_kept_disk_that_waits_for_an_upgrade_answers_nothing_before() {
    let (manager, mut daemon, ledgers) = started_after(|entries| spoil_live(entries));
    daemon.wait_until("it is not given up", |now| now["state"] == "faulted");
    daemon.refuse(&["upgrade", "no_such_module"]);
    assert_eq!(settled(&daemon)["state"], "held");
    let mut manager = manager;
    daemon.end_whole();
    daemon.start_again_by(manager.command());
    let socket = daemon.socket().to_owned();
    let reader = thread::spawn(move || assert_intact(&socket, &ledgers));
    thread::sleep(Duration::from_secs(1));
    assert!(!reader.is_finished(), "it was answered");
    daemon.call(&["upgrade", "ramdisk"]);
    reader.join().expect("what was written is there");
}

/// What is there is the disk as it was, which is better than none.
#[test]
fn a_change_that_cannot_be_written_down_takes_nothing_away_and_is_tried_again() {
    let mut manager = Manager::new(64);
    let daemon = start(&mut manager);
    let before = manager.names();
    let mut control = daemon.rpc();
    let mut ask = |method: &str, params| control.request(method, params).expect("an answer");
    ask("status", json!({}));
    let pid = Pid::from_raw(daemon.pid() as i32);
    // It can open nothing more.
    let is_open = |fd: &u64| Path::new(&format!("/proc/{}/fd/{fd}", daemon.pid())).exists();
    let free = (0..).find(|fd| !is_open(fd));
    let none = Rlimit { current: free, ..getrlimit(Resource::Nofile) };
    let limit = prlimit(pid, Resource::Nofile, none).expect("its limit");
    ask("limit", json!({"iops": 1_000_000}));
    let deadline = Instant::now() + PATIENCE;
    let mut store = ask("status", json!({}))["supervisor"]["store"].take();
    while store["state"] != "failed" {
        assert!(Instant::now() < deadline, "{store}");
        store = ask("status", json!({}))["supervisor"]["store"].take();
    }
    assert!(store["why"].as_str().is_some_and(|why| why.contains("tried again")), "{store}");
    assert_eq!(manager.names(), before);
    prlimit(pid, Resource::Nofile, limit).expect("its limit");
    daemon.wait_until("it is not tried again", |now| now["supervisor"]["store"]["state"] == "held");
    assert_ne!(manager.names(), before, "the record is another one");
    assert_eq!(manager.names().len(), before.len());
}

/// A listening socket that is passed by name, before or behind what is stored.
#[test]
fn a_socket_units_socket_is_served_and_outlives_the_daemon() {
    let mut manager = Manager::new(64);
    let socket = manager.listen("vhost-hotswap@vm1.socket", "activated.sock");
    let directory = tempfile::tempdir().expect("a directory");
    let control = directory.path().join("control");
    let start = |manager: &mut Manager| {
        let mut command = manager.command();
        command.args(["--socket-activation", "--control-path"]).arg(&control).args(RAMDISK);
        command.spawn().expect("it starts")
    };
    let mut ledgers = None;
    for _ in 0..3 {
        let mut child = start(&mut manager);
        let deadline = Instant::now() + PATIENCE;
        while !control.exists() {
            assert!(Instant::now() < deadline, "no control socket");
            thread::sleep(Duration::from_millis(5));
        }
        let options = LoadOptions::new(2, 32);
        let load = match ledgers.take() {
            None => Load::start(&socket, &options),
            Some(ledgers) => Load::resume(&socket, &options, ledgers),
        };
        load.wait_for(500);
        let report = load.stop();
        report.assert_clean();
        ledgers = Some(report.ledgers);
        let child_pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(child_pid, Signal::TERM).expect("it lives");
        assert_eq!(child.wait().expect("it ends").code(), Some(0));
        assert!(socket.exists(), "the socket is the manager's");
    }
    // A second socket needs a name.
    manager.listen("other", "other.sock");
    let mut command = manager.command();
    command.args(["--socket-activation", "--control-path"]).arg(&control);
    let output = command.output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("FileDescriptorName=frontend"), "{said}");
    let alone = run_daemon(&["--socket-activation", "--control-path", "/nowhere/c"]);
    assert_eq!(alone.status, 1);
    assert!(alone.stderr.contains("no listening socket was passed"), "{}", alone.stderr);
}

#[test]
fn one_process_says_that_it_is_ready_too() {
    let mut manager = Manager::new(64);
    let _daemon = Daemon::start_command(manager.command(), &["--no-supervisor"]);
    manager.wait_for("READY=1");
    assert_eq!(manager.names(), [""; 0]);
}

#[test]
fn the_socket_has_the_mode_and_the_group_that_were_asked_for() {
    let group = rustix::process::getegid().as_raw();
    for group in [group.to_string(), "no-such-group".to_owned()] {
        let args = ["--socket-mode", "0660", "--socket-group", &group];
        if group.parse::<u32>().is_err() {
            let refused = run_daemon(&[&args[..], &["--socket-path", "/nowhere/s"]].concat());
            assert_eq!(refused.status, 1);
            assert!(refused.stderr.contains("no group `no-such-group`"), "{}", refused.stderr);
            continue;
        }
        for more in [&[][..], &["--no-supervisor"]] {
            let daemon = Daemon::start(&[&args[..], more].concat());
            let of = |path: &std::path::Path| std::fs::metadata(path).expect("a socket");
            let socket = of(daemon.socket());
            assert_eq!(socket.permissions().mode() & 0o7777, 0o660);
            assert_eq!(socket.gid().to_string(), group);
            let control = of(daemon.control());
            assert_eq!(control.permissions().mode() & 0o7777, 0o600, "it can load code");
        }
    }
    if rustix::process::geteuid().is_root() {
        let daemon = Daemon::start(&["--socket-mode", "0660", "--socket-group", "4711"]);
        assert_eq!(std::fs::metadata(daemon.socket()).expect("a socket").gid(), 4711);
    }
}

#[test]
fn a_serial_number_reaches_the_guest() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--serial", "WD-1234"]);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a connection");
    let answer = client.queue(0).execute(Request::Identify, PATIENCE);
    let (status, serial) = answer.expect("an answer");
    assert_eq!(status, Status::Ok);
    assert_eq!(serial, [b"WD-1234".as_slice(), &[0; 13]].concat());
    let long = "x".repeat(21);
    let refused = run_daemon(&["--socket-path", "/tmp/never.sock", "--serial", &long]);
    assert_eq!(refused.status, 1);
    assert!(refused.stderr.contains("20 printable"), "{}", refused.stderr);
    let twice = ["--serial", "a", "--param", "serial=b", "--socket-path", "/tmp/never.sock"];
    assert_eq!(run_daemon(&twice).status, 2);
}

#[test]
fn a_kept_module_is_held_against_the_keys_of_the_next_start() {
    let (signer, other) = (Signer::default(), Signer::default());
    let folder = tempfile::tempdir().expect("a directory");
    let (module, key) = (signer.signed("ramdisk", folder.path()), folder.path().join("key.pub"));
    let (module, key_text) = (module.to_str().expect("UTF-8"), key.to_str().expect("UTF-8"));
    signer.write_public(&key);
    let mut manager = Manager::new(64);
    let disk = ["--domain", module, "--param", "size=64M", "--queues", "2"];
    let start = [&disk[..], &["--trusted-key", key_text]].concat();
    let mut daemon = Daemon::start_command(manager.command(), &start);
    assert_eq!(settled(&daemon)["state"], "held");
    let ledgers = written(&daemon);
    assert_eq!(settled(&daemon)["state"], "held");
    daemon.end_whole();
    other.write_public(&key);
    daemon.start_again_by(manager.command());
    daemon.wait_until("it is given up", |now| now["state"] == "faulted");
    assert!(daemon.log().contains("module_untrusted"), "{}", daemon.log());
    // The data is there still, for a module that is trusted.
    other.sign(std::path::Path::new(module));
    daemon.call(&["upgrade", module]);
    assert_intact(daemon.socket(), &ledgers);
}
