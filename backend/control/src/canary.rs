//! How an upgrade that takes itself back is asked for.

use serde::{Deserialize, Deserializer, Serialize};
use std::time::Duration;

/// The longest trial that can be asked for.
pub const MAX_CANARY: Duration = Duration::from_secs(24 * 60 * 60);
/// How many times as slow as the one before a canary may be, if a request does not say.
pub const DEFAULT_LATENCY_RATIO: f64 = 2.0;
/// The most that can be asked for: what is as slow is not slower by then, but stands still.
const MAX_LATENCY_RATIO: f64 = 1e6;

/// How a new domain is tried; of these only `seconds` is needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanaryParams {
    /// For how long.
    pub seconds: u64,
    /// How many requests it may fail.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub max_errors: Option<u64>,
    /// How many times as slow as the one before it may be.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub max_latency_ratio: Option<f64>,
}

/// A trial that was asked for, checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CanaryRequest {
    /// For how long, 1 s to [`MAX_CANARY`].
    pub time: Duration,
    /// How many requests it may fail.
    pub max_errors: u64,
    /// How many times as slow as the one before it may be; 1 at least.
    pub max_latency_ratio: f64,
}

impl CanaryParams {
    /// The request that they are.
    ///
    /// # Errors
    /// A sentence that names the member that is out of range.
    pub fn check(self) -> Result<CanaryRequest, String> {
        let time = Duration::from_secs(self.seconds);
        if time.is_zero() || time > MAX_CANARY {
            return Err(format!(
                "`seconds` of a canary must be 1 to {}: how long it is tried",
                MAX_CANARY.as_secs()
            ));
        }
        let ratio = self.max_latency_ratio.unwrap_or(DEFAULT_LATENCY_RATIO);
        if !(1.0..=MAX_LATENCY_RATIO).contains(&ratio) {
            return Err(format!(
                "`max_latency_ratio` must be 1 to {MAX_LATENCY_RATIO}: how many times as slow as the one before it may be"
            ));
        }
        let max_errors = self.max_errors.unwrap_or(0);
        Ok(CanaryRequest { time, max_errors, max_latency_ratio: ratio })
    }
}

/// A member that may be left out, but is not null if it is there.
pub(crate) fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    from: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canary_has_a_time_and_limits_that_can_be() {
        let canary = CanaryParams { seconds: 9, ..CanaryParams::default() };
        let expected = CanaryRequest {
            time: Duration::from_secs(9),
            max_errors: 0,
            max_latency_ratio: DEFAULT_LATENCY_RATIO,
        };
        assert_eq!(canary.check(), Ok(expected));
        for (seconds, ratio, word) in [
            (0, 2.0, "seconds"),
            (86_401, 2.0, "seconds"),
            (1, 0.9, "max_latency_ratio"),
            (1, f64::NAN, "max_latency_ratio"),
            (1, f64::INFINITY, "max_latency_ratio"),
        ] {
            let bad = CanaryParams { seconds, max_latency_ratio: Some(ratio), max_errors: None };
            assert!(bad.check().unwrap_err().contains(word), "{bad:?}");
        }
    }
}
