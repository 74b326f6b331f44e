//! The way of a request, from kick to call: one worker per virtqueue, on its own thread.
//!
//! ```text
//!   kick -> [ gate -> pop and parse a batch -> submit -> write status and used ring -> call ] ...
//!        until the ring is empty -> look on, or sleep
//!                ^                                                                     |
//!                +---------------------------------------------------------------------+
//! ```
//!
//! Invariants: the queue's lock is held while chains are taken and while they are given back, never
//! while the domain works or the gate is shut; nobody waits at the gate with a request in hand;
//! what the domain did not take goes back to the ring, in order; a worker that looks on instead of
//! sleeping passes the gate, asks for its orders and lets go of the lock each time; a request that
//! is left unanswered for good holds up nothing but the stop of its ring.
//!
//! Deliberately absent: which domain serves (`proxy`), and when sessions begin and end
//! (`session.rs`).

use crate::guest_memory::{self, RingView, Snapshot};
use crate::log_limit;
use crate::poll::{Awaited, Poller};
use crate::ring::{self, Used};
use crate::vring::Vring;
use domain_abi::Status;
use domain_abi::{RawRequest, RawSegment};
use log::Level;
use proxy::{Ended, Gate, Worker, slot_of};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vhost_user_backend::{VringState, VringT};
use virtio_blk::{
    DescriptorTable, Limits, MalformedChain, Parsed, SEG_MAX, StatusSlot, WireStatus, parse,
    used_len,
};
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Most chains that are taken at once: enough to pay for a batch, few enough that an upgrade's gate
/// and the control messages never wait long, and that a driver that sleeps is being woken by the
/// first of a deep queue while the rest is served.
const BATCH: usize = 16;

/// Most bytes of a batch, but for one request: copying them is what an upgrade's gate waits for.
const BATCH_BYTES: u64 = 8 << 20;

/// How often a worker that looks on looks at the ring before it looks at everything else, with a
/// pause of the CPU each time: about half a microsecond, which is how long an upgrade's gate or a
/// control message may wait for it.
const LOOKS: u32 = 16;

/// What the session says to a worker between two batches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Orders<'a> {
    /// Take nothing more.
    pub(crate) stop_popping: bool,
    /// What requests are held against.
    pub(crate) limits: &'a Limits,
    /// Version of the memory map.
    pub(crate) memory_version: u64,
    /// The memory map.
    pub(crate) memory: &'a GuestMemoryAtomic<GuestMemoryMmap>,
}

/// A request in flight: what is needed to end it.
struct Slot {
    head: u16,
    op: u32,
    len: u64,
    status_at: Option<StatusSlot>,
    segments: Vec<RawSegment>,
}

/// All slots of a queue. There is room for all of them, so that none ever moves; they are made when
/// they are first needed, so that a ring costs what of it is used.
struct Slots {
    table: Vec<Slot>,
    /// Those of the table that nobody has.
    free: Vec<u16>,
    /// How many there can be.
    limit: usize,
}

impl Slots {
    fn new(limit: u16) -> Self {
        let limit = usize::from(limit);
        Self { table: Vec::with_capacity(limit), free: Vec::with_capacity(limit), limit }
    }

    /// How many can be taken.
    #[inline]
    fn available(&self) -> usize {
        self.free.len() + (self.limit - self.table.len())
    }

    /// The slot that is taken next, by [`take`](Self::take).
    ///
    /// # Panics
    /// None is available.
    #[inline]
    fn next(&mut self) -> u16 {
        match self.free.last() {
            Some(&index) => index,
            None => self.make(),
        }
    }

    #[cold]
    fn make(&mut self) -> u16 {
        assert!(self.table.len() < self.limit, "no more chains are taken than slots are available");
        let index = self.table.len() as u16;
        let segments = Vec::with_capacity(8);
        self.table.push(Slot { head: 0, op: 0, len: 0, status_at: None, segments });
        self.free.push(index);
        index
    }

    /// Takes the slot that is next.
    #[inline]
    fn take(&mut self) {
        self.free.pop();
    }

    /// Turns a request that has ended into its entry of the used ring, after telling the guest how
    /// it ended.
    fn end(&mut self, ended: Ended) -> Used {
        let slot = &mut self.table[ended.slot];
        if let Some(status_at) = slot.status_at.take() {
            status_at.write(WireStatus::from_completion(ended.status as u32));
        }
        self.free.push(ended.slot as u16);
        Used { head: slot.head, len: used_len(slot.op, slot.len, ended.written) }
    }
}

