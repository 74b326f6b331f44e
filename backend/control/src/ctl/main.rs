//! `hotswapctl`: commands a running daemon through its control socket.
//!
//! One command, one request, one answer for people or, with `--json`, for programs. Exit status 0
//! is done, 1 is refused, failed or no daemon there, 2 is a command line that makes no sense.
//!
//! Invariant: a refusal is always a sentence on standard error, `error: MESSAGE (CODE)`, with and
//! without `--json`.
//!
//! It deliberately uses nothing of the daemon but its messages, and reads answers as whatever JSON
//! they are, so that it can command a daemon of another version. Nor does it know which domains or
//! parameters exist.

mod print;
mod top;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use control::client::{Client, Failure};
use control::messages::{
    CanaryParams, DEFAULT_DRAIN_TIMEOUT, DEFAULT_STARVED_TIMEOUT, LimitParams, MAX_CANARY,
    NoParams, Part, ResizeParams, RollbackParams, UpgradeDaemonParams, UpgradeMode, UpgradeParams,
    WhenBusy,
};
use control::{Code, LimitArgs};
use serde::Serialize;
use serde_json::{Value, json};

/// How long a question may take to be answered.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an upgrade may take beyond its drain: it may have to wait for another, and for slow
/// storage.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(120);

/// Commands a running vhost-hotswap.
#[derive(Debug, Parser)]
#[command(name = "hotswapctl", version)]
pub struct Cli {
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
    /// Say whether a module would be accepted by an upgrade, and change nothing
    Check {
        #[command(flatten)]
        module: Module,
        /// Be refused, and do not wait, if an upgrade is running
        #[arg(long)]
        no_queue: bool,
    },
    /// Replace the domain under the running guest
    Upgrade {
        #[command(flatten)]
        module: Module,
        #[command(flatten)]
        limits: UpgradeLimits,
        #[command(flatten)]
        canary: CanaryArgs,
    },
    /// Go back to the previous domain
    Rollback {
        #[command(flatten)]
        limits: UpgradeLimits,
    },
    /// Replace the daemon's program under the running guest
    UpgradeDaemon {
        /// The new program [default: the one that runs, as it lies on disk now]
        #[arg(value_name = "PATH")]
        path: Option<PathBuf>,
        /// Replace only what serves the guest, or only what holds the connections
        #[arg(long, value_name = "PART", value_parser = PossibleValuesParser::new(["server", "supervisor"]).try_map(|word| part(&word)))]
        only: Option<Part>,
    },
    /// Make the disk larger under the running guest
    Resize {
        /// Bytes that it is to have, with K, M, G or T for powers of 1024
        #[arg(value_name = "SIZE", value_parser = size)]
        size: u64,
        /// Be refused, and do not wait, if an upgrade is running
        #[arg(long)]
        no_queue: bool,
    },
    /// Limit what the guest may do in a second; show the limits, if nothing is said
    Limit {
        #[command(flatten)]
        limits: LimitArgs,
        /// Forget all limits, but for those that are given
        #[arg(long)]
        off: bool,
    },
    /// Show what has happened
    History,
    /// Show what happens, until interrupted
    Watch,
    /// Print the page of metrics, as Prometheus reads it
    Metrics,
    /// Show rates, latencies and the last changes, again and again, until `q`; with --json, a line
    /// for each interval
    Top {
        /// How often
        #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(50..=3_600_000))]
        interval_ms: u64,
    },
    /// End the daemon
    Shutdown,
}

/// What is to be loaded, and how.
#[derive(Debug, clap::Args)]
struct Module {
    /// The new domain: a name that the daemon looks up, or a path (with a `/`)
    #[arg(value_name = "NAME|PATH")]
    name: String,
    /// A parameter of the new domain; can be repeated
    #[arg(long = "param", value_name = "KEY=VALUE")]
    params: Vec<String>,
    /// Which protocol to use
    #[arg(long, default_value = "auto", value_parser = PossibleValuesParser::new(["auto", "swap", "handover"]).try_map(|word| mode(&word)))]
    mode: UpgradeMode,
}

