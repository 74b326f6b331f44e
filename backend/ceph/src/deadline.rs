//! What may take for ever, on a thread of its own.

use std::sync::mpsc;
use std::time::Duration;

/// Does `work` on another thread, and waits for it for `limit` at most. `None` if it has not ended
/// by then: it goes on, and what it comes to is dropped there.
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, is_done) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("ceph".to_owned());
    let spawned = thread.spawn(move || {
        // If nothing waits any more, it is dropped here.
        drop(done.send(work()));
    });
    // Without a thread there is nothing that could end.
    spawned.ok()?;
    is_done.recv_timeout(limit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_is_left_alone() {
        assert_eq!(within(Duration::from_secs(60), || 1), Some(1));
        let (end, is_over) = mpsc::channel::<()>();
        assert_eq!(within(Duration::from_millis(10), move || is_over.recv().is_ok()), None);
        drop(end);
    }
}
