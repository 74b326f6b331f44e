//! The command line of `vhost-hotswap`.
//!
//! It follows QEMU's conventions for vhost-user backend programs (`--socket-path`, `--fd`,
//! `--blk-file`, `--read-only`, `--print-capabilities`) and adds what a replaceable domain needs.
//! What leaves this module is a [`Config`] in which everything that can be judged without touching
//! the system has been judged: nobody behind it sees `clap`, an option that contradicts another, or
//! a number out of range.
//!
//! Deliberately absent: whether files exist, whether a descriptor listens, and what a domain thinks
//! of its parameters. Those are found out by whoever uses them. The log level is `RUST_LOG` alone.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use domain_abi::Params;

use crate::cpus::{Cpus, worker_cpus};
use crate::limiter;
use crate::sandbox;
use crate::watching::Watching;
use channel::{MAX_QUEUE_SIZE, RateLimits};
use control::LimitArgs;
use control::SOCKET_PATH_MAX;
use control::messages::LimitRequest;
use supervisor::supervisor::Supervision;

/// What `--print-capabilities` prints: QEMU's vhost-user backend conventions, type `block`.
pub const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

/// The mode of a socket, if nothing else was said.
const SOCKET_MODE: u32 = 0o600;

/// The option that QEMU's conventions let win over all others, whatever they say.
const PRINT_CAPABILITIES: &str = "--print-capabilities";

/// A vhost-user block device for a virtual machine, whose implementation is replaced while the
/// guest runs.
///
/// Set RUST_LOG (error, warn, info, debug, trace) for more or fewer messages on standard error.
/// Upgrades are commanded by hotswapctl.
#[derive(Debug, Parser)]
#[command(name = "vhost-hotswap", version, allow_negative_numbers = true)]
pub struct Args {
    /// Listen for the frontend on this Unix socket
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    socket_path: Option<PathBuf>,

    /// Listen for the frontend on the socket that a systemd socket unit passes
    #[arg(long, conflicts_with_all = ["socket_path", "fd"])]
    socket_activation: bool,

    /// Give the socket of --socket-path this mode, in octal [default: 0600]
    #[arg(long, value_name = "MODE", value_parser = socket_mode)]
    socket_mode: Option<u32>,

    /// Give the socket of --socket-path to this group: a name or a number [default: the daemon's]
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,

    /// Listen for the frontend on this inherited, listening descriptor
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    fd: Option<RawFd>,

    /// Listen for hotswapctl here [default: SOCKET-PATH with ".control" appended]
    #[arg(long, value_name = "PATH")]
    control_path: Option<PathBuf>,

    /// The domain to begin with: a name, looked up as libdomain_NAME.so, or a path [default:
    /// ramdisk]
    #[arg(long, value_name = "NAME|PATH", conflicts_with = "blk_file")]
    domain: Option<String>,

    /// Where modules are looked up; can be repeated [default: beside the executable, then in
    /// ../lib/vhost-hotswap]
    #[arg(long = "domain-dir", value_name = "DIR")]
    domain_dirs: Vec<PathBuf>,

    /// Load only modules that this key has signed (MODULE.so.minisig): a public key of minisign, or
    /// a file that has one; can be repeated [default: load what nobody else can write to]
    #[arg(long = "trusted-key", value_name = "FILE|KEY")]
    trusted_keys: Vec<String>,

    /// A parameter of the domain; can be repeated
    #[arg(long = "param", value_name = "KEY=VALUE")]
    params: Vec<String>,

    /// Serve this file or block device: short for --domain file --param path=PATH
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,

    /// The disk's serial number, at most 20 bytes: short for --param serial=TEXT
    #[arg(long, value_name = "TEXT")]
    serial: Option<String>,

    /// Refuse writes: short for --param readonly=true, for the domain `file`
    #[arg(long)]
    read_only: bool,

    /// Number of request queues, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,

    /// Largest size of a queue: a power of two, 16 to 1024. It costs nothing that is not used
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUE_SIZE, value_parser = queue_size)]
    queue_size: u16,

    /// How long a worker polls before it sleeps, in microseconds, at most 1000000; twice that after
    /// several answers; 0 is not at all
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    poll_us: u32,

    /// Keep the worker of queue N on the Nth of these CPUs, and round again: a list like 2,4-7
    /// [default: anywhere]
    #[arg(long, value_name = "LIST", value_parser = worker_cpus)]
    worker_cpus: Option<Cpus>,

    #[command(flatten)]
    limits: LimitArgs,

    /// Serve from this process, which then can neither die nor be exchanged under the guest
    #[arg(long)]
    no_supervisor: bool,

    /// Have another server ready for when the one that serves dies
    #[arg(long, conflicts_with = "no_supervisor")]
    spare: bool,

    /// End a server whose workers have not moved for so many milliseconds [default: never]
    #[arg(long, value_name = "N", conflicts_with = "no_supervisor", value_parser = clap::value_parser!(u32).range(100..=3_600_000))]
    hang_timeout_ms: Option<u32>,

    #[command(flatten)]
    watching: Watching,

    /// Whether the process that serves confines itself to what it needs: files, system calls
    /// [default: off]
    #[arg(long, value_name = "MODE", value_enum)]
    sandbox: Option<sandbox::Mode>,

    /// Be the server of the supervisor at this inherited descriptor; all other options are ignored
    #[arg(long, value_name = "N", hide = true, value_parser = clap::value_parser!(RawFd).range(0..))]
    serve_channel: Option<RawFd>,

    /// Print what this backend can do, as JSON, and exit; all other options are ignored
    #[arg(long)]
    print_capabilities: bool,
}

