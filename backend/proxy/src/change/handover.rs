//! A handover: the gate is shut, every worker comes to it, and the storage changes its owner.
//!
//! Inside the bracket each failure puts the storage back, and the old domain resumes. How long
//! workers are waited for is in `drain.rs`.

use crate::change::drain::Drain;
use crate::change::refusals::preempted;
use crate::device::DomainProxy;
use crate::domain::LoadedDomain;
use crate::record::code::Code;
use crate::record::report::{DomainRecord, Options, Phases, Refusal, timed};
use crate::signal::lock;
use domain_host::CallError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long the gate is open before the second try, if starved workers held others up at it. Twice
/// as long each time, but no longer than it was shut, so that a starved worker, whenever it is
/// given a CPU, finds it shut every other time at least.
const OPEN_FIRST: Duration = Duration::from_millis(50);

/// How long it is open between two tries at most.
const OPEN_LONGEST: Duration = Duration::from_secs(1);

/// How a try at a handover ended that was not refused.
enum Tried {
    Done,
    /// Starved workers held others up at the gate, which is open again.
    HeldUp {
        /// If it is not tried again.
        refusal: Refusal,
        pause: Duration,
    },
}

/// What the exchange tells the upgrading thread.
#[derive(Default)]
pub(crate) struct ExchangeNotes {
    quiesce: Duration,
    activate: Duration,
    pub(crate) refusal: Option<Refusal>,
    /// The old domain could not be put back.
    pub(crate) fault: Option<String>,
    /// The device was given to another process, and is this one's again.
    pub(crate) came_back: bool,
}

impl ExchangeNotes {
    /// The live domain writes down what only it knows. `None` if it does not: then it has resumed,
    /// or died.
    pub(crate) fn quiesce(&mut self, live: &LoadedDomain) -> Option<()> {
        if live.is_dead() {
            self.refusal = Some(preempted());
            return None;
        }
        let Err(error) = timed(&mut self.quiesce, || live.instance.quiesce()) else {
            return Some(());
        };
        if live.is_dead() {
            // Since we looked, in a call that was no worker's.
            self.refusal = Some(preempted());
            return None;
        }
        self.resume(live);
        self.refusal = Some(step_refusal(Step::Quiesce, &live.record(), &error));
        None
    }

    /// It serves again.
    pub(crate) fn resume(&mut self, live: &LoadedDomain) {
        if let Err(error) = live.instance.resume() {
            self.fault = Some(format!("resume: {error}"));
        }
    }
}

/// Makes what is to run while every worker is at the gate.
type MakeExchange<'a> =
    &'a dyn Fn(Arc<Mutex<ExchangeNotes>>) -> srcu::Exchange<Option<LoadedDomain>>;

impl DomainProxy {
    /// Brings `next` into service, with the gate shut.
    pub(crate) fn handover(
        self: &Arc<Self>,
        live: &LoadedDomain,
        next: &LoadedDomain,
        options: Options,
        phases: &mut Phases,
    ) -> Result<(), Refusal> {
        self.keeping.may_serve(next, self.next_generation(), live);
        let exchange = |notes| exchange(self, live, next, notes);
        self.at_the_gate(Some(live), options, phases, &exchange)
    }

    /// Tries until the workers have come, they are not waited for any more, or one hangs.
    ///
    /// While the gate is shut for starved workers alone, it stays shut. Where a worker that has
    /// come waits at it, too, the gate is opened between two tries, for ever longer: the requests
    /// of that queue would wait for another queue's worker.
    pub(crate) fn at_the_gate(
        self: &Arc<Self>,
        live: Option<&LoadedDomain>,
        options: Options,
        phases: &mut Phases,
        exchange: MakeExchange<'_>,
    ) -> Result<(), Refusal> {
        let deadline = Instant::now() + options.limit();
        let mut open = OPEN_FIRST;
        loop {
            let tried = self.try_at_the_gate(live, options, deadline, phases, exchange)?;
            let (refusal, pause) = match tried {
                Tried::Done => return Ok(()),
                Tried::HeldUp { refusal, pause } => (refusal, pause),
            };
            let until = Instant::now() + open.min(pause.max(OPEN_FIRST));
            if until >= deadline {
                return Err(refusal);
            }
            let has_died = || live.is_some_and(|live| live.is_dead());
            let is_over = || (has_died() || self.is_stopping()).then_some(());
            if self.signal.wait(until, is_over).is_some() {
                self.check_stopping()?;
                return Err(preempted());
            }
            open = (open * 2).min(OPEN_LONGEST);
        }
    }

