//! How a call of a module's into the host is answered.

use domain_abi::{self as abi, DomainError, RawMessage};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// # Safety
/// `message` is null or valid, with room for `capacity` bytes.
pub(crate) unsafe fn answer(
    message: *mut RawMessage,
    f: impl FnOnce() -> Result<(), DomainError>,
) -> u32 {
    // A panic of ours must not unwind into the module either.
    let result = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| {
        Err(DomainError::new("the host panicked in a service call; see its log"))
    });
    let Err(error) = result else { return abi::CALL_OK };
    // SAFETY: the caller's contract.
    if let Some(message) = unsafe { message.as_mut() } {
        let text = error.to_string();
        let len = text.len().min(message.capacity);
        // SAFETY: `len` bytes fit, and the module's buffer cannot overlap our string.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), message.bytes, len) };
        message.len = len;
    }
    abi::CALL_FAILED
}
