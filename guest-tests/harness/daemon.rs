//! Starts the daemon under test and speaks to it: as an operator through `hotswapctl`, and by hand.
//!
//! Every wait here has an end, and every failure carries the daemon's log, because "it hung" from a
//! test on another machine is worth nothing. What is started is what is shipped: the release build
//! that `scripts/build` leaves, or the one in `HOTSWAP_BIN_DIR`.

mod control;
mod deaths;
mod process;

use crate::PATIENCE;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::control::COMMAND_LIMIT;
pub use self::control::{Control, RpcError};
pub use self::process::{Held, Process};

/// What a command left behind.
#[derive(Clone, Debug)]
pub struct CtlOutput {
    /// Exit status; -1 when a signal ended it.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A new directory on a disk, where direct I/O works: beside the binaries.
pub fn disk_directory() -> TempDir {
    let bin = binary("vhost-hotswap");
    tempfile::tempdir_in(bin.parent().expect("a directory with binaries"))
        .expect("a temporary directory")
}

/// A running daemon in a directory of its own; it is killed when this is dropped.
pub struct Daemon {
    child: Child,
    directory: TempDir,
    socket: PathBuf,
    control: PathBuf,
    args: Vec<String>,
}

impl Daemon {
    /// Starts `vhost-hotswap ARGS` and waits until its control socket answers `status`.
    ///
    /// Panics with the daemon's log when it does not come up.
    pub fn start(args: &[&str]) -> Daemon {
        Daemon::spawn(Command::new(binary("vhost-hotswap")), args, None)
    }

    /// As [`start`](Self::start), under a shell's `ulimit LIMIT`.
    pub fn start_with_ulimit(limit: &str, args: &[&str]) -> Daemon {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("ulimit {limit} && exec \"$0\" \"$@\""))
            .arg(binary("vhost-hotswap"));
        Daemon::start_command(command, args)
    }

    /// As [`start`](Self::start), by a command that ends in what is given to it: the daemon's path
    /// and arguments.
    pub fn start_command(command: Command, args: &[&str]) -> Daemon {
        Daemon::spawn(command, args, None)
    }

    /// As [`start_command`](Self::start_command), with a log that goes there.
    pub fn start_command_with_stderr(command: Command, stderr: Stdio, args: &[&str]) -> Daemon {
        Daemon::spawn(command, args, Some(stderr))
    }

    /// As [`start`](Self::start), with a log that goes there.
    pub fn start_with_stderr(stderr: Stdio, args: &[&str]) -> Daemon {
        Daemon::spawn(Command::new(binary("vhost-hotswap")), args, Some(stderr))
    }

    fn spawn(mut command: Command, args: &[&str], stderr: Option<Stdio>) -> Daemon {
        let directory = tempfile::Builder::new()
            .prefix("hotswap-test-")
            .tempdir()
            .expect("a temporary directory");
        let socket = directory.path().join("vhost.sock");
        // The default of the daemon, unless the test says something else.
        let control = match args.iter().position(|&arg| arg == "--control-path") {
            Some(at) => PathBuf::from(args[at + 1]),
            None => directory.path().join("vhost.sock.control"),
        };
        command.arg("--socket-path").arg(&socket);
        let child = launch(command, args, &directory.path().join("log"), stderr);
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        let mut daemon = Daemon { child, directory, socket, control, args };
        daemon.wait_until_it_answers();
        daemon
    }

    /// Starts it again, as it was started, after its [end](Self::stop).
    ///
    /// The image of one that was killed is locked until the kernel has ended all that it did there.
    pub fn start_again(&mut self) {
        if let Some(at) = self.args.iter().position(|arg| arg == "--blk-file") {
            let image = fs::metadata(&self.args[at + 1]).expect("the image is there");
            let inode = format!(":{} ", image.ino());
            let deadline = Instant::now() + PATIENCE;
            while fs::read_to_string("/proc/locks").expect("Linux").contains(&inode) {
                assert!(Instant::now() < deadline, "the image stays locked");
                thread::sleep(Duration::from_millis(5));
            }
        }
        self.start_again_by(Command::new(binary("vhost-hotswap")));
    }

    /// As [`start_again`](Self::start_again), by a command that ends in what is given to it.
    pub fn start_again_by(&mut self, mut command: Command) {
        command.arg("--socket-path").arg(&self.socket);
        self.child = launch(command, &self.args, &self.directory.path().join("log"), None);
        self.wait_until_it_answers();
    }

