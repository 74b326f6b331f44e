//! The data path: our daemon and the peer in turn, cell by cell.
//!
//! In a round every contender runs once, started anew; every other round goes backwards, so that a
//! machine that grows slower is unfair to neither. Ratios are taken within rounds, against the best
//! configuration of the peer.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::awake::Awake;
use crate::cells::{self, Cell, Contender, Images, Selection};
use crate::cpu::{self, Places};
use crate::drive::{Driver, Load, Mix, Wait};
use crate::machine::Machine;
use crate::options::Options;
use crate::server::Recipe;
use crate::stats::{Spread, rate, ratios, time, times};
use crate::svg::{self, Bar};
use crate::{attempt, idle, in_guest, queues, save, save_json};

/// One run of one contender.
struct Run {
    ios: u64,
    iops: f64,
    latency_ns: [f64; 5],
    server_cpu_us: f64,
    client_cpu_us: f64,
}

/// The latencies that are kept, and what they are called.
const QUANTILES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];

impl Run {
    fn json(&self) -> Value {
        let latency: serde_json::Map<_, _> = QUANTILES
            .iter()
            .zip(self.latency_ns)
            .map(|(&(name, _), ns)| (name.to_owned(), json!(ns)))
            .collect();
        json!({
            "ios": self.ios,
            "iops": self.iops,
            "latency_ns": latency,
            "server_cpu_us_per_io": self.server_cpu_us,
            "client_cpu_us_per_io": self.client_cpu_us,
        })
    }
}

/// What a configuration of ours is of the peer's best.
struct Against<'a> {
    label: &'a str,
    iops: Spread,
    server_cpu: Spread,
}

/// All runs of a cell, by contender.
struct Outcome {
    cell: Cell,
    runs: Vec<Vec<Run>>,
}

/// Runs everything that is asked for; says how much of it failed.
pub(super) fn run(options: &Options) -> usize {
    let machine = Machine::look();
    machine.print();
    let places = if options.pin { Places::apart() } else { Places::default() };
    let poll = default_poll();
    let selection = Selection {
        quick: options.quick,
        glob: options.cells.as_deref(),
        default_poll_us: poll.parse().ok(),
        against: options.against.as_ref(),
    };
    let mut failures = 0;
    if options.guest {
        if let Some((rows, bars)) = attempt("guest", &mut failures, || in_guest::data(options)) {
            finish(options, &machine, Places::default(), &[], json!({ "guest": rows }));
            picture(&options.svg, bars);
        }
        machine.print_end();
        return failures;
    }
    let awake = options.awake.then(Awake::keep);
    let describe = awake.as_ref().map_or("CPUs may sleep", Awake::describe);
    println!("{}; {describe}; the daemon's --poll-us by default: {poll}\n", places.describe());

    let list = cells::list(&selection);
    let mut images = Images::new(options.disk_dir.clone());
    let mut outcomes = Vec::new();
    announce(list.len(), options);
    for (backing, name, load) in list {
        let outcome = attempt(&name, &mut failures, || {
            let contenders = cells::contenders(backing, &mut images, &selection)?;
            let outcome = measure(Cell { name: name.clone(), load, contenders }, options, places)?;
            outcome.print();
            Ok(outcome)
        });
        outcomes.extend(outcome);
        // A long run that is ended early leaves what it has found.
        finish(options, &machine, places, &outcomes, Value::Null);
    }
    let wanted = |name: &str| selection.glob.is_none_or(|glob| cells::matches(glob, name));
    let mut more = serde_json::Map::new();
    if wanted("queues") {
        more.extend(
            attempt("queues", &mut failures, || queues::run(options)).map(|v| ("queues".into(), v)),
        );
    }
    if wanted("ceiling") {
        more.extend(
            attempt("ceiling", &mut failures, || ceiling(places))
                .map(|v| ("client_ceiling".into(), v)),
        );
    }
    if wanted("idle") {
        let found = attempt("idle", &mut failures, || idle::run(options.idle_seconds));
        more.extend(found.map(|value| ("idle".to_owned(), value)));
    }
    summary(&outcomes);
    machine.print_end();
    finish(options, &machine, places, &outcomes, Value::Object(more));
    failures
}

fn announce(cells: usize, options: &Options) {
    if cells > 0 {
        println!(
            "{cells} cells, {} rounds of {} s for each contender\n",
            options.pairs, options.seconds
        );
    }
}

