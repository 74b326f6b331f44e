//! How long requests take while a canary, or its baseline, is measured: from a request's taking to
//! its answer, in classes that can be compared.
//!
//! A request belongs to a class by its kind, its size and how many were in flight when it was
//! taken: a deeper queue or larger requests make no generation slow. A class is a histogram whose
//! buckets are a sixteenth of their power of two wide.
//!
//! A worker keeps a [`Probe`]. It costs a look at a flag per batch while nothing is measured.

use arc_swap::ArcSwapOption;
use domain_abi::{RawRequest, op};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Buckets of a power of two.
const SUB: usize = 16;
/// The lowest bits of a time in nanoseconds are not looked at.
const SHIFT: u32 = 10;
/// The highest bucket: about 130 s, and all that is longer.
const BUCKETS: usize = 24 * SUB;

/// Reads and writes up to so many bytes are of a class; then those that are larger.
const SIZES: [u64; 2] = [16 << 10, 128 << 10];
/// Queues up to this depth are of a class; then those that are deeper.
const DEPTHS: [usize; 3] = [1, 4, 16];
/// Reads by size, writes by size, all else.
const KINDS: usize = 2 * (SIZES.len() + 1) + 1;
/// How many classes there are.
pub(crate) const CLASSES: usize = KINDS * (DEPTHS.len() + 1);

/// Of no class.
const NONE: u8 = u8::MAX;
const _: () = assert!(CLASSES < NONE as usize);

fn class_of(kind: u32, len: u64, depth: usize) -> u8 {
    let size = SIZES.iter().take_while(|most| len > **most).count();
    let kind = match kind {
        op::READ => size,
        op::WRITE => SIZES.len() + 1 + size,
        _ => KINDS - 1,
    };
    let depth = DEPTHS.iter().take_while(|most| depth > **most).count();
    (kind * (DEPTHS.len() + 1) + depth) as u8
}

/// A class, for people.
pub(crate) fn name_of(class: usize) -> String {
    let (kind, depth) = (class / (DEPTHS.len() + 1), class % (DEPTHS.len() + 1));
    let sizes = SIZES.len() + 1;
    let kind = match kind {
        other if other == KINDS - 1 => "other requests".to_owned(),
        kind => {
            let word = if kind < sizes { "reads" } else { "writes" };
            match SIZES.get(kind % sizes) {
                Some(most) => format!("{word} of up to {} KiB", most >> 10),
                None => format!("larger {word}"),
            }
        }
    };
    match DEPTHS.get(depth) {
        Some(most) => format!("{kind}, up to {most} in flight"),
        None => format!("{kind}, more than {} in flight", DEPTHS[DEPTHS.len() - 1]),
    }
}

fn bucket_of(nanos: u64) -> usize {
    let value = nanos >> SHIFT;
    if value < SUB as u64 {
        return value as usize;
    }
    let power = value.ilog2();
    let sub = (value >> (power - SUB.ilog2())) as usize & (SUB - 1);
    ((power - SUB.ilog2() + 1) as usize * SUB + sub).min(BUCKETS - 1)
}

/// The shortest time of a bucket.
fn floor_of(bucket: usize) -> u64 {
    let (power, sub) = (bucket / SUB, (bucket % SUB) as u64);
    if power == 0 { sub << SHIFT } else { (sub + SUB as u64) << (power - 1) << SHIFT }
}

/// How many requests took how long, at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Histogram(Vec<u64>);

impl Default for Histogram {
    fn default() -> Self {
        Self(vec![0; BUCKETS])
    }
}

impl Histogram {
    pub(crate) fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    #[cfg(test)]
    pub(crate) fn of(times: impl IntoIterator<Item = u64>) -> Self {
        let mut new = Self::default();
        times.into_iter().for_each(|nanos| new.0[bucket_of(nanos)] += 1);
        new
    }

    /// What was counted since `before`.
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self(self.0.iter().zip(&before.0).map(|(now, before)| now - before).collect())
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(sum, more)| *sum += more);
    }

    /// Between what times the one of this rank is, counted from 1: in nanoseconds, at least and at
    /// most.
    pub(crate) fn at_rank(&self, rank: u64) -> (u64, u64) {
        let mut below = 0;
        let bucket = self.0.iter().position(|count| {
            below += count;
            below >= rank
        });
        let bucket = bucket.unwrap_or(BUCKETS - 1);
        (floor_of(bucket), floor_of(bucket + 1))
    }

    /// About the 99th percentile; nothing of nothing.
    pub(crate) fn percentile_99(&self) -> Option<Duration> {
        let count = self.count();
        let rank = (count * 99).div_ceil(100);
        (count > 0).then(|| Duration::from_nanos(self.at_rank(rank).1))
    }
}

/// Histograms by class.
pub(crate) type Classes = Vec<Histogram>;

/// All of them together.
pub(crate) fn total(classes: &Classes) -> Histogram {
    let mut sum = Histogram::default();
    classes.iter().for_each(|class| sum.add(class));
    sum
}

