//! One frontend's session: what becomes of each message, in both directions.
//!
//! A pure state machine: messages go in, [`Effect`]s come out, and nothing here waits or touches a
//! socket. The frontend is heard one message at a time. Each one that the server can do is passed
//! on, always with the wish to be told how it went, so that what is in the [`Journal`] is what the
//! server has carried out. What was passed on when the server died is asked again of the next one,
//! after the journal was replayed; its answer is the one that the frontend gets.
//!
//! Done here, whatever the server can do: protocol features, in-flight regions, the connection for
//! requests in the other direction.

use crate::descriptor::Descriptor;
pub use crate::effect::Effect;
use crate::fields::{capacity, is_no_ring_size, reply};
use crate::journal::{Journal, log_is_there, sort_table, u64_message};
use crate::region::Region;
use crate::request::{self, Refusal, protocol};
use crate::wire::Message;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};

mod inflight;
mod waiting;

/// How many kinds of unknown requests are told of in the log.
const KINDS: usize = 16;

/// Why the server was asked something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Why {
    /// The frontend has, and wants to be told.
    Frontend { needs_reply: bool },
    /// It is to be what the one before was.
    Replay,
    /// The frontend may not know the disk's size any more.
    Capacity,
    /// The frontend of a session that waits has.
    Other,
}

/// A message that was passed on, as it came, and is not answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Asked {
    message: Message,
    why: Why,
}

/// What there is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Link {
    /// No server.
    Down,
    /// One that is told what was.
    Replaying,
    /// One that serves.
    Up,
    /// One that another session has.
    Waiting,
}

/// A frontend's session.
#[derive(Debug, Serialize, Deserialize)]
pub struct Relay {
    journal: Journal,
    region: Region,
    link: Link,
    /// Some server has had it.
    #[serde(default)]
    has_been_up: bool,
    asked: VecDeque<Asked>,
    /// What is asked again.
    interrupted: Option<Asked>,
    /// The server has not said yet that it uses the region.
    waits_for_region: bool,
    /// Rings that the server has not looked at since it has them. What the frontend says of them
    /// now would come before what they have in flight.
    #[serde(default)]
    untaken: Vec<u32>,
    /// Nothing is passed on, because the server is to stand still.
    is_paused: bool,
    /// The frontend may ask to be told how a message went.
    has_acks: bool,
    /// What the server's side of the protocol can do.
    offered: u64,
    backend: Option<Descriptor>,
    /// The disk's size that the frontend was told last, in sectors.
    told: Option<u64>,
    was_running: bool,
    unknown: BTreeSet<u32>,
    /// The largest size that a ring can have.
    #[serde(default = "largest_ring")]
    largest: u16,
    /// The region is the frontend's.
    #[serde(default)]
    is_given: bool,
    /// The device's status, as the driver has set it.
    #[serde(default)]
    status: u8,
    /// What the frontend has asked while it waits, and is to be answered.
    #[serde(default)]
    question: Option<Message>,
    #[serde(default)]
    is_question_asked: bool,
    /// How it has read the configuration space while it waited: a server has to know that it has.
    #[serde(default)]
    config_read: Option<Message>,
}

/// What releases of which none is told have taken.
const fn largest_ring() -> u16 {
    1024
}

impl Relay {
    /// A session that begins, with no server behind it yet. `told` is the size of the disk that
    /// the last frontend was told, `largest` the largest size that a ring can have.
    #[must_use]
    pub fn new(region: Region, told: Option<u64>, largest: u16) -> Self {
        Self {
            journal: Journal::default(),
            region,
            link: Link::Down,
            has_been_up: false,
            asked: VecDeque::new(),
            interrupted: None,
            waits_for_region: false,
            untaken: Vec::new(),
            is_paused: false,
            has_acks: false,
            offered: 0,
            backend: None,
            told,
            was_running: false,
            unknown: BTreeSet::new(),
            largest,
            is_given: false,
            status: 0,
            question: None,
            is_question_asked: false,
            config_read: None,
        }
    }

