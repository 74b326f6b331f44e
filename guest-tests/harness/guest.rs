//! A real Linux guest under QEMU, to do I/O in and to run commands in while its disk is upgraded.
//!
//! [`Guest::boot`] starts QEMU with the kernel and initramfs of [`crate::initramfs`] and comes back
//! when the guest's agent answers. Commands then go over a virtio-serial port, machine commands
//! over QMP, and the kernel's console into a file whose end is part of every error.
//!
//! Invariants: every wait has a deadline; a guest that panics or a QEMU that exits ends a wait at
//! once; QEMU dies with its [`Guest`]; and at most one guest runs at a time per target directory,
//! because two on a small machine would only make each other's deadlines pass. So a test that boots
//! a second guest before it drops the first would wait for itself for ever.
//!
//! It knows a vhost-user socket, but not who listens there: nothing in here is about upgrades.

mod agent;
mod cpr;
pub mod fio;
mod migration;
mod options;
mod qmp;
mod start;

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use self::agent::Output;
use self::agent::{Agent, Ticket};
pub use self::cpr::Cpr;
pub use self::migration::Destination;
pub use self::options::GuestOptions;
use self::qmp::Qmp;
pub use self::start::Launch;
use crate::debian::Debian;
use crate::initramfs;

/// Boots take about 5 s under TCG on an idle machine; a busy one gets plenty of slack.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// The deadline of [`Guest::run`], for commands that take a second or so.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// A kernel that panics writes some thousand lines to a serial console.
const SAID_WITHIN: Duration = Duration::from_secs(30);

/// How much of the console goes into an error.
const CONSOLE_TAIL_LINES: usize = 80;

/// What went wrong, and the last the guest's console said before.
///
/// `Debug` is the same readable text as `Display`, because a test shows it by `unwrap`.
pub struct GuestError {
    what: String,
    console_tail: String,
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        match self.console_tail.as_str() {
            "" => write!(f, " (the guest's console is empty)"),
            tail => write!(f, "\n--- the end of the guest's console ---\n{tail}\n---"),
        }
    }
}

impl fmt::Debug for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for GuestError {}

/// The result of everything that involves the guest.
pub type Result<T> = std::result::Result<T, GuestError>;

/// A running guest.
pub struct Guest {
    qemu: Mutex<Child>,
    agent: Agent,
    qmp: Mutex<Qmp>,
    console: Console,
    boot_time: Duration,
    boot_files: initramfs::BootFiles,
    /// Removed after QEMU is gone.
    directories: Mutex<Vec<tempfile::TempDir>>,
    /// The right to run a guest, given back last.
    _turn: File,
}

impl Guest {
    /// Waits for its turn, starts QEMU, and comes back when the guest answers.
    pub fn boot(options: GuestOptions) -> Result<Guest> {
        Self::boot_by(&options.debian, |launch| start::spawn(&options, launch))
    }

