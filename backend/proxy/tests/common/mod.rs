//! A device of puppets (the crate `puppet`), and a worker with its books.

#![allow(dead_code, reason = "each test file uses its part")]

pub use puppet::Stage;

use domain_abi::RawRequest;
use domain_abi::{Params, Status};
use proxy::{DomainProxy, Ended, Gate, Notifier, Options, Refusal, Report, Worker};
use puppet::PuppetLoader;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Long enough for anything here, and the end of a test that hangs.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// No worker needs to be woken: the tests pump.
pub struct Silent;

impl Notifier for Silent {
    fn notify(&self) {}
}

/// A device of puppets, and the stage that they act on.
pub struct Device {
    pub proxy: Arc<DomainProxy>,
    pub stage: Arc<Stage>,
}

impl Device {
    /// Starts with a `plain` puppet that is called `a` and does as `script` (`key=value` pairs)
    /// says.
    pub fn start(queues: usize, script: &[&str]) -> Device {
        let stage = Stage::new();
        let params = stage.params("a", script);
        let proxy = DomainProxy::start(Box::new(PuppetLoader), "plain", params, queues)
            .expect("a puppet starts");
        Device { proxy, stage }
    }

    /// Upgrades to the puppet `module`, called `label`.
    pub fn upgrade(&self, module: &str, label: &str, script: &[&str]) -> Result<Report, Refusal> {
        self.upgrade_with(module, label, script, Options::default())
    }

    pub fn upgrade_with(
        &self,
        module: &str,
        label: &str,
        script: &[&str],
        options: Options,
    ) -> Result<Report, Refusal> {
        self.proxy.upgrade(module, self.stage.params(label, script), options)
    }

    pub fn rollback(&self) -> Result<Report, Refusal> {
        self.proxy.rollback(Options::default())
    }

    /// A worker of `queue` with room for 16 requests.
    pub fn worker(&self, queue: usize) -> Hand {
        self.worker_told(queue, Silent)
    }

    /// The same, with what is to wake it.
    pub fn worker_told(&self, queue: usize, notifier: impl Notifier + 'static) -> Hand {
        let worker = self.proxy.worker(queue, 16, Box::new(notifier)).expect("a free slot");
        Hand { worker, ended: Vec::new() }
    }

    /// Waits until `done`.
    #[track_caller]
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.proxy.status());
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// A worker and what has ended on it.
pub struct Hand {
    pub worker: Worker,
    pub ended: Vec<(usize, Status)>,
}

impl Hand {
    /// Offers flushes in these slots, to whatever serves; returns how many were taken.
    pub fn submit(&mut self, slots: impl IntoIterator<Item = usize>) -> usize {
        let tags = self.worker.tags();
        let mut requests: Vec<_> = slots
            .into_iter()
            .map(|slot| {
                let mut request = RawRequest::flush();
                tags.name(&mut request, slot);
                request
            })
            .collect();
        let ended = &mut self.ended;
        self.worker.submit(&mut requests, |Ended { slot, status, .. }| ended.push((slot, status)))
    }

    /// What a worker does between two batches. Returns whether the gate is open.
    pub fn step(&mut self) -> bool {
        let open = self.worker.gate() == Gate::Open;
        if !open && self.worker.owing() == 0 {
            self.worker.wait_at_gate();
        } else {
            let ended = &mut self.ended;
            self.worker.reap(|Ended { slot, status, .. }| ended.push((slot, status)));
        }
        open
    }

    /// Steps until `done`.
    #[track_caller]
    pub fn until(&mut self, device: &Device, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(
                Instant::now() < deadline,
                "{what}: ended {:?}, log {:?}, {:?}",
                self.ended,
                device.stage.log(),
                device.proxy.status()
            );
            self.step();
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Steps until the gate is shut, with something in flight, so that it is not waited at.
    #[track_caller]
    pub fn until_shut(&mut self, device: &Device) {
        let deadline = Instant::now() + PATIENCE;
        while self.step() {
            assert!(Instant::now() < deadline, "the gate stays open: {:?}", device.proxy.status());
            std::thread::sleep(Duration::from_micros(100));
        }
        assert!(self.worker.owing() > 0, "it ended before the gate was shut");
    }

    /// Lies down, so that the test's own thread can upgrade.
    #[track_caller]
    pub fn lie_down(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.worker.sleep() {
            assert!(Instant::now() < deadline, "no sleep");
            self.step();
        }
    }

    /// What has ended, by slot, and whether each was well; empties the books.
    pub fn take_ended(&mut self) -> Vec<(usize, Status)> {
        let mut ended = std::mem::take(&mut self.ended);
        ended.sort_by_key(|&(slot, _)| slot);
        ended
    }
}

/// All of `slots`, ended well.
pub fn well(slots: impl IntoIterator<Item = usize>) -> Vec<(usize, Status)> {
    slots.into_iter().map(|slot| (slot, Status::Ok)).collect()
}

/// Parameters from pairs.
pub fn params(pairs: &[&str]) -> Params {
    Params::from_pairs(pairs).expect("pairs")
}
