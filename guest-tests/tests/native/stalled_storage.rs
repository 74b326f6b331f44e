//! Storage that does not answer for longer than any timeout, and then does.
//!
//! A file system is frozen under an image. Where that is not allowed, or takes tools that are not
//! there, this says so and passes.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use guest_tests::client::features;
use guest_tests::client::raw::{FREE, GUEST_BASE, RawSession, WRITE};
use guest_tests::daemon::Daemon;
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
