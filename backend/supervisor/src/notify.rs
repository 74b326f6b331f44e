//! What is said to the service manager, by systemd's protocol (`sd_notify(3)`): one datagram each,
//! with at most one descriptor.
//!
//! Nothing here waits: a manager that is busy is told later. The crate `sd-notify` is not used:
//! `backend/decisions/0063-a-disk-in-memory-is-kept-by-the-service-manager.md` says why.

use rustix::io::{Errno, IoSlice};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sendmsg_addr, socket_with,
};
use std::ffi::OsStr;
use std::io::{self, PipeReader};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// The variable with the socket's address.
const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
/// What a service manager has in the environment of its services, and theirs have no use for.
pub(crate) const VARIABLES: [&str; 6] =
    [NOTIFY_SOCKET, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "FDSTORE"];

/// The service manager.
#[derive(Debug)]
pub struct Manager {
    socket: OwnedFd,
    address: SocketAddrUnix,
}

impl Manager {
    /// The one that the environment names, if it names one.
    #[must_use]
    pub fn from_environment() -> Option<Self> {
        let address = std::env::var_os(NOTIFY_SOCKET).filter(|address| !address.is_empty())?;
        Self::at(&address)
            .inspect_err(|error| {
                log::warn!("the service manager at {} is not told: {error}", address.display());
            })
            .ok()
    }

    /// The one at an address: a path, or an abstract name that begins with `@`.
    ///
    /// # Errors
    /// It is neither, or there are no descriptors left.
    pub fn at(address: &OsStr) -> io::Result<Self> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
            path @ [b'/', ..] => SocketAddrUnix::new(path)?,
            _ => return Err(io::Error::other("only Unix sockets are known")),
        };
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        Ok(Self { socket, address })
    }

    /// Says something. `false` if there is no room for it now.
    ///
    /// # Errors
    /// The manager is not there.
    pub fn say(&self, text: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<bool> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<_> = descriptor.into_iter().collect();
        if !descriptors.is_empty() {
            let fits = ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
            assert!(fits, "there is room for one");
        }
        let text = [IoSlice::new(text.as_bytes())];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match sendmsg_addr(&self.socket, &self.address, &text, &mut ancillary, flags) {
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Asks for a sign when everything that was said before has been looked at: what comes back
    /// hangs up then. `None` if there is no room for it now.
    ///
    /// # Errors
    /// The manager is not there, or there are no descriptors left.
    pub fn barrier(&self) -> io::Result<Option<PipeReader>> {
        let (reader, writer) = io::pipe()?;
        let is_said = self.say("BARRIER=1\n", Some(writer.as_fd()))?;
        Ok(is_said.then_some(reader))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    #[test]
    fn what_is_said_arrives_by_path_and_by_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("vhost-hotswap-notify-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (address, socket) in [
            (path.clone().into_os_string(), UnixDatagram::bind(&path).unwrap()),
            (format!("@{name}").into(), UnixDatagram::bind_addr(&abstract_name).unwrap()),
        ] {
            let manager = Manager::at(&address).unwrap();
            assert!(manager.say("READY=1\n", None).unwrap());
            let mut said = [0; 64];
            let len = socket.recv(&mut said).unwrap();
            assert_eq!(&said[..len], b"READY=1\n");
        }
    }

    #[test]
    fn a_manager_that_does_not_look_holds_nothing_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let _socket = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::at(path.as_os_str()).unwrap();
        let said = (0..100_000).take_while(|_| manager.say("X=1\n", None).unwrap()).count();
        assert!(said < 100_000, "there is no bound");
        assert!(manager.barrier().unwrap().is_none());
    }

    #[test]
    fn an_address_that_is_none_and_a_manager_that_is_gone_are_errors() {
        assert!(Manager::at(OsStr::new("vsock:1:2")).is_err());
        let gone = Manager::at(OsStr::new("/nowhere/at/all")).unwrap();
        assert_eq!(gone.say("X=1\n", None).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
