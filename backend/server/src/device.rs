//! What the commands of the control socket do to the device.

use crate::limiter::Limiter;
use crate::log_limit::{self, how_to_have_more};
use crate::sandbox::Enforced;
use control::messages::{
    CanaryRequest, LimitRequest, ResizeRequest, RollbackRequest, UpgradeMode, UpgradeRequest,
    WhenBusy,
};
use control::{Code, OperationError, Operations};
use domain_abi::Params;
use log::Level;
use proxy::{
    CanaryReport, CanaryState, ClaimState, DomainProxy, Mode, Options, Refusal, Report, Status,
    Trial,
};
use serde::Serialize;
use serde_json::{Value, json};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use virtio_blk::features;

/// The device as operators see it.
pub struct Device {
    proxy: Arc<DomainProxy>,
    limiter: Arc<Limiter>,
    connected: AtomicBool,
    stop: Box<dyn Fn() + Send + Sync>,
    sandbox: Enforced,
}

impl Device {
    /// A device on `proxy` under the limits of `limiter`; `stop` makes the daemon end, soon, and
    /// returns at once.
    pub fn new(
        proxy: Arc<DomainProxy>,
        limiter: Arc<Limiter>,
        stop: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let (connected, stop) = (AtomicBool::new(false), Box::new(stop));
        Self { proxy, limiter, connected, stop, sandbox: Enforced::NOTHING }
    }

    /// The same, in a process that is confined.
    #[must_use]
    pub fn confined(self, sandbox: Enforced) -> Self {
        Self { sandbox, ..self }
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
    Options { mode, drain_timeout, starved_timeout, when_busy: busy(when_busy) }
}

/// What is to be loaded, with what parameters, and how.
fn change(request: UpgradeRequest) -> (String, Params, Options) {
    let mode = match request.mode {
        UpgradeMode::Auto => Mode::Auto,
        UpgradeMode::Swap => Mode::Swap,
        UpgradeMode::Handover => Mode::Handover,
    };
    let UpgradeRequest { drain_timeout, starved_timeout, when_busy, .. } = request;
    let options = options(mode, drain_timeout, starved_timeout, when_busy);
    (request.name, request.params, options)
}

const fn trial(canary: CanaryRequest) -> Trial {
    let CanaryRequest { time, max_errors, max_latency_ratio } = canary;
    Trial { time, max_errors, max_latency_ratio }
}

/// What came of a trial: a refusal, unless it was kept.
fn tried(report: &Report, canary: &CanaryReport) -> Result<Value, OperationError> {
    let mut reply = to_json(report);
    reply["canary"] = to_json(canary);
    let code = match canary.state {
        CanaryState::TakenBack => proxy::Code::TakenBack,
        CanaryState::Stuck | CanaryState::Faulted => proxy::Code::NotTakenBack,
        _ => return Ok(reply),
    };
    let why = canary.why.as_deref().unwrap_or("it did not stand its trial");
    let message = match canary.state {
        CanaryState::Stuck => format!("generation {} serves on: {why}", report.generation),
        CanaryState::Faulted => format!(
            "generation {} was on trial, and nothing serves: {why}; upgrade to bring the device back",
            report.generation
        ),
        _ => format!(
            "generation {} was taken back, `{}` {} serves again: {why}",
            report.generation, report.from.name, report.from.version
        ),
    };
    Err(OperationError { code: code.as_str(), message, data: Some(reply) })
}

const fn busy(when_busy: WhenBusy) -> proxy::WhenBusy {
    match when_busy {
        WhenBusy::Queue => proxy::WhenBusy::Queue,
        WhenBusy::Refuse => proxy::WhenBusy::Refuse,
    }
}

/// The device's reports are JSON of whatever they hold: strings, numbers and lists of those.
fn to_json(report: &impl Serialize) -> Value {
    serde_json::to_value(report).expect("a report has nothing that JSON cannot say")
}

fn answer(result: Result<impl Serialize, Refusal>) -> Result<Value, OperationError> {
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
    /// Whose the disk's data is.
    claim: ClaimState,
    /// What the guest may do in a second.
    limits: Value,
    /// The generation on trial, or the last one that was.
    canary: Option<CanaryReport>,
    /// How the process is confined.
    sandbox: Enforced,
}

/// What is not in the device's own state.
struct Beside {
    connected: bool,
    claim: ClaimState,
    limits: Value,
    canary: Option<CanaryReport>,
    sandbox: Enforced,
}

fn status_reply(status: &Status, beside: Beside) -> Value {
    let Beside { connected, claim, limits, canary, sandbox } = beside;
    let features = format!("{:#x}", features::offered(&status.domain.info));
    to_json(&StatusReply { status, features, connected, claim, limits, canary, sandbox })
}

impl Operations for Device {
    fn status(&self) -> Value {
        let connected = self.connected.load(Ordering::Relaxed);
        let (claim, limits) = (self.proxy.claim_state(), self.limiter.report());
        let (canary, sandbox) = (self.proxy.canary(), self.sandbox.now());
        status_reply(&self.proxy.status(), Beside { connected, claim, limits, canary, sandbox })
    }

