//! The way of an upgrade: verify, load, prepare, [gate, drain, quiesce, activate], publish, open,
//! grace, retire.
//!
//! ```text
//!        refused            refused           refused, old domain resumes
//!           ^                  ^                          ^
//!   verify, load, prepare -> swap? --no--> gate -> drain, quiesce, activate -> publish, open
//!                              |                                                   |
//!                              +--yes--> activate -> publish                       |
//!                                                      |                           |
//!                                                      +--------> grace <----------+
//!                                                                   |
//!                          the standby before is retired <----------+
//!                                                                   v
//!                                              the old instance is the standby
//! ```
//!
//! Invariants: everything that can be refused without touching the live domain is refused before
//! the gate shuts. Inside the bracket each failure puts the storage back. Once published, nothing
//! is undone: what cannot be retired is reported as resident.

use crate::change::compatible::decide;
use crate::change::handover::{Step, step_refusal};
use crate::change::wait::TAKEOVER_PATIENCE;
use crate::device::{Changing, DomainProxy, Others};
use crate::domain::LoadedDomain;
use crate::record::code::Code;
use crate::record::report::{
    Change, Options, Outcome, Phases, Protocol, Refusal, Report, WhenBusy, timed,
};
use crate::signal::lock;
use domain_abi::{DeviceInfo, Params};
use std::sync::{Arc, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

/// Between two looks at whether another change has ended.
const TRY_AGAIN: Duration = Duration::from_millis(2);

/// Between two looks at whether a standby is still on its way; each change is seen at once.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

fn is_busy() -> Refusal {
    let message = "another upgrade is under way; try again when it has ended";
    Refusal::new(Code::Busy, message)
}

/// What a change has prepared before it has the lock of changes.
pub(crate) trait Prepared {
    /// It is not wanted.
    fn give_up(self, proxy: &DomainProxy, limit: Duration);
}

/// A module that was loaded.
impl Prepared for (LoadedDomain, Phases) {
    fn give_up(self, proxy: &DomainProxy, limit: Duration) {
        // It was never live, so it has no requests.
        let _ = proxy.retire(self.0, limit, &mut Phases::default());
    }
}

/// Nothing is to be prepared: the standby, or the live domain, is there already.
pub(crate) struct Nothing;

impl Prepared for Nothing {
    fn give_up(self, _: &DomainProxy, _: Duration) {}
}

impl DomainProxy {
    /// Replaces the live domain with the module `name`.
    ///
    /// # Errors
    /// Why it was refused; the device is as it was.
    pub fn upgrade(
        self: &Arc<Self>,
        name: &str,
        params: Params,
        options: Options,
    ) -> Result<Report, Refusal> {
        let mut phases = Phases::default();
        // Without the lock: a takeover must not wait for a domain that takes its time to prepare.
        let prepare = || {
            self.canary.check_idle()?;
            let live = self.record();
            let is_wanted = || self.check_stopping();
            let next = self.preparer.prepare(name, params, Some(&live), is_wanted, &mut phases)?;
            Ok((next, phases))
        };
        self.recorded(Change::Upgrade, name, options, prepare, |others, (next, phases)| {
            self.replace(others, Arc::clone(next), options, *phases)
        })
    }

    /// Makes the standby the live domain again.
    ///
    /// # Errors
    /// Why it was refused; the device is as it was.
    pub fn rollback(self: &Arc<Self>, options: Options) -> Result<Report, Refusal> {
        let prepare = || Ok(Nothing);
        self.recorded(Change::Rollback, "standby", options, prepare, |others, Nothing| {
            self.bring_standby_back(others, options)
        })
    }

    pub(crate) fn bring_standby_back(
        self: &Arc<Self>,
        others: &mut Others,
        options: Options,
    ) -> Result<Report, Refusal> {
        let Some(standby) = others.standby.take() else {
            return Err(Refusal::new(
                Code::NoStandby,
                "there is no standby to roll back to: none was upgraded away from yet, or it was used up; upgrade to the module that you want",
            ));
        };
        let kept = Arc::clone(&standby);
        let result = self.replace(others, standby, options, Phases::default());
        if result.is_err() {
            if kept.is_dead() {
                // It was replaced before, and has no requests.
                let _ = self.retire(kept, options.limit(), &mut Phases::default());
            } else {
                others.standby = Some(kept);
            }
        }
        result
    }

    /// One at a time; puts what happens into state, history and log. `prepare` runs without the
    /// lock of changes, `change_over` with it; it is held until the history has the entry, so that
    /// no takeover of the new live domain is told of first. If a takeover comes first,
    /// `change_over` is tried again after it.
    pub(crate) fn recorded<T: Prepared, R: Clone + Into<Outcome>>(
        self: &Arc<Self>,
        change: Change,
        target: &str,
        options: Options,
        prepare: impl FnOnce() -> Result<T, Refusal>,
        mut change_over: impl FnMut(&mut Others, &T) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        let _operator = self.operate(options)?;
        self.started(change, target);
        let (others, result) = match self.prepare_after_earlier(options, prepare) {
            Ok(prepared) => {
                let (others, result) =
                    self.try_until_alive(options, |others| change_over(others, &prepared));
                if result.is_err() {
                    prepared.give_up(self, options.limit());
                }
                (others, result)
            }
            Err(refusal) => (None, Err(refusal)),
        };
        self.ended(others.as_deref(), change, &result);
        result
    }

    /// Takes the lock of operators, when no standby is on its way.
    pub(super) fn operate(&self, options: Options) -> Result<MutexGuard<'_, ()>, Refusal> {
        let operator = match (options.when_busy, self.operator.try_lock()) {
            (_, Ok(operator)) => operator,
            (_, Err(TryLockError::Poisoned(poisoned))) => poisoned.into_inner(),
            (WhenBusy::Queue, Err(TryLockError::WouldBlock)) => lock(&self.operator),
            (WhenBusy::Refuse, Err(TryLockError::WouldBlock)) => return Err(is_busy()),
        };
        let holds_up = || self.coming.holds_up(TAKEOVER_PATIENCE);
        let may_begin = || (!holds_up() || self.is_stopping()).then_some(());
        while may_begin().is_none() {
            if options.when_busy == WhenBusy::Refuse {
                return Err(is_busy());
            }
            let _ = self.signal.wait(Instant::now() + LOOK_AGAIN, may_begin);
        }
        Ok(operator)
    }

    /// As [`operate`](Self::operate), but waits no longer than for what is in flight.
    pub(super) fn operate_soon(&self, options: Options) -> Result<MutexGuard<'_, ()>, Refusal> {
        let deadline = Instant::now() + options.drain_timeout;
        let at_once = Options { when_busy: WhenBusy::Refuse, ..options };
        loop {
            match self.operate(at_once) {
                Err(_) if Instant::now() < deadline => std::thread::sleep(TRY_AGAIN),
                taken => return taken,
            }
        }
    }

    /// Prepares a change, when what an earlier one could not finish is.
    pub(super) fn prepare_after_earlier<T>(
        self: &Arc<Self>,
        options: Options,
        prepare: impl FnOnce() -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        self.check_stopping()
            .and_then(|()| self.finish_earlier(&mut *self.lock_after_takeover(options)?, options))
            // It is asked once more before the change.
            .or_else(|refusal| if refusal.code == Code::Preempted { Ok(()) } else { Err(refusal) })
            .and_then(|()| prepare())
    }

    /// Makes a change, after each takeover that comes first: the checks are made anew then, because
    /// another domain serves, or none. Comes back with the lock, unless a takeover has it for too
    /// long.
    pub(super) fn try_until_alive<R>(
        self: &Arc<Self>,
        options: Options,
        mut attempt: impl FnMut(&mut Others) -> Result<R, Refusal>,
    ) -> (Option<Changing<'_>>, Result<R, Refusal>) {
        loop {
            let mut others = match self.lock_after_takeover(options) {
                Ok(others) => others,
                Err(refusal) => return (None, Err(refusal)),
            };
            // A takeover leaves a domain behind if its standby could not serve and is still in use.
            let result =
                self.finish_earlier(&mut others, options).and_then(|()| attempt(&mut others));
            // Each takeover uses an instance up, so this ends.
            if !result.as_ref().is_err_and(|refusal| refusal.code == Code::Preempted) {
                return (Some(others), result);
            }
        }
    }

    /// Takes the lock of changes when no takeover is under way, or to come.
    pub(crate) fn lock_after_takeover(
        self: &Arc<Self>,
        options: Options,
    ) -> Result<Changing<'_>, Refusal> {
        let patience = options.limit();
        let deadline = Instant::now() + patience;
        self.lock_alive(deadline, || self.is_stopping()).ok_or_else(|| {
            self.check_stopping().err().unwrap_or_else(|| {
                Refusal::new(
                    Code::Preempted,
                    format!(
                        "a takeover, or the end of a domain that was replaced, has not ended after {} ms; look at `status`, then try again",
                        patience.as_millis()
                    ),
                )
            })
        })
    }

    /// The live domain. If it has died and that is not known yet, the takeover comes first.
    pub(crate) fn live_noticed(self: &Arc<Self>) -> Option<LoadedDomain> {
        self.notice_death();
        self.live()
    }

    /// All that is decided of a successor before the gate.
    pub(crate) fn accept(
        &self,
        told: &DeviceInfo,
        live: Option<&LoadedDomain>,
        next: &LoadedDomain,
        options: Options,
    ) -> Result<Protocol, Refusal> {
        self.check_stopping()?;
        self.check_compatible(told, next)?;
        decide(options.mode, live, next)
    }

    /// Brings `next` into service in place of the live domain. If it is refused, what becomes of it
    /// is the caller's.
    pub(crate) fn replace(
        self: &Arc<Self>,
        others: &mut Others,
        next: LoadedDomain,
        options: Options,
        mut phases: Phases,
    ) -> Result<Report, Refusal> {
        let from = self.record();
        let live = self.live_noticed();
        let decided = self.accept(&from.info, live.as_ref(), &next, options);
        let (protocol, grace) = match (decided?, &live) {
            (_, None) => {
                let generation = self.next_generation();
                self.recover(&next, generation, options.limit(), &mut phases)?;
                (Protocol::Handover, None)
            }
            (protocol, Some(live)) => {
                // Rings that run have claimed what is lost, and not what `next` has.
                let is_lost = self.preparer.images.any_lost();
                let claim = is_lost.then(|| self.claim_for(&next, options.limit()));
                let _claim = claim.transpose()?;
                if protocol == Protocol::Swap {
                    (protocol, Some(self.swap(&next, &mut phases)?))
                } else {
                    self.handover(live, &next, options, &mut phases)?;
                    (Protocol::Handover, None)
                }
            }
        };
        let generation = next.instance.generation();
        self.set_live(&next);
        self.queues.notify_all();
        if next.record().params != from.params {
            // It may be the first that claims anything.
            self.settle_claim();
        }
        let report = Report { generation, protocol, from, to: next.record(), phases };
        drop(next);
        Ok(match live {
            Some(live) => self.release_old(others, live, grace, options, report),
            None => report,
        })
    }

    /// Brings the device back whose live domain has died. To claim it may take as long as `limit`.
    pub(crate) fn recover(
        &self,
        next: &LoadedDomain,
        generation: u64,
        limit: Duration,
        phases: &mut Phases,
    ) -> Result<(), Refusal> {
        self.storage.begin(next.id);
        // It was told of the write cache while the dead one may still have served.
        let activate = || next.instance.activate().and_then(|()| self.catch_up(next));
        if let Err(error) = timed(&mut phases.activate, activate) {
            self.storage.rollback();
            return Err(step_refusal(Step::Activate, &next.record(), &error));
        }
        let _claim = self.claim_for(next, limit).inspect_err(|_| self.storage.rollback())?;
        self.keeping.serves(next, generation, None);
        self.storage.commit();
        next.instance.set_generation(generation);
        self.publish(next);
        Ok(())
    }

    fn swap(
        &self,
        next: &LoadedDomain,
        phases: &mut Phases,
    ) -> Result<srcu::Grace<Option<LoadedDomain>>, Refusal> {
        self.storage.begin(next.id);
        if let Err(error) = timed(&mut phases.activate, || next.instance.activate()) {
            self.storage.rollback();
            return Err(step_refusal(Step::Activate, &next.record(), &error));
        }
        next.instance.set_generation(self.next_generation());
        let grace = self.cell.swap(Some(Arc::clone(next))).map_err(|error| {
            self.storage.rollback();
            Refusal::new(Code::Busy, format!("the domain was not published: {error}"))
        })?;
        self.keeping.serves(next, next.instance.generation(), None);
        self.storage.commit();
        Ok(grace)
    }

    /// How much longer starved workers are waited for: not at all when the daemon ends.
    pub(crate) fn patience(&self, options: Options) -> Duration {
        if self.is_stopping() { Duration::ZERO } else { options.starved_timeout }
    }
}
