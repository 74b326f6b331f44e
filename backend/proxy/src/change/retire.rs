//! Letting go: what becomes of an instance that was replaced, and of what cannot be ended.
//!
//! ```text
//!             it is not used any more           the next one is let go
//!   retiring ------------------------> standby ------------------------> retired: gone,
//!      |  |                                                              or resident
//!      |  |                                                                 ^
//!      |  +-- it has died --------------------------------------------------+
//!      +-- its successor has died: it serves again
//! ```
//!
//! A change waits for its predecessor to be let go, but not for ever. Then the predecessor is
//! *retiring*: `status` shows it, no upgrade is taken, and a thread looks after it, so that both
//! end when its last request does and not at the next command.
//!
//! Invariants: at most one instance is retiring; a dead one never becomes the standby; what stays
//! mapped is reported as long as it does, by a look at what is there now.

use crate::change::fence::Verdict;
use crate::change::refusals::{self, preempted};
use crate::change::starved::{Late, Watch};
use crate::device::{DomainProxy, Others, Retiring};
use crate::domain::LoadedDomain;
use crate::record::code::Code;
use crate::record::report::{Options, Phases, Refusal, Report, timed};
use crate::signal::{Signal, lock};
use domain_host::{Instance, Residency, Resident};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// How long a committed change waits for its predecessor to be let go before it reports it as
/// resident.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// About as long as it takes a worker to be woken and to attach.
const SOON: Duration = Duration::from_micros(50);

/// How long a change waits, at least, for the predecessor of the one before to be let go.
const EARLIER_PATIENCE: Duration = Duration::from_millis(100);

/// How long a change that comes later waits for a grace period at a time.
const GRACE_LOOK: Duration = Duration::from_millis(10);

/// How long what has only looked at an instance takes to let go of it, at most.
const MOMENT: Duration = Duration::from_secs(1);

/// How often it is looked whether that has let go: it does not say so.
const MOMENT_LOOK: Duration = Duration::from_millis(1);

/// Why an instance stays that something uses.
const STILL_IN_USE: &str = "it is still in use";

/// How long a thread that looks after a retiring domain waits for it at a time.
const LOOK_EVERY: Duration = Duration::from_millis(20);

impl DomainProxy {
    /// Lets go of the domain that served until now: it becomes the standby, and the standby before
    /// it is retired.
    pub(crate) fn release_old(
        self: &Arc<Self>,
        others: &mut Others,
        old: LoadedDomain,
        grace: Option<srcu::Grace<Option<LoadedDomain>>>,
        options: Options,
        mut report: Report,
    ) -> Report {
        others.retiring = Some(Retiring { domain: old, grace });
        // A live domain that has died is not to wait for its predecessor, which is about to serve
        // again. It may have died before it was said to be the live one.
        let died = || self.live_has_died();
        let grace = &mut report.phases.grace;
        if timed(grace, || self.release_unless(others, RELEASE_TIMEOUT, died)) {
            self.finish_retiring(others, options.limit(), &mut report.phases);
        } else {
            if !died() {
                log::warn!(
                    "generation {} is still in use {} s after it was replaced; it stays resident and no upgrade is taken until it is let go",
                    report.generation - 1,
                    RELEASE_TIMEOUT.as_secs()
                );
            }
            self.look_after_retiring(others);
        }
        report
    }

