//! Descriptors that come or go as bare numbers: the listening socket of `--fd`, the private channel
//! of `--serve-channel`, the state of `--resume-state`, what a service manager passes, and the
//! events that end a session's threads.
//!
//! `vhost-user-backend` takes each exit event's reading end and forgets it when the session is
//! over: one descriptor lost per queue and session. So we keep the numbers and close them, once the
//! threads that used them are gone.

use crate::sync::lock;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::EventFd;

/// Takes over a descriptor that is, as the parent process says, a listening Unix socket. It may be
/// one that a service manager has [passed].
///
/// # Errors
/// It is no such descriptor; the sentence says what to give instead.
pub fn inherited(fd: RawFd, passed: &mut Passed) -> Result<UnixListener, String> {
    let wrong = |why: &str| {
        format!(
            "descriptor {fd} {why}; give --fd the number of a listening Unix stream socket, or use --socket-path"
        )
    };
    if let Some((_, fd)) = passed.remove(&fd) {
        return listener(fd).map_err(|why| wrong(&why));
    }
    if fd <= 2 || !is_open(fd) {
        return Err(wrong("was not passed to this process"));
    }
    // SAFETY: it is open, and by the convention of `--fd` (QEMU, vhost-user backend program
    // conventions) it is ours alone: it is none of those that were taken over before, and nothing
    // else in this process has been opened yet that could have the number.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    listener(fd).map_err(|why| wrong(&why))
}

/// The Unix socket that a descriptor is, if it listens; else what it is.
fn listener(fd: OwnedFd) -> Result<UnixListener, String> {
    match rustix::net::sockopt::socket_acceptconn(&fd) {
        Ok(true) => match rustix::net::sockopt::socket_domain(&fd) {
            Ok(rustix::net::AddressFamily::UNIX) => Ok(UnixListener::from(fd)),
            Ok(_) | Err(_) => Err("is a socket of another kind".to_owned()),
        },
        Ok(false) => Err("is a socket that does not listen".to_owned()),
        Err(error) => Err(format!("is no socket ({error})")),
    }
}

fn is_open(fd: RawFd) -> bool {
    std::path::Path::new(&format!("/proc/self/fd/{fd}")).exists()
}

/// The descriptors that a service manager has passed, by their numbers, with their names.
pub type Passed = BTreeMap<RawFd, (String, OwnedFd)>;

/// What a service manager says of them (`sd_listen_fds(3)`).
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ListenVariables {
    /// `LISTEN_PID`.
    pub pid: Option<String>,
    /// `LISTEN_FDS`.
    pub fds: Option<String>,
    /// `LISTEN_FDNAMES`.
    pub names: Option<String>,
}

impl ListenVariables {
    /// Those of the environment.
    #[must_use]
    pub fn of_environment() -> Self {
        let variable = |name| std::env::var(name).ok();
        Self {
            pid: variable("LISTEN_PID"),
            fds: variable("LISTEN_FDS"),
            names: variable("LISTEN_FDNAMES"),
        }
    }

    /// The name of each descriptor, from number 3 on. None if they are for another process.
    fn names(&self) -> Result<Vec<String>, String> {
        let pid = std::process::id().to_string();
        if self.pid.as_deref() != Some(&pid) {
            return Ok(Vec::new());
        }
        let count = self.fds.as_deref().unwrap_or_default();
        let count: usize =
            count.parse().map_err(|_| format!("LISTEN_FDS is `{count}`, which is no number"))?;
        let Some(names) = &self.names else { return Ok(vec!["unknown".to_owned(); count]) };
        let names: Vec<String> = names.split(':').map(ToOwned::to_owned).collect();
        if count > 0 && names.len() != count {
            let named = names.len();
            return Err(format!("LISTEN_FDS is {count}, and LISTEN_FDNAMES has {named} names"));
        }
        Ok(if count == 0 { Vec::new() } else { names })
    }
}

/// Takes over what a service manager has passed. To be called once, and before anything is opened.
///
/// # Errors
/// What it says of them is not so.
pub fn passed(variables: &ListenVariables) -> Result<Passed, String> {
    let mut passed = Passed::new();
    for (fd, name) in (3..).zip(variables.names()?) {
        if !is_open(fd) {
            return Err(format!("LISTEN_FDS names descriptor {fd}, which is not open"));
        }
        // SAFETY: it is open, and by the convention of LISTEN_FDS, whose LISTEN_PID is this
        // process, it is ours alone; nothing else in this process has been opened yet that could
        // have the number.
        let fd_owned = unsafe { OwnedFd::from_raw_fd(fd) };
        rustix::io::fcntl_setfd(&fd_owned, rustix::io::FdFlags::CLOEXEC)
            .map_err(|error| format!("descriptor {fd}: {error}"))?;
        passed.insert(fd, (name, fd_owned));
    }
    Ok(passed)
}

