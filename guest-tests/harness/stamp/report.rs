//! What a load reports: counts, faults in words, and latencies.

use std::fmt;
use std::time::Duration;

use super::Ledger;

/// What a load has seen.
#[derive(Clone, Default)]
pub struct LoadReport {
    /// Requests that were answered OK.
    pub ios: u64,
    /// Requests that were answered with an error, or with no status at all.
    pub errors: u64,
    /// Blocks that were read and were wrong.
    pub mismatches: u64,
    /// Requests that were not answered in time.
    pub unanswered: u64,
    /// Answers to requests that were not in flight.
    pub spurious: u64,
    /// How long the answered requests took.
    pub latency: Histogram,
    /// How long it all took.
    pub elapsed: Duration,
    /// The first faults in words.
    pub notes: Vec<String>,
    /// What the disk should now hold, per queue.
    pub ledgers: Vec<Ledger>,
}

impl LoadReport {
    /// Panics unless every request was answered once, rightly and in time.
    pub fn assert_clean(&self) {
        let faults = self.errors + self.mismatches + self.unanswered + self.spurious;
        assert_eq!(faults, 0, "{self:?}");
        assert!(self.ios > 0, "the load did nothing: {self:?}");
    }

    /// Adds what another load has seen; its ledgers come behind.
    pub fn merge(&mut self, other: LoadReport) {
        self.ios += other.ios;
        self.errors += other.errors;
        self.mismatches += other.mismatches;
        self.unanswered += other.unanswered;
        self.spurious += other.spurious;
        self.latency.merge(&other.latency);
        self.elapsed = self.elapsed.max(other.elapsed);
        self.notes.extend(other.notes);
        self.ledgers.extend(other.ledgers);
    }

    pub(super) fn note(&mut self, text: impl FnOnce() -> String) {
        if self.notes.len() < 10 {
            self.notes.push(text());
        }
    }
}

impl fmt::Debug for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LoadReport { ios, errors, mismatches, unanswered, spurious, .. } = self;
        write!(
            f,
            "{ios} I/Os in {:.1?} ({:.0}/s), ",
            self.elapsed,
            *ios as f64 / self.elapsed.as_secs_f64()
        )?;
        write!(
            f,
            "{errors} errors, {mismatches} mismatches, {unanswered} unanswered, {spurious} spurious; "
        )?;
        let at = |share| self.latency.quantile(share);
        write!(
            f,
            "latency p50 {:?} p99 {:?} p99.9 {:?} max {:?}",
            at(0.5),
            at(0.99),
            at(0.999),
            at(1.0)
        )?;
        self.notes.iter().try_for_each(|note| write!(f, "\n  {note}"))
    }
}

/// Latencies in buckets of 1/16 of their size.
#[derive(Clone)]
pub struct Histogram {
    buckets: Vec<u64>,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { buckets: vec![0; 64 * 16], max: 0 }
    }
}

impl Histogram {
    /// Counts one latency.
    pub fn record(&mut self, latency: Duration) {
        let ns = (latency.as_nanos() as u64).max(16);
        let exponent = ns.ilog2() as usize;
        self.buckets[exponent * 16 + ((ns >> (exponent - 4)) & 15) as usize] += 1;
        self.max = self.max.max(ns);
    }

    /// The latency that `share` of all requests stayed below; exact for the maximum, else within
    /// 1/16.
    pub fn quantile(&self, share: f64) -> Duration {
        let total: u64 = self.buckets.iter().sum();
        let wanted = (total as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                let (exponent, part) = (index / 16, index as u64 % 16);
                return Duration::from_nanos((((17 + part) << exponent) >> 4).min(self.max));
            }
        }
        Duration::ZERO
    }

    fn merge(&mut self, other: &Histogram) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(sum, count)| *sum += count);
        self.max = self.max.max(other.max);
    }
}
