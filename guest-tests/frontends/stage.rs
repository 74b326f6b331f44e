//! What the cases share: disks, guests, and upgrades that go on beside whatever happens.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use guest_tests::daemon::{Daemon, disk_directory};
use guest_tests::guest::fio::{Fio, FioReport};
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::operator::Operator;
use tempfile::TempDir;

/// How long `fio` runs, where the case does not say otherwise.
pub const FIO_SECONDS: u32 = 10;
/// Between two upgrades.
const INTERVAL: Duration = Duration::from_millis(150);
/// A request that is lost takes for ever.
pub const LONGEST: Duration = Duration::from_secs(10);

/// A case cannot be tried, and why.
pub struct NotHere(pub String);

/// What a case that held has to say.
pub type Outcome = Result<String, NotHere>;

/// A disk in memory, whose upgrades are handovers.
pub fn memory_disk() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--queues", "2"])
}

/// A disk in a file past the page cache, whose upgrades are swaps.
pub struct FileDisk {
    pub daemon: Daemon,
    parameters: [String; 2],
    _directory: TempDir,
}

impl FileDisk {
    /// One of 64 MiB.
    pub fn new() -> Self {
        let directory = disk_directory();
        let image = directory.path().join("disk.img");
        File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("an image");
        Self::of(directory)
    }

    /// The file `disk.img` of a directory that goes with it.
    pub fn of(directory: TempDir) -> Self {
        let image = directory.path().join("disk.img").display().to_string();
        let parameters = [format!("path={image}"), "direct=true".to_owned()];
        let daemon =
            Daemon::start(&["--blk-file", &image, "--queues", "2", "--param", &parameters[1]]);
        FileDisk { daemon, parameters, _directory: directory }
    }
}

/// How a disk is upgraded.
pub enum Upgrades<'a> {
    /// Between two implementations of a disk in memory.
    Memory(&'a Daemon),
    /// Of a disk in a file, the same one anew.
    File(&'a FileDisk),
}

impl Upgrades<'_> {
    fn daemon(&self) -> &Daemon {
        match self {
            Self::Memory(daemon) => daemon,
            Self::File(disk) => &disk.daemon,
        }
    }

    fn one(&self, operator: &mut Operator<'_>, round: usize) {
        match self {
            // Two forth, one back, and so on.
            _ if round % 6 == 5 => {
                let mode = if matches!(self, Self::Memory(_)) { "handover" } else { "swap" };
                operator.roll_back(mode);
            }
            Self::Memory(daemon) => {
                let live = daemon.status()["domain"]["version"].clone();
                let next = if live == "2.0.0" { "ramdisk" } else { "ramdisk_v2" };
                operator.upgrade(next, "handover", &[]);
            }
            Self::File(disk) => {
                let [path, direct] = &disk.parameters;
                operator.upgrade("file", "swap", &["--param", path, "--param", direct]);
            }
        }
    }
}

/// Upgrades the disk again and again while `act` runs, and says how often.
pub fn beside<T>(upgrades: &Upgrades<'_>, act: impl FnOnce() -> T) -> (u64, T) {
    let over = AtomicBool::new(false);
    /// Says so also when `act` panics, which would wait for the upgrades for ever otherwise.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    thread::scope(|scope| {
        let upgrading = scope.spawn(|| {
            let mut operator = Operator::new(upgrades.daemon());
            let before = operator.exchanges();
            for round in 0.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                upgrades.one(&mut operator, round);
                thread::sleep(INTERVAL);
            }
            operator.settle();
            operator.exchanges() - before
        });
        let result = {
            let _over = Over(&over);
            act()
        };
        let count = upgrading.join().expect("no upgrade fails");
        assert!(count > 0, "nothing was upgraded meanwhile");
        (count, result)
    })
}

/// Boots a guest.
pub fn boot(options: GuestOptions) -> Guest {
    Guest::boot(options).unwrap_or_else(|error| panic!("{error}"))
}

/// Waits for `fio` to end, without errors, and for what the guest's kernel says of them.
pub fn finish(guest: &Guest, fio: Fio<'_>) -> FioReport {
    let report = fio.finish();
    assert!(report.longest < LONGEST, "a request took too long: {report:?}");
    assert_no_complaints(guest);
    report
}

/// The guest's kernel has noticed nothing.
pub fn assert_no_complaints(guest: &Guest) {
    let dmesg = guest.sh("dmesg");
    for word in ["I/O error", "is not a head", "blocked for more than", "Buffer I/O"] {
        let line = dmesg.lines().find(|line| line.contains(word));
        assert!(line.is_none(), "the guest's kernel says: {}", line.unwrap_or_default());
    }
}

/// For the table.
pub fn say(upgrades: u64, report: &FioReport) -> String {
    let requests = report.reads + report.writes;
    format!("{upgrades} upgrades, {requests} requests, longest {} ms", report.longest.as_millis())
}

/// Ends the guest and the daemon, both as they should.
pub fn end(guest: Guest, daemon: Daemon) {
    guest.shutdown().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(daemon.terminate(), 0, "the daemon's exit code");
}
