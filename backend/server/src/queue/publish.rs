//! How answers get to the guest: published, marked in a migration's log as well, or not at all.
//!
//! This is the one place where what was written into guest memory is marked: data, status bytes and
//! the used ring. All of it was written for a chain that is published here, by whatever means: a
//! copy, the kernel, an answer without the domain. A chain that was taken before the log was turned
//! on is published after it like any other.
//!
//! Order: data and status are marked before the used index says that they are there, so that a
//! process that is killed in between leaves no answer whose data is not marked. The used ring is
//! marked when it was written; what a process that is killed in between does not mark, its
//! successor does, because it marks all of the ring at its start. All of this happens under the
//! ring's lock, which is held once by the thread that turns the log on before that is acknowledged,
//! and by the one that brings another bitmap.

use super::inputs::Memory;
use super::notices;
use super::worker::QueueWorker;
use crate::phase::Phase;
use vhost_user_backend::VringState;
use virtio_queue::QueueT;
use virtqueue::NotLogged;

impl QueueWorker {
    /// Publishes `self.used`.
    #[inline]
    pub(super) fn publish_used(&mut self, state: &mut VringState<Memory>) {
        if self.used.is_empty() {
            return;
        }
        if self.phase.is_plain() {
            self.publish(state);
        } else {
            self.publish_otherwise(state);
        }
        if self.probe.is_on() {
            let slots = self.used.iter().map(|used| usize::from(used.head));
            self.device.note_answered(&mut self.probe, slots);
        }
    }

    #[inline(always)]
    fn publish(&mut self, state: &mut VringState<Memory>) {
        let Some(snapshot) = self.requests.snapshot() else { return };
        self.ring.answers += self.used.len();
        let queue = state.get_queue_mut();
        let view = match self.ring.views.view(snapshot, queue) {
            Ok(view) => view,
            Err(error) => return self.give_up(&error),
        };
        let is_told = match &mut self.tracking.tracker {
            None => virtqueue::publish_used(queue, view, &self.used),
            Some(tracker) => virtqueue::publish_tracked(queue, view, &self.used, tracker),
        };
        if self.meter.line().is_some() {
            self.count_published();
        }
        if is_told && let Err(error) = state.signal_used_queue() {
            notices::not_notified(self.queue, &error);
        }
    }

    #[cold]
    fn publish_otherwise(&mut self, state: &mut VringState<Memory>) {
        // What the frontend finds when it is let go is the last of it.
        if self.phase.is_at(Phase::Detached) || self.phase.is_hushed(self.queue) {
            return;
        }
        if !self.phase.is_logged() {
            self.publish(state);
            return;
        }
        let first = state.get_queue().next_used();
        let data = self.mark_requests();
        self.publish(state);
        let ring = self.mark_ring(first, state);
        if let Err(error) = data.and(ring) {
            notices::not_logged(self.queue, error);
            // At once: a queue that is busy serves on, and a migration may complete meanwhile.
            self.phase.tell_unlogged();
        }
    }

    fn mark_requests(&mut self) -> Result<(), NotLogged> {
        let Self { marker, requests, used, phase, .. } = self;
        let Some(snapshot) = requests.snapshot() else { return Ok(()) };
        let mut marking = marker.begin(phase.log(), snapshot);
        requests.written(used, |at, len| marking.host(at, len));
        marking.end()
    }

    fn mark_ring(&mut self, first: u16, state: &mut VringState<Memory>) -> Result<(), NotLogged> {
        let Self { marker, requests, ring, phase, .. } = self;
        let Some(snapshot) = requests.snapshot() else { return Ok(()) };
        let queue = state.get_queue();
        // It was found when it was published to.
        let Ok(view) = ring.views.view(snapshot, queue) else { return Ok(()) };
        let mut marking = marker.begin(phase.log(), snapshot);
        view.written(first, queue.next_used(), |at, len| marking.guest(at, len));
        marking.end()
    }

    /// The ring was stopped, and what was in flight is another process's to answer, so what has
    /// ended here is nobody's.
    #[cold]
    pub(super) fn drop_ended(&mut self) {
        let Self { device, requests, .. } = self;
        device.reap(|ended| requests.discard(ended.slot));
    }
}

#[cfg(test)]
#[path = "publish_tests.rs"]
mod tests;