/// What is measured between two moments, by all workers.
pub(crate) struct Window {
    /// What was taken before is not measured.
    began: Instant,
    buckets: Box<[AtomicU64]>,
}

impl Window {
    fn new() -> Self {
        let buckets = (0..CLASSES * BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self { began: Instant::now(), buckets }
    }

    fn note(&self, class: u8, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        // Counters by themselves.
        self.buckets[usize::from(class) * BUCKETS + bucket_of(nanos)]
            .fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub(crate) fn counted(&self) -> Classes {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        self.buckets
            .chunks(BUCKETS)
            .map(|class| Histogram(class.iter().map(load).collect()))
            .collect()
    }
}

/// What is measured now, if anything is.
#[derive(Default)]
pub(crate) struct Gauge {
    is_on: AtomicBool,
    window: ArcSwapOption<Window>,
}

impl Gauge {
    /// Whether a request's time is to be noted.
    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        // A worker that sees it late measures a batch less, or one for nothing.
        self.is_on.load(Ordering::Relaxed)
    }

    /// Measures what is taken from now on.
    pub(crate) fn begin(&self) -> Arc<Window> {
        let window = Arc::new(Window::new());
        self.window.store(Some(Arc::clone(&window)));
        self.is_on.store(true, Ordering::Relaxed);
        window
    }

    pub(crate) fn end(&self) {
        self.is_on.store(false, Ordering::Relaxed);
        self.window.store(None);
    }
}

/// When a request was taken, and its class.
#[derive(Clone, Copy)]
struct Taken {
    at: Instant,
    class: u8,
}

/// A worker's part of what is measured.
#[derive(Default)]
pub struct Probe {
    /// Something is, or was when requests were taken last.
    is_on: bool,
    /// By slot.
    taken: Vec<Option<Taken>>,
}

impl Probe {
    /// Whether answers are to be told.
    #[must_use]
    #[inline(always)]
    pub const fn is_on(&self) -> bool {
        self.is_on
    }

    /// These were taken now, and with them so many are in flight.
    pub(crate) fn took(&mut self, batch: &[RawRequest], depth: usize, slot: impl Fn(u64) -> usize) {
        self.is_on = true;
        let at = Instant::now();
        for request in batch {
            let slot = slot(request.tag);
            if slot >= self.taken.len() {
                self.taken.resize(slot + 1, None);
            }
            let class = class_of(request.op(), request.len(), depth);
            self.taken[slot] = Some(Taken { at, class });
        }
    }

    /// These have been answered.
    pub(crate) fn answered(&mut self, gauge: &Gauge, slots: impl Iterator<Item = usize>) {
        let Some(window) = gauge.window.load_full() else {
            *self = Self::default();
            return;
        };
        let now = Instant::now();
        for slot in slots {
            let taken = self.taken.get_mut(slot).and_then(Option::take);
            if let Some(Taken { at, class }) = taken.filter(|taken| taken.at >= window.began) {
                window.note(class, now - at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_its_bucket_and_no_bucket_is_wider_than_a_sixteenth() {
        for bucket in 0..BUCKETS - 1 {
            let (least, above) = (floor_of(bucket), floor_of(bucket + 1));
            assert_eq!((bucket_of(least), bucket_of(above - 1)), (bucket, bucket));
            let width = above - least;
            assert!(width <= 1 << SHIFT || width * SUB as u64 <= least, "{bucket}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert!(floor_of(BUCKETS - 1) > 60_000_000_000);
    }

    #[test]
    fn requests_are_told_apart_by_kind_size_and_depth() {
        let mut all = std::collections::BTreeSet::new();
        for kind in [op::READ, op::WRITE, op::FLUSH] {
            for len in [512, 64 << 10, 1 << 20] {
                for depth in [1, 2, 5, 17] {
                    all.insert(class_of(kind, len, depth));
                }
            }
        }
        assert_eq!(all.len(), CLASSES);
        assert!(all.iter().all(|&class| usize::from(class) < CLASSES));
        let names: std::collections::BTreeSet<_> = (0..CLASSES).map(name_of).collect();
        assert_eq!(names.len(), CLASSES);
        let class = usize::from(class_of(op::WRITE, 4096, 32));
        assert_eq!(name_of(class), "writes of up to 16 KiB, more than 16 in flight");
    }

    #[test]
    fn only_what_was_taken_and_answered_in_a_window_is_counted() {
        let (gauge, mut probe) = (Gauge::default(), Probe::default());
        let batch = [RawRequest::flush()];
        let window = gauge.begin();
        probe.took(&batch, 1, |_| 3);
        probe.answered(&gauge, [3, 4].into_iter());
        probe.answered(&gauge, [3].into_iter());
        assert_eq!(total(&window.counted()).count(), 1);
        probe.took(&batch, 1, |_| 3);
        let next = gauge.begin();
        probe.answered(&gauge, [3].into_iter());
        assert_eq!((total(&window.counted()).count(), total(&next.counted()).count()), (1, 0));
        gauge.end();
        probe.took(&batch, 1, |_| 3);
        probe.answered(&gauge, [3].into_iter());
        assert!(!probe.is_on() && !gauge.is_on());
    }
}
