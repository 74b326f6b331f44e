//! The page that Prometheus reads.
//!
//! A name is registered without what the encoder adds to it: `_total` of a counter, the unit,
//! `_info`. Labels come by family, so that each name is described once however many queues there
//! are.

use crate::buckets::{FOLD, end};
use crate::counts::{OperationCounts, QueueCounts};
use crate::tally::{ENDS, Tally, Times};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet, prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;

/// How the page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Prometheus's own text, which all of its versions read.
    #[default]
    Plain,
    /// OpenMetrics.
    OpenMetrics,
}

impl Format {
    /// The one that a client asks for in its `Accept` header.
    #[must_use]
    pub fn accepted(accept: &str) -> Self {
        let is_asked_for = accept.split(',').any(|media| {
            media
                .split(';')
                .next()
                .is_some_and(|kind| kind.trim() == "application/openmetrics-text")
        });
        if is_asked_for { Self::OpenMetrics } else { Self::Plain }
    }

    /// What the page says that it is.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Plain => prometheus_text::CONTENT_TYPE,
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// What a program or a module is, as labels.
pub type Labels = Vec<(&'static str, String)>;

/// Everything that the page shows.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Counters of requests.
    pub queues: Vec<QueueCounts>,
    /// Counters of changes.
    pub tally: Tally,
    /// What the device is doing, of the [`STATES`].
    pub state: String,
    /// The live generation.
    pub generation: Option<u64>,
    /// Bytes on the disk.
    pub capacity: Option<u64>,
    /// Whether a frontend is connected.
    pub is_connected: bool,
    /// Modules that are mapped though nothing needs them.
    pub resident_modules: u64,
    /// How many servers have died.
    pub deaths: u64,
    /// Requests that ended with an error because they have killed servers.
    pub quarantined: u64,
    /// Requests that the guest may send in a second.
    pub iops: Option<u64>,
    /// Bytes of them.
    pub bandwidth: Option<u64>,
    /// How often a queue had to wait for such a limit, if there is one.
    pub held_up: Option<u64>,
    /// When the processes began, in milliseconds since 1970.
    pub since_ms: Vec<(&'static str, u64)>,
    /// The program.
    pub build: Labels,
    /// The live module.
    pub domain: Labels,
}

/// A counter of an operation: its name, what it is, its unit, and where it is.
type Described = (&'static str, &'static str, Option<Unit>, fn(&OperationCounts) -> u64);

/// What a device may be doing.
pub const STATES: [&str; 4] = ["serving", "upgrading", "recovering", "faulted"];

const NO_LABELS: [(&str, &str); 0] = [];

impl Snapshot {
    /// The page.
    #[must_use]
    pub fn page(self, format: Format) -> String {
        let mut registry = Registry::with_prefix("vhost_hotswap");
        registry.register_collector(Box::new(self));
        let mut page = String::new();
        let written = match format {
            Format::Plain => prometheus_text::encode(&mut page, &registry),
            Format::OpenMetrics => text::encode(&mut page, &registry),
        };
        written.expect("a string takes everything");
        page
    }

    fn requests(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let each = || {
            let queues = self.queues.iter().enumerate();
            queues.flat_map(|(queue, of)| of.operations.iter().map(move |of| (queue, of)))
        };
        let labels = |queue: usize, of: &OperationCounts| {
            [("queue", queue.to_string()), ("operation", of.operation.name().to_owned())]
        };
        let counters: [Described; 3] = [
            ("requests", "Requests that were answered", None, OperationCounts::requests),
            ("request", "Bytes of the requests that were answered", Some(Unit::Bytes), |of| {
                of.bytes
            }),
            ("errors", "Requests that were answered with an error", None, |of| of.errors),
        ];
        for (name, help, unit, value) in &counters {
            let mut family =
                encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for (queue, of) in each() {
                counter(&mut family, &labels(queue, of), value(of))?;
            }
        }
        let help = "How long requests took, from when they were taken out of the ring until their \
                    answers were in it";
        let mut family = encoder.encode_descriptor(
            "request_duration",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (queue, of) in each().filter(|(_, of)| of.requests() > 0) {
            let (sum, folded) = (seconds(of.sum_ns), fold(&of.buckets));
            histogram(&mut family, &labels(queue, of), sum, of.requests(), &folded)?;
        }
        let help = "Requests that were taken out of the ring and are not answered";
        let mut family = encoder.encode_descriptor("in_flight", help, None, MetricType::Gauge)?;
        for (queue, of) in self.queues.iter().enumerate() {
            let labels = [("queue", queue.to_string())];
            family.encode_family(&labels)?.encode_gauge(&of.in_flight)?;
        }
        Ok(())
    }

    fn changes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Upgrades, rollbacks, takeovers, new sizes, exchanges of the program and \
                    recoveries after a death, by how they ended";
        let mut family = encoder.encode_descriptor("changes", help, None, MetricType::Counter)?;
        for (change, results) in self.tally.all_results() {
            for (result, count) in results {
                let labels = [("change", change.as_str()), ("result", result.as_str())];
                counter(&mut family, &labels, count)?;
            }
        }
        let help = "How long the phases of committed changes took";
        let unit = Some(&Unit::Seconds);
        let mut family =
            encoder.encode_descriptor("change_phase", help, unit, MetricType::Histogram)?;
        for (change, phases) in &self.tally.phases {
            for (phase, times) in phases {
                let labels = [("change", change.as_str()), ("phase", phase.as_str())];
                times_histogram(&mut family, &labels, times)?;
            }
        }
        let help = "How long committed changes have held requests up";
        let mut family = encoder.encode_descriptor("pause", help, unit, MetricType::Histogram)?;
        for (change, times) in &self.tally.pauses {
            times_histogram(&mut family, &[("change", change.as_str())], times)?;
        }
        for (name, help, value) in [
            ("server_deaths", "Processes that served and have died", self.deaths),
            (
                "quarantined_requests",
                "Requests that ended with an error because they have ended servers",
                self.quarantined,
            ),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            counter(&mut family, &NO_LABELS, value)?;
        }
        let help = "Trials of new generations, by how they ended";
        let mut family = encoder.encode_descriptor("canaries", help, None, MetricType::Counter)?;
        for (verdict, count) in self.tally.all_canaries() {
            counter(&mut family, &[("verdict", verdict.as_str())], count)?;
        }
        Ok(())
    }

    fn limits(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, value) in [
            ("limit_requests_per_second", "Requests that the guest may send", self.iops),
            ("limit_bytes_per_second", "Bytes that the guest may move", self.bandwidth),
        ] {
            let Some(value) = value else { continue };
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            family.encode_gauge(&value)?;
        }
        let Some(held_up) = self.held_up else { return Ok(()) };
        let help = "How often a queue had to wait for a limit";
        let mut family = encoder.encode_descriptor("held_up", help, None, MetricType::Counter)?;
        counter(&mut family, &NO_LABELS, held_up)
    }

    fn device(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "What the device is doing: 1 for that, 0 for the rest";
        let mut family = encoder.encode_descriptor("state", help, None, MetricType::Gauge)?;
        for state in STATES {
            let is_it = u64::from(self.state == state);
            family.encode_family(&[("state", state)])?.encode_gauge(&is_it)?;
        }
        let known = |name, help, unit, value: Option<u64>| value.map(|it| (name, help, unit, it));
        let gauges = [
            known("generation", "The live domain's number", None, self.generation),
            known("capacity", "The size of the disk", Some(Unit::Bytes), self.capacity),
            known("connected", "A frontend is connected", None, Some(self.is_connected.into())),
            known(
                "resident_modules",
                "Modules that are mapped though nothing needs them",
                None,
                Some(self.resident_modules),
            ),
        ];
        for (name, help, unit, value) in gauges.into_iter().flatten() {
            let mut family =
                encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            family.encode_gauge(&value)?;
        }
        let help = "When the process began, since 1970";
        let unit = Some(&Unit::Seconds);
        let mut family = encoder.encode_descriptor("start_time", help, unit, MetricType::Gauge)?;
        for (process, ms) in self.since_ms.iter().filter(|(_, ms)| *ms > 0) {
            let since = *ms as f64 / 1e3;
            family.encode_family(&[("process", *process)])?.encode_gauge(&since)?;
        }
        for (name, help, labels) in
            [("build", "The program", &self.build), ("domain", "The live domain", &self.domain)]
        {
            // Of nothing that is known yet there is nothing to say.
            if labels.iter().any(|(_, text)| !text.is_empty()) {
                let mut family = encoder.encode_descriptor(name, help, None, MetricType::Info)?;
                family.encode_info(labels)?;
            }
        }
        Ok(())
    }
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.requests(&mut encoder)?;
        self.changes(&mut encoder)?;
        self.limits(&mut encoder)?;
        self.device(&mut encoder)
    }
}

