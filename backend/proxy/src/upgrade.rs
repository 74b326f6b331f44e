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

use crate::code::Code;
use crate::drain::Drain;
use crate::report::{
    Change, DomainRecord, Mode, Options, Phases, Protocol, Refusal, Report, Starved, WhenBusy,
};
use crate::services::Services;
use crate::starved::say;
use crate::{DomainProxy, Member, Upgrades};
use domain_abi::{Capabilities, DeviceInfo, Params, Swap};
use domain_host::{CallError, Instance};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long the gate is open before the second try, if starved workers held others up at it. Twice
/// as long each time, but no longer than it was shut, so that a starved worker, whenever it is
/// given a CPU, finds it shut every other time at least.
const OPEN_FIRST: Duration = Duration::from_millis(50);

/// How long it is open between two tries at most.
const OPEN_LONGEST: Duration = Duration::from_secs(1);

/// How often a change that waits looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(5);

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

/// Times a phase.
pub(crate) fn timed<R>(phase: &mut Duration, f: impl FnOnce() -> R) -> R {
    let started = Instant::now();
    let result = f();
    *phase = started.elapsed();
    result
}

/// What the exchange tells the upgrading thread.
#[derive(Default)]
struct ExchangeNotes {
    quiesce: Duration,
    activate: Duration,
    refusal: Option<Refusal>,
    /// The old domain could not be put back.
    fault: Option<String>,
}

/// What a change has prepared before it has the upgrade lock.
trait Prepared {
    /// It is not wanted.
    fn give_up(self, proxy: &DomainProxy, limit: Duration);
}

/// A module that was loaded.
impl Prepared for (Member, Phases) {
    fn give_up(self, proxy: &DomainProxy, limit: Duration) {
        // It was never live, so it has no requests.
        let _ = proxy.retire(self.0, limit, &mut Phases::default());
    }
}

