//! `hotswapctl`: commands a running daemon through its control socket.
//!
//! One command, one request, one answer for people or, with `--json`, for programs. Exit status 0
//! is done, 1 is refused, failed or nobody there, 2 is a command line that makes no sense.
//!
//! Invariant: a refusal is always a sentence on standard error, `error: MESSAGE (CODE)`, with and
//! without `--json`.
//!
//! It deliberately uses nothing of the daemon's library: what it knows of the daemon is what goes
//! over the socket, so that it can command a daemon of another version. Nor does it know which
//! domains or parameters exist.

mod client;
mod print;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use serde_json::{Map, Value, json};

use client::{Client, Failure};

/// How long a question may take to be answered.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an upgrade may take beyond its drain: it may have to wait for another, and for slow
/// storage.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(120);
/// The drain that the daemon allows if nothing is said.
const DEFAULT_DRAIN_TIMEOUT_MS: u64 = 500;
/// How much longer it waits for workers that are not given a CPU, if nothing is said.
const DEFAULT_STARVED_TIMEOUT_MS: u64 = 10_000;

/// Commands a running vhost-hotswap.
#[derive(Debug, Parser)]
#[command(name = "hotswapctl", version)]
struct Cli {
    /// The daemon's control socket, SOCKET-PATH.control if it was not told otherwise
    #[arg(long, value_name = "PATH")]
    control_path: PathBuf,

    /// Print what the daemon answers, as JSON on one line
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the state of the device
    Status,
    /// Replace the domain under the running guest
    Upgrade {
        /// The new domain: a name that the daemon looks up, or a path (with a `/`)
        #[arg(value_name = "NAME|PATH")]
        name: String,
        /// A parameter of the new domain; can be repeated
        #[arg(long = "param", value_name = "KEY=VALUE")]
        params: Vec<String>,
        /// Which protocol to use
        #[arg(long, default_value = "auto", value_parser = ["auto", "swap", "handover"])]
        mode: String,
        #[command(flatten)]
        limits: UpgradeLimits,
    },
    /// Go back to the previous domain
    Rollback {
        #[command(flatten)]
        limits: UpgradeLimits,
    },
    /// Show what has happened
    History,
    /// Show what happens, until interrupted
    Watch,
    /// End the daemon
    Shutdown,
}

#[derive(Debug, clap::Args)]
struct UpgradeLimits {
    /// How long the guest may wait for requests in flight [default: 500]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=600_000))]
    drain_timeout_ms: Option<u64>,
    /// How much longer to wait for workers that are not given a CPU [default: 10000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=600_000))]
    starved_timeout_ms: Option<u64>,
    /// Be refused, and do not wait, if an upgrade is running
    #[arg(long)]
    no_queue: bool,
}

impl UpgradeLimits {
    /// Says only what was asked for, so that the defaults are the daemon's.
    fn add_to(&self, params: &mut Map<String, Value>) {
        if let Some(milliseconds) = self.drain_timeout_ms {
            params.insert("drain_timeout_ms".to_owned(), milliseconds.into());
        }
        if let Some(milliseconds) = self.starved_timeout_ms {
            params.insert("starved_timeout_ms".to_owned(), milliseconds.into());
        }
        if self.no_queue {
            params.insert("when_busy".to_owned(), "refuse".into());
        }
    }

    fn answer_timeout(&self) -> Duration {
        let drain = self.drain_timeout_ms.unwrap_or(DEFAULT_DRAIN_TIMEOUT_MS);
        let starved = self.starved_timeout_ms.unwrap_or(DEFAULT_STARVED_TIMEOUT_MS);
        // A takeover may come first, and the one before may have to be let go of.
        4 * Duration::from_millis(drain + starved) + UPGRADE_TIMEOUT
    }
}

/// How an exchange with the daemon, or with standard output, ends early.
enum Stop {
    Failed(Failure),
    /// Whoever read our output has had enough: that is no failure.
    NobodyReads,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Stop::Failed(failure)
    }
}

