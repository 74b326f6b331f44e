//! A server that says anything, at any time, in any pieces, and dies at any point: to [`Relay`],
//! behind which a frontend sends what frontends send.
//!
//! What has to hold: an answer is taken for the message that was asked first, and for no other; it
//! is given to the frontend at most once, as it is, and only if the frontend waits for one; what
//! was not asked ends the session. Nothing is asked while an answer is owed, or without a server.
//! The journal is what was carried out; another server is told what is in it and nothing else, and
//! what was interrupted is asked again, once. What is held does not grow with what is said.

use crate::input::Input;
use crate::pool;
use crate::said::{self, holds};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsRawFd;
use supervisor::descriptor::Descriptor;
use supervisor::journal::Journal;
use supervisor::region::Region;
use supervisor::relay::{Effect, Relay};
use supervisor::request;
use supervisor::wire::{Malformed, Message, Parser};

/// Most that a session's description may have: two of the longest messages, memory and rings.
const MOST: usize = 200_000;
/// Messages that come before those of the journal.
const NEGOTIATION: usize = 3;

/// Why the server was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Replay,
    Frontend,
    Capacity,
}

/// A message that the server owes an answer to.
#[derive(Debug, Clone)]
struct Owed {
    message: Message,
    why: Why,
    is_answered: bool,
}

struct World {
    relay: Relay,
    parser: Parser,
    owed: VecDeque<Owed>,
    interrupted: Option<Owed>,
    journal: Journal,
    is_linked: bool,
    is_up: bool,
    is_paused: bool,
    waits_for_region: bool,
    has_acks: bool,
    is_over: bool,
    files: Vec<Descriptor>,
}

thread_local! {
    static FILES: (Region, Vec<Descriptor>) = (
        Region::new(2, 16).expect("a region"),
        (0..4).map(|_| Descriptor::from(pool::memfd(8192))).collect(),
    );
}

/// Carries a script out.
pub fn one_input(bytes: &[u8]) {
    let (region, files) = FILES.with(Clone::clone);
    for file in files.iter().chain([&region.memfd]) {
        // What an earlier script has left.
        let _ = rustix::io::pwrite(file, &[0; 640], 0);
    }
    let mut world = World::new(region, files);
    let mut input = Input::new(bytes);
    if input.one_in(4) {
        world.find_server();
    }
    while !input.is_empty() && !world.is_over {
        world.step(&mut input);
        world.check();
    }
    if !world.is_over {
        world.finish();
    }
    assert!(holds(&world.relay) < MOST, "{} bytes are held", holds(&world.relay));
}

fn is_capacity(message: &Message) -> bool {
    message.request == request::GET_CONFIG
        && message.body[..12] == [0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]
}

