//! Modules that are older than this host.

use domain_abi::{self as abi, ModuleVtable, RawMessage};
use std::ffi::c_void;
use std::mem::MaybeUninit;

/// A full table for a module that may be older than this host: what it lacks is filled in.
///
/// # Safety
/// `vtable` is valid for `size` bytes, which are [`ModuleVtable::FIRST_SIZE`] at least.
pub(crate) unsafe fn completed(vtable: *const ModuleVtable, size: usize) -> ModuleVtable {
    unsafe extern "C" fn cannot(_: *mut c_void, _: u64, message: *mut RawMessage) -> u32 {
        const WHY: &str = "this domain cannot be resized: its module was built before there was \
                           such a thing; upgrade to a newer one";
        // SAFETY: the caller's ([`Instance::resize`](crate::Instance::resize)) is valid, with room
        // for `capacity` bytes.
        unsafe {
            let len = WHY.len().min((*message).capacity);
            std::ptr::copy_nonoverlapping(WHY.as_ptr(), (*message).bytes, len);
            (*message).len = len;
        }
        abi::CALL_FAILED
    }
    unsafe extern "C" fn nothing(_: *mut c_void, out: *mut u32, _: *mut RawMessage) -> u32 {
        // What it claims it has claimed when it was created, for good.
        // SAFETY: the caller's ([`Instance::claim`](crate::Instance::claim)), with room for one.
        unsafe { out.write(abi::Claim::Nothing as u32) };
        abi::CALL_OK
    }
    unsafe extern "C" fn kept(_: *mut c_void, _: *mut RawMessage) -> u32 {
        abi::CALL_OK
    }
    let mut full = MaybeUninit::<ModuleVtable>::uninit();
    // SAFETY: what is copied is valid (caller's contract) and fits; it covers every field but those
    // that are written before it, for modules that end there.
    unsafe {
        (&raw mut (*full.as_mut_ptr()).resize).write(cannot);
        (&raw mut (*full.as_mut_ptr()).claim).write(nothing);
        (&raw mut (*full.as_mut_ptr()).release).write(kept);
        let len = size.min(size_of::<ModuleVtable>());
        std::ptr::copy_nonoverlapping(vtable.cast::<u8>(), full.as_mut_ptr().cast(), len);
        full.assume_init()
    }
}
