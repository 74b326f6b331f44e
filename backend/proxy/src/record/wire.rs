//! The device's reports as JSON, in the shape that operators' programs rely on.
//!
//! Plain structures derive it where they are defined. What is told otherwise than it is kept stands
//! here: times in microseconds, a report's domains in brief, an entry with the members of what it
//! reports, an event named by what happened.

use crate::datapath::queue::QueueStatus;
use crate::record::canary::CanaryReport;
use crate::record::history::Counts;
use crate::record::report::{
    Checked, DomainRecord, Entry, Event, Outcome, Phases, Refusal, Report, Starved,
};
use crate::record::status::{State, Status};
use serde::{Serialize, Serializer};
use std::sync::Arc;
use std::time::SystemTime;

impl Serialize for State {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

/// How `status` shows the device; `features` and `connected` are the daemon's to add.
impl Serialize for Status {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shape<'a> {
            generation: u64,
            state: State,
            fault: &'a Option<String>,
            domain: &'a DomainRecord,
            standby: &'a Option<DomainRecord>,
            capacity: u64,
            queues: &'a [QueueStatus],
            upgrades: Counts,
            resident_modules: &'a [String],
            storage_failure: &'a Option<String>,
            counters: &'a std::collections::BTreeMap<String, u64>,
        }
        Shape {
            generation: self.generation,
            state: self.state,
            fault: &self.fault,
            domain: &self.domain,
            standby: &self.standby,
            capacity: self.domain.info.capacity,
            queues: &self.queues,
            upgrades: self.counts,
            resident_modules: &self.resident,
            storage_failure: &self.storage_failure,
            counters: &self.counters,
        }
        .serialize(to)
    }
}

/// A domain in a report: which code it is.
#[derive(Serialize)]
struct Brief<'a> {
    name: &'a str,
    version: &'a str,
    sha256: &'a str,
}

impl<'a> Brief<'a> {
    fn of(record: &'a Arc<DomainRecord>) -> Self {
        Self { name: &record.name, version: &record.version, sha256: &record.sha256 }
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shape<'a> {
            generation: u64,
            mode: &'static str,
            from: Brief<'a>,
            to: Brief<'a>,
            phases_us: &'a Phases,
            /// What a microsecond is too coarse for.
            pause_ns: u64,
        }
        Shape {
            generation: self.generation,
            mode: self.protocol.name(),
            from: Brief::of(&self.from),
            to: Brief::of(&self.to),
            phases_us: &self.phases,
            pause_ns: u64::try_from(self.phases.pause.as_nanos()).unwrap_or(u64::MAX),
        }
        .serialize(to)
    }
}

impl Serialize for Checked {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shape<'a> {
            accepted: bool,
            mode: &'static str,
            can_roll_back: bool,
            from: Brief<'a>,
            to: Brief<'a>,
            #[serde(skip_serializing_if = "Option::is_none")]
            left: &'a Option<String>,
            phases_us: &'a Phases,
        }
        Shape {
            accepted: true,
            mode: self.protocol.name(),
            can_roll_back: self.can_roll_back,
            from: Brief::of(&self.from),
            to: Brief::of(&self.to),
            left: &self.left,
            phases_us: &self.phases,
        }
        .serialize(to)
    }
}

/// The part of a refusal beside its code and sentence: for programs.
#[derive(Debug, Serialize)]
pub struct Blame<'a> {
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stuck: &'a [QueueStatus],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    starved: &'a [Starved],
}

impl Refusal {
    /// Which queues it is about, if it is about any.
    #[must_use]
    pub fn blame(&self) -> Option<Blame<'_>> {
        let blame = Blame { stuck: &self.stuck, starved: &self.starved };
        (!blame.stuck.is_empty() || !blame.starved.is_empty()).then_some(blame)
    }
}

impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Refused<'a> {
            code: &'a str,
            message: &'a str,
        }
        #[derive(Serialize)]
        struct Shape<'a> {
            time_ms: u64,
            change: &'static str,
            outcome: &'static str,
            #[serde(flatten)]
            report: Option<&'a Outcome>,
            #[serde(skip_serializing_if = "Option::is_none")]
            error: Option<Refused<'a>>,
        }
        let at = self.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let error = self.result.as_ref().err();
        Shape {
            time_ms: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
            change: self.change.name(),
            outcome: if self.result.is_ok() { "committed" } else { "refused" },
            report: self.result.as_ref().ok(),
            error: error
                .map(|refusal| Refused { code: refusal.code.as_str(), message: &refusal.message }),
        }
        .serialize(to)
    }
}

