//! One image, one writer: daemons see each other, and QEMU's programs see them and are seen.
//!
//! Where QEMU's programs are not installed, what needs them says so and passes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::daemon::{CtlOutput, Daemon, run_daemon};
use guest_tests::stamp::{Load, LoadOptions};
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

#[test]
fn a_second_daemon_is_refused_before_and_after_upgrades() {
    let (_directory, path) = image();
    let daemon = Daemon::start(&["--blk-file", text(&path)]);
    refused(&path, &[]);
    for direct in ["true", "false"] {
        let output = daemon.ctl(&["upgrade", "file", "--param", &format!("direct={direct}")]);
        assert_eq!(output.status, 0, "{output:?}");
    }
    refused(&path, &["--read-only"]);
    let unlocked = Daemon::start(&["--blk-file", text(&path), "--param", "locking=false"]);
    assert_eq!(unlocked.status()["state"], "serving", "who says so is believed");
    assert_eq!(unlocked.terminate(), 0);
    assert_eq!(daemon.terminate(), 0);
    let readers = [0; 2].map(|_| Daemon::start(&["--blk-file", text(&path), "--read-only"]));
    refused(&path, &[]);
    drop(readers);
}

#[test]
fn a_daemon_that_was_killed_leaves_no_lock() {
    let (_directory, path) = image();
    for more in [&[][..], &["--param", "direct=true"]] {
        let args = [&["--blk-file", text(&path), "--queues", "2"], more].concat();
        let daemon = Daemon::start(&args);
        let load = Load::start(
            daemon.socket(),
            &LoadOptions { patience: Duration::from_secs(1), ..LoadOptions::new(2, 32) },
        );
        load.wait_for(500);
        daemon.kill_whole();
        // As a supervisor does that restarts it at once.
        let next = Daemon::start(&args);
        assert_eq!(next.terminate(), 0);
        drop(load.stop());
    }
}

#[test]
fn qemu_does_not_touch_an_image_that_is_in_use() {
    let (directory, path) = image();
    let copy = directory.path().join("copy.img");
    let daemon = Daemon::start(&["--blk-file", text(&path)]);
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
    assert_eq!(daemon.terminate(), 0);
    for command in commands {
        let output = qemu("qemu-img", command).expect("it was there");
        assert!(output.status.success(), "{command:?}: {output:?}");
    }
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
    let deadline = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "qemu-storage-daemon does not come up");
        thread::sleep(Duration::from_millis(5));
    }
    refused(&path, &[]);
    refused(&path, &["--read-only"]);
    drop(peer);
    assert_eq!(Daemon::start(&["--blk-file", text(&path)]).terminate(), 0);
}