/// The standby is there already.
struct Nothing;

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
        let prepare = || Ok((self.prepare(name, params, &mut phases)?, phases));
        self.recorded(Change::Upgrade, name, options, prepare, |upgrades, (member, phases)| {
            self.replace(upgrades, member.clone(), options, *phases)
        })
    }

    /// Makes the standby the live domain again.
    ///
    /// # Errors
    /// Why it was refused; the device is as it was.
    pub fn rollback(self: &Arc<Self>, options: Options) -> Result<Report, Refusal> {
        let prepare = || Ok(Nothing);
        self.recorded(Change::Rollback, "standby", options, prepare, |upgrades, Nothing| {
            let Some(standby) = upgrades.standby.take() else {
                return Err(Refusal::new(
                    Code::NoStandby,
                    "there is no standby to roll back to: none was upgraded away from yet, or it was used up; upgrade to the module that you want",
                ));
            };
            let kept = standby.clone();
            let result = self.replace(upgrades, standby, options, Phases::default());
            if result.is_err() && !kept.instance.is_dead() {
                upgrades.standby = Some(kept);
            }
            result
        })
    }

    /// One at a time; puts what happens into state, history and log. `prepare` runs without the
    /// upgrade lock, `change_over` with it; it is held until the history has the entry, so that no
    /// takeover of the new live domain is told of first. If a takeover comes first, `change_over`
    /// is tried again after it.
    fn recorded<T: Prepared>(
        self: &Arc<Self>,
        change: Change,
        target: &str,
        options: Options,
        prepare: impl FnOnce() -> Result<T, Refusal>,
        mut change_over: impl FnMut(&mut Upgrades, &T) -> Result<Report, Refusal>,
    ) -> Result<Report, Refusal> {
        let _operator = match (options.when_busy, self.operator.try_lock()) {
            (_, Ok(operator)) => operator,
            (_, Err(TryLockError::Poisoned(poisoned))) => poisoned.into_inner(),
            (WhenBusy::Queue, Err(TryLockError::WouldBlock)) => lock(&self.operator),
            (WhenBusy::Refuse, Err(TryLockError::WouldBlock)) => {
                return Err(Refusal::new(
                    Code::Busy,
                    "another upgrade is under way; try again when it has ended",
                ));
            }
        };
        self.started(change, target);
        let prepared = self
            .check_stopping()
            .and_then(|()| self.settle(&mut *self.lock_after_takeover(options)?, options))
            // It is settled once more before the change.
            .or_else(|refusal| if refusal.code == Code::Preempted { Ok(()) } else { Err(refusal) })
            .and_then(|()| prepare());
        let (upgrades, result) = match prepared {
            Ok(prepared) => {
                let (upgrades, result) =
                    self.try_until_alive(options, |upgrades| change_over(upgrades, &prepared));
                if result.is_err() {
                    prepared.give_up(self, options.limit());
                }
                (upgrades, result)
            }
            Err(refusal) => (None, Err(refusal)),
        };
        self.ended(upgrades.as_deref(), change, &result);
        result
    }

    /// Makes a change, after each takeover that comes first: the checks are made anew then, because
    /// another domain serves, or none. Comes back with the lock, unless a takeover has it for too
    /// long.
    fn try_until_alive(
        self: &Arc<Self>,
        options: Options,
        mut attempt: impl FnMut(&mut Upgrades) -> Result<Report, Refusal>,
    ) -> (Option<MutexGuard<'_, Upgrades>>, Result<Report, Refusal>) {
        loop {
            let mut upgrades = match self.lock_after_takeover(options) {
                Ok(upgrades) => upgrades,
                Err(refusal) => return (None, Err(refusal)),
            };
            // A takeover leaves somebody behind if its standby could not serve and is still in use.
            let result = self.settle(&mut upgrades, options).and_then(|()| attempt(&mut upgrades));
            // Each takeover uses an instance up, so this ends.
            if !result.as_ref().is_err_and(|refusal| refusal.code == Code::Preempted) {
                return (Some(upgrades), result);
            }
        }
    }

    /// Takes the upgrade lock when no takeover is under way, or to come.
    fn lock_after_takeover(
        self: &Arc<Self>,
        options: Options,
    ) -> Result<MutexGuard<'_, Upgrades>, Refusal> {
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

    /// Verifies, loads and prepares a module. Nothing of the live domain is touched.
    pub(crate) fn prepare(
        &self,
        name: &str,
        given: Params,
        phases: &mut Phases,
    ) -> Result<Member, Refusal> {
        let loading =
            |error: domain_host::LoadError| Refusal::new(Code::Module(error.code), error.message);
        let verified = timed(&mut phases.verify, || self.loader.verify(name)).map_err(loading)?;
        let description = verified.description().clone();
        let identity = verified.identity().clone();
        let label = format!("`{}` {}", description.name, description.version);
        let live = self.record();
        if let Some(live) = &live {
            let schema = self.storage.schema();
            if live.schema_name != description.schema_name {
                return Err(Refusal::new(
                    Code::SchemaNotAccepted,
                    format!(
                        "{label} keeps its data as `{}`, this disk is kept as `{}`; moving a disk to another kind of storage is no upgrade",
                        description.schema_name, live.schema_name
                    ),
                ));
            }
            if schema != 0 && !description.accepted_schemas.contains(&schema) {
                return Err(schema_refusal(&label, &description.accepted_schemas, schema));
            }
        }
        let mut params = given;
        if let Some(live) = &live {
            params.inherit(&live.params, &description.inherited);
        }
        params
            .check_known(&description.params)
            .map_err(|error| Refusal::new(Code::BadParameter, format!("{label}: {error}")))?;
        self.check_stopping()?;
        let module = timed(&mut phases.load, || verified.load()).map_err(loading)?;
        let id = self.next_id();
        let services = Arc::new(Services {
            id,
            name: description.name.clone(),
            storage: Arc::clone(&self.storage),
            queues: Arc::clone(&self.queues),
        });
        let prepared = timed(&mut phases.prepare, || {
            let instance = Instance::prepare(module, services, &params)?;
            let info = instance.info();
            Ok((instance, info))
        });
        let refused = |error: CallError| {
            let code = if matches!(error, CallError::Panicked(_)) {
                Code::PreparePanicked
            } else {
                Code::PrepareFailed
            };
            Refusal::new(code, format!("{label} was not prepared: {error}"))
        };
        let (instance, info) = prepared.map_err(|(error, residency)| {
            self.note_residency(&label, &residency);
            refused(error)
        })?;
        let info = match info {
            Ok(info) => info,
            Err(error) => {
                self.note_residency(&label, &instance.retire().residency);
                return Err(refused(error));
            }
        };
        let record = DomainRecord {
            name: description.name,
            version: description.version,
            schema_name: description.schema_name,
            sha256: identity.sha256,
            build_id: identity.build_id,
            path: identity.path,
            params,
            info,
        };
        let member = Member {
            id,
            instance: Arc::new(instance),
            fence: Arc::default(),
            record: Arc::new(record),
        };
        self.environment.apply(&member.instance);
        Ok(member)
    }

    /// Brings `next` into service in place of the live domain. If it is refused, what becomes of it
    /// is the caller's.
    fn replace(
        self: &Arc<Self>,
        upgrades: &mut Upgrades,
        next: Member,
        options: Options,
        mut phases: Phases,
    ) -> Result<Report, Refusal> {
        let from = self.record().expect("a device that takes upgrades has had a live domain");
        // If it has died without anybody's notice, the takeover comes first.
        self.notice_death();
        let live = self.live();
        let decided = self
            .check_stopping()
            .and_then(|()| self.check_compatible(&from.info, &next))
            .and_then(|()| decide(options.mode, live.as_ref(), &next));
        let changed = match (decided, &live) {
            (Ok(_), None) => self.revive(&next, &mut phases).map(|()| (Protocol::Handover, None)),
            (Ok(Protocol::Swap), Some(_)) => {
                self.swap(&next, &mut phases).map(|grace| (Protocol::Swap, Some(grace)))
            }
            (Ok(_), Some(live)) => self
                .handover(live, &next, options, &mut phases)
                .map(|()| (Protocol::Handover, None)),
            (Err(refusal), _) => Err(refusal),
        };
        let (protocol, grace) = changed?;
        let generation = next.instance.generation();
        self.set_live(next.clone());
        self.queues.notify_all();
        let report = Report { generation, protocol, from, to: next.record.clone(), phases };
        drop(next);
        Ok(match live {
            Some(live) => self.settle_old(upgrades, live, grace, options, report),
            None => report,
        })
    }

    /// Brings the device back whose live domain has died.
    fn revive(&self, next: &Member, phases: &mut Phases) -> Result<(), Refusal> {
        self.storage.begin(next.id);
        // It was told of the write cache while the dead one may still have served.
        let activate = || next.instance.activate().and_then(|()| self.catch_up(next));
        if let Err(error) = timed(&mut phases.activate, activate) {
            self.storage.rollback();
            return Err(step_refusal(Step::Activate, &next.record, &error));
        }
        self.storage.commit();
        next.instance.set_generation(self.next_generation());
        self.publish(next.clone());
        Ok(())
    }

    fn swap(
        &self,
        next: &Member,
        phases: &mut Phases,
    ) -> Result<srcu::Grace<Option<Member>>, Refusal> {
        self.storage.begin(next.id);
        if let Err(error) = timed(&mut phases.activate, || next.instance.activate()) {
            self.storage.rollback();
            return Err(step_refusal(Step::Activate, &next.record, &error));
        }
        next.instance.set_generation(self.next_generation());
        let grace = self.cell().swap(Some(next.clone())).map_err(|error| {
            self.storage.rollback();
            Refusal::new(Code::Busy, format!("the domain was not published: {error}"))
        })?;
        self.storage.commit();
        Ok(grace)
    }

    /// Tries until the workers have come, they are not waited for any more, or one hangs.
    ///
    /// While the gate is shut for starved workers alone, it stays shut. Where a worker that has
    /// come waits at it, too, the gate is opened between two tries, for ever longer: the requests
    /// of that queue would wait for another queue's worker.
    fn handover(
        self: &Arc<Self>,
        live: &Member,
        next: &Member,
        options: Options,
        phases: &mut Phases,
    ) -> Result<(), Refusal> {
        let deadline = Instant::now() + options.limit();
        let mut open = OPEN_FIRST;
        loop {
            let (refusal, pause) = match self.try_handover(live, next, options, deadline, phases)? {
                Tried::Done => return Ok(()),
                Tried::HeldUp { refusal, pause } => (refusal, pause),
            };
            let until = Instant::now() + open.min(pause.max(OPEN_FIRST));
            if until >= deadline {
                return Err(refusal);
            }
            while Instant::now() < until {
                if live.instance.is_dead() {
                    return Err(preempted());
                }
                self.check_stopping()?;
                std::thread::sleep(LOOK_EVERY);
            }
            open = (open * 2).min(OPEN_LONGEST);
        }
    }

    /// Shuts the gate once; starved workers are not waited for after `deadline`.
    fn try_handover(
        self: &Arc<Self>,
        live: &Member,
        next: &Member,
        options: Options,
        deadline: Instant,
        phases: &mut Phases,
    ) -> Result<Tried, Refusal> {
        let notes = Arc::new(Mutex::new(ExchangeNotes::default()));
        let exchange = exchange(self, live, next, &notes);
        let mut drain = Drain::begin(self, live, options, deadline);
        let wake_owing = || self.queues.notify_all();
        let outcome =
            self.cell().handover_while(exchange, wake_owing, drain.first_look(), |stalled| {
                drain.look(&stalled.readers)
            });
        // Whatever happened, kicks may have been consumed while the gate was shut.
        self.queues.notify_all();
        let outcome = outcome
            .map_err(|error| Refusal::new(Code::Busy, format!("the gate was not shut: {error}")))?;
        let mut notes = std::mem::take(&mut *lock(&notes));
        phases.quiesce = notes.quiesce;
        phases.activate = notes.activate;
        if let Some(fault) = notes.fault.take() {
            self.died(&live.instance, &fault);
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
                    (old, refusal) => {
                        unreachable!("published: {}, refused: {refusal:?}", old.is_some())
                    }
                };
            }
        };
        if live.instance.is_dead() {
            return Err(preempted());
        }
        let (is_over, refusal) = drain.refusal(&stalled.readers, pause);
        if is_over { Err(refusal) } else { Ok(Tried::HeldUp { refusal, pause }) }
    }

    /// How much longer starved workers are waited for: not at all when the daemon ends.
    pub(crate) fn patience(&self, options: Options) -> Duration {
        if self.is_stopping() { Duration::ZERO } else { options.starved_timeout }
    }

    /// What must be true of a successor: the guest was told all this and cannot be told otherwise.
    pub(crate) fn check_compatible(&self, live: &DeviceInfo, next: &Member) -> Result<(), Refusal> {
        let (schema, accepted) =
            (self.storage.schema(), &next.instance.description().accepted_schemas);
        if schema != 0 && !accepted.contains(&schema) {
            return Err(schema_refusal(
                &format!("`{}` {}", next.record.name, next.record.version),
                accepted,
                schema,
            ));
        }
        let next = &next.record.info;
        let differs = |what: &str, live: &dyn std::fmt::Display, next: &dyn std::fmt::Display| {
            Err(Refusal::new(
                Code::DeviceDiffers,
                format!(
                    "the new domain's {what} is {next}, the guest was told {live}; give it the same"
                ),
            ))
        };
        if (&live.backing_kind, live.backing_id) != (&next.backing_kind, next.backing_id) {
            return Err(Refusal::new(
                Code::DifferentBacking,
                format!(
                    "the new domain would serve another disk ({} {:?}, now {} {:?}); an upgrade replaces the implementation, it does not move a disk",
                    next.backing_kind, next.backing_id, live.backing_kind, live.backing_id
                ),
            ));
        }
        if live.capacity != next.capacity {
            return differs("capacity in bytes", &live.capacity, &next.capacity);
        }
        if live.block_size != next.block_size {
            return differs("block size", &live.block_size, &next.block_size);
        }
        if live.physical_block_size != next.physical_block_size {
            return differs(
                "physical block size",
                &live.physical_block_size,
                &next.physical_block_size,
            );
        }
        if live.serial != next.serial {
            return differs(
                "serial number",
                &format!("`{}`", live.serial),
                &format!("`{}`", next.serial),
            );
        }
        let needed = self.required_capabilities();
        if !next.capabilities.contains(needed) {
            let missing = Capabilities(needed.0 & !next.capabilities.0);
            return Err(Refusal::new(
                Code::FeatureMissing,
                format!(
                    "the new domain lacks capabilities {:#x} that the guest was offered; use one that has them, or upgrade while no guest is connected",
                    missing.0
                ),
            ));
        }
        let read_only = |info: &DeviceInfo| info.capabilities.contains(Capabilities::READ_ONLY);
        if read_only(live) != read_only(next) {
            return differs("read-only flag", &read_only(live), &read_only(next));
        }
        Ok(())
    }
}

