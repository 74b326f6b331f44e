//! Writes the man page and shell completions of `vhost-hotswap` into a directory: see the crate
//! `manual`.

use clap::CommandFactory;
use vhost_hotswap::args::Args;

fn main() -> std::io::Result<()> {
    manual::run(&Args::command())
}
