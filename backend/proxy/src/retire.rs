//! Letting go: what becomes of an instance that was replaced, and of what cannot be ended.
//!
//! ```text
//!             it is not used any more           the next one is let go
//!   leaving -------------------------> standby ------------------------> retired: gone,
//!      |  |                                                              or resident
//!      |  |                                                                 ^
//!      |  +-- it has died --------------------------------------------------+
//!      +-- its successor has died: it serves again
//! ```
//!
//! A change waits for its predecessor to be let go, but not for ever. Then the predecessor is
//! *leaving*: `status` shows it, no upgrade is taken, and a thread looks after it, so that both end
//! when its last request does and not at the next command.
//!
//! Invariants: at most one instance is leaving; a dead one never becomes the standby; what stays
//! mapped is reported as long as it does, by a look at what is there now.

use crate::code::Code;
use crate::fence::Verdict;
use crate::report::{Options, Phases, Refusal, Report};
use crate::starved::{Late, Watch};
use crate::upgrade::{lock, preempted, starved_refusal, timed};
use crate::{DomainProxy, Member, Upgrades};
use domain_host::{Instance, Residency, Resident};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

/// How long a committed change waits for its predecessor to be let go before it reports it as
/// resident.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// About as long as it takes a worker to be woken and to attach.
const SOON: Duration = Duration::from_micros(50);

/// How long a change waits for the predecessor of the one before to be let go.
const SETTLE_PATIENCE: Duration = Duration::from_millis(100);

/// How often it looks.
const SETTLE_LOOK: Duration = Duration::from_millis(1);

/// How long what has only looked at an instance takes to let go of it, at most.
const MOMENT: Duration = Duration::from_secs(1);

/// How often an instance that is leaving is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// An instance that was replaced and may still be in use.
pub(crate) struct Leaving {
    pub(crate) member: Member,
    grace: Option<srcu::Grace<Option<Member>>>,
}

impl DomainProxy {
    /// Lets go of the instance that served until now: it becomes the standby, and the standby
    /// before it is retired.
    pub(crate) fn settle_old(
        self: &Arc<Self>,
        upgrades: &mut Upgrades,
        old: Member,
        grace: Option<srcu::Grace<Option<Member>>>,
        options: Options,
        mut report: Report,
    ) -> Report {
        upgrades.leaving = Some(Leaving { member: old, grace });
        // A live domain that has died is not to wait for its predecessor, which is about to serve
        // again. It may have died before it was said to be the live one.
        let died = || self.live_has_died();
        if timed(&mut report.phases.grace, || self.release_unless(upgrades, RELEASE_TIMEOUT, died))
        {
            self.finish_leaving(upgrades, options.limit(), &mut report.phases);
        } else {
            if !died() {
                log::warn!(
                    "generation {} is still in use {} s after it was replaced; it stays resident and no upgrade is taken until it is let go",
                    report.generation - 1,
                    RELEASE_TIMEOUT.as_secs()
                );
            }
            self.look_after_leaving();
        }
        report
    }

