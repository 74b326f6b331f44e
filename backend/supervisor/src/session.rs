//! A frontend's session with its two sockets: the frontend's, and the one to the server.
//!
//! [`Relay`] says what becomes of a message; this does it. Nothing here waits.

use crate::deaths::Deaths;
use crate::descriptor::Descriptor;
use crate::relay::{Effect, Relay};
use crate::wire::{Connection, Incoming, Message};
use channel::{Channel, ToServer};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname,
    listen, socket_with,
};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

/// How many names are tried for a server's socket.
const TRIES: usize = 8;
/// How many messages are looked at before others have their turn.
const TURN: usize = 64;
/// How long rings that a server was given are not looked at again.
const LOOK_AT_RINGS: Duration = Duration::from_micros(200);
/// How long a server has for looking at them, before their memory may be missing.
const RINGS_PATIENCE: Duration = Duration::from_secs(2);
/// How long they are not looked at again from then on.
const LOOK_AT_LATE_RINGS: Duration = Duration::from_millis(10);
/// How long a frontend waits for them at most, before another server is to do better.
const RINGS_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a session is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Over {
    /// The frontend has disconnected.
    Gone,
    /// The server has ended it, and says why if there is something to say.
    Ended,
    /// The frontend does not keep to the protocol.
    Refused(String),
}

/// A frontend's session.
#[derive(Debug, Serialize, Deserialize)]
pub struct Session {
    /// Its number, which the server gives back at its end.
    pub number: u64,
    /// What becomes of its messages.
    pub relay: Relay,
    /// A server has been told of it, and has not said that it is over.
    pub was_given: bool,
    /// Since when rings are waited for that the server has not looked at.
    #[serde(skip)]
    rings_since: Option<Instant>,
    frontend: Connection,
    inner: Option<Connection>,
    /// Why it is over, once it is.
    over: Option<Over>,
    /// The frontend is gone, but what it has said before is still to be heard.
    has_hung_up: bool,
    /// The frontend has said something.
    #[serde(default)]
    has_spoken: bool,
    /// Answers for the session that waits.
    #[serde(skip)]
    answers: Vec<Message>,
}

impl Session {
    /// One that begins, with no server behind it yet.
    #[must_use]
    pub fn new(number: u64, frontend: OwnedFd, relay: Relay) -> Self {
        let frontend = Connection::new(frontend);
        Self {
            number,
            relay,
            was_given: false,
            rings_since: None,
            frontend,
            inner: None,
            over: None,
            has_hung_up: false,
            has_spoken: false,
            answers: Vec::new(),
        }
    }

    /// Whether the frontend has said anything.
    #[must_use]
    pub const fn has_spoken(&self) -> bool {
        self.has_spoken
    }

    /// Another session is to have the server, or has it.
    pub fn wait(&mut self) {
        self.take_back();
        self.relay.wait();
    }

