//! The process that serves a guest is killed, exchanged, or killed with all that stands beside it,
//! under `fio` that checks every block: the guest does not notice but for the time.
//!
//! `HOTSWAP_KILLS` and `HOTSWAP_WHOLE_KILLS` say how often, where the suite's numbers are too few.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::daemon::{Daemon, disk_directory};
use guest_tests::guest::fio::Fio;
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::modules::tardy;
use rustix::process::Signal;
use serde_json::Value;

/// How long `fio` runs at most: a test has seen enough long before.
const FIO_SECONDS: u32 = 60;
/// A request that is lost takes for ever; QEMU comes back within a second.
const LONGEST: Duration = Duration::from_secs(10);

fn count(variable: &str, otherwise: u64) -> u64 {
    let text = std::env::var(variable);
    text.map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

fn image(path: &Path) -> &str {
    File::create(path).expect("an image").set_len(64 << 20).expect("its size");
    path.to_str().expect("UTF-8")
}

/// A daemon with two queues.
fn start(args: &[&str]) -> Daemon {
    Daemon::start(&[&["--queues", "2"], args].concat())
}

fn number(status: &Value, part: &str, key: &str) -> u64 {
    status[part][key].as_u64().unwrap_or_else(|| panic!("no {part}.{key}: {status}"))
}

fn requests(status: &Value) -> u64 {
    let queues = status["queues"].as_array().expect("queues");
    queues.iter().map(|queue| queue["requests"].as_u64().expect("a number")).sum()
}

/// Waits for I/O, so that what comes next comes under it, or for the end of what does it.
fn wait_for_io(daemon: &Daemon, fio: &Fio<'_>) {
    let before = requests(&daemon.status());
    daemon.wait_until("no I/O", |now| requests(now) >= before + 10 || !fio.is_running());
}

/// What the guest's kernel says if it has noticed.
fn complaints(guest: &Guest) -> Vec<&'static str> {
    let dmesg = guest.sh("dmesg");
    let words = ["I/O error", "is not a head", "hung", "reset", "blocked for more than"];
    words.into_iter().filter(|word| dmesg.contains(word)).collect()
}

/// The longest that the daemon itself says of deaths and exchanges.
fn say_pauses(what: &str, daemon: &Daemon) {
    let log = daemon.log();
    let longest = |before: &str, unit: &str| {
        let number =
            |line: &str| line.split_once(before)?.1.split_once(unit)?.0.parse::<u64>().ok();
        log.lines().filter_map(number).max().unwrap_or(0)
    };
    let (death, exchange) =
        (longest("another server serves ", " ms"), longest("the guest has waited ", " us"));
    println!("{what}: another server within {death} ms; an exchange held it {exchange} us");
}

