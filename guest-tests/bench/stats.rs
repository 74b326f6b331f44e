//! Medians, spreads and ratios, and how they are written.

use serde_json::{Value, json};

/// What is left of some runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// Of values in any order; zeros if there are none.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else {
            return Spread { median: 0.0, min: 0.0, max: 0.0 };
        };
        let half = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[half]
        } else {
            f64::midpoint(values[half - 1], values[half])
        };
        Spread { median, min, max }
    }

    pub(super) fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }

    /// `median (min-max)`, each written by `write`.
    pub(super) fn show(self, write: impl Fn(f64) -> String) -> String {
        format!("{} ({}-{})", write(self.median), write(self.min), write(self.max))
    }
}

/// Pair by pair; a missing or zero denominator leaves its pair out.
pub(super) fn ratios(over: &[f64], under: &[f64]) -> Vec<f64> {
    over.iter()
        .zip(under)
        .filter(|&(_, &under)| under > 0.0)
        .map(|(over, under)| over / under)
        .collect()
}

/// The value that this share of `sorted` does not exceed.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

pub(super) fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

/// `1234567` as `1.23M`.
pub(super) fn rate(per_second: f64) -> String {
    match per_second {
        r if r >= 1e6 => format!("{:.2}M", r / 1e6),
        r if r >= 1e5 => format!("{:.0}k", r / 1e3),
        r if r >= 1e3 => format!("{:.1}k", r / 1e3),
        r => format!("{r:.0}"),
    }
}

/// Nanoseconds with three digits and a unit.
pub(super) fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns >= 1e9 => (ns / 1e9, "s"),
        ns if ns >= 1e6 => (ns / 1e6, "ms"),
        ns if ns >= 1e3 => (ns / 1e3, "us"),
        ns => return format!("{ns:.0} ns"),
    };
    match value {
        v if v >= 100.0 => format!("{v:.0} {unit}"),
        v if v >= 10.0 => format!("{v:.1} {unit}"),
        v => format!("{v:.2} {unit}"),
    }
}

/// A ratio.
pub(super) fn times(ratio: f64) -> String {
    if ratio >= 100.0 { format!("{ratio:.0}") } else { format!("{ratio:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_the_sorted_values() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0]).median, 2.5);
        assert_eq!(Spread::of([]).median, 0.0);
        assert_eq!(ratios(&[4.0, 5.0, 6.0], &[2.0, 0.0, 3.0]), [2.0, 2.0]);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0], 0.5), 2.0);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [rate(1_234_567.0), rate(123_456.0), rate(12_345.0)],
            ["1.23M", "123k", "12.3k"]
        );
        assert_eq!(
            [time(850.0), time(1500.0), time(2.5e7), time(3e9)],
            ["850 ns", "1.50 us", "25.0 ms", "3.00 s"]
        );
    }
}
