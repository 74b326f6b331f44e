//! A frontend that says anything, with any descriptors, in any pieces: to [`Session`] over real
//! sockets, behind which a server does as servers do, dies at any point and is replaced.
//!
//! What has to hold: the frontend gets one answer for each message that has one, in the order of
//! its messages, and it is the one that a server has given to that message; the server gets what
//! was sent, in that order, with the descriptors that came with it, and what was interrupted by a
//! death once more. Nothing is passed on while the server owes an answer, while the session is
//! paused, or before a new in-flight region is taken. Another server is told what was carried out
//! and nothing else. What is held does not grow; no descriptor stays open.

use crate::input::Input;
use crate::pool::{lowest_free, memfd};
use crate::said::{self, Plan, holds};
use channel::{Channel, Received, ToServer};
use rustix::fs::fstat;
use rustix::io::{Errno, IoSlice};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};
use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use supervisor::deaths::Deaths;
use supervisor::journal::{Journal, sort_table};
use supervisor::region::Region;
use supervisor::relay::Relay;
use supervisor::request;
use supervisor::session::Session;
use supervisor::wire::{Connection, Incoming, Message};

/// Most that a session's description may have.
const MOST: usize = 250_000;
/// Messages that come before those of the journal.
const NEGOTIATION: usize = 3;
/// Most messages of a script.
const MESSAGES: usize = 60;

thread_local! {
    static FILES: Vec<OwnedFd> = (0..6).map(|_| memfd(8192)).collect();
}

/// A message as both ends have it: descriptors by their files.
type Shape = (u32, Vec<u8>, Vec<u64>);

fn shape(message: &Message) -> Shape {
    let file = |file: &supervisor::descriptor::Descriptor| fstat(file).expect("open").st_ino;
    (message.request, message.body.clone(), message.files.iter().map(file).collect())
}

/// What the frontend waits for.
struct Waiting {
    request: u32,
    /// No server is asked.
    is_without_kick: bool,
    body: Vec<u8>,
}

/// An answer of a server.
struct Given {
    request: u32,
    body: Vec<u8>,
    answer: Vec<u8>,
}

struct World {
    session: Session,
    frontend: OwnedFd,
    hears: Connection,
    channel: Channel,
    server: Channel,
    inner: Option<Connection>,
    /// What comes first on a new connection.
    replay: usize,
    owed: VecDeque<(Message, Kind)>,
    interrupted: Option<Shape>,
    /// What the frontend has sent, and no server has got.
    sent: VecDeque<Shape>,
    waiting: VecDeque<Waiting>,
    /// Answers to the frontend's messages that it has not got.
    given: VecDeque<Given>,
    journal: Journal,
    has_acks: bool,
    is_paused: bool,
    waits_for_region: bool,
    /// The server has said something that was not heard yet.
    has_spoken: bool,
    /// The frontend has sent what is no message: what it means is not known here.
    is_wild: bool,
    count: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Replay,
    Frontend,
    Capacity,
}

/// Carries a script out.
pub fn one_input(bytes: &[u8]) {
    FILES.with(|_| ());
    let free = lowest_free();
    let mut world = World::new();
    let mut input = Input::new(bytes);
    world.find_server();
    let mut messages = 0;
    while !input.is_empty() && world.session.over().is_none() && messages < MESSAGES {
        match input.below(16) {
            0..=6 => {
                messages += 1;
                let plan =
                    if input.one_in(4) { said::any(&mut input) } else { said::good(&mut input) };
                world.say(plan, &mut input);
            }
            7 if input.one_in(4) => {
                world.is_wild = true;
                let (bytes, count) = (input.bytes(40), input.below(4));
                world.send(bytes, count);
            }
            8..=10 => world.answer(0),
            11 => world.answer(input.u8().into()),
            12 if input.one_in(2) => world.lose_server(),
            13 => world.find_server(),
            14 => {
                world.is_paused = input.one_in(2);
                world.session.relay.pause(world.is_paused);
            }
            15 => world.take_region(),
            _ => {}
        }
        world.pump();
    }
    world.finish();
    assert!(holds(&world.session) < MOST, "{} bytes are held", holds(&world.session));
    drop(world);
    assert_eq!(lowest_free(), free, "a descriptor stays open");
}

/// Whether it is what the supervisor asks for its own sake.
fn is_capacity(message: &Message) -> bool {
    let mut body = [0; 20];
    body[4] = 8;
    message.request == request::GET_CONFIG && message.body == body
}

