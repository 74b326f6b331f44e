//! What the connections, the queues and the keeper of an instance have in common.

use crate::job::{Item, Job, Mail, Suspect};
use crate::marks::{Mark, Marks};
use crate::old::Old;
use crate::own_flush::OwnFlush;
use crate::uri::Target;
use domain_api::{DomainError, Host, QueueIndex, Request};
use domain_io::engine::PortEnd;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Deaths from which on a request is sent alone.
const SUSPECT: u32 = 3;
/// Deaths after which a request is answered with an error.
const MOST_DEATHS: u32 = 5;
/// Most queues that there are.
const QUEUES: usize = u64::BITS as usize;

/// What the operator has asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// How long an old change is waited for whose server lives on.
    pub(crate) settle: Duration,
    /// How long requests wait for a server; for ever without it.
    pub(crate) timeout: Option<Duration>,
    /// Most connections, where the server allows more than one.
    pub(crate) connections: usize,
}

/// What they have in common.
pub(crate) struct Common {
    pub(crate) host: Host,
    pub(crate) target: Target,
    pub(crate) options: Options,
    mail: Vec<Mutex<Vec<Mail>>>,
    /// One bit for each queue that has a port.
    attached: AtomicU64,
    pub(crate) old: Old,
    marks: OnceLock<Marks>,
    in_flight: AtomicUsize,
    /// Requests that connections may have died of; while there are any, only they are sent.
    suspects: Arc<AtomicUsize>,
    /// One of them is in flight.
    alone: AtomicBool,
    pub(crate) own_flush: OwnFlush,
    /// Something was changed since a flush was sent that was answered.
    unflushed: AtomicBool,
    is_going_down: AtomicBool,
    /// Something was answered since the keeper asked.
    has_answers: AtomicBool,
    keeper: OwnedFd,
}