    /// Has a thread finish what this change could not.
    fn look_after_retiring(self: &Arc<Self>, others: &Others) {
        let Some(retiring) = &others.retiring else { return };
        // Weak: the thread is no reason to keep the device, or the domain.
        let (proxy, domain) = (Arc::downgrade(self), Arc::downgrade(&retiring.domain));
        let signal = Arc::clone(&self.signal);
        let look = move || {
            loop {
                let is_unused = || {
                    let is_used = domain.upgrade().is_some_and(|domain| domain.is_used());
                    (!is_used).then_some(())
                };
                if signal.wait(Instant::now() + LOOK_EVERY, is_unused).is_none() {
                    if proxy.strong_count() == 0 {
                        return;
                    }
                    continue;
                }
                let Some(proxy) = proxy.upgrade() else { return };
                let mut others = proxy.lock_changes();
                let is_it = |retiring: &Retiring| {
                    std::ptr::eq(Arc::as_ptr(&retiring.domain), domain.as_ptr())
                };
                // What had the lock may have finished it.
                if !others.retiring.as_ref().is_some_and(is_it) {
                    return;
                }
                if proxy.release(&mut others, Duration::ZERO) {
                    proxy.finish_retiring(&mut others, RELEASE_TIMEOUT, &mut Phases::default());
                    return;
                }
                // A grace period does not say that it is over. It is not waited for with the lock.
                drop(others);
                drop(proxy);
                std::thread::sleep(LOOK_EVERY);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("retiring".to_owned()).spawn(look) {
            log::warn!(
                "nothing looks after the domain that is retiring until the next upgrade: {error}"
            );
        }
    }

    /// What was retiring has been let go of: it becomes the standby, unless it is dead. What is to
    /// end for it, and is being told something, is waited for as long as `limit`.
    pub(crate) fn finish_retiring(
        &self,
        others: &mut Others,
        limit: Duration,
        phases: &mut Phases,
    ) {
        let Some(Retiring { domain, .. }) = others.retiring.take() else { return };
        if !domain.is_dead() {
            if let Some(before) = others.standby.replace(domain) {
                // It has no requests that could be run again.
                let _ = self.retire(before, limit, phases);
            }
            self.show(others);
            return;
        }
        // Never a standby: it has shown that it breaks. Once it is gone, its successor answers what
        // it left.
        let fence = Arc::clone(&domain.fence);
        if let Err(why) = self.retire(domain, limit, phases) {
            fence.decide(Verdict::Unfenced);
            self.set_unfenced(format!(
                "the domain that was replaced last has died and cannot be ended ({why}); its requests stay unanswered, because it may still write to them"
            ));
        } else {
            fence.decide(Verdict::Replay);
        }
        self.show(others);
        self.queues.notify_all();
    }

    /// Takes the domain back that is retiring, for the live one has died. If it lives, it is nearer
    /// than the standby: it may have requests that only it can answer.
    pub(crate) fn reinstate(&self, others: &mut Others) -> Option<LoadedDomain> {
        let Retiring { domain, grace } =
            others.retiring.take_if(|retiring| !retiring.domain.is_dead())?;
        // Every worker has passed since it was replaced, or the one that has died would not be
        // fenced off.
        drop(grace.map(|grace| grace.wait(Duration::from_secs(1))));
        Some(domain)
    }

    /// Has a domain retire that was reinstated and cannot serve.
    pub(crate) fn retire_later(self: &Arc<Self>, others: &mut Others, domain: LoadedDomain) {
        others.retiring = Some(Retiring { domain, grace: None });
        self.look_after_retiring(others);
    }

    /// Whether the domain that is retiring is not used by any worker any more.
    pub(crate) fn release(&self, others: &mut Others, timeout: Duration) -> bool {
        self.release_unless(others, timeout, || false)
    }

    /// Does not wait if `not_now`.
    fn release_unless(
        &self,
        others: &mut Others,
        timeout: Duration,
        not_now: impl Fn() -> bool,
    ) -> bool {
        let Some(retiring) = &mut others.retiring else { return true };
        let deadline = Instant::now() + timeout;
        if let Some(grace) = retiring.grace.take() {
            match grace.wait(timeout) {
                Ok(cell_reference) => drop(cell_reference),
                Err((grace, stalled)) => {
                    retiring.grace = Some(grace);
                    log::debug!("readers {:?} have not passed yet", stalled.readers);
                    return false;
                }
            }
        }
        // Workers attach to the new domain when they come by, and let go of the old one when
        // nothing is in flight there. They are on their way by now, most often on another CPU: to
        // sleep at once would cost them and us more than it takes them to come.
        let domain = &retiring.domain;
        let awaited = deadline.min(Instant::now() + SOON);
        while domain.is_used() && Instant::now() < awaited {
            std::hint::spin_loop();
        }
        let look = || {
            if domain.is_used() { not_now().then_some(false) } else { Some(true) }
        };
        self.signal.wait(deadline, look).unwrap_or(false)
    }

    /// Finishes what an earlier change could not: an upgrade must find at most one domain that is
    /// retiring.
    pub(crate) fn finish_earlier(
        &self,
        others: &mut Others,
        options: Options,
    ) -> Result<(), Refusal> {
        // No request waits for this: the gate is open.
        let patience = EARLIER_PATIENCE.max(options.drain_timeout);
        let mut watch = None;
        while let Some(retiring) = &others.retiring {
            let domain = Arc::clone(&retiring.domain);
            // A grace period does not say that it is over, so it is waited for here.
            let pause = if retiring.grace.is_some() { GRACE_LOOK } else { Duration::ZERO };
            if self.release_unless(others, pause, || self.live_has_died()) {
                break;
            }
            if self.live_has_died() {
                // The takeover needs the lock, and perhaps this domain.
                return Err(preempted());
            }
            let watch = watch.get_or_insert_with(|| Watch::begin(&self.queues));
            let users = self.queues.slots_of(domain.attached());
            match watch.judge(&users, patience, self.patience(options)) {
                Late::Wait(longer) => {
                    let is_over = || (!domain.is_used() || self.live_has_died()).then_some(());
                    self.signal.wait(Instant::now() + longer, is_over);
                }
                Late::Busy | Late::Both => {
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
                    let starved = watch.starved(&users);
                    return Err(refusals::starved(what, Duration::ZERO, starved));
                }
            }
        }
        self.finish_retiring(others, options.limit(), &mut Phases::default());
        Ok(())
    }

    /// Ends a domain that nothing uses. If that is not certain to have worked, it may still write
    /// to the requests that it has: the error says why.
    ///
    /// One that is being told something is waited for as long as `limit`, but not when the live
    /// domain has died or the device is about to end. Then a thread ends it when that is over.
    pub(crate) fn retire(
        &self,
        domain: LoadedDomain,
        limit: Duration,
        phases: &mut Phases,
    ) -> Result<(), String> {
        let (id, label) = (domain.id, domain.label());
        let mut spent = Duration::ZERO;
        let (destroyed, residency) =
            timed(&mut spent, || match self.take_instance(domain, limit) {
                Ok(instance) => {
                    let retired = instance.retire();
                    self.storage.reclaim(id);
                    (retired.destroyed, retired.residency)
                }
                Err(Shared::Instance(_)) => {
                    (Ok(()), Residency::Running(Resident::for_good(STILL_IN_USE)))
                }
                Err(Shared::Domain(domain)) => {
                    let storage = Arc::clone(&self.storage);
                    let reclaim = move || {
                        storage.reclaim(id);
                    };
                    let signal = Arc::clone(&self.signal);
                    (Ok(()), Residency::Running(Latecomer::resident(domain, signal, reclaim)))
                }
            });
        phases.retire += spent;
        self.residents.note(&label, &residency);
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

    /// Takes an instance out of what shares it. What has only looked at it is gone in a moment;
    /// for a call that tells it something it is waited as long as `limit`, unless the device has
    /// something else to do.
    fn take_instance(&self, domain: LoadedDomain, limit: Duration) -> Result<Instance, Shared> {
        let began = Instant::now();
        let mut shared = Shared::Domain(domain);
        loop {
            shared = match shared.take() {
                Ok(instance) => return Ok(instance),
                // It has been left with requests in flight: there is nothing to wait for.
                Err(left @ Shared::Instance(_)) => return Err(left),
                Err(shared) => shared,
            };
            let waited = began.elapsed();
            let is_over = waited >= MOMENT && (self.is_stopping() || self.live_has_died());
            if waited >= limit.max(MOMENT) || is_over {
                return Err(shared);
            }
            shared.wait(&self.signal);
        }
    }
}

/// An instance on its way out of what shares it.
enum Shared {
    Domain(LoadedDomain),
    /// Nothing but queues that were left with requests in flight shares it.
    Instance(Arc<Instance>),
}

impl Shared {
    fn take(self) -> Result<Instance, Self> {
        let instance = match self {
            Self::Domain(domain) => Arc::try_unwrap(domain).map_err(Self::Domain)?.into_instance(),
            Self::Instance(instance) => instance,
        };
        Arc::try_unwrap(instance).map_err(Self::Instance)
    }

    /// Whether something uses it that will leave it.
    fn is_awaited(&self) -> bool {
        match self {
            Self::Domain(domain) => domain.is_awaited(),
            Self::Instance(_) => false,
        }
    }

    /// Waits until nothing uses it, or for a while; it may then be there to be taken.
    fn wait(&self, signal: &Signal) {
        let is_free = || (!self.is_awaited()).then_some(());
        if signal.wait(Instant::now() + LOOK_EVERY, is_free).is_some() {
            // But something still looks at it.
            std::thread::sleep(MOMENT_LOOK);
        }
    }
}

/// An instance that is still being told something. A thread of its own ends it when that is over:
/// its end takes as long as the domain likes, so a look never waits for it.
struct Latecomer {
    left: Mutex<Left>,
    signal: Arc<Signal>,
    /// Called when it has ended.
    ended: Box<dyn Fn() + Send + Sync>,
}

/// What is left of an instance that is ended late.
enum Left {
    /// It waits for a thread.
    Used(LoadedDomain),
    /// A thread ends it, or waits until it can.
    Ending,
    Mapped(Resident),
    Nothing,
}

impl Latecomer {
    fn resident(
        domain: LoadedDomain,
        signal: Arc<Signal>,
        ended: impl Fn() + Send + Sync + 'static,
    ) -> Resident {
        let (left, ended) = (Mutex::new(Left::Used(domain)), Box::new(ended));
        let late = Arc::new(Self { left, signal, ended });
        late.look();
        Resident::new(STILL_IN_USE, move || late.look())
    }

    /// Whether it is gone. Has a thread end it, if none does yet.
    fn look(self: &Arc<Self>) -> bool {
        let mut left = lock(&self.left);
        let resident = match std::mem::replace(&mut *left, Left::Ending) {
            Left::Used(domain) => {
                *left = self.begin(domain);
                return false;
            }
            Left::Ending => return false,
            Left::Mapped(resident) => resident,
            Left::Nothing => {
                *left = Left::Nothing;
                return true;
            }
        };
        *left = Left::Mapped(resident.clone());
        drop(left);
        resident.is_gone()
    }

    /// Gives `domain` to a thread. If there is none, a later look tries again.
    fn begin(self: &Arc<Self>, domain: LoadedDomain) -> Left {
        let (give, given) = mpsc::channel();
        let late = Arc::clone(self);
        let end = move || {
            if let Ok(domain) = given.recv() {
                late.end(domain);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("ending".to_owned()).spawn(end) {
            log::warn!("no thread to end {}: {error}; `status` tries again", domain.label());
            return Left::Used(domain);
        }
        match give.send(domain) {
            Ok(()) => Left::Ending,
            Err(mpsc::SendError(domain)) => Left::Used(domain),
        }
    }

    fn end(&self, domain: LoadedDomain) {
        let label = domain.label();
        let mut shared = Shared::Domain(domain);
        let instance = loop {
            shared = match shared.take() {
                Ok(instance) => break instance,
                // It has been left with requests in flight: it stays.
                Err(Shared::Instance(_)) => return,
                Err(shared) => shared,
            };
            shared.wait(&self.signal);
        };
        let retired = instance.retire();
        if let Err(error) = retired.destroyed {
            log::warn!("{label} did not end well: {error}");
        }
        (self.ended)();
        *lock(&self.left) = match retired.residency {
            Residency::Gone => Left::Nothing,
            Residency::Resident(left) | Residency::Running(left) => Left::Mapped(left),
        };
    }
}
