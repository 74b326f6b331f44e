//! The loop of a queue's worker.
//!
//! ```text
//!   kick -> [ gate -> pop and parse a batch -> submit -> write status and used ring -> call ] ...
//!        until the ring is empty -> poll, or sleep
//!                ^                                                                  |
//!                +------------------------------------------------------------------+
//! ```
//!
//! The worker stays for the whole session, with what is in flight; what it knows of its ring
//! ([`RingState`]) goes when the ring is turned off.
//!
//! Invariants: the queue's lock is held while chains are taken and while they are given back, never
//! while the domain works or the gate is shut; a worker with a request in hand does not wait at the
//! gate; what the domain did not take goes back to the ring, in order; a worker that polls instead
//! of sleeping passes the gate, asks for its inputs and lets go of the lock each time; a request
//! that is left unanswered for good holds up nothing but the stop of its ring.
//!
//! Deliberately absent: which domain serves (`proxy`), and when sessions begin and end
//! (`session/`).

use super::inputs::{BatchInputs, Memory};
use super::meter::{Meter, end};
use super::notices;
use super::poller::{Awaited, Poller};
use super::ring::{RingState, is_on};
use super::tracking::{Tracking, mark};
use crate::phase::{Phase, PhaseCell};
use domain_abi::{RawRequest, Status};
use proxy::{Ended, Gate, Probe, Worker, slot_of};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vhost_user_backend::VringT;
use virtio_blk::DescriptorTable;
use virtio_queue::{Error, Queue, QueueT};
use virtqueue::{Chain, Marker, RequestTable, Share, Snapshot, Used};

/// Most chains that are taken at once: enough to pay for a batch, few enough that an upgrade's gate
/// and the control messages never wait long, and that a driver that sleeps is being woken by the
/// first of a deep queue while the rest is served.
pub(super) const BATCH: usize = 16;

/// Most bytes of a batch, but for one request: copying them is what an upgrade's gate waits for.
pub(super) const BATCH_BYTES: u64 = 8 << 20;

/// How often a worker that polls looks at the ring before it looks at everything else, with a pause
/// of the CPU each time: about half a microsecond, which is how long an upgrade's gate or a control
/// message may wait for it.
const SPINS: u32 = 16;

/// How a round went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Requests were taken: there may be more.
    Took,
    /// Only what had ended was given back.
    GaveBack,
    /// There is more in the ring, which was looked at in vain.
    Again,
    /// Nothing to do.
    Idle,
}

/// What there was in the ring.
pub(super) enum Popped {
    /// Nothing that can be taken.
    Nothing,
    /// Chains, which are in the batch now.
    Batch,
    /// Chains that can be taken at the next look: in a memory map that was just replaced, or with
    /// a head that is free now.
    Later,
}

/// One queue's worker.
pub(crate) struct QueueWorker {
    /// The queue's side of the device.
    pub(super) device: Worker,
    pub(super) queue: usize,
    queue_size: u16,
    pub(super) requests: RequestTable,
    pub(super) ring: RingState,
    pub(super) tracking: Tracking,
    /// A chain was taken.
    has_taken: bool,
    pub(super) batch: Vec<RawRequest>,
    pub(super) used: Vec<Used>,
    poller: Poller,
    pub(super) phase: Arc<PhaseCell>,
    pub(super) marker: Marker,
    pub(super) meter: Meter,
    /// Generation of the instance that took less than it was offered; it is offered nothing more
    /// until something has ended.
    backpressured_by: Option<u64>,
    /// The rate limit lets nothing through before then, as far as was seen in this turn.
    pub(super) throttled: Option<Instant>,
    pub(super) probe: Probe,
}

impl QueueWorker {
    pub(crate) fn new(
        device: Worker,
        queue: usize,
        queue_size: u16,
        poll: Duration,
        phase: Arc<PhaseCell>,
    ) -> Self {
        Self {
            device,
            queue,
            queue_size,
            requests: RequestTable::new(queue_size, BATCH),
            ring: RingState::default(),
            tracking: Tracking::default(),
            has_taken: false,
            batch: Vec::with_capacity(BATCH),
            used: Vec::with_capacity(BATCH),
            poller: Poller::new(poll),
            phase,
            marker: Marker::default(),
            meter: Meter::default(),
            backpressured_by: None,
            throttled: None,
            probe: Probe::default(),
        }
    }

    /// How many requests are in flight and will end. Those that an earlier process had in flight
    /// are, until there is no frontend that they could be answered to.
    pub(crate) fn awaited(&self) -> usize {
        let is_over = self.phase.is_at(Phase::Detached);
        self.device.awaited() + if is_over { 0 } else { self.tracking.to_replay() }
    }

