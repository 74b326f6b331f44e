//! What is said of a canary.

use crate::record::serialize;
use serde::Serialize;
use std::time::Duration;

/// How a new generation is tried.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trial {
    /// For how long.
    pub time: Duration,
    /// So many requests may end with errors that the generation before would not have made.
    pub max_errors: u64,
    /// So many times may its 99th percentile be that of the generation before.
    pub max_latency_ratio: f64,
}

/// How far a canary is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CanaryState {
    /// The generation before is measured.
    Measuring,
    /// It serves, and is measured.
    Running,
    /// It serves on.
    Kept,
    /// What was before serves again.
    TakenBack,
    /// It is to be taken back, and could not be: it serves on.
    Stuck,
    /// It has died, and nothing could take over: nothing serves.
    Faulted,
    /// The device has ended before there was a verdict.
    Ended,
}

/// What is known of a canary.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CanaryReport {
    /// How far it is.
    pub state: CanaryState,
    /// The generation on trial, when it serves.
    pub generation: Option<u64>,
    /// Why it was not kept, or what could not be judged.
    pub why: Option<String>,
    /// For how long it is tried.
    #[serde(rename = "time_us", serialize_with = "serialize::micros")]
    pub time: Duration,
    /// [`Trial::max_errors`].
    pub max_errors: u64,
    /// Requests that it has ended with errors of its own.
    pub errors: u64,
    /// Requests that it has ended with errors where an earlier generation had, too.
    pub errors_explained: u64,
    /// Requests that were measured of it.
    pub requests: u64,
    /// Of the generation before.
    pub requests_before: u64,
    /// Of its requests, those that there is enough of to compare.
    pub judged: u64,
    /// [`Trial::max_latency_ratio`].
    pub max_latency_ratio: f64,
    /// How many times slower it is at least, in the class where it is slowest.
    pub latency_ratio: Option<f64>,
    /// About its 99th percentile, of all requests.
    pub p99_us: Option<u64>,
    /// That of the generation before.
    pub p99_before_us: Option<u64>,
}

impl CanaryReport {
    pub(crate) fn new(trial: Trial) -> Self {
        Self {
            state: CanaryState::Measuring,
            generation: None,
            why: None,
            time: trial.time,
            max_errors: trial.max_errors,
            errors: 0,
            errors_explained: 0,
            requests: 0,
            requests_before: 0,
            judged: 0,
            max_latency_ratio: trial.max_latency_ratio,
            latency_ratio: None,
            p99_us: None,
            p99_before_us: None,
        }
    }

    /// Of one whose server has died, and that was taken back.
    pub(crate) fn of_before(generation: u64) -> Self {
        let trial = Trial { time: Duration::ZERO, max_errors: 0, max_latency_ratio: 0.0 };
        let why = "the server process died while it was on trial".to_owned();
        let (state, generation) = (CanaryState::TakenBack, Some(generation));
        Self { state, generation, why: Some(why), ..Self::new(trial) }
    }

    /// Of one whose server has died, and that serves on, because its standby was refused.
    pub(crate) fn of_stuck_before(generation: u64, refused: &str) -> Self {
        let before = Self::of_before(generation);
        let why = before.why.as_deref().unwrap_or_default();
        let why = Some(format!("{why}; it could not be taken back {refused}"));
        Self { state: CanaryState::Stuck, why, ..before }
    }

    /// Whether there is no verdict yet.
    #[must_use]
    pub const fn is_running(&self) -> bool {
        matches!(self.state, CanaryState::Measuring | CanaryState::Running)
    }
}
