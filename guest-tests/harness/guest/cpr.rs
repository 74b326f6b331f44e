//! A QEMU that is replaced under its guest on the same host: what QEMU calls CPR, checkpoint and
//! restart, in its three modes. Guest memory stays where it is, or goes through a file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::options::GuestOptions;
use super::start::{Launch, Sockets};
use super::{Guest, Result};

/// How QEMU is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cpr {
    /// The state goes into a file; QEMU ends, and another one loads it.
    Reboot,
    /// Another QEMU is there already, and is given guest memory's descriptors.
    Transfer,
    /// QEMU executes another one in its own process.
    Exec,
}

impl Cpr {
    /// QEMU's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reboot => "cpr-reboot",
            Self::Transfer => "cpr-transfer",
            Self::Exec => "cpr-exec",
        }
    }
}

impl Guest {
    /// Whether this QEMU knows the mode.
    pub fn knows(&self, mode: Cpr) -> Result<bool> {
        let schema = self.qmp("query-qmp-schema")?;
        let types = schema.as_array().map_or(&[][..], Vec::as_slice);
        let has = |one: &Value| {
            let values = one["values"].as_array().map_or(&[][..], Vec::as_slice);
            values.iter().any(|value| *value == mode.name())
        };
        Ok(types.iter().any(has))
    }

    /// Replaces QEMU by another one of the same machine. `options` are those of the guest, with
    /// `aux-ram-share=on` at its machine.
    pub fn replace_qemu(&self, mode: Cpr, options: &GuestOptions, within: Duration) -> Result<()> {
        match mode {
            Cpr::Reboot => self.reboot(options, within),
            Cpr::Transfer => self.transfer(options, within),
            Cpr::Exec => self.exec(within),
        }
    }

    fn failed(&self, what: &str, error: io::Error) -> super::GuestError {
        self.console.error(format!("{what}: {error}"))
    }

    fn reboot(&self, options: &GuestOptions, within: Duration) -> Result<()> {
        let directory = tempfile::tempdir().map_err(|e| self.failed("no directory", e))?;
        let file = format!("file:{}", directory.path().join("state").display());
        self.qmp_with("migrate-set-parameters", json!({ "mode": Cpr::Reboot.name() }))?;
        self.qmp_with("migrate", json!({ "uri": file }))?;
        self.completes(within)?;
        // It has let go of the disks when it is gone.
        self.qmp("quit")?;
        let deadline = Instant::now() + within;
        while !self.has_exited() {
            if Instant::now() > deadline {
                return Err(self.console.error("QEMU does not quit".to_owned()));
            }
            thread::sleep(Duration::from_millis(5));
        }
        let mut options = options.clone();
        options.extra_args.extend(["-incoming", "defer"].map(str::to_owned));
        let mut waiting = self.waiting(&options, directory)?;
        let mut tell = |command: &str, arguments: Value| {
            waiting.qmp.execute(command, arguments).map_err(|e| self.failed("the next QEMU", e))
        };
        tell("migrate-set-parameters", json!({ "mode": Cpr::Reboot.name() }))?;
        tell("migrate-incoming", json!({ "uri": file }))?;
        self.goes_on_in(waiting, within)
    }

    fn transfer(&self, options: &GuestOptions, within: Duration) -> Result<()> {
        let directory = tempfile::tempdir().map_err(|e| self.failed("no directory", e))?;
        let channel = |kind: &str, path: &Path| {
            let address = json!({ "transport": "socket", "type": "unix", "path": path });
            json!({ "channel-type": kind, "addr": address })
        };
        let cpr_socket = directory.path().join("cpr.sock");
        let main = channel("main", &directory.path().join("main.sock"));
        let cpr = channel("cpr", &cpr_socket);
        let mut options = options.clone();
        for channel in [&main, &cpr] {
            options.extra_args.extend(["-incoming".to_owned(), channel.to_string()]);
        }
        let waiting = thread::scope(|scope| {
            // It has no monitor before it was given the memory.
            let starting = scope.spawn(|| self.waiting(&options, directory));
            let asked = wait_for(&cpr_socket, within)
                .map_err(|e| self.failed("the next QEMU does not listen", e))
                .and_then(|()| {
                    let mode = json!({ "mode": Cpr::Transfer.name() });
                    self.qmp_with("migrate-set-parameters", mode)?;
                    self.qmp_with("migrate", json!({ "channels": [main, cpr] }))
                });
            let waiting = starting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            asked.and(waiting)
        })?;
        self.completes(within)?;
        self.goes_on_in(waiting, within)
    }

    fn exec(&self, within: Duration) -> Result<()> {
        let failed = |error: io::Error| self.failed("QEMU executes itself", error);
        let line = fs::read(format!("/proc/{}/cmdline", self.qemu_pid())).map_err(failed)?;
        let directory = self.files();
        let file = format!("file:{}", directory.join("state").display());
        let text = String::from_utf8_lossy(&line).into_owned();
        let mut command: Vec<&str> = text.split_terminator('\0').collect();
        // Of the time before, if this is not the first.
        if let Some(at) = command.iter().position(|&word| word == "-incoming") {
            command.drain(at..at + 2);
        }
        command.extend(["-incoming", &file]);
        let launch = Launch { directory: &directory, boot_files: &self.boot_files };
        let sockets = Sockets::listen(&launch).map_err(failed)?;
        let parameters = json!({ "mode": Cpr::Exec.name(), "cpr-exec-command": command });
        self.qmp_with("migrate-set-parameters", parameters)?;
        self.qmp_with("migrate", json!({ "uri": file }))?;
        let mut qemu = self.qemu.lock().unwrap_or_else(PoisonError::into_inner);
        let (agent, qmp) = sockets.accept(&mut qemu).map_err(failed)?;
        drop(qemu);
        self.agent.follow(agent).map_err(failed)?;
        *self.qmp.lock().unwrap_or_else(PoisonError::into_inner) = qmp;
        let deadline = Instant::now() + within;
        while self.qmp("query-status")?["running"] != true {
            if Instant::now() > deadline {
                return Err(self.console.error("the next QEMU does not run".to_owned()));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Where the files of the QEMU of now are.
    fn files(&self) -> PathBuf {
        let directories = self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        directories.last().map(|directory| directory.path().to_owned()).unwrap_or_default()
    }

    fn completes(&self, within: Duration) -> Result<()> {
        let ended = |status: &str| ["completed", "failed", "cancelled"].contains(&status);
        let status = self.wait_for_migration(within, ended)?;
        if status == "completed" {
            return Ok(());
        }
        let why = self.qmp("query-migrate")?["error-desc"].clone();
        Err(self.console.error(format!("the migration is `{status}`: {why}")))
    }
}

fn wait_for(socket: &Path, within: Duration) -> io::Result<()> {
    let deadline = Instant::now() + within;
    while !socket.exists() {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
