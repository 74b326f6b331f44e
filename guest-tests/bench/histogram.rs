//! Counts of latencies in buckets whose width grows with the value: constant memory, 1.6 %
//! resolution, any range.

/// Buckets per power of two, as a power of two.
const BITS: u32 = 6;
const PER_OCTAVE: usize = 1 << BITS;
const BUCKETS: usize = (64 - BITS as usize + 1) * PER_OCTAVE;

/// A histogram of nanoseconds.
#[derive(Clone)]
pub(super) struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    max: u64,
}

impl Histogram {
    pub(super) fn new() -> Histogram {
        Histogram { counts: vec![0; BUCKETS].into(), total: 0, max: 0 }
    }

    #[inline]
    pub(super) fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.total += 1;
        self.max = self.max.max(ns);
    }

    /// The latency that this share of the values does not exceed, to the middle of its bucket; 0 if
    /// there are none.
    pub(super) fn quantile(&self, share: f64) -> u64 {
        let rank = ((share * self.total as f64).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle(index).min(self.max);
            }
        }
        0
    }

    /// The longest, exactly.
    pub(super) fn max(&self) -> u64 {
        self.max
    }
}

fn bucket(ns: u64) -> usize {
    if ns < PER_OCTAVE as u64 {
        return ns as usize;
    }
    let shift = 63 - ns.leading_zeros() - BITS;
    // The leading bit of `ns >> shift` counts as one octave.
    shift as usize * PER_OCTAVE + (ns >> shift) as usize
}

fn middle(bucket: usize) -> u64 {
    if bucket < PER_OCTAVE {
        return bucket as u64;
    }
    let shift = bucket / PER_OCTAVE - 1;
    let low = ((bucket - shift * PER_OCTAVE) as u64) << shift;
    low + (1 << shift) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_within_its_resolution() {
        let mut last = 0;
        for ns in
            (0..200).chain((1..58).flat_map(|e| [(1u64 << e) - 1, 1 << e, (1 << e) + (1 << e) / 3]))
        {
            let near = middle(bucket(ns));
            assert!(near.abs_diff(ns) as f64 <= ns as f64 / 64.0, "{ns} became {near}");
        }
        for ns in 0..100_000 {
            assert!(bucket(ns) == last || bucket(ns) == last + 1, "buckets skip at {ns}");
            last = bucket(ns);
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn quantiles_are_ranks() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile(0.5), 0);
        (1..=60).for_each(|ns| histogram.record(ns));
        assert_eq!(
            (histogram.quantile(0.5), histogram.quantile(1.0), histogram.max()),
            (30, 60, 60)
        );
    }
}
