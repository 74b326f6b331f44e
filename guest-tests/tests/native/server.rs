//! The server of a supervisor dies or is exchanged, and another one is the same device.
//!
//! The supervisor is the test: it starts the program with a private channel, keeps what it is told,
//! and gives it to the next one. Frontends connect to the server's inner listener, so a death ends
//! their connection; what a real supervisor relays and replays is not here.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use channel::{
    Channel, Received, Session, Settings, Start, ToServer, ToSupervisor, VERSION, Vault,
};
use guest_tests::PATIENCE;
use guest_tests::client::raw::RawSession;
use guest_tests::client::{Client, Options, features};
use guest_tests::daemon::{binary, run_daemon};
use guest_tests::stamp::{Ledger, Load, LoadOptions, assert_intact};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

/// Number of the next session.
static SESSIONS: AtomicU64 = AtomicU64::new(1);

/// What the supervisor keeps: the last vault, and the descriptors of its objects.
#[derive(Default)]
struct Keep {
    vault: Vault,
    objects: BTreeMap<u64, OwnedFd>,
}

impl Keep {
    fn take(&mut self, vault: Vault, new: Vec<u64>, descriptors: Vec<OwnedFd>) {
        assert_eq!(new.len(), descriptors.len());
        self.objects.extend(new.into_iter().zip(descriptors));
        let needed = vault.objects();
        self.objects.retain(|number, _| needed.contains(number));
        assert_eq!(self.objects.len(), needed.len(), "each object was sent: {vault:?}");
        self.vault = vault;
    }
}

/// A server, and the other end of its channel.
struct Server {
    child: Child,
    channel: Channel,
    /// Where its vaults come, if it was told that they can.
    aside: Option<Channel>,
    keep: Keep,
    directory: TempDir,
}

fn settings(queues: u16) -> Settings {
    let directory = binary("vhost-hotswap").parent().expect("a directory").to_owned();
    Settings {
        queues,
        queue_size: 256,
        poll_us: 50,
        worker_cpus: Vec::new(),
        domain_dirs: vec![directory],
        trusted_keys: Vec::new(),
        sandbox: None,
        limits: channel::RateLimits::default(),
    }
}

fn first(domain: &str, params: &[(&str, &str)]) -> Start {
    let own = |&(key, value): &(&str, &str)| (key.to_owned(), value.to_owned());
    Start::First { domain: domain.to_owned(), params: params.iter().map(own).collect() }
}

impl Server {
    /// Starts the program, and says the first message.
    fn spawn(start: Start, objects: &BTreeMap<u64, OwnedFd>, prepare_only: bool) -> Server {
        Server::spawn_heard(start, objects, prepare_only, true)
    }

    fn spawn_heard(
        start: Start,
        objects: &BTreeMap<u64, OwnedFd>,
        prepare_only: bool,
        hears_aside: bool,
    ) -> Server {
        let (channel, theirs) = channel::pair().expect("a channel");
        let child = spawn_with(&theirs);
        drop(theirs);
        let message = ToServer::Start {
            version: VERSION,
            settings: settings(2),
            start,
            prepare_only,
            hears_aside,
            hears_events: false,
        };
        let order = match &message {
            ToServer::Start { start: Start::Vault(vault), .. } => vault.objects(),
            _ => Vec::new(),
        };
        let descriptors: Vec<_> = order.iter().map(|number| objects[number].as_fd()).collect();
        channel.send(&message, &descriptors).expect("the first message");
        let directory = tempfile::tempdir().expect("a directory");
        Server { child, channel, aside: None, keep: Keep::default(), directory }
    }

    fn start(start: Start) -> Server {
        let mut server = Server::spawn(start, &BTreeMap::new(), false);
        server.wait_for(|message| matches!(message, ToSupervisor::Ready { .. }));
        server
    }

    /// Another one, with what this one's supervisor has. This one is dead.
    fn next(self) -> Server {
        let keep = self.into_keep();
        let mut server =
            Server::spawn(Start::Vault(Box::new(keep.vault.clone())), &keep.objects, false);
        server.wait_for(|message| matches!(message, ToSupervisor::Ready { .. }));
        server
    }

    fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("it has ended");
    }

    /// What it has left, with what is still on its way.
    fn into_keep(mut self) -> Keep {
        loop {
            let received = self.channel.try_receive();
            self.look_aside();
            match received {
                Ok(Received::Message(message, descriptors)) => _ = self.noted(message, descriptors),
                Ok(Received::Nothing | Received::End) => break,
                Err(error) => panic!("the channel: {error}"),
            }
        }
        std::mem::take(&mut self.keep)
    }

    fn noted(&mut self, message: ToSupervisor, descriptors: Vec<OwnedFd>) -> Option<ToSupervisor> {
        match message {
            ToSupervisor::Aside => {
                self.aside = descriptors.into_iter().next().map(Channel::from_socket);
                None
            }
            ToSupervisor::Look => None,
            ToSupervisor::Vault { vault, new } => {
                assert!(self.aside.is_none(), "a vault that wakes");
                self.keep.take(*vault, new, descriptors);
                None
            }
            message => Some(message),
        }
    }

    fn look_aside(&mut self) {
        let Some(aside) = &self.aside else { return };
        while let Received::Message(message, descriptors) = aside.try_receive().expect("a vault") {
            let ToSupervisor::Vault { vault, new } = message else { panic!("{message:?}") };
            self.keep.take(*vault, new, descriptors);
        }
    }

    /// Waits for a message, and keeps what comes before it. Another one than a vault or the end of
    /// a session is wrong.
    fn wait_for(&mut self, is_it: impl Fn(&ToSupervisor) -> bool) -> ToSupervisor {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let received = self.channel.try_receive().expect("a message");
            self.look_aside();
            match received {
                Received::Message(message, descriptors) => {
                    if let Some(message) = self.noted(message, descriptors) {
                        if is_it(&message) {
                            return message;
                        }
                        let is_end = matches!(message, ToSupervisor::SessionEnded { .. });
                        assert!(is_end, "unexpected: {message:?}");
                    }
                }
                Received::Nothing => {
                    assert!(Instant::now() < deadline, "the server does not say it");
                    let step = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
                    let _ = poll(&mut [PollFd::new(&self.channel, PollFlags::IN)], Some(&step));
                }
                Received::End => panic!("the server has ended: {:?}", self.child.wait()),
            }
        }
    }

    /// Takes what has come by now.
    fn look(&mut self) -> &Vault {
        self.channel.send(&ToServer::Ping { number: 1 }, &[]).expect("a ping");
        self.wait_for(|message| matches!(message, ToSupervisor::Pong { number: 1, .. }));
        &self.keep.vault
    }

    /// The same, once that holds.
    fn look_until(&mut self, what: &str, holds: impl Fn(&Vault) -> bool) -> &Vault {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self.look()) {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.keep.vault);
            std::thread::sleep(Duration::from_millis(1));
        }
        &self.keep.vault
    }

    /// A socket that the next frontend connects to.
    fn session(&mut self) -> PathBuf {
        self.session_of(Session::default())
    }

    fn session_of(&mut self, session: Session) -> PathBuf {
        let number = SESSIONS.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.path().join(format!("inner-{number}"));
        let listener = UnixListener::bind(&path).expect("a socket");
        let number = if session.number == 0 { number } else { session.number };
        let message = ToServer::Session(Session { number, ..session });
        self.channel.send(&message, &[listener.as_fd()]).expect("a session");
        path
    }

    /// A command of the control socket.
    fn request(&mut self, method: &str, params: Value) -> Result<Value, Value> {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        self.channel.send(&ToServer::Client, &[theirs.as_fd()]).expect("a client");
        drop(theirs);
        ours.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        writeln!(&ours, "{request}").expect("a request");
        let mut line = String::new();
        BufReader::new(&ours).read_line(&mut line).expect("a reply");
        let mut reply: Value = serde_json::from_str(&line).expect("JSON");
        if reply["error"].is_null() {
            Ok(reply["result"].take())
        } else {
            Err(reply["error"].take())
        }
    }

    fn upgrade(&mut self, name: &str, params: Value) -> Value {
        let reply = self.request("upgrade", json!({"name": name, "params": params}));
        reply.expect("it is upgraded")
    }

    fn status(&mut self) -> Value {
        self.request("status", json!({})).expect("a status")
    }

    /// Waits until `done` says so of the status.
    fn wait_until(&mut self, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.status();
            if done(&now) {
                return now;
            }
            assert!(Instant::now() < deadline, "{what}: {now}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn shut_down(mut self) -> ExitStatus {
        let why = "the test is over".to_owned();
        self.channel.send(&ToServer::Shutdown { why }, &[]).expect("a message");
        self.child.wait().expect("it has ended")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the program, with its end of the channel as descriptor 3.
fn spawn_with(theirs: &OwnedFd) -> Child {
    // Not closed by an exec, and at a number that the shell can name.
    let passed = rustix::io::fcntl_dupfd_cloexec(theirs, 5).expect("a descriptor");
    rustix::io::fcntl_setfd(&passed, rustix::io::FdFlags::empty()).expect("a flag");
    let number = passed.as_raw_fd();
    Command::new(binary("vhost-hotswap"))
        .arg0("vhost-hotswap")
        .args(["--serve-channel", &number.to_string()])
        .stdin(Stdio::null())
        .spawn()
        .expect("the server starts")
}

/// A supervisor of before, or one whose end of the second channel is gone.
#[test]
fn vaults_come_with_all_else_where_nothing_is_heard_aside() {
    let start = || first("ramdisk", &[("size", "1M")]);
    for hears_aside in [false, true] {
        let mut server = Server::spawn_heard(start(), &BTreeMap::new(), false, hears_aside);
        server.wait_for(|message| matches!(message, ToSupervisor::Ready { .. }));
        assert_eq!(server.aside.take().is_some(), hears_aside);
        server.upgrade("ramdisk_v2", json!({}));
        server.kill();
        let mut next = server.next();
        assert_eq!(next.status()["generation"], 2);
    }
}

#[test]
fn a_vault_that_was_lost_comes_again_with_all_of_its_objects() {
    let mut server = Server::start(first("ramdisk", &[("size", "1M")]));
    server.upgrade("ramdisk_v2", json!({}));
    let before = server.look().clone();
    server.keep = Keep::default();
    server.channel.send(&ToServer::VaultAgain, &[]).expect("sent");
    assert_eq!(*server.look(), before);
    assert_eq!(server.keep.objects.len(), before.objects().len());
    server.kill();
    let mut next = server.next();
    assert_eq!(next.status()["generation"], 2);
}

fn image() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("disk.img");
    File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("an image");
    (directory, path)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Writes for a moment on what the disk holds, and kills the server when all is answered: what it
/// was killed in the middle of would be half written, and nothing here has it run again.
fn killed_after_load(server: &mut Server, ledgers: Vec<Ledger>) -> Vec<Ledger> {
    let (socket, options) = (server.session(), LoadOptions::new(2, 16));
    let load = if ledgers.is_empty() {
        Load::start(&socket, &options)
    } else {
        Load::resume(&socket, &options, ledgers)
    };
    load.wait_for(2000);
    let report = load.stop();
    report.assert_clean();
    server.kill();
    report.ledgers
}

#[test]
fn a_ramdisk_outlives_its_server() {
    let mut server = Server::start(first("ramdisk", &[("size", "64M"), ("serial", "s1")]));
    assert_eq!(server.keep.vault.generation, 1);
    let mut ledgers = Vec::new();
    for _ in 0..3 {
        ledgers = killed_after_load(&mut server, ledgers);
        server = server.next();
        let status = server.status();
        assert_eq!((&status["generation"], &status["state"]), (&json!(1), &json!("serving")));
        assert_eq!(status["domain"]["params"]["serial"], "s1");
        assert_intact(&server.session(), &ledgers);
    }
    assert!(server.shut_down().success());
}

#[test]
fn a_file_stays_locked_and_what_it_was_said_to_be() {
    let (_directory, path) = image();
    let mut server = Server::start(first("file", &[("path", text(&path))]));
    let told = server.keep.vault.bytes.clone();
    assert!(told.iter().any(|bytes| bytes.key == "announced"), "{told:?}");
    let is_locked = || {
        let socket = path.with_extension("socket");
        let output = run_daemon(&["--socket-path", text(&socket), "--blk-file", text(&path)]);
        assert_eq!(output.status, 1, "{output:?}");
        assert!(output.stderr.contains("another program uses"), "{output:?}");
    };
    // As long as rings run: the lock follows them.
    let load = Load::start(&server.session(), &LoadOptions::new(2, 16));
    load.wait_for(2000);
    is_locked();
    server.kill();
    // Nothing lives that has opened it but what keeps the vault.
    is_locked();
    let report = load.abandon();
    assert_eq!((report.errors, report.mismatches), (0, 0), "{report:?}");
    let ledgers = report.ledgers;
    // The guest's disk is what it was, whatever lies at the path by now.
    let other = path.with_extension("other");
    std::fs::rename(&path, &other).expect("renamed");
    std::fs::write(&path, b"something else").expect("another file");
    let mut server = server.next();
    assert_eq!(server.status()["generation"], 1);
    assert_intact(&server.session(), &ledgers);
    assert!(server.shut_down().success());
}

#[test]
fn what_was_upgraded_to_comes_back_with_its_standby() {
    let mut server = Server::start(first("ramdisk", &[("size", "64M")]));
    server.upgrade("faulty", json!({"fault": "request:panic:100000000"}));
    server.upgrade("ramdisk_v2", json!({}));
    let ledgers = killed_after_load(&mut server, Vec::new());
    let mut server = server.next();
    let status = server.wait_until("no standby", |status| status["standby"]["name"] == "faulty");
    assert_eq!((&status["generation"], &status["domain"]["version"]), (&json!(3), &json!("2.0.0")));
    assert_eq!(status["standby"]["params"]["fault"], "request:panic:100000000");
    assert_intact(&server.session(), &ledgers);
    let reply = server.request("rollback", json!({})).expect("it is rolled back");
    assert_eq!((&reply["generation"], &reply["to"]["name"]), (&json!(4), &json!("faulty")));
    // A second time, with what was rolled back to.
    let vault = server.look();
    assert_eq!((vault.generation, vault.live.as_ref().unwrap().name.as_str()), (4, "faulty"));
    assert_eq!(vault.standby.as_ref().unwrap().name, "ramdisk");
    server.kill();
    let mut server = server.next();
    assert_eq!(server.status()["domain"]["name"], "faulty");
    assert_intact(&server.session(), &ledgers);
}

#[test]
fn a_faulted_device_comes_back_faulted_and_an_upgrade_revives_it() {
    let mut server = Server::start(first("faulty", &[("fault", "request:panic:500")]));
    let load = Load::start(&server.session(), &LoadOptions::new(1, 4));
    server.wait_until("it lives", |status| status["state"] == "faulted");
    let ledgers = load.abandon().ledgers;
    // What is shown is kept a moment later.
    let vault = server.look_until("the fault is not kept", |vault| vault.fault.is_some());
    assert!(vault.live.is_none(), "{vault:?}");
    server.kill();
    let mut server = server.next();
    let status = server.status();
    assert_eq!((&status["state"], &status["generation"]), (&json!("faulted"), &json!(1)));
    assert_eq!(status["domain"]["name"], "faulty");
    assert!(matches!(stop(&mut server, 1000), ToSupervisor::Stopped { .. }));
    resume(&mut server);
    // Still the same disk, of the same size.
    let other = server.request("upgrade", json!({"name": "ramdisk", "params": {"serial": "x"}}));
    assert_eq!(other.unwrap_err()["data"]["code"], "device_differs");
    assert_eq!(server.upgrade("ramdisk", json!({}))["generation"], 2);
    assert_intact(&server.session(), &ledgers);
}

#[test]
fn a_live_module_that_is_damaged_is_refused_with_a_code() {
    let server = Server::start(first("ramdisk", &[("size", "1M")]));
    let mut server = server;
    server.kill();
    let mut keep = server.into_keep();
    keep.vault.live.as_mut().expect("a module").sha256 = "0".repeat(64);
    let start = Start::Vault(Box::new(keep.vault));
    let mut server = Server::spawn(start, &keep.objects, false);
    let failed = server.wait_for(|message| matches!(message, ToSupervisor::Failed { .. }));
    let ToSupervisor::Failed { code, message } = failed else { unreachable!() };
    assert_eq!(code, "module_unreadable", "{message}");
    assert_eq!(server.child.wait().expect("it ends").code(), Some(1));
}

/// Stops it; how it was answered.
fn stop(server: &mut Server, drain_timeout_ms: u64) -> ToSupervisor {
    server.channel.send(&ToServer::Stop { drain_timeout_ms }, &[]).expect("a message");
    server.wait_for(|message| {
        matches!(message, ToSupervisor::Stopped { .. } | ToSupervisor::NotStopped { .. })
    })
}

fn resume(server: &mut Server) {
    server.channel.send(&ToServer::Resume, &[]).expect("a message");
    server.wait_for(|message| matches!(message, ToSupervisor::Resumed));
}

#[test]
fn a_stopped_server_touches_nothing_and_goes_on_when_it_is_called_back() {
    let mut server = Server::start(first("ramdisk", &[("size", "64M")]));
    let load = Load::start(&server.session(), &LoadOptions::new(2, 16));
    for round in 1..=20u64 {
        load.wait_for(round * 500);
        let stopped = stop(&mut server, 1000);
        assert!(matches!(stopped, ToSupervisor::Stopped { .. }), "{stopped:?}");
        let before = load.ios();
        std::thread::sleep(Duration::from_millis(20));
        // What was answered by then may just not have been counted.
        std::thread::sleep(Duration::from_millis(20));
        let settled = load.ios();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(load.ios(), settled, "it serves (before: {before})");
        resume(&mut server);
    }
    let so_far = load.ios();
    load.wait_for(so_far + 500);
    // Changes go on as well.
    server.upgrade("ramdisk_v2", json!({}));
    let report = load.stop();
    report.assert_clean();
    assert_intact(&server.session(), &report.ledgers);
    assert!(server.shut_down().success());
}

#[test]
fn a_stop_that_is_refused_says_why_and_nothing_has_happened() {
    let mut server = Server::start(first("faulty", &[("fault", "request:stall:300")]));
    let options = LoadOptions { patience: Duration::from_secs(60), ..LoadOptions::new(1, 4) };
    let load = Load::start(&server.session(), &options);
    load.wait_for(290);
    server.wait_until("nothing stalls", |status| {
        status["queues"][0]["oldest_age_us"].as_u64().is_some_and(|age| age > 200_000)
    });
    let refused = stop(&mut server, 50);
    let ToSupervisor::NotStopped { code, message } = refused else { panic!("{refused:?}") };
    assert_eq!(code, "drain_timeout", "{message}");
    assert_eq!(server.status()["state"], "serving");
    load.abandon();
}

/// Both are said at once: by then the thread that gives the device away may not have noticed.
#[test]
fn a_server_that_is_called_back_and_is_to_end_ends_in_its_order() {
    for _ in 0..5 {
        let mut server = Server::start(first("ramdisk", &[("size", "1M")]));
        let stopped = stop(&mut server, 1000);
        assert!(matches!(stopped, ToSupervisor::Stopped { .. }), "{stopped:?}");
        server.channel.send(&ToServer::Resume, &[]).expect("a message");
        let status = server.shut_down();
        assert!(status.success(), "{status}");
    }
}

/// A server that is being stopped: its domain takes three seconds for its part.
fn stopping() -> Server {
    let server = Server::start(first("faulty", &[("fault", "quiesce:hang")]));
    let drain_timeout_ms = 5000;
    server.channel.send(&ToServer::Stop { drain_timeout_ms }, &[]).expect("a message");
    std::thread::sleep(Duration::from_millis(500));
    server
}

/// Nothing keeps the workers at the gate then.
#[test]
fn a_server_whose_supervisor_goes_while_it_is_being_stopped_does_not_stay() {
    let mut server = stopping();
    let began = Instant::now();
    server.channel = channel::pair().expect("a channel").0;
    let status = server.child.wait().expect("it has ended");
    let took = began.elapsed();
    assert!(status.success() && took < Duration::from_secs(8), "{status} after {took:?}");
}

/// It says first whether it has stopped: the device is another's then.
#[test]
fn a_server_that_is_to_end_while_it_is_being_stopped_does_not_stay() {
    let server = stopping();
    let began = Instant::now();
    server.shut_down();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[test]
fn a_device_goes_from_one_server_to_another_and_back_if_that_one_fails() {
    let mut a = Server::start(first("ramdisk", &[("size", "64M")]));
    let load = Load::start(&a.session(), &LoadOptions::new(2, 16));
    load.wait_for(1000);
    a.look();
    let vault = Box::new(a.keep.vault.clone());
    let mut b = Server::spawn(Start::Vault(vault.clone()), &a.keep.objects, true);
    b.wait_for(|message| matches!(message, ToSupervisor::Prepared { .. }));
    // B cannot: A goes on.
    assert!(matches!(stop(&mut a, 1000), ToSupervisor::Stopped { .. }));
    b.kill();
    resume(&mut a);
    let so_far = load.ios();
    load.wait_for(so_far + 500);
    // Another B, prepared with what there was before A was changed.
    let mut b = Server::spawn(Start::Vault(vault), &a.keep.objects, true);
    b.wait_for(|message| matches!(message, ToSupervisor::Prepared { .. }));
    a.upgrade("ramdisk_v2", json!({}));
    let report = load.stop();
    report.assert_clean();
    assert!(matches!(stop(&mut a, 1000), ToSupervisor::Stopped { .. }));
    let now = Box::new(a.keep.vault.clone());
    assert_eq!(now.generation, 2);
    let descriptors: Vec<_> =
        now.objects().iter().map(|number| a.keep.objects[number].as_fd()).collect();
    b.channel.send(&ToServer::Activate { vault: now }, &descriptors).expect("a message");
    b.wait_for(|message| matches!(message, ToSupervisor::Ready { .. }));
    a.channel.send(&ToServer::Exit, &[]).expect("a message");
    a.child.wait().expect("it leaves");
    let status = b.status();
    assert_eq!((&status["generation"], &status["domain"]["version"]), (&json!(2), &json!("2.0.0")));
    let report = {
        assert_intact(&b.session(), &report.ledgers);
        let load = Load::resume(&b.session(), &LoadOptions::new(2, 16), report.ledgers);
        load.wait_for(1000);
        load.stop()
    };
    report.assert_clean();
    assert!(b.shut_down().success());
}

#[test]
fn a_server_whose_supervisor_is_gone_ends_in_order_and_signals_do_not_end_it() {
    let mut server = Server::start(first("ramdisk", &[("size", "64M")]));
    let load = Load::start(&server.session(), &LoadOptions::new(1, 4));
    load.wait_for(100);
    let pid = rustix::process::Pid::from_child(&server.child);
    for signal in
        [rustix::process::Signal::TERM, rustix::process::Signal::INT, rustix::process::Signal::HUP]
    {
        rustix::process::kill_process(pid, signal).expect("a signal");
    }
    let so_far = load.ios();
    load.wait_for(so_far + 200);
    let (other, _) = channel::pair().expect("a channel");
    drop(std::mem::replace(&mut server.channel, other));
    let status = server.child.wait().expect("it ends");
    assert!(status.success(), "{status:?}");
    load.abandon();
}

#[test]
fn a_write_back_that_failed_is_known_to_the_next_server() {
    let (_directory, path) = image();
    let mut server = Server::start(first("file", &[("path", text(&path))]));
    server.kill();
    let mut keep = server.into_keep();
    keep.vault.failure = Some("a test".to_owned());
    keep.vault.counters.insert("things".to_owned(), 3);
    let start = Start::Vault(Box::new(keep.vault));
    let mut server = Server::spawn(start, &keep.objects, false);
    server.wait_for(|message| matches!(message, ToSupervisor::Ready { .. }));
    let status = server.status();
    assert_eq!(status["storage_failure"], "a test", "{status}");
    let vault = server.look();
    assert_eq!((vault.failure.as_deref(), vault.counters["things"]), (Some("a test"), 3));
    assert_eq!(server.shut_down().code(), Some(1), "the end is no success");
}

/// What is said of the write cache in the vault.
fn write_cache(server: &mut Server) -> Value {
    server.look().told["belief"]["write_cache"].clone()
}

fn read_config(raw: &mut RawSession) -> u8 {
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = raw.frontend.get_config(0, 60, flags, &[0; 60]).expect("the configuration");
    config[32]
}

#[test]
fn a_driver_whose_session_goes_on_elsewhere_keeps_its_write_cache() {
    let (_directory, path) = image();
    let linux = features::USUAL | features::CONFIG_WCE;
    for turns_off in [false, true] {
        let mut server = Server::start(first("file", &[("path", text(&path))]));
        let number = SESSIONS.fetch_add(1, Ordering::Relaxed);
        let session = || Session { number, ..Session::default() };
        let mut raw = RawSession::connect(&server.session_of(session()), linux).expect("a session");
        assert_eq!(read_config(&mut raw), 1);
        raw.share_memory().expect("memory");
        raw.start_ring(64).expect("a ring");
        if turns_off {
            let flags = VhostUserConfigFlags::WRITABLE;
            raw.frontend.set_config(32, flags, &[0]).expect("the cache is turned off");
        }
        assert_eq!(write_cache(&mut server), json!(!turns_off));
        server.kill();
        drop(raw);
        // Its messages are said again, but for those that ask; its ring goes on where it was.
        let mut server = server.next();
        let mut raw = RawSession::connect(&server.session_of(session()), linux).expect("a session");
        // Said before what has turned it off.
        let flags = VhostUserConfigFlags::WRITABLE;
        raw.frontend.set_config(32, flags, &[1]).expect("it is taken");
        raw.share_memory().expect("memory");
        raw.start_ring_at(64, 7).expect("a ring");
        assert_eq!(write_cache(&mut server), json!(!turns_off));
        assert_eq!(read_config(&mut raw), u8::from(!turns_off));
        drop(raw);
        // Another frontend's driver may believe anything.
        let mut raw = RawSession::connect(&server.session(), linux).expect("a session");
        raw.share_memory().expect("memory");
        raw.start_ring_at(64, 7).expect("a ring");
        assert_eq!(write_cache(&mut server), json!(false));
        drop(raw);
        assert!(server.shut_down().success());
    }
}

/// The queues that are said to be stuck.
fn stuck(server: &mut Server) -> Vec<u16> {
    server.channel.send(&ToServer::Ping { number: 2 }, &[]).expect("a ping");
    match server.wait_for(|message| matches!(message, ToSupervisor::Pong { number: 2, .. })) {
        ToSupervisor::Pong { stuck, .. } => stuck,
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn a_worker_that_hangs_is_named_and_one_that_has_nothing_to_do_is_not() {
    let mut server = Server::start(first("faulty", &[("fault", "request:hang:300")]));
    stuck(&mut server);
    let options = LoadOptions { patience: Duration::from_secs(60), ..LoadOptions::new(1, 4) };
    let load = Load::start(&server.session(), &options);
    load.wait_for(200);
    let deadline = Instant::now() + PATIENCE;
    while stuck(&mut server) != [0] {
        assert!(Instant::now() < deadline, "it is not named");
        std::thread::sleep(Duration::from_millis(100));
    }
    server.kill();
    load.abandon();
    let mut server = Server::start(first("ramdisk", &[]));
    let client = Client::connect(&server.session(), &Options::default()).expect("a session");
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(stuck(&mut server), [0; 0]);
    }
    drop(client);
}

#[test]
fn a_supervisor_that_does_not_read_is_told_what_there_is_when_it_does() {
    let mut server = Server::start(first("ramdisk", &[("size", "1M")]));
    // The status is asked for elsewhere: nothing is read from the channel meanwhile.
    let mut generation = 1;
    while generation < 1500 {
        generation = server.upgrade("ramdisk", json!({}))["generation"].as_u64().expect("a number");
    }
    assert!(matches!(stop(&mut server, 1000), ToSupervisor::Stopped { .. }));
    assert_eq!(server.keep.vault.generation, generation, "all of it came before");
    resume(&mut server);
}

#[test]
fn a_domain_that_dies_around_a_stop_is_taken_over() {
    let mut server = Server::start(first("ramdisk", &[("size", "64M")]));
    let load = Load::start(&server.session(), &LoadOptions::new(2, 16));
    let mut answers = BTreeMap::new();
    for round in 1..=40u64 {
        server.upgrade("faulty", json!({"fault": format!("request:panic:{}", 1 + round * 7 % 90)}));
        let answer = stop(&mut server, 1000);
        if matches!(answer, ToSupervisor::Stopped { .. }) {
            resume(&mut server);
        }
        let answer = match answer {
            ToSupervisor::NotStopped { code, .. } => code,
            _ => "stopped".to_owned(),
        };
        *answers.entry(answer).or_insert(0) += 1;
        server.wait_until("no takeover", |status| status["upgrades"]["takeovers"] == round);
    }
    println!("{answers:?}");
    let report = load.stop();
    report.assert_clean();
    assert_intact(&server.session(), &report.ledgers);
}
