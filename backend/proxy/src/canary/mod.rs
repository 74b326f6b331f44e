//! A canary: a new generation that serves on trial, with the one before as its standby.
//!
//! ```text
//!   upgrade: verify, load, prepare -> measured before -> replaced -> measured -> kept
//!                                                           |           |
//!       it fails requests, or is slower than it may be -----+-----------+--> rolled back
//!       it dies: the standby takes over; it is rolled back by a command: nothing is to be done
//!       its server dies: the next one goes on with the standby, if that can (`restore.rs`)
//! ```
//!
//! By file: `trial` (from the upgrade to the verdict), `errors` (which errors are a canary's),
//! `latency` (how long requests take), `judge` (what may be said of that).
//!
//! Invariants: one canary at a time; nothing beside it that its standby might not follow (an
//! upgrade, another capacity, what only the canary could offer a guest); a canary that could not be
//! rolled back is refused; nothing is measured while there is none.

pub(crate) mod errors;
pub(crate) mod judge;
pub(crate) mod latency;
mod trial;

use crate::record::canary::{CanaryReport, Trial};
use crate::record::code::Code;
use crate::record::report::Refusal;
use crate::signal::{Signal, lock};
use errors::ErrorLog;
use latency::Gauge;
use std::sync::{Arc, Mutex};

/// The canaries of a device.
pub(crate) struct Canary {
    pub(crate) gauge: Gauge,
    pub(crate) errors: ErrorLog,
    /// Of the last one.
    report: Mutex<Option<CanaryReport>>,
}

impl Canary {
    pub(crate) fn new(signal: &Arc<Signal>) -> Self {
        let (gauge, errors) = (Gauge::default(), ErrorLog::new(signal));
        Self { gauge, errors, report: Mutex::default() }
    }

    /// The last one.
    pub(crate) fn report(&self) -> Option<CanaryReport> {
        lock(&self.report).clone()
    }

    /// One was on trial when its server died, and this came of it.
    pub(crate) fn judged_before(&self, verdict: CanaryReport) {
        *lock(&self.report) = Some(verdict);
    }

    /// That there is none.
    ///
    /// # Errors
    /// There is one.
    pub(crate) fn check_idle(&self) -> Result<(), Refusal> {
        let is_running = |report: &CanaryReport| report.is_running();
        if !lock(&self.report).as_ref().is_some_and(is_running) {
            return Ok(());
        }
        Err(Refusal::new(
            Code::CanaryRuns,
            "a new generation is on trial, and this might leave it without its standby; wait for the verdict (`canary` in `status`), or roll it back",
        ))
    }

    fn begin(&self, trial: Trial) -> Result<(), Refusal> {
        self.check_idle()?;
        *lock(&self.report) = Some(CanaryReport::new(trial));
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut CanaryReport)) {
        if let Some(report) = &mut *lock(&self.report) {
            change(report);
        }
    }

    /// Nothing is measured any more. Without a verdict there was none.
    fn end(&self) {
        self.gauge.end();
        self.errors.end();
        lock(&self.report).take_if(|report| report.is_running());
    }
}
