//! A trial, from the upgrade to the verdict.
//!
//! All of it runs on the thread of the command, whether anything waits for its answer or not. While
//! the generation before is measured the lock of operators is held, so that what is measured is
//! what is replaced; the canary itself is watched without any lock.

use super::errors::Counted;
use super::judge::{Found, IN_A_ROW, Looks};
use super::latency::{Classes, Histogram, name_of, total};
use crate::change::upgrade::Nothing;
use crate::device::DomainProxy;
use crate::domain::LoadedDomain;
use crate::record::canary::{CanaryReport, CanaryState, Trial};
use crate::record::code::Code;
use crate::record::report::{Change, Event, Options, Phases, Refusal, Report, WhenBusy};
use domain_abi::Params;
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the generation before is measured at most. For as long as the canary, if that is less.
const BEFORE: Duration = Duration::from_secs(10);

/// How often a canary is looked at. A short one is looked at more often.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long a canary's requests are compared with those before at most. After that the guest may do
/// something else, and the host: what was measured says nothing of it.
const COMPARED: Duration = Duration::from_secs(600);

/// For how long it is tried to take one back.
const TO_TAKE_BACK: Duration = Duration::from_secs(60);

/// Between two tries.
const TRY_EVERY: Duration = Duration::from_millis(500);

/// The longest drain of such a try.
const MOST_DRAIN: Duration = Duration::from_secs(10);

/// What comes of a canary.
#[derive(Debug)]
enum Verdict {
    Keep,
    /// For this reason.
    TakeBack(String),
    /// Something else has ended it: that is how, and why.
    Over(CanaryState, String),
}

impl DomainProxy {
    /// The canary that there is, or the last one that was.
    #[must_use]
    pub fn canary(&self) -> Option<CanaryReport> {
        self.canary.report()
    }

    /// Replaces the live domain with the module `name` on trial, and comes back with the verdict.
    ///
    /// # Errors
    /// Why it was refused; the device is as it was.
    pub fn upgrade_on_trial(
        self: &Arc<Self>,
        name: &str,
        params: Params,
        options: Options,
        trial: Trial,
    ) -> Result<(Report, CanaryReport), Refusal> {
        let (has_begun, before) = (Cell::new(false), Cell::new(Classes::new()));
        let mut phases = Phases::default();
        let prepare = || {
            self.canary.begin(trial)?;
            has_begun.set(true);
            let live = self.record();
            let is_wanted = || self.check_stopping();
            let next = self.preparer.prepare(name, params, Some(&live), is_wanted, &mut phases)?;
            let measured = self
                .may_try(&next, options)
                .and_then(|()| self.measure_before(trial).map(|measured| before.set(measured)));
            match measured {
                Ok(()) => Ok((next, phases)),
                Err(refusal) => {
                    // It was never live, so it has no requests.
                    let _ = self.retire(next, options.limit(), &mut Phases::default());
                    Err(refusal)
                }
            }
        };
        let upgraded =
            self.recorded(Change::Upgrade, name, options, prepare, |others, (next, phases)| {
                self.may_try(next, options)?;
                let generation = self.next_generation();
                // Before it serves: its first request may fail, or kill the process.
                self.canary.errors.begin(generation);
                self.keeping.tries(generation);
                self.replace(others, Arc::clone(next), options, *phases)
            });
        let report = match upgraded {
            Ok(report) => report,
            Err(refusal) => {
                if has_begun.get() {
                    self.end_trial();
                }
                return Err(refusal);
            }
        };
        let verdict = self.watch(report.generation, trial, &before.take(), COMPARED);
        let (state, why) = match verdict {
            Verdict::Keep => (CanaryState::Kept, None),
            Verdict::Over(state, why) => (state, Some(why)),
            Verdict::TakeBack(why) => self.take_back(report.generation, options, why),
        };
        self.canary.change(|canary| {
            canary.state = state;
            canary.why = why.or(canary.why.take());
        });
        self.end_trial();
        let canary = self.canary.report().unwrap_or_else(|| CanaryReport::new(trial));
        log::info!("the canary, generation {}: {canary:?}", report.generation);
        self.happened(Event::Canary(Box::new(canary.clone())));
        Ok((report, canary))
    }

    fn end_trial(&self) {
        self.canary.end();
        self.keeping.tries(0);
        self.keeping.tell();
    }

    /// That `next` would be accepted, and could be taken back.
    fn may_try(self: &Arc<Self>, next: &LoadedDomain, options: Options) -> Result<(), Refusal> {
        let live = self.live_noticed();
        self.accept(&self.record().info, live.as_ref(), next, options)?;
        let why_not = match &live {
            None => "nothing serves now".to_owned(),
            Some(live) if !live.accepts_schema_of(next) => {
                let from = next.label();
                format!("{} cannot take up what {from} makes of the storage", live.label())
            }
            Some(_) => return Ok(()),
        };
        Err(Refusal::new(
            Code::NoWayBack,
            format!("it could not be taken back: {why_not}; upgrade without --canary"),
        ))
    }

    /// Measures the live generation, for as long as the canary is to be.
    fn measure_before(&self, trial: Trial) -> Result<Classes, Refusal> {
        if self.queues.served() == 0 {
            // There is no guest whose requests could be measured.
            return Ok(Classes::new());
        }
        let window = self.canary.gauge.begin();
        let until = Instant::now() + trial.time.min(BEFORE);
        self.signal.wait(until, || self.is_stopping().then_some(()));
        self.check_stopping()?;
        let counted = window.counted();
        let all = total(&counted);
        self.canary.change(|canary| {
            canary.requests_before = all.count();
            canary.p99_before_us = micros(&all);
        });
        Ok(counted)
    }

