//! The C ABI between host and module: plain structures and function tables, nothing else.
//!
//! Why C: each Rust shared object carries its own `std`, so no Rust type may cross that owns,
//! drops, allocates or dispatches. Every table starts with its own `size` and the ABI version. A
//! side may use a field only if the other side's `size` covers it; fields are added at the end and
//! never change their meaning. [`ABI_VERSION`] changes only if that is not enough.
//!
//! Calls into a module return [`CALL_OK`], [`CALL_FAILED`] or [`CALL_PANICKED`]; for the last two
//! the callee has put a sentence into the caller's [`RawMessage`].
//!
//! What this file deliberately does not know: which call is made when. The contract of
//! `domain_api::BlockDomain` says that.

use crate::{RawImage, RawSegment, op};
use std::ffi::c_void;

/// Most queues that a device can have: the width of the mask that maps them to threads.
pub const MAX_QUEUES: usize = 64;

/// Version of every table in this file. A module built for another version is refused.
pub const ABI_VERSION: u32 = 1;

/// The one symbol that is looked up in a module: a static [`ModuleVtable`].
pub const ENTRY_SYMBOL: &str = "hotswap_domain_module";

/// The call did what it was asked to do.
pub const CALL_OK: u32 = 0;
/// The domain refused or failed; its sentence is in the message.
pub const CALL_FAILED: u32 = 1;
/// The domain panicked; the panic's message is in the message. The instance must not be called
/// again.
pub const CALL_PANICKED: u32 = 2;

/// One checked request. `offset` and `len` are inside the announced capacity and multiples of 512.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RawRequest {
    /// The host's name for this request; comes back in the completion.
    pub tag: u64,
    /// The generation that the host submitted it to; comes back in the completion.
    pub generation: u64,
    op: u32,
    flags: u32,
    offset: u64,
    len: u64,
    segments: *const RawSegment,
    segment_count: usize,
}

// SAFETY: plain numbers and a pointer that `new`'s caller answers for; nothing in it belongs to a
// thread.
unsafe impl Send for RawRequest {}

impl RawRequest {
    /// Describes a request of kind [`op`] on `offset..offset + len` (bytes), with tag and
    /// generation 0.
    ///
    /// # Safety
    /// `segments`, the list itself, stays where it is and unchanged until the request has completed
    /// or its instance has been destroyed. That goes for each copy that is offered to an instance:
    /// one that may still be offered after the request has completed must not exist.
    #[must_use]
    pub const unsafe fn new(
        op: u32,
        flags: u32,
        offset: u64,
        len: u64,
        segments: &[RawSegment],
    ) -> Self {
        Self {
            tag: 0,
            generation: 0,
            op,
            flags,
            offset,
            len,
            segments: segments.as_ptr(),
            segment_count: segments.len(),
        }
    }

    /// A flush.
    #[must_use]
    pub const fn flush() -> Self {
        // SAFETY: the list is empty and `'static`.
        unsafe { Self::new(op::FLUSH, 0, 0, 0, &[]) }
    }

    /// A request that stands for none, and is never submitted, to fill tables with.
    #[must_use]
    pub const fn nothing() -> Self {
        Self::flush()
    }

    /// One of [`op`].
    #[must_use]
    pub const fn op(&self) -> u32 {
        self.op
    }

    /// First byte on the disk.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Flags, e.g. [`REQUEST_MAY_UNMAP`](crate::REQUEST_MAY_UNMAP).
    #[must_use]
    pub const fn flags(&self) -> u32 {
        self.flags
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// The list of segments: first entry and number. Valid as long as the caller of
    /// [`new`](Self::new) has promised.
    #[must_use]
    pub const fn segments(&self) -> (*const RawSegment, usize) {
        (self.segments, self.segment_count)
    }

    /// Whether it is about no bytes, like a flush.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// How one request ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawCompletion {
    /// [`RawRequest::tag`].
    pub tag: u64,
    /// [`RawRequest::generation`].
    pub generation: u64,
    /// One of [`status`](crate::status).
    pub status: u32,
    /// Bytes written into the segments (reads only).
    pub written: u32,
}

/// Where a module puts completions: host memory, filled from the front.
///
/// An entry counts from the moment `len` covers it. `len` lives in host memory and is stored after
/// the entry, so what completed before a panic is known to the host. `entries` and `capacity` are
/// the host's, and stay as they are.
#[repr(C)]
#[derive(Debug)]
pub struct RawCompletions {
    /// First entry.
    pub entries: *mut RawCompletion,
    /// Entries that fit.
    pub capacity: usize,
    /// Entries that are valid.
    pub len: usize,
}

/// Where a callee that fails puts one UTF-8 sentence for its caller; what does not fit is cut. One
/// that does not fail leaves it alone.
#[repr(C)]
#[derive(Debug)]
pub struct RawMessage {
    /// First byte.
    pub bytes: *mut u8,
    /// Bytes that fit.
    pub capacity: usize,
    /// Bytes that are valid.
    pub len: usize,
}

/// Borrowed bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RawBytes {
    /// First byte; may dangle if `len` is 0.
    pub bytes: *const u8,
    /// Length.
    pub len: usize,
}

