//! Calls about a disk as a whole: how large it is, and whose.

use crate::{CallError, Instance};
use domain_abi::Claim;

impl Instance {
    /// See `BlockDomain::resize`.
    ///
    /// # Errors
    /// What the domain says, or that its module is too old to be resized.
    pub fn resize(&self, capacity: u64) -> Result<(), CallError> {
        // SAFETY: a live instance and a valid message.
        self.call(|instance, message| unsafe { (self.vtable.resize)(instance, capacity, message) })
    }

    /// See `BlockDomain::claim`.
    ///
    /// # Errors
    /// What the domain says, or that it has answered something that is nothing.
    pub fn claim(&self) -> Result<Claim, CallError> {
        let mut raw = 0;
        // SAFETY: a live instance, room for a number and a valid message.
        self.call(|instance, message| unsafe {
            (self.vtable.claim)(instance, &raw mut raw, message)
        })?;
        Claim::from_raw(raw).ok_or_else(|| {
            CallError::Failed(format!("it claims in a way that there is not: {raw}"))
        })
    }

    /// See `BlockDomain::release`.
    ///
    /// # Errors
    /// What the domain says; it stays claimed.
    pub fn release(&self) -> Result<(), CallError> {
        // SAFETY: a live instance and a valid message.
        self.call(|instance, message| unsafe { (self.vtable.release)(instance, message) })
    }
}