    /// Answers for the session that waits, once.
    pub fn take_answers(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.answers)
    }

    /// Gives the session to a server, and has it made what it was.
    ///
    /// # Errors
    /// The server is gone, or there are no descriptors left.
    pub fn give_to(&mut self, channel: &Channel, deaths: &Deaths) -> io::Result<()> {
        let (listener, inner) = inner_connection()?;
        let region = self.relay.region();
        let session = channel::Session {
            number: self.number,
            inflight: Some(region.place),
            cautious: deaths.is_cautious(),
            quarantined: deaths.quarantined().to_vec(),
        };
        channel.send(&ToServer::Session(session), &[listener.as_fd(), region.memfd.as_fd()])?;
        self.inner = Some(Connection::new(inner));
        self.was_given = true;
        self.rings_since = None;
        let effects = self.relay.server_is_found();
        self.apply(effects, Some(channel));
        Ok(())
    }

    /// The server is gone, or is to have the session no more. What it has said is heard before.
    pub fn take_back(&mut self) {
        self.hear_server(None);
        self.inner = None;
        self.was_given = false;
        self.relay.server_is_lost();
    }

    /// Hears what the server has said of it, and what is still to be sent to the frontend is.
    pub fn server_has_ended_it(&mut self) {
        self.hear_server(None);
        self.inner = None;
        self.end(Over::Ended);
    }

    /// Ends it if its in-flight region is not all there any more: where that ends, every access is
    /// a fault, of this server and of each one after it. Whether it is so.
    pub fn end_without_region(&mut self) -> bool {
        let is_cut_short = self.relay.region().is_cut_short();
        if is_cut_short {
            let why = "the frontend's in-flight region was cut short, which ends its server";
            self.end(Over::Refused(why.to_owned()));
        }
        is_cut_short
    }

    fn end(&mut self, why: Over) {
        self.frontend.flush();
        self.over.get_or_insert(why);
    }

    /// Why it is over, once it is.
    #[must_use]
    pub const fn over(&self) -> Option<&Over> {
        self.over.as_ref()
    }

    /// Whether a server is to have it: none has, and it is not over. One that has closed its end
    /// has it until it says that it has left it.
    #[must_use]
    pub const fn is_to_be_given(&self) -> bool {
        !self.was_given && self.inner.is_none() && self.over.is_none()
    }

    /// What to look for at the frontend's socket, if at anything.
    #[must_use]
    pub fn frontend(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, !self.relay.is_held() && !self.frontend.is_stuck());
        flags.set(PollFlags::OUT, self.frontend.is_stuck());
        (!self.has_hung_up).then(|| (self.frontend.as_fd(), flags))
    }

    /// What to look for at the server's socket, if there is one.
    #[must_use]
    pub fn inner(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let inner = self.inner.as_ref()?;
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, inner.is_stuck());
        Some((inner.as_fd(), flags))
    }

    /// Something has happened at the frontend's socket.
    pub fn frontend_is_ready(&mut self, what: PollFlags) {
        if what.intersects(PollFlags::HUP | PollFlags::ERR) {
            // It is found by reading, unless there is no server that could be told what is read.
            self.has_hung_up = true;
            if !self.relay.is_up() {
                self.end(Over::Gone);
            }
        }
    }

    /// When there is something to look at even if nothing happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let is_late = self.rings_since.is_some_and(|since| since.elapsed() > RINGS_PATIENCE);
        let again = if is_late { LOOK_AT_LATE_RINGS } else { LOOK_AT_RINGS };
        self.relay.waits_for_rings().then(|| Instant::now() + again)
    }

    fn look_at_rings(&mut self, channel: Option<&Channel>) {
        if !self.relay.waits_for_rings() {
            self.rings_since = None;
            return;
        }
        let since = self.rings_since.get_or_insert_with(Instant::now);
        let effects = if since.elapsed() > RINGS_PATIENCE {
            if self.has_hung_up {
                self.end(Over::Gone);
            }
            self.relay.stop_waiting_for_rings()
        } else {
            self.relay.look_at_region()
        };
        self.apply(effects, channel);
    }

    /// Whether the frontend has waited for too long for a server that does not look at its rings.
    /// It is so again when as much time has passed.
    pub fn rings_take_too_long(&mut self, now: Instant) -> bool {
        let is_late = |since: Instant| now.saturating_duration_since(since) >= RINGS_TIMEOUT;
        let waits = self.relay.waits_for_rings() && self.rings_since.is_some_and(is_late);
        if !waits || !(self.relay.is_interrupted() || is_readable(&self.frontend)) {
            return false;
        }
        self.rings_since = Some(now);
        true
    }

    /// Does all that can be done now.
    pub fn pump(&mut self, channel: Option<&Channel>) {
        for _ in 0..TURN {
            self.frontend.flush();
            self.hear_server(channel);
            self.look_at_rings(channel);
            if self.over.is_some() || self.relay.is_held() || self.frontend.is_stuck() {
                break;
            }
            match self.frontend.receive() {
                Incoming::Message(message) => {
                    self.has_spoken = true;
                    let effects = self.relay.from_frontend(message);
                    self.apply(effects, channel);
                }
                Incoming::Nothing => break,
                Incoming::End => self.end(Over::Gone),
                Incoming::Malformed(why) => self.end(Over::Refused(why.to_string())),
            }
        }
        if let Some(inner) = &mut self.inner {
            inner.flush();
        }
    }

    fn hear_server(&mut self, channel: Option<&Channel>) {
        while let Some(inner) = &mut self.inner {
            match inner.receive() {
                Incoming::Message(message) => {
                    let effects = self.relay.from_server(message);
                    self.apply(effects, channel);
                }
                Incoming::Nothing => break,
                // It says by the other channel what this means, or dies.
                Incoming::End | Incoming::Malformed(_) => self.inner = None,
            }
        }
    }

    /// Does what the relay says.
    pub fn apply(&mut self, effects: impl IntoIterator<Item = Effect>, channel: Option<&Channel>) {
        for effect in effects {
            match effect {
                Effect::Frontend(message) => self.frontend.send(&message),
                Effect::Server(message) => {
                    // Without a connection the server is about to be known as lost.
                    if let Some(inner) = &mut self.inner {
                        inner.send(&message);
                    }
                }
                Effect::Inflight(region) => {
                    if let Some(channel) = channel {
                        let message = ToServer::Inflight(region.place);
                        // As above.
                        let _ = channel.send(&message, &[region.memfd.as_fd()]);
                    }
                }
                Effect::Kick(kicks) => kicks.iter().for_each(kick),
                Effect::Backend(backend, message) => self.tell(&backend, &message),
                Effect::Other(answer) => self.answers.push(answer),
                Effect::Close(why) => self.end(Over::Refused(why)),
            }
        }
    }

    fn tell(&mut self, backend: &Descriptor, message: &Message) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let bytes = message.bytes();
        if rustix::net::send(backend, &bytes, flags) != Ok(bytes.len()) {
            log::warn!("the frontend does not hear what it is told of the disk");
            self.relay.backend_is_lost();
        }
    }
}

