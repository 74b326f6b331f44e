//! One frontend's connection: from accept to the last worker's leaving.
//!
//! `vhost-user-backend` makes the worker threads, one per queue, when a session begins, and joins
//! them when it ends; it has no hook for either. So a worker comes into being at its thread's first
//! event, and is told to leave by an event too, before the threads are joined.
//!
//! ```text
//!   accept -> negotiate -> rings start -> serve -> (rings stop -> start ...)
//!          -> disconnect -> drain -> leave -> join
//! ```
//!
//! Whoever reconnects takes the used index that it finds for the place to go on at. So when it is
//! us who end a session, everything is answered before the frontend is let go; and once it is gone,
//! nothing is published any more, because that would be answered, or even run, a second time.
//!
//! Invariants: no event handler returns an error for a request's sake (that would end its thread in
//! silence); a ring that was stopped or reset has nothing in flight when the frontend gets its
//! answer (one that was disabled takes nothing more); when a session is over, nothing of it is
//! left: no thread, no descriptor, no mapping.

use crate::args::MAX_QUEUE_SIZE;
use crate::cpus;
use crate::log_limit::{self, how_to_have_more};
use crate::raw_fd::{self, ExitEvents};
use crate::vring::{Event, Vring};
use crate::worker::{Orders, QueueWorker};
use domain_abi::DeviceInfo;
use log::Level;
use proxy::{DomainProxy, Notifier};
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackend, VhostUserDaemon, VhostUserHandlerError,
};
use virtio_blk::{ConfigSpace, Limits, features};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// After so long a drain is reported, and given up if the daemon is to end. Nothing is cancelled
/// before: a guest that comes back must not find errors that were made by our leaving.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How often somebody who waits for a drain looks whether he still should.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long a guest may take from the start of its first ring to its first request, before its
/// memory is suspected.
const TO_BEGIN: Duration = Duration::from_secs(5);

/// What to do about memory that is not shared.
const SHARE: &str =
    "start QEMU with share=on for its memory backend, and with memory-backend= for the machine";

/// How long a frontend that is refused something may take to read that.
const TO_READ_A_REFUSAL: Duration = Duration::from_millis(200);

/// How long a worker with nothing in flight takes to say so, at most.
const AT_ONCE: Duration = Duration::from_millis(50);

/// What wake-ups are called at the library, and what the look at the first ring is, both behind the
/// queues.
const WAKE: u16 = 1;
const LOOK: u16 = 2;

/// What does not change from session to session.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// Number of queues.
    pub queues: u16,
    /// Largest size of a queue.
    pub queue_size: u16,
    /// How long a worker polls before it sleeps.
    pub poll: Duration,
    /// Which CPU each worker is kept on, in turn; none if empty.
    pub worker_cpus: Vec<usize>,
}

/// What the worker of a queue and the session say to each other.
struct QueuePost {
    /// Only the queue's thread looks inside; the lock is never contended.
    worker: Mutex<Option<QueueWorker>>,
    /// Makes the queue's thread look.
    wake: EventFd,
    /// How often somebody asked the worker to settle.
    asked: AtomicU64,
    settled: Mutex<Settled>,
    settled_changed: Condvar,
    /// What is awaited is owed by instances that do not serve any more.
    is_owed_elsewhere: AtomicBool,
    /// Leave even if something is in flight.
    abandon: AtomicBool,
    /// The queue's thread has ended.
    gone: AtomicBool,
}

/// How far a worker has settled.
#[derive(Default)]
struct Settled {
    /// The newest request to settle after which nothing was being popped, and nothing was awaited
    /// any more.
    asked: u64,
    /// How many requests were in flight all the same: they are left unanswered for good.
    lost: usize,
}

struct Wake(EventFd);

impl Notifier for Wake {
    fn notify(&self) {
        // Fails only if the counter is full, and then the worker is about to be woken anyway.
        let _ = self.0.write(1);
    }

