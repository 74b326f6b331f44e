//! The read path: what a queue's worker does with the live domain.
//!
//! A worker is an SRCU reader. Between batches it passes the gate ([`Worker::gate`]); if the live instance has changed it attaches to the new one, on its own
//! thread, and lets go of the old one as soon as nothing is in flight there. The usual case costs a load and two compares.
//!
//! If an instance panics, its workers leave it at once. What it had not completed becomes *orphans*: requests that are the worker's again, and are submitted once
//! more, in the order in which they came and before anything new, when the dead instance is fenced off and somebody else serves (`takeover.rs`).
//!
//! Requests that end in the call that submits them, in their order, are the usual case, and are checked against the batch itself; everything else is
//! checked against the table of what is in flight (`flights.rs`).
//!
//! Invariants: only this worker completes what it submitted; each completion is checked against what is in flight, so a stale or invented
//! one is dropped; a lane (a queue of an instance) is dropped only when nothing is in flight on it, or its instance is dead.

use crate::fence::{Fence, Verdict};
use crate::flights::{Flights, errors, tag, told, untag};
use crate::queue::{QueueLine, add, coarse_now_ns};
use crate::{DomainProxy, Member, Service};
use domain_api::abi::{self, RawRequest};
use domain_api::host::{CallError, CompletionBuffer, QueueHandle};
use domain_api::{QueueIndex, Status};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Said of an instance that was found dead.
pub(crate) const OUTSIDE_A_REQUEST: &str = "it panicked outside of a request";

/// Batches in a row, each ended before the next began, for which one look at the clock does. So the age of a request that hangs in the call that submits it
/// includes, at most, these batches before it.
const UNCLOCKED: u32 = 7;

/// Whether requests may be submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// They may.
    Open,
    /// They may not: reap what the domain owes, and when it owes nothing, [`Worker::wait_at_gate`].
    Shut,
}

/// A request that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The tag that it was submitted with.
    pub slot: usize,
    /// How.
    pub status: Status,
    /// Bytes that were written into its buffer.
    pub written: u32,
}

/// One queue of one instance, as long as something is in flight there or it is the live one.
struct Lane {
    handle: QueueHandle,
    fence: Arc<Fence>,
    generation: u64,
    in_flight: usize,
}

/// A request that a dead instance left unanswered.
struct Orphan {
    slot: usize,
    fence: Arc<Fence>,
}

/// The worker's side of the proxy, for one queue. Stays on one thread.
pub struct Worker {
    proxy: Arc<DomainProxy>,
    queue: usize,
    reader: srcu::Reader<Option<Member>>,
    current: Option<Lane>,
    /// Earlier instances that still owe completions.
    earlier: Vec<Lane>,
    /// What all lanes together have in flight.
    owing: usize,
    flights: Flights,
    submitted: u64,
    /// How many batches may begin before the clock is looked at again.
    unclocked: u32,
    orphans: Vec<Orphan>,
    /// Requests that stay unanswered, because what had them cannot be fenced. Their slots are not used again.
    lost: usize,
    replay: Vec<RawRequest>,
    completions: CompletionBuffer,
    /// The generation that could not be attached to, so that it is not tried for ever.
    unattachable: u64,
}

impl Worker {
    pub(crate) fn new(proxy: Arc<DomainProxy>, queue: usize, slots: usize) -> Option<Self> {
        let reader = proxy.cell().attach()?;
        let mut worker = Self {
            proxy,
            queue,
            reader,
            current: None,
            earlier: Vec::new(),
            owing: 0,
            flights: Flights::new(slots),
            submitted: 0,
            unclocked: 0,
            orphans: Vec::new(),
            lost: 0,
            replay: Vec::new(),
            completions: CompletionBuffer::new(slots),
            unattachable: 0,
        };
        worker.adopt();
        Some(worker)
    }

    fn line(&self) -> &QueueLine {
        self.proxy.queues().line(self.queue)
    }