    /// How many requests are left unanswered for good.
    pub(crate) fn unanswerable(&self) -> usize {
        self.device.in_flight() - self.device.awaited()
    }

    /// Whether a chain has ever been taken.
    pub(crate) const fn has_taken(&self) -> bool {
        self.has_taken
    }

    /// Whether the ring is on, and its driver has never written to it, as far as can be seen: so it
    /// looks at first, and for ever if what is mapped here is not the guest's memory.
    pub(crate) fn is_blank(&self, vring: &impl VringT<Memory>) -> bool {
        is_on(&vring.get_ref()) && self.ring.is_blank()
    }

    /// Whether some of what is awaited is owed by instances that do not serve any more.
    pub(crate) fn is_owed_elsewhere(&self) -> bool {
        self.device.awaited() > self.device.owing_here()
    }

    /// Gives up what is in flight: the domain is asked to end it, and how it ends is not published.
    pub(crate) fn abandon(&mut self) {
        let _ = self.device.gate();
        self.device.cancel();
        let Self { device, requests, .. } = self;
        device.reap(|ended| requests.discard(ended.slot));
        self.count_given_up();
    }

    /// Serves the queue until there is nothing to do; then the worker sleeps, as far as upgrades
    /// are concerned.
    ///
    /// `inputs` is asked before each batch. Returns with the ring's notifications on, or with the
    /// ring not to be served.
    pub(crate) fn serve<'a>(
        &mut self,
        vring: &impl VringT<Memory>,
        inputs: impl Fn() -> BatchInputs<'a>,
    ) {
        let mut promised = false;
        self.poller.begin();
        self.throttled = None;
        self.meter.rest();
        loop {
            if self.device.gate() == Gate::Shut {
                self.meter.rest();
                if self.device.owing() == 0 {
                    self.device.wait_at_gate();
                } else if self.collect(vring) == Progress::Idle && self.device.sleep() {
                    // What is owed comes with a notification, and so does the gate's opening.
                    return;
                }
                continue;
            }
            let inputs = inputs();
            let round = self.round(vring, &inputs);
            match round {
                Progress::Took => self.poller.guest_came(),
                Progress::GaveBack => self.poller.device_came(),
                Progress::Again | Progress::Idle => {}
            }
            if round != Progress::Idle {
                promised = false;
                continue;
            }
            self.meter.rest();
            if std::mem::take(&mut promised)
                && self.throttled.is_none()
                && self.may_take(&inputs)
                && self.serves(vring, &inputs)
            {
                // The ring has said that there is more, and there is nothing to be had: without
                // this a hostile driver keeps us running.
                self.give_up(&Error::InvalidAvailRingIndex);
            }
            // Where the domain takes nothing more, only its answers help.
            let answers = if self.is_backpressured() { 0 } else { self.ring.answers };
            let awaited = Awaited::after(answers, self.device.awaited());
            let may_poll = !inputs.stop_popping && self.ring.is_on && self.throttled.is_none();
            if may_poll && self.poller.idle(awaited) {
                self.spin_poll();
                continue;
            }
            if !self.device.sleep() {
                continue;
            }
            if !self.more_came(vring, &inputs) {
                return;
            }
            promised = !self.tracking.is_outdated(inputs.inflight);
        }
    }

    /// Looks at the ring for a moment, without the lock, until something comes.
    fn spin_poll(&self) {
        let may_take = !self.is_backpressured() && self.tracking.replay.is_none();
        for _ in 0..SPINS {
            if may_take && self.ring.has_more() {
                return;
            }
            std::hint::spin_loop();
        }
    }

    /// Whether the ring is to be served at all.
    fn serves(&self, vring: &impl VringT<Memory>, inputs: &BatchInputs<'_>) -> bool {
        !self.ring.is_broken && !inputs.stop_popping && is_on(&vring.get_ref())
    }

    /// Whether the domain is to be offered nothing: what will make it take more is on its way.
    fn is_backpressured(&self) -> bool {
        let has_taken_less = || self.backpressured_by == Some(self.device.tags().generation());
        self.device.has_pending_replay() || self.device.owing_here() > 0 && has_taken_less()
    }

    /// Whether the ring can be looked at: not, while the domain is full, or something is in flight
    /// with an older memory map or in another region, or has to run again first.
    fn may_take(&self, inputs: &BatchInputs<'_>) -> bool {
        let is_current = |snapshot: &Snapshot| snapshot.version() == inputs.memory_version;
        !self.is_backpressured()
            && self.tracking.replay.is_none()
            && !self.tracking.is_outdated(inputs.inflight)
            && self.requests.snapshot().is_some_and(is_current)
    }

    /// Turns notifications on; whether chains have come meanwhile.
    fn more_came(&mut self, vring: &impl VringT<Memory>, inputs: &BatchInputs<'_>) -> bool {
        // A rate limit's timer brings us back, and no kick is needed.
        let waits = self.is_backpressured() || self.throttled.is_some();
        if !self.serves(vring, inputs) || waits || self.room() == 0 {
            return false;
        }
        if self.tracking.replay.is_some() {
            // One is awaited before the next.
            return false;
        }
        let Some(snapshot) = self.requests.snapshot() else { return false };
        if snapshot.version() != inputs.memory_version || self.tracking.is_outdated(inputs.inflight)
        {
            // Something is in flight with the old map or region: its end brings us back.
            return self.device.awaited() == 0;
        }
        let state = vring.get_ref();
        match self.ring.views.view(snapshot, state.get_queue()) {
            Ok(view) => {
                self.ring.kicks_suppressed = false;
                virtqueue::enable_notification(state.get_queue(), view)
            }
            Err(error) => {
                drop(state);
                self.give_up(&error);
                false
            }
        }
    }

    #[cold]
    pub(super) fn give_up(&mut self, error: &Error) {
        notices::broken_ring(self.queue, error);
        self.device.count_malformed(1);
        (self.ring.is_broken, self.ring.is_on) = (true, false);
    }

    /// Gives back what has ended since.
    fn collect(&mut self, vring: &impl VringT<Memory>) -> Progress {
        if !self.phase.is_plain() && self.phase.is_hushed(self.queue) {
            self.drop_ended();
            return if self.device.replays_more() { Progress::Again } else { Progress::Idle };
        }
        let Self { device, requests, used, meter, .. } = self;
        used.clear();
        let line = meter.line();
        device.reap(|ended| end(requests, used, line, ended));
        if self.used.is_empty() {
            return if self.device.replays_more() { Progress::Again } else { Progress::Idle };
        }
        self.backpressured_by = None;
        self.publish_used(&mut vring.get_mut());
        Progress::GaveBack
    }

    fn round(&mut self, vring: &impl VringT<Memory>, inputs: &BatchInputs<'_>) -> Progress {
        let collected =
            if self.device.awaited() > 0 { self.collect(vring) } else { Progress::Idle };
        // What was in flight before this process began is popped already.
        let is_replaying = self.tracking.replay.is_some();
        if inputs.stop_popping && !is_replaying || self.is_backpressured() || !self.refresh(inputs)
        {
            return collected;
        }
        self.used.clear();
        let popped =
            if is_replaying { self.pop_marked(vring, inputs) } else { self.pop(vring, inputs) };
        match popped {
            Popped::Batch => {}
            Popped::Nothing => return collected,
            Popped::Later => return Progress::Again,
        }
        let is_limited = inputs.limiter.is_on();
        let offered = if is_limited { self.admit(inputs.limiter) } else { self.batch.len() };
        if self.device.is_measured() {
            self.device.note_taken(&mut self.probe, &self.batch[..offered]);
        }
        self.count_taken();
        let Self { device, requests, used, batch, meter, .. } = self;
        let (awaited, line) = (device.awaited(), meter.line());
        let mut accepted = 0;
        if offered > 0 {
            accepted =
                device.submit(&mut batch[..offered], |ended| end(requests, used, line, ended));
            if accepted == 0
                && used.is_empty()
                && device.owing_here() == 0
                && !device.has_pending_replay()
            {
                // Against the contract; without an answer the guest would wait for ever.
                notices::takes_no_request(self.queue);
                let slot = slot_of(batch[0].tag);
                let ended = Ended { slot, status: Status::IoError, written: 0 };
                end(requests, used, line, ended);
                device.count_answered(1, 1);
                device.note_failed(&batch[0]);
                accepted = 1;
            }
        }
        if is_limited && accepted < offered {
            self.take_back(inputs.limiter, accepted, offered);
        }
        self.count_submitted(awaited, accepted);
        let mut state = vring.get_mut();
        let is_over = accepted == self.batch.len() && !self.requests.has_immediate();
        let unpopped = if is_over { 0 } else { self.end_batch(accepted) };
        self.backpressured_by = (accepted < offered).then(|| self.device.tags().generation());
        if unpopped > 0 {
            self.return_chains(&mut state, unpopped);
        }
        self.publish_used(&mut state);
        if self.used.is_empty() && accepted == 0 { collected } else { Progress::Took }
    }

    /// Takes up to a batch of chains and parses them.
    fn pop(&mut self, vring: &impl VringT<Memory>, inputs: &BatchInputs<'_>) -> Popped {
        let room = self.room();
        let is_outdated = || inputs.newest_version.load(Ordering::Acquire) != inputs.memory_version;
        let mut state = vring.get_mut();
        if !is_on(&state) {
            self.ring = RingState::default();
            self.tracking.ring_is_off(self.device.in_flight());
            return Popped::Nothing;
        }
        self.ring.is_on = !self.ring.is_broken;
        if self.ring.is_broken {
            return Popped::Nothing;
        }
        // Looked at when the ring is seen to be on: what the frontend has said before holds.
        if self.tracking.is_outdated(inputs.inflight)
            && let Some(popped) = self.take_up(&mut state, inputs)
        {
            return popped;
        }
        let Some(snapshot) = self.requests.snapshot() else { return Popped::Nothing };
        let queue: &mut Queue = state.get_queue_mut();
        let found = self.ring.views.view(snapshot, queue);
        let found = found.and_then(|view| Ok((view, virtqueue::waiting(queue, view)?)));
        let (view, waiting) = match found {
            Ok(found) => found,
            Err(error) => {
                drop(state);
                if is_outdated() {
                    // The ring may lie in memory that has just been shared.
                    return Popped::Later;
                }
                self.give_up(&error);
                return Popped::Nothing;
            }
        };
        let first = queue.next_avail();
        self.ring.next_avail = first;
        let take = usize::from(waiting).min(BATCH).min(room) as u16;
        if take == 0 {
            return Popped::Nothing;
        }
        // A change of memory that was acknowledged holds for all that the driver sends after it.
        // The version was looked at before the chains were seen, and both may have come in between.
        if is_outdated() {
            return Popped::Later;
        }
        if !self.ring.kicks_suppressed {
            // As long as the worker looks by itself.
            virtqueue::disable_notification(view);
            self.ring.kicks_suppressed = true;
        }
        if take > 1 {
            (0..take).for_each(|ahead| view.prefetch(first.wrapping_add(ahead)));
        }
        self.ring.answers = 0;
        self.has_taken = true;
        self.meter.take();
        let table = DescriptorTable { addr: queue.desc_table(), size: queue.size() };
        self.batch.clear();
        let Some(mut parser) = self.requests.parser(table) else { return Popped::Nothing };
        let tags = self.device.tags();
        let name = move |request: &mut RawRequest, head| tags.name(request, head);
        let (end, mut next) = (first.wrapping_add(take), first);
        let (mut bytes, mut in_use) = (0, None);
        while next != end && bytes < BATCH_BYTES {
            let (chains, most) = (end.wrapping_sub(next), BATCH_BYTES - bytes);
            let share = Share { first: next, chains, bytes: most };
            let usual = parser.take_usual(view, share, inputs.limits, name, &mut self.batch);
            if usual.chains > 0 {
                (next, bytes) = (next.wrapping_add(usual.chains), bytes + usual.bytes);
                continue;
            }
            let chain = view.avail_entry(next);
            next = next.wrapping_add(1);
            match parser.next(chain, inputs.limits) {
                Chain::Request(head, mut request) => {
                    bytes += request.len();
                    tags.name(&mut request, usize::from(head));
                    self.batch.push(request);
                }
                Chain::InUse(head) => {
                    next = next.wrapping_sub(1);
                    in_use = Some(head);
                    break;
                }
                Chain::Answer(None) => {}
                Chain::Answer(Some(addr)) => notices::outside_of_memory(self.queue, addr),
                Chain::Malformed { head, reason, outside } => {
                    notices::malformed_chain(self.queue, head, reason, outside);
                    if head >= table.size && self.tracking.tracker.is_some() {
                        // It cannot be marked, so nothing that can comes behind it.
                        break;
                    }
                }
            }
        }
        if let Some(tracker) = &mut self.tracking.tracker {
            mark(tracker, &self.requests, &self.batch);
        }
        self.ring.next_avail = next;
        queue.set_next_avail(next);
        let has_taken = next != first;
        match in_use {
            Some(head) if !self.frees(head) && !has_taken => Popped::Nothing,
            Some(_) if !has_taken => Popped::Later,
            _ => Popped::Batch,
        }
    }

    /// How many more requests there can be in flight: heads that are those of requests which will
    /// never end are free.
    fn room(&self) -> usize {
        usize::from(self.queue_size).saturating_sub(self.device.awaited())
    }

    /// Leaves the device. Returns how many requests are left unanswered for good.
    pub(crate) fn detach(self) -> usize {
        self.unanswerable()
    }
}
