//! Takeover: the live domain has panicked, and the standby goes on in its place.
//!
//! ```text
//!   a worker sees the panic -> service is held -> every worker leaves the dead instance
//!     -> the cell is vacated -> the dead instance is destroyed, its threads joined: fenced
//!        -> the predecessor, if it is still in use, or a standby that fits: storage moves, it is
//!           activated, published; unanswered requests run again
//!        -> none: they get I/O errors, the device is faulted until an upgrade
//! ```
//!
//! Invariants: nothing of a dead instance runs beside its successor; what it had completed is
//! answered once, what it had not is run again once per takeover; an instance that died never
//! serves again. A takeover uses the standby up, so a request that kills every domain ends with an
//! I/O error and not in a circle.

use crate::code::Code;
use crate::fence::Verdict;
use crate::report::{Change, Phases, Protocol, Refusal, Report};
use crate::upgrade::{lock, timed};
use crate::worker::OUTSIDE_A_REQUEST;
use crate::{DomainProxy, Member, Service, TAKEOVER_PATIENCE, Upgrades};
use domain_host::{CallError, Instance};
use std::sync::{Arc, MutexGuard, TryLockError, Weak};
use std::time::{Duration, Instant};

/// After so long a worker that does not come out of the dead instance is reported; it is waited for
/// all the same.
const REPORT_AFTER: Duration = Duration::from_secs(2);

/// How often somebody looks who waits for a takeover.
const LOOK_EVERY: Duration = Duration::from_millis(1);

impl DomainProxy {
    /// An instance has died: called by the worker that saw it, which has left it. Any number of
    /// workers may.
    pub(crate) fn died(self: &Arc<Self>, instance: &Arc<Instance>, reason: &str) {
        instance.mark_dead();
        {
            let mut view = lock(&self.view);
            let is_live =
                view.live.as_ref().is_some_and(|live| Arc::ptr_eq(&live.instance, instance));
            if !view.dying.insert(Arc::as_ptr(instance).addr()) {
                return;
            }
            log::error!("generation {} has died: {reason}", instance.generation());
            if is_live {
                self.set_service(Service::Held);
            }
        }
        // Weak, so that nothing else comes to live at its address meanwhile.
        let (proxy, dead, reason) = (Arc::clone(self), Arc::downgrade(instance), reason.to_owned());
        let spawned = std::thread::Builder::new()
            .name("takeover".to_owned())
            .spawn(move || proxy.take_over(&dead, &reason));
        if let Err(error) = spawned {
            log::error!(
                "no thread for the takeover: {error}; its requests wait until somebody looks again"
            );
            lock(&self.view).dying.remove(&Arc::as_ptr(instance).addr());
        }
    }

    /// Looks whether the live domain has died in a call that was no worker's.
    pub(crate) fn notice_death(self: &Arc<Self>) {
        if let Some(live) = self.live().filter(|live| live.instance.is_dead()) {
            self.died(&live.instance, OUTSIDE_A_REQUEST);
        }
    }

