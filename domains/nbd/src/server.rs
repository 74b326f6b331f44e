//! Which process serves a connection, as far as that can be known.
//!
//! A change that was sent on a connection that broke may land later, as long as the process that
//! has read it lives. A Unix socket says which process listens at its other end. One that forks for
//! each connection (nbd-server) does the work in another; over TCP nothing is known.

use domain_io::socket::peer_process;
use std::os::fd::BorrowedFd;

/// A process, and when it began: numbers come again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) number: u64,
    pub(crate) start: u64,
}

impl Process {
    /// What listens at the other end of `socket`.
    pub(crate) fn behind(socket: BorrowedFd<'_>) -> Option<Self> {
        let number = u64::from(peer_process(socket)?);
        // A socket that the service manager listens on says nothing of the server.
        (number > 1).then_some(())?;
        Some(Self { number, start: start_of(number)? })
    }

    /// From its two numbers; zeros are none.
    pub(crate) fn from_numbers((number, start): (u64, u64)) -> Option<Self> {
        (number != 0).then_some(Self { number, start })
    }

    /// Whether it has ended, and with it all that it had begun.
    pub(crate) fn is_gone(self) -> bool {
        // A `/proc` that shows nothing shows ourselves as little.
        start_of(self.number) != Some(self.start) && start_of(std::process::id().into()).is_some()
    }
}

/// When a process began, in the kernel's ticks; `None` if there is none, or it has ended and is not
/// awaited yet.
fn start_of(process: u64) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name may hold anything, and is in brackets.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?;
    (!matches!(state, "Z" | "X")).then_some(())?;
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_there_until_it_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let number = u64::from(child.id());
        let process = Process { number, start: start_of(number).unwrap() };
        assert!(!process.is_gone());
        assert!(Process { start: process.start + 1, ..process }.is_gone(), "another one");
        child.kill().unwrap();
        while !process.is_gone() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(process.is_gone());
    }
}
