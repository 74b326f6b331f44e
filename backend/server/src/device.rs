//! What the commands of the control socket do to the device.

use crate::log_limit::{self, how_to_have_more};
use control::messages::{RollbackRequest, UpgradeMode, UpgradeRequest, WhenBusy};
use control::{OperationError, Operations};
use log::Level;
use proxy::{DomainProxy, Mode, Options, Refusal, Report, Status};
use serde::Serialize;
use serde_json::Value;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use virtio_blk::features;

/// The device as operators see it.
pub struct Device {
    proxy: Arc<DomainProxy>,
    connected: AtomicBool,
    stop: Box<dyn Fn() + Send + Sync>,
}

impl Device {
    /// A device on `proxy`; `stop` makes the daemon end, soon, and returns at once.
    pub fn new(proxy: Arc<DomainProxy>, stop: impl Fn() + Send + Sync + 'static) -> Self {
        Self { proxy, connected: AtomicBool::new(false), stop: Box::new(stop) }
    }

    /// Whether a frontend is connected: set by the session.
    pub const fn connected(&self) -> &AtomicBool {
        &self.connected
    }
}

fn options(
    mode: Mode,
    drain_timeout: Duration,
    starved_timeout: Duration,
    when_busy: WhenBusy,
) -> Options {
    let when_busy = match when_busy {
        WhenBusy::Queue => proxy::WhenBusy::Queue,
        WhenBusy::Refuse => proxy::WhenBusy::Refuse,
    };
    Options { mode, drain_timeout, starved_timeout, when_busy }
}

/// The device's reports are JSON of whatever they hold: strings, numbers and lists of those.
fn to_json(report: &impl Serialize) -> Value {
    serde_json::to_value(report).expect("a report has nothing that JSON cannot say")
}

fn answer(result: Result<Report, Refusal>) -> Result<Value, OperationError> {
    result.as_ref().map(to_json).map_err(|refusal| OperationError {
        code: refusal.code.as_str(),
        message: refusal.message.clone(),
        data: refusal.blame().as_ref().map(to_json),
    })
}

/// What `status` says: the device's state, and what only the daemon knows of it.
#[derive(Serialize)]
struct StatusReply<'a> {
    #[serde(flatten)]
    status: &'a Status,
    /// The virtio features that the guest is offered.
    features: String,
    connected: bool,
}

fn status_reply(status: &Status, connected: bool) -> Value {
    let features = format!("{:#x}", features::offered(&status.domain.info));
    to_json(&StatusReply { status, features, connected })
}

impl Operations for Device {
    fn status(&self) -> Value {
        status_reply(&self.proxy.status(), self.connected.load(Ordering::Relaxed))
    }

    fn upgrade(&self, request: UpgradeRequest) -> Result<Value, OperationError> {
        let mode = match request.mode {
            UpgradeMode::Auto => Mode::Auto,
            UpgradeMode::Swap => Mode::Swap,
            UpgradeMode::Handover => Mode::Handover,
        };
        let options =
            options(mode, request.drain_timeout, request.starved_timeout, request.when_busy);
        answer(self.proxy.upgrade(&request.name, request.params, options))
    }

    fn rollback(&self, request: RollbackRequest) -> Result<Value, OperationError> {
        let RollbackRequest { drain_timeout, starved_timeout, when_busy } = request;
        answer(self.proxy.rollback(options(Mode::Auto, drain_timeout, starved_timeout, when_busy)))
    }

    fn history(&self) -> Value {
        to_json(&self.proxy.history())
    }

    fn next_event(&self, after: u64, timeout: Duration) -> Option<(u64, Value)> {
        self.proxy.next_event(after, timeout).map(|(number, event)| (number, to_json(&event)))
    }

    fn last_event(&self) -> u64 {
        self.proxy.last_event()
    }

    fn accept_failed(&self, error: &io::Error) {
        log_limit::say(
            Level::Warn,
            "control client",
            format_args!(
                "cannot accept a client on the control socket, which has to wait: {}",
                how_to_have_more(error)
            ),
        );
    }

    fn shutdown(&self) {
        (self.stop)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_abi::{Capabilities, DeviceInfo, Params, Swap};
    use proxy::{Counts, DomainRecord, State};

    #[test]
    fn a_status_has_the_devices_members_and_the_daemons() {
        let info = DeviceInfo {
            capacity: 512,
            block_size: 512,
            physical_block_size: 512,
            optimal_io_size: 0,
            discard_granularity: 0,
            capabilities: Capabilities::FLUSH,
            swap: Swap::No,
            backing_kind: String::new(),
            backing_id: (0, 0),
            backing_cache: 0,
            serial: String::new(),
        };
        let domain = DomainRecord {
            name: "a".into(),
            version: "1".into(),
            schema_name: "a".into(),
            sha256: String::new(),
            build_id: None,
            path: String::new(),
            params: Params::default(),
            info,
        };
        let status = Status {
            generation: 1,
            state: State::Serving,
            fault: None,
            domain,
            standby: None,
            queues: Vec::new(),
            counts: Counts::default(),
            resident: Vec::new(),
            storage_failure: None,
            counters: std::collections::BTreeMap::new(),
        };
        let mut told = status_reply(&status, true);
        assert_eq!(told["connected"], true);
        assert_eq!(told["features"], format!("{:#x}", features::offered(&status.domain.info)));
        let members = told.as_object_mut().unwrap();
        members.remove("connected");
        members.remove("features");
        assert_eq!(told, serde_json::to_value(&status).unwrap());
    }
}
