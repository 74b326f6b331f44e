//! What a domain behind a socket needs and no safe call gives: to be woken when one is ready, and
//! who is at the other end.
//!
//! A worker sleeps on its own eventfd and on nothing else. [`Watch`] has the kernel write to that
//! eventfd when a socket can be read: an io_uring that holds one poll request for each socket and
//! never touches any data. No thread stands between.

use io_uring::{IoUring, cqueue, opcode, types};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Sockets that one watch has room for, twice: for reading and for writing.
const ENTRIES: u32 = 64;
/// Set in the name of a poll request for writing.
const WRITING: u64 = 1 << 63;
/// The name of a request to remove others.
const REMOVAL: u64 = u64::MAX;

/// Wakes a worker when sockets are ready.
///
/// It belongs to the thread that makes it: the kernel delivers readiness there. For reading it says
/// so once whenever something has come: what is there must be read until there is nothing more. For
/// writing it says so once for each time that it is asked.
pub struct Watch {
    io: IoUring,
    /// Kept open as long as the kernel writes to it.
    _wake: OwnedFd,
    /// What the kernel has said and was not taken.
    news: Vec<News>,
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

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// A watch that writes to the eventfd `wake`.
    ///
    /// # Errors
    /// What the kernel says: it has no io_uring, does not allow it, or is too old (5.13).
    pub fn new(wake: OwnedFd) -> io::Result<Self> {
        // A worker that is awake is not interrupted to be told so.
        let quiet =
            IoUring::builder().setup_cqsize(4 * ENTRIES).setup_coop_taskrun().build(ENTRIES);
        let io = match quiet {
            // Linux before 5.19.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_cqsize(4 * ENTRIES).build(ENTRIES)?
            }
            other => other?,
        };
        io.submitter().register_eventfd(wake.as_raw_fd())?;
        Ok(Self { io, _wake: wake, news: Vec::new() })
    }

    /// Watches `socket`, called `name`, for something to read or its end.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn reading(&mut self, name: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let events = (libc::POLLIN | libc::POLLRDHUP) as u32;
        let entry = opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), events).multi(true);
        self.submit(entry.build().user_data(u64::from(name)))
    }

    /// Watches `socket`, called `name`, until it can be written to, once.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn writing(&mut self, name: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), libc::POLLOUT as u32);
        self.submit(entry.build().user_data(u64::from(name) | WRITING))
    }

    /// Watches the socket called `name` no more.
    pub fn forget(&mut self, name: u32) {
        for request in [u64::from(name), u64::from(name) | WRITING] {
            // It has ended already, or the kernel is short of memory; then it wakes for nothing.
            let _ = self.submit(opcode::PollRemove::new(request).build().user_data(REMOVAL));
        }
        self.news.retain(
            |news| !matches!(news, News::Unwatched(of) | News::Writable(of) if *of == name),
        );
    }

    /// Takes in what the kernel has said.
    #[inline]
    pub fn take(&mut self) -> Option<News> {
        if self.io.submission().cq_overflow() {
            // What did not fit waits in the kernel.
            let _ = self.io.submit();
        }
        for entry in self.io.completion() {
            let name = entry.user_data();
            if name == REMOVAL || cqueue::more(entry.flags()) || entry.result() == -libc::ECANCELED
            {
                continue;
            }
            let of = name as u32;
            let news = if name & WRITING == 0 { News::Unwatched(of) } else { News::Writable(of) };
            self.news.push(news);
        }
        self.news.pop()
    }

    fn submit(&mut self, entry: io_uring::squeue::Entry) -> io::Result<()> {
        // SAFETY: poll requests and their removal name no memory, and the kernel holds the file of
        // the descriptor by itself.
        while unsafe { self.io.submission().push(&entry) }.is_err() {
            self.io.submit()?;
        }
        loop {
            match self.io.submit() {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                result => return result.map(drop),
            }
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
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    /// Whether the eventfd is written to within a second.
    fn wakes(eventfd: &OwnedFd) -> bool {
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut count = [0; 8];
        while Instant::now() < deadline {
            if rustix::io::read(eventfd, &mut count).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    #[test]
    fn each_arrival_and_the_end_wake_and_a_forgotten_socket_does_not() {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let Ok(mut watch) = Watch::new(wake.try_clone().unwrap()) else {
            eprintln!("skipped: no io_uring");
            return;
        };
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(peer_process(ours.as_fd()), Some(std::process::id()));
        watch.reading(7, ours.as_fd()).unwrap();
        for byte in 0..3 {
            theirs.write_all(&[byte]).unwrap();
            assert!(wakes(&wake), "byte {byte}");
            ours.read_exact(&mut [0]).unwrap();
            if let Some(News::Unwatched(name)) = watch.take() {
                watch.reading(name, ours.as_fd()).unwrap();
            }
        }
        watch.writing(7, ours.as_fd()).unwrap();
        assert!(wakes(&wake), "it can be written to");
        assert_eq!(watch.take(), Some(News::Writable(7)));
        let (other, mut others) = UnixStream::pair().unwrap();
        watch.reading(8, other.as_fd()).unwrap();
        watch.forget(8);
        while wakes(&wake) {}
        others.write_all(&[1]).unwrap();
        assert!(!wakes(&wake), "forgotten");
        drop(theirs);
        assert!(wakes(&wake), "the end");
    }
}
