//! Answers that a predecessor which died had not read: they say which of its changes have ended.
//!
//! Its sockets lie in storage, and what the server has sent waits in them. Where in a reply the
//! predecessor stopped is not known, so nothing is read *as* replies: only the header of one is
//! looked for, which names the request and a number of this connection that no guest knows. What is
//! found has ended on the server, and cannot land later. What the predecessor had read and not yet
//! noted is not found; it is waited for like any old change.

use crate::marks::{DEPTH, Marks};
use crate::wire::{REPLY_LEN, REPLY_MAGIC};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long answers are waited for; a guest waits meanwhile. Most are there already.
const PATIENCE: Duration = Duration::from_millis(20);

struct Stream<'a> {
    slot: usize,
    socket: &'a OwnedFd,
    /// What may be the beginning of a header, and what is read next behind it.
    bytes: Vec<u8>,
    has_ended: bool,
}

/// Clears the marks of what was answered on `sockets`, each with its place among the connections.
pub(crate) fn take_in(sockets: &[(usize, OwnedFd)], marks: &Marks) {
    let deadline = Instant::now() + PATIENCE;
    let mut streams: Vec<Stream<'_>> = sockets
        .iter()
        .map(|(slot, socket)| Stream { slot: *slot, socket, bytes: Vec::new(), has_ended: false })
        .collect();
    loop {
        streams.retain_mut(|stream| {
            stream.read(marks);
            !stream.has_ended && marks.has_any(stream.slot)
        });
        if streams.is_empty() || Instant::now() >= deadline {
            return;
        }
        let mut watched: Vec<_> =
            streams.iter().map(|stream| PollFd::new(stream.socket, PollFlags::IN)).collect();
        let pause = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        let _ = poll(&mut watched, Some(&pause));
    }
}

impl Stream<'_> {
    /// Reads what is there.
    fn read(&mut self, marks: &Marks) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match recv(self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.has_ended = true,
                Ok((read, _)) => {
                    self.bytes.extend_from_slice(&buffer[..read]);
                    let nonce = marks.nonce(self.slot);
                    find(&self.bytes, nonce, |index| marks.clear(self.slot, index));
                    let looked_at = self.bytes.len().saturating_sub(REPLY_LEN - 1);
                    self.bytes.drain(..looked_at);
                    continue;
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => {}
                Err(_) => self.has_ended = true,
            }
            return;
        }
    }
}

/// Calls `found` with the index of each request that a header in `bytes` answers.
fn find(bytes: &[u8], nonce: u32, mut found: impl FnMut(usize)) {
    let (magic, nonce) = (REPLY_MAGIC.to_be_bytes(), nonce.to_be_bytes());
    for header in bytes.windows(REPLY_LEN) {
        let index = usize::from(header[15]);
        if header[..4] == magic && header[8..12] == nonce && index < DEPTH {
            found(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_found_between_data_and_only_those_of_the_connection() {
        let header = |nonce: u32, counter: u32, index: u8| {
            let cookie = u64::from(nonce) << 32 | u64::from(counter) << 8 | u64::from(index);
            [&REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat()
        };
        let bytes = [
            &[1; 7][..],
            &header(77, 5, 3),
            &[0x67; 100],
            &header(78, 6, 4),
            &header(77, 0x00ff_ffff, 63),
            &header(77, 9, 64),
            &header(77, 9, 9)[..15],
        ]
        .concat();
        let mut all = Vec::new();
        find(&bytes, 77, |index| all.push(index));
        assert_eq!(all, [3, 63]);
    }
}
