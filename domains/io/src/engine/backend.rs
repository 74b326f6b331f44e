//! The backend: what each request maps to. The one trait that a disk implements for the engine.

use super::offload::OffloadTask;
use super::port::Port;
use super::ranges;
use super::shared::Shared;
use domain_api::{QueueIndex, Request, Status};
use std::io;
use std::ops::Range;

/// When a queue opens its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opens {
    /// Never: the worker serves everything.
    Never,
    /// Under the first request that needs it.
    WhenNeeded,
    /// When the queue is attached; then or never.
    AtOnce,
}

/// What to do next for a request.
pub enum Step<J> {
    /// Tell the guest.
    Done(Status),
    /// Leave it to the port; [`Backend::ended`] goes on.
    Push(J),
    /// Make durable what was written, with a sync job that others share, and answer.
    Sync,
    /// Leave it to the instance's thread; [`Backend::offload_ended`] answers.
    Offload(OffloadTask),
    /// Begin again when a range is free.
    Blocked,
    /// Begin again now, without the range that it has. Only if something has changed that `begin`
    /// sees, or it never ends.
    Again,
    /// Have the worker serve it from beginning to end, without the range that it has.
    Serve,
}

/// What to do when a sync job has ended.
pub enum AfterSync<J> {
    /// All that it was for are answered.
    Done(io::Result<()>),
    /// It ended well, and is followed by this one, which has the range to itself among all queues.
    /// If that is not free, [`Backend::synced`] is asked again later, as if the first one had just
    /// ended well.
    Then(J, Range<u64>),
}

/// A disk whose data is behind descriptors.
///
/// **What a backend promises.**
///
/// - [`begin`](Backend::begin) and [`ended`](Backend::ended) do not wait: they say what comes next
///   ([`Step`]), or do at once what only copies.
/// - For each request it says in the end `Done` or `Serve`, or takes a step that leads there; the
///   engine answers each request once, and runs no step of one twice at a time.
/// - What the guest is told of a disk in the end is the same on each way: through the port, and by
///   [`serve`](Backend::serve), which is all that there is where no port can be had.
/// - A flush covers the changes that had *completed* before it was submitted, by any queue and any
///   instance, and nothing else is owed to it. So a sync job that is pushed later than they
///   completed covers them, and no request is held back for another.
/// - On storage with an alignment above [`SECTOR`](super::SECTOR) it takes the range of a request
///   ([`QueueState::take_range`]) before the first step of a change, and asks for the alignment
///   once for the two. `serve` makes each change in
///   [`change_at_worker`](Backend::change_at_worker).
///
/// **What is called when.** `local` and, where it opens at once, `open`: when a queue is attached,
/// on its thread. `open` otherwise: under the first request that needs the port. `begin`: once for
/// each request, and again after `Blocked`, `Again`, or if the alignment has grown meanwhile.
/// `ended`: for each job that has ended but syncs; `synced` for those. All of these for one queue
/// by one thread, for different queues at the same time.
///
/// **What is not called.** `ended` for a request that was answered; `open` again, after it has
/// failed; anything at all for requests that are in a port that is dropped: they come to the next
/// instance.
pub trait Backend: Send + Sync + Sized {
    /// Where requests wait.
    type Port: Port;
    /// What a queue keeps for the backend: buffers, descriptors, what it has learnt.
    type Local: Send;

    /// The engine's state of this instance.
    fn shared(&self) -> &Shared;

    /// When queues open their ports.
    fn opens(&self) -> Opens;

    /// For a queue that is being attached.
    fn local(&self, queue: QueueIndex) -> Self::Local;

    /// The port of a queue; `None` if it has to do without from now on.
    fn open(&self, local: &Self::Local, queue: QueueIndex) -> Option<Self::Port>;

    /// What to do first for a request.
    fn begin(&self, queue: &mut QueueState<Self>, request: &Request) -> BackendStep<Self>;

    /// What to do when `job` has ended for a request.
    fn ended(
        &self,
        queue: &mut QueueState<Self>,
        request: &Request,
        job: <Self::Port as Port>::Job,
        result: io::Result<()>,
    ) -> BackendStep<Self>;

    /// Serves a request on the calling thread. It may wait.
    fn serve(&self, local: &mut Self::Local, request: &Request) -> Status;

    /// The job that makes durable what has ended before.
    fn sync_job(&self) -> <Self::Port as Port>::Job;

    /// Takes in how a sync job has ended.
    fn synced(
        &self,
        job: <Self::Port as Port>::Job,
        result: io::Result<()>,
    ) -> AfterSync<<Self::Port as Port>::Job> {
        let _ = job;
        AfterSync::Done(result)
    }

