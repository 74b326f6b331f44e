//! The read path: what a queue's worker does with the live domain.
//!
//! A worker is an SRCU reader. Between batches it passes the gate ([`Worker::gate`]); if the live
//! instance has changed it attaches to the new one, on its own thread, and lets go of the old one
//! as soon as nothing is in flight there. The usual case costs a load and two compares.
//!
//! If an instance panics, its workers leave it at once. What it had not completed becomes
//! *pending*: requests that are the worker's again, and are submitted once more, in the order in
//! which they came and before anything new, when the dead instance is fenced off and another domain
//! serves (`takeover.rs`, `replay.rs`).
//!
//! Requests that end in the call that submits them, in their order, are the usual case, and are
//! checked against the batch itself; everything else is checked against the table of what is in
//! flight (`inflight.rs`).
//!
//! Invariants: only this worker completes what it submitted; each completion is checked against
//! what is in flight, so a stale or invented one is dropped.

use crate::datapath::attachment::QueueAttachment;
use crate::datapath::cpu_time::Thread;
use crate::datapath::inflight::{InflightTable, PendingReplay, SLOT_LIMIT, TagScheme, slot_of};
use crate::datapath::progress::{Ended, Gate};
use crate::datapath::queue::{Notifier, QueueLine, Seat, add, coarse_now_ns};
use crate::device::DomainProxy;
use crate::domain::LoadedDomain;
use domain_abi::{self as abi, RawRequest, Status};
use domain_host::{CallError, CompletionBuffer};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Batches in a row, each ended before the next began, for which one look at the clock does. So the
/// age of a request that hangs in the call that submits it includes, at most, these batches before
/// it.
const UNCLOCKED: u32 = 7;

/// For how many completions there is room at first. It grows with what is in flight.
const FIRST_ROOM: usize = 32;

/// The worker's side of the proxy, for one queue. Stays on one thread.
pub struct Worker {
    pub(super) proxy: Arc<DomainProxy>,
    pub(super) queue: usize,
    pub(super) line: Arc<QueueLine>,
    pub(super) reader: srcu::Reader<Option<LoadedDomain>>,
    pub(super) current: Option<QueueAttachment>,
    /// Earlier instances that still owe completions.
    pub(super) earlier: Vec<QueueAttachment>,
    /// What all queues together have in flight.
    pub(super) owing: usize,
    pub(super) inflight: InflightTable,
    /// How many requests have been given an order.
    pub(super) ordered: u64,
    /// How many batches may begin before the clock is looked at again.
    pub(super) unclocked: u32,
    pub(super) pending: Vec<PendingReplay>,
    /// Some of them can run again now, and the last batch of them was full.
    pub(super) replays_more: bool,
    /// Requests that stay unanswered, because what had them cannot be fenced. Their slots are not
    /// used again.
    pub(super) lost: usize,
    pub(super) replay: Vec<RawRequest>,
    pub(super) completions: CompletionBuffer,
    /// For how many there is room: at least as many as are in flight, and those that are submitted.
    pub(super) room: usize,
    /// The generation that could not be attached to, so that it is not tried for ever.
    pub(super) unattachable: u64,
}

impl DomainProxy {
    /// Makes the calling thread the worker of `queue`, with room for `slots` requests in flight.
    /// Waits while the gate is shut.
    ///
    /// Returns `None` if there are as many workers as queues already.
    pub fn worker(
        self: &Arc<Self>,
        queue: usize,
        slots: usize,
        notifier: Box<dyn Notifier>,
    ) -> Option<Worker> {
        Worker::new(Arc::clone(self), queue, slots, notifier)
    }
}

