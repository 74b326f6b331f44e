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
use control::SOCKET_PATH_MAX;
use supervisor::supervisor::Supervision;

/// What `--print-capabilities` prints: QEMU's vhost-user backend conventions, type `block`.
pub const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

/// The largest queue size: as large as QEMU makes them.
pub const MAX_QUEUE_SIZE: u16 = 1024;

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

    /// Where modules are looked up [default: beside the executable, then in ../lib/vhost-hotswap]
    #[arg(long, value_name = "DIR")]
    domain_dir: Option<PathBuf>,

    /// A parameter of the domain; can be repeated
    #[arg(long = "param", value_name = "KEY=VALUE")]
    params: Vec<String>,

    /// Serve this file or block device: short for --domain file --param path=PATH
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,

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

    /// Serve from this process, which then can neither die nor be exchanged under the guest
    #[arg(long)]
    no_supervisor: bool,

    /// Have another server ready for when the one that serves dies
    #[arg(long, conflicts_with = "no_supervisor")]
    spare: bool,

    /// End a server whose workers have not moved for so many milliseconds [default: never]
    #[arg(long, value_name = "N", conflicts_with = "no_supervisor", value_parser = clap::value_parser!(u32).range(100..=3_600_000))]
    hang_timeout_ms: Option<u32>,

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
}

