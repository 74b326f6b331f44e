//! What the proxy costs, in instructions per request: the same domain through gate, flight table and C ABI, and called as a library.
//!
//! `scripts/bench cost` runs it. The program runs itself under callgrind, once for `N` rounds and once for `2N` of each cell, and takes the difference,
//! so that starting and stopping cancel out. Counts do not depend on what else the machine does; no time is taken.
//!
//! What is counted are the instructions of this process as callgrind executes them. Not counted is what the kernel does, and the clock, which outside of
//! valgrind is read without the kernel (`count::CLOCK` puts that back). A copy of 4 KiB counts as the vector instructions that do it, some hundreds, of
//! which each takes much longer than one of the proxy's: in instructions the proxy looks worse than it is.

mod arms;
mod count;

use std::process::ExitCode;

const USAGE: &str = "\
usage: scripts/bench cost [GLOB]      all cells, or those whose name starts with GLOB, e.g. ramdisk/read

  Prints, for each cell (DOMAIN/OP/BATCH), instructions per request of the domain called directly and through the proxy.";

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
