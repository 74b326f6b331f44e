//! What the author of a domain sees: one trait to implement, and the values that pass through it.
//!
//! Requests are owned values. A domain has a [`Request`] until it completes it, and completing
//! consumes it; so safe code can neither answer a request twice nor touch its buffer after the
//! guest was told that it is done.

use crate::{Buffer, Storage};
use domain_abi::{
    self as abi, DeviceInfo, DomainError, HostVtable, Level, Params, QueueIndex, RawBytes,
    RawCompletion, RawCompletions, RawMessage, RawRequest, Status, raw_bytes,
};
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

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
/// `quiesce` is left out where instances swap (see [`Swap`]). `attach_queue`, `submit`, `reap` and
/// `detach_queue` for one queue run on the thread that serves that queue, for different queues at
/// the same time. A panic in any of them is caught by the host and ends the instance, not the
/// device.
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

    /// What this device announces. Must not change while the instance lives, but for
    /// [`swap`](DeviceInfo::swap), which each change asks for again.
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

/// What a request wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Disk to buffer.
    Read,
    /// Buffer to disk.
    Write,
    /// Make every write that completed before durable.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range is to read as zeros.
    WriteZeroes {
        /// The space may be given back.
        may_unmap: bool,
    },
}

/// The host's name for a request, for a domain's own tables and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId {
    /// Unique among what is in flight on one queue.
    pub tag: u64,
    /// The generation that it was submitted to.
    pub generation: u64,
}

/// One request, checked by the host: range inside the capacity, multiples of 512, segments that add
/// up.
#[derive(Debug)]
#[must_use = "a request must be completed, or the guest waits for ever"]
pub struct Request(RawRequest);

// SAFETY: the segments that it points to are host memory that nobody changes until the request has
// completed, and guest memory that is accessed by raw copies only; neither belongs to a thread.
unsafe impl Send for Request {}

impl Request {
    /// The host's name for it.
    #[must_use]
    pub const fn id(&self) -> RequestId {
        RequestId { tag: self.0.tag, generation: self.0.generation }
    }

    /// What it wants done; `None` for a kind that a newer host knows and we do not.
    #[must_use]
    #[inline]
    pub const fn op(&self) -> Option<Op> {
        Some(match self.0.op() {
            abi::op::READ => Op::Read,
            abi::op::WRITE => Op::Write,
            abi::op::FLUSH => Op::Flush,
            abi::op::DISCARD => Op::Discard,
            abi::op::WRITE_ZEROES => {
                Op::WriteZeroes { may_unmap: self.0.flags() & abi::REQUEST_MAY_UNMAP != 0 }
            }
            _ => return None,
        })
    }

    /// First byte on the disk.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.0.offset()
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether it is about no bytes, like a flush.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The guest's memory for it.
    #[must_use]
    #[inline]
    pub fn buffer(&self) -> Buffer<'_> {
        let (segments, count) = self.0.segments();
        if count == 0 {
            // SAFETY: no segment, nothing to uphold.
            return unsafe { Buffer::from_segments(&[]) };
        }
        // SAFETY: the host keeps the segment list and the memory behind it until the request has
        // completed (abi::RawRequest), and completing consumes `self`, which the buffer borrows.
        unsafe { Buffer::from_segments(std::slice::from_raw_parts(segments, count)) }
    }
}

/// The requests of one `submit`, oldest first.
#[derive(Debug)]
pub struct Batch<'a> {
    requests: &'a [RawRequest],
    accepted: &'a mut usize,
}

impl<'a> Batch<'a> {
    /// Offers `requests`; `accepted` counts those that are taken. Meant for what calls a domain:
    /// each request may be offered until it is taken once.
    #[doc(hidden)]
    pub const fn new(requests: &'a [RawRequest], accepted: &'a mut usize) -> Self {
        Self { requests, accepted }
    }

    /// How many are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len() - *self.accepted
    }

    /// Whether none is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the next one. Not an `Iterator`: what is not taken stays with the host, and that
    /// should be read in the code.
    #[allow(clippy::should_implement_trait)]
    #[inline]
    pub fn next(&mut self) -> Option<Request> {
        let raw = self.requests.get(*self.accepted)?;
        *self.accepted += 1;
        Some(Request(*raw))
    }
}

/// Where completions go.
#[derive(Debug)]
pub struct Completions<'a> {
    raw: &'a mut RawCompletions,
}

impl<'a> Completions<'a> {
    /// Wraps the host's list. Meant for what calls a domain.
    ///
    /// # Safety
    /// `entries` has room for `capacity` completions, and `len` of them are valid.
    #[doc(hidden)]
    pub const unsafe fn new(raw: &'a mut RawCompletions) -> Self {
        Self { raw }
    }

