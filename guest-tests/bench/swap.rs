//! Swaps under load: runs with twenty upgrades a second, and runs without, in turn on one
//! connection.
//!
//! Two runs without upgrades differ, too, by several per cent at best. So there are many short
//! ones, how they differ among themselves is said, and what an upgrade displaces is also measured
//! within the runs: against the requests that were served in the milliseconds before it.

use std::io;
use std::time::Duration;

use serde_json::{Value, json};

use crate::awake::Awake;
use crate::cells::image;
use crate::cpu::{self, Places};
use crate::drive::{Driver, Load, Measured, Mix, Wait};
use crate::options::Options;
use crate::stats::{Spread, ratios, time, times};
use crate::upgrade::{Done, Operator, print_total};
use guest_tests::daemon::Daemon;
use guest_tests::modules::copies;

/// Twenty in a second.
const INTERVAL: Duration = Duration::from_millis(50);

/// More modules than the loader keeps.
const NEW_ONES: usize = 16;

/// How many pairs of runs each pair that was asked for is cut into.
const PIECES: usize = 4;

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
    let awake = Awake::keep();
    println!(
        "\nswap: {} pairs of runs of {} s with {} upgrades/s over the same without; sleeping client, 1 queue, 4 KiB, half writes; {}",
        options.pairs * PIECES,
        options.seconds / PIECES as f64,
        1000 / INTERVAL.as_millis(),
        awake.describe(),
    );
    let depths: &[usize] = if options.quick { &[1] } else { &[1, 32] };
    let (_directory, path) = image("/dev/shm".as_ref(), 256 << 20)?;
    let path = path.to_string_lossy().into_owned();
    let mut rows = Vec::new();
    for (domain, args) in
        [("empty", vec!["--domain", "empty"]), ("file", vec!["--blk-file", &path])]
    {
        for &depth in
            depths.iter().filter(|depth| options.wants(&format!("swap/{domain}/d{depth}")))
        {
            let modules = tempfile::tempdir_in("/dev/shm")?;
            // Each is a new one whenever its turn comes.
            let new = copies(domain, NEW_ONES, modules.path())?;
            rows.push(cell(
                (domain, "a new module each time"),
                &new,
                &args,
                depth,
                options,
                places,
            )?);
            rows.push(cell((domain, "the same again"), &[domain], &args, depth, options, places)?);
        }
    }
    Ok(Value::Array(rows))
}

