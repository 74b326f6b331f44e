//! The device at a glance.

use crate::datapath::queue::QueueStatus;
use crate::record::history::Counts;
use crate::record::report::DomainRecord;
use std::collections::BTreeMap;

/// What the device is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The live domain serves.
    Serving,
    /// It serves, and a change is under way.
    Upgrading,
    /// A domain has died, and what it had cannot go on: requests of the live one end with I/O
    /// errors until an upgrade brings the device back, or those of a replaced one are never
    /// answered.
    Faulted,
}

impl State {
    /// Its name in JSON and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Upgrading => "upgrading",
            Self::Faulted => "faulted",
        }
    }
}

/// Everything that `status` tells.
#[derive(Debug, Clone)]
pub struct Status {
    /// The live generation.
    pub generation: u64,
    /// What the device is doing.
    pub state: State,
    /// Why it is faulted, if it is.
    pub fault: Option<String>,
    /// The live domain.
    pub domain: DomainRecord,
    /// What a rollback would bring back.
    pub standby: Option<DomainRecord>,
    /// Queue by queue.
    pub queues: Vec<QueueStatus>,
    /// How changes ended so far.
    pub counts: Counts,
    /// Modules that are mapped though nothing needs them, and why.
    pub resident: Vec<String>,
    /// Why something that was written may be lost. It stays until the disk is opened anew.
    pub storage_failure: Option<String>,
    /// What domains have counted, by name.
    pub counters: BTreeMap<String, u64>,
}
