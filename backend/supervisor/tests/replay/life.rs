//! What a frontend says in its life.

use crate::server::{FEATURES, REGION};
use std::os::fd::OwnedFd;
use supervisor::descriptor::Descriptor;
use supervisor::journal::{descriptor_message, state_message, u64_message};
use supervisor::region::Region;
use supervisor::request as r;
use supervisor::wire::Message;

fn file() -> Descriptor {
    OwnedFd::from(tempfile::tempfile().unwrap()).into()
}

/// What happens, one after the other.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// The frontend sends a message.
    Frontend(Message),
    /// A ring has come so far.
    Progress(usize, u32),
    /// The server says that the disk has another size.
    ConfigChanged,
}

pub(crate) fn region_bytes(number: u64) -> Vec<u8> {
    [number * REGION, REGION, (number + 100) * REGION, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

pub(crate) fn table(numbers: &[u64]) -> Message {
    let mut body = (numbers.len() as u64).to_le_bytes().to_vec();
    numbers.iter().for_each(|&number| body.extend(region_bytes(number)));
    Message::new(r::SET_MEM_TABLE, body, numbers.iter().map(|_| file()).collect())
}

pub(crate) fn one_region(request: u32, number: u64) -> Message {
    let files = if request == r::ADD_MEM_REG { vec![file()] } else { Vec::new() };
    Message::new(request, [&[0; 8][..], &region_bytes(number)].concat(), files)
}

pub(crate) fn addr(ring: u32, number: u64) -> Message {
    let mut body = [ring.to_le_bytes(), [0; 4]].concat();
    for part in 0..3 {
        body.extend(((number + 100) * REGION + part * 4096).to_le_bytes());
    }
    body.extend([0; 8]);
    Message::new(r::SET_VRING_ADDR, body, Vec::new())
}

pub(crate) fn config(request: u32, offset: u32, bytes: &[u8]) -> Message {
    let words = [offset, bytes.len() as u32, 0];
    let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    body.extend(bytes);
    Message::new(request, body, Vec::new())
}

pub(crate) fn inflight(request: u32, region: Option<&Region>) -> Message {
    let mut body = region.map_or(0, |region| region.place.len).to_le_bytes().to_vec();
    body.extend([0; 8]);
    body.extend([2, 0, 128, 0, 0, 0, 0, 0]);
    Message::new(request, body, region.map(|region| region.memfd.clone()).into_iter().collect())
}

pub(crate) fn descriptor(request: u32, ring: u32) -> Message {
    descriptor_message(request, ring, Some(file()))
}

pub(crate) fn get(request: u32) -> Message {
    Message::new(request, [], Vec::new())
}

/// Handshake, SeaBIOS with one queue, Linux with two, memory that comes and goes, `stop` and
/// `cont`, a migration that begins, a reset.
pub(crate) fn life() -> Vec<Step> {
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
    let log = [1024_u64.to_le_bytes(), 0_u64.to_le_bytes()].concat();
    say(Message::new(r::SET_LOG_BASE, log, vec![Region::new(1, 64).unwrap().memfd]));
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
