//! The virtio block device as the guest sees it: wire format, request parser, config space, feature
//! bits.
//!
//! A descriptor chain comes in from a guest that may be broken or hostile, and leaves as one of
//! three things: a request that a domain can carry out without looking at it twice, an answer that
//! needs no domain, or a chain that cannot be answered ([`Parsed`]). Everything that the guest can
//! get wrong in a chain is found here; what it can get wrong in its rings, in `virtqueue`.
//!
//! Invariants: what reaches a domain is inside guest memory and inside the announced capacity; each
//! byte that a decision depends on is read from guest memory once; nothing here panics, blocks or
//! (once the caller's list has grown) allocates, whatever the guest wrote.
//!
//! Deliberately absent: the available and used rings and their notifications (the daemon),
//! vhost-user, threads, upgrades, legacy and big-endian drivers, and dirty logging. Section numbers
//! refer to virtio 1.2.

mod chain;
mod config;
pub mod features;
mod memory;
mod request;
mod status;
mod usual;
mod write_cache;

pub use chain::{MAX_DESCRIPTORS, MAX_SEGMENTS, MalformedChain};
pub use config::{
    CONFIG_SIZE, ConfigSpace, Error, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE,
    SEG_MAX, SIZE_MAX,
};
pub use memory::{DescriptorTable, StatusSlot, Translator};
pub use request::{Asked, Blocks, Capacity, Limits, Parsed, parse, used_len};
pub use status::WireStatus;
pub use usual::{Usual, usual};
pub use write_cache::Belief;
