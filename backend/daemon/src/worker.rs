//! The way of a request, from kick to call: one worker per virtqueue, on its own thread.
//!
//! ```text
//!   kick -> [ gate -> pop and parse a batch -> submit -> write status and used ring -> call ] ... until the ring is empty -> sleep
//!                ^                                                                     |
//!                +---------------------------------------------------------------------+
//! ```
//!
//! Invariants: the queue's lock is held while chains are taken and while they are given back, never while the domain works or the gate is shut; nobody
//! waits at the gate with a request in hand; what the domain did not take goes back to the ring, in order.
//!
//! Deliberately absent: which domain serves (`proxy`), and when sessions begin and end (`session.rs`).

use crate::guest_memory::{self, Snapshot};
use crate::ring::{self, Used};
use domain_api::Status;
use domain_api::abi::{RawRequest, RawSegment};
use proxy::{Ended, Gate, Worker};
use std::time::{Duration, Instant};
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_blk::{DescriptorTable, Limits, Parsed, StatusSlot, WireStatus, parse, used_len};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Most chains that are taken at once: enough to pay for a batch, few enough that an upgrade's gate and the control messages never wait long.
const BATCH: usize = 64;

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

/// All slots of a queue; never reallocated.
struct Slots {
    table: Box<[Slot]>,
    free: Vec<u16>,
}

impl Slots {
    fn new(count: u16) -> Self {
        let slot = |_| Slot { head: 0, op: 0, len: 0, status_at: None, segments: Vec::with_capacity(8) };
        Self { table: (0..count).map(slot).collect(), free: (0..count).rev().collect() }
    }

    /// Turns a request that has ended into its entry of the used ring, after telling the guest how it ended.
    fn end(&mut self, ended: Ended) -> Used {
        let slot = &mut self.table[ended.slot];
        if let Some(status_at) = slot.status_at.take() {
            status_at.write(match ended.status {
                Status::Ok => WireStatus::Ok,
                Status::IoError => WireStatus::IoError,
                Status::Unsupported => WireStatus::Unsupported,
            });
        }
        self.free.push(ended.slot as u16);
        Used { head: slot.head, len: used_len(slot.op, slot.len, ended.written) }
    }
}

/// A chain of the batch, in the order of the ring.
enum Popped {
    /// The next of the batch's requests.
    Request,
    /// Answered without the domain.
    Answer { used: Used, status_at: StatusSlot, status: WireStatus },
    /// No request at all.
    Malformed { used: Used },
}

/// How a round went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// Something was done: there may be more.
    Busy,
    /// Nothing to do.
    Idle,
}

/// One queue's worker.
pub(crate) struct QueueWorker {
    lane: Worker,
    queue: usize,
    slots: Slots,
    snapshot: Option<Snapshot>,
    batch: Vec<RawRequest>,
    popped: Vec<Popped>,
    used: Vec<Used>,
    poll: Duration,
    /// The ring made no sense; it is left alone until it is set up again.
    broken: bool,
    /// The domain took less than it was offered; nothing more is offered until something has ended.
    full: bool,
}