/// A chain of the batch that is not for the domain.
struct Other {
    /// How many of the batch's requests are before it.
    after: usize,
    used: Used,
    /// Its answer; without one it was no request at all.
    answer: Option<(StatusSlot, WireStatus)>,
}

/// How a round went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// Requests were taken: there may be more.
    Took,
    /// Only what had ended was given back.
    GaveBack,
    /// Nothing to do.
    Idle,
}

/// One queue's worker.
pub(crate) struct QueueWorker {
    lane: Worker,
    queue: usize,
    /// A chain was taken.
    has_taken: bool,
    slots: Slots,
    snapshot: Option<Snapshot>,
    /// Where the rings are in `snapshot`, once somebody has looked.
    view: Option<RingView>,
    /// What the next chain's position was when we last had the lock; only good for a look.
    next_avail: u16,
    batch: Vec<RawRequest>,
    others: Vec<Other>,
    used: Vec<Used>,
    poller: Poller,
    /// The driver was asked not to kick, and not yet to kick again.
    awake: bool,
    /// How many answers the guest has been given since its requests were last taken.
    answers: usize,
    /// Publish nothing more: nobody is there, and whoever comes back has taken the used index for
    /// the place to go on at.
    hung_up: Arc<AtomicBool>,
    /// The ring made no sense; it is left alone until it is set up again.
    broken: bool,
    /// How many requests of earlier snapshots are left unanswered for good.
    lost: usize,
    /// Generation of the instance that took less than it was offered; it is offered nothing more
    /// until something has ended.
    full: Option<u64>,
}

impl QueueWorker {
    pub(crate) fn new(
        lane: Worker,
        queue: usize,
        queue_size: u16,
        poll: Duration,
        hung_up: Arc<AtomicBool>,
    ) -> Self {
        Self {
            lane,
            queue,
            has_taken: false,
            slots: Slots::new(queue_size),
            snapshot: None,
            view: None,
            next_avail: 0,
            batch: Vec::with_capacity(BATCH),
            others: Vec::with_capacity(BATCH),
            used: Vec::with_capacity(BATCH),
            poller: Poller::new(poll),
            awake: false,
            answers: 0,
            hung_up,
            broken: false,
            lost: 0,
            full: None,
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.lane.in_flight()
    }

    /// How many of them will end.
    pub(crate) fn awaited(&self) -> usize {
        self.lane.awaited()
    }

    /// Whether a chain has ever been taken.
    pub(crate) const fn has_taken(&self) -> bool {
        self.has_taken
    }

    /// Whether the ring is on, and its driver has never written to it, as far as can be seen: so it
    /// looks at first, and for ever if what is mapped here is not the guest's memory.
    pub(crate) fn is_blank(&self, vring: &Vring) -> bool {
        let is_blank = |view: &RingView| view.avail_flags() == 0 && view.avail_idx() == 0;
        is_on(&vring.get_ref()) && self.view.as_ref().is_some_and(is_blank)
    }

    /// Whether some of these are owed by instances that do not serve any more.
    pub(crate) fn is_owed_elsewhere(&self) -> bool {
        self.lane.awaited() > self.lane.owing_here()
    }

    /// Gives up what is in flight: the domain is asked to end it, and how it ends is not told to
    /// anybody.
    pub(crate) fn abandon(&mut self) {
        let _ = self.lane.gate();
        self.lane.cancel();
        self.lane.reap(|_| {});
    }

    /// Serves the queue until there is nothing to do; then the worker sleeps, as far as upgrades
    /// are concerned.
    ///
    /// `orders` is asked before each batch. Returns with the ring's notifications on, or with the
    /// ring not to be served.
    pub(crate) fn serve<'a>(&mut self, vring: &Vring, orders: impl Fn() -> Orders<'a>) {
        let mut promised = false;
        self.poller.begin();
        loop {
            if self.lane.gate() == Gate::Shut {
                if self.lane.owing() == 0 {
                    self.lane.wait_at_gate();
                } else if self.collect(vring) == Round::Idle && self.lane.sleep() {
                    // What is owed comes with a notification, and so does the gate's opening.
                    return;
                }
                continue;
            }
            let orders = orders();
            let round = self.round(vring, &orders);
            match round {
                Round::Took => self.poller.guest_came(),
                Round::GaveBack => self.poller.device_came(),
                Round::Idle => {}
            }
            if round != Round::Idle {
                promised = false;
                continue;
            }
            if std::mem::take(&mut promised)
                && self.may_take(&orders)
                && self.serves(vring, &orders)
            {
                // The ring has said that there is more, and there is nothing to be had: without
                // this a hostile driver keeps us running.
                self.give_up(&Error::InvalidAvailRingIndex);
            }
            // Where the domain takes nothing more, only its answers help.
            let answers = if self.is_full() { 0 } else { self.answers };
            let awaited = Awaited::after(answers, self.lane.awaited());
            if !orders.stop_popping && !self.broken && self.poller.idle(awaited) {
                self.look_on();
                continue;
            }
            if !self.lane.sleep() {
                continue;
            }
            if !self.more_came(vring, &orders) {
                return;
            }
            promised = true;
        }
    }

