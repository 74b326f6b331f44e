//! A server's process: how it is started, talked to and known to be dead.

use crate::descriptor::Descriptor;
use channel::Channel;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

/// A program, held open: what is started is what was looked at, whatever lies at its path then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Where it was found.
    pub path: PathBuf,
    file: Descriptor,
}

impl Program {
    /// The one at a path.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: OwnedFd::from(File::open(path)?).into() })
    }

    /// This process's own.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn own() -> io::Result<Self> {
        let file = OwnedFd::from(File::open("/proc/self/exe")?).into();
        Ok(Self { path: std::env::current_exe()?, file })
    }
}

/// How a process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
    /// It cannot be found out.
    Unknown,
}

impl Ended {
    /// Whether others may have ended it, for reasons of their own.
    #[must_use]
    pub const fn is_crash(self) -> bool {
        // SIGHUP, SIGINT, SIGKILL, SIGTERM.
        !matches!(self, Self::Signalled(1 | 2 | 9 | 15))
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "status {status}"),
            Self::Signalled(signal) => write!(f, "signal {signal}"),
            Self::Unknown => write!(f, "an unknown status"),
        }
    }
}

/// A process that serves, or is about to.
#[derive(Debug)]
pub struct Server {
    /// Its number.
    pub pid: Pid,
    /// What it runs.
    pub program: Program,
    /// What is said to it, and by it.
    pub channel: Channel,
    /// When it was started.
    pub since: SystemTime,
    /// When it began to serve.
    pub ready: Option<Instant>,
    /// What it says that it is.
    pub version: Option<String>,
    /// Why it cannot be the device, in its words.
    pub failure: Option<(String, String)>,
    /// Nothing more is to be heard of it.
    pub is_silent: bool,
    pidfd: OwnedFd,
}

impl Server {
    /// Starts one.
    ///
    /// # Errors
    /// There is no process or descriptor left, or it is no program.
    pub fn start(program: &Program) -> io::Result<Self> {
        let (channel, theirs) = channel::pair()?;
        fcntl_setfd(&theirs, FdFlags::empty())?;
        let mut command = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()));
        command
            .arg0(&program.path)
            .args([OsString::from("--serve-channel"), theirs.as_raw_fd().to_string().into()])
            .stdin(Stdio::null())
            // The terminal's signals are for the supervisor.
            .process_group(0);
        // Whoever is not waited for here is reaped through its pidfd.
        let child = command.spawn()?;
        drop(theirs);
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("a process without a number"))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self {
            pid,
            program: program.clone(),
            channel,
            since: SystemTime::now(),
            ready: None,
            version: None,
            failure: None,
            is_silent: false,
            pidfd,
        })
    }

    /// Readable from its death on.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// How it has ended, once it has.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(None) | Err(rustix::io::Errno::INTR) => None,
            Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(status), _) => Ended::Exited(status),
                (None, Some(signal)) => Ended::Signalled(signal),
                (None, None) => Ended::Unknown,
            }),
            Err(_) => Some(Ended::Unknown),
        }
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // It may be dead already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}
