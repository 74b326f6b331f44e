//! Upgrades that are refused or fail, and domains that die: the guest's I/O does not notice, and
//! `status` tells the truth.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_tests::daemon::{Daemon, module, module_with_wrong_abi};
use guest_tests::guest::fio::Fio;
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::operator::Operator;

/// How long `fio` runs at most: a test has seen enough long before.
const FIO_SECONDS: u32 = 120;
/// How many domains die while fio runs.
const PANICS: u64 = 12;
/// A request that is not run again takes for ever. A takeover takes milliseconds, but QEMU, fio
/// and the daemon share few CPUs.
const LONGEST: Duration = Duration::from_secs(5);

/// Files that are no module, or none for us: what is wrong with each, and where it is.
fn bad_files(directory: &Path) -> Vec<(&'static str, PathBuf)> {
    let text = directory.join("libdomain_text.so");
    fs::write(&text, "#!/bin/sh\necho I am no module\n").unwrap();
    let truncated = directory.join("libdomain_truncated.so");
    let bytes = fs::read(module("ramdisk_v2")).unwrap();
    fs::write(&truncated, &bytes[..bytes.len() / 2]).unwrap();
    vec![
        ("a missing file", directory.join("libdomain_missing.so")),
        ("a directory", directory.to_owned()),
        ("a text", text),
        ("half a module", truncated),
        ("a foreign library", foreign_library()),
        ("a module for another ABI", module_with_wrong_abi(directory)),
    ]
}

/// A shared object of the system: one that this very process has mapped.
fn foreign_library() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut libraries = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    libraries.find(|path| path.contains("/libc.so")).expect("a dynamically linked test").into()
}

#[test]
fn refused_upgrades_leave_the_io_undisturbed() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "2"]);
    let guest = Guest::boot(GuestOptions::with_disk(daemon.socket())).unwrap();
    let mut operator = Operator::new(&daemon);
    let fio = Fio::start(&guest, FIO_SECONDS);

    for (what, path) in bad_files(directory.path()) {
        let sentence = operator.upgrade_refused(path.to_str().unwrap(), &[]);
        println!("{what}: {sentence}");
    }
    println!("an unknown name: {}", operator.upgrade_refused("no_such_domain", &[]));
    for fault in ["prepare:fail", "prepare:panic", "activate:fail", "activate:panic"] {
        let sentence = operator.upgrade_refused("faulty", &["--param", &format!("fault={fault}")]);
        println!("{fault}: {sentence}");
    }
    println!("another size: {}", operator.upgrade_refused("ramdisk_v2", &["--param", "size=32M"]));
    println!(
        "state cannot be swapped: {}",
        operator.upgrade_refused("ramdisk_v2", &["--mode", "swap"])
    );
    assert!(fio.is_running(), "not all refusals came under I/O");

    // What came of it is nothing: a good module still gets in, and the data is still right.
    operator.upgrade("ramdisk_v2", "handover", &[]);
    fio.enough();
    fio.finish();
    operator.settle();
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
}

/// A domain that breaks when it is to leave, and then some that die in the middle of a request, one
/// after the other: one boot for both.
#[test]
fn a_domain_that_breaks_goes_on_or_is_taken_over_and_the_guest_sees_neither() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "2"]);
    let guest = Guest::boot(GuestOptions::with_disk(daemon.socket())).unwrap();
    let mut operator = Operator::new(&daemon);
    let fio = Fio::start(&guest, FIO_SECONDS);
    for fault in ["quiesce:fail", "quiesce:panic"] {
        operator.upgrade("faulty", "handover", &["--param", &format!("fault={fault}")]);
        // The fault strikes when it is asked to leave, and it stays.
        println!("{fault}: {}", operator.upgrade_refused("ramdisk", &[]));
        assert_eq!(daemon.status()["domain"]["name"], "faulty");
        // It strikes once.
        operator.upgrade("ramdisk", "handover", &[]);
    }
    assert!(fio.is_running(), "not all faults came under I/O");
    fio.enough();
    fio.finish();
    operator.settle();

    let fio = Fio::start(&guest, FIO_SECONDS);
    for round in 0..PANICS {
        let fault = format!("fault=request:panic:{}", 1 + round * 37 % 200);
        operator.upgrade("faulty", "handover", &["--param", &fault]);
        // It dies under fio's requests, with others in flight on both queues.
        operator.taken_over("ramdisk");
    }
    assert!(fio.is_running(), "not all panics came under I/O");
    fio.enough();
    let report = fio.finish();
    println!("{PANICS} panics under {report:?}");
    assert!(report.longest < LONGEST, "{report:?}");
    operator.settle();
    let status = daemon.status();
    let replayed = |queue: &serde_json::Value| queue["replayed"].as_u64().expect("a number");
    let replayed: u64 = status["queues"].as_array().expect("queues").iter().map(replayed).sum();
    assert!(replayed >= PANICS, "each panic left one request at least: {status}");
    assert_eq!(status["resident_modules"], serde_json::json!([]), "{status}");
    let dmesg = guest.sh("dmesg");
    assert!(!dmesg.contains("I/O error"), "{dmesg}");
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
}
