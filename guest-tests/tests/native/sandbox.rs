//! The process that serves can do what serving takes, and nothing else.

use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use guest_tests::daemon::{Daemon, binary, disk_directory};
use guest_tests::nbd::NbdServer;
use guest_tests::stamp::{Ledger, Load, LoadOptions, assert_intact};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

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

/// What a domain reaches for, in the folder of this and in the ports of others.
struct Outside {
    folder: TempDir,
    tcp: [TcpListener; 2],
    unix: UnixListener,
    datagrams: UnixDatagram,
    child: Child,
}

impl Outside {
    fn new() -> Outside {
        let folder = tempfile::tempdir().expect("a directory");
        fs::write(folder.path().join("secret"), b"x").expect("a file");
        let listen = || TcpListener::bind("127.0.0.1:0").expect("a port");
        let beside = tempfile::tempdir_in(&folder).expect("a directory").keep();
        Outside {
            tcp: [listen(), listen()],
            unix: UnixListener::bind(folder.path().join("socket")).expect("a socket"),
            datagrams: UnixDatagram::bind(beside.join("log")).expect("a socket"),
            child: Command::new("sleep").arg("600").spawn().expect("a process"),
            folder,
        }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// The port of the server that is given, and of another.
    fn ports(&self) -> [u16; 2] {
        [0, 1].map(|at| self.tcp[at].local_addr().expect("an address").port())
    }

    fn socket(&self) -> String {
        let address = self.unix.local_addr().expect("an address");
        address.as_pathname().expect("a path").display().to_string()
    }

    /// Of datagrams, and in another folder.
    fn log(&self) -> String {
        let address = self.datagrams.local_addr().expect("an address");
        address.as_pathname().expect("a path").display().to_string()
    }

    /// All there is to reach for.
    fn reach(&self) -> Vec<String> {
        let [given, other] = self.ports();
        vec![
            format!("open:{}", self.path("secret")),
            format!("write:{}", self.path("secret")),
            format!("write:{}", self.path("new")),
            "open:/etc/passwd".to_owned(),
            "fork".to_owned(),
            "ring".to_owned(),
            format!("connect:127.0.0.1:{given}"),
            format!("connect:127.0.0.1:{other}"),
            format!("connect:{}", self.socket()),
            format!("datagram:{}", self.log()),
            format!("limit:{}", self.child.id()),
        ]
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a domain that reaches for all that in `phase`.
fn reach_out(outside: &Outside, phase: &str, more: &[&str]) -> Daemon {
    let (fault, reach) = (format!("fault={phase}"), format!("reach={}", outside.reach().join(",")));
    let params = ["--domain", "faulty", "--param", &fault, "--param", &reach];
    let daemon = Daemon::start(&[&params[..], more].concat());
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 4));
    load.wait_for(1000);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    daemon
}

/// That just `reached` of it was reached.
fn assert_reached(outside: &Outside, daemon: &Daemon, reached: &[String], how: &str) {
    let counters = daemon.status()["counters"].clone();
    let log = daemon.log();
    for one in outside.reach() {
        let was = log.contains(&format!("reach={one}: reached"));
        assert_eq!(was, reached.contains(&one), "{how}: {one}: {counters}\n{log}");
    }
    let count = |name| counters[name].as_u64().unwrap_or(0) as usize;
    assert_eq!(count("reached"), reached.len(), "{how}: {counters}");
    assert_eq!(count("refused"), outside.reach().len() - reached.len(), "{how}: {counters}");
    // It is no death.
    assert_eq!(daemon.status()["server"]["deaths"], 0, "{how}");
}

/// What a domain reaches for that it has no business with, from a request and from its start.
#[test]
fn a_domain_reaches_nothing_outside() {
    let outside = Outside::new();
    for phase in ["request:reach:5", "prepare:reach", "activate:reach"] {
        let daemon = reach_out(&outside, phase, &["--sandbox=on"]);
        assert_reached(&outside, &daemon, &[], phase);
        // It is said.
        assert!(daemon.log().contains("reach=fork: refused"), "{}", daemon.log());
        assert!(daemon.status()["sandbox"]["refused"].as_u64() >= Some(4));
        let is_said = |log: &str| {
            ["socket", "socketpair", "prlimit64", "io_uring_setup"]
                .iter()
                .all(|call| log.contains(&format!("refused system call `{call}`")))
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_said(&daemon.log()) {
            assert!(Instant::now() < deadline, "{}", daemon.log());
            thread::sleep(Duration::from_millis(10));
        }
        assert!(!Path::new(&outside.path("new")).exists());
    }
    // Each of them can be reached, if nothing confines it.
    let daemon = reach_out(&outside, "request:reach:5", &["--sandbox=off"]);
    assert_reached(&outside, &daemon, &outside.reach(), "not confined");
}

/// What a disk in a file, and one behind a server, have more for themselves leads nowhere else.
#[test]
fn a_domain_reaches_what_its_disk_is_given_and_nothing_more() {
    let outside = Outside::new();
    let [given, other] = outside.ports();
    assert_ne!(given, other);
    let image = format!("path={}", outside.path("image"));
    fs::write(outside.path("image"), b"x").expect("a file");
    let tcp = format!("uri=nbd://127.0.0.1:{given}/");
    let name = format!("uri=nbd://localhost:{given}/");
    let unix = format!("uri=nbd+unix:///?socket={}", outside.socket());
    let (ring, at_port, at_path) = (
        "ring".to_owned(),
        format!("connect:127.0.0.1:{given}"),
        format!("connect:{}", outside.socket()),
    );
    let image = image.as_str();
    for (params, reached) in [
        (vec![image, "aio=sync"], vec![]),
        (vec![image, "aio=io_uring"], vec![ring.clone()]),
        (vec![&*tcp], vec![at_port.clone()]),
        (vec![&*name], vec![at_port]),
        (vec![&*unix], vec![at_path]),
    ] {
        let params = params.into_iter().flat_map(|param| ["--param", param]);
        let args: Vec<_> = params.chain(["--sandbox=on"]).collect();
        let daemon = reach_out(&outside, "request:reach:5", &args);
        assert_reached(&outside, &daemon, &reached, &args.join(" "));
    }
    // A ring that is not asked for is there where a ring does not lead to sockets.
    let daemon = reach_out(&outside, "request:reach:5", &["--param", image, "--sandbox=on"]);
    let looks_at_sockets = daemon.status()["sandbox"]["landlock"].as_i64() >= Some(9);
    let reached = if looks_at_sockets { vec![ring] } else { vec![] };
    assert_reached(&outside, &daemon, &reached, "io_uring by itself");
}

/// Where sockets are not looked at, each can be connected to; this one is refused by its
/// supervisor.
#[test]
fn a_domain_does_not_command_its_own_daemon() {
    let outside = Outside::new();
    let unix = format!("uri=nbd+unix:///?socket={}", outside.socket());
    for sandbox in ["--sandbox=on", "--sandbox=off"] {
        let first = ["--domain", "faulty", "--param", &unix, sandbox];
        let daemon = Daemon::start(&first);
        let reach = format!("reach=command:{}", daemon.control().display());
        let next = ["upgrade", "faulty", "--param", "fault=request:reach:5", "--param", &reach];
        daemon.call(&next);
        let load = Load::start(daemon.socket(), &LoadOptions::new(1, 4));
        load.wait_for(100);
        load.stop().assert_clean();
        let counters = &daemon.status()["counters"];
        let said = (&counters["refused"], &counters["reached"]);
        assert_eq!(said, (&json!(1), &Value::Null), "{sandbox}: {}", daemon.log());
        assert!(daemon.log().contains("may not command"), "{}", daemon.log());
    }
}

/// From a shell, or by something below: whatever was interrupted must not go on with another
/// result.
#[test]
fn a_signal_that_is_not_of_the_sandbox_ends_the_server() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--sandbox=on"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 4));
    load.wait_for(100);
    daemon.end_server(Signal::SYS);
    assert!(daemon.log().contains("signal 31"), "{}", daemon.log());
    assert_confined(&daemon, "after that death");
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
}

/// A disk through all that can happen to it.
fn assert_works(disk: &[&str], next: &str, grows: bool) -> (Daemon, Vec<Ledger>) {
    let daemon = Daemon::start(&[disk, &["--sandbox=on", "--spare"]].concat());
    assert_confined(&daemon, "at the start");
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    load.wait_for(200);
    daemon.call(&["check", next]);
    // A request to a server may take longer than an upgrade waits for by itself, on a busy host or
    // while what a dead process has sent by TCP may still come.
    let patience = ["--drain-timeout-ms", "20000"];
    let change = |args: &[&str]| daemon.call(&[args, &patience].concat());
    change(&["upgrade", next]);
    change(&["rollback"]);
    // How long requests take on a busy machine is not what this is about.
    change(&["upgrade", next, "--canary", "1", "--max-latency-ratio", "100"]);
    daemon.end_server(Signal::KILL);
    assert_confined(&daemon, "after a death");
    daemon.call(&["upgrade-daemon", "--only", "server"]);
    assert_confined(&daemon, "after an exchange");
    daemon.call(&["upgrade-daemon"]);
    assert_confined(&daemon, "after an exchange of both");
    change(&["upgrade", next]);
    if grows {
        daemon.call(&["resize", "80M"]);
    }
    daemon.call(&["limit", "--iops", "100000"]);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    (daemon, report.ledgers)
}

/// How many rings of io_uring the server has.
fn rings(daemon: &Daemon) -> usize {
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.server_pid())).expect("its descriptors");
    let links = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    links.filter(|link| link.to_string_lossy() == "anon_inode:[io_uring]").count()
}

