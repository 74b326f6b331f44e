//! What the device says, as JSON: one function per thing, so that the fixed names stand in one
//! place.

use proxy::{DomainRecord, Entry, Event, Phases, QueueStatus, Refusal, Report, Starved, Status};
use serde_json::{Map, Value, json};
use std::time::{Duration, SystemTime};
use virtio_blk::features;

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn params(record: &DomainRecord) -> Value {
    Value::Object(
        record
            .params
            .iter()
            .map(|(key, value)| (key.to_owned(), json!(value)))
            .collect::<Map<_, _>>(),
    )
}

fn domain(record: &DomainRecord) -> Value {
    json!({
        "name": record.name,
        "version": record.version,
        "sha256": record.sha256,
        "build_id": record.build_id,
        "path": record.path,
        "params": params(record),
    })
}

fn brief(record: &DomainRecord) -> Value {
    json!({ "name": record.name, "version": record.version, "sha256": record.sha256 })
}

fn queue(status: &QueueStatus) -> Value {
    json!({
        "index": status.index,
        "in_flight": status.in_flight,
        "oldest_age_us": micros(status.oldest_age),
        "requests": status.requests,
        "errors": status.errors,
        "malformed": status.malformed,
        "parks": status.parks,
        "replayed": status.replayed,
        "cpu_wait_us": micros(status.cpu_wait),
    })
}

pub(crate) fn status(status: &Status, connected: bool) -> Value {
    json!({
        "generation": status.generation,
        "state": status.state.name(),
        "fault": status.fault,
        "domain": domain(&status.domain),
        "standby": status.standby.as_ref().map(domain),
        "features": format!("{:#x}", features::offered(&status.domain.info)),
        "capacity": status.domain.info.capacity,
        "queues": status.queues.iter().map(queue).collect::<Vec<_>>(),
        "upgrades": {
            "committed": status.counts.committed,
            "refused": status.counts.refused,
            "rolled_back": status.counts.rolled_back,
            "takeovers": status.counts.takeovers,
        },
        "resident_modules": status.resident,
        "storage_failure": status.storage_failure,
        "counters": status.counters,
        "connected": connected,
    })
}

/// In microseconds. Whole ones: what took less than one says 0, and so does what did not happen.
fn phases(phases: &Phases) -> Value {
    json!({
        "verify": micros(phases.verify),
        "load": micros(phases.load),
        "prepare": micros(phases.prepare),
        "drain": micros(phases.drain),
        "quiesce": micros(phases.quiesce),
        "activate": micros(phases.activate),
        "pause": micros(phases.pause),
        "grace": micros(phases.grace),
        "retire": micros(phases.retire),
    })
}

pub(crate) fn report(report: &Report) -> Value {
    json!({
        "generation": report.generation,
        "mode": report.protocol.name(),
        "from": brief(&report.from),
        "to": brief(&report.to),
        "phases_us": phases(&report.phases),
        // What a microsecond is too coarse for.
        "pause_ns": u64::try_from(report.phases.pause.as_nanos()).unwrap_or(u64::MAX),
    })
}

/// The part of a refusal beside its code and sentence.
pub(crate) fn blame(refusal: &Refusal) -> Option<Value> {
    let stuck: Vec<_> = refusal.stuck.iter().map(queue).collect();
    let starved: Vec<_> = refusal.starved.iter().map(starved).collect();
    let parts =
        [("stuck", stuck), ("starved", starved)].into_iter().filter(|(_, list)| !list.is_empty());
    let parts: Map<_, _> =
        parts.map(|(name, list)| (name.to_owned(), Value::Array(list))).collect();
    (!parts.is_empty()).then_some(Value::Object(parts))
}

fn starved(starved: &Starved) -> Value {
    json!({
        "queue": starved.queue,
        "waited_us": micros(starved.waited),
        "of_us": micros(starved.of),
    })
}

pub(crate) fn entry(entry: &Entry) -> Value {
    let at = entry.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut value = json!({
        "time_ms": u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
        "change": entry.change.name(),
        "outcome": if entry.result.is_ok() { "committed" } else { "refused" },
    });
    match &entry.result {
        Ok(done) => merge(&mut value, report(done)),
        Err(refusal) => {
            merge(
                &mut value,
                json!({ "error": { "code": refusal.code, "message": refusal.message } }),
            );
        }
    }
    value
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

pub(crate) fn event(event: &Event) -> Value {
    match event {
        Event::Started { change, target } => {
            json!({ "event": "started", "change": change.name(), "target": target })
        }
        Event::Ended(ended) => {
            let mut value = json!({ "event": "ended" });
            merge(&mut value, entry(ended));
            value
        }
        Event::Faulted { generation, reason } => {
            json!({ "event": "faulted", "generation": generation, "reason": reason })
        }
        Event::Connected(true) => json!({ "event": "connected" }),
        Event::Connected(false) => json!({ "event": "disconnected" }),
    }
}
