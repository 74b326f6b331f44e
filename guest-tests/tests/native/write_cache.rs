//! Whose writes have to be durable when they are answered: drivers that have turned the write cache
//! off, wherever they did that.
//!
//! A frontend reads the configuration at its first connect only, shows its copy to every driver,
//! and never says again what a driver wrote to it. So a driver may come to a session with the cache
//! off, and no message says so. The disk is one whose power can be cut ([`guest_tests::power`]).

use std::time::Duration;

use guest_tests::client::features;
use guest_tests::client::raw::{FREE, GUEST_BASE, RawSession, WRITE};
use guest_tests::daemon::Daemon;
use guest_tests::power::Disk;
use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const DISK_BYTES: usize = 1 << 20;
const SECTOR: usize = 512;
const QUEUE_SIZE: u16 = 64;
const ANSWER: Duration = Duration::from_secs(20);
/// What a current Linux guest takes.
const LINUX: u64 = features::USUAL | features::CONFIG_WCE;
/// Where `writeback` is in the configuration space.
const WRITEBACK: u32 = 32;

/// A daemon on a disk, or nothing where there can be no such disk.
fn start() -> Option<(Disk, Daemon)> {
    let disk = match Disk::mount(DISK_BYTES) {
        Ok(disk) => disk,
        Err(error) => {
            eprintln!("skipped: cannot mount a FUSE file: {error}");
            return None;
        }
    };
    let path = format!("path={}", disk.path().display());
    let daemon = Daemon::start(&["--domain", "file", "--param", &path]);
    Some((disk, daemon))
}

/// What a guest does, and how its frontend comes to be here.
struct Guest {
    raw: RawSession,
    /// How many requests have been answered, here and before.
    answered: u16,
}

impl Guest {
    /// A frontend's first connect: it reads the configuration, and the guest starts the ring.
    fn first(daemon: &Daemon, features: u64) -> Guest {
        let mut raw = RawSession::connect(daemon.socket(), features).expect("a connection");
        assert_eq!(writeback(&mut raw), 1, "a fresh device has its cache on");
        raw.share_memory().expect("memory shared");
        raw.start_ring(QUEUE_SIZE).expect("a ring");
        Guest { raw, answered: 0 }
    }

    /// The same guest again, whose frontend connects anew: it goes on at the used index and asks
    /// nothing.
    fn again(self, daemon: &Daemon) -> Guest {
        let Guest { raw, answered } = self;
        drop(raw);
        let mut raw = RawSession::connect(daemon.socket(), LINUX).expect("a connection");
        raw.share_memory().expect("memory shared");
        raw.start_ring_at(QUEUE_SIZE, answered).expect("a ring");
        Guest { raw, answered }
    }

    /// The guest resets the device and its next driver starts it (RESET_DEVICE).
    fn reset(&mut self) {
        self.raw.stop_ring().expect("stopped");
        for _ in 0..3 {
            self.raw.frontend.reset_device().expect("reset");
        }
        self.next_driver(LINUX);
    }

    /// The next driver starts the ring, after a reset that no message tells of.
    fn next_driver(&mut self, features: u64) {
        let offered = self.raw.frontend.get_features().expect("features");
        self.raw.frontend.set_features(offered & (features | 1 << 30)).expect("features");
        self.raw.start_ring(QUEUE_SIZE).expect("a ring");
        self.answered = 0;
    }

    fn write(&mut self, sector: u64, fill: u8) {
        self.request(1, sector, fill);
    }

    fn flush(&mut self) {
        self.request(4, 0, 0);
    }

    fn request(&mut self, kind: u32, sector: u64, fill: u8) {
        let raw = &mut self.raw;
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        raw.put(FREE, &header).expect("memory");
        raw.put(FREE + 0x1000, &[0xee]).expect("memory");
        raw.put(FREE + 0x2000, &[fill; SECTOR]).expect("memory");
        let at = GUEST_BASE + FREE;
        let (header, data, status) =
            ((at, 16, 0), (at + 0x2000, SECTOR as u32, 0), (at + 0x1000, 1, WRITE));
        let chain: &[_] = if kind == 1 { &[header, data, status] } else { &[header, status] };
        raw.chain(0, chain).expect("memory");
        raw.offer(0).expect("a kick");
        assert!(raw.used(ANSWER).expect("memory").is_some(), "no answer");
        assert_eq!(raw.get(FREE + 0x1000, 1).expect("memory"), [0], "status");
        self.answered += 1;
    }

    /// The driver writes `writeback`; its frontend passes it on.
    fn switch(&mut self, on: bool) {
        let flags = VhostUserConfigFlags::empty();
        self.raw.frontend.set_config(WRITEBACK, flags, &[u8::from(on)]).expect("switched");
    }
}

/// What the configuration space says.
fn writeback(raw: &mut RawSession) -> u8 {
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = raw.frontend.get_config(0, 60, flags, &[0; 60]).expect("the configuration");
    config[WRITEBACK as usize]
}

/// How a guest that has turned its cache off comes to write again.
type Way = fn(Guest, &mut Daemon) -> Guest;

fn restart(guest: Guest, daemon: &mut Daemon, signal: Signal) -> Guest {
    daemon.stop_with(signal);
    daemon.start_again();
    guest.again(daemon)
}

