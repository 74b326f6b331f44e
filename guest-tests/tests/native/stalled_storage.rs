//! Storage that does not answer for longer than any timeout, and then does.
//!
//! A file system is frozen under an image. Where that is not allowed, or takes tools that are not
//! there, this says so and passes.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::client::features;
use guest_tests::client::raw::{FREE, GUEST_BASE, RawSession, WRITE};
use guest_tests::daemon::Daemon;
use rustix::process::Signal;
use tempfile::TempDir;

const SECOND: Duration = Duration::from_secs(1);

/// A file system of one's own; thawed and unmounted when this is dropped.
struct Mount(TempDir);

impl Mount {
    fn new() -> Option<Mount> {
        let mount = Mount(tempfile::tempdir().ok()?);
        let image = mount.0.path().join("fs.img");
        File::create(&image).and_then(|file| file.set_len(64 << 20)).ok()?;
        let image = image.to_str()?;
        std::fs::create_dir(mount.point()).ok()?;
        let point = mount.point();
        let works = run("mkfs.ext4", &["-q", "-F", image])
            && run("mount", &["-o", "loop", image, point.to_str()?])
            && run("fsfreeze", &["-f", point.to_str()?])
            && run("fsfreeze", &["-u", point.to_str()?]);
        if !works {
            println!("skipped: no file system can be frozen here");
        }
        works.then_some(mount)
    }

    fn point(&self) -> std::path::PathBuf {
        self.0.path().join("mnt")
    }

    fn freeze(&self) -> Frozen {
        let point = self.point().to_str().expect("UTF-8").to_owned();
        assert!(run("fsfreeze", &["-f", &point]));
        Frozen(point)
    }
}

/// While it is there, the file system is frozen. A process with a request in there cannot even be
/// killed, so this is to go first.
struct Frozen(String);

impl Drop for Frozen {
    fn drop(&mut self) {
        run("fsfreeze", &["-u", &self.0]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let point = self.point();
        let point = point.to_str().unwrap_or_default();
        for _ in 0..50 {
            if run("umount", &[point]) || !Path::new(point).exists() {
                break;
            }
            thread::sleep(SECOND / 10);
        }
    }
}

fn run(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

/// Offers a write of one block, and waits for its answer so long.
fn write(raw: &mut RawSession, limit: Duration) -> bool {
    let mut header = [0; 16];
    header[0] = 1;
    raw.put(FREE, &header).expect("memory");
    let at = GUEST_BASE + FREE;
    raw.chain(0, &[(at, 16, 0), (at + 0x2000, 4096, 0), (at + 0x1000, 1, WRITE)]).expect("memory");
    raw.offer(0).expect("a kick");
    raw.used(limit).expect("memory").is_some()
}

#[test]
fn a_disk_comes_back_with_its_storage() {
    let Some(mount) = Mount::new() else { return };
    let image = mount.point().join("disk.img");
    File::create(&image).and_then(|file| file.set_len(16 << 20)).expect("an image");
    let daemon =
        Daemon::start(&["--blk-file", image.to_str().expect("UTF-8"), "--param", "direct=true"]);
    let mut raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    assert!(write(&mut raw, 5 * SECOND));
    let frozen = mount.freeze();
    assert!(!write(&mut raw, SECOND), "it is frozen");
    raw.hang_up().expect("a socket");
    // Longer than a drain is waited for where no request has to wait.
    thread::sleep(12 * SECOND);
    assert_eq!(daemon.status()["queues"][0]["in_flight"], 1);
    assert!(daemon.log().contains("still in flight"), "{}", daemon.log());
    drop(frozen);
    let mut next =
        RawSession::start(daemon.socket(), features::USUAL, 64).expect("the next session");
    assert!(write(&mut next, 5 * SECOND), "the queue is dead: {}", daemon.status());
    drop(next);
    assert_eq!(daemon.terminate(), 0);
}

/// A loop device on a file of the mount: direct I/O to it is in the kernel's hands as soon as it is
/// begun, and a process with such a request can be killed.
struct Device(String);

impl Device {
    fn new(mount: &Mount) -> Option<Device> {
        let file = mount.point().join("device.img");
        std::fs::write(&file, vec![0; 16 << 20]).ok()?;
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().ok()?;
        let path = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        if !output.status.success() {
            println!("skipped: no loop device");
        }
        output.status.success().then_some(Device(path))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.0]);
    }
}

