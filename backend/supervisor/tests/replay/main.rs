//! A session's life, as QEMU 11.1 lives it, over servers that die at every one of its messages.
//!
//! The server is scripted: it does to its state what `vhost-user-backend` does. Whatever happens,
//! the frontend must get the answers that it gets from one server that lives, and after each
//! message the server that serves must be in the state in which that one is.

mod life;
mod server;

use life::{Step, descriptor, get, inflight, life, table};
use server::{FEATURES, Server};
use std::collections::VecDeque;
use supervisor::descriptor::Descriptor;
use supervisor::journal::{descriptor_message, state_message, u64_message};
use supervisor::region::Region;
use supervisor::relay::{Effect, Relay};
use supervisor::request as r;
use supervisor::wire::Message;

/// When a server dies, within a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// Before the step.
    Before,
    /// It has a message, and does nothing of it.
    Unread,
    /// It has carried the message out, and its answer is lost.
    Unanswered,
    /// The last answer is on its way.
    Answered,
}

struct World {
    relay: Relay,
    server: Option<Server>,
    used: [u32; 2],
    to_server: VecDeque<Message>,
    to_frontend: Vec<Message>,
    told: usize,
    kicked: usize,
    waits_for_region: bool,
    closed: Option<String>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            relay: Relay::new(Region::own(2).unwrap(), None, 128),
            server: None,
            used: [0; 2],
            to_server: VecDeque::new(),
            to_frontend: Vec::new(),
            told: 0,
            kicked: 0,
            waits_for_region: false,
            closed: None,
        };
        world.revive();
        world
    }

    fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Frontend(message) => self.to_frontend.push(message),
                Effect::Server(message) => self.to_server.push_back(message),
                Effect::Inflight(_) => self.waits_for_region = true,
                Effect::Kick(kicks) => self.kicked += kicks.len(),
                Effect::Backend(..) => self.told += 1,
                Effect::Other(answer) => panic!("{answer:?} for another session"),
                Effect::Close(why) => drop(self.closed.get_or_insert(why)),
            }
        }
    }

    fn die(&mut self) {
        self.server = None;
        self.to_server.clear();
        self.waits_for_region = false;
        self.relay.server_is_lost();
        assert!(self.relay.is_held());
    }

    fn revive(&mut self) {
        self.server = Some(Server { cache: 1, ..Server::default() });
        let effects = self.relay.server_is_found();
        self.apply(effects);
        self.serve(None);
    }

    /// The server does all that it has been told; it may die at the first message. Whether it did.
    fn serve(&mut self, dies: Option<Moment>) -> bool {
        let mut has_died = false;
        if self.waits_for_region {
            if dies == Some(Moment::Unread) {
                self.die();
                return true;
            }
            self.waits_for_region = false;
            self.relay.inflight_is_taken();
        }
        while let Some(message) = self.to_server.pop_front() {
            if dies == Some(Moment::Unread) {
                self.die();
                return true;
            }
            let server = self.server.as_mut().expect("a server");
            let answer = server.carry_out(&message, &self.used);
            let answer = answer.unwrap_or_else(|why| panic!("{}: {why}", message.request));
            if dies == Some(Moment::Unanswered) {
                self.die();
                return true;
            }
            let wants = self.relay.from_server(answer);
            self.apply(wants);
            if dies == Some(Moment::Answered) {
                has_died = true;
            }
        }
        if std::mem::take(&mut self.waits_for_region) {
            // The session has another since.
            self.relay.inflight_is_taken();
        }
        if has_died {
            self.die();
        } else if self.relay.waits_for_rings() {
            assert!(self.relay.look_at_region().is_empty() && self.relay.is_held());
            self.take_up();
            let effects = self.relay.look_at_region();
            self.apply(effects);
            return self.serve(None);
        }
        if self.relay.is_up() {
            self.take_up();
        }
        has_died
    }

    /// What a server's workers write when they have looked at their rings.
    fn take_up(&self) {
        let region = self.relay.region();
        let part = region.place.len / 2;
        for at in [0, part] {
            rustix::io::pwrite(&region.memfd, &[0; 8], at).unwrap();
            rustix::io::pwrite(&region.memfd, &[1, 0], at + 8).unwrap();
        }
    }

    fn step(&mut self, step: &Step, dies: Option<Moment>) {
        if dies == Some(Moment::Before) {
            self.die();
            self.revive();
        }
        match step {
            Step::Frontend(message) => {
                assert!(!self.relay.is_held(), "the frontend waits for ever");
                let effects = self.relay.from_frontend(message.clone());
                self.apply(effects);
            }
            Step::Progress(ring, used) => self.used[*ring] = *used,
            Step::ConfigChanged => {
                let effect = self.relay.config_has_changed();
                self.apply(effect.into_iter().collect());
            }
        }
        if self.serve(dies) {
            self.revive();
        }
        assert_eq!(self.closed, None);
    }

    fn state(&self) -> Server {
        self.server.as_ref().expect("a server").seen()
    }
}

