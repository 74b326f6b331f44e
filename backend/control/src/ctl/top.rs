//! `top`: how the device is doing, again and again.
//!
//! A sample is what the daemon says at a moment: `status`, `history`, and `metrics` if it counts. A
//! view is made of two of them, as JSON; what the screen shows is that view, and `--json` prints
//! it. So nothing is on the screen that a program could not have.

mod screen;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use control::client::{Client, Failure};
use serde_json::{Map, Value, json};

use super::{ANSWER_TIMEOUT, Stop};

pub use screen::run;

/// Where the daemon's buckets end.
const LONGEST_NS: u64 = 1 << 34;
/// How many of the last changes a view has.
const CHANGES: usize = 10;

/// What the daemon says at a moment.
pub struct Sample {
    at: Instant,
    status: Value,
    /// None of a daemon that does not count.
    metrics: Option<Value>,
    history: Value,
}

/// Where samples come from.
pub struct Source<'a> {
    path: &'a Path,
    client: Option<Client>,
    counts: bool,
}

impl<'a> Source<'a> {
    pub const fn new(path: &'a Path) -> Self {
        Self { path, client: None, counts: true }
    }

    /// Asks the daemon. After a failure it is connected to anew.
    pub fn sample(&mut self) -> Result<Sample, Failure> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(self.path)?,
        };
        let mut ask = |method| client.call(method, &json!({}), ANSWER_TIMEOUT);
        let (status, history) = (ask("status")?, ask("history")?);
        // One that does not count, or knows no such method, is not asked again.
        let metrics = if self.counts {
            match ask("metrics") {
                Ok(metrics) => Some(metrics),
                Err(failure) if ["metrics_off", "method_not_found"].contains(&&*failure.code) => {
                    self.counts = false;
                    None
                }
                Err(failure) => return Err(failure),
            }
        } else {
            None
        };
        self.client = Some(client);
        Ok(Sample { at: Instant::now(), status, metrics, history })
    }
}

/// Prints a view for each interval, one line each, until the reader has had enough.
pub fn print(path: &Path, interval: Duration) -> Result<(), Stop> {
    let mut source = Source::new(path);
    let mut before = source.sample()?;
    loop {
        std::thread::sleep(interval);
        // A connection that was idle meanwhile may have had to make room for others, or it was with
        // a program that is another one now.
        let now = source.sample().or_else(|_| source.sample())?;
        let mut out = io::stdout().lock();
        writeln!(out, "{}", view(&before, &now))?;
        out.flush()?;
        before = now;
    }
}

/// Counters of requests, at one of two moments.
#[derive(Default)]
struct Counts {
    requests: u64,
    bytes: u64,
    errors: u64,
    sum_ns: u64,
    /// By their ends in nanoseconds; what is longer than all ends has the last of them.
    buckets: BTreeMap<u64, u64>,
}

impl Counts {
    fn add(&mut self, operation: &Value) {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        self.requests += number(&operation["requests"]);
        self.bytes += number(&operation["bytes"]);
        self.errors += number(&operation["errors"]);
        self.sum_ns = self.sum_ns.wrapping_add(number(&operation["latency"]["sum_ns"]));
        for bucket in operation["latency"]["buckets"].as_array().into_iter().flatten() {
            let end = bucket[0].as_u64().unwrap_or(LONGEST_NS);
            *self.buckets.entry(end).or_default() += number(&bucket[1]);
        }
    }

    /// How much more there is than before. What has begun anew is all new.
    fn since(mut self, before: &Self) -> Self {
        if self.requests < before.requests {
            return self;
        }
        self.requests -= before.requests;
        self.bytes = self.bytes.saturating_sub(before.bytes);
        self.errors = self.errors.saturating_sub(before.errors);
        self.sum_ns = self.sum_ns.wrapping_sub(before.sum_ns);
        for (end, count) in &mut self.buckets {
            *count = count.saturating_sub(before.buckets.get(end).copied().unwrap_or(0));
        }
        self
    }

    /// Where the bucket ends that has this part of all requests behind it, in microseconds.
    fn quantile(&self, part: f64) -> Option<f64> {
        let all: u64 = self.buckets.values().sum();
        let wanted = (all as f64 * part).ceil() as u64;
        let mut seen = 0;
        let found = self.buckets.iter().find(|(_, count)| {
            seen += **count;
            seen >= wanted.max(1)
        });
        found.map(|(end, _)| *end as f64 / 1e3)
    }

    fn json(&self, seconds: f64) -> Value {
        let mean = (self.requests > 0).then(|| self.sum_ns as f64 / self.requests as f64 / 1e3);
        json!({
            "requests_per_s": per(self.requests, seconds),
            "bytes_per_s": per(self.bytes, seconds),
            "errors_per_s": per(self.errors, seconds),
            "latency_us": {
                "mean": mean.map(rounded),
                "p50": self.quantile(0.5).map(rounded),
                "p99": self.quantile(0.99).map(rounded),
                "max": self.quantile(1.0).map(rounded),
            },
        })
    }
}

fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn per(count: u64, seconds: f64) -> f64 {
    rounded(count as f64 / seconds.max(1e-6))
}

/// Counters by operation, of one queue or of all.
fn counts(metrics: &Value, queue: Option<usize>) -> BTreeMap<String, Counts> {
    let mut all: BTreeMap<String, Counts> = BTreeMap::new();
    let queues = metrics["queues"].as_array().into_iter().flatten().enumerate();
    for (_, of) in queues.filter(|(at, _)| queue.is_none_or(|queue| *at == queue)) {
        for (operation, counts) in of["operations"].as_object().into_iter().flatten() {
            all.entry(operation.clone()).or_default().add(counts);
        }
    }
    all
}

