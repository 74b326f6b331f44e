//! What became of an instance that panicked, as far as its unanswered requests are concerned.
//!
//! ```text
//!             it panics            destroyed, its threads joined     somebody else serves
//!   Standing ----------> Dead --------------------------------> Fenced ----------------> Replay
//!                         |                                        |
//!                         | cannot be ended                        | nobody else can
//!                         v                                        v
//!                      (stays Dead: unanswered)                  Failed: I/O errors
//! ```
//!
//! A request that a dead instance had may still be written to by it: by a thread of its own, or by the kernel on its behalf. Until that is over the request is
//! neither run again nor answered.

use std::sync::atomic::{AtomicU8, Ordering};

/// What to do with the requests that an instance left unanswered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Verdict {
    /// Nothing yet: something of it may still be running.
    Wait = 0,
    /// Run them again.
    Replay = 1,
    /// Answer them with an I/O error.
    Fail = 2,
}

/// One instance's fence.
#[derive(Debug, Default)]
pub(crate) struct Fence(AtomicU8);

impl Fence {
    /// A fence that holds nobody up.
    pub(crate) const fn open() -> Self {
        Self(AtomicU8::new(Verdict::Replay as u8))
    }

    pub(crate) fn verdict(&self) -> Verdict {
        // Acquire pairs with `decide`: what the instance did last is visible to whoever runs its requests again.
        match self.0.load(Ordering::Acquire) {
            1 => Verdict::Replay,
            2 => Verdict::Fail,
            _ => Verdict::Wait,
        }
    }

    pub(crate) fn decide(&self, verdict: Verdict) {
        self.0.store(verdict as u8, Ordering::Release);
    }
}
