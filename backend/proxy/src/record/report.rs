//! What an upgrade says about itself: phases, result, history, events.

use crate::datapath::queue::QueueStatus;
use crate::record::canary::CanaryReport;
use crate::record::code::Code;
use crate::record::serialize;
use domain_abi::DeviceInfo;
use domain_abi::Params;
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Which protocol to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Swap where it is right, else handover.
    #[default]
    Auto,
    /// Publish first, then wait; refused where it is not right.
    Swap,
    /// Gate, drain, exchange.
    Handover,
}

/// Which protocol was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// No queue was paused.
    Swap,
    /// The gate was shut for a moment.
    Handover,
    /// The live domain had died: what it left was run again by its successor.
    Takeover,
}

impl Protocol {
    /// Its name in JSON and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Swap => "swap",
            Self::Handover => "handover",
            Self::Takeover => "takeover",
        }
    }
}

/// What to do if an upgrade is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenBusy {
    /// Wait for it to end.
    #[default]
    Queue,
    /// Give up at once.
    Refuse,
}

/// How to make the change.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Which protocol.
    pub mode: Mode,
    /// How long a handover waits for what is in flight, not counting what a worker waits for a CPU.
    pub drain_timeout: Duration,
    /// How much longer it waits for workers that are not given a CPU. A takeover that is under way
    /// is awaited for as long as both together.
    pub starved_timeout: Duration,
    /// What to do if another one is under way.
    pub when_busy: WhenBusy,
}

impl Options {
    /// How long a change waits for what others do, all in all.
    pub(crate) fn limit(&self) -> Duration {
        self.drain_timeout + self.starved_timeout
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            drain_timeout: Duration::from_millis(500),
            starved_timeout: Duration::from_secs(10),
            when_busy: WhenBusy::Queue,
        }
    }
}

/// A domain, by what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DomainRecord {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Name of the layout in which it keeps its storage.
    #[serde(skip)]
    pub schema_name: String,
    /// SHA-256 of its module, in hex.
    pub sha256: String,
    /// The GNU build id of its module, in hex, where it has one.
    pub build_id: Option<String>,
    /// Where its module was read from.
    pub path: String,
    /// Its parameters, inherited ones included.
    #[serde(serialize_with = "serialize::params")]
    pub params: Params,
    /// What it announces.
    #[serde(skip)]
    pub info: DeviceInfo,
}

/// How long each phase took. What did not happen is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Phases {
    /// Reading and checking the file.
    #[serde(serialize_with = "serialize::micros")]
    pub verify: Duration,
    /// Mapping it.
    #[serde(serialize_with = "serialize::micros")]
    pub load: Duration,
    /// The new domain's own preparation.
    #[serde(serialize_with = "serialize::micros")]
    pub prepare: Duration,
    /// Gate shut to last arrival.
    #[serde(serialize_with = "serialize::micros")]
    pub drain: Duration,
    /// The old domain writes down what only it knows.
    #[serde(serialize_with = "serialize::micros")]
    pub quiesce: Duration,
    /// The new domain takes the storage up.
    #[serde(serialize_with = "serialize::micros")]
    pub activate: Duration,
    /// Gate shut to gate open; in a takeover, the death until another domain serves.
    #[serde(serialize_with = "serialize::micros")]
    pub pause: Duration,
    /// Until the old instance was not used any more.
    #[serde(serialize_with = "serialize::micros")]
    pub grace: Duration,
    /// Ending the instance before that.
    #[serde(serialize_with = "serialize::micros")]
    pub retire: Duration,
}

/// Times a phase.
pub(crate) fn timed<R>(phase: &mut Duration, f: impl FnOnce() -> R) -> R {
    let started = Instant::now();
    let result = f();
    *phase = started.elapsed();
    result
}

/// A committed change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The generation that it made.
    pub generation: u64,
    /// How.
    pub protocol: Protocol,
    /// What served before.
    pub from: Arc<DomainRecord>,
    /// What serves now.
    pub to: Arc<DomainRecord>,
    /// How long it took.
    pub phases: Phases,
}

