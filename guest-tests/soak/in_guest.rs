//! `fio` in a guest, which checks what it reads, and a piece of the disk that it does not touch.

use crate::Random;
use crate::act::Act;
use crate::stage::PATIENCE;
use crate::witness::Witness;
use guest_tests::daemon::Daemon;
use guest_tests::guest::Guest;
use guest_tests::guest::fio::Fio;
use std::thread;
use std::time::{Duration, Instant};

const DISK: &str = "vda";
/// How long a run of `fio` takes; what was written is checked as a whole at its end.
const FIO_SECONDS: u32 = 20;
/// What was in flight ends between two deaths of a whole daemon, each of which takes QEMU a second:
/// no request is to wait for many.
const BETWEEN: Duration = Duration::from_millis(350);

/// See the module's page.
pub struct InGuest<'guest> {
    guest: &'guest Guest,
    fio: Option<Fio<'guest>>,
    runs: u64,
    requests: u64,
    longest: Duration,
    /// What the piece that `fio` does not touch holds.
    mark: String,
}

impl<'guest> InGuest<'guest> {
    pub fn start(guest: &'guest Guest) -> Self {
        let mut witness = Self {
            guest,
            fio: None,
            runs: 0,
            requests: 0,
            longest: Duration::ZERO,
            mark: String::new(),
        };
        witness.set_mark();
        witness.begin();
        witness
    }

    fn begin(&mut self) {
        self.fio = Some(Fio::start_on(self.guest, DISK, FIO_SECONDS));
        self.runs += 1;
    }

    fn fio(&self) -> &Fio<'guest> {
        self.fio.as_ref().expect("a run between acts")
    }

    /// Waits for the end of the run, which must have met no fault.
    fn finish(&mut self) {
        let report = self.fio.take().expect("a run between acts").finish();
        self.requests += report.reads + report.writes;
        self.longest = self.longest.max(report.longest);
        self.check();
    }

    /// Nothing of the disk is lost, and the guest's kernel has not complained.
    fn check(&self) {
        assert_eq!(self.read_mark(), self.mark, "what fio does not touch has changed");
        let dmesg = self.guest.sh("dmesg");
        for word in ["I/O error", "is not a head", "hung", "reset", "blocked for more than"] {
            assert!(!dmesg.contains(word), "the guest's kernel has noticed:\n{dmesg}");
        }
    }

    /// Writes something else where `fio` does not come.
    fn set_mark(&mut self) {
        self.guest.sh(&format!(
            "dd if=/dev/urandom of=/dev/{DISK} bs=1M seek=60 count=2 oflag=direct 2>/dev/null"
        ));
        self.mark = self.read_mark();
    }

    fn read_mark(&self) -> String {
        self.guest.sh(&format!(
            "dd if=/dev/{DISK} bs=1M skip=60 count=2 iflag=direct 2>/dev/null | sha256sum"
        ))
    }

    /// Waits until `done` says so.
    fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "{what}: {}", self.guest.sh("dmesg"));
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for answers, so that what comes next comes under I/O.
    fn wait_for_io(&mut self) {
        let before = self.answered();
        self.wait_until("no I/O", |witness| witness.answered() > before + 10);
    }
}

impl Witness for InGuest<'_> {
    fn offers(&self, act: Act) -> bool {
        // QEMU does both only when its daemon does not live.
        !matches!(act, Act::Reconnect | Act::Abandon)
    }

    fn breathe(&mut self, _daemon: &Daemon, random: &mut Random) {
        match random.below(8) {
            0 => self.check(),
            1 => self.wait_for_io(),
            _ => thread::sleep(Duration::from_millis(random.below(100))),
        }
    }

    fn answered(&mut self) -> u64 {
        if !self.fio().is_running() {
            self.finish();
            self.begin();
        }
        self.fio().requests()
    }

    fn reconnect(&mut self, _has_requests_in_flight: bool) {
        unreachable!("it is not offered");
    }

    fn reset(&mut self) {
        self.wait_for_io();
        self.check();
        // It goes with its machine.
        self.fio = None;
        self.guest.reset().unwrap_or_else(|error| panic!("{error}"));
        self.check();
        self.set_mark();
        self.begin();
    }

    fn lets_go(&mut self) {
        self.wait_for_io();
    }

    fn comes_back(&mut self) {
        self.wait_for_io();
        thread::sleep(BETWEEN);
    }

    fn is_told_of(&mut self, megabytes: u64) {
        let size = |guest: &Guest| guest.sh(&format!("cat /sys/block/{DISK}/size"));
        self.wait_until("it does not see the new size", |witness| {
            size(witness.guest).trim() == (megabytes << 11).to_string()
        });
    }

    fn end(&mut self) {
        self.finish();
        println!(
            "soak: fio {} times, {} requests, the longest {:.1?}",
            self.runs, self.requests, self.longest
        );
    }
}
