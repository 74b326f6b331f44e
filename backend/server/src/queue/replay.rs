//! What a worker does with chains beside the usual way: those that an earlier process had in
//! flight, and those that are not taken by the domain.
//!
//! Invariants: what an earlier process had in flight runs again in its order and before anything
//! new is taken; it stays marked until it is answered, however often it is submitted, and nothing
//! of it is submitted when its ring was left to another process; a chain that goes back to the ring
//! is marked no more, and the last goes first (`virtqueue::inflight`).

use super::inputs::{BatchInputs, Memory};
use super::meter::end;
use super::notices;
use super::tracking::{Replay, Tracking};
use super::worker::{BATCH, BATCH_BYTES, Popped, QueueWorker};
use crate::phase::Phase;
use domain_abi::Status;
use proxy::{Ended, slot_of};
use std::sync::atomic::Ordering;
use vhost_user_backend::{VringState, VringT};
use virtio_blk::DescriptorTable;
use virtio_queue::{Queue, QueueT};
use virtqueue::inflight::{Ring, Tracker};
use virtqueue::{Chain, Snapshot, ViewCache};

impl QueueWorker {
    /// Takes the session's region up, for a ring that was turned on, or whose region is another one
    /// now. Returns what comes of it if the ring is not to be looked at now.
    #[cold]
    pub(super) fn take_up(
        &mut self,
        state: &mut VringState<Memory>,
        inputs: &BatchInputs<'_>,
    ) -> Option<Popped> {
        if self.device.awaited() > 0 {
            // It is marked elsewhere, and its end brings us back.
            return Some(Popped::Nothing);
        }
        // What it had when it was hushed has ended.
        self.phase.speak(self.queue);
        let Some(snapshot) = self.requests.snapshot() else { return Some(Popped::Nothing) };
        let (version, inflight) = inputs.inflight.get();
        let Some(inflight) = inflight else {
            self.tracking = Tracking::new(version, None, None);
            return None;
        };
        let queue: &mut Queue = state.get_queue_mut();
        let view = match self.ring.views.view(snapshot, queue) {
            Ok(view) => view,
            Err(_) if inputs.newest_version.load(Ordering::Acquire) != inputs.memory_version => {
                return Some(Popped::Later);
            }
            Err(error) => {
                self.give_up(&error);
                Tracker::pass_by(&inflight.region, self.queue);
                return Some(Popped::Nothing);
            }
        };
        let ring = Ring {
            size: queue.size(),
            // What the library has found in the ring when it was set up, and ours since.
            used_idx: queue.next_used(),
            avail_idx: view.avail_idx(),
        };
        let (tracker, recovery) = match Tracker::start(&inflight.region, self.queue, ring) {
            Ok(started) => started,
            Err(error) => {
                notices::untracked(self.queue, &error);
                Tracker::pass_by(&inflight.region, self.queue);
                self.ring.is_broken = true;
                return Some(Popped::Nothing);
            }
        };
        if let Some(contradiction) = recovery.contradiction {
            notices::contradictory_region(self.queue, contradiction);
        }
        if let Some(next_avail) = recovery.next_avail {
            queue.set_next_avail(next_avail);
        }
        let mut marked = recovery.resubmit;
        // What can never be answered is not repeated by the process that has it.
        marked.retain(|marked| !self.requests.is_in_use(marked.head));
        if !marked.is_empty() {
            notices::replays(self.queue, marked.len(), inflight.cautious);
            inputs.inflight.count_found(marked.len());
        }
        let replay = Replay::of(marked, inflight);
        self.tracking = Tracking::new(version, Some(tracker), replay);
        self.tracking.replay.is_some().then_some(Popped::Later)
    }

    /// Takes the memory map as it is now. Returns `false` if that has to wait for what is in flight
    /// with the old one.
    pub(super) fn refresh(&mut self, inputs: &BatchInputs<'_>) -> bool {
        let is_current = |snapshot: &Snapshot| snapshot.version() == inputs.memory_version;
        if self.requests.snapshot().is_some_and(is_current) {
            return true;
        }
        if self.device.awaited() > 0 {
            return false;
        }
        // With the view goes its hold on the old map.
        self.ring.views = ViewCache::default();
        self.requests.replace_snapshot(Snapshot::take(inputs.memory, inputs.memory_version));
        true
    }

