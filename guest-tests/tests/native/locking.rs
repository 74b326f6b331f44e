//! One image, one writer: daemons see each other, and QEMU's programs see them and are seen. The
//! claim follows the rings that run, so that a guest can go from one daemon to another.
//!
//! Where QEMU's programs are not installed, what needs them says so and passes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::features;
use guest_tests::client::raw::RawSession;
use guest_tests::daemon::{CtlOutput, Daemon, run_daemon};
use guest_tests::stamp::{Load, LoadOptions};
use rustix::fs::FlockOperation;
use rustix::process::Signal;
use tempfile::TempDir;

fn image() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("disk.img");
    File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("an image");
    (directory, path)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Starts another daemon on `path`, which must not work.
fn refused(path: &Path, more: &[&str]) -> CtlOutput {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("socket");
    let output =
        run_daemon(&[&["--socket-path", text(&socket), "--blk-file", text(path)], more].concat());
    assert_eq!(output.status, 1, "{output:?}");
    assert!(output.stderr.contains("another program uses"), "{output:?}");
    output
}

/// A program of QEMU's, unless it is not installed.
fn qemu(program: &str, args: &[&str]) -> Option<Output> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    output.inspect_err(|_| println!("skipped: {program} is not installed")).ok()
}

/// A daemon on `path` whose guest may come from another one.
fn late(path: &Path) -> Daemon {
    Daemon::start(&["--blk-file", text(path), "--param", "locking=late"])
}

/// A guest whose ring runs.
fn guest(daemon: &Daemon) -> RawSession {
    let mut guest = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    guest.assert_one_read();
    assert_eq!(daemon.status()["claim"], "claimed");
    guest
}

/// Offers a read of one sector, and says whether it was answered in `limit`.
fn reads_within(guest: &mut RawSession, limit: Duration) -> bool {
    guest.offer_read().expect("a read");
    guest.used(limit).expect("memory").is_some()
}

fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not so in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_second_daemon_is_refused_before_and_after_upgrades() {
    let (_directory, path) = image();
    let daemon = Daemon::start(&["--blk-file", text(&path)]);
    let guest = guest(&daemon);
    refused(&path, &[]);
    for direct in ["true", "false"] {
        let output = daemon.ctl(&["upgrade", "file", "--param", &format!("direct={direct}")]);
        assert_eq!(output.status, 0, "{output:?}");
    }
    refused(&path, &["--read-only"]);
    let unlocked = Daemon::start(&["--blk-file", text(&path), "--param", "locking=false"]);
    assert_eq!(unlocked.status()["state"], "serving", "who says so is believed");
    assert_eq!(unlocked.terminate(), 0);
    drop(guest);
    assert_eq!(daemon.terminate(), 0);
    let readers = [0; 2].map(|_| Daemon::start(&["--blk-file", text(&path), "--read-only"]));
    let guests = readers.each_ref().map(self::guest);
    refused(&path, &[]);
    drop((guests, readers));
}

#[test]
fn a_daemon_that_was_killed_leaves_no_lock() {
    let (_directory, path) = image();
    for more in [&[][..], &["--param", "direct=true"]] {
        let args = [&["--blk-file", text(&path), "--queues", "2"], more].concat();
        let daemon = Daemon::start(&args);
        let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
        load.wait_for(500);
        daemon.kill_whole();
        // As a supervisor does that restarts it at once.
        let next = Daemon::start(&args);
        assert_eq!(next.terminate(), 0);
        load.abandon();
    }
}

#[test]
fn qemu_does_not_touch_an_image_that_is_in_use() {
    let (directory, path) = image();
    let copy = directory.path().join("copy.img");
    let daemon = Daemon::start(&["--blk-file", text(&path)]);
    let guest = guest(&daemon);
    let commands = [
        &["convert", "-O", "raw", text(&path), text(&copy)][..],
        &["resize", "-f", "raw", text(&path), "128M"],
    ];
    for command in commands {
        let Some(output) = qemu("qemu-img", command) else { return };
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("lock"), "{command:?}: {output:?}");
    }
    // To look at it is no use of it.
    let output = qemu("qemu-img", &["info", text(&path)]).expect("it was there");
    assert!(output.status.success(), "{output:?}");
    // Where no guest uses it, others may, and the daemon waits for what does.
    guest.stop_ring().expect("a stop");
    for command in commands {
        let output = qemu("qemu-img", command).expect("it was there");
        assert!(output.status.success(), "{command:?}: {output:?}");
    }
    assert_eq!(daemon.terminate(), 0);
}

/// `qemu-storage-daemon`, killed when this is dropped.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_that_qemu_writes_to_is_refused() {
    let (directory, path) = image();
    let socket = directory.path().join("peer.sock");
    let child = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!("driver=file,filename={},node-name=disk", path.display()))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ))
        .spawn();
    let Ok(child) = child else {
        println!("skipped: qemu-storage-daemon is not installed");
        return;
    };
    let peer = Peer(child);
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() {
        assert!(Instant::now() < deadline, "qemu-storage-daemon does not come up");
        thread::sleep(Duration::from_millis(5));
    }
    refused(&path, &[]);
    refused(&path, &["--read-only"]);
    drop(peer);
    assert_eq!(Daemon::start(&["--blk-file", text(&path)]).terminate(), 0);
}

