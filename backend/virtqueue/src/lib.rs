//! The device's side of one split virtqueue in guest memory that a frontend shares.
//!
//! By file: `memory` (a snapshot of the memory map), `view` (where both rings are in it, checked
//! once), `ring` (what has come, what has ended, and which side wakes the other), `requests`
//! (chains that become requests, and the table of those that are in flight), `taking` (the usual
//! ones of a batch), `inflight` (marks of those in memory that outlives the process), `dirty` (a
//! migration's log of pages), `marker` (what was written is marked there).
//!
//! Invariants: an address that was handed out stays mapped until its request has ended, or for
//! ever; a request's list of segments is not touched while the request is in flight; everything in
//! the rings is accessed atomically, because the driver does so at the same time, and what is read
//! may be any number at all.
//!
//! Deliberately absent: what a chain means (`virtio-blk`), which domain carries a request out
//! (`proxy`), when the rings are looked at and under which lock (the worker's), when writes are
//! logged (the worker's, too), packed rings. Section numbers refer to virtio 1.2.

mod dirty;
pub mod inflight;
mod marker;
mod memory;
mod requests;
mod ring;
mod taking;
mod view;

pub use dirty::{DirtyLog, GuestMemory, LogSlot};
pub use marker::{Marker, Marking, NotLogged};
pub use memory::Snapshot;
pub use requests::{BatchEnd, Chain, Parser, RequestTable};
pub use ring::{disable_notification, enable_notification, publish_tracked, publish_used, waiting};
pub use taking::{Share, Taken};
pub use view::{RingView, Used, ViewCache, used_ring};
