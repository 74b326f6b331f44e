//! Upgrades: what they cost those who do I/O. The parts are elsewhere; here are the operator and
//! the order of things.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cpu::Places;
use crate::machine::Machine;
use crate::options::Options;
use crate::stats::{Spread, quantile, sorted, time};
use crate::{attempt, handover, in_guest, restart, save, save_json, swap};
use guest_tests::daemon::{Control, Daemon};

/// Runs everything; says how much of it failed.
pub(super) fn run(options: &Options) -> usize {
    let machine = Machine::look();
    machine.print();
    let places = if options.pin { Places::apart() } else { Places::default() };
    println!("{}", places.describe());
    let mut failures = 0;
    let mut result = serde_json::Map::new();
    let mut part = |name: &str, act: &mut dyn FnMut() -> io::Result<Value>| {
        if let Some(value) = attempt(name, &mut failures, act) {
            result.insert(name.to_owned(), value);
        }
        // A long run that is ended early leaves what it has found.
        let mut all = result.clone();
        all.insert("benchmark".to_owned(), "upgrade".into());
        all.insert("pinning".to_owned(), places.describe().into());
        all.insert("rounds".to_owned(), options.pairs.into());
        all.insert("seconds_per_run".to_owned(), options.seconds.into());
        all.insert("machine".to_owned(), machine.json());
        save_json(&options.json, &Value::Object(all));
    };
    part("swap", &mut || swap::run(options, places));
    if options.wants("handover") {
        part("handover", &mut || handover::run(options, places));
    }
    if options.wants("restart") {
        part("restart", &mut || {
            let (value, picture) = restart::run(options, places)?;
            save(&options.svg, &picture);
            Ok(value)
        });
    }
    if options.guest {
        part("guest", &mut || in_guest::upgrades(options));
    }
    machine.print_end();
    failures
}

/// A committed upgrade.
pub(super) struct Done {
    /// When the command was given.
    pub begin: Instant,
    /// From the command to its reply, in nanoseconds.
    pub total_ns: f64,
    /// Gate shut to gate open.
    pub pause_ns: f64,
    /// As the daemon says them.
    pub phases: Value,
}

/// Someone at the control socket, who keeps the connection.
pub(super) struct Operator {
    control: Control,
    /// The modules that are upgraded to, in turn.
    names: Vec<String>,
    mode: &'static str,
    count: usize,
}

impl Operator {
    pub(super) fn new(daemon: &Daemon, names: &[impl AsRef<str>], mode: &'static str) -> Operator {
        Operator {
            control: daemon.rpc(),
            names: names.iter().map(|name| name.as_ref().to_owned()).collect(),
            mode,
            count: 0,
        }
    }

    /// Upgrades to the next module.
    pub(super) fn upgrade(&mut self) -> io::Result<Done> {
        let name = &self.names[self.count % self.names.len()];
        self.count += 1;
        let begin = Instant::now();
        let reply = self.control.request("upgrade", json!({ "name": name, "mode": self.mode }));
        let total_ns = begin.elapsed().as_nanos() as f64;
        let reply =
            reply.map_err(|e| io::Error::other(format!("upgrade to {name}: {}", e.message)))?;
        Ok(Done { begin, total_ns, pause_ns: pause_ns(&reply), phases: reply["phases_us"].clone() })
    }

    /// Upgrades every so often, for a time.
    pub(super) fn upgrade_every(
        &mut self,
        interval: Duration,
        time: Duration,
    ) -> io::Result<Vec<Done>> {
        let begin = Instant::now();
        let mut done = Vec::new();
        let mut next = begin + interval / 2;
        while next < begin + time {
            thread::sleep(next.saturating_duration_since(Instant::now()));
            done.push(self.upgrade()?);
            // What is late is left out: two in a row would be another load.
            next = (next + interval).max(Instant::now());
        }
        Ok(done)
    }
}

/// In nanoseconds if the daemon says them, else from its microseconds.
fn pause_ns(reply: &Value) -> f64 {
    let exact = [&reply["phases_ns"]["pause"], &reply["phases_us"]["pause_ns"], &reply["pause_ns"]];
    exact
        .into_iter()
        .find_map(Value::as_f64)
        .unwrap_or_else(|| reply["phases_us"]["pause"].as_f64().unwrap_or(0.0) * 1e3)
}

/// One line for the time from command to reply, and where it goes.
pub(super) fn print_total(label: &str, done: &[Done]) -> Value {
    let total = Spread::of(done.iter().map(|done| done.total_ns));
    let phase = |name: &str| {
        let us = done.iter().map(|done| done.phases[name].as_f64().unwrap_or(0.0));
        (name.to_owned(), Spread::of(us).median)
    };
    let phases =
        ["verify", "load", "prepare", "drain", "quiesce", "activate", "pause", "grace", "retire"]
            .map(phase);
    let shown: Vec<String> = phases
        .iter()
        .filter(|(_, us)| *us >= 1.0)
        .map(|(name, us)| format!("{name} {}", time(us * 1e3)))
        .collect();
    println!("  {label}, command to reply: {}; medians: {}", total.show(time), shown.join(", "));
    let phases: serde_json::Map<_, _> =
        phases.into_iter().map(|(name, us)| (name, json!(us))).collect();
    json!({
        "label": label,
        "total_ns": total.json(),
        "phases_median_us": phases,
        "all_total_ns": done.iter().map(|done| done.total_ns).collect::<Vec<_>>(),
    })
}

/// One line of a distribution of pauses.
pub(super) fn print_pauses(label: &str, pauses: &[f64]) -> Value {
    let ordered = sorted(pauses.iter().copied());
    let [median, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|share| quantile(&ordered, share));
    let columns = [median, p90, p99, max].map(|ns| format!("{:>9}", time(ns))).join("");
    println!("  {label:<76}{:>6}{columns}", pauses.len());
    json!({ "label": label, "median": median, "p90": p90, "p99": p99, "max": max, "all_ns": pauses })
}
