//! What a worker is told: whether it may submit, and how requests end.

use domain_abi::Status;

/// Whether requests may be submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// They may.
    Open,
    /// They may not: reap what the domain owes, and when it owes nothing,
    /// [`Worker::wait_at_gate`](crate::Worker::wait_at_gate).
    Shut,
}

/// A request that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The slot that it was named by.
    pub slot: usize,
    /// How.
    pub status: Status,
    /// Bytes that were written into its buffer.
    pub written: u32,
}