/// A connection, and the listening socket that its other end is accepted from.
fn inner_connection() -> io::Result<(OwnedFd, OwnedFd)> {
    for _ in 0..TRIES {
        let listener = inner_listener()?;
        match connect_first(&listener) {
            Ok(inner) => return Ok((listener, inner)),
            Err(Errno::AGAIN) => log::warn!("a stranger has connected to a server's socket"),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::other("strangers connect to all sockets of servers"))
}

fn socket(flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags | SocketFlags::CLOEXEC, None)
}

/// A socket that one connection can wait at. Its name is the kernel's choice, and goes with it.
fn inner_listener() -> io::Result<OwnedFd> {
    let listener = socket(SocketFlags::empty())?;
    bind(&listener, &SocketAddrUnix::new_unnamed())?;
    // The kernel takes one more than this.
    listen(&listener, 0)?;
    Ok(listener)
}

/// Connects to a socket at which nothing waits. Its name can be seen and connected to by every
/// process of the network namespace, and what is accepted there commands the disk; so a connection
/// that has come before fails this, and one that comes after it finds no room.
fn connect_first(listener: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let inner = socket(SocketFlags::NONBLOCK)?;
    connect(&inner, &SocketAddrUnix::try_from(getsockname(listener)?)?)?;
    Ok(inner)
}

/// Whether something has come that was not read.
fn is_readable(socket: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
}

/// Kicks a ring; spurious kicks are legal. What would have to be waited for is no event descriptor,
/// or was kicked enough.
fn kick(kick: &Descriptor) {
    let mut fds = [PollFd::new(kick, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut fds, Some(&now)) == Ok(1) && fds[0].revents() == PollFlags::OUT {
        let _ = rustix::io::write(kick, &1_u64.to_ne_bytes());
    }
}
