//! A file system is made, filled, checked and filled again while the device beneath it is
//! exchanged.

use std::thread;
use std::time::Duration;

use guest_tests::daemon::Daemon;
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::operator::Operator;

/// Each pass mounts afresh, so that what it checks comes from the device and not from the page
/// cache.
const SCRIPT: &str = "set -e
mkfs.ext4 -q -F /dev/vda
for pass in 1 2 3 4; do
    mount -t ext4 /dev/vda /mnt
    if [ $pass -gt 1 ]; then sha256sum -c -s /run/sums; fi
    for file in 1 2 3 4 5 6; do
        head -c 1500000 /dev/urandom >/mnt/file$file
    done
    mkdir -p /mnt/directory$pass
    sha256sum /mnt/file* >/run/sums
    umount /mnt
    echo 3 >/proc/sys/vm/drop_caches
    e2fsck -fn /dev/vda
done
mount -t ext4 -o ro /dev/vda /mnt
sha256sum -c -s /run/sums
ls -d /mnt/directory* | wc -l
umount /mnt
echo checked";

#[test]
fn ext4_survives_a_row_of_handovers() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "2"]);
    let guest = Guest::boot(GuestOptions::with_disk(daemon.socket())).unwrap();
    let mut operator = Operator::new(&daemon);

    let job = guest.spawn(SCRIPT);
    let mut names = ["ramdisk_v2", "ramdisk"].into_iter().cycle();
    while !job.has_ended() {
        operator.upgrade(names.next().unwrap(), "handover", &[]);
        thread::sleep(Duration::from_millis(100));
    }
    let output = job.wait(Duration::ZERO);
    assert_eq!(output.status, 0, "{}", output.stdout);
    assert!(output.stdout.ends_with("4\nchecked\n"), "{}", output.stdout);
    assert!(operator.exchanges() >= 10, "only {} upgrades while it ran", operator.exchanges());
    println!("{} upgrades under the file system", operator.exchanges());
    operator.settle();

    let dmesg = guest.sh("dmesg");
    for complaint in ["I/O error", "EXT4-fs error", "blk_update_request"] {
        assert!(!dmesg.contains(complaint), "{dmesg}");
    }
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
}