    fn wait_until_it_answers(&mut self) {
        let args = &self.args;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                panic!("vhost-hotswap {args:?} ended with {status}:\n{}", self.log());
            }
            if let Ok(mut control) = Control::connect(&self.control)
                && control.request("status", json!({})).is_ok()
            {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "vhost-hotswap {args:?} does not answer:\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// A directory that lasts as long as the daemon.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What the daemon has written so far.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.directory.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The id of the process that serves the rings: the daemon's own, or its server's.
    pub fn server_pid(&self) -> u32 {
        let status = self.status();
        let pid = status["server"]["pid"].as_u64().and_then(|pid| pid.try_into().ok());
        pid.unwrap_or_else(|| self.pid())
    }

    /// A new connection to the control socket.
    pub fn rpc(&self) -> Control {
        Control::connect(&self.control)
            .unwrap_or_else(|e| panic!("control socket: {e}\n{}", self.log()))
    }

    /// Runs `hotswapctl --json ARGS` against this daemon.
    pub fn ctl(&self, args: &[&str]) -> CtlOutput {
        let mut command = Command::new(binary("hotswapctl"));
        command.arg("--control-path").arg(&self.control).arg("--json").args(args);
        run(&mut command)
            .unwrap_or_else(|| panic!("hotswapctl {args:?} hangs; daemon:\n{}", self.log()))
    }

    /// A command that must succeed; its JSON reply.
    pub fn call(&self, args: &[&str]) -> Value {
        let output = self.ctl(args);
        assert_eq!(
            output.status,
            0,
            "hotswapctl {args:?}: {}\ndaemon:\n{}",
            output.stderr,
            self.log()
        );
        serde_json::from_str(&output.stdout).unwrap_or_else(|e| {
            panic!("hotswapctl {args:?} printed no JSON ({e}): {}", output.stdout)
        })
    }

    /// A command that must be refused (exit 1); the sentence on standard error.
    pub fn refuse(&self, args: &[&str]) -> String {
        let output = self.ctl(args);
        assert_eq!(output.status, 1, "hotswapctl {args:?}: {output:?}\ndaemon:\n{}", self.log());
        let sentence = output.stderr.trim().to_owned();
        assert!(!sentence.is_empty(), "hotswapctl {args:?} was refused without a word");
        sentence
    }

    /// The daemon's status.
    pub fn status(&self) -> Value {
        self.call(&["status"])
    }

    /// The process that serves the rings, as it is now.
    pub fn server(&self) -> Process {
        Process { pid: self.server_pid() }
    }

    /// Number of open file descriptors of the process that serves.
    pub fn open_fds(&self) -> usize {
        self.server().open_fds()
    }

    /// Resident memory of the process that serves, in KiB.
    pub fn rss_kib(&self) -> u64 {
        self.server().rss_kib()
    }

    /// See [`Process::memory_kib`], of the process that serves.
    pub fn memory_kib(&self, file: &str, field: &str) -> u64 {
        self.server().memory_kib(file, field)
    }

    /// Sends SIGTERM and waits for the end, at most 10 s: the exit code, and how long it took.
    ///
    /// The directory stays, so that the caller can see what was left in it.
    pub fn stop(&mut self) -> (i32, Duration) {
        self.stop_with(Signal::TERM)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the daemon lives");
    }

    /// Kills all that there is of it at once, as a loss of power does, and does not wait for its
    /// end: that waits for its storage.
    pub fn kill_whole(&self) {
        let server = Pid::from_raw(self.server_pid() as i32).expect("a process");
        if server != Pid::from_child(&self.child) {
            // What stands beside the server is not to start another one.
            self.signal(Signal::STOP);
            kill_process(server, Signal::KILL).expect("the server lives");
        }
        self.signal(Signal::KILL);
    }

    /// As [`stop`](Self::stop), with another signal. SIGKILL is for [all](Self::kill_whole) of it.
    pub fn stop_with(&mut self, signal: Signal) -> (i32, Duration) {
        let started = Instant::now();
        if signal == Signal::KILL {
            self.kill_whole();
        } else {
            self.signal(signal);
        }
        loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                return (status.code().unwrap_or(-1), started.elapsed());
            }
            if started.elapsed() > PATIENCE {
                panic!("vhost-hotswap ignores {signal:?}:\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends SIGTERM, waits for the end (less than 10 s) and returns the exit code.
    pub fn terminate(mut self) -> i32 {
        self.stop().0
    }
}

impl Daemon {
    /// What it says of itself where a test has failed: without a panic, and soon.
    fn last_status(&self) -> String {
        let mut command = Command::new(binary("hotswapctl"));
        command.arg("--control-path").arg(&self.control).args(["--json", "status"]);
        let asked =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let Ok(mut asked) = asked else { return String::new() };
        let deadline = Instant::now() + Duration::from_secs(3);
        while asked.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let _ = asked.kill();
        let said = asked.wait_with_output().map(|output| output.stdout).unwrap_or_default();
        String::from_utf8_lossy(&said).into_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- the daemon's status ---\n{}", self.last_status());
        }
        // Both fail only when it has already been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- the daemon's log, last lines ---\n{}", last_lines(&self.log(), 40));
        }
    }
}

fn launch(
    mut command: Command,
    args: &[impl AsRef<std::ffi::OsStr>],
    log: &Path,
    stderr: Option<Stdio>,
) -> Child {
    let log = File::options().create(true).append(true).open(log).expect("a log file");
    // So that a whole suite can be run with another option.
    let more = std::env::var("HOTSWAP_DAEMON_ARGS").unwrap_or_default();
    command
        .args(args)
        .args(more.split_whitespace())
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("another handle of the log"))
        .stderr(stderr.unwrap_or_else(|| log.into()))
        .spawn()
        .expect("vhost-hotswap can be started")
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Runs `vhost-hotswap ARGS`, which must end by itself, for bad command lines.
///
/// Panics when it is still running after 10 s: it then has accepted what it should not.
pub fn run_daemon(args: &[&str]) -> CtlOutput {
    let mut command = Command::new(binary("vhost-hotswap"));
    command.args(args);
    run_for(&mut command, PATIENCE)
        .unwrap_or_else(|| panic!("vhost-hotswap {args:?} runs, but should have been refused"))
}

/// Runs `hotswapctl ARGS` as they are, without a control path.
pub fn run_ctl(args: &[&str]) -> CtlOutput {
    let mut command = Command::new(binary("hotswapctl"));
    command.args(args);
    run(&mut command).unwrap_or_else(|| panic!("hotswapctl {args:?} hangs"))
}

fn run(command: &mut Command) -> Option<CtlOutput> {
    run_for(command, COMMAND_LIMIT)
}

/// Runs a command to its end; `None`, and the command killed, when `limit` has passed.
pub(crate) fn run_for(command: &mut Command, limit: Duration) -> Option<CtlOutput> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the command can be started");
    let stdout = collect(child.stdout.take().expect("a pipe"));
    let stderr = collect(child.stderr.take().expect("a pipe"));
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("the child can be waited for") {
            break status;
        }
        if started.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        thread::sleep(Duration::from_micros(500));
    };
    let text = |reader: thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&reader.join().expect("the reader does not panic")).into_owned()
    };
    Some(CtlOutput {
        status: status.code().unwrap_or(-1),
        stdout: text(stdout),
        stderr: text(stderr),
    })
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// A binary of the product: `vhost-hotswap` or `hotswapctl`.
pub fn binary(name: &str) -> PathBuf {
    product(name)
}

