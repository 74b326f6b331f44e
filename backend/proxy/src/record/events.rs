//! Events, numbered, for clients that watch.

use crate::record::report::Event;
use crate::signal::lock;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How many events are kept for a watcher that is slow.
const KEPT: usize = 1024;

#[derive(Default)]
struct Inner {
    last: u64,
    kept: VecDeque<Event>,
}

/// The newest events. The number of the newest is `last`, the others count down from there.
#[derive(Default)]
pub(crate) struct Events {
    inner: Mutex<Inner>,
    pushed: Condvar,
    hook: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Events {
    pub(crate) fn push(&self, event: Event) {
        let mut inner = lock(&self.inner);
        inner.last += 1;
        if inner.kept.len() == KEPT {
            inner.kept.pop_front();
        }
        inner.kept.push_back(event);
        drop(inner);
        self.pushed.notify_all();
        if let Some(hook) = self.hook.get() {
            hook();
        }
    }

    /// Has `hook` called after each event. A second one is not.
    pub(crate) fn on_push(&self, hook: Box<dyn Fn() + Send + Sync>) {
        let _ = self.hook.set(hook);
    }

    pub(crate) fn last(&self) -> u64 {
        lock(&self.inner).last
    }

    /// The oldest kept event with a number above `after`.
    pub(crate) fn next(&self, after: u64, timeout: Duration) -> Option<(u64, Event)> {
        let deadline = Instant::now() + timeout;
        let mut inner = lock(&self.inner);
        loop {
            if inner.last > after {
                let first = inner.last - inner.kept.len() as u64 + 1;
                let number = first.max(after + 1);
                return inner
                    .kept
                    .get((number - first) as usize)
                    .map(|event| (number, event.clone()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            inner = self.pushed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_watcher_skips_to_what_is_kept() {
        let events = Events::default();
        assert!(events.next(0, Duration::ZERO).is_none());
        for _ in 0..KEPT + 10 {
            events.push(Event::Connected(true));
        }
        assert_eq!(events.next(0, Duration::ZERO).unwrap().0, 11);
        assert_eq!(events.next(11, Duration::ZERO).unwrap().0, 12);
        assert!(events.next(events.last(), Duration::from_millis(1)).is_none());
    }
}
