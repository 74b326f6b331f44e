//! What the kernel knows of a TCP connection whose other end says nothing.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// How long the other end of a connection has acknowledged nothing, though it is asked to.
///
/// A peer that lives and does not read acknowledges what it gets, and answers the probes that the
/// kernel sends as long as there is no room for data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Silence {
    /// How often in a row data was sent again. The pause doubles each time: the eighth comes some
    /// 50 s after the data on a short way.
    pub retransmissions: u8,
    /// How many probes in a row are not answered. Of a peer that lives it may be two: one is on its
    /// way, and the one before came within half a second of another, which Linux does not answer
    /// (`tcp_invalid_ratelimit`). The pause doubles up to 120 s here as well, but begins where it
    /// was when the last one was answered.
    pub probes: u8,
    /// Since the last acknowledgement.
    pub lasts: Duration,
}

impl Silence {
    /// Data that was sent again so often was sent to a host that is gone. Some 50 s: what takes the
    /// way of a switch that starts anew is not given up.
    const RETRANSMISSIONS: u8 = 8;
    /// So many probes at least, over such a time at least. One alone may have been lost.
    const PROBES: u8 = 3;
    const PROBED: Duration = Duration::from_secs(50);

    /// What the kernel knows; `None` of what is no TCP socket.
    #[must_use]
    pub fn of(socket: BorrowedFd<'_>) -> Option<Self> {
        let info = info(socket)?;
        let lasts = u32::from_ne_bytes(info[AT_LAST_ACK..].try_into().expect("4 bytes are left"));
        Some(Self {
            retransmissions: info[AT_RETRANSMISSIONS],
            probes: info[AT_PROBES],
            lasts: Duration::from_millis(lasts.into()),
        })
    }

    /// Whether the other end's host is taken for gone.
    #[must_use]
    pub fn is_long(self) -> bool {
        self.retransmissions >= Self::RETRANSMISSIONS
            || self.probes >= Self::PROBES && self.lasts >= Self::PROBED
    }
}

/// Where `tcp_info` has it: bytes first, and then numbers of four bytes.
const AT_RETRANSMISSIONS: usize = 2;
const AT_PROBES: usize = 3;
const AT_LAST_ACK: usize = 56;

/// The beginning of `tcp_info`.
fn info(socket: BorrowedFd<'_>) -> Option<[u8; AT_LAST_ACK + 4]> {
    // The kernel gives as much of it as there is room for.
    let mut info = [0u8; AT_LAST_ACK + 4];
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
    (result == 0 && size as usize == info.len()).then_some(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

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

    fn of(socket: &TcpStream) -> Silence {
        Silence::of(socket.as_fd()).unwrap()
    }

    /// A connection whose other end has no room for more, as the kernel has found by a probe.
    fn full() -> (TcpStream, TcpStream) {
        /// How often the pause before the next try has doubled.
        const AT_BACKOFF: usize = 4;
        let (ours, theirs) = pair();
        ours.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let has_probed = || info(ours.as_fd()).unwrap()[AT_BACKOFF] > 0;
        while !has_probed() || of(&ours).retransmissions > 0 {
            while (&ours).write(&[1; 1 << 16]).is_ok() {}
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
        (ours, theirs)
    }

    #[test]
    fn a_host_that_is_gone_is_told_from_one_that_is_slow() {
        let (mut gone, theirs) = pair();
        if !deafen(&theirs) {
            eprintln!("skipped: no filter for a socket ({})", std::io::Error::last_os_error());
            return;
        }
        gone.write_all(&[1]).unwrap();
        // This one was slow before it was gone: its silence is that of probes.
        let (slow_first, theirs) = full();
        deafen(&theirs);
        // This one takes nothing at all.
        let (slow, mut reader) = full();
        let deadline = Instant::now() + Duration::from_secs(60);
        while of(&gone).retransmissions < 4 || of(&slow_first).probes < Silence::PROBES {
            assert!(Instant::now() < deadline, "{:?}, {:?}", of(&gone), of(&slow_first));
            let seen = of(&slow);
            assert!(seen.retransmissions == 0 && seen.probes < Silence::PROBES, "{seen:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        // By repetitions alone it would be waited for.
        assert_eq!(of(&slow_first).retransmissions, 0);
        // Its probes, three of them, have pauses of 200 ms and more.
        assert!(of(&slow_first).lasts >= Duration::from_millis(400), "{:?}", of(&slow_first));
        // It lives.
        reader.read_exact(&mut [0; 1 << 16]).unwrap();
    }

    #[test]
    fn a_silence_is_long_after_repetitions_or_probes_over_some_time() {
        let is_long = |retransmissions, probes, lasts| {
            Silence { retransmissions, probes, lasts: Duration::from_secs(lasts) }.is_long()
        };
        assert!(is_long(8, 0, 50) && !is_long(7, 0, 50));
        assert!(is_long(0, 3, 50) && is_long(0, 3, 300));
        // A probe, or its answer, that was lost, where the next comes after 120 s.
        assert!(!is_long(0, 2, 240));
        assert!(!is_long(0, 6, 12));
    }

    #[test]
    fn of_what_is_no_tcp_socket_nothing_is_known() {
        let (socket, _other) = UnixStream::pair().unwrap();
        assert_eq!(Silence::of(socket.as_fd()), None);
    }
}
