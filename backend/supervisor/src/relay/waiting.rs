//! A session that waits while another one has the server.
//!
//! A frontend may connect while another one's rings run: the one that its guest is to go on in.
//! It is answered all that it asks, so that it does not stand still, and only its rings wait. What
//! it sets is noted in its journal, from which a server is told of it when its turn comes; what it
//! asks is asked through the session that has the server. Nothing of that session changes.

use super::{Asked, Effect, Link, Relay, Why, capacity, is_no_ring_size, reply};
use crate::journal::{Journal, sort_table, state_message};
use crate::request::{self, protocol};
use crate::wire::Message;
use channel::ring_refusal;

/// Whether a session that waits takes this request by itself.
pub(super) const fn may_come(request: u32) -> bool {
    request::is_passed_on(request) || request == request::GET_PROTOCOL_FEATURES
}

impl Relay {
    /// Another session has the server. This one owes the frontend no answer, nor is it owed one.
    pub fn wait(&mut self) {
        self.server_is_lost();
        self.link = Link::Waiting;
    }

    /// It is this session's turn.
    pub fn stop_waiting(&mut self) {
        self.link = Link::Down;
        if let Some(message) = self.question.take() {
            self.interrupted = Some(Asked { message, why: Why::Frontend { needs_reply: false } });
        }
        self.is_question_asked = false;
    }

