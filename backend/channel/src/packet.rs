//! Packets: one JSON object each, and the descriptors that come with it.

use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Mutex;

/// Most descriptors of one packet (`SCM_MAX_FD` of Linux).
pub const MAX_DESCRIPTORS: usize = 253;
/// Longest packet in bytes.
pub const MAX_PACKET: usize = 128 << 10;
/// Most packets are no longer.
const USUAL_PACKET: usize = 4 << 10;
/// What the socket's buffer is to hold: several of the longest packets.
const BUFFER: usize = 8 * MAX_PACKET;

/// Makes a channel: one end for this process, and one for the other.
///
/// # Errors
/// There are no descriptors left.
pub fn pair() -> io::Result<(Channel, OwnedFd)> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    Ok((Channel::from_socket(ours), theirs))
}

/// One end. Packets of several threads are not mixed; one thread at a time receives.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    /// What the next packet is received into.
    buffer: Mutex<Vec<u8>>,
}

impl Channel {
    /// The end that `socket` is.
    #[must_use]
    pub fn from_socket(socket: OwnedFd) -> Self {
        // As much as the system allows; without it a full buffer is waited for.
        let _ = sockopt::set_socket_send_buffer_size(&socket, BUFFER);
        Self { socket, buffer: Mutex::default() }
    }

    /// Sends `message` with `descriptors`; waits while the buffer is full.
    ///
    /// # Errors
    /// The other end is closed, or the message is too long for a packet.
    pub fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(message, descriptors, SendFlags::empty())
    }

    /// As [`send`](Self::send), without waiting: `false` if there is no room for it now.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn try_send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<bool> {
        match self.send_with(message, descriptors, SendFlags::DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            sent => sent.map(|()| true),
        }
    }

    fn send_with(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> io::Result<()> {
        let mut packet = Vec::with_capacity(USUAL_PACKET);
        serde_json::to_writer(&mut packet, message)?;
        if packet.len() > MAX_PACKET || descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} bytes with {} descriptors do not fit", packet.len(), descriptors.len()),
            ));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            let fits = ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
            assert!(fits, "there is room for {MAX_DESCRIPTORS}");
        }
        loop {
            match sendmsg(
                &self.socket,
                &[IoSlice::new(&packet)],
                &mut ancillary,
                flags | SendFlags::NOSIGNAL,
            ) {
                Err(Errno::INTR) => {}
                sent => return sent.map(drop).map_err(io::Error::from),
            }
        }
    }

    /// Receives the next message and its descriptors; waits for it. `None` when the other end is
    /// closed and everything was read.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`]: the packet is no message of this kind; the next one can be
    /// received. Others: the socket has failed.
    pub fn receive<M: DeserializeOwned>(&self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        self.receive_with(RecvFlags::empty()).map(|received| match received {
            Received::Message(message, descriptors) => Some((message, descriptors)),
            Received::End | Received::Nothing => None,
        })
    }

    /// As [`receive`](Self::receive), without waiting.
    ///
    /// # Errors
    /// As for [`receive`](Self::receive).
    pub fn try_receive<M: DeserializeOwned>(&self) -> io::Result<Received<M>> {
        self.receive_with(RecvFlags::DONTWAIT)
    }

    fn receive_with<M: DeserializeOwned>(&self, flags: RecvFlags) -> io::Result<Received<M>> {
        let mut buffer = self.buffer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        buffer.resize(MAX_PACKET, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            match recvmsg(&self.socket, &mut parts, &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC)
            {
                // The other side has closed its end with packets unread, which is said once, and
                // before what that side has sent.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                other => break other?,
            }
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.bytes == 0 && descriptors.is_empty() {
            return Ok(Received::End);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a packet is too long, or there is no descriptor left for what came with it",
            ));
        }
        let message = serde_json::from_slice(&buffer[..received.bytes])
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Received::Message(message, descriptors))
    }
}

/// What there was to receive.
#[derive(Debug)]
pub enum Received<M> {
    /// A message, and its descriptors.
    Message(M, Vec<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// The other end is closed, and everything was read.
    End,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Quarantined, Session, ToServer, ToSupervisor, Vault};
    use std::io::{Read, Write};

