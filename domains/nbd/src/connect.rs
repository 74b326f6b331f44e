//! A connection that stands: connected without blocking, greeted in time, with an export that can
//! be the disk.
//!
//! Each wait has a limit, because servers accept connections that they do not serve (one that has
//! its one client, one that is going down), and ends early when the instance does.

use crate::negotiate::{self, Export, Refusal};
use crate::server::Process;
use crate::uri::{Server, Target};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{self, AddressFamily, SocketFlags, SocketType};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the server has, from connecting to the end of the handshake.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether the wait is in vain.
const SLICE: Duration = Duration::from_millis(20);

/// A connection that stands.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) socket: OwnedFd,
    pub(crate) export: Export,
    /// Which process serves it, if that is known.
    pub(crate) server: Option<Process>,
}

/// Connects to `target` and agrees on its export. `last`: where a connection to it has led to
/// before. `stop` says whether to give up.
pub(crate) fn connect(
    target: &Target,
    last: Option<SocketAddr>,
    stop: &dyn Fn() -> bool,
) -> Result<Connection, Refusal> {
    let deadline = Instant::now() + PATIENCE;
    let (socket, path) = match &target.server {
        Server::Unix(path) => (connect_unix(path, deadline, stop)?, Some(path.as_path())),
        Server::Tcp(host, port) => {
            let addresses = (host.as_str(), *port).to_socket_addrs().map(Iterator::collect);
            (connect_tcp(&or_last(addresses, last)?, deadline, stop)?, None)
        }
    };
    let listener = Process::behind(socket.as_fd());
    let inode = path.and_then(inode);
    let mut stream = Stream { socket: &socket, deadline, stop, path, inode };
    let export = negotiate::negotiate(&mut stream, &target.export)?;
    // A server that was killed since has taken its end of the connection with it. What listened and
    // has ended without that went to the background, and another process serves.
    let server = listener.filter(|listener| !listener.is_gone() || has_ended(&socket));
    Ok(Connection { socket, export, server })
}

/// Which file is at `path` now.
fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|about| (about.dev(), about.ino()))
}

