//! What the relay reads in messages itself, and the answers that it gives.

use crate::request;
use crate::wire::Message;
use channel::InflightRegion;

/// Bytes of the configuration space's head in a message: offset, size, flags.
const CONFIG_HEAD: usize = 12;
/// Bytes of what is said of an in-flight region: length, offset, queues, size of a queue.
const INFLIGHT: usize = 20;

/// An answer whose body is one number.
pub(crate) fn reply(message: &Message, body: [u8; 8]) -> Message {
    Message::reply(message.request, body, Vec::new())
}

/// What a message says of an in-flight region.
pub(crate) fn inflight(message: &Message) -> Option<InflightRegion> {
    if message.body.len() < INFLIGHT {
        return None;
    }
    let sizes = message.u32_at(16)?;
    Some(InflightRegion {
        len: message.u64_at(0)?,
        offset: message.u64_at(8)?,
        queues: sizes as u16,
        queue_size: (sizes >> 16) as u16,
        leaves: false,
    })
}

/// The disk's size in sectors, if an answer to GET_CONFIG says it.
pub(crate) fn capacity(answer: &Message) -> Option<u64> {
    let is_head = answer.u32_at(0)? == 0 && answer.u32_at(4)? >= 8;
    is_head.then(|| answer.u64_at(CONFIG_HEAD)).flatten()
}

/// Whether a message gives a ring a size that it cannot have. The server's library acknowledges
/// it; the server says why in the log, and ends the session when the frontend has heard of it.
pub(crate) fn is_no_ring_size(message: &Message, largest: u16) -> bool {
    let is_one = |size: u32| size.is_power_of_two() && size <= u32::from(largest);
    message.request == request::SET_VRING_NUM && !message.u32_at(4).is_some_and(is_one)
}
