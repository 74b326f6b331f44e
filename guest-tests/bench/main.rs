//! The benchmarks: what our daemon does beside QEMU's own, and what an upgrade costs those who do
//! I/O meanwhile.
//!
//! Everything is measured from outside, through the same client for both sides, in turn and more
//! than once; what is printed are medians, spreads, and ratios of neighbours. What a row is
//! compared with stands in the row. All single numbers go to a JSON file, pictures to an SVG file.
//!
//! - `cells`, `data`, `idle`: throughput, latency and CPU time of the data path.
//! - `swap`, `handover`, `restart`: upgrades under load; `rendezvous` is the least that a handover
//!   can take.
//! - `in_guest`: both again, felt by `fio` in a real guest.
//! - `drive`, `server`, `cpu`, `machine`: load, both sides, CPUs, and what all of it ran on.
//! - `histogram`, `stats`, `svg`: numbers and pictures.
//!
//! Nothing here knows what is behind the daemon's sockets.

mod awake;
mod cells;
mod cpu;
mod data;
mod drive;
mod handover;
mod histogram;
mod idle;
mod in_guest;
mod machine;
mod options;
mod queues;
mod rendezvous;
mod restart;
mod server;
mod stats;
mod svg;
mod swap;
mod upgrade;

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use options::{Kind, Options, USAGE};
use serde_json::Value;

/// Runs the benchmark that the arguments ask for.
///
/// Exits with 0 if everything could be measured, 1 if something failed, 2 if the arguments make no
/// sense.
fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(&args, &target_dir()) {
        Ok(options) => options,
        Err(sentence) => {
            eprintln!("bench: {sentence}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let failures = match options.kind {
        Kind::Data => data::run(&options),
        Kind::Upgrade => upgrade::run(&options),
    };
    println!("\nresults: {} and {}", options.json.display(), options.svg.display());
    if failures == 0 {
        return ExitCode::SUCCESS;
    }
    println!("{failures} measurements FAILED; see above");
    ExitCode::FAILURE
}

/// Does one measurement; if it fails or panics, that is said, and the others go on.
fn attempt<T>(name: &str, failures: &mut usize, act: impl FnOnce() -> io::Result<T>) -> Option<T> {
    let error = match catch_unwind(AssertUnwindSafe(act)) {
        Ok(Ok(result)) => return Some(result),
        Ok(Err(error)) => error.to_string(),
        // The panic hook has printed it, with the daemon's log.
        Err(_) => "it panicked".to_owned(),
    };
    println!("{name}: FAILED: {error}");
    *failures += 1;
    None
}

/// Writes a result file and its directory.
fn save(path: &Path, content: &str) {
    let written =
        path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(path, content));
    if let Err(error) = written {
        println!("cannot write {}: {error}", path.display());
    }
}

fn save_json(path: &Path, value: &Value) {
    save(path, &format!("{value:#}\n"));
}

/// The target directory that this program came from; Cargo tags it so that backups skip it.
fn target_dir() -> PathBuf {
    let running = std::env::current_exe().unwrap_or_default();
    let target = running.ancestors().find(|directory| directory.join("CACHEDIR.TAG").exists());
    target.map_or_else(std::env::temp_dir, Path::to_owned)
}
