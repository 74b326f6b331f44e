//! The control front: clients of the control socket, on their way to a server that may die.
//!
//! The supervisor accepts the clients. What a client says is passed on to the server, and what the
//! server answers is passed back, byte for byte, with these exceptions: `status` gets the members
//! `supervisor` and `server`, and is answered here while no server lives; `upgrade_daemon` is
//! answered here; a request that the server had when it died is answered here with `server_died`;
//! `watch` goes on over a death and over an exchange.
//!
//! [`Front`] is a state machine that never waits. The loop that drives it:
//!
//! 1. before each wait, [`Front::polled`] says which descriptors are looked at, and
//!    [`Front::deadline`] when at the latest to come back;
//! 2. after it, [`Front::ready`] for each of them on which something has happened, and once
//!    [`Front::tick`];
//! 3. whenever the server changes: [`Front::server_up`], [`Front::hold`], [`Front::server_gone`];
//!    whenever there is news: [`Front::tell`], [`Front::event`], [`Front::answer`];
//! 4. after all of these, [`Front::wishes`] says what the loop is to do for it.

mod facts;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use control::messages::UpgradeDaemonRequest;
use control::rpc::RpcError;
use control::{Limits, SocketFile};
use rustix::event::PollFlags;
use serde_json::Value;

pub use facts::{Facts, Phase, ServerFacts, SupervisorFacts};

/// Names one of the front's descriptors, until the next call of [`Front::polled`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token(u64);

/// A descriptor to look at.
#[derive(Debug)]
pub struct Polled<'a> {
    /// Comes back with [`Front::ready`].
    pub token: Token,
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// What to look for.
    pub interest: PollFlags,
}

/// Names a request that the loop answers.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Ticket(u64);

/// What the loop is to do for the front.
#[derive(Debug)]
pub enum Wish {
    /// Send this stream to the server, with [`channel::ToServer::Client`].
    Client(OwnedFd),
    /// Exchange the daemon's program, and then [`Front::answer`].
    UpgradeDaemon(Ticket, UpgradeDaemonRequest),
    /// End the daemon. Only asked for while no server lives; else the server hears it.
    Shutdown,
}

/// All clients of the control socket.
#[derive(Debug)]
pub struct Front {
    #[expect(dead_code, reason = "what is behind this face comes next")]
    socket: SocketFile,
    #[expect(dead_code, reason = "as above")]
    limits: Limits,
}

impl Front {
    /// Serves the clients of `socket`.
    ///
    /// # Errors
    /// The socket cannot be made one that does not wait.
    pub fn new(socket: SocketFile, limits: Limits) -> std::io::Result<Self> {
        socket.listener().set_nonblocking(true)?;
        Ok(Self { socket, limits })
    }

    /// What to look at.
    #[must_use]
    pub fn polled(&self) -> Vec<Polled<'_>> {
        Vec::new()
    }

    /// When [`Front::tick`] is due at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Something has happened on a descriptor.
    pub fn ready(&mut self, token: Token, what: PollFlags) {
        let _ = (token, what);
    }

    /// Time has passed.
    pub fn tick(&mut self) {}

    /// What is to be done for the front. Each is said once.
    pub fn wishes(&mut self) -> Vec<Wish> {
        Vec::new()
    }

    /// A server serves from now on (it has said `Ready`, or `Resumed` after [`Front::hold`]).
    pub fn server_up(&mut self) {}

    /// Pass nothing on from now on: the server is about to be stopped. What it has been given
    /// already is still answered by it.
    pub fn hold(&mut self) {}

    /// The server is dead, or has been told to exit. What it had and has not answered is answered
    /// here. Its last words are heard first.
    pub fn server_gone(&mut self) {}

    /// What `status` says of the processes, from now on.
    pub fn tell(&mut self, facts: Facts) {
        let _ = facts;
    }

    /// Something has happened that those who watch should know: `event` names it, `members` has
    /// what else there is to say.
    pub fn event(&mut self, event: &str, members: Value) {
        let _ = (event, members);
    }

    /// A request that was wished for is answered.
    pub fn answer(&mut self, ticket: Ticket, answer: Result<Value, RpcError>) {
        let _ = (ticket, answer);
    }
}
