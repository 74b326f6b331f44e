//! The rate limit of a device: how many requests, and how many bytes, its guest may have begun in a
//! second, on all queues together.
//!
//! Two token buckets. A bucket earns at its rate and holds up to its burst; a request is let
//! through while there is a token in each, and takes what it is: one request, and its bytes. What
//! is larger than the bucket leaves it in debt, which is earned first. So over any time the guest
//! is not faster than the rate, but for a burst and one request.
//!
//! Only reads, writes, writes of zeros and discards are counted. A discard has no bytes, because
//! none is ever written for it. A write of zeros has: whether they are written depends on the disk,
//! and a guest whose disk writes them would have no limit. A flush is free, and never waits for a
//! token.
//!
//! What is not let through stays in the ring (`queue/admission.rs`): it is in flight nowhere, so
//! that neither an upgrade nor a stop of the ring waits for it. The queue sleeps until a timer says
//! that there may be a token, or until the limit is changed.
//!
//! The lock is taken only while there is a limit: without one a worker looks at a flag per batch.

use crate::sync::lock;
pub use channel::RateLimits;
use control::messages::LimitRequest;
use domain_abi::{RawRequest, op};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// The highest rate of requests: more than any disk has.
const MOST_IOPS: u64 = 1_000_000_000;
/// The lowest and the highest rate of bytes. Below a page per second a driver gives its request up.
const LEAST_BANDWIDTH: u64 = 4096;
const MOST_BANDWIDTH: u64 = 1 << 50;

/// A bucket is as large as what is earned in this part of a second, if nothing is said: a worker
/// that is woken late by as much loses nothing.
const BURST_PART: u64 = 10;
/// A bucket is not smaller than what is earned in this part of a second: no timer wakes a worker
/// for each request of a fast disk.
const LEAST_BURST_PART: u64 = 100;
/// A bucket is not larger than what is earned in so many seconds.
const MOST_BURST_SECONDS: u64 = 3600;

/// How long a queue sleeps at least, where the bucket is not full by then: several requests are
/// let through by one wake-up.
const LEAST_SLEEP: Duration = Duration::from_micros(500);

/// What computing with fractions may take from a token.
const ROUNDING: f64 = 1e-6;

/// Limits as they are after a request, which says what is to change.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn changed(now: RateLimits, request: &LimitRequest) -> Result<RateLimits, String> {
    let LimitRequest { off, iops, iops_burst, bandwidth, bandwidth_burst } = *request;
    let before = if off { RateLimits::default() } else { now };
    let (iops, iops_burst) =
        rate("iops", (before.iops, before.iops_burst), iops, iops_burst, (1, MOST_IOPS))?;
    let (bandwidth, bandwidth_burst) = rate(
        "bandwidth",
        (before.bandwidth, before.bandwidth_burst),
        bandwidth,
        bandwidth_burst,
        (LEAST_BANDWIDTH, MOST_BANDWIDTH),
    )?;
    Ok(RateLimits { iops, iops_burst, bandwidth, bandwidth_burst })
}

/// A rate and its burst; 0 is none.
fn rate(
    name: &str,
    before: (u64, u64),
    rate: Option<u64>,
    burst: Option<u64>,
    (least, most): (u64, u64),
) -> Result<(u64, u64), String> {
    let per_second = rate.unwrap_or(before.0);
    if per_second == 0 {
        return match burst {
            None => Ok((0, 0)),
            Some(_) => Err(format!("`{name}-burst` is of no use without `{name}`; give both")),
        };
    }
    if !(least..=most).contains(&per_second) {
        return Err(format!(
            "`{name}` is {per_second} in a second; it must be {least} to {most}, or 0 for no limit"
        ));
    }
    let usual = (per_second / BURST_PART).max(1);
    let burst = burst.unwrap_or(if rate.is_none() { before.1 } else { usual });
    let smallest = (per_second / LEAST_BURST_PART).max(1);
    let largest = per_second.saturating_mul(MOST_BURST_SECONDS);
    if !(smallest..=largest).contains(&burst) {
        return Err(format!(
            "`{name}-burst` is {burst}; for {per_second} in a second it must be {smallest} (a hundredth of a second's) to {largest} (an hour's)"
        ));
    }
    Ok((per_second, burst))
}

/// What may be begun now, of one kind.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// In a second.
    rate: f64,
    burst: f64,
    /// Below 0 is debt.
    level: f64,
    /// When that was so.
    at: Instant,
}

impl Bucket {
    /// Of a rate that is not 0; with what one before had, or full.
    fn new(rate: u64, burst: u64, before: Option<Self>, now: Instant) -> Option<Self> {
        let (rate, burst) = (rate as f64, burst as f64);
        let level = match before {
            Some(before) if (before.rate, before.burst) == (rate, burst) => before.level,
            // A debt was made by another rate.
            Some(before) => before.level.clamp(0.0, burst),
            None => burst,
        };
        (rate > 0.0).then_some(Self { rate, burst, level, at: now })
    }

    fn fill(&mut self, now: Instant) {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.rate;
        self.level = (self.level + earned).min(self.burst);
        self.at = self.at.max(now);
    }

    /// How long it takes until there is a token.
    fn wait(&self) -> Duration {
        Duration::from_secs_f64(((1.0 - self.level) / self.rate).max(0.0))
    }

    fn is_empty(&self) -> bool {
        self.level < 1.0 - ROUNDING
    }

    /// How long it takes to be full.
    fn span(&self) -> Duration {
        Duration::from_secs_f64(self.burst / self.rate)
    }
}

