//! What was configured on the command line is what the guest's driver finds, before and after an
//! upgrade.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::daemon::Daemon;
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::operator::Operator;

const CAPACITY: u64 = 256 << 20;
const SERIAL: &str = "hotswap-0042";

/// Everything about the disk that the guest can see from its attributes.
fn assert_configuration(guest: &Guest) {
    let attribute = |name: &str| guest.sh(&format!("cat /sys/block/vda/{name}"));
    // The size is in units of 512 bytes, whatever the block size
    // (Documentation/ABI/stable/sysfs-block).
    assert_eq!(attribute("size"), (CAPACITY / 512).to_string());
    assert_eq!(attribute("serial"), SERIAL);
    assert_eq!(attribute("queue/logical_block_size"), "512");
    assert_eq!(attribute("ro"), "0");
    assert_eq!(guest.sh("ls /sys/block/vda/mq"), "0\n1");
    assert_eq!(guest.sh("blockdev --getsize64 /dev/vda"), CAPACITY.to_string());
}

fn wait_for_connected(daemon: &Daemon, connected: bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while daemon.status()["connected"] != connected {
        assert!(Instant::now() < deadline, "never connected={connected}: {}", daemon.status());
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_guest_finds_the_configured_disk_also_after_upgrades() {
    let serial = format!("serial={SERIAL}");
    let daemon = Daemon::start(&[
        "--domain",
        "ramdisk",
        "--param",
        "size=256M",
        "--param",
        &serial,
        "--queues",
        "2",
    ]);
    assert_eq!(daemon.status()["connected"], false);
    let mut operator = Operator::new(&daemon);

    let guest = Guest::boot(GuestOptions::with_disk(daemon.socket())).unwrap();
    assert_configuration(&guest);
    let status = daemon.status();
    assert_eq!(status["capacity"], CAPACITY, "{status}");
    assert_eq!(status["connected"], true, "{status}");
    assert_eq!(status["queues"].as_array().map(Vec::len), Some(2), "{status}");

    // The first and the last block are there, the one behind the last is not.
    let last = CAPACITY / 4096 - 1;
    let access = |block: u64| {
        guest
            .run(&format!("dd if=/dev/vda of=/dev/null bs=4096 count=1 skip={block} iflag=direct"))
            .stdout
    };
    for block in [0, last] {
        assert!(access(block).contains("1+0 records in"), "block {block}: {}", access(block));
    }
    assert!(!access(last + 1).contains("1+0 records in"));

    for name in ["ramdisk_v2", "ramdisk"] {
        operator.upgrade(name, "handover", &["--param", "size=256M", "--param", &serial]);
        // The driver asks for the configuration anew only when it is bound.
        rebind(&guest);
        assert_configuration(&guest);
    }
    operator.settle();

    guest.shutdown().unwrap();
    wait_for_connected(&daemon, false);
    let socket = daemon.socket().to_owned();
    assert_eq!(daemon.terminate(), 0);
    assert!(!Path::new(&socket).exists(), "the daemon removes its socket");
}

fn rebind(guest: &Guest) {
    guest.sh("set -e
         device=$(basename $(readlink -f /sys/block/vda/device))
         echo $device >/sys/bus/virtio/drivers/virtio_blk/unbind
         echo $device >/sys/bus/virtio/drivers/virtio_blk/bind");
}

#[test]
fn one_queue_is_one_queue_and_the_default_size_is_64m() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "1"]);
    let options =
        GuestOptions { queues: 1, queue_size: 64, ..GuestOptions::with_disk(daemon.socket()) };
    let guest = Guest::boot(options).unwrap();
    assert_eq!(guest.sh("ls /sys/block/vda/mq"), "0");
    assert_eq!(guest.sh("blockdev --getsize64 /dev/vda"), (64 << 20).to_string());
    // A scheduler has twice as many requests as the ring holds; without one, the ring is the limit.
    let depth = guest.sh("cd /sys/block/vda/queue; echo none >scheduler; cat nr_requests");
    assert_eq!(depth, "64");
}

/// The guest would wait for its first request for ever if its rings were refused.
#[test]
fn rings_as_large_as_those_of_qemu_need_no_option() {
    let daemon = Daemon::start(&["--domain", "ramdisk"]);
    let options =
        GuestOptions { queues: 1, queue_size: 1024, ..GuestOptions::with_disk(daemon.socket()) };
    let guest = Guest::boot(options).unwrap();
    assert_eq!(guest.sh("cat /sys/block/vda/queue/max_segments"), "126");
    guest.sh("dd if=/dev/zero of=/dev/vda bs=1M count=8 oflag=direct 2>/dev/null");
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
}
