//! What frontends say, from a script: good messages, and good ones with something changed.

use crate::input::Input;
use supervisor::journal::Journal;
use supervisor::request::{self, Refusal, protocol};
use supervisor::wire::{MAX_BODY, Message, NEED_REPLY, REPLY};

/// Rings that the scripted server has.
pub const RINGS: u32 = 3;
/// Most memory regions that it takes.
const REGIONS: usize = 12;
/// Bytes of the configuration space that can be written.
const CONFIG: u32 = 4;

/// A message without its descriptors.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What it asks for, and how.
    pub message: Message,
    /// How many descriptors come with it.
    pub files: usize,
}

fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn region(input: &mut Input<'_>) -> [u64; 4] {
    let at = u64::from(input.u8() % 8) << 21;
    let size = 1_u64 << (12 + input.u8() % 10);
    [at, size, at + 0x7f00_0000_0000, 0]
}

/// A message as frontends send them.
pub fn good(input: &mut Input<'_>) -> Plan {
    let ring = u64::from(u32::from(input.u8()) % (RINGS + 1));
    let number = u64::from(input.u8());
    let pair = words(&[ring | number << 32]);
    let (request, body, files) = match input.below(30) {
        0 => (request::GET_FEATURES, Vec::new(), 0),
        1 => (request::SET_FEATURES, words(&[number | u64::from(number > 50) << 30]), 0),
        2 => (request::SET_OWNER, Vec::new(), 0),
        3 => (request::RESET_OWNER, Vec::new(), 0),
        4 => {
            let count = input.below(9);
            let mut body = words(&[count as u64]);
            (0..count).for_each(|_| body.extend(words(&region(input))));
            (request::SET_MEM_TABLE, body, count)
        }
        5 => (request::ADD_MEM_REG, [words(&[0]), words(&region(input))].concat(), 1),
        6 => (request::REM_MEM_REG, [words(&[0]), words(&region(input))].concat(), 0),
        7 => (request::SET_LOG_BASE, words(&[4096, 0]), 1),
        8 | 9 => (request::SET_VRING_NUM, words(&[ring | 128 << 32]), 0),
        10 | 11 => {
            let [_, _, user, _] = region(input);
            (request::SET_VRING_ADDR, words(&[ring, user, user + 64, user + 128, 0]), 0)
        }
        12 | 13 => (request::SET_VRING_BASE, pair, 0),
        14 => (request::GET_VRING_BASE, words(&[ring]), 0),
        15 | 16 => (request::SET_VRING_KICK, words(&[ring]), 1),
        17 => (request::SET_VRING_CALL, words(&[ring]), 1),
        18 => (request::SET_VRING_ERR, words(&[ring | 256]), 0),
        19 | 20 => (request::SET_VRING_ENABLE, words(&[ring | (number & 1) << 32]), 0),
        21 => (request::GET_PROTOCOL_FEATURES, Vec::new(), 0),
        22 | 23 => {
            let acks = if number < 200 { protocol::REPLY_ACK } else { 0 };
            (request::SET_PROTOCOL_FEATURES, words(&[acks | protocol::CONFIG]), 0)
        }
        24 => (request::GET_QUEUE_NUM, Vec::new(), 0),
        // With flags, so that it differs from what is asked for the supervisor's own sake.
        25 => (request::GET_CONFIG, [words(&[8 << 32]), vec![1, 0, 0, 0], vec![0; 8]].concat(), 0),
        26 => (request::SET_CONFIG, [words(&[number % 5 | 1 << 32]), vec![0; 5]].concat(), 0),
        27 => (request::SET_BACKEND_REQ_FD, Vec::new(), 1),
        28 => {
            let request = input.pick(&[request::GET_INFLIGHT_FD, request::SET_INFLIGHT_FD]);
            let files = usize::from(request == request::SET_INFLIGHT_FD);
            (request, [words(&[0x1000, 0]), vec![2, 0, 16, 0]].concat(), files)
        }
        _ => (input.pick(&[request::RESET_DEVICE, request::GET_MAX_MEM_SLOTS]), Vec::new(), 0),
    };
    let mut message = Message::new(request, body, Vec::new());
    if input.one_in(2) {
        message = message.with_need_reply();
    }
    Plan { message, files }
}