/// What differs between two answers that are equally good: the descriptors that are made for them.
fn bodies(messages: &[Message]) -> Vec<(u32, u32, Vec<u8>, usize)> {
    let body = |one: &Message| (one.request, one.flags, one.body.clone(), one.files.len());
    messages.iter().map(body).collect()
}

#[test]
fn a_server_may_die_at_every_message_of_a_life() {
    let life = life();
    let mut undisturbed = World::new();
    let states: Vec<Server> = life
        .iter()
        .map(|step| {
            undisturbed.step(step, None);
            undisturbed.state()
        })
        .collect();
    assert_eq!(undisturbed.told, 1);
    for moment in [Moment::Before, Moment::Unread, Moment::Unanswered, Moment::Answered] {
        for at in 0..life.len() {
            let mut world = World::new();
            for (number, step) in life.iter().enumerate() {
                world.step(step, Some(moment).filter(|_| number == at));
                let expected = &states[number];
                assert_eq!(world.state(), *expected, "{moment:?} at {at}, seen after {number}");
            }
            let (answers, expected) =
                (bodies(&world.to_frontend), bodies(&undisturbed.to_frontend));
            assert_eq!(answers, expected, "{moment:?} at {at}");
            assert_eq!(world.told, 1, "{moment:?} at {at}: what was told on the other connection");
        }
    }
}

#[test]
fn servers_that_die_at_all_messages_are_survived() {
    let life = life();
    let mut undisturbed = World::new();
    life.iter().for_each(|step| undisturbed.step(step, None));
    for moment in [Moment::Before, Moment::Unread, Moment::Unanswered, Moment::Answered] {
        let mut world = World::new();
        life.iter().for_each(|step| world.step(step, Some(moment)));
        assert_eq!(world.state(), undisturbed.state(), "{moment:?}");
        assert_eq!(bodies(&world.to_frontend), bodies(&undisturbed.to_frontend), "{moment:?}");
        assert!(world.kicked > 0, "{moment:?}: rings were not looked at");
    }
}

#[test]
fn a_journal_does_not_grow_with_its_session() {
    let mut world = World::new();
    let mut counts = Vec::new();
    let life = life();
    life.iter().for_each(|step| world.step(step, None));
    for _ in 0..3 {
        for step in life.iter().filter(|step| match step {
            Step::Frontend(message) => {
                !matches!(message.request, r::SET_OWNER | r::ADD_MEM_REG | r::REM_MEM_REG)
            }
            _ => true,
        }) {
            world.step(step, None);
        }
        counts.push(world.relay.journal().replay().len());
    }
    assert_eq!(counts[0], counts[2]);
}

#[test]
fn a_state_that_was_written_down_is_the_same_session() {
    let life = life();
    let mut undisturbed = World::new();
    let mut world = World::new();
    for step in &life {
        undisturbed.step(step, None);
        world.step(step, None);
        // Everything is open still, so that each number is its own name.
        let written = serde_json::to_string(&world.relay).unwrap();
        let names = numbers(&life, &world).into_iter().map(|one| (number_of(&one), one)).collect();
        let read = Descriptor::named(names, || serde_json::from_str(&written));
        world.relay = read.unwrap_or_else(|why| panic!("{why}: {written}"));
        assert_eq!(world.relay.journal(), undisturbed.relay.journal());
    }
    assert_eq!(bodies(&world.to_frontend), bodies(&undisturbed.to_frontend));
}

fn number_of(descriptor: &Descriptor) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(descriptor)
}

/// All descriptors that a session may have.
fn numbers(life: &[Step], world: &World) -> Vec<Descriptor> {
    let of_life = life.iter().filter_map(|step| match step {
        Step::Frontend(message) => Some(message.files.clone()),
        _ => None,
    });
    let mut all: Vec<Descriptor> = of_life.flatten().collect();
    all.extend(world.to_frontend.iter().flat_map(|message| message.files.clone()));
    all.push(world.relay.region().memfd.clone());
    all
}