    /// Looks at the ring for a moment, without the lock, until something comes.
    fn look_on(&self) {
        let full = self.is_full();
        for _ in 0..LOOKS {
            // The view may be of a ring that the frontend has given up, but it is mapped. The round
            // will see.
            if !full && self.view.as_ref().is_some_and(|view| view.avail_idx() != self.next_avail) {
                return;
            }
            std::hint::spin_loop();
        }
    }

    /// Whether the ring is to be served at all.
    fn serves(&self, vring: &Vring, orders: &Orders<'_>) -> bool {
        !self.broken && !orders.stop_popping && is_on(&vring.get_ref())
    }

    /// Whether the domain is to be offered nothing: what will make it take more is on its way.
    fn is_full(&self) -> bool {
        let has_taken_less = || self.full == Some(self.lane.naming().generation());
        self.lane.has_orphans() || self.lane.owing_here() > 0 && has_taken_less()
    }

    /// Whether the ring can be looked at: not, while the domain is full or something is in flight
    /// with an older memory map.
    fn may_take(&self, orders: &Orders<'_>) -> bool {
        let is_current = |snapshot: &Snapshot| snapshot.version() == orders.memory_version;
        !self.is_full() && self.snapshot.as_ref().is_some_and(is_current)
    }

    /// Turns notifications on; whether chains have come meanwhile.
    fn more_came(&mut self, vring: &Vring, orders: &Orders<'_>) -> bool {
        if !self.serves(vring, orders) || self.is_full() || self.slots.available() == 0 {
            return false;
        }
        let Some(snapshot) = &self.snapshot else { return false };
        if snapshot.version() != orders.memory_version {
            // Something is in flight with the old map: its end brings us back.
            return self.lane.awaited() == 0;
        }
        let state = vring.get_ref();
        match look_up(&mut self.view, snapshot, state.get_queue()) {
            Ok(view) => {
                self.awake = false;
                ring::ask_for_kicks(state.get_queue(), view)
            }
            Err(error) => {
                drop(state);
                self.give_up(&error);
                false
            }
        }
    }

    #[cold]
    fn give_up(&mut self, error: &Error) {
        let what_to_do = match error {
            Error::FindMemoryRegion => {
                ", nor is it in the memory that the frontend has shared (in QEMU share=on)"
            }
            _ => "",
        };
        log_limit::say(
            Level::Error,
            "ring makes no sense",
            format_args!(
                "queue {}: the ring makes no sense ({error}){what_to_do}; it is not served until the driver resets it",
                self.queue
            ),
        );
        self.lane.count_malformed(1);
        self.broken = true;
    }

    /// Gives back what has ended since.
    fn collect(&mut self, vring: &Vring) -> Round {
        let Self { lane, slots, used, .. } = self;
        used.clear();
        lane.reap(|ended| used.push(slots.end(ended)));
        if self.used.is_empty() {
            return Round::Idle;
        }
        self.full = None;
        self.give_back(&mut vring.get_mut());
        Round::GaveBack
    }

