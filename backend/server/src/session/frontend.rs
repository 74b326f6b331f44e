//! The session as `vhost-user-backend` sees it: what the frontend's messages do.

use super::beginning::Beginning;
use super::lookout::SHARE;
use super::queue_control::QueueControl;
use super::rings::{Event, Vring};
use super::state::{NotDrained, Session};
use crate::inflight::Inflight;
use crate::log_limit;
use crate::phase::Phase;
use channel::ring_refusal;
use log::Level;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserHandlerError};
use virtio_blk::{ConfigSpace, Error};
use virtqueue::{GuestMemory, LogSlot};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

/// What wake-ups are called at the library, and the look at the first ring, and a queue's timer:
/// all of them behind the queues.
const WAKE: u16 = 1;
const LOOK: u16 = 2;
const ALARM: u16 = 3;

/// The feature bit that turns a migration's log on: no feature of the device.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// Why there is no session any more.
#[derive(Debug)]
pub struct Failure {
    /// What is alike for the log: nothing that the frontend can choose is in it.
    pub kind: &'static str,
    /// What has happened.
    pub error: io::Error,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self { kind: "no session", error }
    }
}

/// What the frontend's messages act on.
pub(super) struct Frontend {
    pub(super) session: Session,
    /// Some ring was given a size that it can have.
    has_size: AtomicBool,
    /// Rings that another process has left, and are still to be told where they go on, a bit each.
    left_elsewhere: AtomicU64,
    /// What comes is what another process has heard already.
    is_replayed: AtomicBool,
}

impl Frontend {
    pub(super) const fn new(session: Session) -> Self {
        let [has_size, is_replayed] = [const { AtomicBool::new(false) }; 2];
        Self { session, has_size, left_elsewhere: AtomicU64::new(0), is_replayed }
    }

    /// Before the frontend is heard.
    pub(super) fn begin(&self, beginning: Beginning) {
        let offer = &self.session.context.offer;
        if let Some(belief) = beginning.resumed {
            offer.resume(belief);
            self.left_elsewhere.store(u64::MAX, Ordering::Relaxed);
            self.is_replayed.store(true, Ordering::Relaxed);
        }
        if let Some(tell) = beginning.believes {
            offer.tell_belief(tell);
        }
    }

    /// Whether `queue` goes on in this session for the first time, and where another process has
    /// left it: its driver is the same.
    fn goes_on(&self, queue: usize) -> bool {
        self.left_elsewhere.fetch_and(!(1 << queue), Ordering::Relaxed) & 1 << queue != 0
    }

    /// What wake-ups are called at the library.
    pub(super) fn wake_id(&self) -> u64 {
        u64::from(self.session.context.config.queues + WAKE)
    }

    /// What the look at the first ring is called there.
    pub(super) fn look_id(&self) -> u64 {
        u64::from(self.session.context.config.queues + LOOK)
    }

    /// What a queue's timer is called there.
    pub(super) fn alarm_id(&self) -> u64 {
        u64::from(self.session.context.config.queues + ALARM)
    }

    /// Says what may be behind the error that the session has ended with.
    pub(super) fn explain(&self, error: &vhost_user_backend::Error) -> Failure {
        let context = &*self.session.context;
        let has_size = self.has_size.load(Ordering::Relaxed);
        let (kind, place) = match error {
            vhost_user_backend::Error::HandleRequest(
                vhost::vhost_user::Error::ReqHandlerError(error),
            ) if error.get_ref().is_some_and(|error| error.is::<VhostUserHandlerError>()) => {
                ("ring outside", "a ring is outside of the guest's memory that is shared")
            }
            // How SET_VRING_ADDR fails without memory. Frontends say the size before.
            vhost_user_backend::Error::HandleRequest(vhost::vhost_user::Error::InvalidParam)
                if has_size && !context.memory.was_shared() && !context.connection.is_refused() =>
            {
                ("nothing shared", "none of the guest's memory is shared")
            }
            _ => return Failure { kind: "session", error: io::Error::other(error.to_string()) },
        };
        Failure { kind, error: io::Error::other(format!("{place}: {SHARE} ({error})")) }
    }

    /// Something happens to the ring of `queue`.
    fn ring_event(&self, queue: usize, event: Event) {
        let context = &*self.session.context;
        if event == Event::HasSize {
            self.has_size.store(true, Ordering::Relaxed);
            return;
        }
        if event == Event::IsResized {
            // What is marked there goes by the size: it is taken up anew, with what there is now.
            context.config.inflight.renew();
            return;
        }
        if event == Event::Starts {
            self.is_replayed.store(false, Ordering::Relaxed);
            // A process that had this ring before may have died before it marked its last answers.
            self.control(queue).log_ring();
            let queues = self.session.queues.clone();
            let wake = move || queues.iter().for_each(|control| control.wake());
            context.claim.ring_starts(queue, wake);
        }
        if matches!(event, Event::ComesFromElsewhere | Event::Starts) {
            let goes_on = self.goes_on(queue);
            if goes_on && event == Event::ComesFromElsewhere {
                return;
            }
        }
        let is_guarded = context.offer.configure(|space| match event {
            Event::IsRefused(_) | Event::HasSize | Event::IsResized => false,
            Event::ComesFromElsewhere => space.ring_comes_from_elsewhere(),
            Event::Starts => space.ring_starts(),
        });
        if is_guarded {
            log::info!(
                "the guest has been running before, with its write cache on or off: each write is made durable until its driver turns the cache on"
            );
        }
        if let Event::IsRefused(size) = event {
            let refusal = ring_refusal(queue, size.into(), context.config.queue_size);
            log_limit::say(Level::Error, "ring refused", format_args!("{refusal}"));
            context.connection.end_soon();
        }
    }