#[test]
fn what_is_no_request_for_this_device_is_turned_down_and_the_session_goes_on() {
    let mut world = World::new();
    let taken = r::protocol::REPLY_ACK;
    world.step(&Step::Frontend(u64_message(r::SET_PROTOCOL_FEATURES, taken)), None);
    world.step(&Step::Frontend(get(19)), None);
    world.step(&Step::Frontend(get(39).with_need_reply()), None);
    assert_eq!(bodies(&world.to_frontend), [(39, 5, 1_u64.to_le_bytes().to_vec(), 0)]);
    // There is no place for a refusal in the answer to GET_SHARED_OBJECT.
    let effects = world.relay.from_frontend(get(41));
    assert!(matches!(effects[..], [Effect::Close(_)]), "{effects:?}");
}

/// Begins a session whose frontend may wish for replies.
fn with_acks() -> World {
    let mut world = World::new();
    let taken = r::protocol::REPLY_ACK;
    world.step(&Step::Frontend(u64_message(r::SET_PROTOCOL_FEATURES, taken)), None);
    world
}

/// Says a message and wishes for a reply; the number in that. Without an answer, none.
fn say(world: &mut World, message: Message) -> Option<u64> {
    world.to_frontend.clear();
    world.step(&Step::Frontend(message.with_need_reply()), None);
    assert!(world.to_frontend.len() <= 1, "{:?}", world.to_frontend);
    world.to_frontend.first().and_then(|answer| answer.u64_at(0))
}

#[test]
fn a_size_that_no_ring_has_is_refused_and_no_other_server_is_told_of_it() {
    let mut world = with_acks();
    let size = |size| state_message(r::SET_VRING_NUM, 0, size);
    assert_eq!(say(&mut world, size(64)), Some(0));
    for bad in [0, 3, 100, 256, 65_536 + 64] {
        assert_eq!(say(&mut world, size(bad)), Some(1), "{bad}");
        world.die();
        world.revive();
        assert_eq!(world.state().rings[&0].num, 64, "{bad}");
    }
    assert_eq!(say(&mut world, size(128)), Some(0));
}

#[test]
fn a_ring_that_runs_has_the_same_size_in_the_next_server() {
    let mut world = with_acks();
    let size = |size| state_message(r::SET_VRING_NUM, 0, size);
    let turn = |on| state_message(r::SET_VRING_ENABLE, 0, on);
    for message in
        [u64_message(r::SET_FEATURES, FEATURES), size(64), descriptor(r::SET_VRING_KICK, 0)]
    {
        assert_eq!(say(&mut world, message), Some(0));
    }
    for (on, answer, expected) in [(1, 1, 64), (0, 0, 32)] {
        for (message, answer) in [(turn(on), 0), (size(64), 0), (size(32), answer)] {
            assert_eq!(say(&mut world, message), Some(answer), "{on}");
        }
        world.die();
        world.revive();
        assert_eq!(world.state().rings[&0].num, expected, "{on}");
    }
}

#[test]
fn a_ring_that_is_to_be_polled_is_refused() {
    let mut world = with_acks();
    let polled = descriptor_message(r::SET_VRING_KICK, 0, None);
    assert_eq!(say(&mut world, polled.clone()), Some(1));
    world.step(&Step::Frontend(polled), None);
    assert_eq!(world.relay.journal().kicks(), []);
}

#[test]
fn the_status_is_the_sessions_until_the_device_is_reset() {
    let mut world = with_acks();
    let status = |world: &mut World| say(world, get(r::GET_STATUS));
    assert_eq!(status(&mut world), Some(0));
    assert_eq!(say(&mut world, u64_message(r::SET_STATUS, 11)), Some(0));
    world.die();
    world.revive();
    assert_eq!(status(&mut world), Some(11));
    for bad in [256, u64::MAX] {
        assert_eq!(say(&mut world, u64_message(r::SET_STATUS, bad)), Some(1));
    }
    assert_eq!(say(&mut world, Message::new(r::SET_STATUS, [1], Vec::new())), Some(1));
    assert_eq!(status(&mut world), Some(11));
    assert_eq!(say(&mut world, get(r::RESET_DEVICE)), Some(0));
    assert_eq!(status(&mut world), Some(0));
}

