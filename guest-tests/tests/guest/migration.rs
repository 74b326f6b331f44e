//! A guest is migrated between two QEMUs whose disks are served by two daemons on one image, under
//! `fio` that checks every block, with upgrades on the way.
//!
//! One job only reads what was written before: its buffers are written by the device alone, so that
//! a page which is not logged is found. `HOTSWAP_LEGS` says how often the guest is migrated,
//! `HOTSWAP_FAILURES` how many migrations are cancelled, and how many lose their destination.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::Duration;

use guest_tests::daemon::{Daemon, disk_directory};
use guest_tests::guest::fio::{self, Fio};
use guest_tests::guest::{Guest, GuestOptions};

/// One leg takes seconds; the machine may be busy.
const MIGRATED: Duration = Duration::from_secs(180);
/// Guest memory is sent slowly, so that the log is read many times.
const SLOWLY: u64 = 24;

fn count(variable: &str, otherwise: u64) -> u64 {
    let text = std::env::var(variable);
    text.map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

/// Two daemons on an image.
struct Pair {
    daemons: [Daemon; 2],
}

impl Pair {
    fn start(image: &Path) -> Self {
        File::create(image).expect("an image").set_len(64 << 20).expect("its size");
        let image = image.to_str().expect("UTF-8");
        let args = [
            "--queues",
            "2",
            "--blk-file",
            image,
            "--param",
            "direct=true",
            "--param",
            "locking=late",
        ];
        Self { daemons: [Daemon::start(&args), Daemon::start(&args)] }
    }

    fn options(&self, which: usize) -> GuestOptions {
        GuestOptions::with_disk(self.daemons[which].socket())
    }
}

/// What the guest's kernel says if it has noticed.
fn complaints(guest: &Guest) -> Vec<&'static str> {
    let dmesg = guest.sh("dmesg");
    let words = ["I/O error", "is not a head", "hung", "reset", "blocked for more than"];
    words.into_iter().filter(|word| dmesg.contains(word)).collect()
}

/// Runs `during` under both loads, which must end without an error.
fn under_fio(guest: &Guest, seconds: u32, during: impl FnOnce()) {
    let (reader, witness) = (Fio::start_reading(guest, "vda", seconds), Fio::start(guest, seconds));
    during();
    assert!(reader.is_running() && witness.is_running(), "the load has ended before");
    reader.enough();
    witness.enough();
    let (read, written) = (reader.finish_reading(), witness.finish());
    println!("{read:?}, {written:?}");
}

/// How long the load of one migration runs at most.
fn seconds() -> u32 {
    u32::try_from(count("HOTSWAP_LEG_SECONDS", 240)).expect("some seconds")
}

fn wait_until_active(guest: &Guest) {
    let is_active = |status: &str| status != "setup" && status != "none";
    let status = guest.wait_for_migration(MIGRATED, is_active).expect("it begins");
    assert_eq!(status, "active");
}

#[test]
fn a_guest_migrates_to_and_fro_with_upgrades_on_the_way() {
    let directory = disk_directory();
    let pair = Pair::start(&directory.path().join("disk.img"));
    let guest = Guest::boot(pair.options(0)).expect("the guest boots");
    fio::fill(&guest, "vda");
    for leg in 0..count("HOTSWAP_LEGS", 2) {
        let (from, to) = (leg as usize % 2, (leg as usize + 1) % 2);
        under_fio(&guest, seconds(), || {
            let destination = guest.destination(&pair.options(to)).expect("a destination");
            guest.begin_migration(&destination, SLOWLY).expect("it is not refused");
            wait_until_active(&guest);
            pair.daemons[from].call(&["upgrade", "file"]);
            let stood = guest.go_over(destination, MIGRATED).expect("it is migrated");
            pair.daemons[to].call(&["upgrade", "file"]);
            println!("leg {leg}: the guest stood still for {stood:?}");
        });
        assert_eq!(complaints(&guest), [""; 0], "after leg {leg}");
    }
    for daemon in &pair.daemons {
        let status = daemon.status();
        assert_eq!(status["counters"]["write_errors"].as_u64().unwrap_or(0), 0, "{status}");
        assert_eq!(status["server"]["deaths"], 0, "{status}");
    }
    guest.shutdown().expect("a clean end");
}

#[test]
fn the_source_goes_on_after_migrations_that_fail() {
    let directory = disk_directory();
    let pair = Pair::start(&directory.path().join("disk.img"));
    let guest = Guest::boot(pair.options(0)).expect("the guest boots");
    fio::fill(&guest, "vda");
    for failure in 0..count("HOTSWAP_FAILURES", 1) {
        under_fio(&guest, seconds(), || {
            let destination = guest.destination(&pair.options(1)).expect("a destination");
            guest.begin_migration(&destination, SLOWLY).expect("it is not refused");
            wait_until_active(&guest);
            thread::sleep(Duration::from_millis(200 * failure));
            guest.qmp("migrate_cancel").expect("it is cancelled");
            let ended = |status: &str| status == "cancelled";
            guest.wait_for_migration(MIGRATED, ended).expect("it was not done already");
            drop(destination);

            let mut destination = guest.destination(&pair.options(1)).expect("a destination");
            guest.begin_migration(&destination, SLOWLY).expect("it is not refused");
            wait_until_active(&guest);
            thread::sleep(Duration::from_millis(700 * failure));
            destination.kill();
            let ended = |status: &str| status == "failed" || status == "completed";
            let status = guest.wait_for_migration(MIGRATED, ended).expect("an end");
            assert_eq!(status, "failed");
        });
        assert_eq!(complaints(&guest), [""; 0], "after failure {failure}");
        assert!(pair.daemons[0].log().contains("not logged any more"));
    }
    guest.shutdown().expect("a clean end");
}