    fn fd(&self) -> Option<OwnedFd> {
        raw_fd::dup(&self.0).ok()
    }
}

/// The backend of one connection.
pub(crate) struct Session {
    proxy: Arc<DomainProxy>,
    config: SessionConfig,
    info: DeviceInfo,
    space: Mutex<ConfigSpace>,
    limits: Mutex<Arc<Limits>>,
    acked: AtomicU64,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    memory_version: AtomicU64,
    told_memory: Mutex<Vec<(usize, usize)>>,
    posts: Box<[QueuePost]>,
    exit_events: ExitEvents,
    ending: AtomicBool,
    /// What was in flight at the end has been waited for, in vain.
    out_of_time: AtomicBool,
    /// The frontend is gone, or is let go now: publish nothing more.
    hung_up: Arc<AtomicBool>,
    /// Ends the time that the first ring has to show that the guest's memory is shared.
    lookout: Mutex<TimerFd>,
    /// It was set.
    is_watched: AtomicBool,
    /// Some ring was given a size that it can have.
    has_size: AtomicBool,
    /// Something was taken from some ring.
    has_taken: AtomicBool,
    /// The frontend was refused something, and its connection is about to be ended.
    is_let_go: AtomicBool,
    /// Ends the connection, once there is one.
    shutdown: Mutex<Option<ShutdownHandle>>,
}

thread_local! {
    /// Set on a queue's thread; dropped when that thread ends, for whatever reason.
    static PRESENCE: RefCell<Option<Presence>> = const { RefCell::new(None) };
}

/// Notices that a queue's thread has ended: the library ends it without a word if, say, the
/// frontend's kick descriptor cannot be read.
struct Presence {
    session: Weak<Session>,
    queue: usize,
}

