//! The way of a request: from a queue's worker to the live domain, and back.

mod attach;
mod attachment;
pub(crate) mod cpu_time;
pub(crate) mod inflight;
mod measured;
pub(crate) mod progress;
pub(crate) mod queue;
mod replay;
pub(crate) mod worker;