/// Borrows bytes for a call. They must outlive it, which the callee relies on.
#[must_use]
pub const fn raw_bytes(bytes: &[u8]) -> RawBytes {
    RawBytes { bytes: bytes.as_ptr(), len: bytes.len() }
}

/// What a domain announces about the device it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RawDeviceInfo {
    /// Size of this structure.
    pub size: u32,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Capacity in bytes, a multiple of `block_size`.
    pub capacity: u64,
    /// Bits of [`crate::Capabilities`].
    pub capabilities: u64,
    /// Physical block size in bytes, at least `block_size`.
    pub physical_block_size: u32,
    /// Preferred size of an I/O in bytes, 0 if there is none.
    pub optimal_io_size: u32,
    /// Granularity of `DISCARD` in bytes, 0 if it has none.
    pub discard_granularity: u32,
    /// 1 if this instance may serve beside a predecessor or successor with the same backing.
    pub swap: u32,
    /// What kind of thing holds the data, e.g. `file`; zero-padded.
    pub backing_kind: [u8; 16],
    /// Device and inode of the backing, 0 where there is none.
    pub backing_device: u64,
    /// See `backing_device`.
    pub backing_inode: u64,
    /// How the backing is cached, e.g. 0 for the page cache, 1 for direct I/O.
    pub backing_cache: u64,
    /// Serial number, zero-padded.
    pub serial: [u8; 20],
}

/// What a storage region is mapped at.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RawRegion {
    /// First byte, mapped readable and writable until the module's `fini` has returned.
    pub base: *mut u8,
    /// Length in bytes.
    pub len: usize,
    /// The region's memfd, owned by the host, open as long as the mapping.
    pub fd: i32,
}

/// A function of the module that the host calls once: to run the task behind `arg` (`run` 1), or
/// only to free it (`run` 0).
pub type TaskEntry = unsafe extern "C" fn(arg: *mut c_void, run: u32);