    /// Answers a request whose [`Step::Offload`] has ended.
    fn offload_ended(&self, request: &Request, result: io::Result<()>) -> Status {
        self.shared().status(request, result)
    }

    /// Makes a change on the calling worker, for [`serve`](Self::serve): with the range of its
    /// request to itself where that is needed, counted as one without where the alignment may grow.
    /// `make` gets the alignment that it is made with. It holds up the worker.
    ///
    /// # Errors
    /// What `make` says; [`io::ErrorKind::TimedOut`] if another request keeps the range.
    #[inline]
    fn change_at_worker<R>(
        &self,
        request: &Request,
        make: impl FnOnce(u64) -> io::Result<R>,
    ) -> io::Result<R> {
        let ranges = self.shared().ranges();
        let mut plain = self.may_grow().then(|| ranges.plain_at_worker());
        // Only now, see `ranges`.
        let alignment = self.alignment();
        let range = if ranges::needs_range(alignment) {
            plain = None;
            let range = ranges::hull(request, alignment);
            if !ranges.take(&range, self.has_grown()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Some(range)
        } else {
            None
        };
        let result = make(alignment);
        range.iter().for_each(|range| ranges.give_back(range));
        drop(plain);
        result
    }

    /// What offsets and lengths must be multiples of now, in bytes. It may grow, if
    /// [`may_grow`](Self::may_grow); read and grown with SeqCst then ([`ranges`]).
    fn alignment(&self) -> u64 {
        ranges::SECTOR
    }

    /// Whether the alignment may grow while requests are in flight: changes without a range are
    /// counted then.
    fn may_grow(&self) -> bool {
        false
    }

    /// Whether it has, so that changes without a range may still be in flight where others need
    /// one.
    fn has_grown(&self) -> bool {
        false
    }
}

/// What follows for a request of a backend's.
pub type BackendStep<B> = Step<<<B as Backend>::Port as Port>::Job>;

/// What a queue has that its backend may use.
pub struct QueueState<B: Backend> {
    pub(super) index: QueueIndex,
    /// The backend's own.
    pub local: B::Local,
    /// None, if no request has needed it yet, or it cannot be had.
    pub(super) port: Option<B::Port>,
    /// Whether one can be had when it is needed.
    pub(super) may_open: bool,
    /// Ranges that requests in flight have to themselves, by tag.
    held: Vec<(u64, Range<u64>)>,
}

impl<B: Backend> QueueState<B> {
    pub(super) fn new(backend: &B, index: QueueIndex) -> Self {
        let (local, opens) = (backend.local(index), backend.opens());
        let port = (opens == Opens::AtOnce).then(|| backend.open(&local, index)).flatten();
        Self {
            index,
            local,
            // One that could not be had now is not tried for again under a request.
            may_open: opens == Opens::WhenNeeded || port.is_some(),
            port,
            held: Vec::new(),
        }
    }

    /// Opens the port, if that is still to be done. Whether there is one now.
    pub fn has_port(&mut self, backend: &B) -> bool {
        if self.port.is_none() && self.may_open {
            self.port = backend.open(&self.local, self.index);
            self.may_open = self.port.is_some();
        }
        self.port.is_some()
    }

    /// Whether a request has its range to itself.
    #[inline]
    pub fn holds(&self, request: &Request) -> bool {
        !self.held.is_empty() && self.held.iter().any(|(tag, _)| *tag == request.id().tag)
    }

    /// Takes the range of a change, if it is free. If not, the step is [`Step::Blocked`].
    #[cold]
    pub fn take_range(&mut self, backend: &B, request: &Request, alignment: u64) -> bool {
        let range = ranges::hull(request, alignment);
        let taken = backend.shared().ranges().try_take(&range, backend.has_grown(), self.index);
        if taken {
            self.held.push((request.id().tag, range));
        }
        taken
    }

    /// The range that a request has to itself, or that it is read from.
    pub fn range(&self, backend: &B, request: &Request) -> Range<u64> {
        let held = self.held.iter().find(|(tag, _)| *tag == request.id().tag);
        held.map_or_else(|| ranges::hull(request, backend.alignment()), |(_, range)| range.clone())
    }

    /// Gives back the range that a request has to itself, if it has one.
    #[inline]
    pub(super) fn give_back(&mut self, backend: &B, request: &Request) {
        if !self.held.is_empty() {
            self.give_back_held(backend, request);
        }
    }

    #[cold]
    fn give_back_held(&mut self, backend: &B, request: &Request) {
        let tag = request.id().tag;
        if let Some(at) = self.held.iter().position(|(of, _)| *of == tag) {
            backend.shared().ranges().give_back(&self.held.swap_remove(at).1);
        }
    }
}
