//! Bytes on their way to a server: encoded, and not taken by the socket yet.

use rustix::net::{SendFlags, send};
use std::os::fd::BorrowedFd;

/// Memory that is kept while there are none.
const KEPT: usize = 4 << 20;

#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    bytes: Vec<u8>,
    /// How many of them are sent.
    sent: usize,
}

impl Outgoing {
    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Room for `len` more, to be filled.
    pub(crate) fn room(&mut self, len: usize) -> &mut [u8] {
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        &mut self.bytes[at..]
    }

    /// Sends as much as the socket takes. Returns whether some of it has to wait.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> rustix::io::Result<bool> {
        while self.len() > 0 {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(socket, &self.bytes[self.sent..], flags) {
                Ok(sent) => self.sent += sent,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    self.let_go_of_sent();
                    return Ok(true);
                }
                Err(error) => return Err(error),
            }
        }
        self.sent = 0;
        self.bytes.clear();
        if self.bytes.capacity() > KEPT {
            self.bytes = Vec::new();
        }
        Ok(false)
    }

    /// Lets go of what is sent, where it is at least half: so no more is moved than was sent, and
    /// what is kept is never more than twice what waits. There may be bytes that wait for as long
    /// as the guest writes.
    fn let_go_of_sent(&mut self) {
        if self.sent >= self.len() {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_sent_is_let_go_of_while_more_is_added() {
        const PIECE: usize = 64 << 10;
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut outgoing = Outgoing::default();
        let mut all = 0usize;
        let mut buffer = vec![0; PIECE];
        let mut read = 0usize;
        // There is always something that waits.
        for _ in 0..1000 {
            while outgoing.len() < 16 * PIECE {
                for (at, byte) in outgoing.room(PIECE).iter_mut().enumerate() {
                    *byte = ((all + at) >> 10) as u8;
                }
                all += PIECE;
            }
            assert!(outgoing.send(ours.as_fd()).unwrap());
            theirs.read_exact(&mut buffer).unwrap();
            let is_right = |(at, byte): (usize, &u8)| *byte == ((read + at) >> 10) as u8;
            assert!(buffer.iter().enumerate().all(is_right), "{read}");
            read += PIECE;
            assert!(outgoing.bytes.len() <= 34 * PIECE, "{} bytes", outgoing.bytes.len());
        }
        outgoing.push(&[1, 2, 3]);
        while outgoing.send(ours.as_fd()).unwrap() {
            assert!(theirs.read(&mut buffer).unwrap() > 0);
        }
        assert_eq!((outgoing.len(), outgoing.bytes.len()), (0, 0));
    }
}
