//! What a client of the control socket may take.

use std::time::Duration;

/// What a client may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Clients at a time. One more takes the place of the one that has been idle longest, or is
    /// refused with a sentence.
    pub connections: usize,
    /// How long a client must have had nothing to say before it has to make room for another one.
    pub idle: Duration,
    /// Bytes of a line, without its end.
    pub line: usize,
    /// How long a client may take to fetch a reply or an event; then it is cut off.
    pub write_timeout: Duration,
    /// How long [`Server::stop`](crate::Server::stop) waits for replies under way, and again for
    /// cut connections.
    pub stop_patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 32,
            line: 64 << 10,
            idle: Duration::from_secs(1),
            write_timeout: Duration::from_secs(5),
            stop_patience: Duration::from_secs(1),
        }
    }
}
