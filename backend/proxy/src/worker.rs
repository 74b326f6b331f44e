//! The read path: what a queue's worker does with the live domain.
//!
//! A worker is an SRCU reader. Between batches it passes the gate ([`Worker::gate`]); if the live
//! instance has changed it attaches to the new one, on its own thread, and lets go of the old one
//! as soon as nothing is in flight there. The usual case costs a load and two compares.
//!
//! If an instance panics, its workers leave it at once. What it had not completed becomes
//! *orphans*: requests that are the worker's again, and are submitted once more, in the order in
//! which they came and before anything new, when the dead instance is fenced off and somebody else
//! serves (`takeover.rs`).
//!
//! Requests that end in the call that submits them, in their order, are the usual case, and are
//! checked against the batch itself; everything else is checked against the table of what is in
//! flight (`flights.rs`).
//!
//! Invariants: only this worker completes what it submitted; each completion is checked against
//! what is in flight, so a stale or invented one is dropped; a lane (a queue of an instance) is
//! dropped only when nothing is in flight on it, or its instance is dead.

use crate::fence::{Fence, Verdict};
use crate::flights::{Flights, Naming, SLOT_LIMIT, slot_of};
use crate::queue::{QueueLine, Seat, add, coarse_now_ns};
use crate::starved::Thread;
use crate::{DomainProxy, Member, Service};
use domain_abi::{self as abi, RawRequest};
use domain_abi::{QueueIndex, Status};
use domain_host::{CallError, CompletionBuffer, QueueHandle};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Said of an instance that was found dead.
pub(crate) const OUTSIDE_A_REQUEST: &str = "it panicked outside of a request";

/// Batches in a row, each ended before the next began, for which one look at the clock does. So the
/// age of a request that hangs in the call that submits it includes, at most, these batches before
/// it.
const UNCLOCKED: u32 = 7;

/// For how many completions there is room at first. It grows with what is in flight.
const FIRST_ROOM: usize = 32;

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
    /// The slot that it was named by.
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
    naming: Naming,
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
    line: Arc<QueueLine>,
    reader: srcu::Reader<Option<Member>>,
    current: Option<Lane>,
    /// Earlier instances that still owe completions.
    earlier: Vec<Lane>,
    /// What all lanes together have in flight.
    owing: usize,
    flights: Flights,
    /// How many requests have been given an order.
    ordered: u64,
    /// How many batches may begin before the clock is looked at again.
    unclocked: u32,
    orphans: Vec<Orphan>,
    /// Requests that stay unanswered, because what had them cannot be fenced. Their slots are not
    /// used again.
    lost: usize,
    replay: Vec<RawRequest>,
    completions: CompletionBuffer,
    /// For how many there is room: at least as many as are in flight, and those that are submitted.
    room: usize,
    /// The generation that could not be attached to, so that it is not tried for ever.
    unattachable: u64,
}

impl Worker {
    pub(crate) fn new(proxy: Arc<DomainProxy>, queue: usize, slots: usize) -> Option<Self> {
        assert!(slots <= SLOT_LIMIT, "a queue of {slots} slots");
        let reader = proxy.cell().attach()?;
        let line = Arc::clone(proxy.queues().line(queue));
        proxy.queues().set_seat(reader.index(), Some(Seat { queue, thread: Thread::current() }));
        let mut worker = Self {
            proxy,
            queue,
            line,
            reader,
            current: None,
            earlier: Vec::new(),
            owing: 0,
            flights: Flights::new(slots),
            ordered: 0,
            unclocked: 0,
            orphans: Vec::new(),
            lost: 0,
            replay: Vec::new(),
            completions: CompletionBuffer::new(FIRST_ROOM),
            room: FIRST_ROOM,
            unattachable: 0,
        };
        worker.adopt();
        Some(worker)
    }

