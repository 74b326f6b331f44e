//! The proxy: what stands between a device's workers and its live domain.
//!
//! One [`DomainProxy`] per device (`device.rs`). Workers use it through [`Worker`], operators
//! through [`DomainProxy::upgrade`], [`DomainProxy::rollback`] and [`DomainProxy::resize`].
//!
//! - `datapath/`: the way of a request: `worker.rs` and what it keeps.
//! - `change/`: the ways of an upgrade, a takeover and the end: `upgrade.rs`, `takeover.rs`,
//!   `retire.rs`, `stop.rs`; `resize.rs`: a larger disk.
//! - `canary/`: an upgrade that takes itself back.
//! - `record/`: what is said about them: reports, codes, history, events.
//! - `claim.rs`, `claims.rs`: other programs are kept off the data while rings run.
//! - `domain.rs`: a domain that is loaded, and what uses it; `environment.rs`: what it is told.
//! - `images.rs`: what the host has open for instances, through libraries.
//! - `keeping.rs`: what must outlive the process; `restore.rs`: another process goes on with it.
//!
//! Invariants: a request is completed by the instance that took it; the storage has one owner;
//! generations grow by one with every committed change; nothing of an instance is used after it was
//! retired.
//!
//! Deliberately absent: virtio, vhost-user, guest memory, files with modules in them
//! ([`domain_host::ModuleLoader`] finds those).

#![forbid(unsafe_code)]

mod canary;
mod change;
mod claim;
mod claims;
mod datapath;
mod device;
mod domain;
mod environment;
mod images;
mod keeping;
mod record;
mod restore;
mod services;
mod signal;

pub use canary::latency::Probe;
pub use claim::Claimed;
pub use claims::ClaimState;
pub use datapath::inflight::{TagScheme, slot_of};
pub use datapath::progress::{Ended, Gate};
pub use datapath::queue::{Footprint, Notifier, QueueStatus};
pub use datapath::worker::Worker;
pub use device::DomainProxy;
pub use keeping::{Keeper, Kept, KeptModule};
pub use record::canary::{CanaryReport, CanaryState, Trial};
pub use record::code::Code;
pub use record::history::Counts;
pub use record::report::{
    Change, Checked, DomainRecord, Entry, Event, Mode, Options, Outcome, Phases, Protocol, Refusal,
    Report, Resized, Starved, WhenBusy,
};
pub use record::status::{State, Status};
pub use record::wire::Blame;
pub use restore::{Restoring, Saved};