impl QueueWorker {
    pub(crate) fn new(lane: Worker, queue: usize, queue_size: u16, poll: Duration) -> Self {
        Self {
            lane,
            queue,
            slots: Slots::new(queue_size),
            snapshot: None,
            batch: Vec::with_capacity(BATCH),
            popped: Vec::with_capacity(BATCH),
            used: Vec::with_capacity(usize::from(queue_size)),
            poll,
            broken: false,
            full: false,
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.lane.in_flight()
    }

    /// Gives up what is in flight: the domain is asked to end it, and how it ends is not told to anybody.
    pub(crate) fn abandon(&mut self) {
        let _ = self.lane.gate();
        self.lane.cancel();
        self.lane.reap(|_| {});
    }

    /// Serves the queue until there is nothing to do; then the worker sleeps, as far as upgrades are concerned.
    ///
    /// `orders` is asked before each batch. Returns with the ring's notifications on, or with the ring not to be served.
    pub(crate) fn serve<'a>(&mut self, vring: &VringMutex, orders: impl Fn() -> Orders<'a>) {
        let mut idle_since = None;
        let mut promised = false;
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
            if self.round(vring, &orders) == Round::Busy {
                idle_since = None;
                promised = false;
                continue;
            }
            if std::mem::take(&mut promised) && self.serves(vring, &orders) && !self.full {
                // The ring has said that there is more, and there is nothing to be had: without this a hostile driver keeps us running.
                self.give_up(&virtio_queue::Error::InvalidAvailRingIndex);
            }
            if !self.poll.is_zero() && self.serves(vring, &orders) {
                let since = *idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() < self.poll {
                    std::hint::spin_loop();
                    continue;
                }
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

    /// Whether the ring is to be served at all.
    fn serves(&self, vring: &VringMutex, orders: &Orders<'_>) -> bool {
        !self.broken && !orders.stop_popping && is_on(&vring.get_ref())
    }

    /// Turns notifications on; whether chains have come meanwhile.
    fn more_came(&mut self, vring: &VringMutex, orders: &Orders<'_>) -> bool {
        if !self.serves(vring, orders) || self.full || self.slots.free.is_empty() {
            return false;
        }
        let Some(snapshot) = &self.snapshot else { return false };
        if snapshot.version() != orders.memory_version {
            // Something is in flight with the old map: its end brings us back.
            return self.lane.in_flight() == 0;
        }
        let mut state = vring.get_mut();
        match state.get_queue_mut().enable_notification(snapshot.memory()) {
            Ok(more) => more,
            Err(error) => {
                drop(state);
                self.give_up(&error);
                false
            }
        }
    }

    fn give_up(&mut self, error: &virtio_queue::Error) {
        log::error!(
            "queue {}: the ring makes no sense ({error}); it is not served until the driver resets it",
            self.queue
        );
        self.lane.count_malformed(1);
        self.broken = true;
    }

    /// Gives back what has ended since.
    fn collect(&mut self, vring: &VringMutex) -> Round {
        let Self { lane, slots, used, .. } = self;
        used.clear();
        lane.reap(|ended| used.push(slots.end(ended)));
        if self.used.is_empty() {
            return Round::Idle;
        }
        self.full = false;
        self.give_back(&mut vring.get_mut());
        Round::Busy
    }

    fn round(&mut self, vring: &VringMutex, orders: &Orders<'_>) -> Round {
        let collected = if self.lane.in_flight() > 0 { self.collect(vring) } else { Round::Idle };
        if orders.stop_popping || self.full || !self.refresh(orders) {
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
            if accepted == 0 && lane.in_flight() == 0 {
                // Against the contract; without an answer the guest would wait for ever.
                log::error!(
                    "queue {}: the domain takes no request although nothing is in flight",
                    self.queue
                );
                used.push(slots.end(Ended {
                    slot: batch[0].tag as usize,
                    status: Status::IoError,
                    written: 0,
                }));
                lane.count_answered(1, 1);
                accepted = 1;
            }
        }
        let unpopped = self.answer(accepted);
        self.full = unpopped > 0 && self.lane.in_flight() > 0;
        let mut state = vring.get_mut();
        if unpopped > 0 {
            let queue = state.get_queue_mut();
            queue.set_next_avail(queue.next_avail().wrapping_sub(unpopped));
        }
        self.give_back(&mut state);
        if self.used.is_empty() && accepted == 0 { collected } else { Round::Busy }
    }

    /// Takes the memory map as it is now. Returns `false` if that has to wait for what is in flight with the old one.
    fn refresh(&mut self, orders: &Orders<'_>) -> bool {
        if self.snapshot.as_ref().is_some_and(|snapshot| snapshot.version() == orders.memory_version) {
            return true;
        }
        if self.lane.in_flight() > 0 {
            return false;
        }
        self.snapshot = Some(Snapshot::take(orders.memory, orders.memory_version));
        true
    }

    /// Takes up to a batch of chains and parses them. Returns whether there were any.
    fn pop(&mut self, vring: &VringMutex, limits: &Limits) -> bool {
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
        let table = DescriptorTable { addr: queue.desc_table(), size: queue.size() };
        let mut chains = match queue.iter(snapshot.memory()) {
            Ok(chains) => chains,
            Err(error) => {
                drop(state);
                self.give_up(&error);
                return false;
            }
        };
        self.batch.clear();
        self.popped.clear();
        let mut translator = snapshot.translator();
        while self.popped.len() < BATCH {
            let Some(&index) = self.slots.free.last() else { break };
            let Some(chain) = chains.next() else { break };
            let slot = &mut self.slots.table[usize::from(index)];
            let popped = match parse(table, chain.head_index(), &mut translator, limits, &mut slot.segments) {
                Parsed::Request { op, flags, offset, len, status_at, head } => {
                    self.slots.free.pop();
                    (slot.head, slot.op, slot.len, slot.status_at) = (head, op, len, Some(status_at));
                    let mut request = guest_memory::request(op, flags, offset, len, &slot.segments);
                    request.tag = u64::from(index);
                    self.batch.push(request);
                    Popped::Request
                }
                Parsed::Answer { head, status_at, status, written } => {
                    Popped::Answer { used: Used { head, len: written }, status_at, status }
                }
                Parsed::Malformed { head, reason } => {
                    log::debug!("queue {}: chain {head} is malformed: {reason}", self.queue);
                    Popped::Malformed { used: Used { head, len: 0 } }
                }
            };
            self.popped.push(popped);
        }
        if !self.popped.is_empty() && !queue.event_idx_enabled() {
            // While we are awake nobody needs to wake us. With EVENT_IDX that is so without saying it.
            let _ = queue.disable_notification(snapshot.memory());
        }
        !self.popped.is_empty()
    }

    /// Answers the chains of the batch that are not the domain's, up to the first request that the domain did not take. Returns how many chains go back to
    /// the ring: that request and all after it.
    fn answer(&mut self, accepted: usize) -> u16 {
        let mut requests = 0;
        let mut kept = 0;
        let (mut answered, mut errors, mut malformed) = (0, 0, 0);
        for popped in &self.popped {
            match *popped {
                Popped::Request if requests == accepted => break,
                Popped::Request => requests += 1,
                Popped::Answer { used, status_at, status } => {
                    status_at.write(status);
                    self.used.push(used);
                    answered += 1;
                    errors += u64::from(status != WireStatus::Ok);
                }
                Popped::Malformed { used } => {
                    self.used.push(used);
                    malformed += 1;
                }
            }
            kept += 1;
        }
        if answered > 0 {
            self.lane.count_answered(answered, errors);
        }
        if malformed > 0 {
            self.lane.count_malformed(malformed);
        }
        for request in &self.batch[accepted..] {
            self.slots.free.push(request.tag as u16);
        }
        (self.popped.len() - kept) as u16
    }

    /// Publishes `self.used`.
    fn give_back(&mut self, state: &mut VringState) {
        let Some(snapshot) = &self.snapshot else { return };
        if self.used.is_empty() {
            return;
        }
        match ring::publish(state.get_queue_mut(), snapshot.memory(), &self.used) {
            Ok(true) => {
                if let Err(error) = state.signal_used_queue() {
                    log::warn!("queue {}: the frontend was not notified: {error}", self.queue);
                }
            }
            Ok(false) => {}
            Err(error) => self.give_up(&error),
        }
    }
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
