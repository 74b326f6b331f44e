//! Takeover: the live domain has panicked, and the standby goes on in its place.
//!
//! ```text
//!   a worker sees the panic -> requests wait, the cell holds none -> every worker leaves the
//!     dead instance -> it is destroyed, its threads joined: fenced
//!        -> the predecessor, if it is still in use, or a standby that fits, which is waited for
//!           for a time if it is being loaded: storage moves, it is activated, published;
//!           unanswered requests run again
//!        -> none: they get I/O errors, the device is faulted until an upgrade
//! ```
//!
//! Invariants: nothing of a dead instance runs beside its successor; what it had completed is
//! answered once, what it had not is run again once per takeover; an instance that died never
//! serves again. A takeover uses the standby up, so a request that kills every domain ends with an
//! I/O error and not in a circle.

use crate::change::fence::Verdict;
use crate::change::wait::TAKEOVER_PATIENCE;
use crate::device::{DomainProxy, Others};
use crate::domain::{Domain, LoadedDomain, OUTSIDE_A_REQUEST};
use crate::record::code::Code;
use crate::record::report::{Change, Phases, Protocol, Refusal, Report, timed};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use storage::DomainId;

/// After so long a worker that does not come out of the dead instance is reported; it is waited for
/// all the same.
const REPORT_AFTER: Duration = Duration::from_secs(2);

/// How often workers are woken that are in a dead instance.
const WAKE_EVERY: Duration = Duration::from_millis(20);

impl DomainProxy {
    /// A domain has died: called by what saw it, which has left it. Any number of workers may.
    pub(crate) fn died(self: &Arc<Self>, dead: &LoadedDomain, reason: &str) {
        dead.instance.mark_dead();
        if !self.begin_dying(dead, reason) {
            return;
        }
        let (proxy, id, reason) = (Arc::clone(self), dead.id, reason.to_owned());
        let spawned = std::thread::Builder::new()
            .name("takeover".to_owned())
            .spawn(move || proxy.take_over(id, &reason));
        if let Err(error) = spawned {
            log::error!(
                "no thread for the takeover: {error}; its requests wait until it is noticed again"
            );
            self.end_dying(dead.id);
        }
    }

    /// Looks whether the live domain has died in a call that was no worker's.
    pub(crate) fn notice_death(self: &Arc<Self>) {
        if let Some(live) = self.live().filter(|live| live.is_dead()) {
            self.died(&live, OUTSIDE_A_REQUEST);
        }
    }

    /// Looks which of these have died in a call that was no worker's: the live domain, or one that
    /// was replaced and still has requests.
    pub(crate) fn notice_deaths<'a>(
        self: &Arc<Self>,
        of: impl IntoIterator<Item = &'a Weak<Domain>>,
    ) {
        let domains = of.into_iter().filter_map(Weak::upgrade);
        for dead in domains.filter(|domain| domain.is_dead()) {
            self.died(&dead, OUTSIDE_A_REQUEST);
        }
        self.notice_death();
    }

    fn take_over(self: &Arc<Self>, dead: DomainId, reason: &str) {
        // Out of the dead instance, a worker that sleeps there; an upgrade that drains it finds it
        // dead and gives up.
        self.queues.notify_all();
        let mut others = self.lock_changes();
        let capacity = self.capacity();
        let retiring = others.retiring.as_ref().map(|retiring| Arc::clone(&retiring.domain));
        if let Some(retiring) = retiring.filter(|retiring| retiring.id == dead) {
            // It had been replaced already: its successor answers what it left.
            while !self.release(&mut others, REPORT_AFTER) {
                log::error!(
                    "a worker is still inside the dead domain; what it left unanswered waits for it"
                );
                if retiring.abandoned() != 0 {
                    // Some have left it for good. They will never be detached.
                    break;
                }
            }
            drop(retiring);
            self.finish_retiring(&mut others, TAKEOVER_PATIENCE, &mut Phases::default());
        } else if self.live().is_some_and(|live| live.id == dead) {
            self.started(Change::Takeover, "standby");
            let result = self.replace_dead(&mut others, reason);
            if let Err(refusal) = &result {
                self.set_faulted(&refusal.message);
            }
            self.ended(Some(&others), Change::Takeover, &result);
        }
        self.end_dying(dead);
        drop(others);
        if self.capacity() != capacity {
            // It has died while it was resized, and had it in storage.
            self.config_changed();
        }
        self.queues.notify_all();
    }

    fn replace_dead(
        self: &Arc<Self>,
        others: &mut Others,
        reason: &str,
    ) -> Result<Report, Refusal> {
        let started = Instant::now();
        let mut phases = Phases::default();
        let dead = self.detach_all(&mut phases);
        let (from, fence, generation) =
            (dead.record(), Arc::clone(&dead.fence), dead.instance.generation());
        if let Err(why) = self.retire(dead, TAKEOVER_PATIENCE, &mut phases) {
            fence.decide(Verdict::Unfenced);
            return Err(Refusal::new(
                Code::NotFenced,
                format!(
                    "the dead domain cannot be ended ({why}); its requests stay unanswered, because it may still write to them"
                ),
            ));
        }
        let next = self.reinstate(others).or_else(|| others.standby.take());
        let coming = || self.coming.wait(&self.signal, Instant::now() + TAKEOVER_PATIENCE);
        let next = next.or_else(coming).ok_or_else(|| {
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
                    self.keeping.serves(&next, generation + 1, None);
                    self.storage.commit();
                    Ok(next)
                }
                Err(refusal) => {
                    self.storage.rollback();
                    if next.is_used() {
                        self.retire_later(others, next);
                    } else {
                        // One that was reinstated had requests, which its workers may just have
                        // let go of.
                        let fence = Arc::clone(&next.fence);
                        let ended = self.retire(next, TAKEOVER_PATIENCE, &mut phases);
                        fence.decide(if ended.is_ok() { Verdict::Fail } else { Verdict::Unfenced });
                    }
                    Err(refusal)
                }
            }
        });
        match taken {
            Ok(next) => {
                next.instance.set_generation(generation + 1);
                self.publish(&next);
                fence.decide(Verdict::Replay);
                phases.pause = started.elapsed();
                let protocol = Protocol::Takeover;
                Ok(Report { generation: generation + 1, protocol, from, to: next.record(), phases })
            }
            Err(refusal) => {
                fence.decide(Verdict::Fail);
                Err(refusal)
            }
        }
    }

    /// Takes the dead instance out of the cell, and waits until every worker has left it.
    fn detach_all(&self, phases: &mut Phases) -> LoadedDomain {
        let began = Instant::now();
        let dead = self.take_dead();
        let mut grace = Some(self.cell.swap(None).unwrap_or_else(|error| {
            unreachable!("under the lock of changes, on a thread without a reader: {error}")
        }));
        let mut reported = false;
        loop {
            self.queues.notify_all();
            grace = grace.and_then(|grace| grace.wait(WAKE_EVERY).err().map(|(grace, _)| grace));
            let has_left = || (!dead.is_awaited()).then_some(());
            let until = Instant::now() + WAKE_EVERY;
            if grace.is_none() && self.signal.wait(until, has_left).is_some() {
                break;
            }
            if !reported && began.elapsed() >= REPORT_AFTER {
                reported = true;
                log::error!(
                    "a worker is still inside the dead domain after {} s; the takeover waits for it",
                    REPORT_AFTER.as_secs()
                );
            }
        }
        phases.drain = began.elapsed();
        dead
    }
}
