//! What all clients of the control front have in common.

use super::facts::{Facts, Phase};
use super::pipe::Pipe;
use super::{Ticket, Wish};
use control::Limits;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use telemetry::Book;

/// The longest line of a server that is believed; `hotswapctl` believes no longer one.
pub(super) const ANSWER_MAX: usize = 64 << 20;

/// Whether there is a server to pass requests on to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Server {
    /// There is.
    Up,
    /// There is, and it is about to be stopped.
    Held,
    /// There is none.
    Gone,
}

/// What all clients have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) limits: Limits,
    /// How long a request waits for a server.
    pub(super) patience: Duration,
    pub(super) server: Server,
    pub(super) facts: Option<Facts>,
    /// What the server said of the device last.
    pub(super) last_status: Option<Value>,
    /// Whether that is old.
    pub(super) is_stale: bool,
    pub(super) wishes: Vec<Wish>,
    pub(super) next_ticket: u64,
    /// The highest number of an event so far.
    pub(super) last_event: u64,
    /// What is added to the numbers of the server's events.
    pub(super) events_before: u64,
    /// What has happened.
    pub(super) book: Book,
    /// The server says what happens, and need not be asked.
    pub(super) tells_events: bool,
}

impl Shared {
    pub(super) const fn ticket(&mut self) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        ticket
    }

    /// Whether no server is started any more.
    pub(super) fn is_given_up(&self) -> bool {
        self.facts.as_ref().is_some_and(|facts| facts.phase == Phase::Faulted)
    }

    /// A stream to the server.
    pub(super) fn connect(&mut self) -> io::Result<Pipe> {
        let (ours, theirs) = UnixStream::pair()?;
        self.wishes.push(Wish::Client(theirs.into()));
        Pipe::new(ours, ANSWER_MAX)
    }
}
