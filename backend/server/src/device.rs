//! What the commands of the control socket do to the device.

use crate::json;
use crate::log_limit::{self, how_to_have_more};
use control::messages::{RollbackRequest, UpgradeMode, UpgradeRequest, WhenBusy};
use control::{OperationError, Operations};
use log::Level;
use proxy::{DomainProxy, Mode, Options, Refusal, Report};
use serde_json::Value;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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

fn answer(result: Result<Report, Refusal>) -> Result<Value, OperationError> {
    result.as_ref().map(json::report).map_err(|refusal| OperationError {
        code: refusal.code,
        message: refusal.message.clone(),
        data: json::blame(refusal),
    })
}

impl Operations for Device {
    fn status(&self) -> Value {
        json::status(&self.proxy.status(), self.connected.load(Ordering::Relaxed))
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
        self.proxy.history().iter().map(json::entry).collect()
    }

    fn next_event(&self, after: u64, timeout: Duration) -> Option<(u64, Value)> {
        self.proxy.next_event(after, timeout).map(|(number, event)| (number, json::event(&event)))
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