#[test]
fn a_guest_goes_to_another_daemon_and_back() {
    let (_directory, path) = image();
    let source = Daemon::start(&["--blk-file", text(&path)]);
    let mut at_source = guest(&source);
    let target = late(&path);
    assert_eq!(target.status()["claim"], "free");
    // All but the rings goes on while the source serves the guest.
    let mut at_target = RawSession::start(target.socket(), features::USUAL, 64).expect("a session");
    assert!(!reads_within(&mut at_target, Duration::from_millis(500)), "two have the image");
    assert_eq!(target.status()["claim"], "waiting");
    wait_for("the log says that rings wait", || target.log().contains("the guest's rings wait"));
    at_source.assert_one_read();
    // An upgrade there takes nothing away.
    assert_eq!(target.ctl(&["upgrade", "file"]).status, 0);
    assert!(at_target.used(Duration::from_millis(200)).expect("memory").is_none());
    at_source.stop_ring().expect("a stop");
    assert!(at_target.used(PATIENCE).expect("memory").is_some(), "{}", target.log());
    assert_eq!(target.status()["claim"], "claimed");
    at_target.assert_one_read();
    // The migration has failed: the source goes on, as soon as the target is gone.
    at_source.start_ring(64).expect("a ring");
    assert!(!reads_within(&mut at_source, Duration::from_millis(300)), "two have the image");
    drop(at_target);
    assert!(at_source.used(PATIENCE).expect("memory").is_some(), "{}", source.log());
    refused(&path, &[]);
    drop(at_source);
    wait_for("it is given back", || source.status()["claim"] == "free");
    for daemon in [target, source] {
        assert_eq!(daemon.terminate(), 0);
    }
}

#[test]
fn a_ring_that_waits_is_stopped_at_once_and_has_taken_nothing() {
    let (_directory, path) = image();
    let (source, target) = (late(&path), late(&path));
    let mut at_source = guest(&source);
    let mut at_target = RawSession::start(target.socket(), features::USUAL, 64).expect("a session");
    assert!(!reads_within(&mut at_target, Duration::from_millis(100)));
    let began = Instant::now();
    assert_eq!(at_target.stop_ring().expect("a stop"), 0);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    drop(at_source.stop_ring());
    // It wants nothing any more.
    wait_for("it is free", || {
        [&source, &target].into_iter().all(|daemon| daemon.status()["claim"] == "free")
    });
    at_source.start_ring(64).expect("a ring");
    at_source.assert_one_read();
}

#[test]
fn the_claim_stays_over_the_servers_death_and_exchange() {
    let (_directory, path) = image();
    let daemon = Daemon::start(&["--blk-file", text(&path)]);
    let mut guest = guest(&daemon);
    let other = late(&path);
    let mut waiting = RawSession::start(other.socket(), features::USUAL, 64).expect("a session");
    assert!(!reads_within(&mut waiting, Duration::from_millis(100)));
    let mut still_ours = |how: &str| {
        guest.assert_one_read();
        assert!(waiting.used(Duration::from_millis(100)).expect("memory").is_none(), "{how}");
        refused(&path, &[]);
    };
    if daemon.server_pid() != daemon.pid() {
        assert_eq!(daemon.ctl(&["upgrade-daemon"]).status, 0);
        still_ours("an exchange");
        let server = rustix::process::Pid::from_raw(daemon.server_pid() as i32).expect("a process");
        rustix::process::kill_process(server, rustix::process::Signal::KILL).expect("a kill");
        still_ours("a death");
    }
    assert_eq!(daemon.ctl(&["upgrade", "file", "--mode", "handover"]).status, 0);
    still_ours("a handover");
    assert_eq!(daemon.ctl(&["rollback"]).status, 0);
    still_ours("a rollback");
    daemon.kill_whole();
    assert!(waiting.used(PATIENCE).expect("memory").is_some(), "{}", other.log());
}

#[test]
fn a_disk_that_another_guest_uses_is_not_resized() {
    let (_directory, path) = image();
    let (daemon, other) = (late(&path), late(&path));
    let guest = guest(&daemon);
    let sentence = other.refuse(&["resize", "128M"]);
    assert!(sentence.contains("another program uses"), "{sentence}");
    assert_eq!(daemon.ctl(&["resize", "128M"]).status, 0);
    drop(guest);
    wait_for("it is given back", || daemon.status()["claim"] == "free");
    assert_eq!(other.ctl(&["resize", "192M"]).status, 0);
    assert_eq!(other.status()["claim"], "free");
}

/// The lock follows the rings, whoever begins to lock.
#[test]
fn an_upgrade_that_begins_to_lock_gives_the_lock_back_with_the_rings() {
    let (_directory, path) = image();
    let daemon = Daemon::start(&["--blk-file", text(&path), "--param", "locking=false"]);
    let mut guest = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    guest.assert_one_read();
    let output = daemon.ctl(&["upgrade", "file", "--param", "locking=true"]);
    assert_eq!(output.status, 0, "{output:?}");
    refused(&path, &[]);
    let target = late(&path);
    let mut at_target = RawSession::start(target.socket(), features::USUAL, 64).expect("a session");
    assert!(!reads_within(&mut at_target, Duration::from_millis(100)));
    guest.stop_ring().expect("a stop");
    assert!(at_target.used(PATIENCE).expect("memory").is_some(), "{}", target.log());
}

/// Who asks for an image has it locked for a moment, and backs off.
#[test]
fn one_who_looks_does_not_have_the_lock_given_up() {
    let (_directory, path) = image();
    let daemon = Daemon::start(&["--blk-file", text(&path)]);
    let _guest = guest(&daemon);
    let looks = File::options().read(true).open(&path).expect("the image");
    rustix::fs::fcntl_lock(&looks, FlockOperation::NonBlockingLockShared).expect("a lock");
    if daemon.server_pid() != daemon.pid() {
        daemon.end_server(Signal::KILL);
    }
    let size = (2 * std::fs::metadata(&path).expect("the image").len()).to_string();
    let output = daemon.ctl(&["resize", &size]);
    assert_eq!(output.status, 0, "{output:?}");
    drop(looks);
    refused(&path, &[]);
    assert_eq!(daemon.status()["claim"], "claimed");
}
