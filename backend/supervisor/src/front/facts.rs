//! What the supervisor knows of its own two processes, as `status` shows it.

use crate::store::StoreFacts;
use serde::{Deserialize, Serialize};

/// How the device is, where the supervisor knows better than the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// As the server says.
    Serving,
    /// The server is being exchanged.
    Upgrading,
    /// The server has died, and another one is on its way.
    Recovering,
    /// No server could be started, and none is on its way.
    Faulted,
}

/// The supervisor itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisorFacts {
    /// Its process, which stays the same.
    pub pid: u32,
    /// Of its program.
    pub version: String,
    /// When this program began, in milliseconds since 1970.
    pub since: u64,
    /// What the service manager keeps.
    #[serde(default)]
    pub store: StoreFacts,
}

/// The server that lives, or the last one that did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerFacts {
    /// Its process; none while there is none.
    pub pid: Option<u32>,
    /// Of its program.
    pub version: String,
    /// When it began to serve, in milliseconds since 1970.
    pub since: u64,
    /// How many servers have died.
    pub deaths: u64,
    /// How many times another one has gone on after a death.
    pub recoveries: u64,
    /// How many requests are quarantined.
    pub quarantined: u64,
    /// The queues whose worker stands still.
    #[serde(default)]
    pub stuck: Vec<u16>,
}

/// What `status` says of the processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The device.
    pub phase: Phase,
    /// Why no server serves, if none does.
    #[serde(default)]
    pub why: Option<String>,
    /// The supervisor.
    pub supervisor: SupervisorFacts,
    /// The server.
    pub server: ServerFacts,
}
