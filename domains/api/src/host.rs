//! The host as a domain sees it: its log, its clock, its threads.

use domain_abi::{
    self as abi, DomainError, HostVtable, Level, QueueIndex, RawBytes, RawImage, RawMessage,
    RawRegion, raw_bytes,
};
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

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

    /// The queues that have workers now. For [`prepare`](crate::BlockDomain::prepare): these are
    /// about to be attached, with a guest that waits, so what takes long is better made for them
    /// now. A hint, no promise: until then some may go, and others come. None, if the host is too
    /// old to say.
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
    unsafe extern "C" fn not_grown(
        _: *mut std::ffi::c_void,
        _: RawBytes,
        _: u64,
        _: *mut RawRegion,
        message: *mut RawMessage,
    ) -> u32 {
        // SAFETY: `message` is this module's own (`with_message`).
        unsafe { refused(message, "this host is too old to make a region longer") }
    }
    unsafe extern "C" fn not_opened(
        _: *mut std::ffi::c_void,
        _: RawBytes,
        _: *const RawBytes,
        _: usize,
        _: *mut RawImage,
        message: *mut RawMessage,
    ) -> u32 {
        // SAFETY: `message` is this module's own (`with_message`).
        unsafe { refused(message, "this host is too old to open images; upgrade the daemon") }
    }
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
        (&raw mut (*full.as_mut_ptr()).region_grow).write(not_grown);
        (&raw mut (*full.as_mut_ptr()).image_open).write(not_opened);
        std::ptr::copy_nonoverlapping(vtable.cast::<u8>(), full.as_mut_ptr().cast(), size);
        full.assume_init_ref()
    }
}

/// Leaves a sentence for a call that fails.
///
/// # Safety
/// `message` has room for `capacity` bytes.
unsafe fn refused(message: *mut RawMessage, why: &str) -> u32 {
    // SAFETY: the caller's contract.
    unsafe {
        let len = why.len().min((*message).capacity);
        std::ptr::copy_nonoverlapping(why.as_ptr(), (*message).bytes, len);
        (*message).len = len;
    }
    abi::CALL_FAILED
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
    // A panic here can be reported to nothing but the panic hook, which has logged it.
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
