//! A native client, whose ledger is the model of the disk's content.

use crate::Random;
use crate::act::Act;
use crate::options::Options;
use crate::stage::PATIENCE;
use crate::witness::Witness;
use guest_tests::daemon::Daemon;
use guest_tests::stamp::{Ledger, Load, LoadOptions, LoadReport, assert_intact};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

/// See the module's page.
pub struct Native {
    socket: PathBuf,
    options: LoadOptions,
    load: Option<Load>,
    /// Of the loads that have ended: answered requests are in `before`, too.
    sum: LoadReport,
    before: u64,
    ledgers: Vec<Ledger>,
}

impl Native {
    pub fn start(daemon: &Daemon, options: &Options) -> Self {
        let mut load_options = LoadOptions::new(options.queues, options.depth);
        load_options.seed = options.seed;
        load_options.patience = PATIENCE;
        load_options.is_quiet = true;
        let load = Load::start(daemon.socket(), &load_options);
        Self {
            socket: daemon.socket().to_owned(),
            options: load_options,
            load: Some(load),
            sum: LoadReport::default(),
            before: 0,
            ledgers: Vec::new(),
        }
    }

    fn load(&self) -> &Load {
        self.load.as_ref().expect("a load between acts")
    }

    /// Ends the load, and adds its report to the sum.
    fn stop(&mut self, has_requests_in_flight: bool) {
        let load = self.load.take().expect("a load between acts");
        self.before += load.ios();
        let mut report = if has_requests_in_flight { load.abandon() } else { load.stop() };
        self.ledgers = std::mem::take(&mut report.ledgers);
        let elapsed = self.sum.elapsed + report.elapsed;
        self.sum.merge(report);
        self.sum.elapsed = elapsed;
    }
}

impl Witness for Native {
    fn offers(&self, act: Act) -> bool {
        act != Act::Reset
    }

    fn breathe(&mut self, daemon: &Daemon, random: &mut Random) {
        if random.below(4) == 0 {
            self.load().wait_for(random.below(200));
        } else {
            thread::sleep(Duration::from_micros(random.below(3000)));
        }
        assert_eq!(self.load().faults(), 0, "the load has seen a fault:\n{}", daemon.log());
    }

    fn answered(&mut self) -> u64 {
        self.before + self.load().ios()
    }

    fn reconnect(&mut self, has_requests_in_flight: bool) {
        self.stop(has_requests_in_flight);
        self.comes_back();
    }

    fn reset(&mut self) {
        unreachable!("it is not offered");
    }

    fn lets_go(&mut self) {
        self.stop(true);
    }

    fn comes_back(&mut self) {
        let ledgers = std::mem::take(&mut self.ledgers);
        self.load = Some(Load::resume(&self.socket, &self.options, ledgers));
    }

    fn is_told_of(&mut self, _megabytes: u64) {}

    fn end(&mut self) {
        self.stop(false);
        println!("soak: {:?}", self.sum);
        self.sum.assert_clean();
        assert_intact(&self.socket, &self.ledgers);
    }
}