/// Where the frontend is listened for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket of our own at this path.
    Path(PathBuf),
    /// An inherited descriptor, said to be a listening Unix socket. Nobody has looked yet.
    Fd(RawFd),
    /// What a service manager passes.
    Activated,
}

/// What the daemon is asked to be: the command line, checked and with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the frontend connects.
    pub listen: Listen,
    /// The mode of a socket of our own.
    pub socket_mode: u32,
    /// Its group, a name or a number, if it is to be another than the process's.
    pub socket_group: Option<String>,
    /// Where `hotswapctl` connects.
    pub control_path: PathBuf,
    /// The first domain: a name, or a path if it contains `/`.
    pub domain: String,
    /// Directories in which a name is looked up, in this order.
    pub domain_dirs: Vec<PathBuf>,
    /// Whose modules are loaded, and no others: keys, or files that have them.
    pub trusted_keys: Vec<String>,
    /// The first domain's parameters.
    pub params: Params,
    /// Number of request queues, 1 to 64.
    pub queues: u16,
    /// Largest queue size: a power of two, 16 to 1024.
    pub queue_size: u16,
    /// How long a worker polls before it sleeps, after one answer; twice that after several. Zero
    /// is not at all.
    pub poll: Duration,
    /// Which CPU each worker is kept on, in turn; none if empty.
    pub worker_cpus: Vec<usize>,
    /// How much the guest may do in a second, until `hotswapctl` says something else.
    pub limits: RateLimits,
    /// How a second process is to serve; none if this one does.
    pub supervision: Option<Supervision>,
    /// How the process that serves is confined.
    pub sandbox: sandbox::Mode,
    /// What is told to those who watch.
    pub watching: Watching,
}

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Serve a device.
    Serve(Box<Config>),
    /// Serve the device that is said at the private channel, which this descriptor is.
    ServeChannel(RawFd),
    /// Print [`CAPABILITIES`] and exit with 0.
    PrintCapabilities,
}

impl Args {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    /// What `clap` finds wrong, or this module; also `--help` and `--version`.
    /// [`clap::Error::exit`] does the right thing for each of them: status 2 after a usage error, 0
    /// otherwise.
    pub fn parse_from<T: Into<OsString>>(
        args: impl IntoIterator<Item = T>,
    ) -> Result<Invocation, clap::Error> {
        let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
        // Before anything else is looked at: the conventions say that all other options are
        // ignored, so not even a wrong one may fail.
        if args.iter().skip(1).any(|arg| arg == PRINT_CAPABILITIES) {
            return Ok(Invocation::PrintCapabilities);
        }
        let args = <Args as Parser>::try_parse_from(args)?;
        if let Some(fd) = args.serve_channel {
            return Ok(Invocation::ServeChannel(fd));
        }
        args.check()
            .map(|config| Invocation::Serve(Box::new(config)))
            .map_err(|sentence| Args::command().error(ErrorKind::ValueValidation, sentence))
    }

    /// Reads this process's command line; prints and exits where there is nothing to serve.
    #[must_use]
    pub fn from_command_line() -> Invocation {
        match Args::parse_from(std::env::args_os()) {
            Ok(Invocation::PrintCapabilities) => {
                use std::io::Write;
                let printed = writeln!(std::io::stdout(), "{CAPABILITIES}");
                std::process::exit(i32::from(printed.is_err()))
            }
            Ok(invocation) => invocation,
            Err(e) => e.exit(),
        }
    }

