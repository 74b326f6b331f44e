//! An operator that keeps books: upgrades a daemon, and in the end holds its `status` against what
//! was done.
//!
//! The daemon's counters are only worth something if a test counts along. So every call goes
//! through here, each reply has to name the next generation, and [`Operator::settle`] compares the
//! totals.
//!
//! It does not know who does I/O meanwhile, guest or native client.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::PATIENCE;
use crate::daemon::Daemon;

/// A disk that others write to takes more than the usual 500 ms for a request now and then.
const PATIENT: [&str; 2] = ["--drain-timeout-ms", "10000"];

/// Someone at the control socket, from whose arrival on no other may upgrade.
pub struct Operator<'daemon> {
    daemon: &'daemon Daemon,
    generation: u64,
    committed: u64,
    rolled_back: u64,
    refused: u64,
    takeovers: u64,
    /// The standby before the last upgrade.
    standby_before: Value,
}

impl<'daemon> Operator<'daemon> {
    /// Takes the present state as the opening balance.
    pub fn new(daemon: &'daemon Daemon) -> Self {
        let status = daemon.status();
        let number =
            |value: &Value| value.as_u64().unwrap_or_else(|| panic!("not a number in {status}"));
        Operator {
            daemon,
            generation: number(&status["generation"]),
            committed: number(&status["upgrades"]["committed"]),
            rolled_back: number(&status["upgrades"]["rolled_back"]),
            refused: number(&status["upgrades"]["refused"]),
            takeovers: number(&status["upgrades"]["takeovers"]),
            standby_before: Value::Null,
        }
    }

    /// Upgrades to `name`, with more arguments for `hotswapctl upgrade` if needed; it must commit
    /// as `mode`.
    #[track_caller]
    pub fn upgrade(&mut self, name: &str, mode: &str, more: &[&str]) -> Value {
        self.standby_before = self.daemon.status()["standby"].take();
        let reply =
            self.daemon.call(&[&["upgrade", name, "--mode", mode], &PATIENT[..], more].concat());
        self.committed += 1;
        self.check(&reply, mode);
        assert_eq!(reply["to"]["name"].as_str().map(family), Some(family(name)), "{reply}");
        reply
    }

    /// Rolls back; it must commit as `mode`.
    #[track_caller]
    pub fn roll_back(&mut self, mode: &str) -> Value {
        let reply = self.daemon.call(&[&["rollback"], &PATIENT[..]].concat());
        self.rolled_back += 1;
        self.check(&reply, mode);
        reply
    }

    /// An upgrade that must be refused, and must leave the device as it was; the sentence it was
    /// refused with.
    #[track_caller]
    pub fn upgrade_refused(&mut self, name: &str, more: &[&str]) -> String {
        let before = self.daemon.status();
        let sentence = self.daemon.refuse(&[&["upgrade", name], more].concat());
        self.refused += 1;
        let after = self.daemon.status();
        for key in ["generation", "state", "domain", "capacity", "connected"] {
            assert_eq!(before[key], after[key], "`{key}` has changed by the refusal: {sentence}");
        }
        self.settle();
        sentence
    }

    /// Waits for a takeover of the domain that dies by itself, 10 s at most: one more generation,
    /// and what took over is the standby no more. If the domain died before the one that it
    /// replaced had become the standby, the one before that still is.
    #[track_caller]
    pub fn taken_over(&mut self, by: &str) {
        self.takeovers += 1;
        self.generation += 1;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            let status = self.daemon.status();
            if status["upgrades"]["takeovers"] == self.takeovers {
                break status;
            }
            assert!(Instant::now() < deadline, "no standby took over: {status}");
            thread::sleep(Duration::from_millis(2));
        };
        assert_eq!(status["domain"]["name"].as_str().map(family), Some(family(by)), "{status}");
        let standby = &status["standby"];
        assert!(
            standby.is_null() || *standby == self.standby_before,
            "what has died is no standby: {status}"
        );
        self.settle();
    }

    /// How many upgrades and rollbacks were committed through this operator or before it came.
    pub fn exchanges(&self) -> u64 {
        self.committed + self.rolled_back
    }

    /// The daemon's books must agree with ours, and it must be serving without one failed request.
    #[track_caller]
    pub fn settle(&self) {
        let status = self.daemon.status();
        assert_eq!(status["state"], "serving", "{status}");
        assert_eq!(status["generation"], self.generation, "{status}");
        assert_eq!(status["upgrades"]["committed"], self.committed, "{status}");
        assert_eq!(status["upgrades"]["rolled_back"], self.rolled_back, "{status}");
        assert_eq!(status["upgrades"]["refused"], self.refused, "{status}");
        assert_eq!(status["upgrades"]["takeovers"], self.takeovers, "{status}");
        let queues = status["queues"].as_array().unwrap_or_else(|| panic!("no queues in {status}"));
        assert!(!queues.is_empty(), "{status}");
        for queue in queues {
            assert_eq!(queue["errors"], 0, "{status}");
        }
    }

    #[track_caller]
    fn check(&mut self, reply: &Value, mode: &str) {
        self.generation += 1;
        assert_eq!(reply["generation"], self.generation, "{reply}");
        assert_eq!(reply["mode"], mode, "{reply}");
        let pause =
            reply["phases_us"]["pause"].as_f64().unwrap_or_else(|| panic!("no pause in {reply}"));
        assert!(mode != "swap" || pause == 0.0, "a swap pauses no queue: {reply}");
    }
}

/// The name without the suffix that tells two builds of one domain apart.
fn family(name: &str) -> &str {
    name.strip_suffix("_v2").unwrap_or(name)
}