/// What the host offers to one instance. Valid until the module's `fini` has returned.
///
/// All functions can be called from any thread; `ctx` is passed back as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct HostVtable {
    /// Size of this structure.
    pub size: u32,
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// The host's own.
    pub ctx: *mut c_void,
    /// Writes a line to the host's log. `level`: 1 error, 2 warn, 3 info, 4 debug.
    pub log: unsafe extern "C" fn(ctx: *mut c_void, level: u32, line: RawBytes),
    /// Nanoseconds of a monotonic clock.
    pub clock_ns: unsafe extern "C" fn(ctx: *mut c_void) -> u64,
    /// Tells the worker of `queue` that it should reap.
    pub notify: unsafe extern "C" fn(ctx: *mut c_void, queue: u32),
    /// The schema number of the storage as it is now, 0 if it is empty. Works before `activate`.
    pub schema: unsafe extern "C" fn(ctx: *mut c_void) -> u32,
    /// Sets the schema number. Fails unless this instance owns the storage.
    pub set_schema:
        unsafe extern "C" fn(ctx: *mut c_void, schema: u32, message: *mut RawMessage) -> u32,
    /// Length in bytes of a region, 0 if there is none. Works before `activate`.
    pub region_len: unsafe extern "C" fn(ctx: *mut c_void, key: RawBytes) -> u64,
    /// Opens a region, creating it with `len` zero bytes if there is none; one with another length
    /// is an error.
    pub region: unsafe extern "C" fn(
        ctx: *mut c_void,
        key: RawBytes,
        len: u64,
        out: *mut RawRegion,
        message: *mut RawMessage,
    ) -> u32,
    /// Copies the bytes at `key` to `out`; returns their length (which may be more than fits), or
    /// `u64::MAX` for none.
    pub bytes_get:
        unsafe extern "C" fn(ctx: *mut c_void, key: RawBytes, out: *mut u8, capacity: usize) -> u64,
    /// Sets the bytes at `key`. Fails unless this instance owns the storage.
    pub bytes_put: unsafe extern "C" fn(
        ctx: *mut c_void,
        key: RawBytes,
        value: RawBytes,
        message: *mut RawMessage,
    ) -> u32,
    /// A dup (close-on-exec) of the file descriptor at `key`; -1 if there is none, and another
    /// negative number, minus that of the error, if there is one that cannot be dupped. (A host
    /// that knows no such numbers says -1 to both.) Works before `activate`: swap needs it.
    pub fd_dup: unsafe extern "C" fn(ctx: *mut c_void, key: RawBytes) -> i32,
    /// Puts a dup of `fd` at `key`. Fails unless this instance owns the storage.
    pub fd_put: unsafe extern "C" fn(
        ctx: *mut c_void,
        key: RawBytes,
        fd: i32,
        message: *mut RawMessage,
    ) -> u32,
    /// Runs the task on a new thread, which is joined after `destroy` and before `fini`.
    pub spawn: unsafe extern "C" fn(
        ctx: *mut c_void,
        name: RawBytes,
        entry: TaskEntry,
        arg: *mut c_void,
        message: *mut RawMessage,
    ) -> u32,
    /// Runs the task on the instance's timer thread, `delay_ns` from now; it is only freed if
    /// `destroy` comes first.
    pub timer: unsafe extern "C" fn(
        ctx: *mut c_void,
        delay_ns: u64,
        entry: TaskEntry,
        arg: *mut c_void,
        message: *mut RawMessage,
    ) -> u32,
    /// A dup (close-on-exec) of the eventfd that `notify` writes to for `queue`, or -1 if there is
    /// none. A domain can give it to the kernel, so that completions wake the worker without a
    /// thread between. The worker's for as long as the queue is attached.
    pub notifier_fd: unsafe extern "C" fn(ctx: *mut c_void, queue: u32) -> i32,
    /// The queues that have workers now, one bit each, the lowest for queue 0. These will be
    /// attached if this instance is activated; they may also have gone by then, and others may have
    /// come.
    pub served_queues: unsafe extern "C" fn(ctx: *mut c_void) -> u64,
    /// Marks the storage: something that was written to it may be lost for good. The first sentence
    /// stays. Any instance may say so at any time, also one that does not own the storage.
    pub storage_failed: unsafe extern "C" fn(ctx: *mut c_void, sentence: RawBytes),
    /// Copies the sentence that the storage is marked with to `out`; returns its length (which may
    /// be more than fits), or `u64::MAX` if it is not marked.
    pub storage_failure:
        unsafe extern "C" fn(ctx: *mut c_void, out: *mut u8, capacity: usize) -> u64,
    /// Adds `count` to the device's counter `name`, which `status` shows.
    pub count: unsafe extern "C" fn(ctx: *mut c_void, name: RawBytes, count: u64),
    /// Makes the region at `key` `len` bytes long, with zeros behind what is there; one that is as
    /// long stays as it is, one that is longer is an error. It stays where it is mapped, for every
    /// instance. Fails unless this instance owns the storage.
    pub region_grow: unsafe extern "C" fn(
        ctx: *mut c_void,
        key: RawBytes,
        len: u64,
        out: *mut RawRegion,
        message: *mut RawMessage,
    ) -> u32,
    /// Opens an image through `engine`, e.g. `rbd`; `params` are pairs: key, value, key, value. One
    /// that is open for this device already, with the same of these, is that one. May take seconds.
    pub image_open: unsafe extern "C" fn(
        ctx: *mut c_void,
        engine: RawBytes,
        params: *const RawBytes,
        param_count: usize,
        out: *mut RawImage,
        message: *mut RawMessage,
    ) -> u32,
}