    /// Takes up to a batch of what an earlier process had in flight.
    #[cold]
    pub(super) fn pop_marked(
        &mut self,
        vring: &impl VringT<Memory>,
        inputs: &BatchInputs<'_>,
    ) -> Popped {
        // With the lock, so that it is hushed now or takes these before it is.
        let state = vring.get_mut();
        // A hushed ring's are another process's, and stay marked.
        let is_over = self.ring.is_broken
            || self.phase.is_at(Phase::Detached)
            || self.phase.is_hushed(self.queue);
        let awaited = self.device.awaited();
        let Some(replay) = self.tracking.replay.as_mut().filter(|_| !is_over) else {
            self.tracking.replay = None;
            return Popped::Nothing;
        };
        if replay.is_cautious() && awaited > 0 {
            return Popped::Nothing;
        }
        let is_quarantined = |marked| replay.is_quarantined(self.queue, marked);
        let rest = replay.rest();
        let is_first_quarantined = rest.first().is_some_and(|&marked| is_quarantined(marked));
        let most = if replay.is_cautious() || is_first_quarantined { 1 } else { BATCH };
        self.meter.take();
        let queue = state.get_queue();
        let table = DescriptorTable { addr: queue.desc_table(), size: queue.size() };
        self.batch.clear();
        let Some(mut parser) = self.requests.parser(table) else { return Popped::Nothing };
        let tags = self.device.tags();
        let (mut bytes, mut taken) = (0, 0);
        for &marked in rest.iter().take(most) {
            // It has an answer of its own.
            if bytes >= BATCH_BYTES || !is_first_quarantined && is_quarantined(marked) {
                break;
            }
            taken += 1;
            match parser.next(marked.head, inputs.limits) {
                Chain::Request(head, mut request) => {
                    bytes += request.len();
                    tags.name(&mut request, usize::from(head));
                    self.batch.push(request);
                }
                // Each is marked once, and nothing that is in flight here is marked.
                Chain::InUse(_) | Chain::Answer(None) => {}
                Chain::Answer(Some(addr)) => notices::outside_of_memory(self.queue, addr),
                Chain::Malformed { head, reason, outside } => {
                    notices::malformed_chain(self.queue, head, reason, outside);
                }
            }
        }
        drop(state);
        if taken == 0 {
            self.tracking.replay = None;
            return Popped::Later;
        }
        if is_first_quarantined && let Some(request) = self.batch.pop() {
            notices::quarantined(self.queue, rest[0]);
            inputs.inflight.count_quarantined();
            let slot = slot_of(request.tag);
            let ended = Ended { slot, status: Status::IoError, written: 0 };
            end(&mut self.requests, &mut self.used, self.meter.line(), ended);
            self.device.count_answered(1, 1);
        }
        replay.took(taken);
        Popped::Batch
    }

    /// The driver offers a head whose entry is not free. Returns whether it can be taken after all;
    /// else the ring is broken.
    #[cold]
    pub(super) fn frees(&mut self, head: u16) -> bool {
        let slot = usize::from(head);
        let is_taken = self.requests.is_immediate(head)
            || self.batch.iter().any(|request| slot_of(request.tag) == slot);
        if is_taken || self.device.is_awaited(slot) {
            notices::head_in_use(self.queue, head);
            self.device.count_malformed(1);
            self.ring.is_broken = true;
            return false;
        }
        // It is that of a request which will never end, of a ring that was set up again since.
        self.requests.set_aside(head);
        true
    }

    /// Answers the chains of the batch that are not the domain's, up to the first request that the
    /// domain did not take. Returns how many chains go back to the ring: that request and all after
    /// it. To be called with the ring's lock.
    #[inline(never)]
    pub(super) fn end_batch(&mut self, accepted: usize) -> u16 {
        if accepted < self.batch.len() {
            self.unmark_returned(accepted);
        }
        let end = self.requests.end_batch(accepted, self.batch.len(), &mut self.used);
        if end.answered > 0 {
            self.device.count_answered(end.answered, end.errors);
        }
        if end.malformed > 0 {
            self.device.count_malformed(end.malformed);
        }
        for request in &self.batch[accepted..] {
            self.requests.discard(slot_of(request.tag));
        }
        end.returned as u16
    }

    /// Gives chains back to the ring, the last so many that were taken.
    #[cold]
    pub(super) fn return_chains(&mut self, state: &mut VringState<Memory>, chains: u16) {
        if self.phase.is_hushed(self.queue) {
            // The frontend was told that they are taken.
            return;
        }
        if let Some(replay) = &mut self.tracking.replay {
            // They were never the ring's to give.
            replay.returned(usize::from(chains));
            return;
        }
        let queue = state.get_queue_mut();
        queue.set_next_avail(queue.next_avail().wrapping_sub(chains));
        self.ring.next_avail = queue.next_avail();
    }

    /// Takes the marks off the chains of a batch that go back to the ring: the first request that
    /// the domain did not take, and all after it.
    #[cold]
    pub(super) fn unmark_returned(&mut self, accepted: usize) {
        if self.phase.is_hushed(self.queue) {
            return;
        }
        let Self { tracking, requests, batch, .. } = self;
        let Tracking { tracker: Some(tracker), replay: None, .. } = tracking else { return };
        for (index, request) in batch.iter().enumerate().skip(accepted).rev() {
            requests.immediate(index + 1).rev().for_each(|head| tracker.unmark(head));
            tracker.unmark(slot_of(request.tag) as u16);
        }
    }
}
