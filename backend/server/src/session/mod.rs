//! One frontend's connection: from accept to the last worker's leaving.
//!
//! ```text
//!   accept -> negotiate -> rings start -> serve -> (rings stop -> start ...)
//!          -> disconnect -> drain -> close -> join
//! ```
//!
//! A frontend that reconnects takes the used index that it finds for the place to go on at. So when
//! a session is ended from this side, everything is answered before the frontend is let go; and
//! once it is gone, nothing is published any more, because that would be answered, or even run, a
//! second time.
//!
//! By file: `serve` (a session from beginning to end), `handle` (its end, from any thread),
//! `frontend` (what the frontend's messages do), `state` (what there is, and how it ends),
//! `queue_control` (a queue's thread, and what waits for it), `drain` (tickets), `rings` (the
//! library's rings, with what it does not tell), `alarm` (a queue's timer); `context`, `offer`,
//! `memory`, `connection`, `lookout`, `beginning` and `config` are what all queues share, part by
//! part. How far a session is stands in `phase.rs`.
//!
//! Invariants: no event handler returns an error for a request's sake (that would end its thread in
//! silence); a ring that was stopped or reset has nothing in flight when the frontend gets its
//! answer, unless the guest is migrated and the frontend wants it left to another process (one that
//! was disabled takes nothing more); when a session is over, nothing of it is
//! left: no thread, no descriptor, no mapping.

mod alarm;
mod beginning;
mod claim;
mod config;
mod connection;
mod context;
mod drain;
mod frontend;
mod handle;
mod lookout;
mod memory;
mod offer;
mod queue_control;
mod rings;
mod serve;
#[cfg(test)]
mod serve_tests;
mod state;
#[cfg(test)]
mod tests;

pub use beginning::{Beginning, TellBelief};
pub use config::SessionConfig;
pub use frontend::Failure;
pub use handle::SessionHandle;
pub use serve::{serve, serve_from};