fn cell(
    (domain, which): (&str, &str),
    modules: &[impl AsRef<str>],
    args: &[&str],
    depth: usize,
    options: &Options,
    places: Places,
) -> io::Result<Value> {
    let daemon = Daemon::start(args);
    let load = Load { depth, wait: Wait::Sleeping, bytes: 4096, mix: Mix::Mixed };
    let mut driver = Driver::connect(daemon.socket(), load)?;
    let mut operator = Operator::new(&daemon, modules, "swap");
    driver.warm_up(places.client)?;
    cpu::pin_workers(daemon.server_pid(), places.server)?;
    operator.upgrade()?;
    let length = Duration::from_secs_f64(options.seconds / PIECES as f64);
    let (mut quiet, mut busy, mut upgrades): (Vec<Run>, Vec<Run>, Vec<Done>) = Default::default();
    let (mut displaced, mut nothing) = (Vec::new(), Vec::new());
    let pairs = options.pairs * PIECES;
    for pair in 0..pairs {
        for with in if pair % 2 == 0 { [false, true] } else { [true, false] } {
            if with {
                let beside = || operator.upgrade_every(INTERVAL, length);
                let (measured, done) = driver.run_beside(length, true, places.client, beside)?;
                sane(&measured)?;
                let done = done?;
                let begins = done
                    .iter()
                    .map(|done| done.begin.duration_since(driver.epoch()).as_nanos() as u64);
                displaced.extend(begins.filter_map(|begin| displaced_by(begin, &measured.trace)));
                upgrades.extend(done);
                busy.push(Run::new(&measured));
            } else {
                // Traced as well, because that takes time, too.
                let (measured, ()) = driver.run_beside(length, true, places.client, || {})?;
                sane(&measured)?;
                let (first, last) = (measured.trace.first(), measured.trace.last());
                let begins = (first.map_or(0, |r| r.0)..last.map_or(0, |r| r.0))
                    .step_by(INTERVAL.as_nanos() as usize);
                nothing.extend(begins.filter_map(|begin| displaced_by(begin, &measured.trace)));
                quiet.push(Run::new(&measured));
            }
        }
    }
    let values = |runs: &[Run], of: fn(&Run) -> f64| runs.iter().map(of).collect::<Vec<f64>>();
    let ratio = |of: fn(&Run) -> f64| Spread::of(ratios(&values(&busy, of), &values(&quiet, of)));
    let gaps = [&busy, &quiet].map(|runs| Spread::of(values(runs, |run| run.gap_ns)));
    let rate = upgrades.len() as f64 / (pairs as f64 * length.as_secs_f64());
    // The order alternates, so that from the second on two are neighbours in time.
    let apart = |of: fn(&Run) -> f64| {
        let (even, odd): (Vec<_>, Vec<_>) =
            quiet[1..].chunks_exact(2).map(|two| (of(&two[0]), of(&two[1]))).unzip();
        Spread::of(ratios(&odd, &even))
    };
    let (displaced, nothing) = (Spread::of(displaced), Spread::of(nothing));
    let label = format!("{domain}, depth {depth}, {which}");
    println!(
        "  {label:<40} {rate:.1} upgrades/s: requests/s x {}   p99.9 x {}   \
         longest gap: median {} over {} = x {:.2}, maximum {} over {}",
        ratio(|run| run.iops).show(times),
        ratio(|run| run.p999_ns).show(times),
        time(gaps[0].median),
        time(gaps[1].median),
        gaps[0].median / gaps[1].median,
        time(gaps[0].max),
        time(gaps[1].max),
    );
    println!(
        "  {:<40} without upgrades, a run over the one before: requests/s x {}   p99.9 x {}",
        "",
        apart(|run| run.iops).show(times),
        apart(|run| run.p999_ns).show(times),
    );
    println!(
        "  {:<40} an upgrade displaces the requests of {:.0} us (median), {:.1} % of the time between two; no upgrade: {:.0} us",
        "",
        displaced.median / 1e3,
        100.0 * displaced.median / INTERVAL.as_nanos() as f64,
        nothing.median / 1e3,
    );
    let total = print_total(&format!("{label}, under this load"), &upgrades);
    Ok(json!({
        "label": label,
        "pairs": pairs,
        "seconds_per_run": length.as_secs_f64(),
        "upgrades": upgrades.len(),
        "upgrades_per_second": rate,
        "iops_ratio": ratio(|run| run.iops).json(),
        "p99.9_ratio": ratio(|run| run.p999_ns).json(),
        "longest_gap_median_ratio": gaps[0].median / gaps[1].median,
        "iops_ratio_without": apart(|run| run.iops).json(),
        "p99.9_ratio_without": apart(|run| run.p999_ns).json(),
        "displaced_ns_median": displaced.median,
        "displaced_by_nothing_ns_median": nothing.median,
        "with": busy.iter().map(Run::json).collect::<Vec<_>>(),
        "without": quiet.iter().map(Run::json).collect::<Vec<_>>(),
        "command_to_reply": total,
    }))
}

/// The time, in nanoseconds, in which as many requests are served as are missing around the upgrade
/// that began at `begin`. The measure is how many were served just before; what the machine does
/// otherwise in this time makes it more or less, so only the median of many says something.
fn displaced_by(begin: u64, trace: &[(u64, u64)]) -> Option<f64> {
    let served = |from: u64, to: u64| {
        (trace.partition_point(|&(at, _)| at < to) - trace.partition_point(|&(at, _)| at < from))
            as f64
    };
    const MS: u64 = 1_000_000;
    // The operator is awake a little earlier than its command. An upgrade rarely takes longer than
    // this.
    let (from, to) = (begin.checked_sub(MS / 2)?, begin + 12 * MS);
    let before = served(from.checked_sub(6 * MS)?, from);
    let in_time = trace.first()?.0 < from - 6 * MS && trace.last()?.0 > to;
    (in_time && before > 0.0)
        .then(|| (to - from) as f64 - served(from, to) / before * (6 * MS) as f64)
}

/// Nothing failed and nothing was left.
pub(super) fn sane(measured: &Measured) -> io::Result<()> {
    if measured.failed > 0 || measured.aborted {
        let failed = measured.failed;
        return Err(io::Error::other(format!(
            "{failed} requests failed; stuck: {}",
            measured.aborted
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_displaced() {
        const MS: u64 = 1_000_000;
        // One request every 10 us, but none for 2 ms after 50 ms.
        let trace: Vec<_> = (0..10_000)
            .map(|i| (i * 10_000, 0))
            .filter(|&(at, _)| !(50 * MS..52 * MS).contains(&at))
            .collect();
        let displaced = displaced_by(50 * MS, &trace).unwrap();
        assert!((displaced - 2e6).abs() < 3e4, "{displaced}");
        assert!(displaced_by(70 * MS, &trace).unwrap().abs() < 3e4);
        assert_eq!(displaced_by(2 * MS, &trace), None, "nothing is known of the time before");
        assert_eq!(displaced_by(95 * MS, &trace), None, "nor of the time after");
    }
}
