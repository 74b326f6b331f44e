//! Who is at the other end of a connection, as the kernel says it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    /// The process, if it has a number in our PID namespace.
    pub(crate) pid: Option<u32>,
    /// Its user, by its number in our user namespace.
    pub(crate) uid: u32,
}

/// Asks the kernel who has connected. By a bare call, because `rustix` takes a process for
/// something that always has a number.
///
/// # Errors
/// The system call failed.
pub(crate) fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to `peer`, which has that size and is made of
    // integers only, and the length to `size`; both live until it returns.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            std::ptr::from_mut(&mut peer).cast(),
            &raw mut size,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // Less than all of it would leave us with a user of 0.
    if size as usize != size_of_val(&peer) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Peer { pid: u32::try_from(peer.pid).ok().filter(|&pid| pid != 0), uid: peer.uid })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_end_of_a_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        assert_eq!(peer(&one).unwrap(), Peer { pid: Some(std::process::id()), uid });
    }
}