/// What a module offers: the static behind [`ENTRY_SYMBOL`].
///
/// `instance` is what `create` returned. `create`, `quiesce`, `activate`, `resume`, `cancel`,
/// `resize` and `destroy` are never called at the same time as each other for one instance.
/// `attach_queue`, `submit`, `reap` and `detach_queue` for one queue come from one thread at a
/// time: the worker that serves it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ModuleVtable {
    /// Size of this structure.
    pub size: u32,
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// Called once after the module was mapped, before anything else: sets up its panic hook.
    pub init: unsafe extern "C" fn(),
    /// Called once before the module is unmapped, when it has no instance: takes the panic hook
    /// out.
    pub fini: unsafe extern "C" fn(),
    /// Prepares an instance: opens, allocates, validates; does not touch the storage's contents.
    /// `params` are pairs: key, value, key, value.
    pub create: unsafe extern "C" fn(
        host: *const HostVtable,
        params: *const RawBytes,
        param_count: usize,
        out: *mut *mut c_void,
        message: *mut RawMessage,
    ) -> u32,
    /// Ends an instance that no queue is attached to and that has nothing in flight.
    pub destroy: unsafe extern "C" fn(instance: *mut c_void, message: *mut RawMessage) -> u32,
    /// Describes the device. `out.size` is set by the caller.
    pub info: unsafe extern "C" fn(
        instance: *mut c_void,
        out: *mut RawDeviceInfo,
        message: *mut RawMessage,
    ) -> u32,
    /// Called on the worker's own thread before its first `submit`.
    pub attach_queue:
        unsafe extern "C" fn(instance: *mut c_void, queue: u32, message: *mut RawMessage) -> u32,
    /// Called on the worker's own thread after its last `reap`, with nothing in flight on the
    /// queue.
    pub detach_queue:
        unsafe extern "C" fn(instance: *mut c_void, queue: u32, message: *mut RawMessage) -> u32,
    /// Takes the first `*accepted` of `count` requests; ends some of them at once into
    /// `completions`. `*accepted` is 0 before the call. What an instance has taken is not offered
    /// to it again, nor to another one before this one is destroyed.
    pub submit: unsafe extern "C" fn(
        instance: *mut c_void,
        queue: u32,
        requests: *const RawRequest,
        count: usize,
        completions: *mut RawCompletions,
        accepted: *mut usize,
        message: *mut RawMessage,
    ) -> u32,
    /// Hands over completions that have come since.
    pub reap: unsafe extern "C" fn(
        instance: *mut c_void,
        queue: u32,
        completions: *mut RawCompletions,
        message: *mut RawMessage,
    ) -> u32,
    /// Gate shut, nothing in flight: writes down what only the instance knows; from now on the
    /// storage is not its own.
    pub quiesce: unsafe extern "C" fn(instance: *mut c_void, message: *mut RawMessage) -> u32,
    /// The storage is the instance's now: takes it up. Must not depend on how many bytes there are.
    pub activate: unsafe extern "C" fn(instance: *mut c_void, message: *mut RawMessage) -> u32,
    /// The upgrade was given up after `quiesce`: the storage is the instance's again.
    pub resume: unsafe extern "C" fn(instance: *mut c_void, message: *mut RawMessage) -> u32,
    /// End what is in flight as soon as possible, with an I/O error where it cannot be done.
    pub cancel: unsafe extern "C" fn(instance: *mut c_void, message: *mut RawMessage) -> u32,
    /// Guest memory was mapped (`added` 1) or is about to be unmapped (`added` 0): for registered
    /// buffers.
    pub memory_changed: unsafe extern "C" fn(
        instance: *mut c_void,
        base: *mut u8,
        len: usize,
        added: u32,
        message: *mut RawMessage,
    ) -> u32,
    /// The driver turned the write cache on (1) or off (0, each write is to be durable before it
    /// completes).
    pub set_write_cache:
        unsafe extern "C" fn(instance: *mut c_void, on: u32, message: *mut RawMessage) -> u32,
    /// The disk is to have `capacity` bytes, which is more than it announces, and a multiple of its
    /// block size. Called for the instance that owns the storage, beside its requests. When it
    /// comes back well, requests up to there are served, `info` says so, and storage has it for
    /// successors; if not, nothing has changed. A table that ends before it is of a module that
    /// cannot be resized.
    pub resize:
        unsafe extern "C" fn(instance: *mut c_void, capacity: u64, message: *mut RawMessage) -> u32,
    /// The rings are about to run: claims the data, so that no other program uses it; `*out`
    /// becomes a number of [`Claim`](crate::Claim). Does not wait. To claim what is claimed changes
    /// nothing. Not called beside itself or `release`, of whatever instance. A table that ends
    /// before it is of a module that claims what there is when it is created, for good.
    pub claim: unsafe extern "C" fn(*mut c_void, out: *mut u32, message: *mut RawMessage) -> u32,
    /// The rings have stopped, with nothing in flight: what was written is made durable, then
    /// others may use the data. It stays claimed if that fails.
    pub release: unsafe extern "C" fn(instance: *mut c_void, message: *mut RawMessage) -> u32,
}

impl ModuleVtable {
    /// Size of the first table of this [`ABI_VERSION`]: a module's may end there, or anywhere
    /// behind it. What it lacks, the host does without.
    pub const FIRST_SIZE: usize = std::mem::offset_of!(Self, resize);
}
