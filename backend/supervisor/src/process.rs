//! A server's process: how it is started, talked to and known to be dead.

use crate::descriptor::Descriptor;
use crate::notify::VARIABLES;
use crate::slots::{Missing, Packing, Slot, Unpacking};
use channel::{Channel, ToServer};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

/// A program, held open: what is started is what was looked at, whatever lies at its path then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
        Ok(Self { path: own_path()?, file })
    }

    /// One that is open.
    #[must_use]
    pub fn of_file(path: PathBuf, file: OwnedFd) -> Self {
        Self { path, file: file.into() }
    }

    /// Whether it is a regular file that may be run.
    #[must_use]
    pub fn is_executable(&self) -> bool {
        fstat(&self.file).is_ok_and(|about| {
            FileType::from_raw_mode(about.st_mode).is_file() && about.st_mode & 0o111 != 0
        })
    }

    /// Its file.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A command that runs it.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        command.arg0(&self.path);
        command.envs(PASSED_ON.get().copied());
        command
    }
}

/// What programs find in their environment beside what is there.
static PASSED_ON: OnceLock<(&str, &str)> = OnceLock::new();

/// Programs that are started from now on find `variable` in their environment. The first one that
/// is passed on is.
pub fn pass_on(variable: &'static str, value: &'static str) {
    let _ = PASSED_ON.set((variable, value));
}

/// Where this process's own program lies, or has lain before another was put there.
///
/// # Errors
/// It cannot be found out.
pub fn own_path() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?.into_os_string().into_vec();
    let path = path.strip_suffix(b" (deleted)").map_or(path.clone(), <[u8]>::to_vec);
    Ok(OsString::from_vec(path).into())
}

/// How a child has ended, once it has. It stays to be [reaped](reap).
#[must_use]
pub fn ended(pidfd: BorrowedFd<'_>) -> Option<Ended> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    match waitid(WaitId::PidFd(pidfd), options) {
        Ok(None) | Err(rustix::io::Errno::INTR) => None,
        Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
            (Some(status), _) => Ended::Exited(status),
            (None, Some(signal)) => Ended::Signalled(signal),
            (None, None) => Ended::Unknown,
        }),
        Err(_) => Some(Ended::Unknown),
    }
}

