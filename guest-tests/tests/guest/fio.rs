//! The promise itself: `fio` checks every block it wrote while the device is exchanged under it, in
//! each mode.

use std::fs::File;
use std::time::Duration;

use guest_tests::daemon::Daemon;
use guest_tests::guest::fio::Fio;
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::operator::Operator;

/// How long fio runs at most: it has enough after so many exchanges, each after so many requests.
const FIO_SECONDS: u32 = 240;
const EXCHANGES: u64 = 50;
const RESTARTS: u64 = 5;
const REQUESTS: u64 = 200;
/// A request whose kick is lost waits for ever, if nothing else kicks; one of a guest that is given
/// no CPU, for some seconds.
const LONGEST: Duration = Duration::from_secs(15);

/// Calls `exchange` again and again while fio runs, then checks what fio, the daemon and the
/// guest's kernel say.
fn exchange_under_fio(daemon: Daemon, mut exchange: impl FnMut(&mut Operator<'_>, usize)) {
    let guest = Guest::boot(GuestOptions::with_disk(daemon.socket())).unwrap();
    let mut operator = Operator::new(&daemon);
    let fio = Fio::start(&guest, FIO_SECONDS);
    let mut round = 0;
    while operator.exchanges() < EXCHANGES {
        exchange(&mut operator, round);
        fio.wait_for_requests(REQUESTS);
        round += 1;
    }
    fio.enough();
    let report = fio.finish();
    println!("{} exchanges under {report:?}", operator.exchanges());
    assert!(report.longest < LONGEST, "{report:?}");

    operator.settle();
    let status = daemon.status();
    for queue in status["queues"].as_array().unwrap() {
        assert!(
            queue["requests"].as_u64().is_some_and(|count| count > 1000),
            "both queues work: {status}"
        );
    }
    let dmesg = guest.sh("dmesg");
    assert!(!dmesg.contains("I/O error"), "{dmesg}");
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn handovers_lose_nothing() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "2"]);
    let mut names = ["ramdisk_v2", "ramdisk"].into_iter().cycle();
    exchange_under_fio(daemon, |operator, round| {
        let reply = operator.upgrade(names.next().unwrap(), "handover", &[]);
        if round % 6 == 5 {
            let back = operator.roll_back("handover");
            assert_eq!(back["to"]["sha256"], reply["from"]["sha256"], "{back}");
            // The live one is the other one again.
            names.next();
        }
    });
}

#[test]
fn swaps_lose_nothing_and_pause_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let path = image.to_str().unwrap();
    let parameter = format!("path={path}");
    let daemon = Daemon::start(&["--blk-file", path, "--queues", "2"]);
    exchange_under_fio(daemon, |operator, round| {
        operator.upgrade("file", "swap", &["--param", &parameter]);
        if round % 6 == 5 {
            operator.roll_back("swap");
        }
    });
}

/// Not what this project is for, but what a new version of the daemon takes: it ends and begins
/// again, and the guest waits.
#[test]
fn restarts_of_the_daemon_lose_nothing() {
    let directory = guest_tests::daemon::disk_directory();
    let image = directory.path().join("disk.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let path = image.to_str().unwrap();
    let mut daemon =
        Daemon::start(&["--blk-file", path, "--queues", "2", "--param", "direct=true"]);
    let options = GuestOptions { reconnect: Some(1), ..GuestOptions::with_disk(daemon.socket()) };
    let guest = Guest::boot(options).unwrap();
    let fio = Fio::start(&guest, FIO_SECONDS);
    for _ in 0..RESTARTS {
        let (code, took) = daemon.stop();
        assert_eq!(code, 0, "{}", daemon.log());
        assert!(took < LONGEST, "{took:?}");
        daemon.start_again();
        fio.wait_for_requests(5 * REQUESTS);
    }
    fio.enough();
    println!("{RESTARTS} restarts under {:?}", fio.finish());
    let dmesg = guest.sh("dmesg");
    assert!(!dmesg.contains("I/O error") && !dmesg.contains("is not a head"), "{dmesg}");
    guest.shutdown().unwrap();
    assert_eq!(daemon.terminate(), 0);
}
