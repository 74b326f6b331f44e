//! Which process serves a connection, as far as that can be known.
//!
//! A change that was sent on a connection that broke may land later, as long as the process that
//! has read it lives. A Unix socket says which process listens at its other end. One that forks for
//! each connection (nbd-server) does the work in another; over TCP nothing is known.

use domain_io::socket::peer_process;
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use std::os::fd::BorrowedFd;

/// A process, and when it began: numbers come again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) number: u64,
    pub(crate) start: u64,
}

impl Process {
    /// What listens at the other end of `socket`. One that has ended by now does not tell of the
    /// server: one that goes to the background after it has begun to listen (nbdkit, if it is not
    /// told otherwise) works in a child of what listened.
    pub(crate) fn behind(socket: BorrowedFd<'_>) -> Option<Self> {
        let number = u64::from(peer_process(socket)?);
        // A socket that the service manager listens on says nothing of the server.
        (number > 1).then_some(())?;
        let State::Runs { start } = State::of(number) else { return None };
        Some(Self { number, start })
    }

    /// From its two numbers; zeros are none.
    pub(crate) fn from_numbers((number, start): (u64, u64)) -> Option<Self> {
        (number != 0).then_some(Self { number, start })
    }

    /// Whether it has ended, and with it all that it had begun.
    pub(crate) fn is_gone(self) -> bool {
        match State::of(self.number) {
            State::Runs { start } => start != self.start,
            State::Ended => true,
            State::Unknown => false,
        }
    }
}

/// What can be seen of a process.
enum State {
    Runs {
        /// When it began, in the kernel's ticks.
        start: u64,
    },
    /// There is none, or it is not awaited yet, and its last thread has ended.
    Ended,
    /// There is one that `/proc` does not show.
    Unknown,
}

impl State {
    fn of(process: u64) -> Self {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{process}/stat")) else {
            let number = i32::try_from(process).ok().and_then(Pid::from_raw);
            let is_there = number.is_none_or(|it| test_kill_process(it) != Err(Errno::SRCH));
            return if is_there { Self::Unknown } else { Self::Ended };
        };
        // The name may hold anything, and is in brackets.
        let fields = stat.rfind(')').map_or("", |end| &stat[end + 1..]);
        let mut fields = fields.split_ascii_whitespace();
        match (fields.next(), fields.nth(18).and_then(|start| start.parse().ok())) {
            (Some("Z" | "X"), _) if !has_threads(process) => Self::Ended,
            (_, Some(start)) => Self::Runs { start },
            _ => Self::Unknown,
        }
    }
}

/// Whether a process has threads beside its first one: of one that is killed that one may end long
/// before them, and they hold its sockets and may be about to write.
fn has_threads(process: u64) -> bool {
    std::fs::read_dir(format!("/proc/{process}/task")).is_ok_and(|threads| threads.count() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_whose_first_thread_has_ended_runs_as_long_as_another_does() {
        // Its first thread ends by the call that ends a thread.
        let program = "import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
exit = {'x86_64': 60, 'aarch64': 93}[os.uname().machine]
ctypes.CDLL(None).syscall(exit, 0)";
        let mut child =
            std::process::Command::new("python3").args(["-c", program]).spawn().unwrap();
        let number = u64::from(child.id());
        let is_zombie = || {
            let stat = std::fs::read_to_string(format!("/proc/{number}/stat")).unwrap();
            stat.contains(") Z ")
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !is_zombie() {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        let seen = State::of(number);
        child.kill().unwrap();
        assert!(matches!(seen, State::Runs { .. }), "a thread of it may write still");
        while !matches!(State::of(number), State::Ended) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        child.wait().unwrap();
    }

    #[test]
    fn what_has_listened_and_ended_is_not_taken_for_the_server() {
        use std::os::fd::AsFd as _;
        use std::os::unix::net::UnixStream;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        // It listens, goes to the background, and its first process ends.
        let status = std::process::Command::new("nbdkit")
            .args(["--unix", &at("socket"), "-P", &at("pid"), "memory", "1M"])
            .status()
            .expect("`scripts/setup` installs it");
        assert!(status.success());
        let socket = UnixStream::connect(at("socket")).unwrap();
        let process = Process::behind(socket.as_fd());
        // The one that goes on says so in its own time.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let read = || std::fs::read_to_string(at("pid")).ok()?.trim().parse::<i32>().ok();
        let pid = loop {
            if let Some(pid) = read() {
                break pid;
            }
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        };
        let is_there = State::of(pid as u64);
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), rustix::process::Signal::TERM)
            .unwrap();
        assert!(matches!(is_there, State::Runs { .. }), "the server lives");
        assert_eq!(process, None);
    }

    #[test]
    fn a_process_is_there_until_it_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let number = u64::from(child.id());
        let State::Runs { start } = State::of(number) else { panic!("it runs") };
        let process = Process { number, start };
        assert!(!process.is_gone());
        assert!(Process { start: process.start + 1, ..process }.is_gone(), "another one");
        child.kill().unwrap();
        while !process.is_gone() {
            std::thread::yield_now();
        }
        // What is seen of it for the first time now is known, too.
        assert!(matches!(State::of(number), State::Ended));
        child.wait().unwrap();
        assert!(process.is_gone() && matches!(State::of(number), State::Ended));
    }
}
