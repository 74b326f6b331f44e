//! What the kernel knows of a TCP connection whose other end says nothing.

use std::os::fd::{AsRawFd, BorrowedFd};

/// How often in a row the kernel has sent data again that the other end has not acknowledged;
/// `None` of what is no TCP socket.
///
/// The pause doubles each time: the eighth comes some 50 s after the data on a short way. A peer
/// that lives and does not read acknowledges what it gets, and answers the probes that follow; they
/// do not count.
#[must_use]
pub fn retransmissions(socket: BorrowedFd<'_>) -> Option<u8> {
    /// Where `tcp_info` has it, behind two states of a byte each.
    const AT: usize = 2;
    // The kernel gives as much of `tcp_info` as there is room for.
    let mut info = [0u8; 8];
    let mut size = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to `info`, which has that size, and the length
    // to `size`; both live until it returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut size,
        )
    };
    (result == 0 && size as usize > AT).then_some(info[AT])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    /// Has the kernel drop all that comes for a socket, as if its host was gone. Returns whether it
    /// lets a user do that.
    fn deafen(socket: &TcpStream) -> bool {
        // "Return 0 bytes of it": none is let through.
        let mut all = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 };
        let filter = libc::sock_fprog { len: 1, filter: &raw mut all };
        // SAFETY: the kernel reads the program of one instruction, which lives until it returns.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const filter).cast(),
                size_of_val(&filter) as libc::socklen_t,
            )
        };
        result == 0
    }

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    }

    #[test]
    fn a_host_that_is_gone_is_told_from_one_that_is_slow() {
        let (mut gone, theirs) = pair();
        if !deafen(&theirs) {
            eprintln!("skipped: no filter for a socket ({})", std::io::Error::last_os_error());
            return;
        }
        gone.write_all(&[1]).unwrap();
        // This one takes nothing at all.
        let (mut slow, mut reader) = pair();
        slow.set_nonblocking(true).unwrap();
        while slow.write(&[1; 1 << 16]).is_ok() {}
        let of = |socket: &TcpStream| retransmissions(socket.as_fd()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while of(&gone) < 4 {
            assert!(Instant::now() < deadline);
            assert_eq!(of(&slow), 0);
            std::thread::sleep(Duration::from_millis(5));
        }
        // It lives.
        reader.read_exact(&mut [0; 1 << 16]).unwrap();
    }

    #[test]
    fn of_what_is_no_tcp_socket_nothing_is_known() {
        let (socket, _other) = UnixStream::pair().unwrap();
        assert_eq!(retransmissions(socket.as_fd()), None);
    }
}
