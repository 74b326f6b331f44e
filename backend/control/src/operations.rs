//! What the methods do, as the server sees it.

use std::io;
use std::time::Duration;

use serde_json::Value;

use crate::code::Code;
use crate::messages::{DEVICE, LimitRequest, ResizeRequest, RollbackRequest, UpgradeRequest};

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

    /// Says whether [`upgrade`](Self::upgrade) would be accepted, and changes nothing.
    ///
    /// # Errors
    /// Why it would be refused.
    fn check(&self, request: UpgradeRequest) -> Result<Value, OperationError>;

    /// Goes back to the standby.
    ///
    /// # Errors
    /// Why it was refused or failed; the device then goes on as before.
    fn rollback(&self, request: RollbackRequest) -> Result<Value, OperationError>;

    /// Makes the disk larger.
    ///
    /// # Errors
    /// Why it was refused or failed; the device then goes on as before.
    fn resize(&self, request: ResizeRequest) -> Result<Value, OperationError>;

    /// Changes how much the guest may do in a second, and answers with what holds then.
    ///
    /// # Errors
    /// What is wrong with it; nothing is changed.
    fn limit(&self, request: LimitRequest) -> Result<Value, OperationError>;

    /// What has happened, oldest first.
    fn history(&self) -> Value;

    /// What has been counted: the page of metrics, and the same for programs.
    ///
    /// # Errors
    /// Nothing is counted.
    fn metrics(&self) -> Result<Value, OperationError> {
        Err(OperationError {
            code: Code::MetricsOff.as_str(),
            message: "this daemon does not count; start it with --metrics ADDRESS".to_owned(),
            data: None,
        })
    }

    /// Blocks until the next event after number `after`, or until `timeout` has passed.
    ///
    /// Numbers grow; the first event has number 1. Events that were dropped because they
    /// were not fetched in time are skipped: the watcher sees the gap in the numbers.
    fn next_event(&self, after: u64, timeout: Duration) -> Option<(u64, Value)>;

    /// The number of the latest event, 0 before the first: a `watch` begins after it.
    ///
    /// Left at 0, a `watch` begins with all events that are still kept.
    fn last_event(&self) -> u64 {
        0
    }

    /// The name of the device, which a request may say.
    fn device(&self) -> &str {
        DEVICE
    }

    /// A client could not be accepted, and has to wait. Called several times a second for as long
    /// as that is so.
    fn accept_failed(&self, error: &io::Error) {
        log::warn!("cannot accept a client on the control socket, which has to wait: {error}");
    }

    /// Asks the daemon to end, and returns at once. It must not wait for the
    /// [`Server`](crate::Server): the caller is one of its threads.
    fn shutdown(&self);
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