/// The way of a disk in memory, and of one in a file.
#[test]
fn everything_works_inside() {
    let memory = ["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"];
    assert_eq!(assert_works(&memory, "ramdisk_v2", true).0.terminate(), 0);
    let directory = disk_directory();
    let image = directory.path().join("disk.img");
    let image = image.to_str().expect("UTF-8");
    for aio in ["auto", "io_uring", "sync"] {
        fs::File::create(image).and_then(|file| file.set_len(64 << 20)).expect("an image");
        let param = format!("aio={aio}");
        // Requests that the cache does not answer are what a ring is for.
        let file =
            ["--blk-file", image, "--queues", "2", "--param", &param, "--param", "direct=true"];
        let (daemon, _) = assert_works(&file, "file", true);
        let looks_at_sockets = daemon.status()["sandbox"]["landlock"].as_i64() >= Some(9);
        let has_rings = aio == "io_uring" || aio == "auto" && looks_at_sockets;
        assert_eq!(rings(&daemon) > 0, has_rings, "aio={aio}\n{}", daemon.log());
        assert_eq!(daemon.terminate(), 0);
    }
}

/// Passes what comes to a port on to a socket with a path.
fn forward(path: PathBuf) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for inner in listener.incoming().flatten() {
            // While there is no server it is as if it had closed the connection.
            let Ok(outer) = UnixStream::connect(&path) else { continue };
            // A reply's head and its data come apart: the data would wait for a delayed
            // acknowledgement of the head, 40 ms each.
            inner.set_nodelay(true).unwrap();
            let (inner_too, outer_too) = (inner.try_clone().unwrap(), outer.try_clone().unwrap());
            thread::spawn(move || {
                let _ = io::copy(&mut &inner, &mut &outer);
                let _ = outer.shutdown(Shutdown::Both);
            });
            thread::spawn(move || {
                let _ = io::copy(&mut &outer_too, &mut &inner_too);
                let _ = inner_too.shutdown(Shutdown::Both);
            });
        }
    });
    port
}

