//! The bytes of the transmission phase: requests as they are sent, and a decoder of simple replies.
//!
//! Structured replies are not agreed upon: a reply's payload follows its header at once, and an
//! error is a number. The decoder takes bytes in pieces of any size, keeps no more than a header,
//! and never looks at what a payload holds.
//!
//! All numbers are big-endian (NBD protocol, "Transmission").

const REQUEST_MAGIC: u32 = 0x2560_9513;
/// What a simple reply begins with.
pub const REPLY_MAGIC: u32 = 0x6744_6698;
/// Length of a simple reply's header.
pub const REPLY_LEN: usize = 16;
/// Length of a request's header.
pub const REQUEST_LEN: usize = 28;

/// `NBD_CMD_FLAG_NO_HOLE`, for write-zeroes.
pub const NO_HOLE: u16 = 1 << 1;

/// Errors that are dealt with (NBD protocol, "Error values"). They are Linux's numbers.
pub mod error {
    /// The server is going down.
    pub const SHUTDOWN: u32 = 108;

    /// An error as the server has told it. None says that a request was given up here.
    #[must_use]
    pub fn told(error: u32) -> std::io::Error {
        const ECANCELED: u32 = 125;
        const EINVAL: u32 = 22;
        let known = if error == ECANCELED || error > 4095 { EINVAL } else { error };
        std::io::Error::from_raw_os_error(known as i32)
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Data from the export.
    Read = 0,
    /// Data to the export.
    Write = 1,
    /// Make what was answered durable.
    Flush = 3,
    /// The range is not needed any more.
    Trim = 4,
    /// The range is to read as zeros.
    WriteZeroes = 6,
}

/// A request's header.
#[must_use]
pub fn request(
    command: Command,
    flags: u16,
    cookie: u64,
    offset: u64,
    len: u32,
) -> [u8; REQUEST_LEN] {
    let mut bytes = [0; REQUEST_LEN];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// What the decoder has found.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A request has ended, with 0 or an error. For a read that went well its data was before.
    Ended {
        /// Its name.
        cookie: u64,
        /// 0, or the error.
        error: u32,
    },
    /// Some of the data of a read.
    Data {
        /// The read's name.
        cookie: u64,
        /// How many bytes of it came before.
        at: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
}

/// What a server must not send.
#[derive(Debug, PartialEq, Eq)]
pub enum Violation {
    /// No reply begins like this.
    Magic(u32),
    /// Nothing that was asked is called so.
    Cookie(u64),
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Magic(magic) => write!(f, "the server has sent {magic:#x} where a reply begins"),
            Self::Cookie(cookie) => {
                write!(f, "the server has answered {cookie:#x}, which was not asked")
            }
        }
    }
}

/// Where in the stream of replies we are.
#[derive(Debug, Default)]
pub struct Decoder {
    header: [u8; REPLY_LEN],
    /// Bytes of the header that are there.
    have: usize,
    /// The read whose data comes: its name, how much is there, and how much there will be.
    data: Option<(u64, u64, u64)>,
}

impl Decoder {
    /// Whether a reply has begun and not ended.
    #[must_use]
    pub const fn is_within_a_reply(&self) -> bool {
        self.have > 0 || self.data.is_some()
    }

