//! The options for those who watch the daemon: metrics, history, log.

use crate::logging::Format;
use std::path::PathBuf;
use telemetry::Address;

/// What is told to those who watch, and where.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct Watching {
    /// Count requests and changes, and show them to Prometheus there: a Unix socket's path (with a
    /// `/`), or a loopback address with a port, like 127.0.0.1:9101
    #[arg(long, value_name = "ADDRESS", conflicts_with = "no_supervisor")]
    pub metrics: Option<Address>,

    /// Keep in this directory, which no other daemon has, what has happened [default: in memory]
    #[arg(long, value_name = "DIR", conflicts_with = "no_supervisor")]
    pub state_dir: Option<PathBuf>,

    /// How the lines of the log are written [default: human]
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub log_format: Option<Format>,
}
