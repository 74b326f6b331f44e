//! Writes the man pages and shell completions of `hotswapctl` into a directory: see the crate
//! `manual`.

#[allow(dead_code, reason = "only the definition is used")]
#[path = "../src/ctl/main.rs"]
mod hotswapctl;

use clap::CommandFactory;

fn main() -> std::io::Result<()> {
    manual::run(&hotswapctl::Cli::command())
}
