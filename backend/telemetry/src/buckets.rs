//! Buckets for latencies: each power of two of nanoseconds in equal parts.
//!
//! The first bucket ends at 1024 ns, the last but one at 2^34 ns (17 s), and the last has no end.
//! So one is found with a count of leading zeros, and none is wider than an eighth of where it
//! begins. The page shows every fourth end only: two for each power of two.

/// Ends of the first bucket, and of the last but one, as powers of two of nanoseconds.
const FIRST: u32 = 10;
const LAST: u32 = 34;
/// Parts of a power of two, as a power of two.
const PARTS: u32 = 3;

/// How many buckets there are.
pub const BUCKETS: usize = (((LAST - FIRST) << PARTS) + 2) as usize;

/// Buckets between two ends of the page.
pub const FOLD: usize = 4;

/// The bucket of a latency.
#[must_use]
#[inline]
pub const fn bucket(ns: u64) -> usize {
    // A bucket has its end, as those of Prometheus.
    let ns = ns.saturating_sub(1);
    if ns < 1 << FIRST {
        return 0;
    }
    let power = ns.ilog2();
    let part = (ns >> (power - PARTS)) as usize & ((1 << PARTS) - 1);
    let bucket = 1 + ((power - FIRST) as usize * (1 << PARTS)) + part;
    if bucket < BUCKETS { bucket } else { BUCKETS - 1 }
}

/// Where a bucket ends, in nanoseconds; nowhere for the last.
#[must_use]
pub const fn end(bucket: usize) -> Option<u64> {
    if bucket == 0 {
        return Some(1 << FIRST);
    }
    if bucket >= BUCKETS - 1 {
        return None;
    }
    let (power, part) = ((bucket - 1) >> PARTS, (bucket - 1) & ((1 << PARTS) - 1));
    Some((((1 << PARTS) + part + 1) as u64) << (FIRST as usize - PARTS as usize + power))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_latency_is_in_the_bucket_that_ends_behind_it() {
        let mut latencies: Vec<u64> = (0..40).flat_map(|power| [1 << power, 3 << power]).collect();
        latencies.extend(latencies.clone().iter().flat_map(|ns| [ns - 1, ns + 1]));
        latencies.extend([0, u64::MAX]);
        for ns in latencies {
            let bucket = bucket(ns);
            assert!(end(bucket).is_none_or(|end| ns <= end), "{ns} is in {bucket}");
            let before = bucket.checked_sub(1).and_then(end);
            assert!(before.is_none_or(|end| ns > end), "{ns} is in {bucket}");
        }
    }

    #[test]
    fn ends_grow_by_an_eighth_at_most_and_the_page_has_the_powers_of_two() {
        let ends: Vec<u64> = (0..BUCKETS).map_while(end).collect();
        assert_eq!(ends.len(), BUCKETS - 1);
        assert_eq!((ends[0], ends[BUCKETS - 2]), (1024, 1 << 34));
        for pair in ends.windows(2) {
            assert!(pair[0] < pair[1] && pair[1] - pair[0] <= pair[0] / 8, "{pair:?}");
        }
        let shown: Vec<u64> = ends.iter().copied().step_by(FOLD).collect();
        assert_eq!(shown[..5], [1024, 1536, 2048, 3072, 4096]);
    }
}
