//! Descriptors that come or go as bare numbers: the listening socket of `--fd`, the private channel
//! of `--serve-channel`, the state of `--resume-state`, and the events that end a session's
//! threads.
//!
//! `vhost-user-backend` takes each exit event's reading end and forgets it when the session is
//! over: one descriptor lost per queue and session. So we keep the numbers and close them, once the
//! threads that used them are gone.

use crate::sync::lock;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::EventFd;

/// Takes over a descriptor that is, as the parent process says, a listening Unix socket.
///
/// # Errors
/// It is no such descriptor; the sentence says what to give instead.
pub fn inherited(fd: RawFd) -> Result<UnixListener, String> {
    let wrong = |why: &str| {
        format!(
            "descriptor {fd} {why}; give --fd the number of a listening Unix stream socket, or use --socket-path"
        )
    };
    if fd <= 2 || !std::path::Path::new(&format!("/proc/self/fd/{fd}")).exists() {
        return Err(wrong("was not passed to this process"));
    }
    // SAFETY: it is open, and by the convention of `--fd` (QEMU, vhost-user backend program
    // conventions) it is ours alone; nothing else in this process has been opened yet that could
    // have the number.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match rustix::net::sockopt::socket_acceptconn(&fd) {
        Ok(true) => match rustix::net::sockopt::socket_domain(&fd) {
            Ok(rustix::net::AddressFamily::UNIX) => Ok(UnixListener::from(fd)),
            Ok(_) | Err(_) => Err(wrong("is a socket of another kind")),
        },
        Ok(false) => Err(wrong("is a socket that does not listen")),
        Err(error) => Err(wrong(&format!("is no socket ({error})"))),
    }
}

/// Takes over a descriptor that is, as the parent process says, the private channel; or, as the
/// program before in this process says, the socket with its state.
///
/// # Errors
/// It is no such descriptor.
pub fn inherited_channel(fd: RawFd) -> Result<OwnedFd, String> {
    let wrong = |why: &str| format!("descriptor {fd} {why}; only a supervisor passes it");
    if fd <= 2 || !std::path::Path::new(&format!("/proc/self/fd/{fd}")).exists() {
        return Err(wrong("was not passed to this process"));
    }
    // SAFETY: it is open, and by the convention of `--serve-channel` and `--resume-state` it is
    // ours alone; nothing else in this process has been opened yet that could have the number.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
        .map_err(|error| wrong(&error.to_string()))?;
    match rustix::net::sockopt::socket_type(&fd) {
        Ok(rustix::net::SocketType::SEQPACKET) => Ok(fd),
        Ok(_) | Err(_) => Err(wrong("is no socket of packets")),
    }
}

/// A dup of an event's descriptor.
///
/// # Errors
/// There are no descriptors left.
pub(crate) fn dup(event: &EventFd) -> io::Result<OwnedFd> {
    let dup = event.try_clone()?;
    // SAFETY: the dup is ours, open, and given away by `into_raw_fd`.
    Ok(unsafe { OwnedFd::from_raw_fd(dup.into_raw_fd()) })
}

/// The events of one session.
pub(crate) struct ExitEvents {
    events: Mutex<Vec<Option<(EventConsumer, EventNotifier)>>>,
    given_away: Mutex<Vec<RawFd>>,
}

impl ExitEvents {
    /// One event for each of `threads` threads.
    ///
    /// # Errors
    /// There are no descriptors left. Later would be too late: a thread without an event cannot be
    /// ended.
    pub(crate) fn new(threads: usize) -> io::Result<Self> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let events = (0..threads).map(|_| new_event_consumer_and_notifier(flags).map(Some));
        Ok(Self {
            events: Mutex::new(events.collect::<io::Result<_>>()?),
            given_away: Mutex::default(),
        })
    }

    /// Gives the event of a thread away, once.
    pub(crate) fn take(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let pair = lock(&self.events).get_mut(thread)?.take()?;
        lock(&self.given_away).push(pair.0.as_raw_fd());
        Some(pair)
    }

    /// Closes them. To be called when the session's threads have been joined and its daemon is
    /// dropped.
    pub(crate) fn close(&self) {
        for fd in lock(&self.given_away).drain(..) {
            // SAFETY: `VringEpollHandler::new` took the consumer with `into_raw_fd` and never
            // closes it; the number is known nowhere else, and it is closed once, because it leaves
            // the list.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn only_a_listening_unix_socket_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let unix = UnixListener::bind(directory.path().join("socket")).unwrap();
        let addr = unix.local_addr().unwrap();
        let taken = inherited(unix.into_raw_fd()).unwrap();
        assert_eq!(taken.local_addr().unwrap().as_pathname(), addr.as_pathname());
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let refused = inherited(tcp.into_raw_fd()).unwrap_err();
        assert!(refused.contains("of another kind"), "{refused}");
        let (talking, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(inherited(talking.into_raw_fd()).unwrap_err().contains("does not listen"));
        assert!(inherited(9999).unwrap_err().contains("not passed"));
    }
}
