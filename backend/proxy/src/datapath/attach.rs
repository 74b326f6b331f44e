//! How a worker follows the live domain: it attaches on its own thread, leaves what is dead, and
//! keeps what it still owes completions to.
//!
//! Invariant: a queue of an instance is let go of only when nothing is in flight on it, or the
//! instance is dead.

use crate::datapath::attachment::QueueAttachment;
use crate::datapath::inflight::{PendingReplay, TagScheme};
use crate::datapath::worker::Worker;
use crate::domain::OUTSIDE_A_REQUEST;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Worker {
    /// Leaves instances that are dead, and attaches to the live one.
    #[cold]
    pub(super) fn attach_live(&mut self) {
        self.detach_dead();
        let Some(domain) = self.reader.read() else {
            self.leave_current();
            return;
        };
        let domain = Arc::clone(domain);
        if domain.is_dead() {
            self.leave_current();
            // Perhaps in a call that was no worker's, so that nothing has said so yet.
            self.proxy.died(&domain, OUTSIDE_A_REQUEST);
            return;
        }
        if self.current.as_ref().is_some_and(|attached| attached.is_of(&domain)) {
            return;
        }
        self.leave_current();
        if let Some(at) = self.earlier.iter().position(|attached| attached.is_of(&domain)) {
            // It has come back while it still had something of ours.
            self.current = Some(self.earlier.swap_remove(at));
            return;
        }
        let generation = domain.instance.generation();
        if generation == self.unattachable {
            return;
        }
        if domain.is_abandoned(self.queue) {
            self.unattachable = generation;
            log::error!(
                "queue {}: generation {generation} still has requests of an earlier session; it is served again after an upgrade",
                self.queue
            );
            return;
        }
        match domain.attach(self.queue) {
            Ok(attachment) => {
                let tags = TagScheme::new(self.queue, generation);
                self.completions.renew();
                self.current = Some(QueueAttachment { attachment, tags, in_flight: 0 });
            }
            Err(error) => {
                self.unattachable = generation;
                self.proxy.died(&domain, &format!("attaching queue {}: {error}", self.queue));
            }
        }
    }

    fn leave_current(&mut self) {
        self.earlier.extend(self.current.take());
        self.drop_idle();
    }

    pub(super) fn drop_idle(&mut self) {
        if !self.earlier.is_empty() {
            self.earlier.retain(|attached| attached.in_flight > 0);
        }
    }

    /// Leaves every instance that has died: what it had becomes pending.
    pub(super) fn detach_dead(&mut self) {
        let dead = |attached: &QueueAttachment| attached.is_dead();
        if !self.current.iter().chain(&self.earlier).any(dead) {
            return;
        }
        let queues = std::mem::take(&mut self.earlier).into_iter().chain(self.current.take());
        let (left, alive): (Vec<_>, Vec<_>) = queues.partition(dead);
        // The live one, if it is alive, comes back from here at the next `attach_live`, with what
        // it owes.
        self.earlier = alive;
        for attached in left {
            self.owing -= attached.in_flight;
            for slot in 0..self.inflight.len() {
                if self.inflight.generation(slot) == attached.tags.generation() {
                    self.inflight.let_go(slot);
                    self.pending.push(PendingReplay {
                        slot,
                        fence: Arc::clone(&attached.attachment.domain().fence),
                    });
                }
            }
        }
        let inflight = &self.inflight;
        self.pending.sort_by_key(|pending| inflight.order(pending.slot));
        // The live one may have been put among the earlier ones.
        let live = self.reader.read().as_ref();
        let at =
            live.and_then(|live| self.earlier.iter().position(|attached| attached.is_of(live)));
        self.current = at.map(|at| self.earlier.swap_remove(at));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        for attached in self.current.take().into_iter().chain(self.earlier.drain(..)) {
            if attached.in_flight > 0 && !attached.is_dead() {
                log::error!(
                    "queue {}: {} requests of generation {} never ended; the instance stays resident",
                    self.queue,
                    attached.in_flight,
                    attached.tags.generation()
                );
                // It may still write to their buffers' bookkeeping: it must not be destroyed under
                // them.
                attached.attachment.abandon();
            }
        }
        // Letting go of a queue is a call, too.
        self.proxy.notice_death();
        self.proxy.queues.set_notifier(self.queue, None);
        self.proxy.queues.set_seat(self.reader.index(), None);
        self.line.in_flight.store(0, Ordering::Relaxed);
    }
}