#[derive(Debug, Default)]
struct Buckets {
    limits: RateLimits,
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
    /// How often a queue had to wait.
    held_up: u64,
}

impl Buckets {
    fn each(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.requests.iter_mut().chain(&mut self.bytes)
    }

    fn take(&mut self, bytes: f64, requests: f64) {
        self.requests.iter_mut().for_each(|bucket| bucket.level -= requests);
        self.bytes.iter_mut().for_each(|bucket| bucket.level -= bytes);
    }
}

/// What of a batch is let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Admitted {
    /// So many requests from the front.
    pub(crate) requests: usize,
    /// When to ask again for the others.
    pub(crate) next: Option<Instant>,
}

/// The limit of a device, for all queues.
#[derive(Default)]
pub struct Limiter {
    is_on: AtomicBool,
    buckets: Mutex<Buckets>,
    /// Held while they are changed, and that is told of: no worker waits for that.
    changing: Mutex<()>,
    /// Told of each change.
    hook: OnceLock<Box<dyn Fn(RateLimits) + Send + Sync>>,
}

impl Limiter {
    /// With these limits, from full buckets.
    #[must_use]
    pub fn new(limits: RateLimits) -> Self {
        let limiter = Self::default();
        limiter.set(limits, Instant::now());
        limiter
    }

    /// Whether there is any limit.
    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        // A worker that does not see it yet is a batch late.
        self.is_on.load(Ordering::Relaxed)
    }

    /// The limits that hold.
    #[must_use]
    pub fn limits(&self) -> RateLimits {
        lock(&self.buckets).limits
    }

    /// Has `hook` told of each change from now on, in the order of changes. A second one is not.
    pub fn on_change(&self, hook: impl Fn(RateLimits) + Send + Sync + 'static) {
        let _ = self.hook.set(Box::new(hook));
    }

    /// Changes the limits, and returns whether they are others now: then the queues have to be
    /// woken.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the request; nothing is changed.
    pub fn change(&self, request: &LimitRequest) -> Result<bool, String> {
        // What is not said stays as it is, so each change goes by the one before.
        let _changing = lock(&self.changing);
        let before = self.limits();
        let limits = changed(before, request)?;
        if limits == before {
            return Ok(false);
        }
        self.set(limits, Instant::now());
        log::info!("rate limits: {}", self.report());
        self.hook.get().into_iter().for_each(|hook| hook(limits));
        Ok(true)
    }

    fn set(&self, limits: RateLimits, now: Instant) {
        let mut buckets = lock(&self.buckets);
        buckets.each().for_each(|bucket| bucket.fill(now));
        let RateLimits { iops, iops_burst, bandwidth, bandwidth_burst } = limits;
        buckets.requests = Bucket::new(iops, iops_burst, buckets.requests, now);
        buckets.bytes = Bucket::new(bandwidth, bandwidth_burst, buckets.bytes, now);
        buckets.limits = limits;
        self.is_on.store(limits != RateLimits::default(), Ordering::Relaxed);
    }

    /// Lets through what may be begun of a batch, and counts it.
    #[cold]
    pub(crate) fn admit(&self, batch: &[RawRequest], now: Instant) -> Admitted {
        self.let_through(batch.iter().map(|request| cost(request.op(), request.len())), now)
    }

    fn let_through(&self, costs: impl Iterator<Item = Option<f64>>, now: Instant) -> Admitted {
        let mut buckets = lock(&self.buckets);
        buckets.each().for_each(|bucket| bucket.fill(now));
        let mut requests = 0;
        for cost in costs {
            let Some(bytes) = cost else {
                requests += 1;
                continue;
            };
            if buckets.each().any(|bucket| bucket.is_empty()) {
                buckets.held_up += 1;
                let longest = buckets.each().map(|bucket| bucket.wait()).max().unwrap_or_default();
                // Not so long that something is earned in vain.
                let span = buckets.each().map(|bucket| bucket.span()).min().unwrap_or_default();
                let sleep = longest.max(LEAST_SLEEP.min(span / 4));
                return Admitted { requests, next: Some(now + sleep) };
            }
            buckets.take(bytes, 1.0);
            requests += 1;
        }
        Admitted { requests, next: None }
    }

    /// These were let through and have not been begun: the domain is full.
    #[cold]
    pub(crate) fn give_back(&self, requests: &[RawRequest]) {
        self.take_back(requests.iter().map(|request| cost(request.op(), request.len())));
    }

    fn take_back(&self, costs: impl Iterator<Item = Option<f64>>) {
        let mut buckets = lock(&self.buckets);
        costs.flatten().for_each(|bytes| buckets.take(-bytes, -1.0));
    }

    /// What `status` says of it; null without a limit.
    #[must_use]
    pub fn report(&self) -> Value {
        let buckets = lock(&self.buckets);
        let RateLimits { iops, iops_burst, bandwidth, bandwidth_burst } = buckets.limits;
        if buckets.limits == RateLimits::default() {
            return Value::Null;
        }
        let some = |number: u64| if number == 0 { Value::Null } else { number.into() };
        json!({
            "iops": some(iops), "iops_burst": some(iops_burst),
            "bandwidth": some(bandwidth), "bandwidth_burst": some(bandwidth_burst),
            "held_up": buckets.held_up,
        })
    }
}

/// How many bytes a request is counted as; `None`: it is free.
fn cost(kind: u32, len: u64) -> Option<f64> {
    match kind {
        op::READ | op::WRITE | op::WRITE_ZEROES => Some(len as f64),
        op::FLUSH => None,
        _ => Some(0.0),
    }
}

#[cfg(test)]
#[path = "limiter_tests.rs"]
mod tests;
