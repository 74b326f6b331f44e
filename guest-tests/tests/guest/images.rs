//! Raw images of the host: read in the guest, written by the guest, protected from the guest.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

use guest_tests::daemon::{Daemon, run_daemon};
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::initramfs::program;
use guest_tests::operator::Operator;

/// Runs a tool on the host; its exit status is the caller's business.
fn host(name: &str, arguments: &[&str]) -> Output {
    let path = program(name).unwrap();
    Command::new(path).args(arguments).output().unwrap()
}

/// Runs a tool on the host that has to succeed, and gives back what it printed.
fn host_ok(name: &str, arguments: &[&str]) -> String {
    let output = host(name, arguments);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {}, {complaints}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// A 64 MiB image with an ext4 that holds `hello`.
fn ext4_image(directory: &Path) -> String {
    let content = directory.join("content");
    fs::create_dir(&content).unwrap();
    fs::write(content.join("hello"), "made on the host\n").unwrap();
    let image = directory.join("disk.img").to_str().unwrap().to_owned();
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    host_ok("mkfs.ext4", &["-q", "-F", "-d", content.to_str().unwrap(), &image]);
    image
}

#[test]
fn what_the_guest_writes_is_in_the_image_after_sigterm() {
    let directory = tempfile::tempdir().unwrap();
    let image = ext4_image(directory.path());
    let daemon = Daemon::start(&["--blk-file", &image, "--queues", "2"]);
    let guest = Guest::boot(GuestOptions::with_disk(daemon.socket())).unwrap();
    let mut operator = Operator::new(&daemon);
    let parameter = format!("path={image}");

    guest.sh("mount -t ext4 /dev/vda /mnt");
    assert_eq!(guest.sh("cat /mnt/hello"), "made on the host");
    guest.sh("echo made in the guest >/mnt/before");
    operator.upgrade("file", "swap", &["--param", &parameter]);
    let sum = guest.sh("set -e
         head -c 3000000 /dev/urandom >/mnt/random
         echo made after an upgrade >/mnt/after
         sha256sum </mnt/random
         sync
         umount /mnt");
    operator.settle();
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);

    host_ok("e2fsck", &["-fn", &image]);
    let cat = |path: &str| host_ok("debugfs", &["-R", &format!("cat {path}"), &image]);
    assert_eq!(cat("/hello"), "made on the host\n");
    assert_eq!(cat("/before"), "made in the guest\n");
    assert_eq!(cat("/after"), "made after an upgrade\n");
    let copy = directory.path().join("random").to_str().unwrap().to_owned();
    host_ok("debugfs", &["-R", &format!("dump /random {copy}"), &image]);
    let host_sum = host_ok("sha256sum", &[&copy]);
    assert_eq!(host_sum.split_whitespace().next(), sum.split_whitespace().next());
}

#[test]
fn a_read_only_disk_can_be_read_and_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let image = ext4_image(directory.path());
    let before = host_ok("sha256sum", &[&image]);
    let daemon = Daemon::start(&["--blk-file", &image, "--read-only", "--queues", "1"]);
    let options = GuestOptions { queues: 1, ..GuestOptions::with_disk(daemon.socket()) };
    let guest = Guest::boot(options).unwrap();
    let mut operator = Operator::new(&daemon);

    for _ in 0..2 {
        assert_eq!(guest.sh("cat /sys/block/vda/ro"), "1");
        assert_eq!(
            guest.sh("sha256sum /dev/vda").split_whitespace().next(),
            before.split_whitespace().next(),
            "the guest reads what is in the image"
        );
        for write in
            ["dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct", "mkfs.ext4 -q -F /dev/vda"]
        {
            assert_ne!(guest.run(write).status, 0, "`{write}` on a read-only disk");
        }
        assert_ne!(
            guest.run("mount -t ext4 -o rw,noload /dev/vda /mnt && touch /mnt/file").status,
            0
        );
        guest.sh("umount /mnt 2>/dev/null; mount -t ext4 -o ro /dev/vda /mnt");
        assert_eq!(guest.sh("cat /mnt/hello"), "made on the host");
        guest.sh("umount /mnt; echo 3 >/proc/sys/vm/drop_caches");
        // Once more with a successor, which must be as read-only as its predecessor.
        operator.upgrade(
            "file",
            "swap",
            &["--param", &format!("path={image}"), "--param", "readonly=true"],
        );
    }
    operator.settle();
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
    assert_eq!(host_ok("sha256sum", &[&image]), before);
}

#[test]
fn an_image_of_broken_sectors_is_refused_at_start() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("odd.img");
    File::create(&image).unwrap().set_len((1 << 20) + 100).unwrap();
    let socket = directory.path().join("vhost.sock");
    let output = run_daemon(&[
        "--socket-path",
        socket.to_str().unwrap(),
        "--blk-file",
        image.to_str().unwrap(),
    ]);
    assert_eq!(output.status, 1, "{output:?}");
    assert!(output.stderr.contains("512"), "the sentence says what is wrong: {}", output.stderr);
    assert!(!socket.exists(), "a daemon that did not start leaves no socket");
    assert_eq!(fs::metadata(&image).unwrap().len(), (1 << 20) + 100, "the image is as it was");
}
