//! What does not change from session to session.

use crate::inflight::SharedInflight;
use crate::limiter::Limiter;
use std::sync::Arc;
use std::time::Duration;
use telemetry::Counters;

/// The daemon's choices about queues.
#[derive(Clone)]
pub struct SessionConfig {
    /// Number of queues.
    pub queues: u16,
    /// Largest size of a queue.
    pub queue_size: u16,
    /// How long a worker polls before it sleeps.
    pub poll: Duration,
    /// Which CPU each worker is kept on, in turn; none if empty.
    pub worker_cpus: Vec<usize>,
    /// Where what is in flight is marked.
    pub inflight: SharedInflight,
    /// What is let through in a second.
    pub limiter: Arc<Limiter>,
    /// Where requests are counted, if they are.
    pub counters: Option<Counters>,
}