    /// Whether it waits.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.link == Link::Waiting
    }

    /// Whether its rings are to run.
    #[must_use]
    pub fn wants_server(&self) -> bool {
        !self.journal.running().is_empty()
    }

    /// Whether another session may have the server: no ring has started, and nothing is owed.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        self.journal.kicks().is_empty() && self.is_idle() && !self.is_paused && self.is_up()
    }

    /// What a session that waits asks, once.
    pub fn question(&mut self) -> Option<Message> {
        if self.is_question_asked {
            return None;
        }
        self.is_question_asked = self.question.is_some();
        self.question.clone()
    }

    /// What it asked was not answered, because the server has died.
    pub fn question_is_lost(&mut self) {
        self.is_question_asked = false;
    }

    /// Asks the server for another session that waits. Not while this one is
    /// [held](Self::is_held).
    pub fn ask_for_other(&mut self, message: Message) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.ask(message, Why::Other, &mut effects);
        effects
    }

    /// Whether the server owes another session an answer.
    #[must_use]
    pub fn asks_for_other(&self) -> bool {
        self.asked.iter().any(|asked| asked.why == Why::Other)
    }

    /// What it asked was answered.
    pub fn question_is_answered(&mut self, mut answer: Message) -> Option<Effect> {
        let question = self.question.take_if(|question| question.request == answer.request)?;
        self.is_question_asked = false;
        match question.request {
            request::GET_PROTOCOL_FEATURES => {
                self.offered = answer.u64_at(0).unwrap_or(0);
                let all = self.offered & protocol::PASSED_ON | protocol::ADDED;
                answer = reply(&question, all.to_le_bytes());
            }
            request::GET_CONFIG => {
                self.told = capacity(&answer).or(self.told);
                self.config_read = Some(question);
            }
            _ => {}
        }
        Some(Effect::Frontend(answer))
    }

    /// A message has come that the server may be able to do, and this session waits.
    pub(super) fn note_for_later(&mut self, mut message: Message, effects: &mut Vec<Effect>) {
        match message.request {
            request::GET_VRING_BASE => {
                let queue = message.u32_at(0).unwrap_or_default();
                let base = self.journal.base(queue);
                let mut answer = state_message(message.request, queue, base);
                answer.flags |= crate::wire::REPLY;
                self.journal.note(&message, Some(&answer));
                effects.push(Effect::Frontend(answer));
                return;
            }
            request::SET_LOG_BASE => {
                let answer = Message::reply(message.request, &message.body[..], Vec::new());
                effects.push(Effect::Frontend(answer));
            }
            asks if request::has_answer(asks) => {
                self.question = Some(message);
                return;
            }
            _ if is_no_ring_size(&message, self.largest) => {
                self.acknowledge(&message, false, effects);
                let queue = message.u32_at(0).unwrap_or_default() as usize;
                let size = message.u32_at(4).unwrap_or_default();
                effects.push(Effect::Close(ring_refusal(queue, size, self.largest)));
                return;
            }
            request::RESET_DEVICE => self.status = 0,
            request::SET_MEM_TABLE => {
                if Journal::has_overlap(&message) {
                    effects.push(Effect::Close("memory regions overlap each other".to_owned()));
                    return;
                }
                sort_table(&mut message);
            }
            _ => {}
        }
        self.journal.note(&message, None);
        if !request::has_answer(message.request) {
            self.acknowledge(&message, true, effects);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::Descriptor;
    use crate::journal::{descriptor_message, u64_message};
    use crate::region::Region;

    fn relay() -> Relay {
        Relay::new(Region::own(1).unwrap(), None, 1024)
    }

    fn waiting() -> Relay {
        let mut relay = relay();
        relay.wait();
        relay
    }

    fn kick() -> Message {
        let file = Descriptor::from(std::os::fd::OwnedFd::from(tempfile::tempfile().unwrap()));
        descriptor_message(request::SET_VRING_KICK, 0, Some(file))
    }

    /// One that has the server, as far as it knows.
    fn up() -> Relay {
        let mut relay = relay();
        for effect in relay.server_is_found() {
            let Effect::Server(message) = effect else { panic!("{effect:?}") };
            relay.from_server(Message::reply(message.request, [0; 8], Vec::new()));
        }
        assert!(relay.is_up() && relay.may_wait());
        relay
    }

    #[test]
    fn what_it_sets_is_acknowledged_and_told_to_the_server_later() {
        let mut relay = waiting();
        relay.from_frontend(u64_message(request::SET_PROTOCOL_FEATURES, protocol::REPLY_ACK));
        let features = 1 << 32 | request::F_PROTOCOL_FEATURES;
        let said =
            relay.from_frontend(u64_message(request::SET_FEATURES, features).with_need_reply());
        let done = Message::reply(request::SET_FEATURES, [0; 8], Vec::new());
        assert_eq!(said, [Effect::Frontend(done)]);
        assert_eq!(relay.from_frontend(state_message(request::SET_VRING_BASE, 0, 7)), []);
        assert_eq!(relay.from_frontend(kick()), []);
        assert!(!relay.wants_server(), "its ring is off");
        relay.from_frontend(state_message(request::SET_VRING_ENABLE, 0, 1));
        assert!(relay.wants_server() && !relay.is_held());
        relay.stop_waiting();
        assert!(relay.is_held());
        let told: Vec<u32> = relay
            .server_is_found()
            .into_iter()
            .map(|effect| match effect {
                Effect::Server(message) => message.request,
                other => panic!("{other:?}"),
            })
            .collect();
        for request in [2, 10, 12, 18] {
            assert!(told.contains(&request), "{request} in {told:?}");
        }
    }

    #[test]
    fn a_ring_that_has_never_run_is_stopped_where_it_was_to_begin() {
        let mut relay = waiting();
        relay.from_frontend(state_message(request::SET_VRING_BASE, 0, 7));
        relay.from_frontend(kick());
        let said = relay.from_frontend(state_message(request::GET_VRING_BASE, 0, 0));
        let mut answer = state_message(request::GET_VRING_BASE, 0, 7);
        answer.flags |= crate::wire::REPLY;
        assert_eq!(said, [Effect::Frontend(answer)]);
        assert!(!relay.wants_server());
    }

    #[test]
    fn a_ring_of_a_size_that_cannot_be_ends_it_and_says_why() {
        for size in [0, 100, 2048] {
            let mut relay = waiting();
            let said = relay.from_frontend(state_message(request::SET_VRING_NUM, 1, size));
            let [Effect::Close(why)] = &said[..] else { panic!("{said:?}") };
            assert_eq!(*why, ring_refusal(1, size, 1024));
        }
    }

    #[test]
    fn what_it_asks_is_asked_through_the_other() {
        let (mut current, mut relay) = (up(), waiting());
        let ask = Message::new(request::GET_QUEUE_NUM, [], Vec::new());
        assert_eq!(relay.from_frontend(ask.clone()), []);
        assert!(relay.is_held(), "one question at a time");
        assert_eq!(relay.question(), Some(ask.clone()));
        assert_eq!(relay.question(), None, "it is asked once");
        let asked = current.ask_for_other(ask.clone());
        assert!(current.is_held() && current.asks_for_other());
        assert_eq!(asked, [Effect::Server(ask)]);
        let answer = Message::reply(request::GET_QUEUE_NUM, 4_u64.to_le_bytes(), Vec::new());
        let effects = current.from_server(answer.clone());
        assert_eq!(effects, [Effect::Other(answer.clone())]);
        assert!(!current.asks_for_other() && !current.is_held());
        assert_eq!(relay.question_is_answered(answer.clone()), Some(Effect::Frontend(answer)));
        assert!(!relay.is_held());
        // A death between question and answer.
        relay.from_frontend(Message::new(request::GET_FEATURES, [], Vec::new()));
        current.ask_for_other(relay.question().unwrap());
        current.server_is_lost();
        assert!(!current.asks_for_other());
        relay.question_is_lost();
        assert!(relay.question().is_some(), "it is asked again");
        // Its turn comes before the answer: it asks by itself, after all that is told.
        relay.stop_waiting();
        let mut last = None;
        for effect in relay.server_is_found() {
            let Effect::Server(message) = effect else { panic!("{effect:?}") };
            last = relay.from_server(Message::reply(message.request, [0; 8], Vec::new())).pop();
        }
        let asks = Message::new(request::GET_FEATURES, [], Vec::new());
        assert_eq!(last, Some(Effect::Server(asks)));
    }

    #[test]
    fn a_session_waits_only_when_its_rings_have_stopped() {
        let mut relay = up();
        let features = u64_message(request::SET_FEATURES, request::F_PROTOCOL_FEATURES);
        let turn = |on| state_message(request::SET_VRING_ENABLE, 0, on);
        let answer = |asked: &Message| {
            let body = if asked.request == request::GET_VRING_BASE {
                [0_u32.to_le_bytes(), 5_u32.to_le_bytes()].concat()
            } else {
                vec![0; 8]
            };
            Message::reply(asked.request, body, Vec::new())
        };
        let stop = state_message(request::GET_VRING_BASE, 0, 0);
        for (message, may_wait) in [
            (features, true),
            (kick(), false),
            (turn(1), false),
            // QEMU 7.2 turns it off before it asks where it has stopped.
            (turn(0), false),
            (stop, true),
        ] {
            relay.from_frontend(message.clone());
            assert!(!relay.may_wait(), "{message:?} is not answered");
            relay.from_server(answer(&message));
            assert_eq!(relay.may_wait(), may_wait, "{message:?}");
        }
        // It goes on where it was.
        relay.wait();
        let said = relay.from_frontend(state_message(request::GET_VRING_BASE, 0, 0));
        let [Effect::Frontend(base)] = &said[..] else { panic!("{said:?}") };
        assert_eq!(base.u32_at(4), Some(5));
    }

    /// Its server does all that it is told, its disk having `sectors`; what that was, and whether
    /// the frontend is to look at the configuration space.
    fn served(relay: &mut Relay, mut effects: Vec<Effect>, sectors: u64) -> (Vec<u32>, bool) {
        let (mut asked, mut is_told) = (Vec::new(), false);
        while !effects.is_empty() {
            let mut next = Vec::new();
            for effect in effects {
                match effect {
                    Effect::Server(message) => {
                        let body = match message.request {
                            request::GET_CONFIG => {
                                let head = [0_u32, 8, 0].map(u32::to_le_bytes).concat();
                                [&head[..], &sectors.to_le_bytes()].concat()
                            }
                            _ => vec![0; 8],
                        };
                        asked.push(message.request);
                        let answer = Message::reply(message.request, body, Vec::new());
                        next.extend(relay.from_server(answer));
                    }
                    Effect::Backend(..) => is_told = true,
                    Effect::Frontend(_) | Effect::Kick(_) => {}
                    other => panic!("{other:?}"),
                }
            }
            effects = next;
        }
        (asked, is_told)
    }

    #[test]
    fn a_frontend_is_told_of_a_disk_that_has_grown_while_it_could_not_be() {
        for (asks, sectors) in [(false, 64), (false, 128), (true, 128)] {
            let mut relay = Relay::new(Region::own(1).unwrap(), Some(64), 1024);
            relay.wait();
            let ask = Message::new(request::GET_QUEUE_NUM, [], Vec::new());
            let mut backend = kick();
            backend.request = request::SET_BACKEND_REQ_FD;
            for message in [
                backend,
                u64_message(request::SET_FEATURES, request::F_PROTOCOL_FEATURES),
                kick(),
                state_message(request::SET_VRING_ENABLE, 0, 1),
            ] {
                relay.from_frontend(message);
            }
            if asks {
                relay.from_frontend(ask.clone());
            }
            // Its turn comes, with a ring that runs already.
            relay.stop_waiting();
            let effects = relay.server_is_found();
            let (asked, is_told) = served(&mut relay, effects, sectors);
            assert_eq!((asked.contains(&ask.request), is_told), (asks, sectors != 64));
            assert!(!relay.is_held());
            // And its server dies, which may have been about to say it.
            relay.told = Some(64);
            if asks {
                relay.from_frontend(ask.clone());
            }
            relay.server_is_lost();
            let effects = relay.server_is_found();
            // The next one's worker is quick.
            rustix::io::pwrite(&relay.region().memfd, &[0; 8], 0).unwrap();
            let (asked, is_told) = served(&mut relay, effects, sectors);
            assert_eq!((asked.contains(&ask.request), is_told), (asks, sectors != 64));
        }
    }
}