/// What a socket unit calls the frontends' socket, if it has others, too.
const FRONTEND: &str = "frontend";

/// The listening Unix socket among those that were passed: the one that is called `frontend`, or
/// the only one.
///
/// # Errors
/// There is none, or there are several.
pub fn activated(passed: &mut Passed) -> Result<UnixListener, String> {
    let listens = |fd: &OwnedFd| rustix::net::sockopt::socket_acceptconn(fd) == Ok(true);
    let found: Vec<(RawFd, String)> = passed
        .iter()
        .filter(|(_, (_, fd))| listens(fd))
        .map(|(number, (name, _))| (*number, name.clone()))
        .collect();
    let named: Vec<_> = found.iter().filter(|(_, name)| name == FRONTEND).collect();
    let chosen = match (named.as_slice(), found.as_slice()) {
        ([(number, _)], _) | ([], [(number, _)]) => *number,
        ([], []) => {
            return Err(
                "no listening socket was passed to this process; start it with its socket \
                        unit, or give --socket-path PATH instead of --socket-activation"
                    .to_owned(),
            );
        }
        _ => {
            let names: Vec<_> = found.iter().map(|(_, name)| name.as_str()).collect();
            return Err(format!(
                "several listening sockets were passed to this process ({}); say which one with \
                 FileDescriptorName={FRONTEND} in its socket unit",
                names.join(", ")
            ));
        }
    };
    let (_, fd) = passed.remove(&chosen).ok_or("it is gone")?;
    listener(fd).map_err(|why| format!("the socket that was passed to this process {why}"))
}

/// Takes over a descriptor that is, as the parent process says, the private channel; or, as the
/// program before in this process says, the socket with its state.
///
/// # Errors
/// It is no such descriptor.
pub fn inherited_channel(fd: RawFd) -> Result<OwnedFd, String> {
    let wrong = |why: &str| format!("descriptor {fd} {why}; only a supervisor passes it");
    if fd <= 2 || !is_open(fd) {
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
        let inherited = |fd| super::inherited(fd, &mut Passed::new());
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

    fn listener_in(directory: &tempfile::TempDir, name: &str) -> OwnedFd {
        UnixListener::bind(directory.path().join(name)).unwrap().into()
    }

    #[test]
    fn a_passed_socket_is_found_by_its_name_or_by_being_the_only_one() {
        let directory = tempfile::tempdir().unwrap();
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        let mut passed = Passed::new();
        assert!(activated(&mut passed).unwrap_err().contains("no listening socket"));
        passed.insert(3, ("object-1".into(), file()));
        assert!(activated(&mut passed).unwrap_err().contains("no listening socket"));
        passed.insert(4, ("vhost-hotswap@vm1.socket".into(), listener_in(&directory, "a")));
        activated(&mut passed).unwrap();
        assert_eq!(passed.keys().collect::<Vec<_>>(), [&3]);
        passed.insert(4, ("x".into(), listener_in(&directory, "b")));
        passed.insert(5, ("y".into(), listener_in(&directory, "c")));
        let error = activated(&mut passed).unwrap_err();
        assert!(error.contains("(x, y)") && error.contains("FileDescriptorName"), "{error}");
        passed.insert(6, ("frontend".into(), listener_in(&directory, "d")));
        let found = activated(&mut passed).unwrap();
        let path = found.local_addr().unwrap().as_pathname().unwrap().to_owned();
        assert_eq!(path, directory.path().join("d"));
        // By its number, and once.
        inherited(5, &mut passed).unwrap();
        assert!(!passed.contains_key(&5));
        assert!(inherited(3, &mut passed).unwrap_err().contains("no socket"));
    }

    #[test]
    fn what_a_manager_says_is_for_the_process_that_it_names_and_complete() {
        let own = std::process::id().to_string();
        let variables = |pid: &str, fds: &str, names: Option<&str>| ListenVariables {
            pid: Some(pid.to_owned()),
            fds: Some(fds.to_owned()),
            names: names.map(ToOwned::to_owned),
        };
        assert_eq!(ListenVariables::default().names(), Ok(Vec::new()));
        assert_eq!(variables("1", "2", Some("a:b")).names(), Ok(Vec::new()));
        assert_eq!(variables(&own, "0", Some("")).names(), Ok(Vec::new()));
        let names = |list: &[&str]| Ok(list.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!(variables(&own, "3", Some("a::b")).names(), names(&["a", "", "b"]));
        assert_eq!(variables(&own, "2", None).names(), names(&["unknown", "unknown"]));
        assert!(variables(&own, "2", Some("a")).names().unwrap_err().contains("has 1 names"));
        assert!(variables(&own, "x", None).names().unwrap_err().contains("no number"));
    }
}
