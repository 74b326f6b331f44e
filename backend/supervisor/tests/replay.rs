//! A session's life, as QEMU 11.1 lives it, over servers that die at every one of its messages.
//!
//! The server is scripted: it does to its state what `vhost-user-backend` does. Whatever happens,
//! the frontend must get the answers that it gets from one server that lives, and after each message
//! the server that serves must be in the state in which that one is.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use supervisor::descriptor::Descriptor;
use supervisor::journal::{descriptor_message, state_message, u64_message};
use supervisor::region::Region;
use supervisor::relay::{Effect, Relay};
use supervisor::request as r;
use supervisor::wire::Message;

const FEATURES: u64 = 0x1_3000_7646 | r::F_PROTOCOL_FEATURES;
const REGION: u64 = 1 << 20;

fn file() -> Descriptor {
    OwnedFd::from(tempfile::tempfile().unwrap()).into()
}

/// What a ring of a server is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Ring {
    num: u32,
    base: u32,
    addr: Option<Vec<u8>>,
    call: Option<Descriptor>,
    kick: Option<Descriptor>,
    error: Option<Descriptor>,
    is_enabled: bool,
}

/// A server, as far as messages make it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Server {
    is_negotiated: bool,
    has_owner: bool,
    features: u64,
    memory: BTreeMap<u64, (Vec<u8>, Descriptor)>,
    cache: u8,
    log: Option<Vec<u8>>,
    rings: BTreeMap<u32, Ring>,
}

impl Server {
    /// Carries a message out; `used` is how far each ring has come. `Err` is what ends a session.
    fn carry_out(&mut self, message: &Message, used: &[u32]) -> Result<Message, String> {
        let request = message.request;
        let index = match request {
            r::SET_VRING_KICK | r::SET_VRING_CALL | r::SET_VRING_ERR => {
                message.u64_at(0).unwrap() as u32 & 0xff
            }
            _ => message.u32_at(0).unwrap_or(0),
        };
        let value = |value: u64| Ok(Message::reply(request, value.to_le_bytes(), Vec::new()));
        let is_on = self.features & r::F_PROTOCOL_FEATURES != 0;
        let is_negotiated = self.is_negotiated;
        let ring = |server: &mut Self| {
            let ring = server.rings.entry(index).or_default();
            std::mem::take(ring)
        };
        match request {
            r::GET_FEATURES => return value(FEATURES),
            r::GET_PROTOCOL_FEATURES => return value(r::protocol::PASSED_ON),
            r::SET_PROTOCOL_FEATURES => self.is_negotiated = true,
            r::GET_QUEUE_NUM => return value(2),
            r::GET_MAX_MEM_SLOTS => return value(509),
            r::SET_OWNER if self.has_owner => return Err("claimed twice".to_owned()),
            r::SET_OWNER => self.has_owner = true,
            r::SET_FEATURES => self.features = message.u64_at(0).unwrap(),
            r::RESET_DEVICE => {
                (self.features, self.cache) = (0, 1);
                self.rings.values_mut().for_each(|ring| ring.is_enabled = false);
            }
            r::GET_CONFIG => {
                let mut body = message.body.clone();
                body[12..20].copy_from_slice(&2048_u64.to_le_bytes());
                return Ok(Message::reply(request, body, Vec::new()));
            }
            r::SET_CONFIG => self.cache = message.body[12],
            r::SET_LOG_BASE => {
                self.log = Some(message.body.clone());
                return Ok(Message::reply(request, message.body.clone(), Vec::new()));
            }
            r::SET_MEM_TABLE => {
                self.memory.clear();
                let mut last = None;
                for (region, file) in message.body[8..].chunks(32).zip(&message.files) {
                    let guest = u64::from_le_bytes(region[..8].try_into().unwrap());
                    if last.replace(guest).is_some_and(|last| last > guest) {
                        return Err("not in order".to_owned());
                    }
                    self.memory.insert(guest, (region.to_vec(), file.clone()));
                }
            }
            r::ADD_MEM_REG => {
                let region = message.body[8..].to_vec();
                let guest = u64::from_le_bytes(region[..8].try_into().unwrap());
                if self.memory.insert(guest, (region, message.files[0].clone())).is_some() {
                    return Err("added twice".to_owned());
                }
            }
            r::REM_MEM_REG => {
                let guest = message.u64_at(8).unwrap();
                self.memory.remove(&guest).ok_or("removed twice")?;
            }
            r::SET_VRING_NUM
            | r::SET_VRING_BASE
            | r::SET_VRING_ADDR
            | r::SET_VRING_ENABLE
            | r::SET_VRING_CALL
            | r::SET_VRING_ERR
            | r::SET_VRING_KICK => {
                let mut ring = ring(self);
                let number = message.u32_at(4).unwrap();
                match request {
                    r::SET_VRING_NUM => ring.num = number,
                    r::SET_VRING_BASE => ring.base = number,
                    r::SET_VRING_ADDR => {
                        let user = message.u64_at(8).unwrap();
                        let is_there = self.memory.values().any(|(region, _)| {
                            let from = u64::from_le_bytes(region[16..24].try_into().unwrap());
                            (from..from + REGION).contains(&user)
                        });
                        if !is_there {
                            return Err("a ring outside of memory".to_owned());
                        }
                        ring.addr = Some(message.body.clone());
                    }
                    r::SET_VRING_ENABLE if !is_on => return Err("not negotiated".to_owned()),
                    r::SET_VRING_ENABLE => ring.is_enabled = number != 0,
                    r::SET_VRING_CALL => ring.call = message.files.first().cloned(),
                    r::SET_VRING_ERR => ring.error = message.files.first().cloned(),
                    _ => ring.kick = message.files.first().cloned(),
                }
                self.rings.insert(index, ring);
            }
            r::GET_VRING_BASE => {
                let base = used[index as usize];
                let mut ring = ring(self);
                (ring.kick, ring.call, ring.base) = (None, None, base);
                self.rings.insert(index, ring);
                return Ok(Message::reply(
                    request,
                    state_message(request, index, base).body,
                    Vec::new(),
                ));
            }
            other => return Err(format!("request {other} was passed on")),
        }
        assert!(message.needs_reply() && is_negotiated | self.is_negotiated, "{request}");
        value(0)
    }

