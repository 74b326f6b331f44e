//! The deaths of a daemon's processes, and what is waited for behind them.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Daemon, Process};
use crate::PATIENCE;

impl Daemon {
    /// Waits until `done` says so of the status, which is returned.
    ///
    /// # Panics
    ///
    /// Panics when that does not come about within 40 s; `what` says what is missing then.
    pub fn wait_until(&self, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut control = self.rpc();
        loop {
            let now = control.request("status", json!({})).expect("a status");
            if done(&now) {
                return now;
            }
            assert!(Instant::now() < deadline, "{what}: {now}\n{}", self.log());
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends the process that serves a signal, and returns it.
    pub fn signal_server(&self, signal: Signal) -> Process {
        let server = self.server();
        server.signal(signal);
        server
    }

    /// Ends the process that serves with a signal, and waits until another one has gone on.
    pub fn end_server(&self, signal: Signal) {
        let before = self.status()["server"]["recoveries"].as_u64().expect("a number");
        let server = self.signal_server(signal);
        let now = self
            .wait_until("no recovery", |now| now["server"]["recoveries"].as_u64() > Some(before));
        assert_ne!(now["server"]["pid"], server.pid, "{now}");
    }

    /// Kills all that there is of it, and waits until its I/O has ended.
    pub fn end_whole(&mut self) {
        let server = self.server();
        self.stop_with(Signal::KILL);
        let deadline = Instant::now() + PATIENCE;
        while server.runs() {
            assert!(Instant::now() < deadline, "the server does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
