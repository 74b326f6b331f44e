//! A disk becomes larger while it is used, and stays as large through everything that comes after.
//!
//! What a frontend that asks sees is the new size, and its requests reach the new end from then on;
//! until it has asked, they end where it was told that the disk ends.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::Duration;

use guest_tests::client::{Client, Options, Queue, Request, Status};
use guest_tests::daemon::{Daemon, disk_directory};
use guest_tests::loopback::{LoopDevice, host};
use guest_tests::operator::Operator;
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(30);
const BLOCK: usize = 4096;

fn connect(daemon: &Daemon) -> Client {
    Client::connect(daemon.socket(), &Options::default())
        .unwrap_or_else(|error| panic!("{error}\n{}", daemon.log()))
}

fn status(queue: &mut Queue, request: Request<'_>) -> Status {
    queue.execute(request, LIMIT).expect("an answer").0
}

#[track_caller]
fn write(queue: &mut Queue, offset: u64, byte: u8) {
    let status = status(queue, Request::Write { offset, data: &[byte; BLOCK] });
    assert_eq!(status, Status::Ok, "a write at {offset}");
}

#[track_caller]
fn reads(queue: &mut Queue, offset: u64, byte: u8) {
    let (status, data) =
        queue.execute(Request::Read { offset, len: BLOCK }, LIMIT).expect("an answer");
    assert_eq!((status, data), (Status::Ok, vec![byte; BLOCK]), "a read at {offset}");
}

/// Makes the disk larger by a command, which must be done.
#[track_caller]
fn resize(daemon: &Daemon, size: &str, before: u64, now: u64) {
    let reply = daemon.call(&["resize", size]);
    assert_eq!((&reply["capacity_before"], &reply["capacity"]), (&json!(before), &json!(now)));
    assert_eq!(daemon.status()["capacity"], now);
}

#[track_caller]
fn refused(daemon: &Daemon, size: &str, code: &str, saying: &str) {
    let before = daemon.status();
    let sentence = daemon.refuse(&["resize", size]);
    assert!(sentence.contains(&format!("({code})")) && sentence.contains(saying), "{sentence}");
    let after = daemon.status();
    for key in ["capacity", "generation", "state", "domain", "upgrades"] {
        assert_eq!(before[key], after[key], "`{key}` has changed by the refusal: {sentence}");
    }
}

#[test]
fn the_grown_part_is_the_guests_once_it_has_asked() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=1M"]);
    let mut client = connect(&daemon);
    assert_eq!(client.capacity(), MIB);
    write(client.queue(0), MIB - BLOCK as u64, 1);
    let beyond = Request::Write { offset: MIB, data: &[2; BLOCK] };
    assert_eq!(status(client.queue(0), beyond), Status::IoError);
    resize(&daemon, "64M", MIB, 64 * MIB);
    // It was not told.
    assert_eq!(status(client.queue(0), beyond), Status::IoError);
    assert_eq!(client.read_capacity().unwrap(), 64 * MIB);
    let queue = client.queue(0);
    reads(queue, MIB - BLOCK as u64, 1);
    reads(queue, MIB, 0);
    write(queue, MIB - 512, 3);
    write(queue, 64 * MIB - BLOCK as u64, 4);
    reads(queue, MIB - 512, 3);
    reads(queue, 64 * MIB - BLOCK as u64, 4);
    let beyond = Request::Read { offset: 64 * MIB - 512, len: BLOCK };
    assert_eq!(status(queue, beyond), Status::IoError);
    drop(client);
    // The next frontend finds it so.
    let mut client = connect(&daemon);
    assert_eq!(client.capacity(), 64 * MIB);
    reads(client.queue(0), 64 * MIB - BLOCK as u64, 4);
    let entry = daemon.call(&["history"]).as_array().and_then(|all| all.last().cloned()).unwrap();
    assert_eq!((&entry["change"], &entry["capacity"]), (&json!("resize"), &json!(64 * MIB)));
    drop(client);
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn it_never_becomes_smaller_and_nonsense_is_refused() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=2M"]);
    refused(&daemon, "1M", "resize_shrinks", "2097152");
    refused(&daemon, "2097153", "resize_failed", "512");
    refused(&daemon, "1000T", "resize_failed", "address space");
    resize(&daemon, "2048K", 2 * MIB, 2 * MIB);
    for bad in ["0", "x", "-1", "1.5G"] {
        assert_eq!(daemon.ctl(&["resize", bad]).status, 2, "{bad}");
    }
    assert_eq!(daemon.status()["domain"]["params"]["size"], "2M", "nothing was resized");
}