    fn round(&mut self, vring: &Vring, orders: &Orders<'_>) -> Round {
        let collected = if self.lane.awaited() > 0 { self.collect(vring) } else { Round::Idle };
        if orders.stop_popping || self.is_full() || !self.refresh(orders) {
            return collected;
        }
        if !self.pop(vring, orders.limits) {
            return collected;
        }
        self.used.clear();
        let Self { lane, slots, used, batch, .. } = self;
        let mut accepted = 0;
        if !batch.is_empty() {
            accepted = lane.submit(batch, |ended| used.push(slots.end(ended)));
            if accepted == 0 && used.is_empty() && lane.owing_here() == 0 && !lane.has_orphans() {
                // Against the contract; without an answer the guest would wait for ever.
                log_limit::say(
                    Level::Error,
                    "takes no request",
                    format_args!(
                        "queue {}: the domain takes no request although it has none",
                        self.queue
                    ),
                );
                used.push(slots.end(Ended {
                    slot: slot_of(batch[0].tag),
                    status: Status::IoError,
                    written: 0,
                }));
                lane.count_answered(1, 1);
                accepted = 1;
            }
        }
        let unpopped = self.answer(accepted);
        self.full = (unpopped > 0).then(|| self.lane.naming().generation());
        let mut state = vring.get_mut();
        if unpopped > 0 {
            let queue = state.get_queue_mut();
            queue.set_next_avail(queue.next_avail().wrapping_sub(unpopped));
            self.next_avail = queue.next_avail();
        }
        self.give_back(&mut state);
        if self.used.is_empty() && accepted == 0 { collected } else { Round::Took }
    }

    /// Takes the memory map as it is now. Returns `false` if that has to wait for what is in flight
    /// with the old one.
    fn refresh(&mut self, orders: &Orders<'_>) -> bool {
        if self
            .snapshot
            .as_ref()
            .is_some_and(|snapshot| snapshot.version() == orders.memory_version)
        {
            return true;
        }
        if self.lane.awaited() > 0 {
            return false;
        }
        let lost = self.lane.in_flight();
        if let Some(snapshot) = self.snapshot.as_ref().filter(|_| lost > self.lost) {
            // What has been left unanswered for good since the last time may still be written to.
            snapshot.leak();
        }
        self.lost = lost;
        self.view = None;
        self.snapshot = Some(Snapshot::take(orders.memory, orders.memory_version));
        true
    }

    /// Takes up to a batch of chains and parses them. Returns whether there were any.
    fn pop(&mut self, vring: &Vring, limits: &Limits) -> bool {
        let Some(snapshot) = &self.snapshot else { return false };
        let mut state = vring.get_mut();
        if !is_on(&state) {
            self.broken = false;
            return false;
        }
        if self.broken {
            return false;
        }
        let queue: &mut Queue = state.get_queue_mut();
        let found = look_up(&mut self.view, snapshot, queue)
            .and_then(|view| ring::waiting(queue, view).map(|waiting| (view, waiting)));
        let (view, waiting) = match found {
            Ok(found) => found,
            Err(error) => {
                drop(state);
                self.give_up(&error);
                return false;
            }
        };
        let first = queue.next_avail();
        self.next_avail = first;
        let take = usize::from(waiting).min(BATCH).min(self.slots.available()) as u16;
        if take == 0 {
            return false;
        }
        if !self.awake {
            // While we are awake nobody needs to wake us.
            ring::refuse_kicks(view);
            self.awake = true;
        }
        if take > 1 {
            (0..take).for_each(|ahead| view.prefetch(first.wrapping_add(ahead)));
        }
        self.answers = 0;
        self.has_taken = true;
        let table = DescriptorTable { addr: queue.desc_table(), size: queue.size() };
        self.batch.clear();
        self.others.clear();
        let mut translator = snapshot.translator();
        let naming = self.lane.naming();
        let mut bytes = 0;
        while self.next_avail != first.wrapping_add(take) && bytes < BATCH_BYTES {
            let chain = view.avail_entry(self.next_avail);
            self.next_avail = self.next_avail.wrapping_add(1);
            let index = self.slots.next();
            let slot = &mut self.slots.table[usize::from(index)];
            match parse(table, chain, &mut translator, limits, &mut slot.segments) {
                Parsed::Request { op, flags, offset, len, status_at, head } => {
                    (slot.head, slot.op, slot.len, slot.status_at) =
                        (head, op, len, Some(status_at));
                    let mut request = guest_memory::request(op, flags, offset, len, &slot.segments);
                    naming.name(&mut request, usize::from(index));
                    self.batch.push(request);
                    self.slots.take();
                    bytes += len;
                }
                Parsed::Answer { head, status_at, status, written } => {
                    if let Some(addr) = translator.take_outside() {
                        tell_of_outside(self.queue, addr);
                    }
                    give_up_long(&mut slot.segments);
                    self.others.push(Other {
                        after: self.batch.len(),
                        used: Used { head, len: written },
                        answer: Some((status_at, status)),
                    });
                }
                Parsed::Malformed { head, reason } => {
                    tell_of_malformed(self.queue, head, reason, translator.take_outside());
                    give_up_long(&mut slot.segments);
                    let used = Used { head, len: 0 };
                    self.others.push(Other { after: self.batch.len(), used, answer: None });
                }
            }
        }
        queue.set_next_avail(self.next_avail);
        true
    }