impl World {
    fn new(region: Region, files: Vec<Descriptor>) -> Self {
        Self {
            relay: Relay::new(region, Some(64), 1024),
            parser: Parser::default(),
            owed: VecDeque::new(),
            interrupted: None,
            journal: Journal::default(),
            is_linked: false,
            is_up: false,
            is_paused: false,
            waits_for_region: false,
            has_acks: false,
            is_over: false,
            files,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(24) {
            0..=7 => self.frontend(input),
            8..=13 => self.answer(0, input),
            14 => {
                let code = input.u64();
                self.answer(code, input);
            }
            15 => {
                // Anything at all, but as a message.
                let plan = said::any(input);
                let mut message = plan.message;
                if input.one_in(2) {
                    message.flags |= supervisor::wire::REPLY;
                }
                message.files = self.some_files(plan.files);
                self.hear(&message.bytes(), message.files, input);
            }
            16 => {
                let bytes = input.bytes(20);
                self.hear(bytes, Vec::new(), input);
            }
            17 => {
                // Half an answer; the rest never comes, or is something else.
                let Some(owed) = self.owed.front() else { return };
                let bytes = Message::reply(owed.message.request, [0; 8], Vec::new()).bytes();
                let count = input.below(bytes.len());
                self.hear(&bytes[..count], Vec::new(), input);
            }
            18 | 19 => self.lose_server(),
            20 => self.find_server(),
            21 => {
                self.is_paused = input.one_in(2);
                self.relay.pause(self.is_paused);
            }
            22 => {
                self.waits_for_region = false;
                self.relay.inflight_is_taken();
                self.look_at_rings(input.one_in(2));
                drop(self.relay.config_has_changed());
            }
            _ => self.write_down_and_read(),
        }
    }

    fn some_files(&self, count: usize) -> Vec<Descriptor> {
        self.files.iter().cycle().take(count).cloned().collect()
    }

    fn check(&self) {
        let must_wait =
            !self.is_up || self.is_paused || !self.owed.is_empty() || self.waits_for_region;
        assert!(self.is_over || !must_wait || self.relay.is_held(), "a message would not wait");
        assert_eq!(self.relay.is_up(), self.is_up);
        if !self.is_over {
            assert_eq!(*self.relay.journal(), self.journal, "what was carried out is not noted");
        }
    }

    /// The frontend says something, if it is heard.
    fn frontend(&mut self, input: &mut Input<'_>) {
        let plan = if input.one_in(4) { said::any(input) } else { said::good(input) };
        if self.relay.is_held() {
            return;
        }
        let mut message = plan.message;
        message.files = self.some_files(plan.files);
        self.has_acks = said::has_acks_after(&message, self.has_acks);
        let is_answered = said::is_answered(&message, self.has_acks);
        let mut answers = 0;
        for effect in self.relay.from_frontend(message.clone()) {
            match effect {
                Effect::Frontend(answer) => {
                    assert!(answer.is_reply() && answer.request == message.request);
                    assert!(is_answered, "an answer that is not waited for: {answer:?}");
                    answers += 1;
                }
                Effect::Server(passed) => {
                    assert!(self.owed.is_empty() && request::is_passed_on(passed.request));
                    assert!(request::has_answer(passed.request) || passed.needs_reply());
                    let owed = Owed { message: passed, why: Why::Frontend, is_answered };
                    self.owed.push_back(owed);
                }
                Effect::Inflight(_) => self.waits_for_region = true,
                Effect::Close(_) => self.is_over = true,
                other => panic!("a frontend has brought about {other:?}"),
            }
        }
        let is_owed = !self.owed.is_empty();
        assert!(answers + usize::from(is_owed && is_answered) <= 1, "two answers");
        let is_told = answers == 1 || is_owed || !is_answered || self.is_over;
        assert!(is_told, "{message:?} will not be answered");
    }

    /// The server has looked at its rings, or does not in time.
    fn look_at_rings(&mut self, has_looked: bool) {
        if has_looked && self.is_up {
            let region = self.relay.region();
            // A header of 16 bytes and as many for each descriptor, in whole lines; the region may
            // have more than that.
            let part = (16 + 16 * u64::from(region.place.queue_size)).next_multiple_of(64);
            for queue in 0..u64::from(region.place.queues) {
                let at = region.place.offset + queue * part;
                let _ = rustix::io::pwrite(&region.memfd, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0], at);
            }
        }
        if !self.relay.waits_for_rings() {
            return;
        }
        let effects = if has_looked {
            self.relay.look_at_region()
        } else {
            self.relay.stop_waiting_for_rings()
        };
        let has_ring = |queue: &u32| self.journal.has_ring(*queue);
        let may_wait = !has_looked && self.journal.running().iter().any(has_ring);
        assert!(may_wait || !self.relay.waits_for_rings(), "rings are waited for");
        assert!(effects.len() <= 1);
        for effect in effects {
            let Effect::Server(message) = effect else { panic!("rings bring about {effect:?}") };
            assert!(self.owed.is_empty() && self.is_up, "asked too early: {message:?}");
            self.asked_by_itself(message);
        }
    }

    /// A right answer to what was asked first.
    fn answer(&mut self, code: u64, input: &mut Input<'_>) {
        let Some(owed) = self.owed.front() else { return };
        let request = owed.message.request;
        let mut body = code.to_le_bytes().to_vec();
        if request == request::GET_CONFIG {
            body = owed.message.body.clone();
            body.push(input.u8());
        }
        let code = match said::is_sound(&owed.message, said::regions(&self.journal)) {
            true => body,
            false if request::has_answer(request) => body,
            // A server that carries out what cannot be: its session would grow for ever.
            false => 1_u64.to_le_bytes().to_vec(),
        };
        let answer = Message::reply(request, code, Vec::new());
        self.hear(&answer.bytes(), Vec::new(), input);
    }

    /// The server's bytes come in pieces.
    fn hear(&mut self, bytes: &[u8], files: Vec<Descriptor>, input: &mut Input<'_>) {
        if !self.is_linked {
            return;
        }
        let piece = 1 + input.below(64);
        let (mut rest, mut files) = (bytes, Some(files));
        while !rest.is_empty() && !self.is_over && self.is_linked {
            let wants = self.parser.wants();
            assert!(wants > 0 && wants <= supervisor::wire::MAX_BODY);
            let (now, later) = rest.split_at(piece.min(wants).min(rest.len()));
            rest = later;
            match self.parser.feed(now, files.take().unwrap_or_default()) {
                Ok(None) => {}
                Ok(Some(message)) => self.heard(message),
                // The session goes on with another server.
                Err(Malformed::Flags(_) | Malformed::TooLong(_) | Malformed::Descriptors) => {
                    self.lose_server();
                }
            }
        }
        assert!(holds(&self.parser) < MOST);
    }