impl Module {
    fn params(&self) -> Result<UpgradeParams, String> {
        let (name, params) = (absolute(&self.name)?, pairs_to_map(&self.params)?);
        Ok(UpgradeParams { name, params, mode: self.mode, ..UpgradeParams::default() })
    }
}

/// How the new domain is tried.
#[derive(Debug, clap::Args)]
struct CanaryArgs {
    /// Watch the new domain for so long, and take it back if it fails requests or is too slow
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=MAX_CANARY.as_secs()))]
    canary: Option<u64>,
    /// How many requests may end with I/O errors that the domain before would not have made
    /// [default: 0]
    #[arg(long, value_name = "N", requires = "canary")]
    max_errors: Option<u64>,
    /// How many times that of the domain before its 99th percentile of latency may be [default: 2]
    #[arg(long, value_name = "R", requires = "canary")]
    max_latency_ratio: Option<f64>,
}

impl CanaryArgs {
    fn params(&self) -> Option<CanaryParams> {
        let Self { canary, max_errors, max_latency_ratio } = *self;
        canary.map(|seconds| CanaryParams { seconds, max_errors, max_latency_ratio })
    }

    /// How much longer the answer takes: before it as long as after it, and then a way back.
    fn answer_timeout(&self) -> Duration {
        self.canary.map_or(Duration::ZERO, |seconds| 2 * Duration::from_secs(seconds))
    }
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
    /// Says only what was asked for, so that the default is the daemon's.
    fn when_busy(&self) -> Option<WhenBusy> {
        self.no_queue.then_some(WhenBusy::Refuse)
    }

    fn answer_timeout(&self) -> Duration {
        let or = |milliseconds: Option<u64>, default| {
            milliseconds.map_or(default, Duration::from_millis)
        };
        let drain = or(self.drain_timeout_ms, DEFAULT_DRAIN_TIMEOUT);
        let starved = or(self.starved_timeout_ms, DEFAULT_STARVED_TIMEOUT);
        // A takeover may come first, and the one before may have to be let go of.
        4 * (drain + starved) + UPGRADE_TIMEOUT
    }
}

/// How an exchange with the daemon, or with standard output, ends early.
enum Stop {
    Failed(Failure),
    /// The reader of our output has had enough: that is no failure.
    OutputClosed,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Stop::Failed(failure)
    }
}

impl From<io::Error> for Stop {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Stop::OutputClosed,
            _ => Stop::Failed(Failure::new(
                Code::OutputFailed,
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
        Ok(()) | Err(Stop::OutputClosed) => ExitCode::SUCCESS,
        Err(Stop::Failed(failure)) => {
            complain(&failure, cli.json);
            ExitCode::from(1)
        }
    }
}

/// What goes over the socket.
struct Request {
    method: &'static str,
    params: Value,
    answer_timeout: Duration,
}

impl Request {
    /// What a command asks of the daemon; a sentence if it cannot be asked.
    fn from_command(command: &Command) -> Result<Request, String> {
        let plain = |method| Request::new(method, &NoParams::default(), ANSWER_TIMEOUT);
        Ok(match command {
            Command::Status => plain("status"),
            Command::History => plain("history"),
            Command::Watch => plain("watch"),
            Command::Metrics => plain("metrics"),
            Command::Top { .. } => plain("status"),
            Command::Shutdown => plain("shutdown"),
            Command::Rollback { limits } => {
                let params = RollbackParams {
                    device: None,
                    drain_timeout_ms: limits.drain_timeout_ms,
                    starved_timeout_ms: limits.starved_timeout_ms,
                    when_busy: limits.when_busy(),
                };
                Request::new("rollback", &params, limits.answer_timeout())
            }
            Command::UpgradeDaemon { path, only } => {
                let path = path.as_deref().map(absolute_path).transpose()?;
                let params = UpgradeDaemonParams { device: None, path, only: *only };
                Request::new("upgrade_daemon", &params, UPGRADE_TIMEOUT)
            }
            Command::Resize { size, no_queue } => {
                let when_busy = no_queue.then_some(WhenBusy::Refuse);
                let params = ResizeParams { device: None, size: *size, when_busy };
                Request::new("resize", &params, UPGRADE_TIMEOUT)
            }
            Command::Check { module, no_queue } => {
                let when_busy = no_queue.then_some(WhenBusy::Refuse);
                let params = UpgradeParams { when_busy, ..module.params()? };
                Request::new("check", &params, UPGRADE_TIMEOUT)
            }
            Command::Limit { limits, off } => {
                let LimitArgs { iops, iops_burst, bandwidth, bandwidth_burst } = *limits;
                let (device, off) = (None, *off);
                let params =
                    LimitParams { device, off, iops, iops_burst, bandwidth, bandwidth_burst };
                Request::new("limit", &params, ANSWER_TIMEOUT)
            }
            Command::Upgrade { module, limits, canary } => {
                let params = UpgradeParams {
                    drain_timeout_ms: limits.drain_timeout_ms,
                    starved_timeout_ms: limits.starved_timeout_ms,
                    when_busy: limits.when_busy(),
                    canary: canary.params(),
                    ..module.params()?
                };
                canary.params().map(CanaryParams::check).transpose()?;
                let timeout = limits.answer_timeout() + canary.answer_timeout();
                Request::new("upgrade", &params, timeout)
            }
        })
    }