    fn upgrade(&self, request: UpgradeRequest) -> Result<Value, OperationError> {
        let trial = request.canary.map(trial);
        let (name, params, options) = change(request);
        let Some(trial) = trial else {
            return answer(self.proxy.upgrade(&name, params, options));
        };
        match self.proxy.upgrade_on_trial(&name, params, options, trial) {
            Ok((report, canary)) => tried(&report, &canary),
            Err(refusal) => answer(Err::<(), _>(refusal)),
        }
    }

    fn rollback(&self, request: RollbackRequest) -> Result<Value, OperationError> {
        let RollbackRequest { drain_timeout, starved_timeout, when_busy } = request;
        answer(self.proxy.rollback(options(Mode::Auto, drain_timeout, starved_timeout, when_busy)))
    }

    fn resize(&self, request: ResizeRequest) -> Result<Value, OperationError> {
        let options = Options { when_busy: busy(request.when_busy), ..Options::default() };
        answer(self.proxy.resize(request.size, options))
    }

    fn check(&self, request: UpgradeRequest) -> Result<Value, OperationError> {
        let (name, params, options) = change(request);
        answer(self.proxy.check(&name, params, options))
    }

    fn limit(&self, request: LimitRequest) -> Result<Value, OperationError> {
        let is_changed = self.limiter.change(&request).map_err(|message| OperationError {
            code: Code::BadLimit.as_str(),
            message,
            data: None,
        })?;
        if is_changed {
            // Those that wait for a token, and may not have to any more.
            self.proxy.wake_workers();
        }
        Ok(json!({"limits": self.limiter.report()}))
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
    use crate::testing::{Puppets, Silent};
    use domain_abi::{Capabilities, DeviceInfo, Swap};
    use proxy::{Counts, DomainRecord, State};
    use std::sync::atomic::AtomicU64;

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
        let (claim, limits) = (ClaimState::Claimed, json!({"iops": 7}));
        let sandbox = Enforced::NOTHING;
        let beside = Beside { connected: true, claim, limits, canary: None, sandbox };
        let mut told = status_reply(&status, beside);
        assert_eq!((&told["connected"], &told["claim"]), (&true.into(), &"claimed".into()));
        assert_eq!(told["features"], format!("{:#x}", features::offered(&status.domain.info)));
        let members = told.as_object_mut().unwrap();
        members.remove("connected");
        members.remove("claim");
        assert_eq!(members.remove("canary"), Some(Value::Null));
        assert_eq!(members.remove("sandbox").unwrap()["mode"], "off");
        assert_eq!(members.remove("limits"), Some(json!({"iops": 7})));
        members.remove("features");
        assert_eq!(told, serde_json::to_value(&status).unwrap());
    }

    /// A device of puppets, and how often its end was asked for.
    fn device(puppets: &Puppets) -> (Device, Arc<AtomicU64>) {
        let stops = Arc::<AtomicU64>::default();
        let count = Arc::clone(&stops);
        let stop = move || _ = count.fetch_add(1, Ordering::Relaxed);
        (Device::new(Arc::clone(&puppets.proxy), Arc::default(), stop), stops)
    }

    fn upgrade(puppets: &Puppets, name: &str, script: &[&str]) -> UpgradeRequest {
        UpgradeRequest {
            name: name.into(),
            params: puppets.stage.params("b", script),
            mode: UpgradeMode::Auto,
            drain_timeout: Duration::from_millis(20),
            starved_timeout: Duration::ZERO,
            when_busy: WhenBusy::Queue,
            canary: None,
        }
    }