/// What is behind a mutex, also if a holder has panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Common {
    pub(crate) fn new(host: Host, target: Target, options: Options) -> io::Result<Self> {
        Ok(Self {
            host,
            target,
            options,
            mail: (0..QUEUES).map(|_| Mutex::default()).collect(),
            attached: AtomicU64::new(0),
            old: Old::default(),
            marks: OnceLock::new(),
            in_flight: AtomicUsize::new(0),
            suspects: Arc::default(),
            alone: AtomicBool::new(false),
            own_flush: OwnFlush::default(),
            unflushed: AtomicBool::new(false),
            is_going_down: AtomicBool::new(false),
            has_answers: AtomicBool::new(false),
            keeper: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    // Queues.

    pub(crate) fn attach(&self, queue: QueueIndex) {
        self.attached.fetch_or(1 << queue.0, Ordering::Relaxed);
    }

    pub(crate) fn detached(&self, queue: QueueIndex) {
        self.attached.fetch_and(!(1 << queue.0), Ordering::Relaxed);
    }

    pub(crate) fn notify_all(&self) {
        let attached = self.attached.load(Ordering::Relaxed);
        (0..u64::BITS)
            .filter(|index| attached & 1 << index != 0)
            .for_each(|index| self.host.notify(QueueIndex(index)));
    }

    pub(crate) fn post(&self, queue: QueueIndex, mail: impl IntoIterator<Item = Mail>) {
        if self.attached.load(Ordering::Relaxed) & 1 << queue.0 != 0 {
            lock(&self.mail[queue.0 as usize]).extend(mail);
        }
    }

    pub(crate) fn take_mail(&self, queue: QueueIndex) -> Vec<Mail> {
        std::mem::take(&mut *lock(&self.mail[queue.0 as usize]))
    }

    // Marks.

    pub(crate) fn marks(&self) -> Option<&Marks> {
        self.marks.get()
    }

    /// The region of marks, once the storage is ours.
    pub(crate) fn open_marks(&self) -> Result<&Marks, DomainError> {
        if self.marks.get().is_none() {
            let _ = self.marks.set(Marks::open(self.host)?);
        }
        Ok(self.marks.get().expect("set just above"))
    }

    #[inline]
    pub(crate) fn set_mark(&self, link: usize, index: usize, mark: Mark) {
        if let Some(marks) = self.marks.get() {
            marks.set(link, index, mark);
        }
    }

    #[inline]
    pub(crate) fn clear_mark(&self, link: usize, index: usize) {
        if let Some(marks) = self.marks.get() {
            marks.clear(link, index);
        }
    }

    // Requests.

    /// Whether a request may be sent now; if so, it is.
    #[inline]
    pub(crate) fn may_send(&self, request: &Request, job: &mut Job) -> bool {
        if self.old.holds_up(request, job) {
            return false;
        }
        // SeqCst: of two queues that send a suspect, one sees the other's.
        self.suspects.load(Ordering::SeqCst) == 0
            || job.suspect.is_some()
                && self.in_flight.load(Ordering::SeqCst) == 0
                && !self.alone.swap(true, Ordering::SeqCst)
    }

    #[inline]
    pub(crate) fn sent(&self) {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
    }

    /// A server has answered something.
    #[inline]
    pub(crate) fn note_answer(&self) {
        // A line that all queues read, as long as nothing changes.
        if !self.has_answers.load(Ordering::Relaxed) {
            self.has_answers.store(true, Ordering::Relaxed);
        }
    }

    /// Whether one has since this was asked.
    pub(crate) fn takes_answers(&self) -> bool {
        self.has_answers.swap(false, Ordering::Relaxed)
    }

    /// What a connection had of a request has ended.
    #[inline]
    pub(crate) fn answered(&self, job: Option<&Job>) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        if self.suspects.load(Ordering::SeqCst) > 0 {
            if job.is_none_or(|job| job.suspect.is_some()) {
                self.alone.store(false, Ordering::SeqCst);
            }
            self.notify_all();
        }
    }

    /// A request has ended for good.
    #[inline]
    pub(crate) fn concluded(&self, mut end: PortEnd<Job>) -> PortEnd<Job> {
        if end.job.suspect.take().is_some() {
            self.notify_all();
        }
        end
    }

    /// Counts one more end of a connection, or the like, against a request: it is sent again, alone
    /// if that has happened often, or answered with an error if it has happened too often.
    pub(crate) fn blame(&self, mut item: Item, why: &str) -> Mail {
        let job = &mut item.job;
        job.deaths += 1;
        if job.deaths >= SUSPECT && job.suspect.is_none() {
            job.suspect = Some(Suspect::new(&self.suspects));
        }
        if job.deaths < MOST_DEATHS {
            return Mail::Again(item);
        }
        self.host.count("nbd_quarantined", 1);
        let Item { request, job } = item;
        let error = io::Error::other(why.to_owned());
        Mail::Done(self.concluded(PortEnd { request, job, result: Err(error) }))
    }

    // The keeper.

    pub(crate) fn keeper(&self) -> BorrowedFd<'_> {
        self.keeper.as_fd()
    }

    pub(crate) fn wake_keeper(&self) {
        // Fails if the counter is full, and then the keeper is awake.
        let _ = rustix::io::write(&self.keeper, &1u64.to_ne_bytes());
    }

    /// Has a flush sent that no request has asked for. Returns its number.
    pub(crate) fn want_flush(&self) -> u64 {
        let number = self.own_flush.ask();
        self.wake_keeper();
        number
    }

    /// A change was answered well, or a flush that was sent has not made durable what was.
    #[inline]
    pub(crate) fn note_unflushed(&self) {
        // SeqCst here and below: a change that was answered before a flush is sent is noted before
        // that, or covered by it. A line that all queues read, as long as nothing is flushed.
        if !self.unflushed.load(Ordering::SeqCst) {
            self.unflushed.store(true, Ordering::SeqCst);
        }
    }

    /// A flush is about to be sent, or what was not flushed has been told of. Whether there was
    /// any.
    #[inline]
    pub(crate) fn takes_unflushed(&self) -> bool {
        self.unflushed.swap(false, Ordering::SeqCst)
    }

    /// As a predecessor has left it.
    pub(crate) fn set_unflushed(&self, unflushed: bool) {
        self.unflushed.store(unflushed, Ordering::SeqCst);
    }

    /// The server has answered a flush with an error. What its kernel says once, it does not say
    /// again.
    pub(crate) fn flush_failed(&self) {
        self.host.storage().mark_failed(&format!(
            "the server of {} has failed to write data back: what was written since the flush before may be lost; \
             see to its storage, look after the file system in the disk, and start the daemon anew",
            self.target
        ));
    }

    /// A server says that it is going down: nothing new is sent to it.
    pub(crate) fn going_down(&self) {
        if !self.is_going_down.swap(true, Ordering::Relaxed) {
            self.wake_keeper();
        }
    }

    /// Whether a server has said so since this was asked.
    pub(crate) fn takes_going_down(&self) -> bool {
        self.is_going_down.swap(false, Ordering::Relaxed)
    }
}
