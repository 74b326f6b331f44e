//! What the proxy costs, in instructions per request: the same domain through gate, flight table
//! and C ABI, and called as a library.
//!
//! `scripts/bench cost` runs it. The program runs itself under callgrind, once for `N` rounds and
//! once for `2N` of each cell, and takes the difference, so that starting and stopping cancel out.
//! Counts do not depend on what else the machine does; no time is taken.
//!
//! What is counted are the instructions that this process executes under callgrind: Ir. Not counted
//! is what the kernel does for it, and the coarse clock, which outside of valgrind is read without
//! the kernel: some 50 instructions, once in eight batches. A copy of 4 KiB counts as the 32-byte
//! loads and stores that do it, about 410. The second pair of numbers weighs what the cache
//! simulation says: Ir + 10 for each first-level miss + 100 for each last-level miss, callgrind's
//! own estimate of cycles; it knows that copying waits for memory. For `file`, whose work is the
//! kernel's, there is an *estimate* of the kernel's instructions too: those of user space times the
//! ratio of system to user CPU time of a run without valgrind.

mod arms;
mod count;

use std::process::ExitCode;

const USAGE: &str = "\
usage: scripts/bench cost [PREFIX]      all cells, or those whose name begins so, e.g. ramdisk/read

  Prints, for each cell (DOMAIN/OP/BATCH), instructions per request of the domain called directly and through the proxy,
  the same in estimated cycles, and for files an estimate with the kernel's instructions.";

fn main() -> ExitCode {
    // What cargo adds by itself.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--help" | "-h"] => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        ["run", arm, cell, rounds] => {
            arms::run(arm, cell, rounds.parse().expect("a number of rounds"));
            count::print_ticks();
            ExitCode::SUCCESS
        }
        [] => count::table(""),
        [prefix] if !prefix.starts_with('-') => count::table(prefix),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
