//! One queue of a session: its thread's side, which serves it, and the other threads' side, which
//! ask it to drain.
//!
//! `vhost-user-backend` makes the queue's thread and joins it, and has no hook for either. So the
//! worker comes into being at the thread's first event, and leaves at an event too; a guard in the
//! thread's own storage notices when the thread ends.

use super::alarm::Alarm;
use super::context::Context;
use super::drain::{Drain, Outcome, Ticket};
use super::rings::Vring;
use crate::cpus;
use crate::log_limit::{self, how_to_have_more};
use crate::phase::Phase;
use crate::queue::{BatchInputs, QueueWorker};
use crate::raw_fd;
use crate::sandbox;
use crate::sync::lock;
use log::Level;
use proxy::Notifier;
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};
use vhost_user_backend::VringT;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// After so long a drain is reported, and given up if the daemon is to end. Nothing is cancelled
/// before: a guest that comes back must not find errors that were made by our leaving.
pub(super) const DRAIN_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// How long what is in flight has to end, where it need not.
const TO_END: Duration = Duration::from_millis(3);

/// How often a thread that waits for a drain looks whether it still should.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long a worker with nothing in flight takes to say so, at most.
const AT_ONCE: Duration = Duration::from_millis(50);

/// Wakes a queue's thread.
struct EventfdNotifier(EventFd);

impl EventfdNotifier {
    fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Takes what it was notified with. Returns whether there was anything.
    fn clear(&self) -> bool {
        self.0.read().is_ok()
    }
}

impl Notifier for EventfdNotifier {
    fn notify(&self) {
        // Fails only if the counter is full, and then the worker is about to be woken anyway.
        let _ = self.0.write(1);
    }

    fn fd(&self) -> Option<OwnedFd> {
        raw_fd::dup(&self.0).ok()
    }
}

/// The queue's worker.
enum Seat {
    /// Not yet a worker.
    Vacant,
    Attached(Box<QueueWorker>),
    /// The worker has left, and with it so many requests that are never answered.
    Left(usize),
}

/// A queue of a session.
pub(super) struct QueueControl {
    queue: usize,
    context: Arc<Context>,
    /// Only the queue's thread looks inside; the lock is never contended.
    seat: Mutex<Seat>,
    wake: EventfdNotifier,
    alarm: Alarm,
    drain: Drain,
    /// What is awaited is owed by instances that do not serve any more.
    is_owed_elsewhere: AtomicBool,
    /// Leave even if something is in flight.
    is_abandoned: AtomicBool,
    ring: OnceLock<Vring>,
}

thread_local! {
    /// Set on a queue's thread; dropped when that thread ends, for whatever reason.
    static GUARD: RefCell<Option<ThreadGuard>> = const { RefCell::new(None) };
}

/// Notices that a queue's thread has ended: the library ends it without a word if, say, the
/// frontend's kick descriptor cannot be read.
struct ThreadGuard(Weak<QueueControl>);

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        if let Some(control) = self.0.upgrade() {
            control.thread_ended();
        }
    }
}

impl QueueControl {
    pub(super) fn new(queue: usize, context: Arc<Context>) -> io::Result<Self> {
        Ok(Self {
            queue,
            context,
            seat: Mutex::new(Seat::Vacant),
            wake: EventfdNotifier::new()?,
            alarm: Alarm::new()?,
            drain: Drain::new(),
            is_owed_elsewhere: AtomicBool::new(false),
            is_abandoned: AtomicBool::new(false),
            ring: OnceLock::new(),
        })
    }

    /// Readable when the queue's thread is to look.
    pub(super) fn wake_fd(&self) -> RawFd {
        self.wake.0.as_raw_fd()
    }

    /// Readable when the queue's thread is to look at its rate limit.
    pub(super) fn alarm_fd(&self) -> RawFd {
        self.alarm.fd()
    }

    /// The queue's thread has been woken by that.
    pub(super) fn alarm_seen(&self) {
        self.alarm.seen();
    }

    /// Has the queue's thread look.
    pub(super) fn wake(&self) {
        self.wake.notify();
    }

    /// Takes the wake-up of the queue's thread. Returns whether there was one.
    pub(super) fn woken(&self) -> bool {
        self.wake.clear()
    }

    /// Which ring it is, from the queue's thread.
    pub(super) fn has_ring(&self, ring: &Vring) {
        let _ = self.ring.set(ring.clone());
    }

    /// Its driver begins anew.
    pub(super) fn ring_is_reset(&self) {
        if let Some(ring) = self.ring.get() {
            ring.reset();
        }
    }