/// The module of domain `name`.
pub fn module(name: &str) -> PathBuf {
    product(&format!("libdomain_{name}.so"))
}

fn product(file: &str) -> PathBuf {
    let directory = match std::env::var_os("HOTSWAP_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release"),
    };
    let path = directory.join(file);
    assert!(path.is_file(), "{} is missing: run scripts/build first", path.display());
    path
}

/// The first bytes of a module's descriptor, ELF section `.hotswap.domain`.
const DESCRIPTOR_MAGIC: &[u8; 16] = b"vhost-hotswap\0\0\0";
/// Where the descriptor says its ABI version, a little-endian `u32`.
const DESCRIPTOR_ABI: usize = 20;

/// A copy of the ramdisk module in `directory` whose descriptor claims an ABI from the future.
pub fn module_with_wrong_abi(directory: &Path) -> PathBuf {
    let mut bytes = fs::read(module("ramdisk")).expect("the module can be read");
    let places: Vec<usize> = bytes
        .windows(DESCRIPTOR_MAGIC.len())
        .enumerate()
        .filter_map(|(at, window)| (window == DESCRIPTOR_MAGIC).then_some(at))
        // The module may hold the magic a second time, as the constant it was made from.
        .filter(|at| {
            bytes.get(at + 16..at + 20).is_some_and(|size| (24..65536).contains(&le32(size)))
        })
        .collect();
    assert!(!places.is_empty(), "the ramdisk module has no descriptor");
    for at in places {
        let field = at + DESCRIPTOR_ABI;
        let version = le32(&bytes[field..field + 4]);
        bytes[field..field + 4].copy_from_slice(&(version + 1000).to_le_bytes());
    }
    let path = directory.join("libdomain_wrong_abi.so");
    fs::write(&path, bytes).expect("the copy can be written");
    path
}

fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}