/// Nobody hangs, but the workers were not given a CPU for too long.
pub(crate) fn starved_refusal(what: &str, pause: Duration, starved: Vec<Starved>) -> Refusal {
    let why = say(&starved);
    Refusal {
        starved,
        ..Refusal::new(
            Code::Starved,
            format!(
                "{what}: starved: {why}. It is the machine that is busy, and not the domain; the guest was paused for {} ms; try later, or give --starved-timeout-ms",
                pause.as_millis()
            ),
        )
    }
}

/// Swap or handover?
fn decide(mode: Mode, live: Option<&Member>, next: &Member) -> Result<Protocol, Refusal> {
    let Some(live) = live else { return Ok(Protocol::Handover) };
    // Asked now: what the storage wants of them may have changed since they were prepared.
    let may_swap =
        |member: &Member| member.instance.info().is_ok_and(|info| info.swap == Swap::SameBacking);
    let both_may = may_swap(live) && may_swap(next);
    if live.instance.is_dead() {
        return Err(preempted());
    }
    let (a, b) = (&live.record.info, &next.record.info);
    let why_not = if !both_may {
        Some("one of the two domains holds state of its own")
    } else if a.backing_cache != b.backing_cache {
        Some("they would use different caches of the same disk")
    } else {
        None
    };
    match (mode, why_not) {
        (Mode::Auto | Mode::Swap, None) => Ok(Protocol::Swap),
        (Mode::Auto | Mode::Handover, _) => Ok(Protocol::Handover),
        (Mode::Swap, Some(why)) => Err(Refusal::new(
            Code::SwapNotPossible,
            format!("these domains cannot serve side by side: {why}; use mode handover or auto"),
        )),
    }
}

