//! A Linux guest under QEMU that turns its write cache off: neither a reset of the machine nor a
//! new daemon turns it on behind its back. The disk is one that forgets what was not synced.

use guest_tests::daemon::Daemon;
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::power::Disk;
use rustix::process::Signal;

const BLOCK: usize = 4096;
const CACHE_TYPE: &str = "/sys/block/vda/cache_type";

/// Has the guest write a block, and nothing flush it.
fn write(guest: &Guest, block: usize) {
    guest.sh(&format!(
        "head -c {BLOCK} /dev/zero | tr '\\000' Z >/run/z && dd if=/run/z of=/dev/vda bs={BLOCK} seek={block} oflag=direct 2>/dev/null"
    ));
}

fn is_durable(disk: &Disk, block: usize) -> bool {
    disk.image()[block * BLOCK..][..BLOCK].iter().all(|&byte| byte == b'Z')
}

#[test]
fn a_guest_that_turned_its_cache_off_loses_nothing_that_was_answered() {
    let disk = match Disk::mount(4 << 20) {
        Ok(disk) => disk,
        Err(error) => {
            eprintln!("skipped: cannot mount a FUSE file: {error}");
            return;
        }
    };
    let path = format!("path={}", disk.path().display());
    let mut daemon = Daemon::start(&["--domain", "file", "--param", &path, "--queues", "2"]);
    let options = GuestOptions { reconnect: Some(1), ..GuestOptions::with_disk(daemon.socket()) };
    let guest = Guest::boot(options).unwrap();
    assert_eq!(guest.sh(&format!("cat {CACHE_TYPE}")).trim(), "write back");
    write(&guest, 1);
    assert!(!is_durable(&disk, 1), "a cache that is on is one");

    guest.sh(&format!("echo 'write through' >{CACHE_TYPE}"));
    assert!(is_durable(&disk, 1), "turning it off empties it");
    write(&guest, 2);
    assert!(is_durable(&disk, 2), "it is off");

    // QEMU shows its copy to the next driver.
    guest.reset().unwrap();
    assert_eq!(guest.sh(&format!("cat {CACHE_TYPE}")).trim(), "write through");
    write(&guest, 3);
    assert!(is_durable(&disk, 3), "after a reset");

    daemon.stop_with(Signal::KILL);
    daemon.start_again();
    write(&guest, 4);
    assert!(is_durable(&disk, 4), "after a restart of the daemon");
    guest.reset().unwrap();
    write(&guest, 5);
    assert!(is_durable(&disk, 5), "after that and a reset");

    // Only what changes is passed on.
    guest.sh(&format!("echo 'write back' >{CACHE_TYPE}"));
    write(&guest, 6);
    assert!(!is_durable(&disk, 6), "it is on again");
    println!("{}", daemon.log());
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
}
