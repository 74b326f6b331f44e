//! What this crate takes from `std`, in one place, so that a model checker can take its place.

#[cfg(not(loom))]
pub(crate) use std::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicPtr, AtomicU64, Ordering, fence},
    },
    thread::yield_now,
};

#[cfg(loom)]
pub(crate) use loom::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicPtr, AtomicU64, Ordering, fence},
    },
    thread::yield_now,
};

use crate::mutation::{Mutation, planted};

/// How often a waiter looks again before it asks the kernel to put it to sleep: some 10 µs, the
/// length of a handover between busy workers that all have a CPU. A model explores each look
/// separately; the last one is enough.
#[inline]
pub(crate) const fn spins() -> u32 {
    if cfg!(loom) { 0 } else { 400 }
}

/// Locks; a panic of another holder does not make our own state invalid, because every critical
/// section here is a few stores.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A full barrier, which the models can take out to see that it is needed.
#[inline]
pub(crate) fn full_fence(mutation: Mutation) {
    if !planted(mutation) {
        fence(Ordering::SeqCst);
    }
}

/// An ordering, which the models can weaken to see that it is needed.
#[inline]
pub(crate) fn order(ordering: Ordering, mutation: Mutation) -> Ordering {
    if planted(mutation) { Ordering::Relaxed } else { ordering }
}

/// Which thread this is: a number that no other thread of this process has, had or will have; never
/// 0.
pub(crate) fn this_thread() -> u64 {
    // Not of the model: it only has to be unique. No destructor, so that it can be asked while a
    // thread ends.
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    #[cfg(not(loom))]
    std::thread_local!(static ID: u64 = NEXT.fetch_add(1, Ordering::Relaxed));
    // The model's threads all run on one of the system's.
    #[cfg(loom)]
    loom::thread_local!(static ID: u64 = NEXT.fetch_add(1, Ordering::Relaxed));
    ID.with(|id| *id)
}
