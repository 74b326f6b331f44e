//! What a domain behind a socket needs and no safe call gives: to be woken when one is ready, and
//! who is at the other end.
//!
//! A worker sleeps on its own eventfd and on nothing else. [`Watch`] has that eventfd written to
//! when a socket can be read: by the kernel (`ring`), and where io_uring cannot be had by a thread
//! (`thread`). Neither touches any data.

mod ring;
mod thread;

use ring::Ring;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use thread::Thread;

/// Wakes a worker when sockets are ready.
///
/// It belongs to the thread that makes it: the kernel delivers readiness there. For reading it says
/// so once whenever something has come: what is there must be read until there is nothing more. For
/// writing it says so once for each time that it is asked. As long as a socket is watched it stays
/// open, whoever else closes it.
#[derive(Debug)]
pub struct Watch(Kind);

#[derive(Debug)]
enum Kind {
    Ring(Box<Ring>),
    Thread(Thread),
}

/// What a watch has to say of a socket, by its name. That there may be something to read is said by
/// the eventfd alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// It is not watched for reading any more ([`Watch::reading`]).
    Unwatched(u32),
    /// It can be written to, and is not watched for that any more ([`Watch::writing`]).
    Writable(u32),
}

/// What a watch's thread runs.
pub type Task = Box<dyn FnOnce() + Send>;

impl Watch {
    /// A watch that has the kernel write to the eventfd `wake`.
    ///
    /// # Errors
    /// What the kernel says: it has no io_uring, does not allow it, or is too old (5.13).
    pub fn by_ring(wake: OwnedFd) -> io::Result<Self> {
        Ring::new(wake).map(Box::new).map(Kind::Ring).map(Self)
    }

    /// A watch whose thread writes to the eventfd `wake`: some microseconds later. `spawn` begins
    /// that thread, which ends when the watch does.
    ///
    /// # Errors
    /// There is no descriptor or no thread to be had.
    pub fn by_thread<E: std::fmt::Display>(
        wake: OwnedFd,
        spawn: impl FnOnce(Task) -> Result<(), E>,
    ) -> io::Result<Self> {
        Thread::begin(wake, spawn).map(Kind::Thread).map(Self)
    }

    /// Watches `socket`, called `name`, for something to read or its end.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn reading(&mut self, name: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        match &mut self.0 {
            Kind::Ring(ring) => ring.reading(name, socket),
            Kind::Thread(thread) => thread.reading(name, socket),
        }
    }

    /// Watches `socket`, called `name`, until it can be written to, once.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn writing(&mut self, name: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        match &mut self.0 {
            Kind::Ring(ring) => ring.writing(name, socket),
            Kind::Thread(thread) => thread.writing(name, socket),
        }
    }

    /// Watches the socket called `name` no more.
    pub fn forget(&mut self, name: u32) {
        match &mut self.0 {
            Kind::Ring(ring) => ring.forget(name),
            Kind::Thread(thread) => thread.forget(name),
        }
    }

    /// Takes in what there is to be said.
    #[inline]
    pub fn take(&mut self) -> Option<News> {
        match &mut self.0 {
            Kind::Ring(ring) => ring.take(),
            Kind::Thread(thread) => thread.take(),
        }
    }
}

/// The process at the other end of a Unix socket, as it was when it began to listen or to connect;
/// `None` where it has no number here, or it is another kind of socket.
#[must_use]
pub fn peer_process(socket: BorrowedFd<'_>) -> Option<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to `peer`, which has that size and is made of
    // integers only, and the length to `size`; both live until it returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut size,
        )
    };
    (result == 0 && size as usize == size_of_val(&peer) && peer.pid > 0).then_some(peer.pid as u32)
}

#[cfg(test)]
mod tests;