    fn new(method: &'static str, params: &impl Serialize, answer_timeout: Duration) -> Request {
        let params = serde_json::to_value(params).expect("strings and numbers are JSON");
        Request { method, params, answer_timeout }
    }
}

/// What `resize` takes.
fn size(text: &str) -> Result<u64, String> {
    domain_abi::parse_size(text)
        .filter(|&size| size > 0)
        .ok_or_else(|| "a number of bytes, with K, M, G or T for powers of 1024".to_owned())
}

/// What `--mode` takes.
fn mode(word: &str) -> Result<UpgradeMode, String> {
    serde_json::from_value(word.into()).map_err(|e| e.to_string())
}

/// What `--only` takes.
fn part(word: &str) -> Result<Part, String> {
    serde_json::from_value(word.into()).map_err(|e| e.to_string())
}

/// A name as it is; a path as seen from everywhere, because the daemon lives in another directory.
fn absolute(name: &str) -> Result<String, String> {
    if name.is_empty() {
        return Err("the domain's name is empty; give a name, or a path with a `/`".to_owned());
    }
    if !name.contains('/') {
        return Ok(name.to_owned());
    }
    absolute_path(Path::new(name))
}

fn absolute_path(path: &Path) -> Result<String, String> {
    let path = std::path::absolute(path)
        .map_err(|e| format!("cannot make {} absolute: {e}", path.display()))?;
    path.into_os_string().into_string().map_err(|_| "the path is not UTF-8".to_owned())
}

fn pairs_to_map(pairs: &[String]) -> Result<BTreeMap<String, String>, String> {
    let params = domain_abi::Params::from_pairs(pairs).map_err(|e| e.to_string())?;
    Ok(params.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

fn run(cli: &Cli, request: &Request) -> Result<(), Stop> {
    if let Command::Top { interval_ms } = cli.command {
        let show = if cli.json { top::print } else { top::run };
        return show(&cli.control_path, Duration::from_millis(interval_ms));
    }
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
        Command::UpgradeDaemon { .. } => print::upgrade_daemon(&result),
        Command::Resize { .. } => print::resize(&result),
        Command::Check { .. } => print::check(&result),
        Command::Limit { .. } => print::limit(&result),
        Command::History => print::history(&result),
        Command::Metrics => result["text"].as_str().unwrap_or_default().trim_end().to_owned(),
        Command::Watch | Command::Top { .. } | Command::Shutdown => {
            "the daemon is shutting down".to_owned()
        }
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
