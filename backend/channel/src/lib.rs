//! The private channel between the supervisor and its server.
//!
//! One `SOCK_SEQPACKET` socket pair: each packet is one JSON object, [`ToServer`] or
//! [`ToSupervisor`], with up to [`MAX_DESCRIPTORS`] descriptors. A packet that was sent stays
//! readable after its sender's death, so what the server has said of its state needs no answer.
//!
//! The two sides may be of different releases. Members that a side does not know are ignored, and
//! those that it misses have defaults; what changes more than that changes [`VERSION`], which comes
//! with the first message.
//!
//! Deliberately absent: what the messages bring about. The supervisor (`supervisor`) and the server
//! (`vhost-hotswap`) know that.

#![forbid(unsafe_code)]

mod memory;
mod messages;
mod packet;
mod rings;

pub use memory::memfd;
pub use messages::{
    Bytes, InflightRegion, Kept, Module, Quarantined, RateLimits, Region, Sandbox, Session,
    Settings, Start, Stored, ToServer, ToSupervisor, VERSION, Vault,
};
pub use packet::{Channel, MAX_DESCRIPTORS, MAX_PACKET, Received, pair};
pub use rings::{MAX_QUEUE_SIZE, ring_refusal};