    /// Has a thread finish what this change could not.
    fn look_after_leaving(self: &Arc<Self>) {
        // Weak: the thread is no reason to keep the device.
        let proxy = Arc::downgrade(self);
        let look = move || {
            loop {
                std::thread::sleep(LOOK_EVERY);
                let Some(proxy) = proxy.upgrade() else { return };
                // Whoever has the lock settles it himself, or leaves it to the next look.
                let mut upgrades = match proxy.upgrades.try_lock() {
                    Ok(upgrades) => upgrades,
                    Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                    Err(TryLockError::WouldBlock) => continue,
                };
                if proxy.release(&mut upgrades, Duration::ZERO) {
                    proxy.finish_leaving(&mut upgrades, RELEASE_TIMEOUT, &mut Phases::default());
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("leaving".to_owned()).spawn(look) {
            log::warn!(
                "nobody looks after the instance that is leaving until the next upgrade: {error}"
            );
        }
    }

    /// What was leaving has been let go of: it becomes the standby, unless it is dead. What is to
    /// end for it, and is being told something, is waited for as long as `limit`.
    pub(crate) fn finish_leaving(
        &self,
        upgrades: &mut Upgrades,
        limit: Duration,
        phases: &mut Phases,
    ) {
        let Some(Leaving { member, .. }) = upgrades.leaving.take() else { return };
        if !member.instance.is_dead() {
            if let Some(before) = upgrades.standby.replace(member) {
                // It has no requests that anybody could run again.
                let _ = self.retire(before, limit, phases);
            }
            lock(&self.view).show(upgrades);
            return;
        }
        // Never a standby: it has shown that it breaks. Once it is gone, its successor answers what
        // it left.
        let fence = Arc::clone(&member.fence);
        if let Err(why) = self.retire(member, limit, phases) {
            fence.decide(Verdict::Never);
            lock(&self.view).fault = Some(format!(
                "the domain that was replaced last has died and cannot be ended ({why}); its requests stay unanswered, because it may still write to them"
            ));
        } else {
            fence.decide(Verdict::Replay);
        }
        lock(&self.view).show(upgrades);
        self.queues.notify_all();
    }

    /// Calls the instance back that is leaving, for the live one has died. If it lives, it is
    /// nearer than the standby: it may have requests that only it can answer.
    pub(crate) fn call_back(&self, upgrades: &mut Upgrades) -> Option<Member> {
        let Leaving { member, grace } =
            upgrades.leaving.take_if(|leaving| !leaving.member.instance.is_dead())?;
        // Every worker has passed since it was replaced, or the one that has died would not be
        // fenced off.
        drop(grace.map(|grace| grace.wait(Duration::from_secs(1))));
        Some(member)
    }

    /// Lets an instance go that was called back and cannot serve.
    pub(crate) fn leave_again(self: &Arc<Self>, upgrades: &mut Upgrades, member: Member) {
        upgrades.leaving = Some(Leaving { member, grace: None });
        self.look_after_leaving();
    }

    /// Whether the instance that is leaving is not used by any worker any more.
    pub(crate) fn release(&self, upgrades: &mut Upgrades, timeout: Duration) -> bool {
        self.release_unless(upgrades, timeout, || false)
    }

    /// Does not wait if `not_now`.
    fn release_unless(
        &self,
        upgrades: &mut Upgrades,
        timeout: Duration,
        not_now: impl Fn() -> bool,
    ) -> bool {
        let Some(leaving) = &mut upgrades.leaving else { return true };
        let deadline = Instant::now() + timeout;
        if let Some(grace) = leaving.grace.take() {
            match grace.wait(timeout) {
                Ok(cell_reference) => drop(cell_reference),
                Err((grace, stalled)) => {
                    leaving.grace = Some(grace);
                    log::debug!("readers {:?} have not passed yet", stalled.readers);
                    return false;
                }
            }
        }
        // Workers attach to the new instance when they come by, and let go of the old one when
        // nothing is in flight there. They are on their way by now, most often on another CPU: to
        // sleep at once would cost them and us more than it takes them to come.
        let awaited = deadline.min(Instant::now() + SOON);
        while Arc::strong_count(&leaving.member.instance) > 1 && Instant::now() < awaited {
            std::hint::spin_loop();
        }
        let mut looks = 0u32;
        while Arc::strong_count(&leaving.member.instance) > 1 {
            if Instant::now() >= deadline || not_now() {
                return false;
            }
            looks += 1;
            std::thread::sleep(Duration::from_micros(u64::from(looks.min(20)) * 10));
        }
        true
    }

    /// Finishes what an earlier change could not: an upgrade must find at most one instance that is
    /// leaving.
    pub(crate) fn settle(&self, upgrades: &mut Upgrades, options: Options) -> Result<(), Refusal> {
        let mut watch = None;
        while let Some(leaving) = &upgrades.leaving {
            let generation = leaving.member.instance.generation();
            if self.release(upgrades, Duration::ZERO) {
                break;
            }
            if self.live_has_died() {
                // The takeover needs the lock, and perhaps this instance.
                return Err(preempted());
            }
            let watch = watch.get_or_insert_with(|| Watch::begin(&self.queues));
            let users = self.queues.attached_to(generation);
            match watch.judge(&users, SETTLE_PATIENCE, self.patience(options)) {
                Late::Wait(longer) => std::thread::sleep(longer.min(SETTLE_LOOK)),
                Late::Busy => {
                    return Err(Refusal {
                        starved: watch.starved(&users),
                        ..Refusal::new(
                            Code::PreviousInUse,
                            "the instance that was replaced last still has requests in flight; see `status`, and try again when they have ended",
                        )
                    });
                }
                Late::Starved => {
                    let what = "the instance that was replaced last is still in use";
                    return Err(starved_refusal(what, Duration::ZERO, watch.starved(&users)));
                }
            }
        }
        self.finish_leaving(upgrades, options.limit(), &mut Phases::default());
        Ok(())
    }

    /// Ends an instance that nobody uses. If that is not certain to have worked, it may still write
    /// to the requests that it has: the error says why.
    ///
    /// One that is being told something is waited for as long as `limit`, but not when the live
    /// domain has died or the device is about to end. Then it ends at a later look.
    pub(crate) fn retire(
        &self,
        member: Member,
        limit: Duration,
        phases: &mut Phases,
    ) -> Result<(), String> {
        let Member { id, instance, record, .. } = member;
        let label = format!("`{}` {}", record.name, record.version);
        let not_now = || self.is_stopping() || self.live_has_died();
        let mut spent = Duration::ZERO;
        let (destroyed, residency) =
            timed(&mut spent, || match into_inner(instance, limit, not_now) {
                Ok(instance) => {
                    let retired = instance.retire();
                    self.storage.reclaim(id);
                    (retired.destroyed, retired.residency)
                }
                Err(shared) => {
                    let storage = Arc::clone(&self.storage);
                    let reclaim = move || {
                        storage.reclaim(id);
                    };
                    (Ok(()), Residency::Running(ends_later(shared, reclaim)))
                }
            });
        phases.retire += spent;
        self.note_residency(&label, &residency);
        // What broke off may be what was to wait for the kernel or a thread of its own.
        let broke_off = destroyed.err().map(|error| {
            log::warn!("{label} did not end well: {error}");
            format!("its end broke off: {error}")
        });
        let runs = match &residency {
            Residency::Running(left) => Some(left.reason().to_owned()),
            _ => None,
        };
        let why: Vec<String> = broke_off.into_iter().chain(runs).collect();
        if why.is_empty() { Ok(()) } else { Err(why.join("; ")) }
    }

    pub(crate) fn note_residency(&self, label: &str, residency: &Residency) {
        if let Residency::Resident(left) | Residency::Running(left) = residency {
            log::warn!("the module of {label} stays resident: {}", left.reason());
            lock(&self.view).resident.push((label.to_owned(), left.clone()));
        }
    }

    /// What is mapped now though nothing needs it, and why.
    pub(crate) fn residents(&self) -> Vec<String> {
        let known = lock(&self.view).resident.clone();
        // Without the lock: a look may have to end a module.
        let (gone, there): (Vec<_>, Vec<_>) =
            known.into_iter().partition(|(_, left)| left.is_gone());
        let mut view = lock(&self.view);
        view.resident.retain(|(label, left)| {
            let is_gone = gone.iter().any(|(_, other)| other.is(left));
            if is_gone {
                log::info!("the module of {label} is gone now");
            }
            !is_gone
        });
        let there = there.iter().map(|(label, left)| format!("{label}: {}", left.reason()));
        there.chain(view.leaving.clone()).collect()
    }
}

/// Takes an instance out of its `Arc`. What has looked at it through a `Weak` is gone in a moment,
/// unless it is telling it something: for that it is waited as long as `limit`, or until `not_now`.
fn into_inner(
    mut instance: Arc<Instance>,
    limit: Duration,
    not_now: impl Fn() -> bool,
) -> Result<Instance, Arc<Instance>> {
    let began = Instant::now();
    loop {
        instance = match Arc::try_unwrap(instance) {
            Ok(instance) => return Ok(instance),
            Err(shared) => shared,
        };
        let waited = began.elapsed();
        if waited >= limit.max(MOMENT) || waited >= MOMENT && not_now() {
            return Err(instance);
        }
        std::thread::sleep(SETTLE_LOOK);
    }
}

/// An instance that is still being told something: a look ends it when that is over.
fn ends_later(instance: Arc<Instance>, ended: impl Fn() + Send + Sync + 'static) -> Resident {
    /// What is left of it.
    enum Left {
        Used(Arc<Instance>),
        Mapped(Resident),
        Nothing,
    }
    let left = Mutex::new(Left::Used(instance));
    Resident::new("it is still in use", move || {
        let mut left = lock(&left);
        *left = match std::mem::replace(&mut *left, Left::Nothing) {
            Left::Used(instance) => match Arc::try_unwrap(instance) {
                Err(shared) => Left::Used(shared),
                Ok(instance) => {
                    let residency = instance.retire().residency;
                    ended();
                    match residency {
                        Residency::Gone => Left::Nothing,
                        Residency::Resident(left) | Residency::Running(left) => Left::Mapped(left),
                    }
                }
            },
            Left::Mapped(resident) if !resident.is_gone() => Left::Mapped(resident),
            Left::Mapped(_) | Left::Nothing => Left::Nothing,
        };
        matches!(*left, Left::Nothing)
    })
}
