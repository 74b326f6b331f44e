//! What the author of a domain implements.

use crate::host::Host;
use crate::request::{Batch, Completions};
use domain_abi::{Claim, DeviceInfo, DomainError, Params, QueueIndex};

/// A replaceable block device.
///
/// An instance lives through these calls, in this order:
///
/// ```text
/// prepare -> activate -> { attach_queue -> submit / reap ... -> detach_queue } -> quiesce -> drop
///                                    ^                                              |
///                                    +------- resume (upgrade given up) <-----------+
///                                    +------- activate (rolled back to) <-----------+
/// ```
///
/// `quiesce` is left out where instances swap (see [`Swap`](domain_abi::Swap)). `attach_queue`,
/// `submit`, `reap` and `detach_queue` for one queue run on the thread that serves that queue, for
/// different queues at the same time. A panic in any of them is caught by the host and ends the
/// instance, not the device.
pub trait BlockDomain: Sized + Send + Sync + 'static {
    /// Name, `[a-z0-9_-]+`; modules are called `libdomain_NAME.so`.
    const NAME: &'static str;
    /// Version of this implementation.
    const VERSION: &'static str;
    /// Name of the storage layout. Domains that share it can hand storage to each other.
    const SCHEMA_NAME: &'static str;
    /// Number of the layout that this domain leaves behind; not 0.
    const SCHEMA: u32;
    /// Numbers of the layouts that [`activate`](Self::activate) takes up.
    const ACCEPTED_SCHEMAS: &'static [u32];
    /// The parameters it takes.
    const PARAMS: &'static [&'static str];
    /// Those of [`PARAMS`](Self::PARAMS) that it takes over from its predecessor where an upgrade
    /// does not give them: what makes the disk *this* disk.
    const INHERITED: &'static [&'static str];

    /// What a worker keeps for its queue: rings, buffers, requests in flight.
    type Queue: Send + 'static;

    /// Opens, allocates and validates. The predecessor still serves: the storage may be looked at
    /// (`schema`, `region_len`, `bytes`, `file`), but it is not ours yet.
    ///
    /// # Errors
    /// A sentence for the operator. The upgrade is refused and the device goes on as before.
    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError>;

    /// What this device announces. Must not change while the instance lives, but for two things,
    /// which each change asks for again: [`swap`](DeviceInfo::swap); and the
    /// [`capacity`](DeviceInfo::capacity), which is that of the storage once the disk was
    /// [resized](Self::resize), by this instance or by one that came after it.
    fn info(&self) -> DeviceInfo;

    /// Takes up the storage, which is ours from now on. The guest waits: do nothing that depends on
    /// how many bytes there are.
    ///
    /// # Errors
    /// A sentence for the operator. The predecessor resumes.
    fn activate(&self) -> Result<(), DomainError>;

    /// Nothing is in flight and nothing will come: write down in the storage what only this
    /// instance knows.
    ///
    /// # Errors
    /// A sentence for the operator. This instance goes on, as after [`resume`](Self::resume).
    fn quiesce(&self) -> Result<(), DomainError>;

    /// The upgrade was given up after [`quiesce`](Self::quiesce): the storage is ours again.
    ///
    /// # Errors
    /// A sentence for the operator; the device is then `faulted`.
    fn resume(&self) -> Result<(), DomainError> {
        Ok(())
    }

    /// The disk is to have `capacity` bytes: more than [`info`](Self::info) says, and a multiple of
    /// its block size. The storage is ours. Requests are served meanwhile, on other threads, up to
    /// the capacity before; from the moment that this returns `Ok`, up to the new one. What is new
    /// reads as zeros, or as what lies there.
    ///
    /// What the storage holds is the truth from then on: [`prepare`](Self::prepare) and
    /// [`activate`](Self::activate) of every other instance, also of one that was prepared before,
    /// go by it, whatever their parameters said. A parameter `size` is set to the new capacity, in
    /// bytes, for successors. A region grows by
    /// [`Storage::grow_region`](crate::Storage::grow_region).
    ///
    /// # Errors
    /// A sentence for the operator. Nothing has changed then.
    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        let _ = capacity;
        Err(DomainError::new("this domain cannot be resized"))
    }

    /// The guest's rings are about to run, with this instance or one that comes after it: claims
    /// what is behind the disk, so that no other program uses it meanwhile. Does not wait for one
    /// that does. Called for an instance that serves; to claim what is claimed changes nothing. The
    /// claim is the storage's, as is what it is made of: a successor finds it made.
    ///
    /// The caches of this host may be behind what another one has written: what is read afterwards
    /// is what was written before.
    ///
    /// # Errors
    /// A sentence for the operator: it cannot be told whether it is ours.
    fn claim(&self) -> Result<Claim, DomainError> {
        Ok(Claim::Nothing)
    }

    /// The rings have stopped, and nothing is in flight: makes what was written durable, and lets
    /// others use what is behind the disk, until it is claimed again.
    ///
    /// # Errors
    /// A sentence for the operator. It stays claimed then.
    fn release(&self) -> Result<(), DomainError> {
        Ok(())
    }

    /// A worker begins to serve `context.queue` with this instance.
    ///
    /// # Errors
    /// A sentence for the operator; requests of that queue then fail with an I/O error.
    fn attach_queue(&self, context: QueueContext) -> Result<Self::Queue, DomainError>;

    /// The worker has let go. Nothing of the queue is in flight.
    fn detach_queue(&self, queue: Self::Queue) {
        drop(queue);
    }

    /// Takes requests from the front of `batch`, as many as it likes, and completes each now or
    /// later. What it leaves is offered again after the next completion, so it must not leave the
    /// first one while nothing is in flight.
    fn submit(
        &self,
        queue: &mut Self::Queue,
        batch: &mut Batch<'_>,
        completions: &mut Completions<'_>,
    );

    /// Hands over completions that came since, after [`Host::notify`] or whenever the worker comes
    /// by. Must not block.
    fn reap(&self, queue: &mut Self::Queue, completions: &mut Completions<'_>) {
        let _ = (queue, completions);
    }

    /// Ends what is in flight as soon as possible; called when a frontend went away or a deadline
    /// is near.
    fn cancel(&self) {}

    /// Guest memory appeared or is about to disappear, for domains that register buffers with the
    /// kernel.
    fn memory_changed(&self, base: usize, len: usize, added: bool) {
        let _ = (base, len, added);
    }

    /// The driver turned the write cache on or off. Off: a write is durable before it completes.
    fn set_write_cache(&self, on: bool) {
        let _ = on;
    }
}

/// What a domain learns about a queue that it is attached to.
#[derive(Debug, Clone, Copy)]
pub struct QueueContext {
    /// Which queue.
    pub queue: QueueIndex,
}