impl Worker {
    fn new(
        proxy: Arc<DomainProxy>,
        queue: usize,
        slots: usize,
        notifier: Box<dyn Notifier>,
    ) -> Option<Self> {
        assert!(slots <= SLOT_LIMIT, "a queue of {slots} slots");
        let reader = proxy.cell.attach()?;
        // Not before there is a seat, since what has it may be another worker, which is to be woken
        // still; and before a domain is attached to, which may ask for it.
        proxy.queues.set_notifier(queue, Some(notifier));
        let line = Arc::clone(proxy.queues.line(queue));
        proxy.queues.set_seat(reader.index(), Some(Seat { queue, thread: Thread::current() }));
        let mut worker = Self {
            proxy,
            queue,
            line,
            reader,
            current: None,
            earlier: Vec::new(),
            owing: 0,
            inflight: InflightTable::new(slots),
            ordered: 0,
            unclocked: 0,
            pending: Vec::new(),
            replays_more: false,
            lost: 0,
            replay: Vec::new(),
            completions: CompletionBuffer::new(FIRST_ROOM),
            room: FIRST_ROOM,
            unattachable: 0,
        };
        worker.attach_live();
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
        self.owing + self.pending.len()
    }

    /// Whether the request in `slot` has been submitted and will end.
    #[must_use]
    pub fn is_awaited(&self, slot: usize) -> bool {
        self.inflight.generation(slot) != 0
            || self.pending.iter().any(|pending| pending.slot == slot)
    }

    /// Whether some have to run again, or to be given up, before anything new is taken.
    #[must_use]
    #[inline]
    pub const fn has_pending_replay(&self) -> bool {
        !self.pending.is_empty()
    }

    /// How many of them the live instance has.
    #[must_use]
    #[inline]
    pub fn owing_here(&self) -> usize {
        self.current.as_ref().map_or(0, |attached| attached.in_flight)
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
        self.line.pass();
        match self.reader.quiescent() {
            srcu::Gate::Open if self.current.is_some() => {}
            srcu::Gate::Open | srcu::Gate::Changed => self.attach_live(),
            srcu::Gate::Shut => {
                self.detach_dead();
                return Gate::Shut;
            }
        }
        Gate::Open
    }

    /// Waits until the gate opens, with nothing owed. May run the exchange of the upgrade.
    pub fn wait_at_gate(&mut self) {
        debug_assert_eq!(
            self.owing, 0,
            "a worker that is owed completions must reap them, not wait"
        );
        self.unclocked = 0;
        add(&self.line.parks, 1);
        self.line.rest();
        self.reader.arrive();
    }

    /// Says that this worker is about to sleep; the next [`gate`](Self::gate) wakes it. Returns
    /// `false` if it must look again first.
    pub fn sleep(&mut self) -> bool {
        let owing = self.owing > 0;
        self.unclocked = 0;
        let sleeps = self.reader.sleep(owing).map(srcu::Asleep::until_quiescent).is_some();
        if sleeps {
            self.line.rest();
        }
        sleeps
    }

    /// What requests that are submitted next are to be called. It holds until the next call that
    /// takes `&mut self`.
    #[must_use]
    #[inline]
    pub fn tags(&self) -> TagScheme {
        self.current.as_ref().map_or(TagScheme::NONE, |attached| attached.tags)
    }

    /// Submits requests, with [names](Self::tags), to the live domain; calls `ended` for each
    /// request that ended at once. Returns how many from the front were taken: the rest is the
    /// caller's again.
    ///
    /// `ended` must not panic: nothing is booked while it is told that all went well.
    ///
    /// # Panics
    /// If a request that is not answered at once has a name that is none of now.
    #[inline(always)]
    pub fn submit(&mut self, requests: &mut [RawRequest], ended: impl FnMut(Ended)) -> usize {
        if !self.pending.is_empty() {
            // Those come first.
            return 0;
        }
        if !self.is_served() {
            return self.submit_after_change(requests, ended);
        }
        self.offer(requests, true, ended)
    }

    /// Whether there is a domain that can be called.
    #[inline(always)]
    pub(super) fn is_served(&self) -> bool {
        self.current.as_ref().is_some_and(|attached| !attached.is_dead())
    }