fn counter(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    value: u64,
) -> fmt::Result {
    family.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn histogram(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    sum: f64,
    count: u64,
    buckets: &[(f64, u64)],
) -> fmt::Result {
    family.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, buckets, None)
}

fn times_histogram(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    times: &Times,
) -> fmt::Result {
    let ends = ENDS.iter().zip(times.buckets).map(|(end, count)| (seconds(*end), count));
    let mut buckets: Vec<_> = ends.collect();
    let within: u64 = times.buckets.iter().sum();
    buckets.push((f64::INFINITY, times.count - within));
    histogram(family, labels, seconds(times.sum_ns), times.count, &buckets)
}

/// The buckets that the page shows, each with its end in seconds and its own count.
fn fold(buckets: &[u64]) -> Vec<(f64, u64)> {
    let mut folded = Vec::new();
    let mut count = 0;
    for (at, more) in buckets.iter().enumerate() {
        count += more;
        match end(at) {
            Some(end) if at.is_multiple_of(FOLD) => {
                folded.push((seconds(end), count));
                count = 0;
            }
            Some(_) => {}
            None => folded.push((f64::INFINITY, count)),
        }
    }
    folded
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buckets::BUCKETS;
    use crate::counters::Operation;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn snapshot() -> Snapshot {
        let operation = |operation| {
            let mut buckets = vec![0; BUCKETS];
            (buckets[0], buckets[BUCKETS - 1]) = (3, 1);
            OperationCounts { operation, bytes: 1, errors: 2, sum_ns: 4, buckets }
        };
        let queue = || QueueCounts {
            in_flight: 1,
            operations: Operation::ALL.into_iter().map(operation).collect(),
        };
        let mut tally = Tally::default();
        tally.note(&json!({
            "event": "ended", "change": "upgrade", "outcome": "committed",
            "phases_us": {"verify": 1, "load": u64::MAX, "pause": 2},
        }));
        tally.note(&json!({"event": "canary", "state": "kept"}));
        Snapshot {
            queues: vec![queue(), queue()],
            tally,
            state: "serving".to_owned(),
            generation: Some(2),
            capacity: Some(512),
            iops: Some(7),
            bandwidth: Some(8),
            held_up: Some(9),
            since_ms: vec![("server", 1_500)],
            build: vec![("version", "a \"b\"\n".to_owned())],
            domain: vec![("name", "x".to_owned())],
            ..Snapshot::default()
        }
    }

    #[test]
    fn each_name_is_described_once_and_each_series_comes_once() {
        for format in [Format::Plain, Format::OpenMetrics] {
            let page = snapshot().page(format);
            let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
            for line in page.lines() {
                // What describes a name, with the name and without the text.
                let described = line.match_indices(' ').nth(2).map(|(at, _)| &line[..at]);
                let series = line.rsplit_once(' ').map_or(line, |(series, _)| series);
                let key = described.filter(|_| line.starts_with('#')).unwrap_or(series);
                *seen.entry(key).or_default() += 1;
            }
            let twice: Vec<_> = seen.iter().filter(|(_, times)| **times > 1).collect();
            assert!(twice.is_empty(), "{twice:?}\n{page}");
            for doubled in ["_total_total", "_bytes_bytes", "_seconds_seconds", "_info_info"] {
                assert!(!page.contains(doubled), "{page}");
            }
            assert_eq!(page.ends_with("# EOF\n"), format == Format::OpenMetrics);
        }
    }

    #[test]
    fn a_histogram_ends_with_all_that_there_are() {
        let page = snapshot().page(Format::Plain);
        let labels = "queue=\"1\",operation=\"read\"";
        let name = format!("vhost_hotswap_request_duration_seconds_bucket{{{labels},le=");
        let ends: Vec<_> = page.lines().filter(|line| line.starts_with(&name)).collect();
        assert!(ends[0].ends_with("le=\"1.024e-06\"} 3"), "{ends:?}");
        assert!(ends.last().unwrap().ends_with("le=\"+Inf\"} 4"), "{ends:?}");
        assert_eq!(ends.len(), 50);
        assert!(!page.contains("e+308"), "{page}");
        assert!(page.contains("\nvhost_hotswap_server_deaths_total 0\n"), "{page}");
    }

    #[test]
    fn limits_are_shown_as_far_as_there_are_any() {
        let page = snapshot().page(Format::Plain);
        for line in [
            "vhost_hotswap_limit_requests_per_second 7",
            "vhost_hotswap_limit_bytes_per_second 8",
            "vhost_hotswap_held_up_total 9",
            "vhost_hotswap_canaries_total{verdict=\"kept\"} 1",
        ] {
            assert!(page.contains(&format!("\n{line}\n")), "{page}");
        }
        let unlimited = Snapshot { iops: None, bandwidth: None, held_up: None, ..snapshot() };
        let page = unlimited.page(Format::Plain);
        assert!(!page.contains("limit_") && !page.contains("held_up"), "{page}");
    }

    #[test]
    fn openmetrics_is_for_those_who_ask() {
        for (accept, format) in [
            ("", Format::Plain),
            ("*/*", Format::Plain),
            ("text/plain, application/openmetrics-text; version=1.0.0", Format::OpenMetrics),
        ] {
            assert_eq!(Format::accepted(accept), format);
        }
    }
}