/// What the daemon says about itself.
fn default_poll() -> String {
    let help = guest_tests::daemon::run_daemon(&["--help"]).stdout;
    let after = help.split_once("--poll-us").and_then(|(_, rest)| rest.split_once("[default: "));
    after
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or("unknown", |(value, _)| value)
        .to_owned()
}

fn measure(cell: Cell, options: &Options, places: Places) -> io::Result<Outcome> {
    let mut runs: Vec<Vec<Run>> = cell.contenders.iter().map(|_| Vec::new()).collect();
    for round in 0..options.pairs {
        let forward = 0..cell.contenders.len();
        let order: Vec<usize> =
            if round % 2 == 0 { forward.collect() } else { forward.rev().collect() };
        for index in order {
            let contender = &cell.contenders[index];
            let run = once(contender, cell.load, Duration::from_secs_f64(options.seconds), places)
                .map_err(|error| {
                    io::Error::new(error.kind(), format!("{}: {error}", contender.label))
                })?;
            runs[index].push(run);
        }
    }
    Ok(Outcome { cell, runs })
}

fn once(contender: &Contender, load: Load, time: Duration, places: Places) -> io::Result<Run> {
    let server = contender.recipe.start(places.server)?;
    let mut driver = Driver::connect(server.socket(), load)?;
    driver.warm_up(places.client)?;
    let before = cpu::process_seconds(server.pid());
    let measured = driver.run_for(time, places.client)?;
    let used = cpu::process_seconds(server.pid()) - before;
    Ok(Run {
        ios: measured.ios,
        iops: measured.iops(),
        latency_ns: QUANTILES.map(|(_, share)| {
            if share < 1.0 {
                measured.latency.quantile(share) as f64
            } else {
                measured.latency.max() as f64
            }
        }),
        server_cpu_us: used * 1e6 / measured.ios.max(1) as f64,
        client_cpu_us: measured.client_seconds * 1e6 / measured.ios.max(1) as f64,
    })
}

impl Outcome {
    fn iops(&self, index: usize) -> Vec<f64> {
        self.runs[index].iter().map(|run| run.iops).collect()
    }

    fn spread(&self, index: usize, of: impl Fn(&Run) -> f64) -> Spread {
        Spread::of(self.runs[index].iter().map(of))
    }

    /// The configuration of the peer with the highest median.
    fn best_peer(&self) -> usize {
        let peers =
            (0..self.runs.len()).filter(|&index| !self.cell.contenders[index].recipe.is_ours());
        let median = |index: &usize| Spread::of(self.iops(*index)).median;
        peers.max_by(|a, b| median(a).total_cmp(&median(b))).expect("every cell has a peer")
    }

    /// Our configurations, each with what it is of the best peer.
    fn against_the_best(&self) -> Vec<Against<'_>> {
        let best = self.best_peer();
        let of = |of: fn(&Run) -> f64, index: usize| {
            let all = |index: usize| self.runs[index].iter().map(of).collect::<Vec<_>>();
            Spread::of(ratios(&all(index), &all(best)))
        };
        let ours = self.cell.contenders.iter().enumerate().filter(|(_, c)| c.recipe.is_ours());
        ours.map(|(index, c)| Against {
            label: &c.label,
            iops: of(|run| run.iops, index),
            server_cpu: of(|run| run.server_cpu_us, index),
        })
        .collect()
    }

    fn print(&self) {
        println!("{}", self.cell.name);
        for (index, contender) in self.cell.contenders.iter().enumerate() {
            let latency = |at: usize| time(self.spread(index, |run| run.latency_ns[at]).median);
            println!(
                "  {:<27} {:>22}/s   p50 {:>8}  p99 {:>8}  p99.9 {:>8}   CPU per I/O: server {:>6.2} us, client {:>6.2} us",
                contender.label,
                Spread::of(self.iops(index)).show(rate),
                latency(0),
                latency(2),
                latency(3),
                self.spread(index, |run| run.server_cpu_us).median,
                self.spread(index, |run| run.client_cpu_us).median,
            );
        }
        let peer = &self.cell.contenders[self.best_peer()].label;
        for Against { label, iops, server_cpu } in self.against_the_best() {
            let (iops, cpu) = (iops.show(times), server_cpu.show(times));
            println!("  {label} / peer's best ({peer}): {iops}, server's CPU per I/O {cpu}");
        }
        println!();
    }

    fn json(&self) -> Value {
        let contenders = self.cell.contenders.iter().enumerate().map(|(index, contender)| {
            json!({
                "label": contender.label,
                "command": contender.recipe.describe(),
                "iops": Spread::of(self.iops(index)).json(),
                "runs": self.runs[index].iter().map(Run::json).collect::<Vec<_>>(),
            })
        });
        let ratios = |of: fn(&Against<'_>) -> Spread| {
            let ours = self.against_the_best();
            ours.iter().map(|a| (a.label.to_owned(), of(a).json())).collect::<BTreeMap<_, _>>()
        };
        json!({
            "name": self.cell.name,
            "contenders": contenders.collect::<Vec<_>>(),
            "best_peer": self.cell.contenders[self.best_peer()].label,
            "iops_ratio_to_best_peer": ratios(|a| a.iops),
            "server_cpu_ratio_to_best_peer": ratios(|a| a.server_cpu),
        })
    }
}