impl From<io::Error> for Stop {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Stop::NobodyReads,
            _ => Stop::Failed(Failure::new(
                "output_failed",
                format!("cannot write to standard output: {e}"),
            )),
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let request = match Request::from_command(&cli.command) {
        Ok(request) => request,
        Err(sentence) => Cli::command().error(ErrorKind::ValueValidation, sentence).exit(),
    };
    match run(&cli, &request) {
        Ok(()) | Err(Stop::NobodyReads) => ExitCode::SUCCESS,
        Err(Stop::Failed(failure)) => {
            complain(&failure, cli.json);
            ExitCode::from(1)
        }
    }
}

/// What goes over the socket.
struct Request {
    method: &'static str,
    params: Map<String, Value>,
    answer_timeout: Duration,
}

impl Request {
    /// What a command asks of the daemon; a sentence if it cannot be asked.
    fn from_command(command: &Command) -> Result<Request, String> {
        let mut params = Map::new();
        let mut answer_timeout = ANSWER_TIMEOUT;
        let method = match command {
            Command::Status => "status",
            Command::History => "history",
            Command::Watch => "watch",
            Command::Shutdown => "shutdown",
            Command::Rollback { limits } => {
                limits.add_to(&mut params);
                answer_timeout = limits.answer_timeout();
                "rollback"
            }
            Command::Upgrade { name, params: pairs, mode, limits } => {
                params.insert("name".to_owned(), absolute(name)?.into());
                params.insert("params".to_owned(), pairs_to_object(pairs)?.into());
                params.insert("mode".to_owned(), mode.as_str().into());
                limits.add_to(&mut params);
                answer_timeout = limits.answer_timeout();
                "upgrade"
            }
        };
        Ok(Request { method, params, answer_timeout })
    }
}

/// A name as it is; a path as seen from everywhere, because the daemon lives in another directory.
fn absolute(name: &str) -> Result<String, String> {
    if name.is_empty() {
        return Err("the domain's name is empty; give a name, or a path with a `/`".to_owned());
    }
    if !name.contains('/') {
        return Ok(name.to_owned());
    }
    let path =
        std::path::absolute(name).map_err(|e| format!("cannot make {name} absolute: {e}"))?;
    path.into_os_string()
        .into_string()
        .map_err(|_| "the current directory's path is not UTF-8".to_owned())
}

fn pairs_to_object(pairs: &[String]) -> Result<Map<String, Value>, String> {
    let params = domain_abi::Params::from_pairs(pairs).map_err(|e| e.to_string())?;
    Ok(params.iter().map(|(key, value)| (key.to_owned(), value.into())).collect())
}

fn run(cli: &Cli, request: &Request) -> Result<(), Stop> {
    let mut client = Client::connect(&cli.control_path)?;
    let result = client.call(request.method, &request.params, request.answer_timeout)?;
    let mut out = io::stdout().lock();
    if matches!(cli.command, Command::Watch) {
        loop {
            let event = client.next_event()?;
            let line = if cli.json { event.to_string() } else { print::event(&event) };
            writeln!(out, "{line}")?;
            out.flush()?;
        }
    }
    let text = match cli.command {
        _ if cli.json => result.to_string(),
        Command::Status => print::status(&result),
        Command::Upgrade { .. } | Command::Rollback { .. } => print::upgrade(&result),
        Command::History => print::history(&result),
        Command::Watch | Command::Shutdown => "the daemon is shutting down".to_owned(),
    };
    if !text.is_empty() {
        writeln!(out, "{text}")?;
    }
    out.flush()?;
    Ok(())
}

/// Says what went wrong. Nothing can be done if that cannot be said either.
fn complain(failure: &Failure, json: bool) {
    let _ = writeln!(
        io::stderr(),
        "error: {} ({})",
        print::clean(&failure.message),
        print::clean(&failure.code)
    );
    if json {
        let mut error = json!({"code": failure.code, "message": failure.message});
        if let Some(data) = &failure.data {
            error["data"] = data.clone();
        }
        let _ = writeln!(io::stdout(), "{}", json!({"error": error}));
    }
}
