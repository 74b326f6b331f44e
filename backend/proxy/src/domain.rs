//! A domain that is loaded: its instance, what is known about it, and what uses it.
//!
//! Invariants: a domain is known by its id, never by its address; what uses an instance says so
//! here, so that it is ended only when nothing does.

use crate::change::fence::Fence;
use crate::record::report::DomainRecord;
use crate::signal::{Signal, lock};
use domain_abi::QueueIndex;
use domain_host::{CallError, Instance, QueueHandle};
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use storage::DomainId;

/// Said of an instance that was found dead.
pub(crate) const OUTSIDE_A_REQUEST: &str = "it panicked outside of a request";

/// A domain that is loaded, shared by everything that knows it.
pub(crate) type LoadedDomain = Arc<Domain>;

/// See [`LoadedDomain`].
pub(crate) struct Domain {
    pub(crate) id: DomainId,
    pub(crate) instance: Arc<Instance>,
    pub(crate) fence: Arc<Fence>,
    record: Mutex<Arc<DomainRecord>>,
    uses: Uses,
}

/// What uses an instance.
struct Uses {
    /// A bit for each queue that is attached, or was left with requests in flight.
    queues: AtomicU64,
    /// The second kind alone.
    abandoned: AtomicU64,
    /// Calls that are under way and not a worker's.
    calls: AtomicU64,
    /// Queues that were left with requests in flight. The instance may still write to what belongs
    /// to them, so they are never detached, and never dropped.
    kept: Mutex<ManuallyDrop<Vec<QueueHandle>>>,
    /// Rung when something does not use it any more.
    signal: Arc<Signal>,
}

impl Domain {
    pub(crate) fn new(
        id: DomainId,
        instance: Instance,
        record: DomainRecord,
        signal: Arc<Signal>,
    ) -> LoadedDomain {
        let uses = Uses {
            queues: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            kept: Mutex::default(),
            signal,
        };
        let (instance, record) = (Arc::new(instance), Mutex::new(Arc::new(record)));
        Arc::new(Self { id, instance, fence: Arc::default(), record, uses })
    }

    /// The instance, of a domain that is shared no more. Queues that were left in it keep it.
    pub(crate) fn into_instance(self) -> Arc<Instance> {
        self.instance
    }

    /// What is known about it.
    pub(crate) fn record(&self) -> Arc<DomainRecord> {
        Arc::clone(&lock(&self.record))
    }

    /// The same, after it was asked for its capacity anew: the disk may have been resized since it
    /// was prepared. One that does not say keeps what it has.
    pub(crate) fn refreshed(&self) -> Arc<DomainRecord> {
        if let Ok(info) = self.instance.info() {
            self.set_capacity(info.capacity);
        }
        self.record()
    }

    /// The disk that it is has `capacity` bytes from now on.
    pub(crate) fn set_capacity(&self, capacity: u64) {
        let mut record = lock(&self.record);
        if record.info.capacity != capacity {
            let resized = Arc::make_mut(&mut record);
            resized.info.capacity = capacity;
            // So that successors inherit it.
            if resized.params.get("size").is_some() {
                resized.params.set("size", capacity.to_string());
            }
        }
    }

    /// Its name and version, for people.
    pub(crate) fn label(&self) -> String {
        let record = self.record();
        format!("`{}` {}", record.name, record.version)
    }

    /// Whether it could take up what `other` keeps in storage.
    pub(crate) fn accepts_schema_of(&self, other: &Self) -> bool {
        let schema = other.instance.description().schema;
        self.instance.description().accepted_schemas.contains(&schema)
    }

    /// Whether it has panicked.
    #[inline]
    pub(crate) fn is_dead(&self) -> bool {
        self.instance.is_dead()
    }

    /// Attaches a queue, on the thread that will serve it.
    ///
    /// # Errors
    /// What the domain says; or the queue is attached already.
    pub(crate) fn attach(self: &Arc<Self>, queue: usize) -> Result<Attachment, CallError> {
        // First, so that it is not taken for unused meanwhile. AcqRel, as in the end of it: what is
        // done there is done before it is unused.
        if self.uses.queues.fetch_or(1 << queue, Ordering::AcqRel) & 1 << queue != 0 {
            return Err(CallError::Failed(format!("queue {queue} is attached already")));
        }
        let user = QueueUser { domain: Arc::clone(self), queue };
        let handle = self.instance.attach(QueueIndex(queue as u32))?;
        Ok(Attachment { handle, user })
    }

    /// Says that a call which is not a worker's is under way, as long as the guard lives.
    pub(crate) fn enter(self: &Arc<Self>) -> Call {
        self.uses.calls.fetch_add(1, Ordering::AcqRel);
        Call(Arc::clone(self))
    }

    /// Whether something uses it, or it has been left with requests in flight.
    pub(crate) fn is_used(&self) -> bool {
        // Acquire pairs with what ends: that has left the instance.
        self.attached() != 0 || self.uses.calls.load(Ordering::Acquire) != 0
    }

    /// Whether something uses it that will leave it.
    pub(crate) fn is_awaited(&self) -> bool {
        let abandoned = self.abandoned();
        self.attached() & !abandoned != 0 || self.uses.calls.load(Ordering::Acquire) != 0
    }

    /// The queues that are attached, or were left with requests in flight, a bit each.
    pub(crate) fn attached(&self) -> u64 {
        self.uses.queues.load(Ordering::Acquire)
    }

    /// The queues that were left with requests in flight, a bit each: they are never detached.
    pub(crate) fn abandoned(&self) -> u64 {
        self.uses.abandoned.load(Ordering::Acquire)
    }

    /// Whether a queue was left with requests in flight.
    pub(crate) fn is_abandoned(&self, queue: usize) -> bool {
        self.abandoned() & 1 << queue != 0
    }
}

/// The use of one queue of an instance. Dropping it detaches the queue.
pub(crate) struct Attachment {
    /// Before what follows: the queue is detached before the instance counts as unused.
    pub(crate) handle: QueueHandle,
    user: QueueUser,
}

impl Attachment {
    /// Whose queue it is.
    pub(crate) const fn domain(&self) -> &LoadedDomain {
        &self.user.domain
    }

    /// Leaves the queue with requests in flight, for good.
    pub(crate) fn abandon(self) {
        let Self { handle, user } = self;
        let uses = &user.domain.uses;
        uses.abandoned.fetch_or(1 << user.queue, Ordering::AcqRel);
        lock(&uses.kept).push(handle);
    }
}

/// Says that a queue is attached, as long as it lives.
struct QueueUser {
    domain: LoadedDomain,
    queue: usize,
}

impl Drop for QueueUser {
    fn drop(&mut self) {
        if !self.domain.is_abandoned(self.queue) {
            self.domain.uses.queues.fetch_and(!(1 << self.queue), Ordering::AcqRel);
        }
        self.domain.uses.signal.announce();
    }
}

/// A call that is under way and not a worker's.
pub(crate) struct Call(LoadedDomain);

impl std::ops::Deref for Call {
    type Target = Instance;

    fn deref(&self) -> &Instance {
        &self.0.instance
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.uses.calls.fetch_sub(1, Ordering::AcqRel);
        self.0.uses.signal.announce();
    }
}