impl Serialize for Event {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(tag = "event", rename_all = "lowercase")]
        enum Shape<'a> {
            Started { change: &'static str, target: &'a str },
            Ended(&'a Entry),
            Faulted { generation: u64, reason: &'a str },
            Connected,
            Disconnected,
            Canary(&'a CanaryReport),
        }
        match self {
            Event::Started { change, target } => Shape::Started { change: change.name(), target },
            Event::Ended(entry) => Shape::Ended(entry),
            Event::Faulted { generation, reason } => {
                Shape::Faulted { generation: *generation, reason }
            }
            Event::Connected(true) => Shape::Connected,
            Event::Connected(false) => Shape::Disconnected,
            Event::Canary(report) => Shape::Canary(report),
        }
        .serialize(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::report::{Change, Protocol, Resized};
    use domain_abi::{Capabilities, DeviceInfo, Params, Swap};
    use serde_json::{Value, json};
    use std::time::Duration;

    fn as_json(value: &impl Serialize) -> Value {
        serde_json::to_value(value).unwrap()
    }

    fn record(version: &str) -> DomainRecord {
        DomainRecord {
            name: "ramdisk".into(),
            version: version.into(),
            schema_name: "ramdisk".into(),
            sha256: "ab".into(),
            build_id: Some("cd".into()),
            path: "/lib/x.so".into(),
            params: Params::from_pairs(["size=1M", "serial=s"]).unwrap(),
            info: DeviceInfo {
                capacity: 1 << 20,
                block_size: 512,
                physical_block_size: 512,
                optimal_io_size: 0,
                discard_granularity: 0,
                capabilities: Capabilities::default(),
                swap: Swap::No,
                backing_kind: String::new(),
                backing_id: (0, 0),
                backing_cache: 0,
                serial: String::new(),
            },
        }
    }

    fn report() -> Report {
        let us = Duration::from_micros;
        Report {
            generation: 2,
            protocol: Protocol::Handover,
            from: Arc::new(record("1.0.0")),
            to: Arc::new(record("2.0.0")),
            phases: Phases {
                verify: us(1),
                load: us(2),
                prepare: us(3),
                drain: us(4),
                quiesce: us(5),
                activate: us(6),
                pause: Duration::from_nanos(7_999),
                grace: us(8),
                retire: us(9),
            },
        }
    }

    fn reported() -> Value {
        json!({
            "generation": 2, "mode": "handover", "pause_ns": 7_999,
            "from": {"name": "ramdisk", "version": "1.0.0", "sha256": "ab"},
            "to": {"name": "ramdisk", "version": "2.0.0", "sha256": "ab"},
            "phases_us": {"verify": 1, "load": 2, "prepare": 3, "drain": 4, "quiesce": 5,
                          "activate": 6, "pause": 7, "grace": 8, "retire": 9},
        })
    }

    fn queue() -> QueueStatus {
        QueueStatus {
            index: 1,
            in_flight: 2,
            oldest_age: Duration::from_millis(3),
            requests: 4,
            errors: 5,
            malformed: 6,
            parks: 7,
            replayed: 8,
            cpu_wait: Duration::from_micros(9),
        }
    }

    fn with(mut value: Value, more: &Value) -> Value {
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        value
    }

    #[test]
    fn a_status_is_told_as_it_always_was() {
        let domain = |version: &str| {
            json!({"name": "ramdisk", "version": version, "sha256": "ab", "build_id": "cd",
                   "path": "/lib/x.so", "params": {"size": "1M", "serial": "s"}})
        };
        let mut status = Status {
            generation: 3,
            state: State::Serving,
            fault: None,
            domain: record("2.0.0"),
            standby: Some(record("1.0.0")),
            queues: vec![queue()],
            counts: Counts { committed: 1, refused: 2, rolled_back: 3, takeovers: 4 },
            resident: vec!["x: why".into()],
            storage_failure: None,
            counters: [("things".to_owned(), 5)].into(),
        };
        let told = json!({
            "generation": 3, "state": "serving", "fault": null, "domain": domain("2.0.0"),
            "standby": domain("1.0.0"), "capacity": 1 << 20,
            "queues": [{"index": 1, "in_flight": 2, "oldest_age_us": 3000, "requests": 4, "errors": 5,
                        "malformed": 6, "parks": 7, "replayed": 8, "cpu_wait_us": 9}],
            "upgrades": {"committed": 1, "refused": 2, "rolled_back": 3, "takeovers": 4},
            "resident_modules": ["x: why"], "storage_failure": null, "counters": {"things": 5},
        });
        assert_eq!(as_json(&status), told);
        status.standby = None;
        status.domain.build_id = None;
        status.fault = Some("it fell".into());
        status.storage_failure = Some("it is full".into());
        for (state, name) in [(State::Upgrading, "upgrading"), (State::Faulted, "faulted")] {
            status.state = state;
            let told = as_json(&status);
            assert_eq!(
                [&told["state"], &told["fault"], &told["storage_failure"], &told["standby"]],
                [&json!(name), &json!("it fell"), &json!("it is full"), &json!(null)]
            );
            assert_eq!(told["domain"]["build_id"], json!(null));
        }
    }

    #[test]
    fn a_report_is_told_as_it_always_was() {
        assert_eq!(as_json(&report()), reported());
        for (protocol, name) in [(Protocol::Swap, "swap"), (Protocol::Takeover, "takeover")] {
            assert_eq!(as_json(&Report { protocol, ..report() })["mode"], name);
        }
    }

    #[test]
    fn a_refusal_says_which_queues_it_is_about() {
        let mut refusal = refusal();
        assert!(refusal.blame().is_none());
        refusal.starved = vec![Starved {
            queue: 1,
            waited: Duration::from_millis(2),
            of: Duration::from_millis(3),
            is_blocked: true,
        }];
        let starved = json!({"starved": [{"queue": 1, "waited_us": 2000, "of_us": 3000}]});
        assert_eq!(as_json(&refusal.blame()), starved);
        refusal.stuck = vec![queue()];
        let both = with(json!({"stuck": [as_json(&queue())]}), &starved);
        assert_eq!(as_json(&refusal.blame()), both);
    }

    fn refusal() -> Refusal {
        Refusal::new(crate::Code::NoStandby, "there is none")
    }

    #[test]
    fn an_entry_has_the_members_of_what_it_reports() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(17);
        let done = Entry { at, change: Change::Upgrade, result: Ok(report().into()) };
        let told = json!({"time_ms": 17, "change": "upgrade", "outcome": "committed"});
        assert_eq!(as_json(&done), with(told, &reported()));
        let resized = Resized { generation: 2, before: 512, capacity: 1024 };
        let resized = Entry { at, change: Change::Resize, result: Ok(resized.into()) };
        assert_eq!(
            as_json(&resized),
            json!({"time_ms": 17, "change": "resize", "outcome": "committed", "generation": 2,
                   "capacity_before": 512, "capacity": 1024})
        );
        for (change, name) in [(Change::Rollback, "rollback"), (Change::Takeover, "takeover")] {
            let refused = Entry { at, change, result: Err(refusal()) };
            let told = json!({
                "time_ms": 17, "change": name, "outcome": "refused",
                "error": {"code": "no_standby", "message": "there is none"},
            });
            assert_eq!(as_json(&refused), told);
        }
    }

    #[test]
    fn an_event_is_named_by_what_happened() {
        let at = SystemTime::UNIX_EPOCH;
        let entry = Entry { at, change: Change::Upgrade, result: Ok(report().into()) };
        let ended = with(json!({"event": "ended"}), &as_json(&entry));
        let started = Event::Started { change: Change::Rollback, target: "x".into() };
        for (event, told) in [
            (started, json!({"event": "started", "change": "rollback", "target": "x"})),
            (Event::Ended(Box::new(entry)), ended),
            (
                Event::Faulted { generation: 4, reason: "it fell".into() },
                json!({"event": "faulted", "generation": 4, "reason": "it fell"}),
            ),
            (Event::Connected(true), json!({"event": "connected"})),
            (Event::Connected(false), json!({"event": "disconnected"})),
        ] {
            assert_eq!(as_json(&event), told);
        }
    }
}