/// What the daemon is asked to be: the command line, checked and with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the frontend connects.
    pub listen: Listen,
    /// Where `hotswapctl` connects.
    pub control_path: PathBuf,
    /// The first domain: a name, or a path if it contains `/`.
    pub domain: String,
    /// Directories in which a name is looked up, in this order.
    pub domain_dirs: Vec<PathBuf>,
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
    /// How a second process is to serve; none if this one does.
    pub supervision: Option<Supervision>,
}

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Serve a device.
    Serve(Config),
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
            .map(Invocation::Serve)
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
            (None, None) => {
                return Err("give --socket-path PATH or --fd N: where the frontend connects".into());
            }
        };
        let control_path = match (self.control_path, &listen) {
            (Some(path), _) => socket_path("--control-path", path)?,
            (None, Listen::Path(socket)) => {
                let mut path = socket.clone().into_os_string();
                path.push(".control");
                socket_path("the control socket's default path", path.into())
                    .map_err(|sentence| format!("{sentence}, or give --control-path"))?
            }
            (None, Listen::Fd(_)) => {
                return Err("with --fd there is no path to derive the control socket's from; \
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
        Ok(Config {
            supervision,
            listen,
            control_path,
            domain,
            domain_dirs: self.domain_dir.map_or_else(default_domain_dirs, |dir| vec![dir]),
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
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Invocation, clap::Error> {
        Args::parse_from(std::iter::once("vhost-hotswap").chain(line.split_whitespace()))
    }

    fn config(line: &str) -> Config {
        match parse(line) {
            Ok(Invocation::Serve(config)) => config,
            other => panic!("{line}: {other:?}"),
        }
    }

    /// The sentence of a refused line, after checking that it exits with 2.
    fn refusal(line: &str) -> String {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
        error.to_string()
    }

    #[test]
    fn clap_agrees_with_the_definition() {
        Args::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let config = config("--socket-path /run/vm.sock");
        assert_eq!(config.listen, Listen::Path("/run/vm.sock".into()));
        assert_eq!(config.control_path, Path::new("/run/vm.sock.control"));
        assert_eq!((config.domain.as_str(), config.params), ("ramdisk", Params::default()));
        assert_eq!(
            (config.queues, config.queue_size, config.poll),
            (1, 1024, Duration::from_micros(50))
        );
        let exe = std::env::current_exe().unwrap();
        let beside = exe.parent().unwrap();
        assert_eq!(config.domain_dirs, [beside.to_owned(), beside.join("../lib/vhost-hotswap")]);
    }

    #[test]
    fn everything_given() {
        let config = config(
            "--fd 7 --control-path c --domain ./x.so --domain-dir d --param size=1M --param serial=a=b \
             --queues 64 --queue-size 1024 --poll-us 1000000 --worker-cpus 3,0-1",
        );
        assert_eq!(config.worker_cpus, [3, 0, 1]);
        assert_eq!((config.listen, config.control_path), (Listen::Fd(7), "c".into()));
        assert_eq!((config.domain.as_str(), config.domain_dirs), ("./x.so", vec!["d".into()]));
        assert_eq!(config.params, Params::from_pairs(["size=1M", "serial=a=b"]).unwrap());
        assert_eq!(
            (config.queues, config.queue_size, config.poll),
            (64, 1024, Duration::from_secs(1))
        );
    }

    #[test]
    fn exactly_one_place_to_listen() {
        assert!(refusal("").contains("give --socket-path PATH or --fd N"));
        assert!(refusal("--socket-path s --fd 3 --control-path c").contains("cannot be used with"));
        assert!(refusal("--fd -1 --control-path c").contains("--fd"));
        assert!(refusal("--fd x --control-path c").contains("--fd"));
        assert!(refusal("--fd 3").contains("give --control-path PATH"));
        assert!(refusal("--socket-path s --socket-path t").contains("multiple times"));
        assert!(refusal("--socket-path s stray").contains("stray"));
    }

    #[test]
    fn socket_paths_are_usable() {
        let long = "x".repeat(SOCKET_PATH_MAX);
        assert!(refusal(&format!("--socket-path {long}x")).contains("at most 107"));
        assert!(refusal(&format!("--socket-path {long}")).contains("or give --control-path"));
        assert_eq!(
            config(&format!("--socket-path {long} --control-path c")).listen,
            Listen::Path(long.into())
        );
        assert!(refusal("--socket-path s --control-path s").contains("must differ"));
        let empty = Args::parse_from(["vhost-hotswap", "--socket-path", ""]).unwrap_err();
        assert_eq!(empty.exit_code(), 2);
    }

    #[test]
    fn params_are_pairs_and_come_once() {
        assert!(refusal("--socket-path s --param size").contains("KEY=VALUE"));
        assert!(refusal("--socket-path s --param =1").contains("KEY=VALUE"));
        assert!(refusal("--socket-path s --param a=1 --param a=1").contains("given twice"));
    }

    #[test]
    fn blk_file_is_short_for_the_file_domain() {
        let config = config("--socket-path s --blk-file /img --param direct=true --read-only");
        assert_eq!(config.domain, "file");
        assert_eq!(
            config.params,
            Params::from_pairs(["path=/img", "direct=true", "readonly=true"]).unwrap()
        );
        assert!(
            refusal("--socket-path s --blk-file f --domain file").contains("cannot be used with")
        );
        assert!(
            refusal("--socket-path s --blk-file f --domain ramdisk")
                .contains("cannot be used with")
        );
        assert!(refusal("--socket-path s --blk-file f --param path=g").contains("--param path="));
        let empty = Args::parse_from(["vhost-hotswap", "--socket-path", "s", "--blk-file", ""])
            .unwrap_err();
        assert_eq!(empty.exit_code(), 2);
    }

    #[test]
    fn read_only_is_for_the_file_domain() {
        for domain in ["file", "./libdomain_file.so"] {
            let config = config(&format!("--socket-path s --domain {domain} --read-only"));
            assert_eq!(config.params.get("readonly"), Some("true"));
        }
        assert!(refusal("--socket-path s --read-only").contains("not `ramdisk`"));
        assert!(refusal("--socket-path s --domain empty --read-only").contains("not `empty`"));
        assert!(
            refusal("--socket-path s --blk-file f --read-only --param readonly=false")
                .contains("readonly=")
        );
    }

    #[test]
    fn an_empty_domain_is_refused() {
        let empty =
            Args::parse_from(["vhost-hotswap", "--socket-path", "s", "--domain", ""]).unwrap_err();
        assert_eq!(empty.exit_code(), 2);
    }

    #[test]
    fn numbers_have_ranges() {
        for bad in ["--queues 0", "--queues 65", "--queues x", "--poll-us 1000001", "--poll-us -1"]
        {
            refusal(&format!("--socket-path s {bad}"));
        }
        for bad in ["0", "8", "100", "2048", "65536", "-16", "16.0"] {
            let sentence = refusal(&format!("--socket-path s --queue-size {bad}"));
            assert!(sentence.contains("--queue-size"), "{bad}: {sentence}");
        }
        assert_eq!(config("--socket-path s --queue-size 16").queue_size, 16);
    }

    #[test]
    fn cpus_are_a_list() {
        for bad in ["", "x", "-1", "1-", "3-2", "1024", "0,", "0-99999999999"] {
            refusal(&format!("--socket-path s --worker-cpus={bad}"));
        }
    }

    #[test]
    fn capabilities_win_over_everything() {
        for line in ["--print-capabilities", "--fd x --print-capabilities --no-such-option"] {
            assert_eq!(parse(line).unwrap(), Invocation::PrintCapabilities, "{line}");
        }
        let capabilities: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
        assert_eq!(
            capabilities,
            serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]})
        );
    }

    #[test]
    fn help_and_version_are_no_errors() {
        assert_eq!(parse("--help").unwrap_err().exit_code(), 0);
        assert_eq!(parse("--version").unwrap_err().exit_code(), 0);
    }
}