    /// Shuts the gate once; starved workers are not waited for after `deadline`.
    fn try_at_the_gate(
        self: &Arc<Self>,
        live: Option<&LoadedDomain>,
        options: Options,
        deadline: Instant,
        phases: &mut Phases,
        exchange: MakeExchange<'_>,
    ) -> Result<Tried, Refusal> {
        let notes = Arc::new(Mutex::new(ExchangeNotes::default()));
        let exchange = exchange(Arc::clone(&notes));
        let mut drain = Drain::begin(self, live, options, deadline);
        let wake_owing = || self.queues.notify_all();
        let outcome =
            self.cell.handover_while(exchange, wake_owing, drain.first_look(), |stalled| {
                drain.look(&stalled.readers)
            });
        // Whatever happened, kicks may have been consumed while the gate was shut.
        self.queues.notify_all();
        let outcome = outcome
            .map_err(|error| Refusal::new(Code::Busy, format!("the gate was not shut: {error}")))?;
        let mut notes = std::mem::take(&mut *lock(&notes));
        phases.quiesce = notes.quiesce;
        phases.activate = notes.activate;
        if let (Some(fault), Some(live)) = (notes.fault.take(), live) {
            self.died(live, &fault);
        }
        let (stalled, pause) = match outcome {
            srcu::Handover::TimedOut { stalled, pause } => (stalled, pause),
            srcu::Handover::Done { old, drain: drained, pause, panic } => {
                phases.drain = drained;
                phases.pause = pause;
                drain.log_starved();
                if let Some(panic) = panic {
                    std::panic::resume_unwind(panic);
                }
                return match (old, notes.refusal) {
                    (Some(_old), None) => Ok(Tried::Done),
                    (None, Some(refusal)) => Err(refusal),
                    (None, None) if notes.came_back => Ok(Tried::Done),
                    (old, refusal) => {
                        unreachable!("published: {}, refused: {refusal:?}", old.is_some())
                    }
                };
            }
        };
        if live.is_some_and(|live| live.is_dead()) {
            return Err(preempted());
        }
        let (is_over, refusal) = drain.refusal(&stalled.readers, pause);
        if is_over { Err(refusal) } else { Ok(Tried::HeldUp { refusal, pause }) }
    }
}

/// What runs while every worker is at the gate.
fn exchange(
    proxy: &DomainProxy,
    live: &LoadedDomain,
    next: &LoadedDomain,
    notes: Arc<Mutex<ExchangeNotes>>,
) -> srcu::Exchange<Option<LoadedDomain>> {
    let (storage, generation) = (Arc::clone(&proxy.storage), proxy.next_generation());
    let (live, next) = (Arc::clone(live), Arc::clone(next));
    let keeping = Arc::clone(&proxy.keeping);
    Box::new(move |_| {
        let mut notes = lock(&notes);
        notes.quiesce(&live)?;
        storage.begin(next.id);
        if let Err(error) = timed(&mut notes.activate, || next.instance.activate()) {
            storage.rollback();
            notes.resume(&live);
            notes.refusal = Some(step_refusal(Step::Activate, &next.record(), &error));
            return None;
        }
        // What is kept for another server is told of in this, if the storage has changed: it could
        // not go on with the old domain and what the new one has made of it.
        keeping.serves(&next, generation, Some(&live));
        storage.commit();
        next.instance.set_generation(generation);
        Some(Some(next))
    })
}

/// A call that a domain gets while the storage changes its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Quiesce,
    Activate,
}

/// Why a domain was not brought through a step.
pub(crate) fn step_refusal(step: Step, record: &DomainRecord, error: &CallError) -> Refusal {
    let has_panicked = matches!(error, CallError::Panicked(_));
    let (name, code) = match (step, has_panicked) {
        (Step::Quiesce, false) => ("quiesce", Code::QuiesceFailed),
        (Step::Quiesce, true) => ("quiesce", Code::QuiescePanicked),
        (Step::Activate, false) => ("activate", Code::ActivateFailed),
        (Step::Activate, true) => ("activate", Code::ActivatePanicked),
    };
    Refusal::new(
        code,
        format!("{name} of `{}` {} did not work: {error}", record.name, record.version),
    )
}
