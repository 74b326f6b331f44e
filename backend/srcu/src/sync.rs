//! What this crate takes from `std`, in one place, so that a model checker can take its place.

#[cfg(not(loom))]
pub(crate) use std::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence},
    },
    thread::yield_now,
};

#[cfg(loom)]
pub(crate) use loom::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence},
    },
    thread::yield_now,
};

/// How often a waiter looks again before it asks the kernel to put it to sleep: some 10 µs, the length of a handover between busy
/// workers that all have a CPU.
#[cfg(not(loom))]
pub(crate) const SPINS: u32 = 400;
/// A model explores each look separately; one is enough.
#[cfg(loom)]
pub(crate) const SPINS: u32 = 0;

/// Locks; a panic of another holder does not make our own state invalid, because every critical section here is a few stores.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
