//! An io_uring that holds one poll request for each socket.

use super::News;
use io_uring::{IoUring, cqueue, opcode, types};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Sockets that one has room for, twice: for reading and for writing.
const ENTRIES: u32 = 64;
/// Set in the name of a poll request for writing.
const WRITING: u64 = 1 << 63;
/// The name of a request to remove others.
const REMOVAL: u64 = u64::MAX;

/// As [`Watch`](super::Watch) says.
pub(super) struct Ring {
    io: IoUring,
    /// Kept open as long as the kernel writes to it.
    _wake: OwnedFd,
    /// What the kernel has said and was not taken.
    news: Vec<News>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}

impl Ring {
    pub(super) fn new(wake: OwnedFd) -> io::Result<Self> {
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

    pub(super) fn reading(&mut self, name: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let events = (libc::POLLIN | libc::POLLRDHUP) as u32;
        let entry = opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), events).multi(true);
        self.submit(entry.build().user_data(u64::from(name)))
    }

    pub(super) fn writing(&mut self, name: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), libc::POLLOUT as u32);
        self.submit(entry.build().user_data(u64::from(name) | WRITING))
    }

    pub(super) fn forget(&mut self, name: u32) {
        for request in [u64::from(name), u64::from(name) | WRITING] {
            // It has ended already, or the kernel is short of memory; then it wakes for nothing.
            let _ = self.submit(opcode::PollRemove::new(request).build().user_data(REMOVAL));
        }
        self.news.retain(
            |news| !matches!(news, News::Unwatched(of) | News::Writable(of) if *of == name),
        );
    }

    #[inline]
    pub(super) fn take(&mut self) -> Option<News> {
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