/// A domain that cannot be ended keeps its requests marked for good. What the next driver sets up
/// is not theirs.
#[test]
fn a_reset_device_has_nothing_in_flight_for_the_next_server() {
    let mark = |region: &Region| {
        // The second queue's version and size, and the mark of head 7.
        let part = region.place.len / 2;
        let size = region.place.queue_size.to_le_bytes();
        let header = [1, 0, size[0], size[1]];
        rustix::io::pwrite(&region.memfd, &header, part + 8).unwrap();
        rustix::io::pwrite(&region.memfd, &[1], part + 16 + 7 * 16).unwrap();
        assert_eq!(region.oldest().len(), 1);
    };
    let mut world = with_acks();
    let unmarked = world.relay.region().memfd.clone();
    assert_eq!(say(&mut world, get(r::RESET_DEVICE)), Some(0));
    assert_eq!(world.relay.region().memfd, unmarked, "nothing is in flight");
    mark(world.relay.region());
    assert_eq!(say(&mut world, get(r::RESET_DEVICE)), Some(0));
    assert_eq!(world.relay.region().oldest(), [], "requests of the driver before run again");
    assert!(world.relay.is_idle(), "the server has it");
    // The frontend's is its own to replace.
    let given = Region::new(2, 128).unwrap();
    assert_eq!(say(&mut world, inflight(r::SET_INFLIGHT_FD, Some(&given))), Some(0));
    mark(&given);
    assert_eq!(say(&mut world, get(r::RESET_DEVICE)), Some(0));
    assert_eq!(world.relay.region(), &given);
}

#[test]
fn memory_that_overlaps_is_refused() {
    let mut world = World::new();
    let mut overlapping = table(&[3, 4]);
    overlapping.body[8 + 8] ^= 1;
    let effects = world.relay.from_frontend(overlapping);
    assert!(matches!(effects[..], [Effect::Close(_)]), "{effects:?}");
}

#[test]
fn in_flight_regions_that_are_not_there_are_refused() {
    let mut world = World::new();
    let mut region = Region::new(2, 128).unwrap();
    region.place.len += 4096;
    let effects = world.relay.from_frontend(inflight(r::SET_INFLIGHT_FD, Some(&region)));
    assert!(matches!(effects[..], [Effect::Close(_)]), "{effects:?}");
}

#[test]
fn a_frontend_that_comes_back_is_told_that_the_disk_has_another_size() {
    for (told, expected) in [(None, 0), (Some(2048), 0), (Some(4096), 1)] {
        let mut world = World::new();
        world.relay = Relay::new(Region::own(2).unwrap(), told, 128);
        world.revive();
        let config = |step: &Step| matches!(step, Step::Frontend(message) if message.request == r::GET_CONFIG);
        let steps = life().into_iter().filter(|step| !config(step));
        steps.filter(|step| !matches!(step, Step::ConfigChanged)).take(35).for_each(|step| {
            world.step(&step, None);
        });
        // Each of its two ring starts.
        assert_eq!(world.told.min(1), expected, "{told:?}");
    }
}

/// Random numbers that are the same each time.
fn random(mut state: u64) -> impl FnMut(u64) -> u64 {
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    }
}

#[test]
fn whatever_a_frontend_and_a_server_say_is_survived() {
    let files = [(); 3].map(|()| Region::new(2, 128).unwrap().memfd);
    for seed in 1..300 {
        let mut below = random(0x9abc_def1 * seed);
        let mut relay = Relay::new(Region::own(2).unwrap(), Some(1), 128);
        let mut waiting: VecDeque<Message> = VecDeque::new();
        let note = |effects: Vec<Effect>, waiting: &mut VecDeque<Message>| {
            let asked = effects.into_iter().filter_map(|effect| match effect {
                Effect::Server(message) => Some(message),
                _ => None,
            });
            waiting.extend(asked);
        };
        note(relay.server_is_found(), &mut waiting);
        for _ in 0..200 {
            let length = [0, 4, 8, 16, 20, 24, 40, 48, 72][below(9) as usize];
            let body: Vec<u8> = (0..length).map(|_| below(256).min(below(4) * 256) as u8).collect();
            let files = files[..below(4) as usize].to_vec();
            match below(8) {
                0 => {
                    relay.server_is_lost();
                    waiting.clear();
                    note(relay.server_is_found(), &mut waiting);
                }
                1 => note(relay.look_at_region(), &mut waiting),
                2 => note(relay.stop_waiting_for_rings(), &mut waiting),
                3 => relay.inflight_is_taken(),
                4 => {
                    let effects = relay.from_server(Message::reply(below(50) as u32, body, files));
                    note(effects, &mut waiting);
                }
                5 if !relay.is_held() => {
                    let message = Message::new(below(50) as u32, body, files);
                    note(relay.from_frontend(message.with_need_reply()), &mut waiting);
                }
                _ => {
                    while let Some(asked) = waiting.pop_front() {
                        let body = if below(2) == 0 { vec![0; 8] } else { body.clone() };
                        let answer = Message::reply(asked.request, body, Vec::new());
                        note(relay.from_server(answer), &mut waiting);
                    }
                    if !relay.is_held() {
                        let message = Message::new(below(50) as u32, body, files);
                        note(relay.from_frontend(message), &mut waiting);
                    }
                }
            }
        }
    }
}