#[test]
fn upgrades_rollbacks_and_takeovers_keep_it() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=1M"]);
    let mut operator = Operator::new(&daemon);
    let mut client = connect(&daemon);
    operator.upgrade("ramdisk_v2", "handover", &[]);
    resize(&daemon, "8M", MIB, 8 * MIB);
    assert_eq!(client.read_capacity().unwrap(), 8 * MIB);
    let (end, mut mark) = (8 * MIB - BLOCK as u64, 1);
    let mut stays = |client: &mut Client, operator: &Operator<'_>| {
        operator.settle();
        assert_eq!(daemon.status()["capacity"], 8 * MIB);
        if mark > 1 {
            reads(client.queue(0), end, mark - 1);
        }
        write(client.queue(0), end, mark);
        mark += 1;
    };
    stays(&mut client, &operator);
    // The standby was prepared when the disk was smaller.
    operator.roll_back("handover");
    stays(&mut client, &operator);
    operator.upgrade("ramdisk_v2", "handover", &[]);
    stays(&mut client, &operator);
    for (fault, params) in [("request:panic", &[][..]), ("request:panic", &["--param", "size=8M"])]
    {
        let fault = format!("fault={fault}");
        operator.upgrade("faulty", "handover", &[&["--param", &fault], params].concat());
        reads(client.queue(0), end, 3);
        operator.taken_over("ramdisk_v2");
        operator.upgrade("ramdisk", "handover", &[]);
        operator.upgrade("ramdisk_v2", "handover", &[]);
    }
    stays(&mut client, &operator);
    operator.upgrade_refused("ramdisk", &["--param", "size=1M"]);
    drop(client);
    assert_eq!(connect(&daemon).capacity(), 8 * MIB);
}

#[test]
fn a_domain_that_dies_of_it_is_taken_over_with_its_data() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=1M"]);
    let mut operator = Operator::new(&daemon);
    let mut client = connect(&daemon);
    write(client.queue(0), 0, 7);
    operator.upgrade("faulty", "handover", &["--param", "fault=resize:fail,resize:panic"]);
    refused(&daemon, "2M", "resize_failed", "fault=resize:fail");
    let sentence = daemon.refuse(&["resize", "2M"]);
    assert!(sentence.contains("(resize_panicked)"), "{sentence}");
    operator.taken_over("ramdisk");
    reads(client.queue(0), 0, 7);
    resize(&daemon, "2M", MIB, 2 * MIB);
    assert_eq!(client.read_capacity().unwrap(), 2 * MIB);
    write(client.queue(0), 2 * MIB - BLOCK as u64, 8);
}

#[test]
fn a_disk_that_grows_under_load_loses_nothing() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    load.wait_for(1000);
    let mut control = daemon.rpc();
    for round in 1..=100u64 {
        let size = (64 + round) * MIB;
        let reply = control.request("resize", json!({"size": size})).expect("it grows");
        assert_eq!(reply["capacity"], size);
        if round % 10 == 0 {
            control.request("upgrade", json!({"name": "ramdisk_v2"})).expect("an upgrade");
            load.wait_for(10);
        }
    }
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.status()["capacity"], 164 * MIB);
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn serve(image: &Path, more: &[&str]) -> Daemon {
    let path = format!("path={}", text(image));
    let mut args = vec!["--domain", "file", "--param", &path];
    more.iter().for_each(|param| args.extend(["--param", param]));
    Daemon::start(&args)
}