/// Any message at all.
pub fn any(input: &mut Input<'_>) -> Plan {
    let mut plan = good(input);
    let Plan { message, files } = &mut plan;
    for _ in 0..=input.below(2) {
        match input.below(7) {
            0 => message.request = input.u8().into(),
            1 => message.request = input.u32(),
            2 => message.flags ^= input.pick(&[REPLY, NEED_REPLY, 0x10, 1 << 31]),
            3 => *files = input.below(6),
            4 => message.body.truncate(input.u8().into()),
            5 => {
                let (len, fill) = (usize::from(input.u16()) % (MAX_BODY + 1), input.u8());
                message.body = vec![fill; len];
            }
            _ => {
                let (at, byte) = (usize::from(input.u8()), input.u8());
                if let Some(old) = message.body.get_mut(at) {
                    *old = byte;
                }
            }
        }
    }
    plan
}

/// Whether a frontend is told how a message went; none if it depends on what the message is worth.
#[must_use]
pub fn is_answered(message: &Message, has_acks: bool) -> bool {
    let wants = message.needs_reply() && has_acks;
    match message.request {
        request::GET_PROTOCOL_FEATURES | request::GET_INFLIGHT_FD | request::GET_STATUS => true,
        known if request::is_passed_on(known) => request::has_answer(known) || wants,
        request::SET_PROTOCOL_FEATURES | request::SET_BACKEND_REQ_FD => wants,
        request::SET_INFLIGHT_FD | request::SET_STATUS => wants,
        unknown => request::refusal(unknown) == Refusal::Ignore && wants,
    }
}

/// Whether a frontend has acknowledgements after this message, which had them before it or not.
#[must_use]
pub fn has_acks_after(message: &Message, before: bool) -> bool {
    match (message.request, message.u64_at(0)) {
        (request::SET_PROTOCOL_FEATURES, Some(taken)) => taken & protocol::REPLY_ACK != 0,
        _ => before,
    }
}

/// Descriptors of the largest ring that these sessions may have.
pub const LARGEST_RING: u16 = 1024;

/// Whether a server carries a message out, as strictly as a server has to be for its session to
/// stay small. `regions` is how many memory regions it has.
#[must_use]
pub fn is_sound(message: &Message, regions: usize) -> bool {
    let (body, files) = (&message.body, message.files.len());
    let ring = message.u32_at(0).is_some_and(|ring| ring & 0xff < RINGS && ring & 0xff == ring);
    match message.request {
        request::SET_FEATURES => body.len() == 8,
        request::SET_MEM_TABLE => {
            files <= 8 && body.len() == 8 + files * 32 && message.u32_at(0) == Some(files as u32)
        }
        request::ADD_MEM_REG => body.len() == 40 && files == 1 && regions < REGIONS,
        request::REM_MEM_REG => body.len() == 40,
        request::SET_LOG_BASE => body.len() == 16 && files == 1,
        request::SET_VRING_NUM => body.len() == 8 && ring && has_ring_size(message),
        request::SET_VRING_BASE | request::SET_VRING_ENABLE => body.len() == 8 && ring,
        request::GET_VRING_BASE => body.len() == 8 && ring,
        request::SET_VRING_ADDR => body.len() == 40 && ring,
        request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
            let ring = message.u64_at(0).is_some_and(|word| word & 0xff < RINGS.into());
            let has_none = message.u64_at(0).is_some_and(|word| word & 256 != 0);
            body.len() == 8 && ring && files == usize::from(!has_none)
        }
        request::SET_CONFIG => {
            let (Some(at), Some(len)) = (message.u32_at(0), message.u32_at(4)) else {
                return false;
            };
            body.len() as u64 == 12 + u64::from(len) && at.saturating_add(len) <= CONFIG
        }
        _ => true,
    }
}

/// Whether a ring can have the size that a SET_VRING_NUM gives it.
#[must_use]
pub fn has_ring_size(message: &Message) -> bool {
    let size = message.u32_at(4).unwrap_or(0);
    size.is_power_of_two() && size <= LARGEST_RING.into()
}

/// How many memory regions there are.
#[must_use]
pub fn regions(journal: &Journal) -> usize {
    let replay = journal.replay();
    let of_memory = replay
        .iter()
        .filter(|message| matches!(message.request, request::SET_MEM_TABLE | request::ADD_MEM_REG));
    of_memory.map(|message| message.files.len()).sum()
}

/// Adds up what is written to it.
struct Length(usize);

impl std::fmt::Write for Length {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0 += text.len();
        Ok(())
    }
}

/// How much something holds: the length of its description, in which every byte of it stands.
pub fn holds(what: &impl std::fmt::Debug) -> usize {
    let mut length = Length(0);
    std::fmt::Write::write_fmt(&mut length, format_args!("{what:?}")).expect("it is only counted");
    length.0
}