/// And of one behind a server, at a path, an address and a name, which ends and comes again.
#[test]
fn a_server_of_a_disk_is_reached_inside() {
    for form in ["nbd+unix:///?socket=PATH", "nbd://127.0.0.1:PORT", "nbd://localhost:PORT"] {
        let nbdkit = ["nbdkit", "--foreground", "--unix", "SOCKET", "file", "FOLDER/image"];
        let mut server = NbdServer::prepared(&nbdkit, &[]);
        let image = fs::File::create(server.folder().join("image"));
        image.and_then(|image| image.set_len(64 << 20)).expect("an image");
        server.start();
        let port = forward(server.socket()).to_string();
        let path = server.socket().display().to_string();
        let uri = form.replace("PATH", &path).replace("PORT", &port);
        let uri = format!("uri={uri}");
        // By a port it is not known what becomes of a connection that is broken.
        let settle = ["--param", "settle=1"];
        // nbdkit 1.32 may fail an assertion when a client with requests in flight has gone.
        let server = server.keep_running();
        let disk = ["--domain", "nbd", "--param", &uri, "--queues", "2", settle[0], settle[1]];
        let (daemon, ledgers) = assert_works(&disk, "nbd", false);
        let load = Load::resume(daemon.socket(), &LoadOptions::new(2, 16), ledgers);
        load.wait_for(200);
        server.kill();
        let so_far = load.ios();
        load.wait_for(so_far + 200);
        load.stop().assert_clean();
        assert_eq!(daemon.status()["sandbox"]["refused"], 0, "{form}: {}", daemon.log());
        assert_eq!(daemon.terminate(), 0, "{form}");
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