    /// What the queue's thread does with its ring after this sees what was done before it.
    pub(super) fn pass_lock(&self) {
        if let Some(ring) = self.ring.get() {
            drop(ring.get_mut());
        }
    }

    /// Marks the used ring in a migration's log, if there is one: with its flag and its event
    /// index, which are not marked when they are written.
    pub(super) fn log_ring(&self) {
        let context = &*self.context;
        let Some(ring) = self.ring.get().filter(|_| context.phase.is_logged()) else { return };
        let state = ring.get_ref();
        let (used, len) = virtqueue::used_ring(state.get_queue());
        if let Some((region, at)) = context.memory.map().memory().to_region_addr(used) {
            // The library's trait of the same name has the bitmap as well.
            GuestMemoryRegion::bitmap(region).mark_dirty(at.raw_value() as usize, len);
        }
    }

    /// Waits a moment for what is in flight. What does not end by then is not answered here any
    /// more, and stays marked in the in-flight region. Returns whether all of it has ended.
    ///
    /// What has it may go on with it: it is awaited before anything is taken from this ring again,
    /// before the session ends and before the image is given to another process.
    pub(super) fn leave_in_flight(&self) -> bool {
        if self.wait_drained(Instant::now() + TO_END) != Outcome::TimedOut {
            self.log_ring();
            return true;
        }
        let Some(ring) = self.ring.get() else { return true };
        let state = ring.get_mut();
        self.context.phase.hush(self.queue);
        drop(state);
        self.log_ring();
        // So that what is marked is looked at anew.
        self.context.config.inflight.renew();
        self.wake();
        false
    }

    /// Runs on the queue's thread, at its first event and at each one after it: serves the queue,
    /// drains it, leaves it. At the first, `listen` is called with the ring.
    pub(super) fn serve_queue(self: &Arc<Self>, vring: &Vring, listen: impl FnOnce(&Vring)) {
        GUARD.with_borrow_mut(|guard| {
            guard.get_or_insert_with(|| {
                listen(vring);
                ThreadGuard(Arc::downgrade(self))
            });
        });
        let mut seat = lock(&self.seat);
        // Before anything is looked at: what was asked until now is what can be said to be drained
        // afterwards.
        let ticket = self.drain.newest();
        let is_ending = self.context.phase.is_at(Phase::Draining);
        if matches!(*seat, Seat::Vacant) && !is_ending {
            *seat = self.attach_worker().map_or(Seat::Vacant, Seat::Attached);
        }
        let is_drained = match &mut *seat {
            Seat::Vacant | Seat::Left(_) => true,
            Seat::Attached(worker) => self.serve_with(worker, vring, ticket),
        };
        if is_ending {
            let left = std::mem::replace(&mut *seat, Seat::Vacant);
            *seat = self.detach_worker(left, is_drained);
        }
        let outcome = match &*seat {
            Seat::Vacant => Some(Outcome::Clean),
            Seat::Left(unanswerable) => Some(Outcome::after(*unanswerable)),
            Seat::Attached(worker) => is_drained.then(|| Outcome::after(worker.unanswerable())),
        };
        drop(seat);
        if self.drain.newest() != ticket {
            // It was asked for while the queue was served; look again from the start.
            self.wake();
        }
        if let Some(outcome) = outcome {
            self.drain.complete(ticket, outcome);
        }
    }

    /// Serves until there is nothing to do, or a drain newer than `ticket` is asked for. Returns
    /// whether nothing is awaited any more.
    fn serve_with(&self, worker: &mut QueueWorker, vring: &Vring, ticket: Ticket) -> bool {
        let context = &*self.context;
        let limits = context.offer.limits();
        worker.serve(vring, || BatchInputs {
            stop_popping: context.phase.is_at(Phase::Draining)
                || self.drain.newest() != ticket
                || !context.claim.is_ours(),
            limits: &limits,
            memory_version: context.memory.version(),
            newest_version: context.memory.newest(),
            memory: context.memory.map(),
            inflight: &context.config.inflight,
            limiter: &context.config.limiter,
        });
        worker.throttled().into_iter().for_each(|until| self.alarm.set(until));
        let is_blank = || context.claim.is_ours() && worker.is_blank(vring);
        context.lookout.note(self.queue, worker.has_taken(), is_blank);
        self.is_owed_elsewhere.store(worker.is_owed_elsewhere(), Ordering::Relaxed);
        worker.awaited() == 0
    }

    /// The first ring's look is due.
    pub(super) fn look(&self, vring: &Vring) {
        let is_blank = match &*lock(&self.seat) {
            Seat::Attached(worker) => worker.is_blank(vring),
            Seat::Vacant | Seat::Left(_) => false,
        };
        self.context.lookout.look(is_blank);
    }

