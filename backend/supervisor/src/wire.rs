//! vhost-user messages on a stream socket.
//!
//! A message is a header of 12 bytes (request, flags, size of what follows), a body, and
//! descriptors that come with the first byte. [`Parser`] makes messages of bytes; it says how many
//! it wants next and is never given more, so that the descriptors that come along belong to the
//! message that is being read. [`Connection`] is a socket with both directions; nothing in it
//! waits.

use crate::descriptor::Descriptor;
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes of a header.
pub const HEADER: usize = 12;
/// Longest body. The largest that there is, a table of 32 memory regions, has 1032 bytes.
pub const MAX_BODY: usize = 4096;
/// Most descriptors of a message.
pub const MAX_DESCRIPTORS: usize = 32;

/// Of the flags: the version, which is 1.
const VERSION_MASK: u32 = 3;
const VERSION: u32 = 1;
/// Of the flags: this is an answer.
pub const REPLY: u32 = 4;
/// Of the flags: the sender wants to be told how it went.
pub const NEED_REPLY: u32 = 8;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// What it asks for.
    pub request: u32,
    /// Version, [`REPLY`], [`NEED_REPLY`].
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// What comes with it.
    pub files: Vec<Descriptor>,
}

impl Message {
    /// A request that wants no answer.
    #[must_use]
    pub fn new(request: u32, body: impl Into<Vec<u8>>, files: Vec<Descriptor>) -> Self {
        Self { request, flags: VERSION, body: body.into(), files }
    }

    /// An answer to `request`.
    #[must_use]
    pub fn reply(request: u32, body: impl Into<Vec<u8>>, files: Vec<Descriptor>) -> Self {
        Self { request, flags: VERSION | REPLY, body: body.into(), files }
    }

    /// The same, whose sender wants to be told how it went.
    #[must_use]
    pub fn with_need_reply(mut self) -> Self {
        self.flags |= NEED_REPLY;
        self
    }

    /// Whether its sender wants to be told how it went.
    #[must_use]
    pub const fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Whether it is an answer.
    #[must_use]
    pub const fn is_reply(&self) -> bool {
        self.flags & REPLY != 0
    }

    /// The 64-bit number at `at` in the body.
    #[must_use]
    pub fn u64_at(&self, at: usize) -> Option<u64> {
        let bytes = self.body.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// The 32-bit number at `at` in the body.
    #[must_use]
    pub fn u32_at(&self, at: usize) -> Option<u32> {
        let bytes = self.body.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    /// As it goes over a socket, but for the descriptors.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        for word in [self.request, self.flags, self.body.len() as u32] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// Why what came is no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Of another version of the protocol.
    #[error("the flags {0:#x} are not those of a message of version 1")]
    Flags(u32),
    /// Longer than any message.
    #[error("a message of {0} bytes")]
    TooLong(u32),
    /// With more descriptors than any message has, or than this process may have.
    #[error("a message with more descriptors than can be taken")]
    Descriptors,
}

/// Makes messages of bytes.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Parser {
    bytes: Vec<u8>,
    files: Vec<Descriptor>,
}

impl Parser {
    /// How many bytes are still missing of what comes next: a header, or a body. Never 0.
    #[must_use]
    pub fn wants(&self) -> usize {
        match self.size() {
            None => HEADER - self.bytes.len(),
            Some(size) => HEADER + size as usize - self.bytes.len(),
        }
    }

    /// Whether there is a part of a message.
    #[must_use]
    pub fn is_amid(&self) -> bool {
        !self.bytes.is_empty()
    }