    /// Submits to the current domain. Those that are not `fresh` are in the table already.
    #[inline(always)]
    pub(super) fn offer(
        &mut self,
        requests: &[RawRequest],
        fresh: bool,
        mut ended: impl FnMut(Ended),
    ) -> usize {
        let needed = self.owing + requests.len();
        if needed > self.room {
            self.make_room(needed);
        }
        let Some(attached) = self.current.as_mut() else { return 0 };
        self.unclocked = self.unclocked.wrapping_sub(1);
        if self.unclocked == u32::MAX {
            self.unclocked = look_at_clock(&self.line, self.owing);
        }
        // Before the call, so that a domain that does not come back is seen with what it has.
        add(&self.line.in_flight, requests.len() as u64);
        let taken = match attached.attachment.handle.submit(requests, &mut self.completions) {
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
        if let Some(attached) = self.current.as_mut() {
            attached.in_flight += taken.len() - told;
            self.owing += taken.len() - told;
        }
        // Only now, because it may panic.
        self.enter(&taken[told..], fresh);
        if let Some(attached) = self.current.as_mut() {
            let completed = &self.completions.completed()[told..];
            let (line, log) = (&self.line, &self.proxy.canary.errors);
            let ended = self.inflight.complete(completed, attached.tags, line, log, &mut ended);
            attached.in_flight -= ended;
            self.owing -= ended;
        }
        self.publish_in_flight();
        taken.len()
    }

    /// The call failed, so it is not known how many the domain took: it had all of them.
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
        if let Some(attached) = &self.current {
            self.proxy.died(attached.attachment.domain(), &error.to_string());
            // What was in flight becomes pending, which count as in flight.
            self.detach_dead();
        }
        requests.len()
    }

    /// Enters what was taken and is not answered yet into the table.
    fn enter(&mut self, requests: &[RawRequest], fresh: bool) {
        let tags = self.tags();
        for request in requests {
            assert!(tags.named(request), "{tags}: a request was submitted as {:#x}", request.tag);
            let slot = slot_of(request.tag);
            debug_assert_eq!(
                self.inflight.generation(slot),
                0,
                "a slot is submitted once at a time"
            );
            let order = if fresh { self.next_order() } else { self.inflight.order(slot) };
            self.inflight.enter(request, order);
        }
    }

    pub(super) const fn next_order(&mut self) -> u64 {
        self.ordered += 1;
        self.ordered
    }

    /// The domain was not there when we last looked, or has died since.
    #[cold]
    #[inline(never)]
    fn submit_after_change(
        &mut self,
        requests: &mut [RawRequest],
        ended: impl FnMut(Ended),
    ) -> usize {
        self.attach_live();
        if !self.pending.is_empty() {
            return 0;
        }
        if !self.is_served() {
            return self.submit_to_none(requests, ended);
        }
        let tags = self.tags();
        for request in requests.iter_mut() {
            tags.name(request, slot_of(request.tag));
        }
        self.offer(requests, true, ended)
    }

    /// Collects what has ended since; calls `ended` for each.
    pub fn reap(&mut self, mut ended: impl FnMut(Ended)) {
        let (line, log) = (&*self.line, &self.proxy.canary.errors);
        let mut died = false;
        for attached in self
            .current
            .iter_mut()
            .chain(&mut self.earlier)
            .filter(|attached| attached.in_flight > 0)
        {
            let result = attached.attachment.handle.reap(&mut self.completions);
            let completed = self.completions.completed();
            let ended = self.inflight.complete(completed, attached.tags, line, log, &mut ended);
            attached.in_flight -= ended;
            self.owing -= ended;
            if let Err(error) = result {
                self.proxy.died(attached.attachment.domain(), &error.to_string());
                died = true;
            }
        }
        if died {
            self.detach_dead();
        }
        self.drop_idle();
        if !self.pending.is_empty() {
            self.replay_pending(&mut ended);
        }
        self.publish_in_flight();
    }

    pub(super) fn publish_in_flight(&self) {
        self.line.in_flight.store(self.in_flight() as u64, Ordering::Relaxed);
    }

    /// Asks the domain to end what is in flight.
    pub fn cancel(&self) {
        for attached in
            self.current.iter().chain(&self.earlier).filter(|attached| attached.in_flight > 0)
        {
            if let Err(error) = attached.attachment.handle.instance().cancel() {
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
