//! One session's state, and its end.

use super::config::SessionConfig;
use super::context::Context;
use super::drain::Outcome;
use super::queue_control::{DRAIN_TIMEOUT, QueueControl};
use crate::phase::Phase;
use crate::raw_fd::ExitEvents;
use proxy::DomainProxy;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Instant;
use virtqueue::GuestMemory;
use vm_memory::GuestMemoryAtomic;

/// Why a queue has something in flight still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotDrained {
    #[error("queue {queue} was not drained in time")]
    TimedOut { queue: usize },
    #[error(
        "queue {queue} has {requests} requests that can never be answered: the domain that had them could not be ended"
    )]
    Unanswerable { queue: usize, requests: usize },
}

/// A session, from before its frontend is heard until its workers have left.
pub(super) struct Session {
    pub(super) context: Arc<Context>,
    pub(super) queues: Box<[Arc<QueueControl>]>,
    pub(super) exit_events: ExitEvents,
}

impl Session {
    pub(super) fn new(
        proxy: &Arc<DomainProxy>,
        config: &SessionConfig,
        map: GuestMemoryAtomic<GuestMemory>,
    ) -> io::Result<Self> {
        let context = Arc::new(Context::new(proxy, config, map, DRAIN_TIMEOUT)?);
        let queue = |queue| QueueControl::new(queue, Arc::clone(&context)).map(Arc::new);
        let queues: Box<[Arc<QueueControl>]> =
            (0..usize::from(config.queues)).map(queue).collect::<io::Result<_>>()?;
        // A worker that has looked up the bitmap before may be marking in it.
        let held: Vec<_> = queues.iter().map(Arc::downgrade).collect();
        let pass = move || held.iter().filter_map(Weak::upgrade).for_each(|one| one.pass_lock());
        context.phase.log().on_replaced(pass);
        Ok(Self { queues, exit_events: ExitEvents::new(usize::from(config.queues))?, context })
    }

    /// Waits until nothing of `queue` is in flight, as [`QueueControl::drain_queue`] does.
    ///
    /// # Errors
    /// Something is in flight still: it was given up, or is left unanswered for good.
    pub(super) fn drain_queue(&self, queue: usize) -> Result<(), NotDrained> {
        match self.queues[queue].drain_queue() {
            Outcome::Clean => Ok(()),
            Outcome::Unanswerable(requests) => Err(NotDrained::Unanswerable { queue, requests }),
            Outcome::TimedOut => Err(NotDrained::TimedOut { queue }),
        }
    }

    /// As [`drain_queue`](Self::drain_queue), of a ring that has stopped: if it was the last, other
    /// programs may use the disk's data.
    ///
    /// # Errors
    /// As there.
    pub(super) fn stop_ring(&self, queue: usize) -> Result<(), NotDrained> {
        let drained = self.drain_queue(queue);
        self.context.claim.ring_stops(queue, drained.is_ok());
        drained
    }

    /// As [`stop_ring`](Self::stop_ring), of a ring with requests in flight that another process
    /// answers: the disk's data is given back when they have ended here. Does not wait.
    pub(super) fn leave_ring(&self, queue: usize) {
        let (claim, control) = (Arc::clone(&self.context.claim), Arc::clone(&self.queues[queue]));
        let starts = claim.starts();
        let wait = move || {
            let outcome = control.drain_queue();
            if claim.starts() == starts {
                claim.ring_stops(queue, outcome == Outcome::Clean);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("left".to_owned()).spawn(wait) {
            // It is given back when the session ends.
            log::warn!("no thread to wait for what was left in flight: {error}");
        }
    }

    /// Answers what is in flight and takes nothing more, before the frontend is let go. What does
    /// not end in time is given up by [`close`](Self::close).
    pub(super) fn drain(&self) {
        self.context.phase.advance_to(Phase::Draining);
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        for (queue, control) in self.queues.iter().enumerate() {
            if control.wait_drained(deadline) == Outcome::TimedOut {
                let error = NotDrained::TimedOut { queue };
                log::error!("{error}; the frontend is let go without");
                self.context.phase.advance_to(Phase::GaveUp);
                return;
            }
        }
    }

    /// Ends the session's workers, on their own threads, after the frontend has gone. What never
    /// ends is left, and stays mapped.
    pub(super) fn close(&self) {
        let context = &*self.context;
        context.phase.advance_to(Phase::Detached);
        for (queue, control) in self.queues.iter().enumerate() {
            let outcome = control.drain_queue();
            context.claim.ring_stops(queue, outcome == Outcome::Clean);
            if outcome == Outcome::TimedOut {
                let error = NotDrained::TimedOut { queue };
                log::error!("{error}; its requests stay unanswered");
                context.proxy.leave_behind(&format!(
                    "requests of queue {queue}, in flight when the session ended"
                ));
                // The others have had as long.
                context.phase.advance_to(Phase::GaveUp);
                control.abandon();
            }
        }
        context.memory.withdraw(&context.proxy);
        context.offer.close();
    }
}