/// What two samples say together.
pub fn view(before: &Sample, now: &Sample) -> Value {
    let seconds = now.at.saturating_duration_since(before.at).as_secs_f64();
    let status = &now.status;
    let mut view = Map::new();
    view.insert("interval_s".into(), json!((seconds * 1e3).round() / 1e3));
    for member in [
        "state",
        "fault",
        "generation",
        "domain",
        "standby",
        "connected",
        "capacity",
        "resident_modules",
        "upgrades",
        "supervisor",
        "server",
    ] {
        view.insert(member.into(), status[member].clone());
    }
    view.insert("operations".into(), operations(before, now, seconds));
    view.insert("queues".into(), queues(before, now, seconds));
    let history = now.history.as_array().map(Vec::as_slice).unwrap_or_default();
    let last = &history[history.len().saturating_sub(CHANGES)..];
    view.insert("last_changes".into(), last.into());
    Value::Object(view)
}

/// By operation, those that there were any of; null if they are not counted.
fn operations(before: &Sample, now: &Sample, seconds: f64) -> Value {
    let Some(metrics) = &now.metrics else { return Value::Null };
    let nothing = Value::Null;
    let earlier = counts(before.metrics.as_ref().unwrap_or(&nothing), None);
    let none = Counts::default();
    let operations = counts(metrics, None).into_iter().filter(|(_, of)| of.requests > 0);
    let operations = operations.map(|(name, of)| {
        let of = of.since(earlier.get(&name).unwrap_or(&none));
        (name, of.json(seconds))
    });
    operations.collect::<Map<_, _>>().into()
}

fn queues(before: &Sample, now: &Sample, seconds: f64) -> Value {
    let queues = now.status["queues"].as_array().map(Vec::as_slice).unwrap_or_default();
    let queue = |(at, queue): (usize, &Value)| {
        let rate = |member: &str| {
            let of = |queue: &Value| queue[member].as_u64().unwrap_or(0);
            let (now, before) = (of(queue), of(&before.status["queues"][at]));
            // Another server begins at 0.
            per(if now < before { now } else { now - before }, seconds)
        };
        json!({
            "index": queue["index"], "in_flight": queue["in_flight"],
            "oldest_age_us": queue["oldest_age_us"],
            "requests_per_s": rate("requests"), "errors_per_s": rate("errors"),
            "parks": queue["parks"],
        })
    };
    queues.iter().enumerate().map(queue).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: Instant, requests: u64, buckets: &[(Option<u64>, u64)]) -> Sample {
        let buckets: Vec<_> = buckets.iter().map(|(end, count)| json!([end, count])).collect();
        let count: u64 = buckets.iter().filter_map(|it| it[1].as_u64()).sum();
        let reads = json!({
            "requests": count, "bytes": 4096 * count, "errors": 0,
            "latency": {"sum_ns": 2_000 * count, "buckets": buckets},
        });
        let nothing = json!({"requests": 0, "latency": {"buckets": []}});
        let queue = json!({"index": 0, "operations": {"read": reads, "flush": nothing}});
        Sample {
            at,
            status: json!({
                "state": "serving", "generation": 2,
                "queues": [{"index": 0, "requests": requests, "errors": 0, "in_flight": 3}],
            }),
            metrics: Some(json!({"queues": [queue]})),
            history: (0..20).map(|at| json!({"generation": at})).collect(),
        }
    }

    #[test]
    fn two_samples_are_rates_and_latencies_of_what_is_between_them() {
        let at = Instant::now();
        let before = sample(at, 100, &[(Some(1024), 7), (Some(4096), 1)]);
        let later = at + Duration::from_secs(2);
        let now = sample(later, 300, &[(Some(1024), 7), (Some(4096), 99), (None, 3)]);
        let view = view(&before, &now);
        assert_eq!((&view["state"], &view["generation"]), (&"serving".into(), &2.into()));
        assert_eq!(view["queues"][0]["requests_per_s"], 100.0);
        let reads = &view["operations"]["read"];
        assert_eq!(reads["requests_per_s"], 50.5);
        assert_eq!(reads["bytes_per_s"], 50.5 * 4096.0);
        assert_eq!(reads["latency_us"]["mean"], 2.0);
        assert_eq!(reads["latency_us"]["p50"], 4.1);
        assert_eq!(reads["latency_us"]["max"], 17_179_869.2);
        assert!(view["operations"].get("flush").is_none(), "there were none");
        assert_eq!(view["last_changes"].as_array().map(Vec::len), Some(CHANGES));
        assert_eq!(view["last_changes"][9]["generation"], 19);
    }

    #[test]
    fn what_begins_anew_is_all_new_and_what_is_not_counted_is_null() {
        let at = Instant::now();
        let later = at + Duration::from_secs(1);
        let before = sample(at, 1_000, &[(Some(1024), 50)]);
        let mut now = sample(later, 10, &[(Some(1024), 5)]);
        let told = view(&before, &now);
        assert_eq!(told["queues"][0]["requests_per_s"], 10.0);
        assert_eq!(told["operations"]["read"]["requests_per_s"], 5.0);
        now.metrics = None;
        assert_eq!(view(&before, &now)["operations"], Value::Null);
        for odd in [json!(null), json!([]), json!("x")] {
            let odd = Sample { at, status: odd.clone(), metrics: Some(odd.clone()), history: odd };
            view(&before, &odd);
            view(&odd, &before);
        }
    }
}