/// Has the kernel forget a child that has ended. `false` if it has not.
pub fn reap(child: WaitId<'_>) -> bool {
    !matches!(waitid(child, WaitIdOptions::EXITED | WaitIdOptions::NOHANG), Ok(None))
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

/// Opens what says that a process has ended.
fn open(pid: Pid) -> io::Result<OwnedFd> {
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
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
    /// What it puts aside, if it does.
    pub aside: Option<Channel>,
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

/// A [`Server`] in a packed state.
#[derive(Debug, Serialize, Deserialize)]
pub struct PackedServer {
    pid: i32,
    pidfd: Slot,
    channel: Slot,
    #[serde(default)]
    aside: Option<Slot>,
    program: Program,
    since: SystemTime,
    ready_ms_ago: Option<u64>,
    version: Option<String>,
    failure: Option<(String, String)>,
    is_silent: bool,
}

impl Server {
    /// Starts one.
    ///
    /// # Errors
    /// There is no process or descriptor left, or it is no program.
    pub fn start(program: &Program) -> io::Result<Self> {
        let (channel, theirs) = channel::pair()?;
        fcntl_setfd(&theirs, FdFlags::empty())?;
        let mut command = program.command();
        VARIABLES.iter().for_each(|name| _ = command.env_remove(name));
        command
            .args([OsString::from("--serve-channel"), theirs.as_raw_fd().to_string().into()])
            .stdin(Stdio::null())
            // The terminal's signals are for the supervisor.
            .process_group(0);
        // What is not waited for here is reaped by its number.
        let mut child = command.spawn()?;
        drop(theirs);
        Self::of(&mut child, program, channel, open)
    }

    /// A child as one, whose death is seen at what `open` opens.
    fn of(
        child: &mut Child,
        program: &Program,
        channel: Channel,
        open: impl FnOnce(Pid) -> io::Result<OwnedFd>,
    ) -> io::Result<Self> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("a process without a number"));
        let opened = pid.and_then(|pid| open(pid).map(|pidfd| (pid, pidfd)));
        let (pid, pidfd) = opened.inspect_err(|_| {
            // Nobody would hear of its end, or reap it.
            let _ = child.kill().and_then(|()| child.wait());
        })?;
        Ok(Self {
            pid,
            program: program.clone(),
            channel,
            aside: None,
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
        ended(self.pidfd.as_fd())
    }

    /// Packs it for the next program of this process.
    pub fn pack<'a>(&'a self, packing: &mut Packing<'a>) -> PackedServer {
        let ago = |at: Instant| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
        PackedServer {
            pid: self.pid.as_raw_nonzero().get(),
            pidfd: packing.put(self.pidfd.as_fd()),
            channel: packing.put(self.channel.as_fd()),
            aside: self.aside.as_ref().map(|aside| packing.put(aside.as_fd())),
            program: self.program.clone(),
            since: self.since,
            ready_ms_ago: self.ready.map(ago),
            version: self.version.clone(),
            failure: self.failure.clone(),
            is_silent: self.is_silent,
        }
    }

    /// Goes on with one that another program of this process has packed.
    ///
    /// # Errors
    /// A descriptor is missing.
    pub fn unpack(packed: PackedServer, unpacking: &mut Unpacking) -> Result<Self, Missing> {
        let now = Instant::now();
        let at = |ago| now.checked_sub(Duration::from_millis(ago)).unwrap_or(now);
        Ok(Self {
            // 0 is no process; 1 would not be ours, either.
            pid: Pid::from_raw(packed.pid).unwrap_or(Pid::INIT),
            pidfd: unpacking.take(packed.pidfd)?,
            channel: Channel::from_socket(unpacking.take(packed.channel)?),
            aside: packed
                .aside
                .map(|aside| unpacking.take(aside).map(Channel::from_socket))
                .transpose()?,
            program: packed.program,
            since: packed.since,
            ready: packed.ready_ms_ago.map(at),
            version: packed.version,
            failure: packed.failure,
            is_silent: packed.is_silent,
        })
    }

    /// Tells it to end by itself, which it may not do.
    pub fn tell_to_leave(&self) {
        match self.channel.try_send(&ToServer::Exit, &[]) {
            Ok(true) => {}
            // It does not listen.
            Ok(false) => self.kill(),
            Err(error) => {
                log::debug!("server {} is not told to leave: {error}", self.pid.as_raw_nonzero());
            }
        }
    }

    /// Waits until it has ended, for `limit` at most. Returns whether it has.
    #[must_use]
    pub fn ends_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.ended().is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let left =
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            // Whatever comes of it, it is looked at again.
            let _ = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&left));
        }
        true
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // It may be dead already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

/// What a test plays a [`Server`] with.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Played {
    /// The server's end.
    pub(crate) channel: Channel,
    /// The process ends when this is dropped.
    _input: std::process::ChildStdin,
}

#[cfg(test)]
impl Server {
    /// A process that lives until it is killed, or until what it is played with is dropped; then
    /// it ends with status 0.
    pub(crate) fn played() -> (Self, Played) {
        let (channel, theirs) = channel::pair().unwrap();
        let program = Program::open(Path::new("/bin/cat")).unwrap();
        let mut child = program.command().stdin(Stdio::piped()).spawn().unwrap();
        let _input = child.stdin.take().unwrap();
        let server = Self::of(&mut child, &program, channel, open).unwrap();
        (server, Played { channel: Channel::from_socket(theirs), _input })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn a_process_whose_death_would_not_be_seen_is_ended_and_reaped() {
        let (channel, _theirs) = channel::pair().unwrap();
        let program = Program::open(Path::new("/bin/cat")).unwrap();
        let mut child = program.command().stdin(Stdio::piped()).spawn().unwrap();
        let _input = child.stdin.take().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
        let exhausted = |_| Err(Errno::MFILE.into());
        let error = Server::of(&mut child, &program, channel, exhausted).unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::MFILE));
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        assert_eq!(waitid(WaitId::Pid(pid), options).unwrap_err(), Errno::CHILD);
    }
}