    fn attach_worker(&self) -> Option<Box<QueueWorker>> {
        let (queue, config) = (self.queue, &self.context.config);
        let wake = match self.wake.try_clone() {
            Ok(wake) => wake,
            Err(error) => {
                log_limit::say(
                    Level::Error,
                    "no wake-ups",
                    format_args!(
                        "queue {queue} cannot be served, for want of a descriptor: {}",
                        how_to_have_more(&error)
                    ),
                );
                return None;
            }
        };
        cpus::keep(queue, &config.worker_cpus);
        sandbox::serve_queue();
        let slots = usize::from(config.queue_size);
        let device = self.context.proxy.worker(queue, slots, Box::new(wake));
        if device.is_none() {
            log_limit::say(
                Level::Error,
                "not left",
                format_args!(
                    "queue {queue} cannot be served: a worker of an earlier session has not left"
                ),
            );
        }
        let phase = Arc::clone(&self.context.phase);
        let worker = QueueWorker::new(device?, queue, config.queue_size, config.poll, phase);
        let line = config.counters.and_then(|counters| counters.line(queue));
        Some(Box::new(worker.counting(line)))
    }

    /// Has the worker of a session that ends leave, if nothing is awaited any more, or if it is to
    /// leave all the same. Returns what there is then.
    fn detach_worker(&self, seat: Seat, is_drained: bool) -> Seat {
        let Seat::Attached(mut worker) = seat else { return seat };
        if is_drained && worker.unanswerable() > 0 {
            let queue = self.queue;
            self.context
                .proxy
                .leave_behind(&format!("requests of queue {queue} that can never be answered"));
        } else if !is_drained {
            if !self.is_abandoned.load(Ordering::Relaxed) {
                return Seat::Attached(worker);
            }
            worker.abandon();
        }
        Seat::Left(worker.detach())
    }

    fn thread_ended(&self) {
        if !self.context.phase.is_at(Phase::Draining) {
            log_limit::say(
                Level::Error,
                "thread ended",
                format_args!(
                    "the thread of queue {} has ended; ending the session, so that the frontend connects again",
                    self.queue
                ),
            );
            self.context.connection.end();
        }
        // There is no other place for it: the worker leaves here, on its own thread.
        *lock(&self.seat) = Seat::Vacant;
        self.drain.close();
    }

    /// Waits until nothing of the queue is awaited, however long the storage takes, unless that is
    /// over [`DRAIN_TIMEOUT`] and the daemon is to end, or the instance that owes what is awaited
    /// does not serve any more. The ring must be off or the session ending, or it goes on at once.
    ///
    /// An instance that is left with a request serves that queue no more, so it is not left early:
    /// storage that hangs would not serve the next frontend either, and comes back for both. After
    /// an upgrade another instance serves, so a domain that keeps a request for ever can be left.
    pub(super) fn drain_queue(&self) -> Outcome {
        let (queue, context) = (self.queue, &*self.context);
        let started = Instant::now();
        let mut reported = DRAIN_TIMEOUT;
        // One ticket: a worker that looks for longer than it is waited for completes none of a row
        // of them before the next is there.
        let ticket = self.drain.request();
        loop {
            let gave_up = context.phase.is_at(Phase::GaveUp);
            let patience = if gave_up { AT_ONCE } else { LOOK_EVERY };
            self.wake();
            let outcome = self.drain.wait(ticket, Some(Instant::now() + patience));
            let waited = started.elapsed();
            let way_out =
                || context.proxy.is_stopping() || self.is_owed_elsewhere.load(Ordering::Relaxed);
            let is_over = gave_up || waited >= DRAIN_TIMEOUT && way_out();
            if outcome != Outcome::TimedOut || is_over {
                return outcome;
            }
            if waited >= reported {
                reported += DRAIN_TIMEOUT;
                log::error!(
                    "queue {queue}: requests are still in flight after {} s; the frontend, or the next one, waits for them",
                    waited.as_secs()
                );
            }
        }
    }

    /// Waits until nothing of the queue is awaited, or until `deadline`.
    pub(super) fn wait_drained(&self, deadline: Instant) -> Outcome {
        let ticket = self.drain.request();
        self.wake();
        self.drain.wait(ticket, Some(deadline))
    }

    /// Has the worker of a session that ends leave with requests in flight, and waits until it has.
    /// A thread that is inside the domain cannot be taken out of it.
    pub(super) fn abandon(&self) {
        self.is_abandoned.store(true, Ordering::Relaxed);
        let ticket = self.drain.request();
        self.wake();
        self.drain.wait(ticket, None);
    }
}
