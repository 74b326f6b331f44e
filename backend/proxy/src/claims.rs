//! What is known of a device's claim ([`claim`](crate::claim) has what is done with it).

use serde::Serialize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Whose the data is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ClaimState {
    /// No ring runs.
    Free,
    /// Rings run, or what they have written is about to be durable.
    Claimed,
    /// Rings wait for another program.
    Waiting,
}

/// What is held while it is claimed, or given back.
#[derive(Default)]
pub(crate) struct Held {
    /// The domain has said so.
    pub(crate) is_ours: bool,
    /// It goes to another process.
    pub(crate) is_leaving: bool,
}

/// The claim of one device.
#[derive(Default)]
pub(crate) struct Claims {
    pub(crate) held: Mutex<Held>,
    /// How many sessions want it. Changed without the lock, and looked at with it.
    pub(crate) wanted: AtomicUsize,
    pub(crate) is_waiting: AtomicBool,
    /// A thread tries again to give the data back.
    pub(crate) is_tried_again: AtomicBool,
    /// Something may write until the process ends.
    pub(crate) is_kept: AtomicBool,
}

impl Claims {
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) > 0
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, Held>> {
        match self.held.try_lock() {
            Ok(held) => Some(held),
            Err(TryLockError::Poisoned(poisoned)) => Some(PoisonError::into_inner(poisoned)),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}
