//! The process that serves can do what serving takes, and nothing else.

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::daemon::{Daemon, binary, disk_directory};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::Signal;
use serde_json::{Value, json};

/// A member of `/proc/PID/task/*/status`, of all threads of a process.
fn of_threads(pid: u32, member: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process lives");
    let value = |task: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.expect("a thread").path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(member))?;
        Some(line.trim_start_matches(':').trim().to_owned())
    };
    tasks.filter_map(value).collect()
}

fn assert_confined(daemon: &Daemon, how: &str) {
    let pid = daemon.server_pid();
    for (member, is_right) in [
        ("CapEff", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        let all = of_threads(pid, member);
        assert!(
            !all.is_empty() && all.iter().all(|one| one == is_right),
            "{how}: {member} {all:?}"
        );
    }
    let told = &daemon.status()["sandbox"];
    assert_eq!((&told["mode"], &told["no_new_privs"]), (&json!("on"), &json!(true)), "{how}");
    assert_eq!((&told["capabilities"], &told["refused"]), (&json!(false), &json!(0)), "{how}");
    assert_eq!(told["seccomp"], "enforced", "{how}");
    assert!(told["landlock"].as_i64().is_some_and(|level| level > 0), "{how}: {told}");
}

/// What a domain reaches for that it has no business with, from a request and from its start.
#[test]
fn a_domain_reaches_nothing_outside() {
    let outside = tempfile::tempdir().expect("a directory");
    let secret = outside.path().join("secret");
    fs::write(&secret, b"x").expect("a file");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = tcp.local_addr().expect("an address").port();
    let unix = outside.path().join("socket");
    let _unix = UnixListener::bind(&unix).expect("a socket");
    let reach = [
        format!("open:{}", secret.display()),
        format!("write:{}", secret.display()),
        format!("write:{}", outside.path().join("new").display()),
        "open:/etc/passwd".to_owned(),
        "fork".to_owned(),
        format!("connect:127.0.0.1:{port}"),
        format!("connect:{}", unix.display()),
    ];
    let attempts = reach.len() as u64;
    let reach = format!("reach={}", reach.join(","));
    let run = |sandbox: &str, fault: &str| -> (Daemon, Value) {
        let fault = format!("fault={fault}");
        let params = ["--domain", "faulty", "--param", &fault, "--param", &reach];
        let daemon = Daemon::start(&[&params[..], &[sandbox]].concat());
        let load = Load::start(daemon.socket(), &LoadOptions::new(1, 4));
        load.wait_for(1000);
        let report = load.stop();
        report.assert_clean();
        assert_intact(daemon.socket(), &report.ledgers);
        let counters = daemon.status()["counters"].clone();
        (daemon, counters)
    };
    for phase in ["request:reach:5", "prepare:reach", "activate:reach"] {
        let (daemon, counters) = run("--sandbox=on", phase);
        assert_eq!(counters["refused"], attempts, "{phase}: {counters}\n{}", daemon.log());
        assert_eq!(counters["reached"], Value::Null, "{phase}: {counters}\n{}", daemon.log());
        // It is no death, and it is said.
        assert_eq!(daemon.status()["server"]["deaths"], 0);
        assert!(daemon.log().contains("reach=fork: refused"), "{}", daemon.log());
        assert!(daemon.status()["sandbox"]["refused"].as_u64() >= Some(2));
        let is_said = |log: &str| log.contains("refused system call `socket`");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_said(&daemon.log()) {
            assert!(Instant::now() < deadline, "{}", daemon.log());
            thread::sleep(Duration::from_millis(10));
        }
        assert!(!outside.path().join("new").exists());
    }
    // Each of them can be reached, if nothing confines it.
    let (_daemon, counters) = run("--sandbox=off", "request:reach:5");
    assert_eq!(counters["reached"], attempts, "{counters}");
}

/// The way of a disk in memory, and of one in a file, through all that can happen to them.
#[test]
fn everything_works_inside() {
    let directory = disk_directory();
    let image = directory.path().join("disk.img");
    fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("an image");
    let image = image.to_str().expect("UTF-8");
    let file = ["--blk-file", image, "--queues", "2"];
    let memory = ["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"];
    for (disk, next) in [(&file[..], "file"), (&memory, "ramdisk_v2")] {
        let daemon = Daemon::start(&[disk, &["--sandbox=on", "--spare"]].concat());
        assert_confined(&daemon, "at the start");
        let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
        load.wait_for(200);
        daemon.call(&["check", next]);
        daemon.call(&["upgrade", next]);
        daemon.call(&["rollback"]);
        daemon.call(&["upgrade", next, "--canary", "1"]);
        daemon.end_server(Signal::KILL);
        assert_confined(&daemon, "after a death");
        daemon.call(&["upgrade-daemon", "--only", "server"]);
        assert_confined(&daemon, "after an exchange");
        daemon.call(&["upgrade-daemon"]);
        assert_confined(&daemon, "after an exchange of both");
        daemon.call(&["upgrade", next]);
        daemon.call(&["resize", "80M"]);
        daemon.call(&["limit", "--iops", "100000"]);
        let report = load.stop();
        report.assert_clean();
        assert_intact(daemon.socket(), &report.ledgers);
        assert_eq!(daemon.terminate(), 0);
    }
}

/// A module is read where the daemon was told that modules are, and nowhere else.
#[test]
fn modules_come_from_their_folders() {
    let directory = || tempfile::tempdir().expect("a directory");
    let (given, other) = (directory(), directory());
    let copy = |folder: &Path| {
        let path = folder.join("libdomain_mine.so");
        fs::copy(binary("libdomain_ramdisk_v2.so"), &path).expect("a copy");
        path.to_str().expect("UTF-8").to_owned()
    };
    let (inside, outside) = (copy(given.path()), copy(other.path()));
    let release = binary("vhost-hotswap");
    let release = release.parent().and_then(Path::to_str).expect("UTF-8");
    let folder = given.path().to_str().expect("UTF-8");
    let dirs = ["--domain-dir", release, "--domain-dir", folder];
    let disk = ["--domain", "ramdisk", "--param", "size=64M", "--sandbox=on"];
    let daemon = Daemon::start(&[&disk[..], &dirs[..]].concat());
    daemon.call(&["check", &inside]);
    // Also one that was put there later, and over another one.
    fs::remove_file(&inside).expect("removed");
    copy(given.path());
    daemon.call(&["upgrade", "mine"]);
    let refused = daemon.refuse(&["check", &outside]);
    assert!(refused.contains("(module_unreadable)"), "{refused}");
    assert!(refused.contains("--domain-dir"), "{refused}");
}

#[test]
fn what_holds_is_said() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=1M"]);
    let told = &daemon.status()["sandbox"];
    let nothing = json!({
        "mode": "off", "landlock": null, "seccomp": null, "no_new_privs": false,
        "capabilities": true, "refused": 0,
    });
    assert_eq!(told, &nothing);
}
