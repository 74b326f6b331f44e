//! The benchmarks' program; see `guest_tests::bench`, and `scripts/bench` for how to run it.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    guest_tests::bench::main(&args)
}
