//! The queues of one instance: what their workers do at once, and what they leave to a port.
//!
//! All that a queue has in flight is in one of these places: its port, the sync that it shares
//! ([`SyncTurn`]), the list of what waits for a range, the instance's thread ([`Offload`]). A
//! request is taken from the host only if the port has room for all of them, so that whatever comes
//! back can go on at once.
//!
//! [`Offload`]: super::offload

use super::backend::{AfterSync, Backend, BackendStep, QueueState, Step};
use super::port::{JobKind, Port, PortEnd};
use super::ranges::needs_range;
use super::sync_turn::SyncTurn;
use domain_api::{Batch, Completions, Host, QueueIndex, Request, Status};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// What a port's jobs are called.
type Job<B> = <<B as Backend>::Port as Port>::Job;

/// The engine of one instance: a domain makes one in `prepare`, and passes on what it is called
/// with.
pub struct Engine<B: Backend> {
    host: Host,
    backend: B,
    /// One bit for each queue that is attached.
    attached: AtomicU64,
    /// What is left of queues that were let go of, the last one of each. To end a port takes long,
    /// and to close a descriptor may write all back (NFS, FUSE), and their worker has a guest to
    /// serve; they end with the instance.
    detached: Mutex<Vec<(QueueIndex, Remains<B>)>>,
}

/// What a worker keeps for its queue.
pub struct Queue<B: Backend> {
    state: QueueState<B>,
    turn: SyncTurn,
    /// The request whose sync is followed by another one, for which another queue has the range.
    unfollowed: Option<Request>,
    /// The range that the sync under way has.
    sync_range: Option<Range<u64>>,
    /// How many changes are in the port without a range, where these are counted.
    plain: u32,
    /// Requests that wait for a range.
    blocked: VecDeque<Request>,
    /// How many requests are with the instance's thread.
    offloaded: usize,
    /// How often the instance had been told to cancel when this queue last looked.
    cancels_seen: u32,
}

/// What is left of a queue. It may take long to drop.
struct Remains<B: Backend> {
    _port: Option<B::Port>,
    _local: B::Local,
}

impl<B: Backend + std::fmt::Debug> std::fmt::Debug for Engine<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("backend", &self.backend).finish_non_exhaustive()
    }
}

impl<B: Backend> std::fmt::Debug for Queue<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("index", &self.state.index).finish_non_exhaustive()
    }
}

impl<B: Backend> Engine<B> {
    /// An engine for a backend.
    pub fn new(host: Host, backend: B) -> Self {
        Self { host, backend, attached: AtomicU64::new(0), detached: Mutex::default() }
    }

    /// What it drives.
    pub const fn backend(&self) -> &B {
        &self.backend
    }

    /// For [`attach_queue`](domain_api::BlockDomain::attach_queue).
    pub fn attach(&self, index: QueueIndex) -> Queue<B> {
        let queue = Queue {
            state: QueueState::new(&self.backend, index),
            turn: SyncTurn::default(),
            unfollowed: None,
            sync_range: None,
            plain: 0,
            blocked: VecDeque::new(),
            offloaded: 0,
            cancels_seen: self.backend.shared().cancels(),
        };
        self.attached.fetch_or(1 << index.0, Ordering::Relaxed);
        queue
    }

    /// For [`detach_queue`](domain_api::BlockDomain::detach_queue).
    pub fn detach(&self, queue: Queue<B>) {
        let QueueState { index, local, mut port, .. } = queue.state;
        self.attached.fetch_and(!(1 << index.0), Ordering::Relaxed);
        port.iter_mut().for_each(Port::close);
        let remains = Remains { _port: port, _local: local };
        let mut detached = self.detached.lock().unwrap_or_else(PoisonError::into_inner);
        // Queues may come and go as often as they like: one is kept, and the one before ends here,
        // when the others can go on.
        let before =
            detached.iter().position(|(of, _)| *of == index).map(|at| detached.swap_remove(at));
        detached.push((index, remains));
        drop(detached);
        drop(before);
    }

    /// For [`submit`](domain_api::BlockDomain::submit).
    pub fn submit(
        &self,
        queue: &mut Queue<B>,
        batch: &mut Batch<'_>,
        completions: &mut Completions<'_>,
    ) {
        Run { backend: &self.backend, queue, completions }.submit(batch);
    }

    /// For [`reap`](domain_api::BlockDomain::reap).
    pub fn reap(&self, queue: &mut Queue<B>, completions: &mut Completions<'_>) {
        let mut run = Run { backend: &self.backend, queue, completions };
        run.heed_cancel();
        run.collect();
    }

