//! What may take for ever, on a thread of its own.
//!
//! Invariant: neither `work` nor what it comes to is dropped on the caller's thread, unless the
//! caller has it: an image that is dropped is closed, which may take for ever as well.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::Builder;
use std::time::Duration;

/// Does `work` on another thread, and waits for it for `limit` at most. `None` if it has not ended
/// by then: it goes on, and what it comes to is dropped there.
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    within_on(Builder::new().name("ceph".to_owned()), limit, work, || {})
}

/// The same, on a thread that is given. Calls `is_late` once nothing is waited for any more.
fn within_on<T: Send + 'static>(
    thread: Builder,
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
    is_late: impl FnOnce(),
) -> Option<T> {
    // Without room: what is sent is taken by the caller, or comes back to the sender.
    let (done, is_done) = mpsc::sync_channel(0);
    let work = Arc::new(Mutex::new(Some(work)));
    let theirs = Arc::clone(&work);
    let spawned = thread.spawn(move || {
        let work = theirs.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(work) = work {
            // If nothing waits any more, it is dropped here.
            drop(done.send(work()));
        }
    });
    if let Err(error) = spawned {
        log::error!(
            "no thread for what may take long ({error}): an image that was to be closed stays open until this process ends"
        );
        std::mem::forget(work);
        return None;
    }
    is_done.recv_timeout(limit).inspect_err(|_| is_late()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::ThreadId;

    /// Says on which thread it is dropped.
    struct Dropped(mpsc::Sender<ThreadId>);

    impl Drop for Dropped {
        fn drop(&mut self) {
            let _ = self.0.send(std::thread::current().id());
        }
    }

    #[test]
    fn what_takes_too_long_is_left_alone() {
        assert_eq!(within(Duration::from_secs(60), || 1), Some(1));
        let (end, is_over) = mpsc::channel::<()>();
        assert_eq!(within(Duration::from_millis(10), move || is_over.recv().is_ok()), None);
        drop(end);
    }

    #[test]
    fn what_comes_as_the_time_is_over_is_not_dropped_by_the_caller() {
        let (said, dropped) = mpsc::channel();
        let (end, is_over) = mpsc::channel::<()>();
        let work = move || {
            assert!(is_over.recv().is_err());
            Dropped(said)
        };
        let is_late = || {
            drop(end);
            // It comes now, before the caller has left.
            std::thread::sleep(Duration::from_millis(200));
        };
        assert!(within_on(Builder::new(), Duration::ZERO, work, is_late).is_none());
        assert_ne!(dropped.recv(), Ok(std::thread::current().id()));
    }

    #[test]
    fn what_there_is_no_thread_for_is_not_dropped() {
        let (said, dropped) = mpsc::channel();
        let value = Dropped(said);
        // More than any address space has room for.
        let thread = Builder::new().stack_size(1 << 46);
        assert!(within_on(thread, Duration::ZERO, move || drop(value), || {}).is_none());
        assert_eq!(dropped.try_recv(), Err(mpsc::TryRecvError::Empty));
    }
}