    const ROLLBACK: RollbackRequest = RollbackRequest {
        drain_timeout: Duration::from_millis(20),
        starved_timeout: Duration::ZERO,
        when_busy: WhenBusy::Queue,
    };

    #[test]
    fn an_upgrade_and_a_rollback_answer_with_reports_and_are_remembered() {
        let puppets = Puppets::start(1, &[]);
        let (device, _) = device(&puppets);
        assert_eq!(device.status()["generation"], 1);
        let before = device.last_event();
        let label = || device.status()["domain"]["params"]["label"].clone();
        let report = device.upgrade(upgrade(&puppets, "plain", &[])).unwrap();
        assert_eq!((&report["generation"], label()), (&2.into(), "b".into()));
        let report = device.rollback(ROLLBACK).unwrap();
        assert_eq!((&report["generation"], label()), (&3.into(), "a".into()));
        assert_eq!(device.history().as_array().map(Vec::len), Some(2));
        let (number, _) = device.next_event(before, Duration::ZERO).unwrap();
        assert_eq!(number, before + 1);
        assert_eq!(device.next_event(device.last_event(), Duration::ZERO), None);
    }

    #[test]
    fn a_new_size_is_answered_with_both_and_shows() {
        let puppets = Puppets::start(1, &[]);
        let (device, _) = device(&puppets);
        let resize = |size| device.resize(ResizeRequest { size, when_busy: WhenBusy::Queue });
        let told =
            serde_json::json!({"generation": 1, "capacity_before": 1 << 20, "capacity": 2 << 20});
        assert_eq!(resize(2 << 20), Ok(told));
        assert_eq!(device.status()["capacity"], 2 << 20);
        assert_eq!(resize(1 << 20).unwrap_err().code, "resize_shrinks");
    }

    #[test]
    fn each_mode_is_the_one_that_was_asked_for() {
        let puppets = Puppets::start(1, &["swap=true"]);
        let (device, _) = device(&puppets);
        for (mode, protocol) in [
            (UpgradeMode::Handover, "handover"),
            (UpgradeMode::Swap, "swap"),
            (UpgradeMode::Auto, "swap"),
        ] {
            let request = UpgradeRequest { mode, ..upgrade(&puppets, "plain", &["swap=true"]) };
            let report = device.upgrade(request).unwrap();
            assert_eq!(report["mode"], protocol, "{mode:?}");
        }
    }

    #[test]
    fn a_refusal_has_its_code_and_its_blame_and_changes_nothing() {
        let puppets = Puppets::start(1, &["hold=true"]);
        let (device, _) = device(&puppets);
        let error = device.upgrade(upgrade(&puppets, "nowhere", &[])).unwrap_err();
        assert_eq!(error.code, "module_not_found");
        let error = device.upgrade(upgrade(&puppets, "plain", &["fail=prepare"])).unwrap_err();
        assert_eq!(error.code, "prepare_failed");
        assert!(error.message.contains("fail=prepare"), "{error}");
        assert_eq!(device.rollback(ROLLBACK).unwrap_err().code, "no_standby");
        // A request that does not end is told of with its queue.
        let mut worker = puppets.proxy.worker(0, 4, Box::new(Silent)).unwrap();
        let mut requests = [domain_abi::RawRequest::flush()];
        worker.tags().name(&mut requests[0], 0);
        assert_eq!(worker.submit(&mut requests, |_| {}), 1);
        while !worker.sleep() {}
        let error = std::thread::scope(|scope| {
            let upgrade = || device.upgrade(upgrade(&puppets, "plain", &[]));
            scope.spawn(upgrade).join().unwrap().unwrap_err()
        });
        assert_eq!(error.code, "drain_timeout");
        assert!(error.data.is_some(), "{error:?}");
        puppets.stage.release.store(true, Ordering::Release);
        worker.reap(|_| {});
        assert_eq!(device.status()["generation"], 1);
    }

    #[test]
    fn a_shutdown_asks_for_the_end_and_a_frontend_shows() {
        let puppets = Puppets::start(1, &[]);
        let (device, stops) = device(&puppets);
        device.shutdown();
        assert_eq!(stops.load(Ordering::Relaxed), 1);
        assert_eq!(device.status()["connected"], false);
        device.connected().store(true, Ordering::Relaxed);
        assert_eq!(device.status()["connected"], true);
    }
}