    /// How many more fit. The host makes room for everything that can be in flight on the queue.
    #[must_use]
    pub const fn room(&self) -> usize {
        self.raw.capacity - self.raw.len
    }

    /// Ends a request.
    ///
    /// # Panics
    /// If there is no room, which takes a domain that completes what it was never given.
    #[inline]
    pub fn complete(&mut self, request: Request, status: Status) {
        assert!(
            self.raw.len < self.raw.capacity,
            "completed more requests than the host has in flight"
        );
        let read = matches!(request.op(), Some(Op::Read)) && matches!(status, Status::Ok);
        let completion = RawCompletion {
            tag: request.0.tag,
            generation: request.0.generation,
            status: status as u32,
            written: if read { request.0.len() as u32 } else { 0 },
        };
        // SAFETY: `entries` has room for `capacity` completions (host's contract), and `len` is
        // below it.
        unsafe { self.raw.entries.add(self.raw.len).write(completion) };
        self.raw.len += 1;
    }
}

/// What the host does for an instance. Copies are all the same; each call can be made from any
/// thread.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    vtable: &'static HostVtable,
}

// SAFETY: the table is constant, and the host promises that its functions take calls with `ctx`
// from any thread.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

impl Host {
    /// Wraps the host's table.
    ///
    /// # Safety
    /// `vtable` and what it points to stay valid until the module's `fini` has returned, and its
    /// functions do as [`abi::HostVtable`] says.
    #[doc(hidden)]
    #[must_use]
    pub unsafe fn from_vtable(vtable: *const HostVtable) -> Self {
        // SAFETY: the first field is in every version (caller's contract).
        let size = unsafe { (*vtable).size } as usize;
        if size >= size_of::<HostVtable>() {
            // SAFETY: as large as ours, and valid as long as any code of this module can run, which
            // is all that 'static means here.
            return Self { vtable: unsafe { &*vtable } };
        }
        // SAFETY: the caller's contract; shorter than ours.
        Self { vtable: unsafe { completed(vtable, size) } }
    }

    pub(crate) const fn vtable(&self) -> &'static HostVtable {
        self.vtable
    }

    /// The storage: what outlives instances.
    #[must_use]
    pub const fn storage(self) -> Storage {
        Storage::new(self)
    }

    /// Writes a line to the host's log.
    pub fn log(self, level: Level, line: &str) {
        // SAFETY: `line` is borrowed for the call.
        unsafe { (self.vtable.log)(self.vtable.ctx, level as u32, raw_bytes(line.as_bytes())) };
    }

    /// Time since some fixed moment.
    #[must_use]
    pub fn clock(self) -> Duration {
        // SAFETY: no more than `ctx` is passed.
        Duration::from_nanos(unsafe { (self.vtable.clock_ns)(self.vtable.ctx) })
    }

    /// Tells the worker of `queue` that there is something to reap.
    pub fn notify(self, queue: QueueIndex) {
        // SAFETY: no more than `ctx` is passed.
        unsafe { (self.vtable.notify)(self.vtable.ctx, queue.0) };
    }

    /// A dup of the eventfd that [`notify`](Self::notify) writes to for `queue`, to be given to the
    /// kernel: each write to it wakes the worker. Ask for it when the queue is attached, or later.
    /// `None` where the host has no such thing; a domain then has to call `notify`.
    #[must_use]
    pub fn notifier_fd(self, queue: QueueIndex) -> Option<OwnedFd> {
        // SAFETY: no more than `ctx` is passed.
        let fd = unsafe { (self.vtable.notifier_fd)(self.vtable.ctx, queue.0) };
        // SAFETY: the host gives away a fresh descriptor, or a negative number.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// The queues that have workers now. For [`BlockDomain::prepare`]: these are about to be
    /// attached, with a guest that waits, so what takes long is better made for them now. A hint,
    /// no promise: until then some may go, and others come. None, if the host is too old to say.
    pub fn served_queues(self) -> impl Iterator<Item = QueueIndex> {
        // SAFETY: no more than `ctx` is passed.
        let served = unsafe { (self.vtable.served_queues)(self.vtable.ctx) };
        (0..u64::BITS).filter(move |index| served & 1 << index != 0).map(QueueIndex)
    }

    /// Adds `count` to the device's counter `name`. Counters outlive instances, and `status` shows
    /// them. Costs a lock: not for each request. A host that is too old does not count.
    pub fn count(self, name: &str, count: u64) {
        // SAFETY: `name` is borrowed for the call.
        unsafe { (self.vtable.count)(self.vtable.ctx, raw_bytes(name.as_bytes()), count) };
    }

    /// Runs `task` on a thread of the host's. It must end soon after this instance was dropped: the
    /// host waits for it before the module is unmapped. Threads that a domain makes by itself keep
    /// its module resident for ever.
    ///
    /// # Errors
    /// The host cannot make one.
    pub fn spawn(
        self,
        name: &str,
        task: impl FnOnce() + Send + 'static,
    ) -> Result<(), DomainError> {
        let arg = task_arg(task);
        // SAFETY: `arg` fits `run_task` and is given away; where the host fails, it has not taken
        // it and it is freed here.
        self.with_task(arg, |message| unsafe {
            (self.vtable.spawn)(self.vtable.ctx, raw_bytes(name.as_bytes()), run_task, arg, message)
        })
    }

    /// Runs `task` once, `delay` from now, on this instance's timer thread; drops it unrun if the
    /// instance ends earlier.
    ///
    /// # Errors
    /// The host cannot arm it.
    pub fn after(
        self,
        delay: Duration,
        task: impl FnOnce() + Send + 'static,
    ) -> Result<(), DomainError> {
        let arg = task_arg(task);
        let delay_ns = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        // SAFETY: as in `spawn`.
        self.with_task(arg, |message| unsafe {
            (self.vtable.timer)(self.vtable.ctx, delay_ns, run_task, arg, message)
        })
    }

    fn with_task(
        self,
        arg: *mut std::ffi::c_void,
        call: impl FnOnce(&mut RawMessage) -> u32,
    ) -> Result<(), DomainError> {
        let result = with_message(call);
        if result.is_err() {
            // SAFETY: `arg` comes from `task_arg`, and a host that failed has not called the task.
            unsafe { run_task(arg, 0) };
        }
        result
    }
}