    /// As [`boot`](Self::boot), with the kernel of that Debian and a QEMU that `spawn` starts, or
    /// has started by the process that it returns.
    pub fn boot_by(
        debian: &Debian,
        spawn: impl FnOnce(&Launch<'_>) -> io::Result<Child>,
    ) -> Result<Guest> {
        let failed = |what: &str, error: io::Error| GuestError {
            what: format!("{what}: {error}"),
            console_tail: String::new(),
        };
        let target = target_dir();
        let boot_files = initramfs::boot_files(debian, &target)
            .map_err(|e| failed("cannot make an initramfs", e))?;
        let turn = take_turn(&target).map_err(|e| failed("cannot lock guest-tests.lock", e))?;
        let directory =
            tempfile::tempdir().map_err(|e| failed("cannot make a directory for QEMU", e))?;
        let launch = Launch { directory: directory.path(), boot_files: &boot_files };
        let console = Console::of(&launch);

        let started = Instant::now();
        let (child, agent, qmp) = start::start(&launch, spawn)
            .map_err(|error| console.error(format!("QEMU did not start: {error}")))?;
        let agent = Agent::new(agent).map_err(|e| failed("no thread for the agent", e))?;
        let mut guest = Guest {
            qemu: Mutex::new(child),
            agent,
            qmp: Mutex::new(qmp),
            console,
            boot_time: Duration::ZERO,
            boot_files,
            directories: Mutex::new(vec![directory]),
            _turn: turn,
        };
        guest.wait_for_boot(0)?;
        guest.boot_time = started.elapsed();
        Ok(guest)
    }

    /// How long it took from starting QEMU to the agent's greeting.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// QEMU's process id.
    pub fn qemu_pid(&self) -> u32 {
        self.qemu.lock().unwrap_or_else(PoisonError::into_inner).id()
    }

    /// Runs a shell script in the guest and waits for its end, a minute at most.
    ///
    /// # Panics
    /// If it does not end in time, or the guest dies: with the end of the console.
    #[track_caller]
    pub fn run(&self, script: &str) -> Output {
        self.run_within(script, RUN_TIMEOUT)
    }

    /// Like [`run`](Self::run) with a deadline of the caller's choice.
    #[track_caller]
    pub fn run_within(&self, script: &str, deadline: Duration) -> Output {
        self.spawn(script).wait(deadline)
    }

    /// Runs a script that has to exit with 0, and gives back its output without the newline at its
    /// end.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let output = self.run(script);
        assert_eq!(output.status, 0, "`{script}` in the guest said: {}", output.stdout);
        output.stdout.trim_end().to_owned()
    }

    /// Starts a shell script in the guest and lets it run in the background.
    #[track_caller]
    pub fn spawn(&self, script: &str) -> Job<'_> {
        match self.agent.send(script) {
            Ok(ticket) => Job { guest: self, script: script.to_owned(), ticket },
            Err(error) => {
                panic!("{}", self.console.error(format!("cannot send `{script}`: {error}")))
            }
        }
    }

    /// Runs a QMP command without arguments.
    pub fn qmp(&self, command: &str) -> Result<Value> {
        self.qmp_with(command, Value::Null)
    }

    /// Runs a QMP command with arguments.
    pub fn qmp_with(&self, command: &str, arguments: Value) -> Result<Value> {
        let mut qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        qmp.execute(command, arguments).map_err(|error| self.console.error(error.to_string()))
    }

    /// Runs a command of the human monitor, such as `info virtio`, and gives back what it prints.
    pub fn monitor(&self, command_line: &str) -> Result<String> {
        let text =
            self.qmp_with("human-monitor-command", json!({ "command-line": command_line }))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Resets the machine as its reset button would, and waits until the guest is up again.
    pub fn reset(&self) -> Result<()> {
        let boots = self.agent.boots();
        self.qmp("system_reset")?;
        self.wait_for_boot(boots)
    }

    /// Powers the guest off from inside and waits until QEMU has ended.
    pub fn shutdown(self) -> Result<()> {
        let told = self.agent.send("sync; poweroff -f");
        told.map_err(|error| self.console.error(format!("cannot power the guest off: {error}")))?;
        let deadline = Instant::now() + RUN_TIMEOUT;
        while Instant::now() < deadline {
            if self.has_exited() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Err(self.console.error(format!("the guest was not off within {RUN_TIMEOUT:?}")))
    }

    /// Everything the guest's kernel has put on its console so far, over all boots.
    pub fn console(&self) -> String {
        self.console.text()
    }

    fn wait_for_boot(&self, boots: u64) -> Result<()> {
        self.agent.wait_for_boot(boots, BOOT_TIMEOUT, || self.trouble()).map_err(|what| match self
            .trouble()
        {
            Some(_) => self.console.error(what),
            None => self.silent(what),
        })
    }

    /// The error of a guest that does not answer: with what its processors and its tasks do. Its
    /// kernel panics for that, if it still can.
    fn silent(&self, what: String) -> GuestError {
        let asked = |command| self.monitor(command).unwrap_or_else(|error| error.what);
        let registers = asked("info registers -a");
        let processors =
            registers.lines().filter(|line| line.contains("RIP") || line.starts_with("EIP"));
        let processors = processors.collect::<Vec<_>>().join("\n");
        let what = format!("{what}; {}\n{processors}", asked("info status").trim_end());
        asked("nmi");
        let deadline = Instant::now() + SAID_WITHIN;
        while !self.console.text().contains("end Kernel panic") && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
        self.console.error(what)
    }

    /// A reason why no command will ever be answered again.
    fn trouble(&self) -> Option<String> {
        if self.has_exited() {
            return Some("QEMU has exited".to_owned());
        }
        self.console
            .text()
            .contains("Kernel panic - not syncing")
            .then(|| "the guest panicked".to_owned())
    }

    fn has_exited(&self) -> bool {
        let mut qemu = self.qemu.lock().unwrap_or_else(PoisonError::into_inner);
        !matches!(qemu.try_wait(), Ok(None))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let qemu = self.qemu.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Both fail only if it is gone already.
        let _ = qemu.kill();
        let _ = qemu.wait();
    }
}

/// A script that runs in the background of a guest.
pub struct Job<'guest> {
    guest: &'guest Guest,
    script: String,
    ticket: Ticket,
}