    /// Looks which of these have died in a call that was no worker's: the live domain, or one that
    /// was replaced and still has requests.
    pub(crate) fn notice_deaths<'a>(
        self: &Arc<Self>,
        of: impl IntoIterator<Item = &'a Weak<Instance>>,
    ) {
        for instance in
            of.into_iter().filter_map(Weak::upgrade).filter(|instance| instance.is_dead())
        {
            self.died(&instance, OUTSIDE_A_REQUEST);
        }
        self.notice_death();
    }

    /// Waits until nobody is dead who is still to be replaced; `false` after `deadline`, or when
    /// the device is about to end.
    pub(crate) fn wait_alive(self: &Arc<Self>, deadline: Instant) -> bool {
        self.look_until(deadline, || self.is_stopping(), || (!self.is_dying()).then_some(()))
            .is_some()
    }

    /// Takes the upgrade lock while nobody is dead who is still to be replaced: the live domain
    /// lives, or nobody could take over and there is none.
    ///
    /// Returns `None` after `deadline`, or if `give_up` says so.
    pub(crate) fn lock_alive(
        self: &Arc<Self>,
        deadline: Instant,
        give_up: impl Fn() -> bool,
    ) -> Option<MutexGuard<'_, Upgrades>> {
        self.look_until(deadline, give_up, || {
            let upgrades = match self.upgrades.try_lock() {
                Ok(upgrades) => upgrades,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return None,
            };
            // If not, it is let go of: a takeover waits for the lock.
            (!self.is_dying()).then_some(upgrades)
        })
    }

    /// Looks again and again for what comes after a takeover; `None` after `deadline`, or if
    /// `give_up` says so.
    fn look_until<T>(
        self: &Arc<Self>,
        deadline: Instant,
        give_up: impl Fn() -> bool,
        look: impl Fn() -> Option<T>,
    ) -> Option<T> {
        for looks in 1u32.. {
            // Whoever saw it die says so in a moment, and knows how. Again and again, because there
            // may have been no thread for the takeover.
            if looks % 100 == 10 {
                self.notice_death();
            }
            if let Some(found) = look() {
                return Some(found);
            }
            if Instant::now() >= deadline || give_up() {
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        None
    }

    /// Whether a death is not dealt with yet.
    pub(crate) fn is_dying(&self) -> bool {
        let view = lock(&self.view);
        !view.dying.is_empty() || view.live_has_died()
    }

    /// Whether the live domain has died, and is still to be replaced.
    pub(crate) fn live_has_died(&self) -> bool {
        lock(&self.view).live_has_died()
    }

    fn take_over(self: &Arc<Self>, dead: &Weak<Instance>, reason: &str) {
        let address = dead.as_ptr().addr();
        // Out of the dead instance, whoever sleeps with a lane there; an upgrade that drains it
        // finds it dead and gives up.
        self.queues.notify_all();
        let mut upgrades = lock(&self.upgrades);
        let is = |member: &Member| Arc::as_ptr(&member.instance).addr() == address;
        if upgrades.leaving.as_ref().is_some_and(|leaving| is(&leaving.member)) {
            // It had been replaced already: its successor answers what it left.
            while !self.release(&mut upgrades, REPORT_AFTER) {
                log::error!(
                    "a worker is still inside the dead domain; what it left unanswered waits for it"
                );
                if upgrades
                    .leaving
                    .as_ref()
                    .is_some_and(|leaving| leaving.member.fence.abandoned() > 0)
                {
                    // One that has left it for good. It will never be let go.
                    break;
                }
            }
            self.finish_leaving(&mut upgrades, TAKEOVER_PATIENCE, &mut Phases::default());
        } else if self.live().as_ref().is_some_and(is) {
            self.started(Change::Takeover, "standby");
            let result = self.replace_dead(&mut upgrades, reason);
            self.ended(Some(&upgrades), Change::Takeover, &result);
        }
        lock(&self.view).dying.remove(&address);
        drop(upgrades);
        self.queues.notify_all();
    }

    fn replace_dead(
        self: &Arc<Self>,
        upgrades: &mut Upgrades,
        reason: &str,
    ) -> Result<Report, Refusal> {
        let started = Instant::now();
        let mut phases = Phases::default();
        let dead = self.vacate(&mut phases);
        let (from, fence, generation) =
            (dead.record.clone(), Arc::clone(&dead.fence), dead.instance.generation());
        if let Err(why) = self.retire(dead, TAKEOVER_PATIENCE, &mut phases) {
            fence.decide(Verdict::Never);
            self.set_service(Service::Failed);
            return Err(Refusal::new(
                Code::NotFenced,
                format!(
                    "the dead domain cannot be ended ({why}); its requests stay unanswered, because it may still write to them"
                ),
            ));
        }
        let next = self.call_back(upgrades).or_else(|| upgrades.standby.take()).ok_or_else(|| {
            Refusal::new(Code::NoStandby, format!("the live domain has died ({reason}) and there is no standby; upgrade to bring the device back"))
        });
        let taken = next.and_then(|next| {
            let fits = self.check_compatible(&from.info, &next).and_then(|()| {
                self.storage.begin(next.id);
                let activate = || next.instance.activate().and_then(|()| self.catch_up(&next));
                timed(&mut phases.activate, activate).map_err(|error| {
                    Refusal::new(
                        Code::ActivateFailed,
                        format!("the standby did not take over: {error}"),
                    )
                })
            });
            match fits {
                Ok(()) => {
                    self.storage.commit();
                    Ok(next)
                }
                Err(refusal) => {
                    self.storage.rollback();
                    if Arc::strong_count(&next.instance) > 1 {
                        self.leave_again(upgrades, next);
                    } else {
                        // One that was called back had requests, which its workers may just have
                        // let go of.
                        let fence = Arc::clone(&next.fence);
                        let ended = self.retire(next, TAKEOVER_PATIENCE, &mut phases);
                        fence.decide(if ended.is_ok() { Verdict::Fail } else { Verdict::Never });
                    }
                    Err(refusal)
                }
            }
        });
        match taken {
            Ok(next) => {
                next.instance.set_generation(generation + 1);
                self.publish(next.clone());
                fence.decide(Verdict::Replay);
                phases.pause = started.elapsed();
                let protocol = Protocol::Takeover;
                Ok(Report { generation: generation + 1, protocol, from, to: next.record, phases })
            }
            Err(refusal) => {
                self.set_service(Service::Failed);
                fence.decide(Verdict::Fail);
                Err(refusal)
            }
        }
    }

    /// Has a successor make durable what the dead one had completed, if nothing may be volatile.
    pub(crate) fn catch_up(&self, next: &Member) -> Result<(), CallError> {
        self.environment.catch_up(&next.instance).or_else(|error| {
            if next.instance.is_dead() {
                return Err(error);
            }
            // It can serve all the same.
            let sentence = format!(
                "what the dead domain wrote last, with its write cache off, may not be on the disk: {error}"
            );
            log::error!("{sentence}");
            self.leave_behind(&sentence);
            Ok(())
        })
    }

    /// Takes the dead instance out of the cell, and waits until every worker has left it.
    fn vacate(&self, phases: &mut Phases) -> Member {
        let waited = Instant::now();
        let dead = self.take_live();
        let mut grace = Some(self.cell().swap(None).unwrap_or_else(|error| {
            unreachable!("under the upgrade lock, on a thread without a reader: {error}")
        }));
        let mut reported = false;
        loop {
            self.queues.notify_all();
            grace = grace.and_then(|grace| {
                grace.wait(Duration::from_millis(20)).err().map(|(grace, _)| grace)
            });
            if grace.is_none() && Arc::strong_count(&dead.instance) == 1 + dead.fence.abandoned() {
                break;
            }
            if !reported && waited.elapsed() >= REPORT_AFTER {
                reported = true;
                log::error!(
                    "a worker is still inside the dead domain after {} s; the takeover waits for it",
                    REPORT_AFTER.as_secs()
                );
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        phases.drain = waited.elapsed();
        dead
    }
}