    /// How many requests have been submitted and have not ended.
    #[must_use]
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.awaited() + self.lost
    }

    /// How many of them will end: all but those that are left unanswered for good, because what had
    /// them cannot be ended.
    #[must_use]
    #[inline]
    pub fn awaited(&self) -> usize {
        self.owing + self.orphans.len()
    }

    /// Whether some have to run again, or to be given up, before anything new is taken.
    #[must_use]
    #[inline]
    pub const fn has_orphans(&self) -> bool {
        !self.orphans.is_empty()
    }

    /// How many of them the live instance has.
    #[must_use]
    #[inline]
    pub fn owing_here(&self) -> usize {
        self.current.as_ref().map_or(0, |lane| lane.in_flight)
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
        match self.reader.quiescent() {
            srcu::Gate::Open if self.current.is_some() => {}
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
        add(&self.line.parks, 1);
        self.reader.arrive();
    }

    /// Says that this worker is about to sleep; the next [`gate`](Self::gate) wakes it. Returns
    /// `false` if it must look again first.
    pub fn sleep(&mut self) -> bool {
        let owing = self.owing > 0;
        self.unclocked = 0;
        self.reader.sleep(owing).map(srcu::Asleep::until_quiescent).is_some()
    }

    /// Leaves instances that are dead, and attaches to the live one.
    #[cold]
    fn adopt(&mut self) {
        self.change_over();
        self.show_attached();
    }

    fn change_over(&mut self) {
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
        if let Some(at) =
            self.earlier.iter().position(|lane| Arc::ptr_eq(lane.handle.instance(), &instance))
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
            Ok(handle) => {
                let naming = Naming::new(self.queue, generation);
                self.completions.renew();
                self.current = Some(Lane { handle, fence, naming, in_flight: 0 });
            }
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
        if !self.earlier.is_empty() {
            self.earlier.retain(|lane| lane.in_flight > 0);
            self.show_attached();
        }
    }

    /// Shows which instances cannot be let go of yet, because of us.
    fn show_attached(&self) {
        let lanes = self.current.iter().chain(&self.earlier);
        let since = lanes.map(|lane| lane.naming.generation()).min().unwrap_or(0);
        self.line.attached_since.store(since, Ordering::Relaxed);
    }

    /// Leaves every instance that has died: what it had becomes orphans.
    fn bury(&mut self) {
        let dead = |lane: &Lane| lane.handle.instance().is_dead();
        if !self.current.iter().chain(&self.earlier).any(dead) {
            return;
        }
        let lanes = std::mem::take(&mut self.earlier).into_iter().chain(self.current.take());
        let (buried, alive): (Vec<_>, Vec<_>) = lanes.partition(dead);
        // The live one, if it is alive, comes back from here at the next `adopt`, with what it
        // owes.
        self.earlier = alive;
        for lane in buried {
            self.owing -= lane.in_flight;
            for slot in 0..self.flights.len() {
                if self.flights.generation(slot) == lane.naming.generation() {
                    self.flights.let_go(slot);
                    self.orphans.push(Orphan { slot, fence: Arc::clone(&lane.fence) });
                }
            }
        }
        let flights = &self.flights;
        self.orphans.sort_by_key(|orphan| flights.order(orphan.slot));
        // The live lane may have been put among the earlier ones.
        let live = self.reader.read().as_ref().map(|live| Arc::clone(&live.instance));
        let at = live.and_then(|live| {
            self.earlier.iter().position(|lane| Arc::ptr_eq(lane.handle.instance(), &live))
        });
        self.current = at.map(|at| self.earlier.swap_remove(at));
    }

    /// What requests that are submitted next are to be called. It holds until the next call that
    /// takes `&mut self`.
    #[must_use]
    #[inline]
    pub fn naming(&self) -> Naming {
        self.current.as_ref().map_or(Naming::NOBODY, |lane| lane.naming)
    }

    /// Submits requests, with [names](Self::naming), to the live domain; calls `ended` for each
    /// request that ended at once. Returns how many from the front were taken: the rest is the
    /// caller's again.
    ///
    /// `ended` must not panic: nothing is booked while it is told that all went well.
    ///
    /// # Panics
    /// If a request that is not answered at once has a name that is none of now.
    #[inline(always)]
    pub fn submit(&mut self, requests: &mut [RawRequest], ended: impl FnMut(Ended)) -> usize {
        if !self.orphans.is_empty() {
            // Those come first.
            return 0;
        }
        if !self.is_served() {
            return self.submit_elsewhere(requests, ended);
        }
        self.offer(requests, true, ended)
    }

    /// Whether there is somebody who can be called.
    #[inline(always)]
    fn is_served(&self) -> bool {
        self.current.as_ref().is_some_and(|lane| !lane.handle.instance().is_dead())
    }

    /// Submits to the current lane. Those that are not `fresh` are in the table already.
    #[inline(always)]
    fn offer(
        &mut self,
        requests: &[RawRequest],
        fresh: bool,
        mut ended: impl FnMut(Ended),
    ) -> usize {
        let needed = self.owing + requests.len();
        if needed > self.room {
            self.make_room(needed);
        }
        let Some(lane) = self.current.as_mut() else { return 0 };
        self.unclocked = self.unclocked.wrapping_sub(1);
        if self.unclocked == u32::MAX {
            self.unclocked = look_at_clock(&self.line, self.owing);
        }
        // Before the call, so that a domain that does not come back is seen with what it has.
        add(&self.line.in_flight, requests.len() as u64);
        let taken = match lane.handle.submit(requests, &mut self.completions) {
            Ok(taken) => taken,
            Err(error) => return self.broke(requests, fresh, error, ended),
        };
        let Some(completed) = self.completions.all(requests.len()) else {
            return self.sort_out(&requests[..taken.min(requests.len())], fresh, 0, ended);
        };
        let mut told = 0;
        for (request, completion) in requests.iter().zip(completed) {
            // The tag says whose request it is, too.
            if completion.tag != request.tag || completion.status != abi::status::OK {
                return self.sort_out(
                    &requests[..taken.clamp(told, requests.len())],
                    fresh,
                    told,
                    ended,
                );
            }
            told += 1;
            ended(Ended {
                slot: slot_of(request.tag),
                status: Status::Ok,
                written: completion.written,
            });
        }
        // All of them, whatever else the domain says that it took.
        add(&self.line.requests, told as u64);
        add(&self.line.in_flight, (told as u64).wrapping_neg());
        told
    }

    /// Makes room for `needed` completions, between two calls: nothing of an earlier one is there
    /// still.
    #[cold]
    fn make_room(&mut self, needed: usize) {
        self.room = needed.next_power_of_two();
        self.completions = CompletionBuffer::new(self.room);
    }

    /// The domain took these requests, and did something else than to answer them all in their
    /// order: what comes after the first `told` goes through the table. Returns how many were
    /// taken.
    #[inline(never)]
    fn sort_out(
        &mut self,
        taken: &[RawRequest],
        fresh: bool,
        told: usize,
        mut ended: impl FnMut(Ended),
    ) -> usize {
        add(&self.line.requests, told as u64);
        if let Some(lane) = self.current.as_mut() {
            lane.in_flight += taken.len() - told;
            self.owing += taken.len() - told;
        }
        // Only now, because it may panic.
        self.enter(&taken[told..], fresh);
        if let Some(lane) = self.current.as_mut() {
            let completed = &self.completions.completed()[told..];
            let ended = self.flights.settle(completed, lane.naming, &self.line, &mut ended);
            lane.in_flight -= ended;
            self.owing -= ended;
        }
        self.publish_in_flight();
        taken.len()
    }

    /// The call failed, so nobody knows how many the domain took: it had all of them.
    #[cold]
    #[inline(never)]
    fn broke(
        &mut self,
        requests: &[RawRequest],
        fresh: bool,
        error: CallError,
        ended: impl FnMut(Ended),
    ) -> usize {
        self.sort_out(requests, fresh, 0, ended);
        if let Some(lane) = &self.current {
            self.proxy.died(lane.handle.instance(), &error.to_string());
            // What was in flight becomes orphans, which count as in flight.
            self.bury();
        }
        requests.len()
    }

    /// Enters what was taken and is not answered yet into the table.
    fn enter(&mut self, requests: &[RawRequest], fresh: bool) {
        let naming = self.naming();
        for request in requests {
            assert!(
                naming.named(request),
                "{naming}: a request was submitted as {:#x}",
                request.tag
            );
            let slot = slot_of(request.tag);
            debug_assert_eq!(
                self.flights.generation(slot),
                0,
                "a slot is submitted once at a time"
            );
            let order = if fresh { self.next_order() } else { self.flights.order(slot) };
            self.flights.enter(request, order);
        }
    }

    const fn next_order(&mut self) -> u64 {
        self.ordered += 1;
        self.ordered
    }

    /// The domain was not there when we last looked, or has died since.
    #[cold]
    #[inline(never)]
    fn submit_elsewhere(&mut self, requests: &mut [RawRequest], ended: impl FnMut(Ended)) -> usize {
        self.adopt();
        if !self.orphans.is_empty() {
            return 0;
        }
        if !self.is_served() {
            return self.submit_to_nobody(requests, ended);
        }
        let naming = self.naming();
        for request in requests.iter_mut() {
            naming.name(request, slot_of(request.tag));
        }
        self.offer(requests, true, ended)
    }

    /// There is no live domain: it has died, and either somebody takes over soon or nobody will.
    fn submit_to_nobody(
        &mut self,
        requests: &mut [RawRequest],
        mut ended: impl FnMut(Ended),
    ) -> usize {
        match self.proxy.service() {
            Service::Up | Service::Held => {
                // Up: somebody has just come, and is found at the next look. Held: somebody will
                // come, or nobody. No dead instance had these, so nothing has to be fenced off
                // before they run.
                let fence = Arc::new(Fence::open());
                for request in requests.iter_mut() {
                    let slot = slot_of(request.tag);
                    Naming::NOBODY.name(request, slot);
                    let order = self.next_order();
                    self.flights.enter(request, order);
                    self.orphans.push(Orphan { slot, fence: Arc::clone(&fence) });
                }
                self.publish_in_flight();
            }
            Service::Failed => {
                for request in requests.iter() {
                    ended(Ended {
                        slot: slot_of(request.tag),
                        status: Status::IoError,
                        written: 0,
                    });
                }
                add(&self.line.requests, requests.len() as u64);
                add(&self.line.errors, requests.len() as u64);
            }
        }
        requests.len()
    }

    /// Collects what has ended since; calls `ended` for each.
    pub fn reap(&mut self, mut ended: impl FnMut(Ended)) {
        let line = &*self.line;
        let mut died = false;
        for lane in
            self.current.iter_mut().chain(&mut self.earlier).filter(|lane| lane.in_flight > 0)
        {
            let result = lane.handle.reap(&mut self.completions);
            let completed = self.completions.completed();
            let ended = self.flights.settle(completed, lane.naming, line, &mut ended);
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
        let line = &*self.line;
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
        let ready = self
            .orphans
            .iter()
            .take_while(|orphan| orphan.fence.verdict() == Verdict::Replay)
            .count();
        if ready == 0 || !self.is_served() {
            return;
        }
        let naming = self.naming();
        let mut replay = std::mem::take(&mut self.replay);
        replay.clear();
        replay.extend(self.orphans.iter().take(ready).map(|orphan| {
            let mut request = self.flights.request(orphan.slot);
            naming.name(&mut request, orphan.slot);
            request
        }));
        // Out of the list first: if this instance dies too, it makes orphans of its own.
        let rest = self.orphans.split_off(ready);
        let mut given = std::mem::take(&mut self.orphans);
        self.publish_in_flight();
        let owing = self.owing_here();
        let accepted = self.offer(&replay, false, &mut *ended);
        add(&self.line.replayed, accepted as u64);
        if accepted == 0 && owing == 0 && self.is_served() {
            // Against the contract; nothing would ever bring us back here.
            log::error!("queue {}: the domain takes no request although it has none", self.queue);
            ended(Ended { slot: given.remove(0).slot, status: Status::IoError, written: 0 });
            add(&self.line.requests, 1);
            add(&self.line.errors, 1);
        }
        let mut left = given.split_off(accepted);
        left.append(&mut self.orphans);
        left.extend(rest);
        let flights = &self.flights;
        left.sort_by_key(|orphan| flights.order(orphan.slot));
        self.orphans = left;
        self.replay = replay;
    }

    fn publish_in_flight(&self) {
        self.line.in_flight.store(self.in_flight() as u64, Ordering::Relaxed);
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
        add(&self.line.requests, requests);
        add(&self.line.errors, errors);
    }

    /// Counts chains that were no requests.
    pub fn count_malformed(&self, chains: u64) {
        add(&self.line.malformed, chains);
    }
}

/// Something is in flight from now on, if nothing was. Returns how many batches may begin before
/// the next look.
#[inline(never)]
fn look_at_clock(line: &QueueLine, owing: usize) -> u32 {
    if owing > 0 {
        return 0;
    }
    line.busy_since.store(coarse_now_ns(), Ordering::Relaxed);
    UNCLOCKED
}

impl Drop for Worker {
    fn drop(&mut self) {
        for lane in self.current.take().into_iter().chain(self.earlier.drain(..)) {
            if lane.in_flight > 0 && !lane.handle.instance().is_dead() {
                log::error!(
                    "queue {}: {} requests of generation {} never ended; the instance stays resident",
                    self.queue,
                    lane.in_flight,
                    lane.naming.generation()
                );
                // It may still write to their buffers' bookkeeping: it must not be destroyed under
                // them.
                lane.fence.abandon(self.queue);
                std::mem::forget(lane.handle);
            }
        }
        // Letting go of a queue is a call, too.
        self.proxy.notice_death();
        self.proxy.queues().set_notifier(self.queue, None);
        self.proxy.queues().set_seat(self.reader.index(), None);
        self.line.in_flight.store(0, Ordering::Relaxed);
        self.line.attached_since.store(0, Ordering::Relaxed);
    }
}