    fn word(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    fn size(&self) -> Option<u32> {
        self.word(8)
    }

    /// Takes at most as many bytes as it [wants](Self::wants), and what came with them; gives a
    /// message if it is whole.
    ///
    /// # Errors
    /// It is no message; nothing that follows on this connection can be understood.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        files: impl IntoIterator<Item = Descriptor>,
    ) -> Result<Option<Message>, Malformed> {
        debug_assert!(bytes.len() <= self.wants(), "more than was wanted");
        self.bytes.extend_from_slice(bytes);
        self.files.extend(files);
        if self.files.len() > MAX_DESCRIPTORS {
            return Err(Malformed::Descriptors);
        }
        let (Some(request), Some(flags), Some(size)) = (self.word(0), self.word(4), self.size())
        else {
            return Ok(None);
        };
        if flags & VERSION_MASK != VERSION {
            return Err(Malformed::Flags(flags));
        }
        if size as usize > MAX_BODY {
            return Err(Malformed::TooLong(size));
        }
        if self.bytes.len() < HEADER + size as usize {
            return Ok(None);
        }
        let body = self.bytes.split_off(HEADER);
        self.bytes.clear();
        Ok(Some(Message { request, flags, body, files: std::mem::take(&mut self.files) }))
    }
}

/// What there was to receive.
#[derive(Debug)]
pub enum Incoming {
    /// A message.
    Message(Message),
    /// Nothing now.
    Nothing,
    /// The other side is gone.
    End,
    /// What it sends cannot be understood.
    Malformed(Malformed),
}

/// A message, or the rest of one, that waits to be sent.
#[derive(Debug, Serialize, Deserialize)]
struct Outgoing {
    bytes: Vec<u8>,
    files: Vec<Descriptor>,
}

/// A socket with what is half read, and what is still to be written.
#[derive(Debug, Serialize, Deserialize)]
pub struct Connection {
    socket: Descriptor,
    parser: Parser,
    out: VecDeque<Outgoing>,
    is_broken: bool,
}

impl Connection {
    /// On a stream socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket: socket.into(),
            parser: Parser::default(),
            out: VecDeque::new(),
            is_broken: false,
        }
    }

    /// Receives the next message, if all of it is there.
    pub fn receive(&mut self) -> Incoming {
        loop {
            let mut bytes = vec![0; self.parser.wants()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received =
                recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags);
            let received = match received {
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Incoming::Nothing,
                Err(_) => return Incoming::End,
                Ok(received) => received,
            };
            let mut files: Vec<Descriptor> = Vec::new();
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    files.extend(rights.map(Descriptor::from));
                }
            }
            if received.flags.contains(ReturnFlags::CTRUNC) {
                return Incoming::Malformed(Malformed::Descriptors);
            }
            if received.bytes == 0 {
                return Incoming::End;
            }
            match self.parser.feed(&bytes[..received.bytes], files) {
                Err(malformed) => return Incoming::Malformed(malformed),
                Ok(Some(message)) => return Incoming::Message(message),
                Ok(None) => {}
            }
        }
    }

    /// Has a message sent, as soon as it can be.
    pub fn send(&mut self, message: &Message) {
        let (bytes, files) = (message.bytes(), message.files.clone());
        self.out.push_back(Outgoing { bytes, files });
        self.flush();
    }

    /// Sends what can be sent now.
    pub fn flush(&mut self) {
        while let Some(next) = self.out.front_mut() {
            let files: Vec<BorrowedFd<'_>> = next.files.iter().map(AsFd::as_fd).collect();
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !files.is_empty() {
                let fits = ancillary.push(SendAncillaryMessage::ScmRights(&files));
                assert!(fits, "no message has more than {MAX_DESCRIPTORS}");
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.socket, &[IoSlice::new(&next.bytes)], &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    // The end is found out by reading, which comes to it after what is still there.
                    self.is_broken = true;
                    self.out.clear();
                    return;
                }
                Ok(sent) => {
                    // They went with the first byte.
                    next.files.clear();
                    next.bytes.drain(..sent);
                    if next.bytes.is_empty() {
                        self.out.pop_front();
                    }
                }
            }
        }
    }

    /// Whether something waits until the other side reads.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        !self.out.is_empty()
    }

    /// Whether there is a part of a message that was received.
    #[must_use]
    pub fn is_amid(&self) -> bool {
        self.parser.is_amid()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn file() -> Descriptor {
        OwnedFd::from(tempfile::tempfile().unwrap()).into()
    }

    fn pair() -> (Connection, Connection) {
        let (one, other) = UnixStream::pair().unwrap();
        (Connection::new(one.into()), Connection::new(other.into()))
    }

    fn next(connection: &mut Connection) -> Message {
        match connection.receive() {
            Incoming::Message(message) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_come_whole_whatever_the_pieces_are() {
        let messages = [
            Message::new(3, [], Vec::new()),
            Message::new(2, [7; 8], Vec::new()).with_need_reply(),
            Message::reply(24, vec![1; 300], Vec::new()),
        ];
        let bytes: Vec<u8> = messages.iter().flat_map(Message::bytes).collect();
        for piece in 1..40 {
            let mut parser = Parser::default();
            let mut found = Vec::new();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(piece.min(parser.wants()).min(rest.len()));
                found.extend(parser.feed(now, []).unwrap());
                rest = later;
            }
            assert_eq!(found, messages, "pieces of {piece}");
            assert!(!parser.is_amid());
        }
    }

    #[test]
    fn what_is_no_message_is_found_out_at_its_header() {
        let feed = |words: [u32; 3]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            Parser::default().feed(&bytes, [])
        };
        assert_eq!(feed([1, 3, 0]), Err(Malformed::Flags(3)));
        assert_eq!(feed([1, 0, 0]), Err(Malformed::Flags(0)));
        assert_eq!(feed([1, 1, u32::MAX]), Err(Malformed::TooLong(u32::MAX)));
        assert_eq!(feed([1, 1, MAX_BODY as u32]), Ok(None));
        let files = std::iter::repeat_with(file).take(MAX_DESCRIPTORS + 1);
        assert_eq!(Parser::default().feed(&[1], files), Err(Malformed::Descriptors));
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let (mut one, mut other) = pair();
        one.send(&Message::new(1, [], Vec::new()));
        one.send(&Message::new(5, [0; 8], vec![file(), file()]));
        one.send(&Message::new(12, [0; 8], vec![file()]));
        let counts = [(); 3].map(|()| next(&mut other).files.len());
        assert_eq!(counts, [0, 2, 1]);
        assert!(matches!(other.receive(), Incoming::Nothing));
        drop(one);
        assert!(matches!(other.receive(), Incoming::End));
    }

    #[test]
    fn a_peer_that_does_not_read_is_not_waited_for_and_misses_nothing() {
        let (mut one, mut other) = pair();
        // One for all: a user may have 1024 open.
        let (count, file) = (2000_u32, file());
        for number in 0..count {
            one.send(&Message::new(number, vec![number as u8; 1000], vec![file.clone()]));
        }
        assert!(one.is_stuck());
        for number in 0..count {
            let message = loop {
                match other.receive() {
                    Incoming::Message(message) => break message,
                    Incoming::Nothing => one.flush(),
                    end => panic!("{end:?}"),
                }
            };
            assert_eq!((message.request, message.files.len()), (number, 1));
            assert_eq!(message.body, vec![number as u8; 1000]);
        }
        assert!(!one.is_stuck());
    }

    #[test]
    fn half_a_message_is_waited_for_without_waiting() {
        let (stream, other) = UnixStream::pair().unwrap();
        let mut other = Connection::new(other.into());
        let bytes = Message::new(2, [9; 8], Vec::new()).bytes();
        for byte in &bytes[..bytes.len() - 1] {
            (&stream).write_all(&[*byte]).unwrap();
            assert!(matches!(other.receive(), Incoming::Nothing));
        }
        assert!(other.is_amid());
        (&stream).write_all(&bytes[bytes.len() - 1..]).unwrap();
        assert_eq!(next(&mut other).body, [9; 8]);
        other.send(&Message::reply(2, [], Vec::new()));
        let mut answer = [0; 12];
        (&stream).read_exact(&mut answer).unwrap();
        assert_eq!(answer[4], 5);
    }
}