    /// Takes the next event off the front of `bytes`; `None` when they are used up. `expects` says
    /// how many bytes of data follow a good reply to a request, `None` if there is no such request.
    ///
    /// # Errors
    /// The server has broken the protocol: the stream is of no use any more.
    #[inline]
    pub fn next<'a>(
        &mut self,
        bytes: &mut &'a [u8],
        expects: impl Fn(u64) -> Option<u64>,
    ) -> Result<Option<Event<'a>>, Violation> {
        if let Some((cookie, at, len)) = self.data {
            if at == len {
                self.data = None;
                return Ok(Some(Event::Ended { cookie, error: 0 }));
            }
            if bytes.is_empty() {
                return Ok(None);
            }
            let now = usize::try_from(len - at).unwrap_or(usize::MAX).min(bytes.len());
            let (data, rest) = bytes.split_at(now);
            *bytes = rest;
            self.data = Some((cookie, at + now as u64, len));
            return Ok(Some(Event::Data { cookie, at, bytes: data }));
        }
        let now = (REPLY_LEN - self.have).min(bytes.len());
        let (front, rest) = bytes.split_at(now);
        self.header[self.have..self.have + now].copy_from_slice(front);
        self.have += now;
        *bytes = rest;
        // What is wrong is said as soon as it can be seen.
        let magic = u32::from_be_bytes([0, 1, 2, 3].map(|at| self.header[at]));
        if self.have >= 4 && magic != REPLY_MAGIC {
            return Err(Violation::Magic(magic));
        }
        if self.have < REPLY_LEN {
            return Ok(None);
        }
        self.have = 0;
        let error = u32::from_be_bytes([4, 5, 6, 7].map(|at| self.header[at]));
        let cookie = u64::from_be_bytes([8, 9, 10, 11, 12, 13, 14, 15].map(|at| self.header[at]));
        let len = expects(cookie).ok_or(Violation::Cookie(cookie))?;
        if error != 0 || len == 0 {
            return Ok(Some(Event::Ended { cookie, error }));
        }
        self.data = Some((cookie, 0, len));
        self.next(bytes, expects)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(error: u32, cookie: u64) -> Vec<u8> {
        [&REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
    }

    /// Feeds `bytes` in pieces of `piece`; what came of each request: its error, and its data.
    fn decode(bytes: &[u8], piece: usize) -> Result<Vec<(u64, u32, Vec<u8>)>, Violation> {
        let (mut decoder, mut ended, mut data) = (Decoder::default(), Vec::new(), Vec::new());
        for mut bytes in bytes.chunks(piece) {
            let expects = |cookie| [(1, 0), (2, 5), (3, 3)].iter().find(|(c, _)| *c == cookie);
            while let Some(event) = decoder.next(&mut bytes, |c| expects(c).map(|(_, len)| *len))? {
                match event {
                    Event::Data { at, bytes, .. } => {
                        assert_eq!(at as usize, data.len());
                        data.extend_from_slice(bytes);
                    }
                    Event::Ended { cookie, error } => {
                        ended.push((cookie, error, std::mem::take(&mut data)));
                    }
                }
            }
        }
        assert!(!decoder.is_within_a_reply());
        Ok(ended)
    }

    #[test]
    fn replies_are_found_in_pieces_of_any_size() {
        let bytes = [
            &reply(0, 2)[..],
            b"hello",
            &reply(5, 3),
            &reply(0, 1),
            &reply(0, 3),
            b"abc",
            &reply(28, 1),
        ]
        .concat();
        let expected = vec![
            (2, 0, b"hello".to_vec()),
            (3, 5, Vec::new()),
            (1, 0, Vec::new()),
            (3, 0, b"abc".to_vec()),
            (1, 28, Vec::new()),
        ];
        for piece in 1..=bytes.len() {
            assert_eq!(decode(&bytes, piece), Ok(expected.clone()), "{piece}");
        }
    }

    #[test]
    fn what_is_no_reply_is_a_violation() {
        for piece in 1..=16 {
            assert_eq!(decode(&reply(0, 9), piece), Err(Violation::Cookie(9)));
            let structured = 0x668e_33efu32.to_be_bytes();
            assert_eq!(decode(&structured, piece), Err(Violation::Magic(0x668e_33ef)));
        }
    }

    #[test]
    fn a_request_is_28_bytes_in_network_order() {
        let bytes = request(Command::WriteZeroes, NO_HOLE, 0x0102_0304_0506_0708, 512, 4096);
        let expected = [
            0x25, 0x60, 0x95, 0x13, 0, 2, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 2, 0, 0,
            0, 0x10, 0,
        ];
        assert_eq!(bytes, expected);
    }
}
