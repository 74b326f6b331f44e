//! How threads of the device wait for each other: something has changed, look again.
//!
//! State stands where it belongs, under locks of its own. Whatever changes some that another thread
//! may wait for announces it here afterwards.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a waiting thread looks without having been told: a domain that has died in a call says
/// so to its caller only.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Locks a mutex that protects nothing which a panic could leave half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells waiting threads to look again.
#[derive(Default)]
pub(crate) struct Signal {
    /// How often something has changed.
    changes: Mutex<u64>,
    changed: Condvar,
}

impl Signal {
    /// Something has changed: called after it has.
    pub(crate) fn announce(&self) {
        *lock(&self.changes) += 1;
        self.changed.notify_all();
    }

    /// Looks until there is something, again after each change; `None` after `deadline`.
    pub(crate) fn wait<T>(
        &self,
        deadline: Instant,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        loop {
            let seen = *lock(&self.changes);
            if let Some(found) = look() {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            // What has changed since the look began is not waited for.
            let changes = lock(&self.changes);
            let waited =
                self.changed.wait_timeout_while(changes, left.min(LOOK_EVERY), |now| *now == seen);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn a_change_is_seen_at_once_and_one_that_is_not_announced_soon() {
        let (signal, value) = (Signal::default(), AtomicU32::new(0));
        let is = |wanted| {
            move |value: &AtomicU32| (value.load(Ordering::Acquire) == wanted).then_some(())
        };
        let soon = || Instant::now() + Duration::from_secs(10);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for next in 1..=1000 {
                    signal
                        .wait(soon(), || is(2 * next - 1)(&value))
                        .expect("the other one goes on");
                    value.store(2 * next, Ordering::Release);
                    signal.announce();
                }
            });
            let began = Instant::now();
            for next in 1..=1000 {
                value.store(2 * next - 1, Ordering::Release);
                signal.announce();
                signal.wait(soon(), || is(2 * next)(&value)).expect("the other one goes on");
            }
            // With each change missed it would be more than 100 s.
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        });
        std::thread::scope(|scope| {
            scope.spawn(|| value.store(7, Ordering::Release));
            assert_eq!(signal.wait(soon(), || is(7)(&value)), Some(()));
        });
        assert_eq!(signal.wait(Instant::now(), || is(8)(&value)), None);
    }
}
