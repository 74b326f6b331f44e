//! Is a generation slower than the one before? A test of the 99th percentile that is seldom wrong.
//!
//! Nothing is assumed of how times are distributed: of `n` times the number above the 99th
//! percentile is binomial, so an order statistic bounds it. For the generation before the bound is
//! from above, for the canary from below; both hold but with a chance of [`ALPHA`]. It is slower if
//! its lower bound is above the ratio times the other's upper bound, and by [`LEAST_SLOWER`] at
//! least; buckets are rounded against that.
//!
//! A look is at what came since the look before, and is repeated: a class is slow when it was
//! found so [`IN_A_ROW`] times, one after the other, or in the look at all of it at the end. So a
//! canary that is as fast as it may be is taken back with a chance of at most
//! `CLASSES * (2 * ALPHA + looks * ALPHA^IN_A_ROW)`, which is below 0.6 % for any canary of a day,
//! as long as times are independent. They are not where the machine is busy with something else:
//! that they must be slow several times in a row is for this.

use super::latency::Histogram;

/// Which percentile, as the part of the times that is above it.
const ABOVE: f64 = 0.01;

/// The chance that a bound is wrong.
const ALPHA: f64 = 1e-4;

/// A canary's class is not looked at before it has so many requests more.
pub(crate) const LEAST: u64 = 300;

/// By how many nanoseconds one that is slower is slower at least: what costs a guest less than its
/// own way to the disk and back costs it nothing. A neighbour that comes to share the caches makes
/// requests of 2 us three times as slow, for as long as it stays.
pub(crate) const LEAST_SLOWER: u64 = 50_000;

/// How many looks in a row find what is believed.
pub(crate) const IN_A_ROW: u32 = 3;

/// Of so many times the distribution is summed up; of more it is taken from the normal one, so that
/// a look costs as much after a day as after a second.
const SUMMED: u64 = 20_000;

/// The normal distribution is so many deviations above its mean with a chance of [`ALPHA`].
const DEVIATIONS: f64 = 3.719_016_485;

/// How many of `n` times are above the percentile, at least and at most, but with a chance of
/// [`ALPHA`] each: the largest number that is exceeded, and the smallest that is not reached.
fn bounds(n: u64) -> (Option<u64>, Option<u64>) {
    if n <= SUMMED {
        return summed(n);
    }
    let (below, above) = approximated(n);
    (Some(below), Some(above))
}

/// From the normal distribution, with the binomial one's skew (Cornish and Fisher). One more on
/// either side than the middle of a step is further out than the exact bounds, or as far.
fn approximated(n: u64) -> (u64, u64) {
    let mean = n as f64 * ABOVE;
    let deviation = (mean * (1.0 - ABOVE)).sqrt();
    let skew = (1.0 - 2.0 * ABOVE) / 6.0 * (DEVIATIONS * DEVIATIONS - 1.0);
    let (middle, out) = (mean + skew, DEVIATIONS * deviation + 1.0);
    ((middle - out).floor() as u64, (middle + out).ceil() as u64)
}

/// From the binomial distribution itself.
fn summed(n: u64) -> (Option<u64>, Option<u64>) {
    let (mut below, mut sum) = (None, 0.0);
    // The logarithm of the chance of exactly k.
    let mut ln = n as f64 * (1.0 - ABOVE).ln();
    for k in 0..=n {
        if 1.0 - sum <= ALPHA {
            return (below, Some(k));
        }
        sum += ln.exp();
        if sum <= ALPHA {
            below = Some(k);
        }
        ln += ((n - k) as f64 / (k + 1) as f64).ln() + (ABOVE / (1.0 - ABOVE)).ln();
    }
    (below, None)
}

/// The 99th percentile in nanoseconds, and the chance that it is more is [`ALPHA`]. Nothing of too
/// few: less than 917.
pub(crate) fn at_most(times: &Histogram) -> Option<u64> {
    let n = times.count();
    bounds(n).0.map(|above| times.at_rank(n - above).1)
}

/// The 99th percentile in nanoseconds, and the chance that it is less is [`ALPHA`]. Nothing of less
/// than [`LEAST`].
pub(crate) fn at_least(times: &Histogram) -> Option<u64> {
    let n = times.count();
    if n < LEAST {
        return None;
    }
    bounds(n).1.map(|above| times.at_rank(n - above + 1).0)
}

/// What a look has found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Found {
    /// At least so many nanoseconds.
    pub(crate) canary: u64,
    /// At most so many.
    pub(crate) before: u64,
}

impl Found {
    /// How much slower the canary is, at least.
    pub(crate) fn ratio(&self) -> f64 {
        self.canary as f64 / self.before.max(1) as f64
    }

    /// Whether it is slower than `ratio` allows.
    pub(crate) fn is_slow(&self, ratio: f64) -> bool {
        self.ratio() > ratio && self.canary.saturating_sub(self.before) >= LEAST_SLOWER
    }
}

/// The looks at one class.
#[derive(Debug, Clone, Default)]
pub(crate) struct Looks {
    /// The bound of the generation before; none if it has too few.
    before: Option<u64>,
    /// What was looked at.
    seen: Histogram,
    slow: u32,
}

impl Looks {
    pub(crate) fn new(before: &Histogram) -> Self {
        Self { before: at_most(before), ..Self::default() }
    }

    /// Looks at what the canary has by now. Returns what has been found if it can be believed that
    /// the canary is slower by more than `ratio`.
    pub(crate) fn look(&mut self, canary: &Histogram, ratio: f64) -> Option<Found> {
        let new = canary.since(&self.seen);
        let found = self.found(&new)?;
        self.seen = canary.clone();
        self.slow = if found.is_slow(ratio) { self.slow + 1 } else { 0 };
        (self.slow >= IN_A_ROW).then_some(found)
    }

    /// What all of it says; nothing if there is too little.
    pub(crate) fn found(&self, canary: &Histogram) -> Option<Found> {
        Some(Found { canary: at_least(canary)?, before: self.before? })
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