/// One line per cell, worst first.
fn summary(outcomes: &[Outcome]) {
    let mut rows: Vec<_> = outcomes.iter().map(|o| (o.against_the_best(), o)).collect();
    rows.sort_by(|a, b| a.0[0].iops.median.total_cmp(&b.0[0].iops.median));
    if rows.is_empty() {
        return;
    }
    println!(
        "requests per second over those of the peer's best configuration, worst cell first; the server's CPU per I/O"
    );
    for (ratios, outcome) in rows {
        let column = |a: &Against<'_>| {
            format!("{}: {} CPU {}", a.label, a.iops.show(times), times(a.server_cpu.median))
        };
        let columns: Vec<String> = ratios.iter().map(column).collect();
        let peer = &outcome.cell.contenders[outcome.best_peer()].label;
        println!("  {:<32} {:<88} over {peer}", outcome.cell.name, columns.join("   "));
    }
}

/// How fast the client would be if the device took no time: what is close to it is not told apart.
fn ceiling(places: Places) -> io::Result<Value> {
    println!("the client alone, with a device that answers in no time:");
    let mut rows = Vec::new();
    for depth in [1, 32, 128] {
        let load = Load { depth, wait: Wait::Polled, bytes: 4096, mix: Mix::Read };
        let args = ["--domain", "empty", "--queue-size", "512"].map(str::to_owned).to_vec();
        let server = Recipe::Ours(args).start(places.server)?;
        let driver = Driver::connect(server.socket(), load)?;
        let iops = cpu::pinned(places.client, || driver.ceiling(Duration::from_millis(500)))?;
        println!("  depth {depth:<4} {:>8}/s   {:.0} ns per I/O", rate(iops), 1e9 / iops);
        rows.push(json!({ "depth": depth, "iops": iops }));
    }
    println!();
    Ok(Value::Array(rows))
}

fn finish(options: &Options, machine: &Machine, places: Places, outcomes: &[Outcome], more: Value) {
    let mut result = json!({
        "benchmark": "data",
        "machine": machine.json(),
        "pinning": places.describe(),
        "awake": options.awake,
        "rounds": options.pairs,
        "seconds_per_run": options.seconds,
        "cells": outcomes.iter().map(Outcome::json).collect::<Vec<_>>(),
    });
    if let (Value::Object(result), Value::Object(more)) = (&mut result, more) {
        result.extend(more);
    }
    save_json(&options.json, &result);
    let rows = outcomes.iter().map(|outcome| {
        let ratios = outcome.against_the_best().into_iter();
        (outcome.cell.name.clone(), ratios.map(|a| (a.label.to_owned(), a.iops)).collect())
    });
    picture(&options.svg, rows.collect());
}

/// Draws rows of ratios, each with the name of its series.
fn picture(path: &Path, rows: Vec<(String, Vec<(String, Spread)>)>) {
    let mut series: Vec<String> = Vec::new();
    for (label, _) in rows.iter().flat_map(|(_, ratios)| ratios) {
        if !series.contains(label) {
            series.push(label.clone());
        }
    }
    let bar = |(label, ratio): (String, Spread)| {
        let series = series.iter().position(|name| *name == label)?;
        Some(Bar { series, median: ratio.median, min: ratio.min, max: ratio.max })
    };
    let rows: Vec<_> = rows
        .into_iter()
        .map(|(name, ratios)| (name, ratios.into_iter().filter_map(bar).collect()))
        .collect();
    let title = "Requests per second: vhost-hotswap over qemu-storage-daemon";
    let axis = "ratio to the peer's best configuration (median, min-max of rounds)";
    save(path, &svg::ratios(title, axis, &series, &rows));
}