    fn control(&self, queue: usize) -> &Arc<QueueControl> {
        &self.session.queues[queue]
    }

    /// From when this returns on, all that is written into guest memory is marked in the
    /// migration's log, or need not be any more.
    fn turn_log(&self, on: bool) {
        if self.session.context.phase.turn_log(on) {
            self.session.queues.iter().for_each(|control| control.pass_lock());
            log::info!(
                "what is written into guest memory is {}",
                if on { "logged for a migration from now on" } else { "not logged any more" }
            );
        }
    }

    /// Whether a ring that is stopped leaves what it has in flight to another process. A migration
    /// must be under way: where the guest is reset, what the kernel still reads would come into
    /// memory that has another use then.
    fn leaves_in_flight(&self) -> bool {
        let context = &self.session.context;
        let leaves = |inflight: &Inflight| inflight.leaves;
        context.phase.is_logged() && context.config.inflight.get().1.is_some_and(|one| leaves(&one))
    }
}

/// The type that implements the library's trait.
#[derive(Clone)]
pub(super) struct Backend(pub(super) Arc<Frontend>);

impl VhostUserBackend for Backend {
    type Bitmap = LogSlot;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.0.session.context.config.queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(Vring::LARGEST)
    }

    fn features(&self) -> u64 {
        self.0.session.context.offer.features()
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | LOG_ALL
    }

    fn acked_features(&self, acked: u64) {
        self.0.turn_log(acked & LOG_ALL != 0);
        self.0.session.context.offer.acknowledge(acked & !LOG_ALL);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        for queue in 0..self.num_queues() {
            if let Err(error) = self.0.session.stop_ring(queue) {
                log::error!("device reset: {error}");
                if matches!(error, NotDrained::TimedOut { .. }) {
                    // What is in flight must not be answered in the ring that the driver sets up
                    // now.
                    let context = &self.0.session.context;
                    context.phase.advance_to(Phase::GaveUp);
                    context.connection.end();
                    return;
                }
            }
            self.0.control(queue).ring_is_reset();
        }
        self.0.turn_log(false);
        self.0.session.context.offer.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The queue itself knows.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let context = &*self.0.session.context;
        let read = |space: &mut ConfigSpace| space.read(offset, size);
        context.offer.tell(read).unwrap_or_else(|error| {
            log_limit::say(
                Level::Warn,
                "config read",
                format_args!("the frontend is refused its read, and let go: {error}"),
            );
            context.connection.end_soon();
            // An answer of another length than was asked for becomes one of no length, which says
            // that it is an error.
            Vec::new()
        })
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        if buf == [1] && self.0.is_replayed.load(Ordering::Relaxed) {
            // What the driver believes has come with the session. If that is that the cache is off,
            // something has come after this.
            return Ok(());
        }
        match self.0.session.context.offer.configure(|space| space.write(offset, buf)) {
            // The frontend's doing, which has let its guest write where there is nothing. There is
            // no other way to say no than to end the session.
            Err(error @ Error::OutOfBounds { .. }) => Err(io::Error::other(error)),
            // The guest's doing, which is to end no session: what cannot be written is not.
            Err(error) => {
                log::debug!("the guest writes to the configuration space: {error}");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemory>) -> io::Result<()> {
        let Session { context, queues, .. } = &self.0.session;
        context.phase.log().bind(&memory.memory());
        context.memory.update(&memory, &context.proxy);
        queues.iter().for_each(|control| control.wake());
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.num_queues()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.0.session.exit_events.take(thread_index)
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let (session, queue) = (&self.0.session, queue_index as usize);
        if self.0.leaves_in_flight() && !session.queues[queue].leave_in_flight() {
            log::info!(
                "queue {queue}: what is in flight is left to the process that the guest is migrated to"
            );
            session.leave_ring(queue);
            return Ok(());
        }
        let drained = session.stop_ring(queue);
        session.queues[queue].log_ring();
        drained.map_err(|error| {
            if matches!(error, NotDrained::TimedOut { .. }) {
                // The error ends the session, which has waited long enough.
                session.context.phase.advance_to(Phase::GaveUp);
            }
            io::Error::other(error)
        })
    }

    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        // One queue per thread: every event is about that queue, be it a kick or a wake-up.
        let (control, vring) = (self.0.control(thread_id), &vrings[0]);
        if u64::from(device_event) == self.0.look_id() {
            control.look(vring);
        } else if u64::from(device_event) == self.0.alarm_id() {
            control.alarm_seen();
        } else if device_event != 0 {
            control.woken();
        }
        // Each thread comes here once before the frontend is heard, see `serve`.
        control.serve_queue(vring, |vring| {
            control.has_ring(vring);
            let frontend = Arc::downgrade(&self.0);
            vring.listen(self.0.session.context.config.queue_size, move |event| {
                if let Some(frontend) = frontend.upgrade() {
                    frontend.ring_event(thread_id, event);
                }
            });
        });
        Ok(())
    }
}
