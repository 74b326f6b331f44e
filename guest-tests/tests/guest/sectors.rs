//! Disks made with sectors of 512 bytes, on storage that takes direct I/O in blocks of 4096:
//! partitions that begin anywhere, file systems with small blocks, requests of single sectors, and
//! upgrades under all of it.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use guest_tests::daemon::{Daemon, disk_directory};
use guest_tests::guest::fio::Fio;
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::loopback::{LoopDevice, Mounted, host};
use guest_tests::operator::Operator;

const SECTOR: u64 = 512;
const LEN: u64 = 48 << 20;
/// Where partitions began for decades.
const FIRST: u64 = 63;
const FIRST_LEN: u64 = 32 << 10;
const SECOND: u64 = FIRST + FIRST_LEN + 1;
const SECOND_LEN: u64 = 16 << 10;
/// How long `fio` runs at most: it has enough after so many upgrades.
const FIO_SECONDS: u32 = 120;
const UPGRADES: u64 = 10;

/// A classic partition table: two of Linux's.
fn partition_table() -> [u8; 512] {
    let mut table = [0; 512];
    for (index, (start, len)) in [(FIRST, FIRST_LEN), (SECOND, SECOND_LEN)].into_iter().enumerate()
    {
        let entry = &mut table[446 + index * 16..][..16];
        // No cylinders, heads and sectors: type, then first sector and length.
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&(start as u32).to_le_bytes());
        entry[12..].copy_from_slice(&(len as u32).to_le_bytes());
    }
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    table
}

/// Writes a disk with a file system of 1 KiB blocks in its first partition to `target`, which may
/// be a device.
fn make_disk(target: &Path, directory: &Path) {
    let (content, system) = (directory.join("content"), directory.join("system.img"));
    fs::create_dir_all(&content).unwrap();
    fs::write(content.join("hello"), "made on the host\n").unwrap();
    File::create(&system).unwrap().set_len(FIRST_LEN * SECTOR).unwrap();
    let mkfs =
        ["-q", "-F", "-b", "1024", "-d", content.to_str().unwrap(), system.to_str().unwrap()];
    host("mkfs.ext4", &mkfs).expect("a file system");
    let mut bytes = Vec::new();
    File::open(&system).unwrap().read_to_end(&mut bytes).unwrap();
    let mut disk = File::options().write(true).open(target).unwrap();
    disk.write_all(&partition_table()).unwrap();
    disk.seek(SeekFrom::Start(FIRST * SECTOR)).unwrap();
    disk.write_all(&bytes).unwrap();
    disk.sync_all().unwrap();
}

fn a_guest_finds_and_keeps_it(target: &Path) {
    let target = target.to_str().unwrap();
    let daemon = Daemon::start(&["--blk-file", target, "--param", "direct=true", "--queues", "2"]);
    let guest = Guest::boot(GuestOptions::with_disk(daemon.socket())).unwrap();
    let mut operator = Operator::new(&daemon);
    assert_eq!(guest.sh("cat /sys/block/vda/queue/logical_block_size"), "512");
    assert_eq!(guest.sh("cat /sys/block/vda/queue/physical_block_size"), "4096");
    assert_eq!(
        guest.sh("cat /sys/block/vda/vda1/start /sys/block/vda/vda2/start"),
        format!("{FIRST}\n{SECOND}")
    );
    guest.sh("mount -t ext4 /dev/vda1 /mnt");
    assert_eq!(guest.sh("cat /mnt/hello"), "made on the host");
    let load = "--bsrange=512-8k --blockalign=512 --rw=randrw --numjobs=2 --size=3M \
                --offset_increment=4M --verify_backlog=64";
    let fio = Fio::start_with(&guest, "vda2", FIO_SECONDS, load);
    // Blocks are changed in place, so a successor must not serve beside its predecessor.
    let sentence = operator.upgrade_refused("file", &["--mode", "swap"]);
    assert!(sentence.contains("side by side"), "{sentence}");
    for round in 0..UPGRADES {
        operator.upgrade("file", "handover", &[]);
        guest.sh(&format!("echo {round} >>/mnt/rounds; sync /mnt/rounds"));
        operator.settle();
        fio.wait_for_requests(100);
    }
    fio.enough();
    fio.finish();
    assert_eq!(guest.sh("wc -l </mnt/rounds").trim(), UPGRADES.to_string());
    guest.sh("umount /mnt");
    let dmesg = guest.sh("dmesg");
    assert!(!dmesg.contains("I/O error"), "{dmesg}");
    let status = daemon.status();
    assert!(status["counters"]["read_modify_writes"].as_u64() > Some(100), "{status}");
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
    let mut table = [0; 512];
    File::open(target).unwrap().read_exact(&mut table).unwrap();
    assert_eq!(table, partition_table(), "its neighbours were written all the time");
}

#[test]
fn a_disk_of_512_byte_sectors_on_a_device_of_4096() {
    let directory = disk_directory();
    let Some(device) = LoopDevice::new(directory.path(), LEN, 4096, &[]) else { return };
    make_disk(device.path(), directory.path());
    a_guest_finds_and_keeps_it(device.path());
}

#[test]
fn a_disk_of_512_byte_sectors_on_a_reflinked_file() {
    let directory = disk_directory();
    let Some(mounted) = Mounted::new(directory.path(), "xfs", 400 << 20) else { return };
    let image = mounted.path().join("disk.img");
    File::create(&image).unwrap().set_len(LEN).unwrap();
    make_disk(&image, directory.path());
    let copy = mounted.path().join("copy.img");
    host("cp", &["--reflink=always", image.to_str().unwrap(), copy.to_str().unwrap()])
        .expect("a reflink");
    a_guest_finds_and_keeps_it(&image);
}