impl World {
    fn new() -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let (frontend, theirs) = pair.expect("sockets");
        let (channel, server) = channel::pair().expect("a channel");
        let region = Region::new(2, 16).expect("a region");
        let hears = Connection::new(frontend.try_clone().expect("a descriptor"));
        Self {
            session: Session::new(1, theirs, Relay::new(region, Some(64), 1024)),
            frontend,
            hears,
            channel,
            server: Channel::from_socket(server),
            inner: None,
            replay: 0,
            owed: VecDeque::new(),
            interrupted: None,
            sent: VecDeque::new(),
            waiting: VecDeque::new(),
            given: VecDeque::new(),
            journal: Journal::default(),
            has_acks: false,
            is_paused: false,
            waits_for_region: false,
            has_spoken: false,
            is_wild: false,
            count: 0,
        }
    }

    /// The frontend says something, in pieces.
    fn say(&mut self, plan: Plan, input: &mut Input<'_>) {
        let Plan { message, files } = plan;
        let inodes = FILES.with(|all| {
            let all = all.iter().cycle().take(files);
            all.map(|file| fstat(file).expect("open").st_ino).collect::<Vec<_>>()
        });
        let bytes = message.bytes();
        let at = if input.one_in(3) { input.below(bytes.len().min(256)) } else { 0 };
        let (first, rest) = bytes.split_at(at);
        if !first.is_empty() {
            self.send(first, files);
            self.pump();
        }
        self.send(rest, if first.is_empty() { files } else { 0 });
        // It cannot be told apart from the supervisor's.
        self.is_wild |= is_capacity(&message);
        if self.is_wild || message.is_reply() {
            return;
        }
        self.has_acks = said::has_acks_after(&message, self.has_acks);
        let is_without_kick = message.request == request::SET_VRING_KICK && files == 0;
        if said::is_answered(&message, self.has_acks) {
            let (request, body) = (message.request, message.body.clone());
            self.waiting.push_back(Waiting { request, is_without_kick, body });
        }
        if request::is_passed_on(message.request)
            && !is_without_kick
            && message.request != request::GET_PROTOCOL_FEATURES
            && message.request != request::SET_PROTOCOL_FEATURES
        {
            self.sent.push_back((message.request, message.body, inodes));
        }
    }

    fn send(&mut self, bytes: &[u8], count: usize) {
        if bytes.is_empty() {
            return;
        }
        FILES.with(|all| {
            let files: Vec<BorrowedFd<'_>> =
                all.iter().cycle().take(count).map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !files.is_empty() {
                assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
            }
            let flags = SendFlags::NOSIGNAL;
            match sendmsg(&self.frontend, &[IoSlice::new(bytes)], &mut ancillary, flags) {
                Ok(sent) if sent == bytes.len() => {}
                // There is no room for more; or the session is over.
                Ok(_) | Err(Errno::AGAIN | Errno::PIPE | Errno::CONNRESET) => self.is_wild = true,
                Err(error) => panic!("{error}"),
            }
        });
    }

    /// Has the session do what it can, and sees what comes of it.
    fn pump(&mut self) {
        let is_silent = self.is_paused && self.owed.is_empty() && !self.has_spoken;
        let must_be_silent = is_silent || self.waits_for_region;
        self.has_spoken = false;
        self.session.pump(Some(&self.channel));
        let before = self.owed.len();
        self.serve();
        assert!(
            !must_be_silent || self.owed.len() == before,
            "the server is told what has to wait"
        );
        loop {
            match self.server.try_receive::<ToServer>().expect("a message") {
                Received::Message(ToServer::Inflight(_), files) => {
                    assert_eq!(files.len(), 1);
                    self.waits_for_region = true;
                }
                Received::Message(other, _) => panic!("the server is told {other:?}"),
                Received::Nothing => break,
                Received::End => panic!("the other end is there"),
            }
        }
        while let Incoming::Message(message) = self.hears.receive() {
            self.answered(&message);
        }
    }

    /// The server takes what has come.
    fn serve(&mut self) {
        while let Some(inner) = &mut self.inner {
            let Incoming::Message(message) = inner.receive() else { break };
            let kind = if self.replay > 0 {
                self.replay -= 1;
                Kind::Replay
            } else if is_capacity(&message) {
                Kind::Capacity
            } else {
                Kind::Frontend
            };
            assert!(kind == Kind::Replay || self.owed.is_empty(), "asked before it has answered");
            if kind == Kind::Frontend && !self.is_wild {
                let expected = match self.interrupted.take() {
                    Some(interrupted) => interrupted,
                    None => self.sent.pop_front().expect("it was sent"),
                };
                let mut got = shape(&message);
                if got.0 == request::SET_MEM_TABLE {
                    // In another order.
                    let (mut table, mut files) = (expected.2.clone(), got.2.clone());
                    (table.sort_unstable(), files.sort_unstable());
                    assert_eq!((table, got.1.len()), (files, expected.1.len()));
                    got = expected.clone();
                }
                assert_eq!(got, expected, "not what was sent next");
            }
            self.owed.push_back((message, kind));
        }
    }

    /// The server answers what it was asked first.
    fn answer(&mut self, code: u64) {
        let (Some(inner), Some((message, kind))) = (&mut self.inner, self.owed.pop_front()) else {
            return;
        };
        self.count += 1;
        let (request, count) = (message.request, self.count);
        let has_answer = request::has_answer(request);
        let is_sound = said::is_sound(&message, said::regions(&self.journal))
            && !self.journal.is_other_size(&message, said::LARGEST_RING);
        let code = match kind {
            Kind::Replay => 0,
            // The supervisor refuses some with this answer, whatever the server says.
            _ if request == request::SET_VRING_NUM && !is_sound => 1,
            _ => code | u64::from(!is_sound),
        };
        let body = match request {
            request::GET_VRING_BASE => [message.u32_at(0).unwrap_or(0), count]
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect(),
            request::GET_CONFIG => {
                let mut body = vec![0; 20];
                body[4] = 8;
                body[12..16].copy_from_slice(&count.to_le_bytes());
                body
            }
            _ if has_answer => u64::from(count).to_le_bytes().to_vec(),
            _ => code.to_le_bytes().to_vec(),
        };
        let answer = Message::reply(request, body, Vec::new());
        if kind == Kind::Frontend {
            if has_answer || code == 0 {
                self.journal.note(&message, Some(&answer));
            }
            let answer = answer.body.clone();
            self.given.push_back(Given { request, body: message.body, answer });
        }
        inner.send(&answer);
        self.has_spoken = true;
    }

    /// The frontend gets an answer.
    fn answered(&mut self, answer: &Message) {
        assert!(answer.is_reply(), "the frontend is asked: {answer:?}");
        if self.is_wild {
            return;
        }
        let waiting = self.waiting.pop_front().expect("an answer to nothing");
        assert_eq!(answer.request, waiting.request, "an answer out of turn");
        let is_passed_on = request::is_passed_on(answer.request)
            && answer.request != request::GET_PROTOCOL_FEATURES
            && answer.request != request::SET_PROTOCOL_FEATURES;
        if !is_passed_on || waiting.is_without_kick {
            return;
        }
        // Those before it were answers that the frontend does not want.
        let given = std::iter::from_fn(|| self.given.pop_front()).find(|given| {
            let is_table = given.request == request::SET_MEM_TABLE;
            given.request == answer.request
                && given.answer == answer.body
                && (given.body == waiting.body || is_table)
        });
        assert!(given.is_some(), "no server has given that answer to {}", waiting.request);
    }

    fn take_region(&mut self) {
        if self.waits_for_region {
            self.waits_for_region = false;
            self.session.relay.inflight_is_taken();
        }
    }

    fn lose_server(&mut self) {
        if self.inner.is_none() {
            return;
        }
        self.serve();
        let asked = self.owed.iter().find(|(_, kind)| *kind == Kind::Frontend);
        if let Some((message, _)) = asked {
            self.interrupted = Some(shape(message));
        }
        self.owed.clear();
        self.inner = None;
        self.session.take_back();
        (self.waits_for_region, self.has_spoken) = (false, true);
        self.check_journal();
    }

    fn check_journal(&self) {
        if self.session.over().is_some() {
            return;
        }
        let kept = self.session.relay.journal().replay();
        let made = self.journal.replay();
        let shapes = |messages: &[Message]| {
            let sorted = messages.iter().cloned().map(|mut message| {
                if message.request == request::SET_MEM_TABLE {
                    sort_table(&mut message);
                }
                shape(&message)
            });
            sorted.collect::<Vec<_>>()
        };
        assert_eq!(shapes(&kept), shapes(&made), "not what was carried out");
    }

    fn find_server(&mut self) {
        if self.inner.is_some() {
            return;
        }
        let given = self.session.give_to(&self.channel, &Deaths::default());
        given.expect("the channel is open");
        let received = self.server.try_receive::<ToServer>().expect("a message");
        let Received::Message(ToServer::Session(session), files) = received else {
            panic!("no session, but {received:?}");
        };
        let mut files = files.into_iter();
        let listener = UnixListener::from(files.next().expect("a listening socket"));
        let (stream, _) = listener.accept().expect("a connection");
        self.inner = Some(Connection::new(stream.into()));
        self.replay = NEGOTIATION + self.session.relay.journal().replay().len();
        // As a server that has looked at its rings.
        if let (Some(memfd), Some(place)) = (files.next(), session.inflight) {
            let part = place.len / u64::from(place.queues.max(1));
            for queue in 0..u64::from(place.queues) {
                let _ = rustix::io::pwrite(&memfd, &[0; 8], place.offset + queue * part);
            }
        }
        self.serve();
        self.check_journal();
    }

    /// A good server for the rest: whatever is waited for comes.
    fn finish(&mut self) {
        self.is_paused = false;
        self.session.relay.pause(false);
        for _ in 0..600 {
            if self.session.over().is_some() {
                return;
            }
            self.find_server();
            self.take_region();
            self.answer(0);
            self.pump();
            if self.owed.is_empty() && self.waiting.is_empty() && !self.waits_for_region {
                break;
            }
        }
        assert!(self.is_wild || self.waiting.is_empty(), "the frontend waits for ever");
        assert!(self.is_wild || self.interrupted.is_none());
        self.check_journal();
    }
}