fn schema_refusal(label: &str, accepted: &[u32], schema: u32) -> Refusal {
    Refusal::new(
        Code::SchemaNotAccepted,
        format!(
            "{label} takes over storage of schema {accepted:?}, this disk has schema {schema}; use a version that accepts it"
        ),
    )
}

/// No change is begun any more.
pub(crate) fn stopping() -> Refusal {
    Refusal::new(Code::Stopping, "the daemon is stopping; start it again first")
}

/// Not now: whoever made the change waits for the takeover, and tries again.
pub(crate) fn preempted() -> Refusal {
    Refusal::new(Code::Preempted, "the live domain has died meanwhile, and a takeover comes first")
}

/// What runs while every worker is at the gate.
fn exchange(
    proxy: &DomainProxy,
    live: &Member,
    next: &Member,
    notes: &Arc<Mutex<ExchangeNotes>>,
) -> srcu::Exchange<Option<Member>> {
    let (storage, generation) = (Arc::clone(&proxy.storage), proxy.next_generation());
    let (live, next, notes) = (live.clone(), next.clone(), Arc::clone(notes));
    Box::new(move |_| {
        let mut notes = lock(&notes);
        if live.instance.is_dead() {
            notes.refusal = Some(preempted());
            return None;
        }
        let resume = |notes: &mut ExchangeNotes| {
            if let Err(error) = live.instance.resume() {
                notes.fault = Some(format!("resume: {error}"));
            }
        };
        if let Err(error) = timed(&mut notes.quiesce, || live.instance.quiesce()) {
            if live.instance.is_dead() {
                // Since we looked, in a call that was no worker's.
                notes.refusal = Some(preempted());
                return None;
            }
            resume(&mut notes);
            notes.refusal = Some(step_refusal(Step::Quiesce, &live.record, &error));
            return None;
        }
        storage.begin(next.id);
        if let Err(error) = timed(&mut notes.activate, || next.instance.activate()) {
            storage.rollback();
            resume(&mut notes);
            notes.refusal = Some(step_refusal(Step::Activate, &next.record, &error));
            return None;
        }
        storage.commit();
        next.instance.set_generation(generation);
        Some(Some(next))
    })
}

/// A call that a domain gets while the storage changes its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Quiesce,
    Activate,
}

fn step_refusal(step: Step, record: &DomainRecord, error: &CallError) -> Refusal {
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

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
