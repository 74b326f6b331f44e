//! The control socket: how an operator commands a running daemon.
//!
//! JSON-RPC 2.0 over a Unix stream socket, one object per line in both directions; the methods are
//! `status`, `upgrade`, `rollback`, `history`, `watch` and `shutdown`. This module knows the
//! protocol and the socket; what the methods *do* is behind [`Operations`], so that all of it can
//! be tested without a device.
//!
//! The parts: `rpc` turns one line into a call and a result into one line, `connection` is the life
//! of one client, [`Server`] accepts clients and ends them, [`SocketFile`] is the path that they
//! connect to.
//!
//! Invariants:
//! * Only root and the daemon's own user are served: mode 0600 before the name is visible, and the
//!   peer's uid.
//! * Every request that carries an id is answered exactly once, in the order of arrival. Every
//!   refusal says a stable code string (`data.code`) and a sentence.
//! * No client can hold up the daemon, or another client: lines, connections and the time that a
//!   reply may take have limits ([`Limits`]), and a client's thread is only its own.
//!
//! Deliberately absent: batches, authentication beyond the peer's uid, any transport but this one,
//! and any knowledge of domains, queues or generations.

use std::time::Duration;

use domain_abi::Params;
use serde::Deserialize;
use serde_json::Value;

mod connection;
mod peer;
mod rpc;
mod server;
mod socket;

pub use server::{Limits, Server};
pub(crate) use socket::SOCKET_PATH_MAX;
pub use socket::{SocketError, SocketFile, SocketName};

/// How long a drain may take if a request does not say.
pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_millis(500);
/// How much longer workers are waited for that are not given a CPU, if a request does not say.
pub const DEFAULT_STARVED_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest drain that can be asked for, and the longest wait for a CPU. The guest waits as
/// long.
pub const MAX_DRAIN_TIMEOUT: Duration = Duration::from_secs(600);

/// What the methods do. Calls come from many threads at once; each blocks only the client that made
/// it.
pub trait Operations: Send + Sync + 'static {
    /// The state of the device. It must not wait for a running upgrade.
    fn status(&self) -> Value;

    /// Replaces the live domain; comes back when that is done or refused.
    ///
    /// # Errors
    /// Why it was refused or failed; the device then goes on as before.
    fn upgrade(&self, request: UpgradeRequest) -> Result<Value, OperationError>;

    /// Goes back to the standby.
    ///
    /// # Errors
    /// Why it was refused or failed; the device then goes on as before.
    fn rollback(&self, request: RollbackRequest) -> Result<Value, OperationError>;

    /// What has happened, oldest first.
    fn history(&self) -> Value;

    /// Blocks until the next event after number `after`, or until `timeout` has passed.
    ///
    /// Numbers grow; the first event has number 1. Events that were dropped because nobody fetched
    /// them in time are skipped: the watcher sees the gap in the numbers.
    fn next_event(&self, after: u64, timeout: Duration) -> Option<(u64, Value)>;

    /// The number of the latest event, 0 before the first: a `watch` begins after it.
    ///
    /// Left at 0, a `watch` begins with all events that are still kept.
    fn last_event(&self) -> u64 {
        0
    }

    /// Asks the daemon to end, and returns at once. It must not wait for the [`Server`]: the caller
    /// is one of its threads.
    fn shutdown(&self);
}

/// Which upgrade protocol to use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpgradeMode {
    /// Swap where it is right, else handover.
    #[default]
    Auto,
    /// Publish first, then wait; nobody is paused.
    Swap,
    /// Gate closed, drained, state moved, gate open.
    Handover,
}

/// What to do if another upgrade is running.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenBusy {
    /// Wait for it to end, then go on.
    #[default]
    Queue,
    /// Refuse at once.
    Refuse,
}

/// The parameters of method `upgrade`.
///
/// On the wire: `{"name": .., "params": {..}, "mode": "auto", "drain_timeout_ms": 500,
/// "starved_timeout_ms": 10000, "when_busy": "queue"}`, of which only `name` is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpgradeRequest {
    /// A domain's name, or a module's path if it contains `/`. Neither empty nor with a NUL.
    pub name: String,
    /// The new domain's parameters.
    pub params: Params,
    /// Which protocol.
    pub mode: UpgradeMode,
    /// How long the guest may wait for the drain, at most [`MAX_DRAIN_TIMEOUT`].
    pub drain_timeout: Duration,
    /// How much longer workers are waited for that are not given a CPU, at most
    /// [`MAX_DRAIN_TIMEOUT`].
    pub starved_timeout: Duration,
    /// What to do if another upgrade is running.
    pub when_busy: WhenBusy,
}

/// The parameters of method `rollback`: as those of `upgrade`, and none of them needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollbackRequest {
    /// How long the guest may wait for the drain, at most [`MAX_DRAIN_TIMEOUT`].
    pub drain_timeout: Duration,
    /// How much longer workers are waited for that are not given a CPU, at most
    /// [`MAX_DRAIN_TIMEOUT`].
    pub starved_timeout: Duration,
    /// What to do if an upgrade is running.
    pub when_busy: WhenBusy,
}

/// Why an operation was refused or failed. Sent as JSON-RPC error -32000.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct OperationError {
    /// A stable word for programs, sent as `data.code`.
    pub code: &'static str,
    /// A sentence for people: what happened, and what to do.
    pub message: String,
    /// More for programs: an object's members are sent beside `data.code`, another value as
    /// `data.detail`.
    pub data: Option<Value>,
}