    /// What is known of the session.
    #[must_use]
    pub const fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The in-flight region.
    #[must_use]
    pub const fn region(&self) -> &Region {
        &self.region
    }

    /// The size of the disk that the frontend was told last.
    #[must_use]
    pub const fn told(&self) -> Option<u64> {
        self.told
    }

    /// Whether the frontend's next message has to wait.
    #[must_use]
    pub fn is_held(&self) -> bool {
        match self.link {
            Link::Waiting => self.question.is_some(),
            link => self.is_paused || link != Link::Up || !self.is_idle(),
        }
    }

    /// Whether the server owes nothing.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.asked.is_empty() && !self.waits_for_region && self.untaken.is_empty()
    }

    /// Whether a server serves.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.link == Link::Up
    }

    /// Holds the frontend's next message, or does not any more.
    pub const fn pause(&mut self, on: bool) {
        self.is_paused = on;
    }

    /// The server is gone. What it was asked is asked of the next one.
    pub fn server_is_lost(&mut self) {
        self.link = Link::Down;
        let is_frontend = |asked: &Asked| matches!(asked.why, Why::Frontend { .. });
        if let Some(asked) = self.asked.drain(..).find(is_frontend) {
            self.interrupted = Some(asked);
        }
        // The next one begins with it.
        self.waits_for_region = false;
        self.untaken.clear();
    }

    /// There is a server, with a session that is new to it and this region.
    pub fn server_is_found(&mut self) -> Vec<Effect> {
        self.link = Link::Replaying;
        // What it says of the disk may be new to the frontend.
        self.was_running = false;
        if self.has_been_up {
            self.untaken = self.journal.running();
            // Where nothing was taken yet, nothing is to be found out.
            self.untaken.retain(|&queue| !self.region.is_fresh(queue));
            self.untaken.iter().for_each(|&queue| self.region.give(queue));
        }
        let mut effects = Vec::new();
        let negotiation = [
            Message::new(request::GET_FEATURES, [], Vec::new()),
            Message::new(request::GET_PROTOCOL_FEATURES, [], Vec::new()),
            u64_message(request::SET_PROTOCOL_FEATURES, protocol::PASSED_ON),
        ];
        let read = self.config_read.clone();
        for message in negotiation.into_iter().chain(read).chain(self.journal.replay()) {
            self.ask(message, Why::Replay, &mut effects);
        }
        effects
    }

    /// Asks the server.
    fn ask(&mut self, message: Message, why: Why, effects: &mut Vec<Effect>) {
        let mut passed = message.clone();
        if !request::has_answer(message.request) {
            passed = passed.with_need_reply();
        }
        effects.push(Effect::Server(passed));
        self.asked.push_back(Asked { message, why });
    }

    /// A message has come from the frontend, which is not [held](Self::is_held).
    pub fn from_frontend(&mut self, message: Message) -> Vec<Effect> {
        let mut effects = Vec::new();
        if message.is_reply() {
            effects.push(Effect::Close("it answers what it was not asked".to_owned()));
            return effects;
        }
        match message.request {
            request::GET_PROTOCOL_FEATURES if !self.is_waiting() => {
                let all = self.offered & protocol::PASSED_ON | protocol::ADDED;
                effects.push(Effect::Frontend(reply(&message, all.to_le_bytes())));
            }
            request::SET_PROTOCOL_FEATURES => match message.u64_at(0) {
                Some(taken) => {
                    self.has_acks = taken & protocol::REPLY_ACK != 0;
                    let leaves = taken & protocol::GET_VRING_BASE_INFLIGHT != 0;
                    if self.region.place.leaves != leaves {
                        self.use_region(self.region.clone().leaving(leaves), &mut effects);
                    }
                    self.acknowledge(&message, true, &mut effects);
                }
                None => effects.push(Effect::Close("it takes no protocol features".to_owned())),
            },
            request::SET_BACKEND_REQ_FD => {
                self.backend = message.files.first().cloned();
                self.acknowledge(&message, self.backend.is_some(), &mut effects);
            }
            request::GET_INFLIGHT_FD => self.make_region(&message, &mut effects),
            request::SET_INFLIGHT_FD => self.take_region(&message, &mut effects),
            request::GET_STATUS => {
                let status = u64::from(self.status).to_le_bytes();
                effects.push(Effect::Frontend(reply(&message, status)));
            }
            request::SET_STATUS => {
                // 0 is no reset: it is said at each stop of the guest, too.
                let status = message.u64_at(0).and_then(|status| u8::try_from(status).ok());
                self.status = status.unwrap_or(self.status);
                self.acknowledge(&message, status.is_some(), &mut effects);
            }
            request::SET_VRING_KICK if message.files.is_empty() => {
                if self.unknown.insert(request::SET_VRING_KICK) {
                    log::warn!("the frontend has no kick descriptor, and rings are not polled");
                }
                self.acknowledge(&message, false, &mut effects);
            }
            known if self.is_waiting() && waiting::may_come(known) => {
                self.note_for_later(message, &mut effects);
            }
            known if request::is_passed_on(known) => self.pass_on(message, &mut effects),
            _ => self.refuse(&message, &mut effects),
        }
        effects
    }

    fn pass_on(&mut self, mut message: Message, effects: &mut Vec<Effect>) {
        let needs_reply = message.needs_reply();
        if message.request == request::SET_MEM_TABLE {
            if Journal::has_overlap(&message) {
                effects.push(Effect::Close("memory regions overlap each other".to_owned()));
                return;
            }
            sort_table(&mut message);
        }
        if let Err(why) = log_is_there(&message) {
            effects.push(Effect::Close(format!("its migration log is refused: {why}")));
            return;
        }
        self.ask(message, Why::Frontend { needs_reply }, effects);
    }

    /// Tells the frontend how its message went, if it wants to be told.
    fn acknowledge(&self, message: &Message, is_done: bool, effects: &mut Vec<Effect>) {
        if self.has_acks && message.needs_reply() {
            let code = u64::from(!is_done);
            effects.push(Effect::Frontend(reply(message, code.to_le_bytes())));
        }
    }

    fn refuse(&mut self, message: &Message, effects: &mut Vec<Effect>) {
        let request = message.request;
        if self.unknown.len() < KINDS && self.unknown.insert(request) {
            log::warn!("the frontend sends request {request}, which this backend does not know");
        }
        match request::refusal(request) {
            Refusal::Ignore => self.acknowledge(message, false, effects),
            Refusal::Disconnect => effects.push(Effect::Close(format!(
                "it waits for the answer to request {request}, which this backend does not know"
            ))),
        }
    }

    /// The server uses the region.
    pub const fn inflight_is_taken(&mut self) {
        self.waits_for_region = false;
    }

    /// A message has come from the server.
    pub fn from_server(&mut self, answer: Message) -> Vec<Effect> {
        let mut effects = Vec::new();
        let is_awaited =
            |asked: &Asked| answer.is_reply() && asked.message.request == answer.request;
        let Some(asked) = self.asked.pop_front_if(|asked| is_awaited(asked)) else {
            let request = answer.request;
            effects.push(Effect::Close(format!("the server answers request {request} unasked")));
            return effects;
        };
        let is_done =
            request::has_answer(answer.request) || answer.u64_at(0).is_some_and(|code| code == 0);
        match asked.why {
            Why::Replay => self.replayed(&asked.message, &answer, is_done, &mut effects),
            Why::Frontend { needs_reply } => {
                let is_refused = is_no_ring_size(&asked.message, self.largest)
                    || self.journal.is_other_size(&asked.message, self.largest);
                if is_done && !is_refused {
                    self.carried_out(&asked.message, &answer, &mut effects);
                }
                if request::has_answer(answer.request) {
                    effects.push(Effect::Frontend(answer));
                } else if needs_reply && self.has_acks {
                    let refusal = is_refused.then(|| reply(&asked.message, 1_u64.to_le_bytes()));
                    effects.push(Effect::Frontend(refusal.unwrap_or(answer)));
                }
                self.look_at_rings(&mut effects);
            }
            Why::Other => effects.push(Effect::Other(answer)),
            Why::Capacity => {
                let is_other = capacity(&answer).is_some_and(|now| self.told != Some(now));
                if is_other {
                    effects.extend(self.config_has_changed());
                }
            }
        }
        effects
    }

    fn carried_out(&mut self, message: &Message, answer: &Message, effects: &mut Vec<Effect>) {
        self.journal.note(message, Some(answer));
        match message.request {
            request::GET_CONFIG => self.told = capacity(answer).or(self.told),
            request::GET_VRING_BASE => {
                if let Some(queue) = message.u32_at(0) {
                    self.region.ring_has_stopped(queue);
                }
            }
            request::RESET_DEVICE => {
                self.status = 0;
                self.forget_marks(effects);
            }
            _ => {}
        }
    }

    fn replayed(
        &mut self,
        message: &Message,
        answer: &Message,
        is_done: bool,
        effects: &mut Vec<Effect>,
    ) {
        if !is_done {
            let request = message.request;
            effects.push(Effect::Close(format!("the new server refuses request {request}")));
            return;
        }
        if message.request == request::GET_PROTOCOL_FEATURES {
            self.offered = answer.u64_at(0).unwrap_or(0);
        }
        if !self.asked.is_empty() {
            return;
        }
        (self.link, self.has_been_up, self.config_read) = (Link::Up, true, None);
        let kicks = self.journal.kicks();
        if !kicks.is_empty() {
            effects.push(Effect::Kick(kicks));
        }
        effects.extend(self.look_at_region());
    }

    /// Whether something is to be [looked at](Self::look_at_region) again soon.
    #[must_use]
    pub fn waits_for_rings(&self) -> bool {
        self.link == Link::Up && !self.untaken.is_empty()
    }

    /// Looks whether the server has looked at its rings, and goes on when it has.
    pub fn look_at_region(&mut self) -> Vec<Effect> {
        let region = &self.region;
        self.untaken.retain(|&queue| !region.is_taken_up(queue));
        if self.untaken.is_empty() { self.go_on() } else { Vec::new() }
    }

    /// The server does not look at its rings in time. It never will where the memory is missing
    /// that they need; for all others there is no right answer but a server's that has.
    pub fn stop_waiting_for_rings(&mut self) -> Vec<Effect> {
        self.untaken.retain(|&queue| self.journal.has_ring(queue));
        self.look_at_region()
    }

    /// Whether the frontend has said something that is to be asked again.
    #[must_use]
    pub const fn is_interrupted(&self) -> bool {
        self.interrupted.is_some()
    }

    fn go_on(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some(Asked { message, why }) = self.interrupted.take() {
            self.ask(message, why, &mut effects);
        } else {
            self.look_at_rings(&mut effects);
        }
        effects
    }

    /// A frontend that connects again does not read the configuration space, nor does one whose
    /// rings have run, or were to run, while another server or session had the disk; if that has
    /// another size than the frontend was told, it has to be told when its rings run.
    fn look_at_rings(&mut self, effects: &mut Vec<Effect>) {
        let is_running = !self.journal.running().is_empty();
        if is_running && !self.was_running {
            self.ask_for_capacity(effects);
        }
        self.was_running = is_running;
    }

    fn ask_for_capacity(&mut self, effects: &mut Vec<Effect>) {
        if self.told.is_none() || self.backend.is_none() {
            return;
        }
        let words = [0_u32, 8, 0];
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        body.extend([0; 8]);
        let message = Message::new(request::GET_CONFIG, body, Vec::new());
        self.ask(message, Why::Capacity, effects);
    }

    /// The frontend is to read the configuration space again.
    pub fn config_has_changed(&self) -> Option<Effect> {
        let backend = self.backend.clone()?;
        let message = Message::new(request::CONFIG_CHANGE_MSG, [], Vec::new());
        Some(Effect::Backend(backend, message))
    }

    /// The connection for requests in the other direction has failed.
    pub fn backend_is_lost(&mut self) {
        self.backend = None;
    }
}