#[test]
fn who_has_turned_the_cache_off_keeps_it_off() {
    let ways: &[(&str, Way)] = &[
        ("nothing happens", |guest, _| guest),
        ("the daemon is killed", |guest, daemon| restart(guest, daemon, Signal::KILL)),
        ("the daemon is restarted", |guest, daemon| restart(guest, daemon, Signal::TERM)),
        ("the frontend reconnects", |guest, daemon| guest.again(daemon)),
        ("it does so twice", |guest, daemon| guest.again(daemon).again(daemon)),
        ("the guest is reset", |mut guest, _| {
            guest.reset();
            guest
        }),
        ("the device is reset, and its ring goes on while its frontend reads", |mut guest, _| {
            guest.raw.frontend.reset_device().expect("reset");
            let offered = guest.raw.frontend.get_features().expect("features");
            guest.raw.frontend.set_features(offered & (LINUX | 1 << 30)).expect("features");
            guest.raw.frontend.set_vring_enable(0, true).expect("enabled");
            let _ = writeback(&mut guest.raw);
            guest
        }),
        ("the daemon is killed, and the guest reset", |guest, daemon| {
            let mut guest = restart(guest, daemon, Signal::KILL);
            guest.reset();
            guest
        }),
        ("firmware comes between, which cannot flush", |mut guest, _| {
            guest.raw.stop_ring().expect("stopped");
            guest.next_driver(features::VERSION_1);
            guest.write(9, 9);
            guest.raw.stop_ring().expect("stopped");
            guest.next_driver(LINUX);
            guest
        }),
        ("the guest is stopped and goes on", |mut guest, _| {
            let base = guest.raw.stop_ring().expect("stopped");
            assert_eq!(base, u32::from(guest.answered));
            guest.raw.start_ring_at(QUEUE_SIZE, guest.answered).expect("a ring");
            guest
        }),
        ("the daemon is killed, and its domain replaced", |guest, daemon| {
            let guest = restart(guest, daemon, Signal::KILL);
            daemon.call(&["upgrade", "file"]);
            guest
        }),
        (
            "the guest moves to another host, whose frontend has read the configuration",
            |guest, daemon| {
                let answered = guest.answered;
                drop(guest);
                let mut raw = RawSession::connect(daemon.socket(), LINUX).expect("a connection");
                let _ = writeback(&mut raw);
                raw.share_memory().expect("memory shared");
                raw.start_ring_at(QUEUE_SIZE, answered).expect("a ring");
                Guest { raw, answered }
            },
        ),
    ];
    let mut lost = Vec::new();
    for (what, way) in ways {
        let Some((mut disk, mut daemon)) = start() else { return };
        let mut guest = Guest::first(&daemon, LINUX);
        guest.switch(false);
        guest.write(1, 1);
        let mut guest = way(guest, &mut daemon);
        guest.write(2, 2);
        disk.cut_power();
        let image = disk.image();
        disk.take_away();
        let is_lost = |sector: &usize| !holds(&image, *sector);
        lost.extend(
            [1, 2]
                .iter()
                .filter(|sector| is_lost(sector))
                .map(|sector| format!("{what}: {sector}")),
        );
    }
    assert!(lost.is_empty(), "sectors that were answered are lost: {lost:#?}");
}

/// Whether a sector is filled with its own number.
fn holds(image: &[u8], sector: usize) -> bool {
    image[sector * SECTOR..][..SECTOR].iter().all(|&byte| byte == sector as u8)
}

#[test]
fn a_cache_that_is_on_is_one_and_flushes_are_kept() {
    let Some((mut disk, mut daemon)) = start() else { return };
    let mut guest = Guest::first(&daemon, LINUX);
    let before = disk.syncs();
    guest.write(1, 1);
    assert_eq!(disk.syncs(), before, "a fresh guest has a write cache");
    guest.reset();
    // With its rings the image was given back, and that is made durable before.
    let before = disk.syncs();
    guest.write(1, 1);
    assert_eq!(disk.syncs(), before, "and so has the next driver");
    guest.flush();
    // No message says whether it is on, so writes are made durable until the driver says that it
    // is.
    let mut guest = restart(guest, &mut daemon, Signal::KILL);
    assert_eq!(writeback(&mut guest.raw), 0, "the configuration says what is so");
    guest.write(2, 2);
    assert!(holds(&disk.image(), 2), "it may be off");
    guest.switch(true);
    assert_eq!(writeback(&mut guest.raw), 1);
    let before = disk.syncs();
    guest.write(3, 3);
    assert_eq!(disk.syncs(), before, "the driver has turned it on");
    guest.flush();
    disk.cut_power();
    let image = disk.image();
    disk.take_away();
    for sector in [1, 2, 3] {
        assert!(holds(&image, sector), "sector {sector}");
    }
}

/// Such a driver flushes: it could not have turned the cache off.
#[test]
fn a_driver_that_cannot_switch_has_its_cache_after_a_restart() {
    let Some((disk, mut daemon)) = start() else { return };
    let guest = Guest::first(&daemon, features::USUAL);
    daemon.stop_with(Signal::KILL);
    daemon.start_again();
    drop(guest);
    let mut raw = RawSession::connect(daemon.socket(), features::USUAL).expect("a connection");
    raw.share_memory().expect("memory shared");
    raw.start_ring_at(QUEUE_SIZE, 7).expect("a ring");
    let before = disk.syncs();
    Guest { raw, answered: 7 }.write(1, 1);
    assert_eq!(disk.syncs(), before);
}