    /// What does not differ between servers that a frontend cannot tell apart.
    fn seen(&self) -> Self {
        let mut seen = self.clone();
        // A ring that does not run may be anywhere: it is told before it does.
        for ring in seen.rings.values_mut().filter(|ring| ring.kick.is_none()) {
            ring.addr = None;
        }
        seen.rings.retain(|_, ring| *ring != Ring::default());
        seen
    }
}

/// What happens, one after the other.
#[derive(Debug, Clone)]
enum Step {
    /// The frontend sends a message.
    Frontend(Message),
    /// A ring has come so far.
    Progress(usize, u32),
    /// The server says that the disk has another size.
    ConfigChanged,
}

fn region_bytes(number: u64) -> Vec<u8> {
    [number * REGION, REGION, (number + 100) * REGION, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

fn table(numbers: &[u64]) -> Message {
    let mut body = (numbers.len() as u64).to_le_bytes().to_vec();
    numbers.iter().for_each(|&number| body.extend(region_bytes(number)));
    Message::new(r::SET_MEM_TABLE, body, numbers.iter().map(|_| file()).collect())
}

fn one_region(request: u32, number: u64) -> Message {
    let files = if request == r::ADD_MEM_REG { vec![file()] } else { Vec::new() };
    Message::new(request, [&[0; 8][..], &region_bytes(number)].concat(), files)
}

fn addr(ring: u32, number: u64) -> Message {
    let mut body = [ring.to_le_bytes(), [0; 4]].concat();
    for part in 0..3 {
        body.extend(((number + 100) * REGION + part * 4096).to_le_bytes());
    }
    body.extend([0; 8]);
    Message::new(r::SET_VRING_ADDR, body, Vec::new())
}

fn config(request: u32, offset: u32, bytes: &[u8]) -> Message {
    let words = [offset, bytes.len() as u32, 0];
    let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    body.extend(bytes);
    Message::new(request, body, Vec::new())
}

fn inflight(request: u32, region: Option<&Region>) -> Message {
    let mut body = region.map_or(0, |region| region.place.len).to_le_bytes().to_vec();
    body.extend([0; 8]);
    body.extend([2, 0, 128, 0, 0, 0, 0, 0]);
    Message::new(request, body, region.map(|region| region.memfd.clone()).into_iter().collect())
}

fn descriptor(request: u32, ring: u32) -> Message {
    descriptor_message(request, ring, Some(file()))
}

fn get(request: u32) -> Message {
    Message::new(request, [], Vec::new())
}

/// Handshake, SeaBIOS with one queue, Linux with two, memory that comes and goes, `stop` and
/// `cont`, a migration that begins, a reset.
fn life() -> Vec<Step> {
    let mut steps = Vec::new();
    let region = Region::new(2, 128).unwrap();
    let mut say = |message: Message| steps.push(Step::Frontend(message));
    say(get(r::GET_FEATURES));
    say(get(r::GET_PROTOCOL_FEATURES));
    let taken = r::protocol::PASSED_ON | r::protocol::ADDED;
    say(u64_message(r::SET_PROTOCOL_FEATURES, taken));
    say(get(r::GET_QUEUE_NUM));
    say(get(r::GET_MAX_MEM_SLOTS));
    say(Message::new(r::SET_BACKEND_REQ_FD, [], vec![file()]).with_need_reply());
    say(get(r::SET_OWNER));
    say(get(r::GET_FEATURES));
    for ring in 0..2 {
        say(descriptor(r::SET_VRING_CALL, ring).with_need_reply());
        say(descriptor(r::SET_VRING_ERR, ring).with_need_reply());
    }
    say(config(r::GET_CONFIG, 0, &[0; 57]));
    say(get(r::RESET_DEVICE));
    for (rings, memory) in [(0..1, 1), (0..2, 3)] {
        say(u64_message(r::SET_FEATURES, FEATURES & !4));
        say(inflight(r::GET_INFLIGHT_FD, None));
        say(inflight(r::SET_INFLIGHT_FD, Some(&region)));
        for ring in 0..2 {
            say(descriptor(r::SET_VRING_CALL, ring).with_need_reply());
        }
        // The order is not the guest's.
        say(if memory == 1 { table(&[1]) } else { table(&[4, 3]) }.with_need_reply());
        for ring in rings.clone() {
            say(state_message(r::SET_VRING_NUM, ring, 128));
            say(state_message(r::SET_VRING_BASE, ring, 0));
            say(addr(ring, memory));
            say(descriptor(r::SET_VRING_KICK, ring).with_need_reply());
        }
        for ring in 0..2 {
            say(state_message(r::SET_VRING_ENABLE, ring, 1).with_need_reply());
        }
        say(config(r::SET_CONFIG, 32, &[0]).with_need_reply());
        if memory == 1 {
            for ring in 0..2 {
                say(state_message(r::SET_VRING_ENABLE, ring, 0).with_need_reply());
            }
            say(state_message(r::GET_VRING_BASE, 0, 0));
            say(get(r::RESET_DEVICE));
        }
    }
    let mut more = vec![Step::Progress(0, 77), Step::Progress(1, 5), Step::ConfigChanged];
    let mut say = |message: Message| more.push(Step::Frontend(message));
    say(config(r::GET_CONFIG, 0, &[0; 57]));
    for number in [9, 10, 11] {
        say(one_region(r::ADD_MEM_REG, number).with_need_reply());
    }
    say(one_region(r::REM_MEM_REG, 10).with_need_reply());
    say(Message::new(r::SET_LOG_BASE, [1; 16], vec![file()]));
    say(u64_message(r::SET_FEATURES, FEATURES).with_need_reply());
    say(addr(0, 3).with_need_reply());
    // `stop` and `cont`.
    for ring in 0..2 {
        say(state_message(r::SET_VRING_ENABLE, ring, 0).with_need_reply());
    }
    say(state_message(r::GET_VRING_BASE, 0, 0));
    say(state_message(r::GET_VRING_BASE, 1, 0));
    for (ring, base) in [(0, 77), (1, 5)] {
        say(state_message(r::SET_VRING_NUM, ring, 64));
        say(state_message(r::SET_VRING_BASE, ring, base));
        say(addr(ring, 4));
        say(descriptor(r::SET_VRING_CALL, ring).with_need_reply());
        say(descriptor(r::SET_VRING_KICK, ring).with_need_reply());
        say(state_message(r::SET_VRING_ENABLE, ring, 1).with_need_reply());
    }
    // Requests that are not known, and the end.
    say(get(9999));
    say(get(9998).with_need_reply());
    say(state_message(r::GET_VRING_BASE, 1, 0));
    say(one_region(r::REM_MEM_REG, 9).with_need_reply());
    steps.extend(more);
    steps
}

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
            relay: Relay::new(Region::own(2).unwrap(), None),
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
        if has_died {
            self.die();
        } else if self.relay.waits_for_rings() {
            assert!(self.relay.look_at_region().is_empty() && self.relay.is_held());
            // What a server's workers write when they have looked.
            let region = self.relay.region();
            let part = region.place.len / 2;
            for at in [0, part] {
                rustix::io::pwrite(&region.memfd, &[0; 8], at).unwrap();
            }
            let effects = self.relay.look_at_region();
            self.apply(effects);
            return self.serve(None);
        }
        has_died
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
    // There is no place for a refusal in the answer to GET_STATUS.
    let effects = world.relay.from_frontend(get(40));
    assert!(matches!(effects[..], [Effect::Close(_)]), "{effects:?}");
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
        world.relay = Relay::new(Region::own(2).unwrap(), told);
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
