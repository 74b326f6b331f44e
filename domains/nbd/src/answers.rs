//! Answers that a predecessor which died had not read: they say which of its changes have ended.
//!
//! Its sockets lie in storage, and what the server has sent waits in them. Where in a reply the
//! predecessor stopped is not known, so nothing is read *as* replies: only the header of one is
//! looked for, which names the request and a number of this connection that no guest knows. What is
//! found has ended on the server, and cannot land later. What the predecessor had read and not yet
//! noted is not found; it is waited for like any old change.
//!
//! A flush among them that has failed is not told a second time by the server's kernel, so the name
//! says which requests are flushes.

use crate::marks::{DEPTH, Marks};
use crate::wire::{REPLY_LEN, REPLY_MAGIC, error};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long answers are waited for; a guest waits meanwhile. Most are there already.
const PATIENCE: Duration = Duration::from_millis(20);

/// Set in the last byte of a flush's name, whose lower bits are its index.
const FLUSH: u8 = 0x80;
const _: () = assert!(DEPTH == 0x40);

/// The last byte of a request's name.
pub(crate) const fn low_byte(index: u8, is_flush: bool) -> u8 {
    if is_flush { index | FLUSH } else { index }
}

/// The index of the request that is called so.
pub(crate) const fn index(cookie: u64) -> usize {
    cookie as usize & (DEPTH - 1)
}

struct Stream<'a> {
    slot: usize,
    socket: &'a OwnedFd,
    /// What may be the beginning of a header, and what is read next behind it.
    bytes: Vec<u8>,
    has_ended: bool,
}

/// Clears the marks of what was answered on `sockets`, each with its place among the connections.
/// Returns whether a flush has failed.
pub(crate) fn take_in(sockets: &[(usize, OwnedFd)], marks: &Marks) -> bool {
    let mut has_failed = false;
    let deadline = Instant::now() + PATIENCE;
    let mut streams: Vec<Stream<'_>> = sockets
        .iter()
        .map(|(slot, socket)| Stream { slot: *slot, socket, bytes: Vec::new(), has_ended: false })
        .collect();
    loop {
        streams.retain_mut(|stream| {
            has_failed |= stream.read(marks);
            !stream.has_ended && marks.has_any(stream.slot)
        });
        if streams.is_empty() || Instant::now() >= deadline {
            return has_failed;
        }
        let mut watched: Vec<_> =
            streams.iter().map(|stream| PollFd::new(stream.socket, PollFlags::IN)).collect();
        let pause = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        let _ = poll(&mut watched, Some(&pause));
    }
}

impl Stream<'_> {
    /// Reads what is there. Returns whether a flush has failed.
    fn read(&mut self, marks: &Marks) -> bool {
        let mut has_failed = false;
        let mut buffer = vec![0; 64 << 10];
        loop {
            match recv(self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.has_ended = true,
                Ok((read, _)) => {
                    self.bytes.extend_from_slice(&buffer[..read]);
                    let nonce = marks.nonce(self.slot);
                    find(&self.bytes, nonce, |index, is_failed_flush| {
                        marks.clear(self.slot, index);
                        has_failed |= is_failed_flush;
                    });
                    let looked_at = self.bytes.len().saturating_sub(REPLY_LEN - 1);
                    self.bytes.drain(..looked_at);
                    continue;
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => {}
                Err(_) => self.has_ended = true,
            }
            return has_failed;
        }
    }
}

/// Calls `found` with the index of each request that a header in `bytes` answers, and whether it is
/// a flush that has failed.
fn find(bytes: &[u8], nonce: u32, mut found: impl FnMut(usize, bool)) {
    let (magic, nonce) = (REPLY_MAGIC.to_be_bytes(), nonce.to_be_bytes());
    for header in bytes.windows(REPLY_LEN) {
        let index = usize::from(header[15] & !FLUSH);
        if header[..4] == magic && header[8..12] == nonce && index < DEPTH {
            let code = u32::from_be_bytes(header[4..8].try_into().expect("four bytes"));
            let has_failed = code != 0 && code != error::SHUTDOWN;
            found(index, header[15] & FLUSH != 0 && has_failed);
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
        find(&bytes, 77, |index, _| all.push(index));
        assert_eq!(all, [3, 63]);
    }

    #[test]
    fn a_flush_that_has_failed_is_told_from_all_else() {
        let header = |error: u32, low_byte: u8| {
            let cookie = 77 << 32 | 5 << 8 | u64::from(low_byte);
            [REPLY_MAGIC.to_be_bytes(), error.to_be_bytes()]
                .concat()
                .into_iter()
                .chain(cookie.to_be_bytes())
        };
        for (error, is_flush, says) in [
            (5, true, true),
            (28, true, true),
            (0, true, false),
            (5, false, false),
            (108, true, false),
        ] {
            let bytes: Vec<u8> = header(error, low_byte(9, is_flush)).collect();
            let mut all = Vec::new();
            find(&bytes, 77, |index, has_failed| all.push((index, has_failed)));
            assert_eq!(all, [(9, says)], "{error}, {is_flush}");
        }
        assert_eq!(index(77 << 32 | 5 << 8 | u64::from(low_byte(63, true))), 63);
    }
}