#[test]
fn an_image_is_made_longer_and_swaps_keep_it() {
    for more in [&[][..], &["direct=true"], &["aio=sync"]] {
        let directory = disk_directory();
        let image = directory.path().join("disk.img");
        File::create(&image).unwrap().set_len(MIB).unwrap();
        let daemon = serve(&image, more);
        let mut operator = Operator::new(&daemon);
        let mut client = connect(&daemon);
        resize(&daemon, "3M", MIB, 3 * MIB);
        assert_eq!(image.metadata().unwrap().len(), 3 * MIB);
        assert_eq!(client.read_capacity().unwrap(), 3 * MIB);
        write(client.queue(0), 3 * MIB - BLOCK as u64, 5);
        operator.upgrade("file", "swap", &[]);
        reads(client.queue(0), 3 * MIB - BLOCK as u64, 5);
        operator.roll_back("swap");
        operator.settle();
        assert_eq!(daemon.status()["capacity"], 3 * MIB);
        // One that has grown by itself is taken up, as far as is asked for, and is not cut.
        OpenOptions::new().write(true).open(&image).unwrap().set_len(8 * MIB).unwrap();
        operator.upgrade("file", "swap", &[]);
        assert_eq!(client.read_capacity().unwrap(), 3 * MIB, "nothing was asked for");
        resize(&daemon, "7M", 3 * MIB, 7 * MIB);
        assert_eq!(image.metadata().unwrap().len(), 8 * MIB);
        assert_eq!(client.read_capacity().unwrap(), 7 * MIB);
        write(client.queue(0), 7 * MIB - BLOCK as u64, 6);
        refused(&daemon, "6M", "resize_shrinks", "7340032");
        drop(client);
        assert_eq!(daemon.terminate(), 0);
    }
}

#[test]
fn what_cannot_be_made_longer_takes_up_what_it_has() {
    let directory = disk_directory();
    let image = directory.path().join("disk.img");
    let file = File::create(&image).unwrap();
    file.set_len(MIB).unwrap();
    let daemon = serve(&image, &["readonly=true"]);
    refused(&daemon, "2M", "resize_failed", "readonly=true");
    assert_eq!(image.metadata().unwrap().len(), MIB);
    file.set_len(2 * MIB).unwrap();
    resize(&daemon, "2M", MIB, 2 * MIB);
    reads(connect(&daemon).queue(0), 2 * MIB - BLOCK as u64, 0);
}

#[test]
fn a_block_device_that_has_grown_is_taken_up() {
    let place = disk_directory();
    let Some(device) = LoopDevice::new(place.path(), MIB, 512, &[]) else { return };
    let daemon = serve(device.path(), &[]);
    let mut client = connect(&daemon);
    refused(&daemon, "2M", "resize_failed", "block device");
    OpenOptions::new().write(true).open(device.file()).unwrap().set_len(2 * MIB).unwrap();
    if host("losetup", &["--set-capacity", text(device.path())]).is_none() {
        return;
    }
    resize(&daemon, "2M", MIB, 2 * MIB);
    assert_eq!(client.read_capacity().unwrap(), 2 * MIB);
    write(client.queue(0), 2 * MIB - BLOCK as u64, 9);
    reads(client.queue(0), 2 * MIB - BLOCK as u64, 9);
}

#[test]
fn the_null_disk_is_as_large_as_it_is_said_to_be() {
    let daemon = Daemon::start(&["--domain", "empty"]);
    let mut operator = Operator::new(&daemon);
    resize(&daemon, "4T", 64 * MIB, 4 << 40);
    operator.upgrade("empty", "swap", &[]);
    operator.roll_back("swap");
    let mut client = connect(&daemon);
    assert_eq!(client.capacity(), 4 << 40);
    reads(client.queue(0), (4 << 40) - BLOCK as u64, 0);
    let params = &daemon.status()["domain"]["params"];
    assert_eq!(params["size"], Value::Null, "what was not given is not made up: {params}");
}