fn connect_unix(path: &Path, deadline: Instant, stop: &dyn Fn() -> bool) -> io::Result<OwnedFd> {
    let address = net::SocketAddrUnix::new(path)?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match net::connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            // The backlog is full. A blocking call would wait for ever.
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline && !stop() => {
                std::thread::sleep(SLICE);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Where a host is; if that cannot be found out now, where it was. Names cannot be looked up for as
/// long as their servers are away, and in the sandbox not if what says which these are was
/// replaced.
fn or_last(
    found: io::Result<Vec<SocketAddr>>,
    last: Option<SocketAddr>,
) -> io::Result<Vec<SocketAddr>> {
    found.or_else(|error| last.map(|last| vec![last]).ok_or(error))
}

/// Ends a connection, also for other holders of it. What the kernel has not got rid of yet is not
/// sent any more: over TCP it could reach the server much later, on top of what was newer.
pub(crate) fn end(socket: &OwnedFd) {
    // It may have ended already.
    let _ = net::shutdown(socket, net::Shutdown::Both);
    // A Unix socket knows no such call; what was sent on it is there at once.
    let _ = net::connect_unspec(socket);
}

/// Whether the other end has ended a connection.
pub(crate) fn has_ended(socket: &OwnedFd) -> bool {
    let mut watched = [PollFd::new(socket, PollFlags::RDHUP)];
    !matches!(poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
}

/// Where a connection leads to, if it is to a host.
pub(crate) fn address(socket: &OwnedFd) -> Option<SocketAddr> {
    socket.try_clone().map(TcpStream::from).and_then(|stream| stream.peer_addr()).ok()
}

fn connect_tcp(
    addresses: &[SocketAddr],
    deadline: Instant,
    stop: &dyn Fn() -> bool,
) -> io::Result<OwnedFd> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for (at, address) in addresses.iter().enumerate() {
        // One that says nothing leaves time for those behind it.
        let left = deadline.saturating_duration_since(Instant::now());
        let until = Instant::now() + left / (addresses.len() - at) as u32;
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
        let result = match net::connect(&socket, address) {
            Err(rustix::io::Errno::INPROGRESS) => wait(&socket, PollFlags::OUT, until, stop)
                .and_then(|()| net::sockopt::socket_error(&socket)?.map_err(io::Error::from)),
            result => result.map_err(io::Error::from),
        };
        match result {
            Ok(()) => {
                net::sockopt::set_tcp_nodelay(&socket, true)?;
                // A host that is gone says nothing; one that is slow answers these.
                net::sockopt::set_socket_keepalive(&socket, true)?;
                net::sockopt::set_tcp_keepidle(&socket, Duration::from_secs(10))?;
                net::sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(5))?;
                net::sockopt::set_tcp_keepcnt(&socket, 6)?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Waits until the socket is ready.
fn wait(
    socket: &OwnedFd,
    events: PollFlags,
    deadline: Instant,
    stop: &dyn Fn() -> bool,
) -> io::Result<()> {
    loop {
        let slice = Timespec { tv_sec: 0, tv_nsec: SLICE.as_nanos() as i64 };
        match poll(&mut [PollFd::new(socket, events)], Some(&slice)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            result => return result.map(drop).map_err(io::Error::from),
        }
        if stop() {
            // Not `Interrupted`: what reads and writes all of something would try again.
            return Err(io::Error::other("it is not waited for any more"));
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the server does not answer"));
        }
    }
}

/// A socket in the handshake.
struct Stream<'a> {
    socket: &'a OwnedFd,
    deadline: Instant,
    stop: &'a dyn Fn() -> bool,
    path: Option<&'a Path>,
    inode: Option<(u64, u64)>,
}

impl Stream<'_> {
    fn wait(&self, events: PollFlags) -> io::Result<()> {
        // Another server may have taken the place of one that is going down.
        let stop =
            || (self.stop)() || self.inode.is_some() && self.path.and_then(inode) != self.inode;
        wait(self.socket, events, self.deadline, &stop)
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match net::recv(self.socket.as_fd(), &mut *into, net::RecvFlags::DONTWAIT) {
                Ok((read, _)) => return Ok(read),
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::IN)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let flags = net::SendFlags::DONTWAIT | net::SendFlags::NOSIGNAL;
        loop {
            match net::send(self.socket.as_fd(), bytes, flags) {
                Ok(sent) => return Ok(sent),
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_server_is_tried_where_it_was_if_its_name_is_not_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = listener.local_addr().unwrap();
        // No name server is asked for this.
        let server = Server::Tcp("no..name".to_owned(), there.port());
        let target = Target { server, export: String::new() };
        let connects = |last| {
            // It is not greeted.
            assert!(matches!(connect(&target, last, &|| true), Err(Refusal::Io(_))));
            listener.set_nonblocking(true).unwrap();
            listener.accept().is_ok()
        };
        assert!(!connects(None));
        assert!(connects(Some(there)));
    }

    #[test]
    fn where_a_connection_leads_to_is_known_of_hosts() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(address(&stream.into()), Some(listener.local_addr().unwrap()));
        let (stream, _) = UnixStream::pair().unwrap();
        assert_eq!(address(&stream.into()), None);
    }

    #[test]
    fn an_address_that_says_nothing_leaves_time_for_the_next() {
        // A backlog that is full takes no more, and says nothing.
        let silent = net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        net::bind(&silent, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        net::listen(&silent, 0).unwrap();
        let there = SocketAddr::try_from(net::getsockname(&silent).unwrap()).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&there, Duration::from_millis(500)) {
            waiting.push(stream);
            assert!(waiting.len() < 100, "it takes all");
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let good = listener.local_addr().unwrap();
        let deadline = Instant::now() + Duration::from_secs(8);
        let socket = connect_tcp(&[there, good], deadline, &|| false).unwrap();
        assert!(Instant::now() < deadline, "no time is left for the handshake");
        assert_eq!(address(&socket), Some(good));
    }

    #[test]
    fn what_a_host_has_not_taken_is_not_sent_after_the_end() {
        use std::io::ErrorKind;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(written) = ours.write(&[1; 1 << 16]) {
            sent += written;
        }
        // Another holder, as storage is one.
        let _kept = ours.try_clone().unwrap();
        end(&OwnedFd::from(ours));
        let (mut read, mut buffer) = (0, vec![0; 1 << 16]);
        let why = loop {
            match theirs.read(&mut buffer) {
                Ok(0) => break None,
                Ok(more) => read += more,
                Err(error) => break Some(error.kind()),
            }
        };
        assert_eq!(why, Some(ErrorKind::ConnectionReset));
        assert!(read < sent, "all {sent} bytes have come");
    }

    #[test]
    fn what_is_found_comes_before_what_was() {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let gone = || Err(io::Error::other("no name server"));
        assert_eq!(or_last(Ok(vec![at(1)]), Some(at(2))).unwrap(), [at(1)]);
        assert_eq!(or_last(gone(), Some(at(2))).unwrap(), [at(2)]);
        assert_eq!(or_last(gone(), None).unwrap_err().to_string(), "no name server");
    }
}