    /// For [`cancel`](domain_api::BlockDomain::cancel).
    pub fn cancel(&self) {
        self.backend.shared().cancel();
        // Only a queue's own worker may use its port, so it is woken to do so.
        let attached = self.attached.load(Ordering::Relaxed);
        (0..u64::BITS)
            .filter(|index| attached & 1 << index != 0)
            .for_each(|index| self.host.notify(QueueIndex(index)));
    }
}

impl<B: Backend> Queue<B> {
    /// Whether the port can take one more, and all that wait beside it.
    #[inline]
    fn has_room(&self) -> bool {
        let beside = self.turn.len()
            + self.blocked.len()
            + self.offloaded
            + usize::from(self.unfollowed.is_some());
        self.state.port.as_ref().is_none_or(|port| {
            port.has_room() && (beside == 0 || port.in_flight() + beside < port.capacity())
        })
    }
}

/// One call for one queue: what all its steps need.
struct Run<'r, 'c, B: Backend> {
    backend: &'r B,
    queue: &'r mut Queue<B>,
    completions: &'r mut Completions<'c>,
}

impl<B: Backend> Run<'_, '_, B> {
    #[inline]
    fn submit(&mut self, batch: &mut Batch<'_>) {
        if !self.queue.state.may_open {
            while let Some(request) = batch.next() {
                let status = self.backend.serve(&mut self.queue.state.local, &request);
                self.completions.complete(request, status);
            }
            return;
        }
        self.heed_cancel();
        // A full port may have room again when what it has is submitted and some of that ends in
        // the call. If not, the rest stays with the host, which comes back when something has
        // ended.
        while !batch.is_empty() && self.queue.has_room() {
            while self.queue.has_room()
                && let Some(request) = batch.next()
            {
                let step = self.backend.begin(&mut self.queue.state, &request);
                self.go_on(request, step);
            }
            self.collect();
        }
    }

    /// Gives up what is in flight if that was asked for. Looked at before anything new is taken,
    /// which was not meant.
    #[inline]
    fn heed_cancel(&mut self) {
        let cancels = self.backend.shared().cancels();
        if cancels != self.queue.cancels_seen {
            self.queue.cancels_seen = cancels;
            self.queue.state.port.iter_mut().for_each(Port::cancel);
        }
    }

    /// Takes in all that has ended, and goes on with what waited for it.
    fn collect(&mut self) {
        loop {
            while let Some(end) = self.queue.state.port.as_mut().and_then(Port::advance) {
                let PortEnd { request, job, result } = end;
                let kind = B::Port::kind(&job);
                if kind == JobKind::Change && self.is_plain(&request) {
                    self.count_plain(self.queue.plain - 1);
                }
                if kind == JobKind::Sync {
                    self.sync_ended(request, job, result);
                } else {
                    let step = self.backend.ended(&mut self.queue.state, &request, job, result);
                    self.go_on(request, step);
                }
            }
            if self.queue.offloaded > 0 {
                self.collect_offloaded();
            }
            let mut again = false;
            if let Some(request) = self.queue.unfollowed.take() {
                self.after_sync(request, self.backend.synced(self.backend.sync_job(), Ok(())));
                again = self.queue.unfollowed.is_none();
            }
            again |= self.unblock();
            if !again {
                return;
            }
        }
    }

    #[cold]
    fn collect_offloaded(&mut self) {
        for (request, result) in self.backend.shared().offload().done(self.queue.state.index) {
            self.queue.offloaded -= 1;
            let status = self.backend.offload_ended(&request, result);
            self.done(request, status);
        }
    }

    /// Begins what waited for a range. Whether any of it could.
    fn unblock(&mut self) -> bool {
        let before = self.queue.blocked.len();
        for _ in 0..before {
            let Some(request) = self.queue.blocked.pop_front() else { break };
            self.begin_again(request);
        }
        self.queue.blocked.len() < before
    }

    /// One that was begun before, and could not go on as it was.
    #[cold]
    #[inline(never)]
    fn begin_again(&mut self, request: Request) {
        let step = self.backend.begin(&mut self.queue.state, &request);
        self.go_on(request, step);
    }

    #[inline]
    fn go_on(&mut self, request: Request, step: BackendStep<B>) {
        match step {
            Step::Done(status) => self.done(request, status),
            Step::Push(job) if self.queue.state.port.is_some() => self.push(request, job),
            Step::Blocked => self.queue.blocked.push_back(request),
            step => self.go_on_elsewhere(request, step),
        }
    }

