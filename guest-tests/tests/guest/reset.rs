//! The guest's driver comes and goes (reset button, unbind, bind) and the disk is the same each
//! time.

use guest_tests::daemon::Daemon;
use guest_tests::guest::fio::Fio;
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::operator::Operator;

/// A mark at the far end of a 64 MiB disk, where fio does not come.
const MARK: &str = "dd if=/dev/urandom of=/dev/vda bs=1M seek=60 count=2 oflag=direct 2>/dev/null";
const MARK_SUM: &str = "dd if=/dev/vda bs=1M skip=60 count=2 iflag=direct 2>/dev/null | sha256sum";

/// I/O with an upgrade and a rollback in its midst.
fn assert_io_and_upgrades_go_on(guest: &Guest, operator: &mut Operator<'_>) {
    let fio = Fio::start(guest, 60);
    operator.upgrade("ramdisk_v2", "handover", &[]);
    fio.wait_for_requests(1000);
    operator.roll_back("handover");
    fio.wait_for_requests(1000);
    assert!(fio.is_running());
    fio.enough();
    fio.finish();
    operator.settle();
}

#[test]
fn a_reboot_keeps_the_data_and_the_generation() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "2"]);
    let guest = Guest::boot(GuestOptions::with_disk(daemon.socket())).unwrap();
    let mut operator = Operator::new(&daemon);
    guest.sh(MARK);
    let sum = guest.sh(MARK_SUM);
    assert_io_and_upgrades_go_on(&guest, &mut operator);

    let first_boot = guest.sh("cat /proc/sys/kernel/random/boot_id");
    guest.reset().unwrap();
    assert_ne!(guest.sh("cat /proc/sys/kernel/random/boot_id"), first_boot);
    assert_eq!(guest.sh(MARK_SUM), sum);
    assert_io_and_upgrades_go_on(&guest, &mut operator);

    // The reset button does not wait for I/O to end, so neither may the device.
    let fio = Fio::start(&guest, 30);
    operator.upgrade("ramdisk_v2", "handover", &[]);
    assert!(fio.is_running());
    guest.reset().unwrap();
    drop(fio);
    assert_eq!(guest.sh(MARK_SUM), sum);
    operator.roll_back("handover");
    assert_io_and_upgrades_go_on(&guest, &mut operator);
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn a_driver_that_is_unbound_and_bound_finds_its_disk_again() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "2"]);
    let guest = Guest::boot(GuestOptions::with_disk(daemon.socket())).unwrap();
    let mut operator = Operator::new(&daemon);
    guest.sh(MARK);
    let sum = guest.sh(MARK_SUM);
    // /sys/block/vda/device is the virtio device, the PCI function is its parent.
    guest.sh("readlink -f /sys/block/vda/device >/run/device");
    for (driver, device) in [
        ("/sys/bus/virtio/drivers/virtio_blk", "$(basename $(cat /run/device))"),
        ("/sys/bus/pci/drivers/virtio-pci", "$(basename $(dirname $(cat /run/device)))"),
    ] {
        guest.sh(&format!("echo {device} >{driver}/unbind"));
        assert_eq!(guest.run("test -e /dev/vda").status, 1, "unbound from {driver}");
        // No worker is on the rings now, so the upgrading side has to do everything by itself.
        operator.upgrade("ramdisk_v2", "handover", &[]);
        operator.roll_back("handover");
        guest.sh(&format!("echo {device} >{driver}/bind"));
        assert_eq!(guest.sh(MARK_SUM), sum, "after {driver}");
        assert_io_and_upgrades_go_on(&guest, &mut operator);
    }
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
}
