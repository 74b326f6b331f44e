//! Counting: each arm of each cell under callgrind, with `N` and with `2N` rounds.

use crate::arms::Cell;
use std::process::{Command, ExitCode};

/// Instructions of one look at the coarse clock, which valgrind has done by the kernel and so does not count. Counted by single-stepping.
#[allow(dead_code)]
pub const CLOCK: f64 = 0.0;

/// Rounds of the shorter run.
const ROUNDS: u64 = 400;

const CELLS: &[&str] = &[
    "empty/read/1",
    "empty/read/16",
    "ramdisk/read/1",
    "ramdisk/read/4",
    "ramdisk/read/16",
    "ramdisk/read/32",
    "ramdisk/write/16",
    "tmpfs/read/16",
    "tmpfs/write/16",
    "cached/read/1",
    "cached/read/16",
    "cached/write/16",
    "direct/read/16",
    "direct/write/16",
];

/// Instructions of one run.
fn count(arm: &str, cell: &str, rounds: u64) -> Result<u64, String> {
    let me = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(me)
        .args(["run", arm, cell, &rounds.to_string()])
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
    collected.filter(|_| output.status.success()).ok_or_else(|| format!("{arm} {cell} failed:\n{said}"))
}

fn per_request(arm: &str, name: &str) -> Result<f64, String> {
    let requests = ROUNDS * Cell::parse(name).depth() as u64;
    let (once, twice) = (count(arm, name, ROUNDS)?, count(arm, name, 2 * ROUNDS)?);
    Ok((twice as f64 - once as f64) / requests as f64)
}

/// Prints the cells whose names begin with `prefix`.
pub fn table(prefix: &str) -> ExitCode {
    println!("{:18} {:>10} {:>10} {:>8} {:>8}", "cell", "direct", "proxy", "added", "%");
    let mut failed = false;
    for name in CELLS.iter().filter(|name| name.starts_with(prefix)) {
        let both = per_request("direct", name).and_then(|direct| Ok((direct, per_request("proxy", name)?)));
        match both {
            Ok((direct, proxy)) => {
                let added = proxy - direct;
                println!("{name:18} {direct:10.1} {proxy:10.1} {added:8.1} {:8.2}", 100.0 * added / direct);
            }
            Err(error) => {
                println!("{name:18} {error}");
                failed = true;
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