/// Calls `step` under `fio` on both disks, until it says that it is enough.
fn under_fio(
    guest: &Guest,
    disks: [&str; 2],
    what: &str,
    mut step: impl FnMut(&[Fio<'_>; 2]) -> bool,
) {
    let mut enough = false;
    while !enough {
        let runs = disks.map(|disk| Fio::start_on(guest, disk, FIO_SECONDS));
        while !enough && runs.iter().all(Fio::is_running) {
            enough = step(&runs);
        }
        if enough {
            runs.iter().for_each(Fio::enough);
        }
        for (disk, fio) in disks.iter().zip(runs) {
            let report = fio.finish();
            println!("{what}, {disk}: longest {:?} of {report:?}", report.longest);
            assert!(report.longest < LONGEST, "{what}, {disk}: {report:?}");
        }
    }
    assert!(complaints(guest).is_empty(), "{what}: {:?}", complaints(guest));
}

/// Runs of one boot: servers first, then all of two daemons.
#[test]
fn deaths_lose_nothing() {
    let directory = disk_directory();
    let path = |name: &str| directory.path().join(name);
    let (plain, late) = (path("plain.img"), path("late.img"));
    let late = format!("path={}", image(&late));
    let mut file = start(&["--blk-file", image(&plain), "--param", "direct=true"]);
    let mut late = start(&["--domain", &tardy(), "--param", &late]);
    let memory = start(&["--domain", "ramdisk", "--param", "size=64M"]);
    let sockets = [&file, &late, &memory].map(|daemon| daemon.socket().to_owned());
    let guest = Guest::boot(GuestOptions {
        vhost_sockets: sockets.to_vec(),
        reconnect: Some(1),
        ..GuestOptions::default()
    })
    .unwrap();

    let kills = count("HOTSWAP_KILLS", 20);
    let mut round = 0;
    under_fio(&guest, ["vdc", "vdb"], "servers killed and exchanged", |runs| {
        round += 1;
        for (daemon, fio) in [&memory, &late].into_iter().zip(runs) {
            daemon.end_server(Signal::KILL);
            if round % 5 == 1 {
                daemon.call(&["upgrade-daemon", "--only", "server"]);
            }
            if round % 5 == 2 {
                daemon.call(&["upgrade-daemon", "--only", "supervisor"]);
            }
            wait_for_io(daemon, fio);
        }
        round >= kills
    });
    for (what, daemon) in [("vdc", &memory), ("vdb", &late)] {
        say_pauses(what, daemon);
        let (status, log) = (daemon.status(), daemon.log());
        assert_eq!(number(&status, "server", "deaths"), round, "{status}");
        assert_eq!(number(&status, "server", "quarantined"), 0, "{status}");
        assert_eq!(status["connected"], true, "{status}");
        assert!(!log.contains("the frontend has disconnected"), "QEMU came again: {log}");
    }
    assert!(late.log().contains("were in flight, and run again"), "{}", late.log());

    let whole = count("HOTSWAP_WHOLE_KILLS", 3);
    let mut round = 0;
    under_fio(&guest, ["vda", "vdb"], "whole daemons killed", |runs| {
        for daemon in [&mut file, &mut late] {
            daemon.end_whole();
            daemon.start_again();
        }
        wait_for_io(&file, &runs[0]);
        wait_for_io(&late, &runs[1]);
        // Long enough for what is in flight: no request is to meet many deaths, a second each.
        thread::sleep(Duration::from_millis(350));
        assert!(late.log().contains("were in flight, and run again"), "{}", late.log());
        round += 1;
        round >= whole
    });
    a_larger_disk_is_seen(&guest, "vdc", &memory);
    a_larger_disk_is_seen(&guest, "vda", &file);
    guest.shutdown().unwrap();
    for daemon in [file, late, memory] {
        assert_eq!(daemon.terminate(), 0);
    }
}

/// The guest is told of a new size at once, and has it over a death and an exchange.
fn a_larger_disk_is_seen(guest: &Guest, disk: &str, daemon: &Daemon) {
    let sectors = |megabytes: u64| (megabytes << 11).to_string();
    let size = || guest.sh(&format!("cat /sys/block/{disk}/size")).trim().to_owned();
    let becomes = |megabytes: u64, after: &str| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while size() != sectors(megabytes) {
            assert!(
                Instant::now() < deadline,
                "{disk} after {after}: {}\n{}",
                size(),
                daemon.log()
            );
            thread::sleep(Duration::from_millis(20));
        }
    };
    assert_eq!(size(), sectors(64), "{disk} before");
    daemon.call(&["resize", "80M"]);
    becomes(80, "a resize");
    daemon.end_server(Signal::KILL);
    daemon.call(&["upgrade-daemon", "--only", "server"]);
    daemon.call(&["resize", "96M"]);
    becomes(96, "a resize behind a death and an exchange");
    // What came is served.
    let last = "oflag=direct conv=notrunc,fsync bs=1M seek=95 count=1";
    guest.sh(&format!("dd if=/dev/zero of=/dev/{disk} {last}"));
    assert!(complaints(guest).is_empty(), "{disk}: {:?}", complaints(guest));
}

/// Zeroes the in-flight region that QEMU keeps.
fn lose_marks(qemu: u32) {
    let fds = fs::read_dir(format!("/proc/{qemu}/fd")).expect("QEMU lives");
    let mut count = 0;
    for fd in fds.flatten().map(|fd| fd.path()) {
        let target = fs::read_link(&fd).unwrap_or_default();
        if target.to_string_lossy().contains("memfd:hotswap-inflight") {
            let region = File::options().write(true).open(&fd).expect("the region");
            let len = region.metadata().expect("its length").len();
            region.write_all_at(&vec![0; len as usize], 0).expect("zeroed");
            count += 1;
        }
    }
    assert_eq!(count, 1, "in-flight regions that QEMU has");
}

/// So that the test before can fail: without the marks, requests that did not end in their order
/// are lost, or done again that were answered.
#[test]
fn without_marks_something_is_lost() {
    let directory = disk_directory();
    let path = format!("path={}", image(&directory.path().join("late.img")));
    let mut daemon = start(&["--domain", &tardy(), "--param", &path]);
    let options = GuestOptions { reconnect: Some(1), ..GuestOptions::with_disk(daemon.socket()) };
    let guest = Guest::boot(options).unwrap();
    let fio = Fio::start_on(&guest, "vda", 3);
    daemon.end_whole();
    lose_marks(guest.qemu_pid());
    daemon.start_again();
    let deadline = Instant::now() + Duration::from_secs(8);
    while fio.is_running() && Instant::now() < deadline && complaints(&guest).is_empty() {
        thread::sleep(Duration::from_millis(50));
    }
    let complaints = complaints(&guest);
    println!("fio runs: {}, the guest's kernel says {complaints:?}", fio.is_running());
    let lost = fio.is_running() || !complaints.is_empty() || fio.wait().status != 0;
    assert!(lost, "what was in flight was forgotten, and nothing is missing");
}
