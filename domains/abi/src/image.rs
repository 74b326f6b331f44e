//! Images that the host has open for a device, through a library that it loads when one is asked
//! for: the table of what an instance may do with one.
//!
//! The handle is the host's, as a region is: instances come and go, and the image stays open, with
//! its lock. A request that was begun is the image's until it comes back from `lane_reap`, whatever
//! becomes of the instance; `lane_close` waits for that.

use crate::{RawMessage, RawRequest};
use std::ffi::c_void;

/// What an image is, as of the last look.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RawImageInfo {
    /// Size of this structure.
    pub size: u32,
    /// 1 if it cannot be written.
    pub read_only: u32,
    /// Bytes that it has now.
    pub capacity: u64,
    /// Preferred size of an I/O in bytes, 0 if there is none.
    pub optimal_io_size: u32,
    /// Granularity of `DISCARD` in bytes, 0 if it has none.
    pub discard_granularity: u32,
    /// With `inode`, which image it is, whatever it is called.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
}

/// A request that an image has done with.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawImageEnd {
    /// [`RawRequest::tag`].
    pub tag: u64,
    /// 0, or an `errno` as a negative number.
    pub result: i64,
}

/// What an instance may do with an image. `image` and `lane` are passed back as they were given.
///
/// All functions may be called from any thread; those of one lane from one thread at a time.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ImageVtable {
    /// Size of this structure.
    pub size: u32,
    /// [`ABI_VERSION`](crate::ABI_VERSION).
    pub abi_version: u32,
    /// Describes it. `out.size` is set by the caller.
    pub info: unsafe extern "C" fn(image: *mut c_void, out: *mut RawImageInfo),
    /// Claims it, as [`ModuleVtable::claim`](crate::ModuleVtable::claim) has it, and waits for the
    /// end of that for `wait_ms` at most; what is not done by then goes on, and is an error now.
    pub claim: unsafe extern "C" fn(
        image: *mut c_void,
        wait_ms: u32,
        out: *mut u32,
        message: *mut RawMessage,
    ) -> u32,
    /// Gives it back, as [`ModuleVtable::release`](crate::ModuleVtable::release) has it.
    pub release: unsafe extern "C" fn(image: *mut c_void, message: *mut RawMessage) -> u32,
    /// Makes it `capacity` bytes long, unless it is as long or longer.
    pub resize:
        unsafe extern "C" fn(image: *mut c_void, capacity: u64, message: *mut RawMessage) -> u32,
    /// Opens a lane: requests of one queue, which is notified when one of them has ended.
    pub lane_open: unsafe extern "C" fn(image: *mut c_void, queue: u32) -> *mut c_void,
    /// Begins a request. Its tag is the caller's own; all that it points to stays valid until it
    /// comes back.
    pub lane_begin: unsafe extern "C" fn(lane: *mut c_void, request: *const RawRequest),
    /// Hands back up to `capacity` requests that have ended; says how many.
    pub lane_reap:
        unsafe extern "C" fn(lane: *mut c_void, out: *mut RawImageEnd, capacity: usize) -> usize,
    /// Ends the lane, when all of its requests have ended. It may wait for long.
    pub lane_close: unsafe extern "C" fn(lane: *mut c_void),
}

/// An image, as an instance gets it. Valid until the module's `fini` has returned.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RawImage {
    /// What can be done with it.
    pub table: *const ImageVtable,
    /// The host's own.
    pub image: *mut c_void,
}