impl Drop for Presence {
    fn drop(&mut self) {
        let Some(session) = self.session.upgrade() else { return };
        let post = &session.posts[self.queue];
        post.gone.store(true, Ordering::Release);
        if !session.ending.load(Ordering::Acquire) {
            log_limit::say(
                Level::Error,
                "thread ended",
                format_args!(
                    "the thread of queue {} has ended; ending the session, so that the frontend connects again",
                    self.queue
                ),
            );
            if let Some(handle) = lock(&session.shutdown).as_ref() {
                handle.shutdown();
            }
        }
        // Nobody else will: the worker leaves here, on its own thread.
        *lock(&post.worker) = None;
        lock(&post.settled).asked = u64::MAX;
        post.settled_changed.notify_all();
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    fn new(
        proxy: &Arc<DomainProxy>,
        config: &SessionConfig,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
    ) -> io::Result<Self> {
        let space = |info: &DeviceInfo| ConfigSpace::new(info, config.queues, config.queue_size);
        let info = proxy.offer(DRAIN_TIMEOUT, |info| space(info).required_capabilities());
        let info = info.ok_or_else(|| {
            io::Error::new(io::ErrorKind::TimedOut, "an upgrade is under way, and does not end")
        })?;
        let space = space(&info);
        let post = |_| {
            Ok(QueuePost {
                worker: Mutex::new(None),
                wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
                asked: AtomicU64::new(0),
                settled: Mutex::default(),
                settled_changed: Condvar::new(),
                is_owed_elsewhere: AtomicBool::new(false),
                abandon: AtomicBool::new(false),
                gone: AtomicBool::new(false),
            })
        };
        Ok(Self {
            lookout: Mutex::new(TimerFd::new().map_err(io::Error::from)?),
            is_watched: AtomicBool::new(false),
            has_size: AtomicBool::new(false),
            has_taken: AtomicBool::new(false),
            limits: Mutex::new(Arc::new(Limits::new(&info, 0))),
            space: Mutex::new(space),
            acked: AtomicU64::new(0),
            info,
            proxy: Arc::clone(proxy),
            config: config.clone(),
            memory,
            memory_version: AtomicU64::new(1),
            told_memory: Mutex::default(),
            posts: (0..config.queues).map(post).collect::<io::Result<_>>()?,
            exit_events: ExitEvents::new(usize::from(config.queues))?,
            ending: AtomicBool::new(false),
            out_of_time: AtomicBool::new(false),
            hung_up: Arc::default(),
            is_let_go: AtomicBool::new(false),
            shutdown: Mutex::default(),
        })
    }

    /// Runs on the queue's thread: serves it, settles it, leaves it.
    fn attend(self: &Arc<Self>, queue: usize, vring: &Vring) {
        PRESENCE.with_borrow_mut(|presence| {
            presence.get_or_insert_with(|| {
                // Each thread comes here once before the frontend is heard, see `serve`.
                let session = Arc::downgrade(self);
                vring.listen(self.config.queue_size, {
                    let session = Weak::clone(&session);
                    move |event| {
                        if let Some(session) = session.upgrade() {
                            session.ring_event(queue, event);
                        }
                    }
                });
                Presence { session, queue }
            });
        });
        let post = &self.posts[queue];
        let mut worker = lock(&post.worker);
        // Before anything is looked at: what was asked until now is what we can say is settled
        // afterwards.
        let asked = post.asked.load(Ordering::Acquire);
        let ending = self.ending.load(Ordering::Acquire);
        if worker.is_none() && !ending {
            *worker = self.hire(queue, post);
        }
        // Without a worker it is as it was when that left.
        let (mut idle, mut lost) = (true, lock(&post.settled).lost);
        if let Some(serving) = worker.as_mut() {
            let limits = Arc::clone(&lock(&self.limits));
            serving.serve(vring, || Orders {
                stop_popping: self.ending.load(Ordering::Relaxed)
                    || post.asked.load(Ordering::Relaxed) != asked,
                limits: &limits,
                memory_version: self.memory_version.load(Ordering::Acquire),
                memory: &self.memory,
            });
            self.watch(queue, vring, serving);
            idle = serving.awaited() == 0;
            post.is_owed_elsewhere.store(serving.is_owed_elsewhere(), Ordering::Relaxed);
            lost = serving.in_flight() - serving.awaited();
            if ending && idle && lost > 0 {
                self.proxy
                    .leave_behind(&format!("requests of queue {queue} that can never be answered"));
            } else if ending && !idle && post.abandon.load(Ordering::Relaxed) {
                serving.abandon();
                idle = true;
            }
            if ending && idle {
                *worker = None;
            }
        }
        drop(worker);
        if post.asked.load(Ordering::Acquire) != asked {
            // Somebody asked while we served; look again from the start.
            let _ = post.wake.write(1);
        }
        if idle {
            let mut settled = lock(&post.settled);
            if settled.asked < asked {
                *settled = Settled { asked, lost };
                drop(settled);
                post.settled_changed.notify_all();
            }
        }
    }

    /// Sees to it that a look is taken at a first ring with nothing in it. If what is mapped here
    /// is not the guest's memory (QEMU without `share=on` shows us a file that it does not use
    /// itself) nothing ever comes, and the guest waits for ever.
    fn watch(&self, queue: usize, vring: &Vring, serving: &QueueWorker) {
        if serving.has_taken() {
            self.has_taken.store(true, Ordering::Relaxed);
        } else if queue == 0
            && serving.is_blank(vring)
            && !self.is_watched.swap(true, Ordering::Relaxed)
        {
            // It fails for no time that is neither zero nor negative.
            let _ = lock(&self.lookout).reset(TO_BEGIN, None);
        }
    }

    /// The look.
    fn look(&self, vring: &Vring) {
        // It is due, so this does not wait.
        let _ = lock(&self.lookout).wait();
        let is_blank =
            lock(&self.posts[0].worker).as_ref().is_some_and(|serving| serving.is_blank(vring));
        if is_blank && !self.has_taken.load(Ordering::Relaxed) {
            log_limit::say(
                Level::Warn,
                "nothing comes",
                format_args!(
                    "there has been nothing in the guest's first ring since it was started {} s ago. If the guest waits for its disk, its memory is not shared: {SHARE}",
                    TO_BEGIN.as_secs()
                ),
            );
        }
    }

    /// Says what may be behind the error that a session has ended with.
    fn explain(&self, error: &vhost_user_backend::Error) -> Failure {
        let has_memory = self.memory_version.load(Ordering::Relaxed) > 1;
        let has_size = self.has_size.load(Ordering::Relaxed);
        let is_let_go = self.is_let_go.load(Ordering::Relaxed);
        let (kind, place) = match error {
            vhost_user_backend::Error::HandleRequest(
                vhost::vhost_user::Error::ReqHandlerError(error),
            ) if error.get_ref().is_some_and(|error| error.is::<VhostUserHandlerError>()) => {
                ("ring outside", "a ring is outside of the guest's memory that is shared")
            }
            // How SET_VRING_ADDR fails without memory. Frontends say the size before.
            vhost_user_backend::Error::HandleRequest(vhost::vhost_user::Error::InvalidParam)
                if has_size && !has_memory && !is_let_go =>
            {
                ("nothing shared", "none of the guest's memory is shared")
            }
            _ => return Failure { kind: "session", error: io::Error::other(error.to_string()) },
        };
        Failure { kind, error: io::Error::other(format!("{place}: {SHARE} ({error})")) }
    }

    /// Does something to the configuration space; afterwards the domain's write cache is in the
    /// mode that it says.
    fn configure<T>(&self, change: impl FnOnce(&mut ConfigSpace) -> T) -> T {
        let mut space = lock(&self.space);
        let result = change(&mut space);
        // Under the lock, so that the last to change it is the last to tell.
        self.proxy.set_write_cache(space.write_cache());
        result
    }

    fn ring_event(self: &Arc<Self>, queue: usize, event: Event) {
        if event == Event::HasSize {
            self.has_size.store(true, Ordering::Relaxed);
            return;
        }
        let is_guarded = self.configure(|space| match event {
            Event::IsRefused(_) | Event::HasSize => false,
            Event::ComesFromElsewhere => space.ring_comes_from_elsewhere(),
            Event::Starts => space.ring_starts(),
        });
        if is_guarded {
            log::info!(
                "the guest has been running before, with its write cache on or off: each write is made durable until its driver turns the cache on"
            );
        }
        if let Event::IsRefused(size) = event {
            let cure = how_to_size(size, self.config.queue_size);
            log_limit::say(
                Level::Error,
                "ring refused",
                format_args!(
                    "queue {queue} is refused: the frontend wants a ring of {size} entries, {cure}"
                ),
            );
            self.end_soon();
        }
    }

    /// Ends the connection when its frontend has had the time to read an answer that refuses it
    /// something. The `vhost` crate's frontend (Cloud Hypervisor's, for one) would wait for the
    /// rest of such an answer for ever; QEMU's gives up by itself.
    fn end_soon(self: &Arc<Self>) {
        if self.is_let_go.swap(true, Ordering::Relaxed) {
            return;
        }
        let session = Arc::downgrade(self);
        let end = move || {
            std::thread::sleep(TO_READ_A_REFUSAL);
            let Some(session) = session.upgrade() else { return };
            if let Some(handle) = lock(&session.shutdown).as_ref() {
                handle.shutdown();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("refuse".to_owned()).spawn(end) {
            log::warn!("no thread to end the session that was refused something: {error}");
        }
    }

    fn hire(&self, queue: usize, post: &QueuePost) -> Option<QueueWorker> {
        let wake = match post.wake.try_clone() {
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
        cpus::keep(queue, &self.config.worker_cpus);
        let slots = usize::from(self.config.queue_size);
        let lane = self.proxy.worker(queue, slots, Box::new(Wake(wake)));
        if lane.is_none() {
            log_limit::say(
                Level::Error,
                "not left",
                format_args!(
                    "queue {queue} cannot be served: a worker of an earlier session has not left"
                ),
            );
        }
        let (size, poll, hung_up) =
            (self.config.queue_size, self.config.poll, Arc::clone(&self.hung_up));
        lane.map(|lane| QueueWorker::new(lane, queue, size, poll, hung_up))
    }

    /// Waits until nothing of `queue` is in flight, as
    /// [`settle_in_the_end`](Self::settle_in_the_end). The ring must be off or the session ending,
    /// or it goes on at once.
    ///
    /// # Errors
    /// Something is in flight still: it was given up, or is left unanswered for good.
    fn settle(&self, queue: usize) -> io::Result<()> {
        let lost = self.settle_in_the_end(queue)?;
        if lost == 0 {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "queue {queue} has {lost} requests that can never be answered: the domain that had them could not be ended"
        )))
    }

    /// As [`settle_until`](Self::settle_until), however long the storage takes, unless that is over
    /// [`DRAIN_TIMEOUT`] and the daemon is to end, or the instance that owes them does not serve
    /// any more.
    ///
    /// An instance that is left with a request serves that queue no more, so nobody is left early:
    /// storage that hangs would not serve the next frontend either, and comes back for both. After
    /// an upgrade somebody else serves, so a domain that keeps a request for ever can be left.
    fn settle_in_the_end(&self, queue: usize) -> io::Result<usize> {
        let started = Instant::now();
        let mut told = DRAIN_TIMEOUT;
        loop {
            let out_of_time = self.out_of_time.load(Ordering::Acquire);
            let settled = self.settle_until(
                queue,
                Instant::now() + if out_of_time { AT_ONCE } else { LOOK_EVERY },
            );
            let waited = started.elapsed();
            let way_out = || {
                self.proxy.is_stopping()
                    || self.posts[queue].is_owed_elsewhere.load(Ordering::Relaxed)
            };
            let over = out_of_time || waited >= DRAIN_TIMEOUT && way_out();
            if settled.is_ok() || over {
                return settled;
            }
            if waited >= told {
                told += DRAIN_TIMEOUT;
                log::error!(
                    "queue {queue}: requests are still in flight after {} s; the frontend, or the next one, waits for them",
                    waited.as_secs()
                );
            }
        }
    }

    /// Waits until nothing of `queue` is awaited. Returns how many of its requests are left
    /// unanswered for good.
    fn settle_until(&self, queue: usize, deadline: Instant) -> io::Result<usize> {
        let post = &self.posts[queue];
        let asked = post.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let _ = post.wake.write(1);
        let mut settled = lock(&post.settled);
        while settled.asked < asked {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let message = format!("queue {queue} was not drained in time");
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
            settled = post
                .settled_changed
                .wait_timeout(settled, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(settled.lost)
    }

    /// Answers what is in flight and takes nothing more, before the frontend is let go. What does
    /// not end in time is given up by [`leave`](Self::leave).
    fn drain(&self) {
        self.ending.store(true, Ordering::Release);
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        for queue in 0..self.posts.len() {
            if let Err(error) = self.settle_until(queue, deadline) {
                log::error!("{error}; the frontend is let go without");
                self.out_of_time.store(true, Ordering::Release);
                return;
            }
        }
    }

    /// Ends the session's workers, on their own threads, after the frontend has gone. What never
    /// ends is left, and stays mapped.
    fn leave(&self) {
        self.hung_up.store(true, Ordering::Release);
        self.ending.store(true, Ordering::Release);
        for queue in 0..self.posts.len() {
            if let Err(error) = self.settle_in_the_end(queue) {
                log::error!("{error}; its requests stay unanswered");
                self.proxy.leave_behind(&format!(
                    "requests of queue {queue}, in flight when the session ended"
                ));
                // The others have had as long.
                self.out_of_time.store(true, Ordering::Release);
                let post = &self.posts[queue];
                post.abandon.store(true, Ordering::Relaxed);
                let asked = post.asked.fetch_add(1, Ordering::AcqRel) + 1;
                let _ = post.wake.write(1);
                let mut settled = lock(&post.settled);
                while settled.asked < asked {
                    // A thread that is inside the domain cannot be taken out of it.
                    settled =
                        post.settled_changed.wait(settled).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
        for (address, len) in std::mem::take(&mut *lock(&self.told_memory)) {
            self.proxy.memory_changed(address, len, false);
        }
        // A frontend that comes back with the same guest relies on what that guest has
        // acknowledged.
        self.proxy.require(features::required_capabilities(self.acked.load(Ordering::Relaxed)));
    }
}

/// What to do about a ring of a size that is refused.
fn how_to_size(size: u16, largest: u16) -> String {
    if !size.is_power_of_two() {
        let other = size.next_power_of_two().min(largest);
        return format!("which is no power of two: give QEMU queue-size={other}");
    }
    let qemu = format!("give QEMU queue-size={largest}");
    if size > MAX_QUEUE_SIZE {
        return format!("and {MAX_QUEUE_SIZE} is the most that there can be: {qemu}");
    }
    format!("and {largest} is the most: start the daemon with --queue-size {size}, or {qemu}")
}

/// The session as `vhost-user-backend` sees it.
#[derive(Clone)]
struct Backend(Arc<Session>);

impl std::ops::Deref for Backend {
    type Target = Session;
    fn deref(&self) -> &Session {
        &self.0
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.config.queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(Vring::LARGEST)
    }

    fn features(&self) -> u64 {
        features::offered(&self.info) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, acked: u64) {
        self.acked.store(acked, Ordering::Relaxed);
        *lock(&self.limits) = Arc::new(Limits::new(&self.info, acked));
        self.configure(|space| space.set_acked_features(acked));
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        for queue in 0..self.posts.len() {
            if let Err(error) = self.settle(queue) {
                log::error!("device reset: {error}");
            }
        }
        self.acked.store(0, Ordering::Relaxed);
        self.configure(ConfigSpace::reset);
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The queue itself knows.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.configure(|space| space.read(offset, size)).unwrap_or_else(|error| {
            log_limit::say(
                Level::Warn,
                "config read",
                format_args!("the frontend is refused its read, and let go: {error}"),
            );
            self.0.end_soon();
            // An answer of another length than was asked for becomes one of no length, which says
            // that it is an error.
            Vec::new()
        })
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        match self.configure(|space| space.write(offset, buf)) {
            // The frontend's doing, which has let its guest write where there is nothing. There is
            // no other way to say no than to end the session.
            Err(error @ virtio_blk::Error::OutOfBounds { .. }) => Err(io::Error::other(error)),
            // The guest's doing, which is to end no session: what cannot be written is not.
            Err(error) => {
                log::debug!("the guest writes to the configuration space: {error}");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let now: Vec<_> = memory
            .memory()
            .iter()
            .map(|region| (region.as_ptr() as usize, region.len() as usize))
            .collect();
        let before = std::mem::replace(&mut *lock(&self.told_memory), now.clone());
        for &(address, len) in before.iter().filter(|range| !now.contains(range)) {
            self.proxy.memory_changed(address, len, false);
        }
        for &(address, len) in now.iter().filter(|range| !before.contains(range)) {
            self.proxy.memory_changed(address, len, true);
        }
        // Release pairs with the Acquire in `attend`: who sees the version finds the map.
        self.memory_version.fetch_add(1, Ordering::Release);
        for post in &self.posts {
            let _ = post.wake.write(1);
        }
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.config.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit_events.take(thread_index)
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        self.settle(queue_index as usize).inspect_err(|error| {
            if error.kind() == io::ErrorKind::TimedOut {
                // This ends the session, which has waited long enough.
                self.out_of_time.store(true, Ordering::Release);
            }
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
        if device_event == self.config.queues + LOOK {
            self.look(&vrings[0]);
        } else if device_event != 0 {
            let _ = self.posts[thread_id].wake.read();
        }
        self.0.attend(thread_id, &vrings[0]);
        Ok(())
    }
}

/// What it takes to end a session.
type Running = (ShutdownHandle, Arc<Session>);

/// Makes the session that runs now end, from any thread.
#[derive(Default)]
pub struct SessionHandle {
    current: Mutex<(bool, Option<Running>)>,
}

impl SessionHandle {
    /// Ends the session that runs now, when what is in flight has been answered, and every later
    /// one at its start. Does not wait for that.
    pub fn stop(&self) {
        let mut current = lock(&self.current);
        current.0 = true;
        let Some((handle, session)) = current.1.take() else { return };
        drop(current);
        let last = Arc::new((handle, session));
        let end = {
            let last = Arc::clone(&last);
            move || {
                last.1.drain();
                last.1.hung_up.store(true, Ordering::Release);
                last.0.shutdown();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("drain".to_owned()).spawn(end) {
            log::warn!("no thread to wait for what is in flight: {error}");
            last.0.shutdown();
        }
    }

    fn set(&self, running: Option<Running>) {
        let stopped = {
            let mut current = lock(&self.current);
            current.1 = running;
            current.0
        };
        if stopped {
            self.stop();
        }
    }
}

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

/// Serves one connection, which must be waiting at `listener`, until it ends.
///
/// # Errors
/// The session could not be set up, or the frontend broke the protocol. The device is ready for the
/// next one in any case.
pub fn serve(
    proxy: &Arc<DomainProxy>,
    config: &SessionConfig,
    listener: &UnixListener,
    handle: &SessionHandle,
    connected: &AtomicBool,
) -> Result<(), Failure> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let session = Arc::new(Session::new(proxy, config, memory.clone())?);
    use vhost::vhost_user::Error::{Disconnected, PartialMessage};
    use vhost_user_backend::Error::HandleRequest;

    let other = |error: vhost_user_backend::Error| io::Error::other(error.to_string());
    let mut daemon =
        VhostUserDaemon::new("vhost-user".to_owned(), Backend(Arc::clone(&session)), memory)
            .map_err(other)?;
    let wake_id = u64::from(config.queues + WAKE);
    for (post, threads) in session.posts.iter().zip(daemon.get_epoll_handlers()) {
        threads.register_listener(post.wake.as_raw_fd(), EventSet::IN, wake_id)?;
    }
    if let Some(first) = daemon.get_epoll_handlers().first() {
        let look_id = u64::from(config.queues + LOOK);
        first.register_listener(lock(&session.lookout).as_raw_fd(), EventSet::IN, look_id)?;
    }
    // Each thread has been here once before the frontend can break it: from then on its end is
    // noticed.
    for queue in 0..session.posts.len() {
        session.settle(queue)?;
    }
    let started = daemon
        .start(&mut Listener::from(listener.try_clone()?))
        .map_err(|error| Failure::from(other(error)));
    let ended = started.and_then(|()| {
        handle.set(daemon.shutdown_handle().map(|handle| (handle, Arc::clone(&session))));
        *lock(&session.shutdown) = daemon.shutdown_handle();
        connected.store(true, Ordering::Relaxed);
        proxy.connected(true);
        let ended = daemon.wait();
        connected.store(false, Ordering::Relaxed);
        proxy.connected(false);
        handle.set(None);
        lock(&session.shutdown).take();
        match ended {
            // How frontends go: between two messages, or in the middle of one.
            Err(HandleRequest(Disconnected | PartialMessage)) => Ok(()),
            ended => ended.map_err(|error| session.explain(&error)),
        }
    });
    session.leave();
    // Joins the threads; their workers have left.
    drop(daemon);
    session.exit_events.close();
    ended
}