    /// Answers the chains of the batch that are not the domain's, up to the first request that the
    /// domain did not take. Returns how many chains go back to the ring: that request and all after
    /// it.
    fn answer(&mut self, accepted: usize) -> u16 {
        let (mut kept, mut answered, mut errors, mut malformed) = (0, 0, 0, 0);
        for other in self.others.iter().take_while(|other| other.after <= accepted) {
            if let Some((status_at, status)) = other.answer {
                status_at.write(status);
                answered += 1;
                errors += u64::from(status != WireStatus::Ok);
            } else {
                malformed += 1;
            }
            self.used.push(other.used);
            kept += 1;
        }
        if answered > 0 {
            self.lane.count_answered(answered, errors);
        }
        if malformed > 0 {
            self.lane.count_malformed(malformed);
        }
        for request in &self.batch[accepted..] {
            self.slots.free.push(slot_of(request.tag) as u16);
        }
        (self.batch.len() - accepted + self.others.len() - kept) as u16
    }

    /// Publishes `self.used`.
    fn give_back(&mut self, state: &mut VringState) {
        let Some(snapshot) = &self.snapshot else { return };
        // Acquire pairs with whoever lets the frontend go: what it finds then is the last of it.
        if self.used.is_empty() || self.hung_up.load(Ordering::Acquire) {
            return;
        }
        self.answers += self.used.len();
        let queue = state.get_queue_mut();
        match look_up(&mut self.view, snapshot, queue)
            .map(|view| ring::publish(queue, view, &self.used))
        {
            Ok(true) => {
                if let Err(error) = state.signal_used_queue() {
                    log_limit::say(
                        Level::Warn,
                        "not notified",
                        format_args!(
                            "queue {}: the frontend was not notified: {error}",
                            self.queue
                        ),
                    );
                }
            }
            Ok(false) => {}
            Err(error) => self.give_up(&error),
        }
    }
}

/// Gives up the room of a list that has become longer than a driver's that heeds `seg_max`. It is
/// that of a chain which is no request for the domain.
#[inline]
fn give_up_long(segments: &mut Vec<RawSegment>) {
    const USUAL: usize = (SEG_MAX as usize).next_power_of_two();
    if segments.capacity() > USUAL {
        segments.clear();
        segments.shrink_to(USUAL);
    }
}

/// Says that a request is answered with an error because memory is not shared.
#[cold]
fn tell_of_outside(queue: usize, addr: u64) {
    log_limit::say(
        Level::Warn,
        "buffer outside",
        format_args!(
            "queue {queue}: a request has a buffer at guest address {addr:#x}, which is outside of the memory that the frontend has shared, and is answered with an I/O error. All of the guest's memory has to be shared (in QEMU share=on), that which is plugged in later too"
        ),
    );
}

/// Says why a chain cannot be answered.
#[cold]
fn tell_of_malformed(queue: usize, head: u16, reason: MalformedChain, outside: Option<u64>) {
    let place = outside.map_or_else(String::new, |addr| {
        format!(
            " (guest address {addr:#x}; all of the guest's memory has to be shared: in QEMU with share=on, for the firmware of a microvm with aux-ram-share=on)"
        )
    });
    log_limit::say(
        Level::Warn,
        "malformed chain",
        format_args!(
            "queue {queue}: chain {head} is malformed and cannot be answered: {reason}{place}"
        ),
    );
}

/// The view of `queue`, from before if it is still the right one.
#[inline]
fn look_up<'v>(
    view: &'v mut Option<RingView>,
    snapshot: &Snapshot,
    queue: &Queue,
) -> Result<&'v RingView, Error> {
    if !view.as_ref().is_some_and(|view| view.is_of(queue)) {
        *view = Some(RingView::new(snapshot, queue)?);
    }
    Ok(view.as_ref().expect("just put there"))
}

/// Whether the frontend has started and enabled the ring (vhost-user, "Ring states").
fn is_on(state: &VringState) -> bool {
    state.get_queue().ready() && state.is_enabled()
}

impl Drop for QueueWorker {
    fn drop(&mut self) {
        if self.lane.in_flight() > 0 {
            if let Some(snapshot) = &self.snapshot {
                snapshot.leak();
            }
            // The lists of segments are still the domain's.
            std::mem::forget(std::mem::take(&mut self.slots.table));
        }
    }
}