/// A full table for a host that is older than this module: what it lacks is filled in. Never freed,
/// it is a few bytes per instance.
///
/// # Safety
/// `vtable` is valid for `size` bytes.
unsafe fn completed(vtable: *const HostVtable, size: usize) -> &'static HostVtable {
    unsafe extern "C" fn no_fd(_: *mut std::ffi::c_void, _: u32) -> i32 {
        -1
    }
    unsafe extern "C" fn no_queues(_: *mut std::ffi::c_void) -> u64 {
        0
    }
    unsafe extern "C" fn not_kept(_: *mut std::ffi::c_void, _: RawBytes) {}
    unsafe extern "C" fn not_marked(_: *mut std::ffi::c_void, _: *mut u8, _: usize) -> u64 {
        u64::MAX
    }
    unsafe extern "C" fn not_counted(_: *mut std::ffi::c_void, _: RawBytes, _: u64) {}
    assert!(size >= std::mem::offset_of!(HostVtable, notifier_fd), "a host table of {size} bytes");
    let full = Box::leak(Box::new(MaybeUninit::<HostVtable>::uninit()));
    // SAFETY: `size` bytes are valid (caller's contract) and fit, being fewer than ours; they cover
    // every field but those that are written before them, for hosts that end there.
    unsafe {
        (&raw mut (*full.as_mut_ptr()).notifier_fd).write(no_fd);
        (&raw mut (*full.as_mut_ptr()).served_queues).write(no_queues);
        (&raw mut (*full.as_mut_ptr()).storage_failed).write(not_kept);
        (&raw mut (*full.as_mut_ptr()).storage_failure).write(not_marked);
        (&raw mut (*full.as_mut_ptr()).count).write(not_counted);
        std::ptr::copy_nonoverlapping(vtable.cast::<u8>(), full.as_mut_ptr().cast(), size);
        full.assume_init_ref()
    }
}

type Task = Box<dyn FnOnce() + Send>;

fn task_arg(task: impl FnOnce() + Send + 'static) -> *mut std::ffi::c_void {
    let task: Task = Box::new(task);
    Box::into_raw(Box::new(task)).cast()
}

/// Runs (`run` 1) or frees a task. `arg` must come from `task_arg` and is used up.
unsafe extern "C" fn run_task(arg: *mut std::ffi::c_void, run: u32) {
    // SAFETY: `task_arg` made it from exactly this type, and the host calls once.
    let task = unsafe { Box::from_raw(arg.cast::<Task>()) };
    // A panic here has nobody to report to but the panic hook, which has logged it.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        if run != 0 {
            task();
        } else {
            drop(task);
        }
    }));
}

/// Makes a call that may leave a sentence, and turns it into a result.
pub(crate) fn with_message(call: impl FnOnce(&mut RawMessage) -> u32) -> Result<(), DomainError> {
    let mut text = [0u8; 512];
    let mut message = RawMessage { bytes: text.as_mut_ptr(), capacity: text.len(), len: 0 };
    let code = call(&mut message);
    if code == abi::CALL_OK {
        return Ok(());
    }
    let len = message.len.min(text.len());
    Err(DomainError::new(String::from_utf8_lossy(&text[..len])))
}