impl Job<'_> {
    /// Whether the script has ended, one way or another; a later [`wait`](Self::wait) then returns
    /// at once.
    pub fn has_ended(&self) -> bool {
        self.guest.agent.has_ended(self.ticket)
    }

    /// Waits for the script's end.
    ///
    /// # Panics
    /// If it does not end in time, or the guest dies or reboots: with the end of the console.
    #[track_caller]
    pub fn wait(self, deadline: Duration) -> Output {
        let guest = self.guest;
        match guest.agent.wait(self.ticket, deadline, || guest.trouble()) {
            Ok(output) => output,
            Err(what) => {
                let what = format!("`{}` in the guest: {what}", self.script);
                let is_silent = guest.trouble().is_none() && !guest.agent.has_ended(self.ticket);
                let error = if is_silent { guest.silent(what) } else { guest.console.error(what) };
                panic!("{error}")
            }
        }
    }
}

/// The file that QEMU writes the guest's serial console to, and its own complaints.
struct Console {
    /// Of each QEMU that has had the guest.
    paths: Mutex<Vec<PathBuf>>,
}

impl Console {
    fn of(launch: &Launch<'_>) -> Self {
        Console { paths: Mutex::new(vec![launch.console()]) }
    }

    fn paths(&self) -> Vec<PathBuf> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn text(&self) -> String {
        let read = |path| fs::read(path).unwrap_or_default();
        let bytes: Vec<u8> = self.paths().iter().flat_map(read).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn error(&self, what: String) -> GuestError {
        let qemu = |path: &PathBuf| fs::read_to_string(path.with_file_name("qemu.log"));
        let qemu: String = self.paths().iter().flat_map(qemu).collect();
        let text = self.text() + &qemu;
        let lines: Vec<&str> = text.lines().collect();
        // What a kernel says as it panics has its reason at the beginning.
        let panics = lines.iter().position(|line| line.contains("Kernel panic - not syncing"));
        let begin = lines.len().saturating_sub(CONSOLE_TAIL_LINES);
        let tail = lines[panics.map_or(begin, |at| at.min(begin))..].join("\n");
        GuestError { what, console_tail: tail }
    }
}

fn take_turn(target: &Path) -> io::Result<File> {
    fs::create_dir_all(target)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(target.join("guest-tests.lock"))?;
    lock.lock()?;
    Ok(lock)
}

/// The target directory that the running test binary came from; Cargo tags it so that backups skip
/// it.
fn target_dir() -> PathBuf {
    let running = std::env::current_exe().unwrap_or_default();
    running
        .ancestors()
        .find(|directory| directory.join("CACHEDIR.TAG").exists())
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), Path::to_owned)
}