    /// What is rarer than that. The first request that is to wait without its worker opens the port
    /// for it. If there is none to be had, the worker serves it, and all that follow.
    #[inline(never)]
    fn go_on_elsewhere(&mut self, request: Request, step: BackendStep<B>) {
        match step {
            Step::Again => {
                self.queue.state.give_back(self.backend, &request);
                self.begin_again(request);
            }
            Step::Offload(task) => {
                let (shared, index) = (self.backend.shared(), self.queue.state.index);
                match shared.offload().run(index, request, task) {
                    Ok(()) => self.queue.offloaded += 1,
                    Err(request) => self.serve(request),
                }
            }
            Step::Push(job) if self.queue.state.has_port(self.backend) => self.push(request, job),
            Step::Sync if self.queue.state.has_port(self.backend) => {
                if let Some(first) = self.queue.turn.join(request) {
                    self.push_sync(first);
                }
            }
            Step::Push(_) | Step::Sync | Step::Serve => self.serve(request),
            Step::Done(_) | Step::Blocked => unreachable!("dealt with by `go_on`"),
        }
    }

    #[inline]
    fn port(&mut self) -> &mut B::Port {
        self.queue.state.port.as_mut().expect("looked at before something is pushed")
    }

    /// Serves a request here and now. It takes its range itself.
    fn serve(&mut self, request: Request) {
        self.queue.state.give_back(self.backend, &request);
        let status = self.backend.serve(&mut self.queue.state.local, &request);
        self.completions.complete(request, status);
    }

    #[inline]
    fn push(&mut self, request: Request, job: Job<B>) {
        // A change without a range is counted first, and then it is looked whether it needs one by
        // now (`ranges`).
        if B::Port::kind(&job) == JobKind::Change
            && self.is_plain(&request)
            && !self.counts_as_plain()
        {
            return self.begin_again(request);
        }
        self.port().push(request, job);
    }

    fn push_sync(&mut self, first: Request) {
        let job = self.backend.sync_job();
        self.port().push(first, job);
    }

    /// Whether a change is one without a range, where these are counted.
    #[inline]
    fn is_plain(&self, request: &Request) -> bool {
        self.backend.may_grow() && !self.queue.state.holds(request)
    }

    /// Counts one more change without a range, unless it needs one by now.
    #[inline]
    fn counts_as_plain(&mut self) -> bool {
        self.queue.plain += 1;
        self.backend.shared().ranges().set_plain(self.queue.state.index, self.queue.plain);
        // Only now, see `ranges`.
        let counts = !needs_range(self.backend.alignment());
        if !counts {
            self.count_plain(self.queue.plain - 1);
        }
        counts
    }

    /// Says how many changes without a range are left.
    #[inline]
    fn count_plain(&mut self, left: u32) {
        self.queue.plain = left;
        let ranges = self.backend.shared().ranges();
        ranges.set_plain(self.queue.state.index, left);
        if left == 0 && self.backend.has_grown() {
            ranges.look_again();
        }
    }

    #[inline]
    fn done(&mut self, request: Request, status: Status) {
        self.queue.state.give_back(self.backend, &request);
        self.completions.complete(request, status);
    }

    /// A sync has ended, for the request that it went with and all that ride on it.
    fn sync_ended(&mut self, request: Request, job: Job<B>, result: io::Result<()>) {
        let after = self.backend.synced(job, result);
        // What it has said is taken in before the next one asks.
        if let Some(range) = self.queue.sync_range.take() {
            self.backend.shared().ranges().give_back(&range);
        }
        self.after_sync(request, after);
    }

    fn after_sync(&mut self, request: Request, after: AfterSync<Job<B>>) {
        match after {
            AfterSync::Done(outcome) => self.conclude(request, &outcome),
            AfterSync::Then(job, range) => {
                let ranges = self.backend.shared().ranges();
                if ranges.try_take(&range, false, self.queue.state.index) {
                    self.queue.sync_range = Some(range);
                    self.port().push(request, job);
                } else {
                    self.queue.unfollowed = Some(request);
                }
            }
        }
    }

    /// Answers a request whose sync has ended, and all that ride on it; begins the next one.
    fn conclude(&mut self, request: Request, outcome: &io::Result<()>) {
        let given_up = outcome.as_ref().is_err_and(is_cancelled);
        let mut served = self.queue.turn.riders();
        served.push(request);
        loop {
            for request in served.drain(..) {
                let status = match outcome {
                    Ok(()) => Status::Ok,
                    Err(error) => self.backend.shared().failed(&request, error),
                };
                self.done(request, status);
            }
            let Some(first) = self.queue.turn.next() else { return };
            if given_up {
                // All that was in flight was to be given up.
                served = self.queue.turn.riders();
                served.push(first);
                continue;
            }
            return self.push_sync(first);
        }
    }
}

/// Whether it was given up because that was asked for ([`Port::cancel`]).
#[must_use]
pub fn is_cancelled(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ECANCELED)
}
