//! Locks of this crate: none is given up because a thread has panicked under it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, whatever has become of the thread that held it last.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
