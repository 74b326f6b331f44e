//! More queues: what a second and a fourth one bring, each with a client's thread and a worker of
//! its own.
//!
//! On few CPUs a load that keeps them all busy cannot grow. So these clients wait most of the time,
//! for a wake-up or for a disk, one request each: if workers got into each other's way, or took
//! turns, it would show as less than proportional growth.

use std::io;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::awake::Awake;
use crate::cells::image;
use crate::cpu;
use crate::drive::{Driver, Load, Measured, Mix, Wait};
use crate::options::Options;
use crate::server::Recipe;
use crate::stats::{Spread, rate, ratios, times};

const COUNTS: [usize; 3] = [1, 2, 4];

/// What there is to wait for.
pub(super) fn run(options: &Options) -> io::Result<Value> {
    let awake = Awake::keep();
    println!(
        "queues, one request in flight on each, sleeping clients, 4 KiB random reads, no CPU of one's own; {}:",
        awake.describe()
    );
    let (_directory, path) = image(&options.disk_dir, 256 << 20)?;
    let direct = format!("path={}", path.to_string_lossy());
    let backings = [
        ("null, --poll-us 0", vec!["--domain", "empty", "--poll-us", "0"]),
        ("direct", vec!["--domain", "file", "--param", &direct, "--param", "direct=true"]),
    ];
    let rows = backings.into_iter().map(|(label, args)| row(label, &args, options)).collect();
    println!();
    rows
}

fn row(label: &str, args: &[&str], options: &Options) -> io::Result<Value> {
    let mut runs = COUNTS.map(|_| Vec::new());
    for round in 0..options.pairs {
        let mut order: Vec<usize> = (0..COUNTS.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            runs[index].push(once(args, COUNTS[index], Duration::from_secs_f64(options.seconds))?);
        }
    }
    let of = |index: usize, what: fn(&(f64, f64)) -> f64| {
        runs[index].iter().map(what).collect::<Vec<f64>>()
    };
    let mut counts = Vec::new();
    for (index, count) in COUNTS.into_iter().enumerate() {
        let iops = Spread::of(of(index, |run| run.0));
        let over_one = Spread::of(ratios(&of(index, |run| run.0), &of(0, |run| run.0)));
        let server = Spread::of(of(index, |run| run.1));
        println!(
            "  {label:<18} {count} queue(s) {:>24}/s   x {:<18} CPU per I/O: server {:.2} us",
            iops.show(rate),
            over_one.show(times),
            server.median,
        );
        counts.push(json!({ "queues": count, "iops": iops.json(), "over_one": over_one.json(), "server_cpu_us_per_io": server.json() }));
    }
    Ok(json!({ "label": label, "counts": counts }))
}

/// Requests per second of all queues together, and the server's CPU time per request in
/// microseconds.
fn once(args: &[&str], queues: usize, time: Duration) -> io::Result<(f64, f64)> {
    let args =
        args.iter().chain(&["--queues", &queues.to_string()]).map(|&arg| arg.to_owned()).collect();
    let server = Recipe::Ours(args).start(None)?;
    let load = Load { depth: 1, wait: Wait::Sleeping, bytes: 4096, mix: Mix::Read };
    let mut drivers = Driver::connect_queues(server.socket(), load, queues)?;
    drivers.iter_mut().try_for_each(|driver| driver.warm_up(None))?;
    let before = cpu::process_seconds(server.pid());
    let measured: Vec<io::Result<Measured>> = thread::scope(|scope| {
        let threads: Vec<_> = drivers
            .iter_mut()
            .map(|driver| scope.spawn(move || driver.run_for(time, None)))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a client does not panic")).collect()
    });
    let used = cpu::process_seconds(server.pid()) - before;
    let measured = measured.into_iter().collect::<io::Result<Vec<_>>>()?;
    let ios: u64 = measured.iter().map(|measured| measured.ios).sum();
    Ok((measured.iter().map(Measured::iops).sum(), used * 1e6 / ios.max(1) as f64))
}