    /// How many requests have been submitted and have not ended.
    #[must_use]
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.owing + self.orphans.len() + self.lost
    }

    /// How many of them a domain has: this many must be reaped before the gate is waited at.
    #[must_use]
    #[inline]
    pub const fn owing(&self) -> usize {
        self.owing
    }

    /// Passes the gate, between two batches.
    #[inline]
    pub fn gate(&mut self) -> Gate {
        match self.reader.pass() {
            srcu::Gate::Open
                if self.current.as_ref().is_some_and(|lane| !lane.handle.instance().is_dead()) => {}
            srcu::Gate::Open | srcu::Gate::Changed => self.adopt(),
            srcu::Gate::Shut => {
                self.bury();
                return Gate::Shut;
            }
        }
        Gate::Open
    }

    /// Waits until the gate opens, with nothing owed. May run the exchange of the upgrade.
    pub fn wait_at_gate(&mut self) {
        debug_assert_eq!(self.owing, 0, "whoever is owed completions must reap them, not wait");
        self.unclocked = 0;
        add(&self.line().parks, 1);
        self.reader.arrive();
    }

    /// Says that this worker is about to sleep; the next [`gate`](Self::gate) wakes it. Returns `false` if it must look again first.
    pub fn sleep(&mut self) -> bool {
        let owing = self.owing > 0;
        self.unclocked = 0;
        self.reader.sleep(owing).map(srcu::Asleep::until_pass).is_some()
    }

    /// Leaves instances that are dead, and attaches to the live one.
    #[cold]
    fn adopt(&mut self) {
        self.bury();
        let Some(Member { instance, fence, .. }) = self.reader.read() else {
            self.leave_current();
            return;
        };
        if instance.is_dead() {
            let instance = Arc::clone(instance);
            self.leave_current();
            // Perhaps in a call that was no worker's, so that nobody has said so yet.
            self.proxy.died(&instance, OUTSIDE_A_REQUEST);
            return;
        }
        if self.current.as_ref().is_some_and(|lane| Arc::ptr_eq(lane.handle.instance(), instance)) {
            return;
        }
        let (instance, fence) = (Arc::clone(instance), Arc::clone(fence));
        self.leave_current();
        if let Some(at) = self.earlier.iter().position(|lane| Arc::ptr_eq(lane.handle.instance(), &instance))
        {
            // It has come back while it still had something of ours.
            self.current = Some(self.earlier.swap_remove(at));
            return;
        }
        let generation = instance.generation();
        if generation == self.unattachable {
            return;
        }
        if fence.is_abandoned(self.queue) {
            self.unattachable = generation;
            log::error!(
                "queue {}: generation {generation} still has requests of an earlier session; it is served again after an upgrade",
                self.queue
            );
            return;
        }
        match instance.attach(QueueIndex(self.queue as u32)) {
            Ok(handle) => self.current = Some(Lane { handle, fence, generation, in_flight: 0 }),
            Err(error) => {
                self.unattachable = generation;
                self.proxy.died(&instance, &format!("attaching queue {}: {error}", self.queue));
            }
        }
    }

    fn leave_current(&mut self) {
        self.earlier.extend(self.current.take());
        self.drop_idle_lanes();
    }

    fn drop_idle_lanes(&mut self) {
        self.earlier.retain(|lane| lane.in_flight > 0);
    }

    /// Leaves every instance that has died: what it had becomes orphans.
    fn bury(&mut self) {
        let dead = |lane: &Lane| lane.handle.instance().is_dead();
        if !self.current.iter().chain(&self.earlier).any(dead) {
            return;
        }
        let lanes = std::mem::take(&mut self.earlier).into_iter().chain(self.current.take());
        let (buried, alive): (Vec<_>, Vec<_>) = lanes.partition(dead);
        // The live one, if it is alive, comes back from here at the next `adopt`, with what it owes.
        self.earlier = alive;
        for lane in buried {
            self.owing -= lane.in_flight;
            for slot in 0..self.flights.len() {
                if self.flights.generation(slot) == lane.generation {
                    self.flights.let_go(slot);
                    self.orphans.push(Orphan { slot, fence: Arc::clone(&lane.fence) });
                }
            }
        }
        let flights = &self.flights;
        self.orphans.sort_by_key(|orphan| flights.order(orphan.slot));
        // The live lane may have been put among the earlier ones.
        let live = self.reader.read().as_ref().map(|live| Arc::clone(&live.instance));
        let at = live
            .and_then(|live| self.earlier.iter().position(|lane| Arc::ptr_eq(lane.handle.instance(), &live)));
        self.current = at.map(|at| self.earlier.swap_remove(at));
    }

    /// Submits requests, whose tags are their slots, to the live domain; calls `ended` for each request that ended at once. Returns how many from the
    /// front were taken: the rest is the caller's again.
    #[inline]
    pub fn submit(&mut self, requests: &mut [RawRequest], mut ended: impl FnMut(Ended)) -> usize {
        if !self.orphans.is_empty() {
            // Those come first.
            return 0;
        }
        let first = self.submitted;
        self.submitted += requests.len() as u64;
        if self.current.is_none() {
            return self.submit_to_nobody(requests, first, ended);
        }
        self.offer(requests, Some(first), &mut ended)
    }

    /// Submits to the current lane. `first` is which request the first one is, if that is not known of them already. Afterwards, what was not taken has
    /// its slot as its tag again.
    fn offer(
        &mut self,
        requests: &mut [RawRequest],
        first: Option<u64>,
        ended: &mut impl FnMut(Ended),
    ) -> usize {
        let line = self.proxy.queues().line(self.queue);
        let before = self.in_flight() as u64;
        let Some(lane) = self.current.as_mut() else { return 0 };
        let generation = lane.generation;
        for request in requests.iter_mut() {
            debug_assert_eq!(
                self.flights.generation(untag(request.tag)),
                0,
                "a slot is submitted once at a time"
            );
            request.tag |= tag(self.queue, 0);
            request.generation = generation;
        }
        if self.owing == 0 {
            self.unclocked = self.unclocked.checked_sub(1).unwrap_or_else(|| {
                line.busy_since.store(coarse_now_ns(), Ordering::Relaxed);
                UNCLOCKED
            });
        }
        // Before the call, so that a domain that does not come back is seen with what it has.
        line.in_flight.store(before + requests.len() as u64, Ordering::Relaxed);
        let result = lane.handle.submit(requests, &mut self.completions);
        let taken = *result.as_ref().unwrap_or(&requests.len());
        // Before anybody is told anything: should that panic, it must be known that the lane has something.
        lane.in_flight += taken;
        let completed = self.completions.completed();
        let (mut answered, mut statuses) = (0, abi::status::OK);
        for (request, completion) in requests[..taken].iter().zip(completed) {
            if completion.tag != request.tag || completion.generation != generation {
                break;
            }
            answered += 1;
            statuses |= completion.status;
            ended(told(completion));
        }
        lane.in_flight -= answered;
        add(&line.requests, answered as u64);
        if statuses != abi::status::OK {
            add(&line.errors, errors(&completed[..answered]));
        }
        if answered == requests.len() && answered == completed.len() && result.is_ok() {
            line.in_flight.store(before, Ordering::Relaxed);
            return taken;
        }
        self.owing += taken - answered;
        self.enter(requests, first, answered..taken);
        self.told_more(answered, result, ended);
        taken
    }

    /// Enters what was taken and is not answered yet into the table; gives back what was not taken.
    #[inline(never)]
    fn enter(&mut self, requests: &mut [RawRequest], first: Option<u64>, taken: Range<usize>) {
        let (end, start) = (taken.end, taken.start);
        for (at, request) in requests[taken].iter().enumerate() {
            let order = first
                .map_or_else(|| self.flights.order(untag(request.tag)), |first| first + (start + at) as u64);
            self.flights.enter(request, order);
        }
        for request in &mut requests[end..] {
            request.tag = untag(request.tag) as u64;
        }
    }

    /// The call is over, and more has happened than that requests were answered in their order: takes the other completions over.
    #[inline(never)]
    fn told_more(
        &mut self,
        answered: usize,
        result: Result<usize, CallError>,
        ended: &mut impl FnMut(Ended),
    ) {
        let line = self.proxy.queues().line(self.queue);
        if let Some(lane) = self.current.as_mut() {
            let completed = &self.completions.completed()[answered..];
            let ended = self.flights.settle(completed, self.queue, lane.generation, line, ended);
            lane.in_flight -= ended;
            self.owing -= ended;
            if let Err(error) = result {
                self.proxy.died(lane.handle.instance(), &error.to_string());
                self.bury();
            }
        }
        self.publish_in_flight();
    }

    /// There is no live domain: it has died, and either somebody takes over soon or nobody will.
    #[cold]
    fn submit_to_nobody(
        &mut self,
        requests: &mut [RawRequest],
        first: u64,
        mut ended: impl FnMut(Ended),
    ) -> usize {
        match self.proxy.service() {
            Service::Up | Service::Held => {
                // Up: somebody has just come, and is found at the next look. Held: somebody will come, or nobody. No dead instance had these, so
                // nothing has to be fenced off before they run.
                let fence = Arc::new(Fence::open());
                for (order, request) in (first..).zip(requests.iter_mut()) {
                    request.generation = 0;
                    self.flights.enter(request, order);
                    self.orphans.push(Orphan { slot: untag(request.tag), fence: Arc::clone(&fence) });
                }
                self.publish_in_flight();
            }
            Service::Failed => {
                for request in requests.iter() {
                    ended(Ended { slot: request.tag as usize, status: Status::IoError, written: 0 });
                }
                add(&self.line().requests, requests.len() as u64);
                add(&self.line().errors, requests.len() as u64);
            }
        }
        requests.len()
    }

    /// Collects what has ended since; calls `ended` for each.
    pub fn reap(&mut self, mut ended: impl FnMut(Ended)) {
        let line = self.proxy.queues().line(self.queue);
        let mut died = false;
        for lane in self.current.iter_mut().chain(&mut self.earlier).filter(|lane| lane.in_flight > 0) {
            let result = lane.handle.reap(&mut self.completions);
            let completed = self.completions.completed();
            let ended = self.flights.settle(completed, self.queue, lane.generation, line, &mut ended);
            lane.in_flight -= ended;
            self.owing -= ended;
            if let Err(error) = result {
                self.proxy.died(lane.handle.instance(), &error.to_string());
                died = true;
            }
        }
        if died {
            self.bury();
        }
        self.drop_idle_lanes();
        if !self.orphans.is_empty() {
            self.settle_orphans(&mut ended);
        }
        self.publish_in_flight();
    }

    /// Runs again, or answers, what dead instances left.
    #[cold]
    fn settle_orphans(&mut self, ended: &mut impl FnMut(Ended)) {
        let line = self.proxy.queues().line(self.queue);
        // Fenced off, and nobody is left who could run them.
        let nobody = self.current.is_none() && self.proxy.service() == Service::Failed;
        let lost = &mut self.lost;
        self.orphans.retain(|orphan| {
            let fails = match orphan.fence.verdict() {
                Verdict::Wait => false,
                Verdict::Replay => nobody,
                Verdict::Fail => true,
                Verdict::Never => {
                    *lost += 1;
                    return false;
                }
            };
            if fails {
                ended(Ended { slot: orphan.slot, status: Status::IoError, written: 0 });
                add(&line.requests, 1);
                add(&line.errors, 1);
            }
            !fails
        });
        // In order: one that has to wait holds up those behind it.
        let ready =
            self.orphans.iter().take_while(|orphan| orphan.fence.verdict() == Verdict::Replay).count();
        if ready == 0 || self.current.is_none() {
            return;
        }
        let mut replay = std::mem::take(&mut self.replay);
        replay.clear();
        replay.extend(self.orphans.iter().take(ready).map(|orphan| self.flights.request(orphan.slot)));
        // Out of the list first: if this instance dies too, it makes orphans of its own.
        let rest = self.orphans.split_off(ready);
        let mut given = std::mem::take(&mut self.orphans);
        let accepted = self.offer(&mut replay, None, ended);
        add(&self.line().replayed, accepted as u64);
        let mut left = given.split_off(accepted);
        left.append(&mut self.orphans);
        left.extend(rest);
        let flights = &self.flights;
        left.sort_by_key(|orphan| flights.order(orphan.slot));
        self.orphans = left;
        self.replay = replay;
    }

    fn publish_in_flight(&self) {
        self.line().in_flight.store(self.in_flight() as u64, Ordering::Relaxed);
    }

    /// Asks the domain to end what is in flight.
    pub fn cancel(&self) {
        for lane in self.current.iter().chain(&self.earlier).filter(|lane| lane.in_flight > 0) {
            if let Err(error) = lane.handle.instance().cancel() {
                log::warn!("queue {}: cancelling: {error}", self.queue);
            }
        }
        self.proxy.notice_death();
    }

    /// Counts requests that were answered without the domain.
    pub fn count_answered(&self, requests: u64, errors: u64) {
        add(&self.line().requests, requests);
        add(&self.line().errors, errors);
    }

    /// Counts chains that were no requests.
    pub fn count_malformed(&self, chains: u64) {
        add(&self.line().malformed, chains);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        for lane in self.current.take().into_iter().chain(self.earlier.drain(..)) {
            if lane.in_flight > 0 && !lane.handle.instance().is_dead() {
                log::error!(
                    "queue {}: {} requests of generation {} never ended; the instance stays resident",
                    self.queue,
                    lane.in_flight,
                    lane.generation
                );
                // It may still write to their buffers' bookkeeping: it must not be destroyed under them.
                lane.fence.abandon(self.queue);
                std::mem::forget(lane.handle);
            }
        }
        // Letting go of a queue is a call, too.
        self.proxy.notice_death();
        self.proxy.queues().set_notifier(self.queue, None);
        self.line().in_flight.store(0, Ordering::Relaxed);
    }
}