    fn channels() -> (Channel, Channel) {
        let (ours, theirs) = pair().unwrap();
        (ours, Channel::from_socket(theirs))
    }

    #[test]
    fn a_message_comes_whole_and_with_its_descriptors_after_its_sender_has_gone() {
        let (ours, theirs) = channels();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"x").unwrap();
        let quarantined = vec![Quarantined { queue: 1, head: 2, counter: 3 }];
        let message = ToServer::Session(Session { number: 7, quarantined, ..Session::default() });
        ours.send(&message, &[file.as_fd(), file.as_fd()]).unwrap();
        ours.send(&ToServer::Resume, &[]).unwrap();
        drop(ours);
        let (received, descriptors) = theirs.receive::<ToServer>().unwrap().unwrap();
        assert_eq!((received, descriptors.len()), (message, 2));
        let mut again = std::fs::File::from(descriptors.into_iter().next().unwrap());
        std::io::Seek::rewind(&mut again).unwrap();
        let mut text = String::new();
        again.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert!(matches!(theirs.receive::<ToServer>().unwrap(), Some((ToServer::Resume, _))));
        assert!(theirs.receive::<ToServer>().unwrap().is_none());
    }

    #[test]
    fn what_a_side_said_last_is_heard_though_it_has_not_read_everything() {
        let (ours, theirs) = channels();
        ours.send(&ToServer::Exit, &[]).unwrap();
        theirs.send(&ToSupervisor::Resumed, &[]).unwrap();
        drop(theirs);
        let received = ours.try_receive::<ToSupervisor>().unwrap();
        assert!(matches!(received, Received::Message(ToSupervisor::Resumed, _)), "{received:?}");
        let received = ours.try_receive::<ToSupervisor>().unwrap();
        assert!(matches!(received, Received::End), "{received:?}");
    }

    #[test]
    fn what_is_no_message_is_an_error_and_the_next_one_is_received() {
        let (ours, theirs) = channels();
        for bad in ["{}", "[]", "\"stopped\"", "{\"stop\":{}}", "\u{7f}"] {
            rustix::net::send(&ours, bad.as_bytes(), SendFlags::empty()).unwrap();
            let error = theirs.receive::<ToServer>().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bad}");
        }
        ours.send(&ToServer::Exit, &[]).unwrap();
        assert!(matches!(theirs.receive::<ToServer>().unwrap(), Some((ToServer::Exit, _))));
        assert!(matches!(theirs.try_receive::<ToServer>().unwrap(), Received::Nothing));
    }

    #[test]
    fn what_a_side_does_not_know_is_ignored_and_what_it_misses_has_a_default() {
        let newer =
            r#"{"vault":{"vault":{"generation":3,"live":null,"schema":1,"later":[]},"new":[]}}"#;
        let read: ToSupervisor = serde_json::from_str(newer).unwrap();
        let vault = Vault { generation: 3, schema: 1, ..Vault::default() };
        assert_eq!(read, ToSupervisor::Vault { vault: Box::new(vault), new: Vec::new() });
    }

    #[test]
    fn what_does_not_fit_now_is_not_waited_for() {
        let (ours, theirs) = channels();
        let long = ToServer::Shutdown { why: "x".repeat(MAX_PACKET / 2) };
        let mut sent = 0;
        while ours.try_send(&long, &[]).unwrap() {
            sent += 1;
        }
        assert!(sent > 1);
        for _ in 0..sent {
            assert!(theirs.receive::<ToServer>().unwrap().is_some());
        }
        assert!(ours.try_send(&ToServer::Exit, &[]).unwrap());
        assert!(theirs.receive::<ToServer>().unwrap().is_some());
        drop(theirs);
        assert_eq!(
            ours.try_send(&ToServer::Exit, &[]).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn too_much_is_refused() {
        let (ours, _theirs) = channels();
        let long = ToServer::Shutdown { why: "x".repeat(MAX_PACKET) };
        assert_eq!(ours.send(&long, &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