/// A daemon with direct I/O to the device, and its guest.
fn serve(device: &Device, more: &[&str]) -> (Daemon, RawSession) {
    let args = ["--blk-file", &device.0, "--param", "direct=true"];
    let daemon = Daemon::start(&[&args[..], more].concat());
    let guest = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    (daemon, guest)
}

/// Else the dead server's write would land when a newer one was answered.
#[test]
fn what_a_dead_server_has_begun_is_over_before_the_next_one_begins() {
    let Some(mount) = Mount::new() else { return };
    let Some(device) = Device::new(&mount) else { return };
    let (daemon, mut raw) = serve(&device, &[]);
    if daemon.server_pid() == daemon.pid() {
        return;
    }
    assert!(write(&mut raw, 5 * SECOND));
    let frozen = mount.freeze();
    assert!(!write(&mut raw, SECOND), "it is frozen");
    for round in 1..=2 {
        daemon.end_server(Signal::KILL);
        // It says so after a while, and has begun nothing.
        let says = "has requests still of the process before";
        let status = daemon.wait_until("it waits", |_| daemon.log().matches(says).count() >= round);
        assert_eq!(status["queues"][0]["in_flight"], 0, "{status}");
    }
    drop(frozen);
    assert!(raw.used(60 * SECOND).expect("memory").is_some(), "no answer: {}", daemon.status());
    assert!(write(&mut raw, 60 * SECOND));
    drop(raw);
    assert_eq!(daemon.terminate(), 0);
}

/// The lock lives as long: another daemon would write beside the kernel.
#[test]
fn the_image_of_a_killed_daemon_is_locked_until_the_kernel_has_done() {
    let Some(mount) = Mount::new() else { return };
    let Some(device) = Device::new(&mount) else { return };
    let (daemon, mut raw) = serve(&device, &[]);
    assert!(write(&mut raw, 5 * SECOND));
    let (other, mut next) = serve(&device, &["--param", "locking=late"]);
    let frozen = mount.freeze();
    assert!(!write(&mut raw, SECOND), "it is frozen");
    daemon.kill_whole();
    assert!(!write(&mut next, SECOND), "it is another's");
    assert_eq!(other.status()["claim"], "waiting");
    drop(frozen);
    assert!(next.used(60 * SECOND).expect("memory").is_some(), "no answer: {}", other.status());
    drop((raw, next));
    assert_eq!(other.terminate(), 0);
}

/// Nobody wants the disk any more, and still the kernel writes to it.
#[test]
fn what_a_dead_server_has_begun_is_over_before_the_image_is_given_back() {
    let Some(mount) = Mount::new() else { return };
    let Some(device) = Device::new(&mount) else { return };
    let (daemon, mut raw) = serve(&device, &[]);
    if daemon.server_pid() == daemon.pid() {
        return;
    }
    assert!(write(&mut raw, 5 * SECOND));
    let (other, mut next) = serve(&device, &["--param", "locking=late"]);
    let frozen = mount.freeze();
    assert!(!write(&mut raw, SECOND), "it is frozen");
    daemon.end_server(Signal::KILL);
    drop(raw);
    daemon.wait_until("it has gone", |status| status["connected"] == false);
    assert!(!write(&mut next, SECOND), "it is another's");
    // Longer than the server waits for a session of the one before.
    thread::sleep(12 * SECOND);
    assert_eq!(other.status()["claim"], "waiting", "{}", daemon.log());
    // Nothing else waits for that.
    let began = Instant::now();
    daemon.call(&["upgrade", "file", "--param", "aio=sync"]);
    assert_eq!(daemon.ctl(&["resize", "17M"]).status, 1);
    drop(RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session"));
    assert!(began.elapsed() < 10 * SECOND, "{:?}", began.elapsed());
    drop(frozen);
    assert!(next.used(60 * SECOND).expect("memory").is_some(), "no answer: {}", other.status());
    daemon.wait_until("it is given back", |status| status["claim"] == "free");
    drop(next);
    for daemon in [daemon, other] {
        assert_eq!(daemon.terminate(), 0);
    }
}