    fn heard(&mut self, answer: Message) {
        let is_awaited = answer.is_reply()
            && self.owed.front().is_some_and(|owed| owed.message.request == answer.request);
        let effects = self.relay.from_server(answer.clone());
        if !is_awaited {
            assert!(matches!(effects[..], [Effect::Close(_)]), "unasked: {effects:?}");
            self.is_over = true;
            return;
        }
        let owed = self.owed.pop_front().expect("it is awaited");
        let has_answer = request::has_answer(answer.request);
        // The supervisor refuses some sizes with this answer, whatever the server says.
        let is_refused = owed.why == Why::Frontend
            && answer.request == request::SET_VRING_NUM
            && (!said::has_ring_size(&owed.message)
                || self.journal.is_other_size(&owed.message, said::LARGEST_RING));
        let refusal = || Message::reply(answer.request, 1_u64.to_le_bytes().to_vec(), Vec::new());
        let answer = if is_refused { refusal() } else { answer };
        let is_done = has_answer || answer.u64_at(0) == Some(0);
        let mut answers = 0;
        let mut asked = 0;
        if owed.why == Why::Replay && !is_done {
            assert!(matches!(effects[..], [Effect::Close(_)]), "refused: {effects:?}");
            self.is_over = true;
            return;
        }
        if owed.why == Why::Frontend && is_done {
            self.journal.note(&owed.message, Some(&answer));
        }
        if owed.why == Why::Replay && self.owed.is_empty() {
            self.is_up = true;
        }
        for effect in effects {
            match effect {
                Effect::Frontend(given) => {
                    assert_eq!((owed.why, &given), (Why::Frontend, &answer), "not its answer");
                    answers += 1;
                }
                Effect::Server(message) => {
                    assert!(self.owed.is_empty() && self.is_up, "asked too early: {message:?}");
                    self.asked_by_itself(message);
                    asked += 1;
                }
                Effect::Kick(kicks) => {
                    assert!(owed.why == Why::Replay && self.is_up);
                    assert!(kicks.len() <= said::RINGS as usize);
                }
                Effect::Backend(..) => assert_eq!(owed.why, Why::Capacity),
                other => panic!("an answer has brought about {other:?}"),
            }
        }
        assert!(asked <= 1);
        let expected = usize::from(owed.why == Why::Frontend && owed.is_answered);
        assert_eq!(answers, expected, "answers to {:?}", owed.message);
        let is_due = self.is_up && !self.relay.is_held();
        assert!(!is_due || self.interrupted.is_none(), "what was interrupted is not asked again");
    }

    /// What was interrupted, or what the supervisor wants to know.
    fn asked_by_itself(&mut self, message: Message) {
        let owed = match self.interrupted.take() {
            Some(owed) => {
                assert_eq!(owed.message, message, "not what was interrupted");
                owed
            }
            None => {
                assert!(is_capacity(&message), "asked by itself: {message:?}");
                Owed { message, why: Why::Capacity, is_answered: false }
            }
        };
        self.owed.push_back(owed);
    }

    fn lose_server(&mut self) {
        self.relay.server_is_lost();
        let interrupted = self.owed.drain(..).find(|owed| owed.why == Why::Frontend);
        if interrupted.is_some() {
            self.interrupted = interrupted;
        }
        (self.is_linked, self.is_up, self.waits_for_region) = (false, false, false);
        self.parser = Parser::default();
    }

    fn find_server(&mut self) {
        if self.is_linked {
            return;
        }
        let replay = self.relay.journal().replay();
        let mut again = Journal::default();
        replay.iter().for_each(|message| again.note(message, None));
        assert_eq!(again.replay(), replay, "another server would not be told the same");
        assert_eq!(again.kicks(), self.relay.journal().kicks());
        let effects = self.relay.server_is_found();
        self.is_linked = true;
        for effect in effects {
            let Effect::Server(message) = effect else { panic!("a replay with {effect:?}") };
            self.owed.push_back(Owed { message, why: Why::Replay, is_answered: false });
        }
        assert_eq!(self.owed.len(), NEGOTIATION + replay.len());
        let told = self
            .owed
            .iter()
            .skip(NEGOTIATION)
            .map(|owed| (owed.message.request, &owed.message.body));
        assert!(told.eq(replay.iter().map(|message| (message.request, &message.body))));
    }

    /// As when the program is exchanged in place.
    fn write_down_and_read(&mut self) {
        let written = serde_json::to_string(&self.relay).expect("it can be written down");
        let known = self.files.iter().chain([&self.relay.region().memfd]);
        let names: BTreeMap<_, _> = known.map(|file| (file.as_raw_fd(), file.clone())).collect();
        let read = Descriptor::named(names, || serde_json::from_str(&written));
        self.relay = read.expect("it can be read");
        assert_eq!(serde_json::to_string(&self.relay).expect("again"), written);
    }

    /// A good server for the rest: everything that is waited for comes.
    fn finish(&mut self) {
        self.is_paused = false;
        self.relay.pause(false);
        self.lose_server();
        self.find_server();
        let mut nothing = Input::new(&[]);
        for _ in 0..1000 {
            self.look_at_rings(true);
            if self.owed.is_empty() || self.is_over {
                break;
            }
            self.answer(0, &mut nothing);
            self.check();
        }
        assert!(self.is_over || !self.relay.is_held(), "the frontend waits for ever");
        assert!(self.is_over || self.interrupted.is_none());
    }
}
