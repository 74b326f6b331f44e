//! What is waited for at a shut gate, and for how long.
//!
//! ```text
//!   gate shut ---------- drain timeout ----------+-- some have come --> opened soon, tried again
//!       a worker that hangs: refused             +-- all are late ----> shut until the bound
//!                                                       one comes ----> opened if no other follows
//! ```
//!
//! Until the drain timeout workers are waited for as such. After it those that are late are
//! starved, or it is over (`starved.rs`). What they have in flight waits for them anyway, so the
//! gate stays shut as long as no other queue waits at it. A worker that has come does: its requests
//! are held up by another queue's worker.
//!
//! Invariant: a worker that comes to the gate in time stays there for the drain timeout and
//! [`SHUT_LONGER`] at most, one that is late itself twice as long as it was late.

use crate::change::refusals::{self, stopping};
use crate::change::starved::{Late, Watch, say};
use crate::datapath::queue::QueueStatus;
use crate::device::DomainProxy;
use crate::domain::LoadedDomain;
use crate::record::code::Code;
use crate::record::report::{Options, Refusal, Starved};
use std::time::{Duration, Instant};

/// How often a drain looks whether it is still wanted, at least.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How much longer than the drain timeout the gate stays shut for starved workers while others
/// wait at it: enough looks to tell that they are starved.
const SHUT_LONGER: Duration = Duration::from_millis(50);

/// Why the gate was opened without an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GivenUp {
    /// The live domain has died, and the takeover waits for the lock.
    Dead,
    /// The device is about to end.
    Stopping,
    /// A worker hangs, or its domain keeps a request.
    Busy,
    /// Workers were not given a CPU, and others wait for them at the gate.
    HeldUp,
    /// Workers were not given a CPU, and are not waited for any more.
    Starved,
}

/// One time that the gate is shut.
pub(crate) struct Drain<'a> {
    proxy: &'a DomainProxy,
    /// Nothing, if the device is faulted.
    live: Option<&'a LoadedDomain>,
    options: Options,
    /// Until when starved workers are waited for.
    deadline: Instant,
    watch: Watch,
    missing: Vec<usize>,
    /// Whether the drain timeout was over at an earlier look.
    is_late: bool,
    /// Until when a worker that has come is held up by others, from the gate's shutting on.
    holds_until: Option<Duration>,
    given_up: Option<GivenUp>,
    stuck: Vec<QueueStatus>,
}

impl<'a> Drain<'a> {
    /// Before the gate is shut. Starved workers are waited for until `deadline`.
    pub(crate) fn begin(
        proxy: &'a DomainProxy,
        live: Option<&'a LoadedDomain>,
        options: Options,
        deadline: Instant,
    ) -> Self {
        Self {
            proxy,
            live,
            options,
            deadline,
            watch: Watch::begin(&proxy.queues),
            missing: Vec::new(),
            is_late: false,
            holds_until: None,
            given_up: None,
            stuck: Vec::new(),
        }
    }

    /// After how long it is to be looked at for the first time.
    pub(crate) fn first_look(&self) -> Duration {
        self.options.drain_timeout.min(LOOK_EVERY)
    }

    /// How much longer the workers in these slots are to be waited for; zero gives up.
    pub(crate) fn look(&mut self, missing: &[usize]) -> Duration {
        missing.clone_into(&mut self.missing);
        match self.judge() {
            Ok(longer) => longer,
            Err(why) => {
                // As long as the gate is shut: the workers that have come have nothing in flight.
                self.stuck = self.proxy.queues.stuck();
                self.given_up = Some(why);
                Duration::ZERO
            }
        }
    }

    fn judge(&mut self) -> Result<Duration, GivenUp> {
        if self.live.is_some_and(|live| live.is_dead()) {
            return Err(GivenUp::Dead);
        }
        if self.proxy.is_stopping() {
            return Err(GivenUp::Stopping);
        }
        let patience = self.options.drain_timeout;
        let early = patience.saturating_sub(self.watch.elapsed());
        if !early.is_zero() {
            return Ok(early.min(LOOK_EVERY));
        }
        let (queues, missing) = (&self.proxy.queues, &self.missing);
        let elapsed = self.watch.elapsed();
        if self.holds_until.is_none() && queues.seats().any(|(slot, _)| !missing.contains(&slot)) {
            // A worker that comes after all were late has waited for a CPU itself until now.
            let longer = if self.is_late { 2 * elapsed } else { SHUT_LONGER };
            self.holds_until = Some(elapsed + longer);
        }
        self.is_late = true;
        let left = self.deadline.saturating_duration_since(Instant::now());
        let until = (elapsed + left).min(self.holds_until.unwrap_or(Duration::MAX));
        let bound = until.saturating_sub(patience);
        match self.watch.judge(missing, patience, bound) {
            Late::Wait(longer) => Ok(longer),
            Late::Busy => Err(GivenUp::Busy),
            Late::Both if left.is_zero() => Err(GivenUp::Busy),
            Late::Starved if left.is_zero() => Err(GivenUp::Starved),
            Late::Both | Late::Starved => Err(GivenUp::HeldUp),
        }
    }

    /// Says which workers were starved although all have come.
    pub(crate) fn log_starved(&self) {
        let starved = self.watch.starved(&self.missing);
        if !starved.is_empty() {
            let (waited, starved) = (self.watch.elapsed().as_millis(), say(&starved));
            log::warn!("drained after {waited} ms: starved: {starved}");
        }
    }

    /// What there is to say of a gate that was opened after `pause` without an exchange, and
    /// whether that is the end of it.
    pub(crate) fn refusal(self, stalled: &[usize], pause: Duration) -> (bool, Refusal) {
        let starved = self.watch.starved(stalled);
        let is_over = self.given_up != Some(GivenUp::HeldUp);
        let refusal = match self.given_up {
            Some(GivenUp::Stopping) => stopping(),
            Some(GivenUp::Starved | GivenUp::HeldUp) => {
                Refusal { stuck: self.stuck, ..refusals::starved("not drained", pause, starved) }
            }
            Some(GivenUp::Busy | GivenUp::Dead) | None => {
                let late = self.watch.late(stalled);
                drain_refusal(self.watch.elapsed(), pause, self.stuck, starved, &late)
            }
        };
        (is_over, refusal)
    }
}

fn drain_refusal(
    waited: Duration,
    pause: Duration,
    stuck: Vec<QueueStatus>,
    starved: Vec<Starved>,
    late: &[Starved],
) -> Refusal {
    let blame: Vec<_> = stuck
        .iter()
        .map(|queue| {
            format!(
                "queue {} has {} in flight, the oldest for {} ms",
                queue.index,
                queue.in_flight,
                queue.oldest_age.as_millis()
            )
        })
        .collect();
    let blame = if blame.is_empty() {
        "no request is missing, but a worker did not come to the gate".to_owned()
    } else {
        format!("requests are missing: {}", blame.join("; "))
    };
    // What each has waited for a CPU is what it was not at fault for.
    let cpu = match (starved.is_empty(), late) {
        (false, _) => format!("and starved: {}", say(&starved)),
        (true, []) => "no worker was waited for".to_owned(),
        (true, late) => format!("no CPU was missing: {}", say(late)),
    };
    let blame = format!("{blame} ({cpu})");
    Refusal {
        code: Code::DrainTimeout,
        message: format!(
            "not drained after {} ms: {blame}. The gate was shut for {} ms and is open again; try later, or give --drain-timeout-ms",
            waited.as_millis(),
            pause.as_millis()
        ),
        stuck,
        starved,
    }
}
