//! When the kernel is really done with a ring that was closed.
//!
//! Closing a ring cancels what can be cancelled and waits for the rest, but not in `close`: a
//! kernel thread does it, later. There is no call that waits for it, and with deferred completions
//! no other thread than the ring's may even reap. But the kernel lets go of a ring's registered
//! files at the very end, when no request is left. So one of these files is the writing end of a
//! pipe of which there is no other: when the reading end sees a hang-up, no request of this ring
//! exists any more, whichever thread looks.
//!
//! "The very end" is after each thread that made or used the ring has run a task of the kernel's on
//! its next return to user space: one that is stuck in the kernel holds the hang-up up, and a wait
//! that is in vain is taken for requests that are still there. That errs on the safe side.

//!
//! The same holds for the end of a process. It cancels what can be cancelled, and waits for its own
//! threads and for the kernel's that work for it, but not for direct I/O that is on its way to a
//! device: that writes to the disk, or to guest memory, when the process is long gone. So all rings
//! of a process can hold the writing end of one more pipe, whose reading end another process has.

use crate::file_io::{self, OpenMode};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// The reading end.
#[derive(Debug)]
pub struct EndWatch(File);

impl From<File> for EndWatch {
    /// The reading end of an earlier watch, or a dup of it.
    fn from(reading: File) -> Self {
        Self(reading)
    }
}

impl EndWatch {
    /// A watch, and the end to be held by what is watched, and dropped.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let mut fds = [-1; 2];
        // SAFETY: room for two descriptors.
        if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fresh descriptors, ours alone.
        let [reading, writing] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        Ok((Self(reading.into()), writing))
    }

    /// The reading end.
    #[must_use]
    pub const fn reading(&self) -> &File {
        &self.0
    }

    /// One more end to be held.
    ///
    /// # Errors
    /// There is no descriptor left, or `/proc` is not mounted.
    pub fn hold(&self) -> io::Result<File> {
        // To read as well, which is of no use.
        file_io::reopen(&self.0, OpenMode { write: true, direct: false })
    }

    /// Whether nothing holds an end any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits until the kernel has let go of the ring. Returns `false` if it has not within
    /// `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let left_ms = deadline.saturating_duration_since(Instant::now()).as_millis();
            let mut watched = libc::pollfd { fd: self.0.as_raw_fd(), events: 0, revents: 0 };
            // SAFETY: one valid structure. Signals are no reason to give up: the kernel uses one to
            // have this thread let go of the ring.
            let ready =
                unsafe { libc::poll(&raw mut watched, 1, left_ms.min(i32::MAX as u128) as i32) };
            if ready > 0 {
                return watched.revents & libc::POLLHUP != 0;
            }
            if left_ms == 0 {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_over_when_nothing_holds_an_end_and_not_when_something_does_again() {
        let (watch, writing) = EndWatch::new().unwrap();
        assert!(!watch.is_over());
        drop(writing);
        assert!(watch.is_over());
        let kept = EndWatch::from(watch.reading().try_clone().unwrap());
        let held = [kept.hold().unwrap(), kept.hold().unwrap()];
        for held in held {
            assert!(!watch.is_over() && !kept.is_over());
            drop(held);
        }
        assert!(watch.is_over() && kept.is_over());
    }
}