/// What a check says of a module that would be accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// How it would come.
    pub protocol: Protocol,
    /// Whether what serves now could go on with what the module has made of the storage.
    pub can_roll_back: bool,
    /// What serves now.
    pub from: Arc<DomainRecord>,
    /// What would serve.
    pub to: Arc<DomainRecord>,
    /// What could not be ended of it, and why.
    pub left: Option<String>,
    /// How long it took.
    pub phases: Phases,
}

/// A committed change of the capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Resized {
    /// The generation that was resized.
    pub generation: u64,
    /// Bytes before.
    #[serde(rename = "capacity_before")]
    pub before: u64,
    /// Bytes now.
    pub capacity: u64,
}

/// What a committed change was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Outcome {
    /// Another domain serves.
    Replaced(Report),
    /// The disk is larger.
    Resized(Resized),
}

impl From<Report> for Outcome {
    fn from(report: Report) -> Self {
        Self::Replaced(report)
    }
}

impl From<Resized> for Outcome {
    fn from(resized: Resized) -> Self {
        Self::Resized(resized)
    }
}

/// Why a change was refused: the device is as it was.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Stable.
    pub code: Code,
    /// A sentence that says what to do.
    pub message: String,
    /// Where workers were waited for in vain: the queues that had requests in flight.
    pub stuck: Vec<QueueStatus>,
    /// Where workers were waited for in vain: those that waited for a CPU.
    pub starved: Vec<Starved>,
}

/// A worker that was not given a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Starved {
    /// Its queue.
    pub queue: usize,
    /// How long it was ready to run, and did not.
    #[serde(rename = "waited_us", serialize_with = "serialize::micros")]
    pub waited: Duration,
    /// Of how long.
    #[serde(rename = "of_us", serialize_with = "serialize::micros")]
    pub of: Duration,
    /// It waits in the kernel for a disk or a lock.
    #[serde(skip)]
    pub is_blocked: bool,
}

impl Refusal {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), stuck: Vec::new(), starved: Vec::new() }
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A module was to be loaded.
    Upgrade,
    /// The standby was to come back.
    Rollback,
    /// The live domain had died, and the standby was to go on in its place.
    Takeover,
    /// The disk was to become larger.
    Resize,
}

impl Change {
    /// Its name in JSON and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Upgrade => "upgrade",
            Self::Rollback => "rollback",
            Self::Takeover => "takeover",
            Self::Resize => "resize",
        }
    }
}

/// One line of the history.
#[derive(Debug, Clone)]
pub struct Entry {
    /// When it ended.
    pub at: SystemTime,
    /// What was asked for.
    pub change: Change,
    /// How it ended.
    pub result: Result<Outcome, Refusal>,
}

impl Entry {
    /// Says it in the log.
    pub(crate) fn log(&self) {
        let change = self.change.name();
        match &self.result {
            Ok(Outcome::Resized(Resized { before, capacity, .. })) => {
                log::info!(change, before, capacity; "{change} from {before} to {capacity} bytes");
            }
            Ok(Outcome::Replaced(report)) => log::info!(
                change,
                generation = report.generation,
                mode = report.protocol.name(),
                pause_us = report.phases.pause.as_micros() as u64;
                "{change} to generation {}: `{}` {} -> `{}` {} by {}, pause {} us",
                report.generation,
                report.from.name,
                report.from.version,
                report.to.name,
                report.to.version,
                report.protocol.name(),
                report.phases.pause.as_micros()
            ),
            Err(refusal) if self.change == Change::Takeover => {
                log::error!("faulted ({}): {}", refusal.code, refusal.message);
            }
            Err(refusal) => {
                log::warn!(change, code = refusal.code.as_str(); "{change} refused ({}): {}", refusal.code, refusal.message)
            }
        }
    }
}

/// Something that happened to the device.
#[derive(Debug, Clone)]
pub enum Event {
    /// A change begins.
    Started {
        /// What was asked for.
        change: Change,
        /// The module's name or path; `standby` for a rollback; bytes for a new size.
        target: String,
    },
    /// A change ended.
    Ended(Box<Entry>),
    /// The live domain has panicked or cannot be used.
    Faulted {
        /// Which generation.
        generation: u64,
        /// Why.
        reason: String,
    },
    /// A frontend came or went.
    Connected(bool),
    /// A canary serves, or there is a verdict.
    Canary(Box<CanaryReport>),
}
