//! The events that end the worker threads of a session, and the descriptors behind them.
//!
//! `vhost-user-backend` takes each event's reading end and forgets it when the session is over: one descriptor lost per queue and session. So we keep the
//! numbers and close them, once the threads that used them are gone.

use crate::session::lock;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// The events of one session.
pub(crate) struct ExitEvents {
    events: Mutex<Vec<Option<(EventConsumer, EventNotifier)>>>,
    given_away: Mutex<Vec<RawFd>>,
}

impl ExitEvents {
    /// One event for each of `threads` threads.
    ///
    /// # Errors
    /// There are no descriptors left. Later would be too late: a thread without an event cannot be ended.
    pub(crate) fn new(threads: usize) -> io::Result<Self> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let events = (0..threads).map(|_| new_event_consumer_and_notifier(flags).map(Some));
        Ok(Self { events: Mutex::new(events.collect::<io::Result<_>>()?), given_away: Mutex::default() })
    }

    /// Gives the event of a thread away, once.
    pub(crate) fn take(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let pair = lock(&self.events).get_mut(thread)?.take()?;
        lock(&self.given_away).push(pair.0.as_raw_fd());
        Some(pair)
    }

    /// Closes them. To be called when the session's threads have been joined and its daemon is dropped.
    pub(crate) fn close(&self) {
        for fd in lock(&self.given_away).drain(..) {
            // SAFETY: `VringEpollHandler::new` took the consumer with `into_raw_fd` and never closes it; nobody else knows the number, and it is
            // closed once, because it leaves the list.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