    /// The rules that concern more than one option.
    fn check(self) -> Result<Config, String> {
        let listen = match (self.socket_path, self.fd) {
            (Some(path), _) => Listen::Path(socket_path("--socket-path", path)?),
            (None, Some(fd)) => Listen::Fd(fd),
            (None, None) if self.socket_activation => Listen::Activated,
            (None, None) => {
                return Err("give --socket-path PATH or --fd N: where the frontend connects; \
                            or --socket-activation, with a systemd socket unit"
                    .into());
            }
        };
        let is_ours = matches!(listen, Listen::Path(_));
        if !is_ours && (self.socket_mode.is_some() || self.socket_group.is_some()) {
            return Err(
                "--socket-mode and --socket-group are for the socket of --socket-path; one \
                        that is passed has its own"
                    .into(),
            );
        }
        let control_path = match (self.control_path, &listen) {
            (Some(path), _) => socket_path("--control-path", path)?,
            (None, Listen::Path(socket)) => {
                let mut path = socket.clone().into_os_string();
                path.push(".control");
                socket_path("the control socket's default path", path.into())
                    .map_err(|sentence| format!("{sentence}, or give --control-path"))?
            }
            (None, Listen::Fd(_) | Listen::Activated) => {
                return Err("with --fd or --socket-activation there is no path to derive the control socket's from; \
                            give --control-path PATH as well"
                    .into());
            }
        };
        if listen == Listen::Path(control_path.clone()) {
            return Err("--socket-path and --control-path are the same; they must differ".into());
        }
        let mut params = Params::from_pairs(&self.params).map_err(|e| e.to_string())?;
        let domain = match (self.domain, &self.blk_file) {
            (Some(domain), _) => domain,
            (None, Some(_)) => "file".to_owned(),
            (None, None) => "ramdisk".to_owned(),
        };
        if domain.is_empty() {
            return Err("--domain is empty; give a name or a path".into());
        }
        if let Some(path) = &self.blk_file {
            let path = path.to_str().filter(|path| !path.is_empty());
            let path = path.ok_or("--blk-file must be a path, and valid UTF-8")?;
            set_once(&mut params, "path", path, "--blk-file")?;
        }
        if let Some(serial) = &self.serial {
            set_once(&mut params, "serial", serial, "--serial")?;
        }
        if self.read_only {
            if !is_file_domain(&domain) {
                return Err(format!(
                    "--read-only is for the domain `file`, not `{domain}`; leave it out, or give --blk-file PATH"
                ));
            }
            set_once(&mut params, "readonly", "true", "--read-only")?;
        }
        let supervision = (!self.no_supervisor).then(|| Supervision {
            has_spare: self.spare,
            hang_timeout: self.hang_timeout_ms.map(|ms| Duration::from_millis(ms.into())),
        });
        let sandbox = self.sandbox.unwrap_or_default();
        if sandbox != sandbox::Mode::Off && supervision.is_none() {
            return Err("--sandbox is for a process that serves beside a supervisor; leave \
                        --no-supervisor out, or give --sandbox=off"
                .into());
        }
        let limits = limiter::changed(RateLimits::default(), &LimitRequest::from(self.limits))?;
        Ok(Config {
            supervision,
            limits,
            watching: self.watching,
            sandbox,
            listen,
            socket_mode: self.socket_mode.unwrap_or(SOCKET_MODE),
            socket_group: self.socket_group,
            control_path,
            domain,
            domain_dirs: match self.domain_dirs {
                none if none.is_empty() => default_domain_dirs(),
                dirs => dirs,
            },
            trusted_keys: self.trusted_keys,
            params,
            queues: self.queues,
            queue_size: self.queue_size,
            poll: Duration::from_micros(u64::from(self.poll_us)),
            worker_cpus: self.worker_cpus.map(|Cpus(cpus)| cpus).unwrap_or_default(),
        })
    }
}

fn socket_path(option: &str, path: PathBuf) -> Result<PathBuf, String> {
    match path.as_os_str().as_bytes().len() {
        0 => Err(format!("{option} is empty; give a path")),
        1..=SOCKET_PATH_MAX => Ok(path),
        len => Err(format!(
            "{option} has {len} bytes, but a Unix socket's path has at most {SOCKET_PATH_MAX}; \
             choose a shorter one"
        )),
    }
}

fn set_once(params: &mut Params, key: &str, value: &str, option: &str) -> Result<(), String> {
    match params.set(key, value) {
        None => Ok(()),
        Some(_) => {
            Err(format!("{option} and --param {key}=... say the same thing; give one of them"))
        }
    }
}

/// Whether `domain`, a name or a path, is the domain `file` as far as its name can tell.
fn is_file_domain(domain: &str) -> bool {
    domain == "file"
        || domain.contains('/')
            && Path::new(domain).file_name().is_some_and(|name| name == "libdomain_file.so")
}

/// Everything but execution, which means nothing, and never less than the daemon's own user needs.
fn socket_mode(text: &str) -> Result<u32, &'static str> {
    let mode =
        u32::from_str_radix(text, 8).ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
    mode.filter(|mode| mode & !0o666 == 0 && mode & SOCKET_MODE == SOCKET_MODE).ok_or(
        "it must be octal, of reading and writing only, and let the owner do both: like 0660",
    )
}

fn queue_size(text: &str) -> Result<u16, &'static str> {
    let size = text
        .parse::<u16>()
        .ok()
        .filter(|size| size.is_power_of_two() && (16..=MAX_QUEUE_SIZE).contains(size));
    size.ok_or("it must be a power of two, 16 to 1024")
}

/// Beside the executable, then in the installed place relative to it. Nowhere if nobody knows where
/// that is: what lies in the directory that we happen to be in is not ours to run.
fn default_domain_dirs() -> Vec<PathBuf> {
    let exe = std::env::current_exe().ok();
    let dir = exe.as_deref().and_then(Path::parent);
    dir.map_or_else(Vec::new, |dir| vec![dir.to_owned(), dir.join("../lib/vhost-hotswap")])
}

#[cfg(test)]
mod tests;
