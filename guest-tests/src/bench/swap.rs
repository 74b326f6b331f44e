//! Swaps under load: runs with twenty upgrades a second, and runs without, in turn on one connection.

use std::io;
use std::time::Duration;

use serde_json::{Value, json};

use super::cells::image;
use super::cpu::{self, Places};
use super::drive::{Driver, Load, Measured, Mix, Wait};
use super::options::Options;
use super::stats::{Spread, ratios, time, times};
use super::upgrade::{Done, Operator, print_total};
use crate::daemon::Daemon;

/// Twenty in a second.
const INTERVAL: Duration = Duration::from_millis(50);

struct Run {
    iops: f64,
    p999_ns: f64,
    gap_ns: f64,
}

impl Run {
    fn new(measured: &Measured) -> Run {
        Run {
            iops: measured.iops(),
            p999_ns: measured.latency.quantile(0.999) as f64,
            gap_ns: measured.longest_gap_ns as f64,
        }
    }

    fn json(&self) -> Value {
        json!({ "iops": self.iops, "p99.9_ns": self.p999_ns, "longest_gap_ns": self.gap_ns })
    }
}

/// Both domains that can be swapped, at both depths.
pub(super) fn run(options: &Options, places: Places) -> io::Result<Value> {
    println!(
        "\nswap: {} pairs of runs of {} s with {} upgrades/s over the same without; sleeping client, 1 queue, 4 KiB, half writes",
        options.pairs,
        options.seconds,
        1000 / INTERVAL.as_millis()
    );
    let depths: &[usize] = if options.quick { &[1] } else { &[1, 32] };
    let (_directory, path) = image("/dev/shm".as_ref(), 256 << 20)?;
    let path = path.to_string_lossy().into_owned();
    let mut rows = Vec::new();
    for (domain, args) in [("empty", vec!["--domain", "empty"]), ("file", vec!["--blk-file", &path])] {
        for &depth in depths.iter().filter(|depth| options.wants(&format!("swap/{domain}/d{depth}"))) {
            rows.push(cell(domain, &args, depth, options, places)?);
        }
    }
    Ok(Value::Array(rows))
}

fn cell(
    domain: &'static str,
    args: &[&str],
    depth: usize,
    options: &Options,
    places: Places,
) -> io::Result<Value> {
    let daemon = Daemon::start(args);
    let load = Load { depth, wait: Wait::Sleeping, bytes: 4096, mix: Mix::Mixed };
    let mut driver = Driver::connect(daemon.socket(), load)?;
    let mut operator = Operator::new(&daemon, &[domain], "swap");
    driver.warm_up(places.client)?;
    cpu::pin_workers(daemon.pid(), places.server)?;
    operator.upgrade()?;
    let length = Duration::from_secs_f64(options.seconds);
    let (mut quiet, mut busy, mut upgrades): (Vec<Run>, Vec<Run>, Vec<Done>) = Default::default();
    for pair in 0..options.pairs {
        for with in if pair % 2 == 0 { [false, true] } else { [true, false] } {
            if with {
                let beside = || operator.upgrade_every(INTERVAL, length);
                let (measured, done) = driver.run_beside(length, false, places.client, beside)?;
                sane(&measured)?;
                upgrades.extend(done?);
                busy.push(Run::new(&measured));
            } else {
                quiet.push(Run::new(&driver.run_for(length, places.client)?));
            }
        }
    }
    let values = |runs: &[Run], of: fn(&Run) -> f64| runs.iter().map(of).collect::<Vec<f64>>();
    let ratio = |of: fn(&Run) -> f64| Spread::of(ratios(&values(&busy, of), &values(&quiet, of)));
    let gaps = [&busy, &quiet].map(|runs| Spread::of(values(runs, |run| run.gap_ns)));
    let rate = upgrades.len() as f64 / (options.pairs as f64 * options.seconds);
    let label = format!("{domain} -> {domain}, depth {depth}");
    println!(
        "  {label:<26} {rate:.1} upgrades/s: requests/s x {}   p99.9 x {}   \
         longest gap: median {} over {} = x {:.2}, maximum {} over {}",
        ratio(|run| run.iops).show(times),
        ratio(|run| run.p999_ns).show(times),
        time(gaps[0].median),
        time(gaps[1].median),
        gaps[0].median / gaps[1].median,
        time(gaps[0].max),
        time(gaps[1].max),
    );
    let total = print_total(&format!("{domain} -> {domain}, swap under this load"), &upgrades);
    Ok(json!({
        "label": label,
        "upgrades": upgrades.len(),
        "upgrades_per_second": rate,
        "iops_ratio": ratio(|run| run.iops).json(),
        "p99.9_ratio": ratio(|run| run.p999_ns).json(),
        "longest_gap_median_ratio": gaps[0].median / gaps[1].median,
        "with": busy.iter().map(Run::json).collect::<Vec<_>>(),
        "without": quiet.iter().map(Run::json).collect::<Vec<_>>(),
        "command_to_reply": total,
    }))
}

/// Nothing failed and nothing was left.
pub(super) fn sane(measured: &Measured) -> io::Result<()> {
    if measured.failed > 0 || measured.aborted {
        let failed = measured.failed;
        return Err(io::Error::other(format!("{failed} requests failed; stuck: {}", measured.aborted)));
    }
    Ok(())
}