    /// Watches the canary until there is something to say of it. How slow it is is looked at for as
    /// long as `compared`.
    fn watch(
        &self,
        generation: u64,
        trial: Trial,
        before: &Classes,
        compared: Duration,
    ) -> Verdict {
        self.canary.change(|canary| {
            (canary.state, canary.generation) = (CanaryState::Running, Some(generation));
        });
        if let Some(canary) = self.canary.report() {
            self.happened(Event::Canary(Box::new(canary)));
        }
        let window = self.canary.gauge.begin();
        let mut looks: Vec<Looks> = before.iter().map(Looks::new).collect();
        let began = Instant::now();
        let (end, last_look) = (began + trial.time, began + trial.time.min(compared));
        let every = LOOK_EVERY.min(trial.time / (IN_A_ROW + 1));
        loop {
            let until = last_look.min(Instant::now() + every);
            let over = self.signal.wait(until, || self.is_over(generation, trial));
            let is_last = Instant::now() >= last_look;
            let counted = window.counted();
            let slow = self.look(&mut looks, &counted, trial, is_last);
            match over.or(slow) {
                Some(verdict) => return verdict,
                None if is_last => break,
                None => {}
            }
        }
        self.canary.gauge.end();
        loop {
            let until = end.min(Instant::now() + LOOK_EVERY);
            match self.signal.wait(until, || self.is_over(generation, trial)) {
                Some(verdict) => return verdict,
                None if Instant::now() >= end => return Verdict::Keep,
                None => {}
            }
        }
    }

    /// What ends a canary at once.
    fn is_over(&self, generation: u64, trial: Trial) -> Option<Verdict> {
        let Counted { own, explained } = self.canary.errors.counted();
        self.canary.change(|canary| {
            (canary.errors, canary.errors_explained) = (own, explained);
        });
        if self.is_stopping() {
            return Some(Verdict::Over(CanaryState::Ended, "the daemon ends".to_owned()));
        }
        if let Some((state, why)) = self.replaced_by(generation) {
            return Some(Verdict::Over(state, why));
        }
        (own > trial.max_errors).then(|| {
            Verdict::TakeBack(format!(
                "requests with errors where the generation before had none: {own}, and {} may be",
                trial.max_errors
            ))
        })
    }

    /// Looks at what was measured; at all of it at the end.
    fn look(
        &self,
        looks: &mut [Looks],
        counted: &Classes,
        trial: Trial,
        is_last: bool,
    ) -> Option<Verdict> {
        let (mut judged, mut slowest, mut slow) = (0, None::<f64>, None);
        for (class, (looks, counted)) in looks.iter_mut().zip(counted).enumerate() {
            let ratio = trial.max_latency_ratio;
            let all = looks.found(counted);
            judged += all.map_or(0, |_| counted.count());
            if let Some(found) = all {
                slowest = Some(slowest.unwrap_or(0.0).max(found.ratio()));
            }
            let believed = looks.look(counted, ratio);
            let in_the_end = all.filter(|found| is_last && found.is_slow(ratio));
            if let Some(found) = believed.or(in_the_end) {
                slow = Some((class, found));
            }
        }
        let all = total(counted);
        self.canary.change(|canary| {
            canary.requests = all.count();
            canary.p99_us = micros(&all);
            canary.judged = judged;
            canary.latency_ratio = slowest.map(|ratio| (ratio * 1000.0).round() / 1000.0);
            canary.why = (judged == 0).then(|| {
                "how slow it is was not judged: there are too few requests alike".to_owned()
            });
        });
        let (class, found) = slow?;
        let Found { canary, before } = found;
        Some(Verdict::TakeBack(format!(
            "it is {:.1} times as slow as the generation before, and {} may be: at the 99th percentile {} us at least, after {} us at most ({})",
            found.ratio(),
            trial.max_latency_ratio,
            canary / 1000,
            before / 1000,
            name_of(class)
        )))
    }

    /// Rolls the canary back, because of `why`. Returns what came of it, and why.
    fn take_back(
        self: &Arc<Self>,
        generation: u64,
        options: Options,
        why: String,
    ) -> (CanaryState, Option<String>) {
        log::warn!("generation {generation} is taken back: {why}");
        let mut options = Options { when_busy: WhenBusy::Queue, ..options };
        let deadline = Instant::now() + TO_TAKE_BACK;
        let nothing = || Ok(Nothing);
        loop {
            let rolled_back =
                self.recorded(Change::Rollback, "standby", options, nothing, |others, Nothing| {
                    if self.next_generation() != generation + 1 {
                        return Err(Refusal::new(
                            Code::NoStandby,
                            "the canary does not serve any more; nothing is to be rolled back",
                        ));
                    }
                    self.bring_standby_back(others, options)
                });
            let Err(refusal) = rolled_back else { return (CanaryState::TakenBack, Some(why)) };
            if let Some((state, how)) = self.replaced_by(generation) {
                return (state, Some(format!("{why}; {how}")));
            }
            if Instant::now() >= deadline || self.is_stopping() {
                let why =
                    format!("{why}; it could not be taken back ({}): {refusal}", refusal.code);
                log::error!("generation {generation}: {why}");
                return (CanaryState::Stuck, Some(why));
            }
            // One that is slow takes longer to end what it has; the guest waits for that anyway.
            options.drain_timeout = (options.drain_timeout * 2).max(TRY_EVERY).min(MOST_DRAIN);
            let is_over = || self.is_stopping().then_some(());
            self.signal.wait(Instant::now() + TRY_EVERY, is_over);
        }
    }
}

fn micros(times: &Histogram) -> Option<u64> {
    times.percentile_99().map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
}

#[cfg(test)]
#[path = "trial_tests.rs"]
mod tests;
