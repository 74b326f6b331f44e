//! What became of an instance that panicked, as far as its unanswered requests are concerned.
//!
//! ```text
//!             it panics            destroyed, its threads joined     another one serves
//!   Standing ----------> Dead --------------------------------> Fenced ----------------> Replay
//!                         |                                        |
//!                         | cannot be ended                        | no other can
//!                         v                                        v
//!                      Unfenced: unanswered                       Failed: I/O errors
//! ```
//!
//! A request that a dead instance had may still be written to by it: by a thread of its own, or by
//! the kernel on its behalf. Until that is over the request is neither run again nor answered. An
//! end that breaks off with a panic is none: it may have been waiting for just that.

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
    /// Leave them unanswered for good: it cannot be ended, and may write to them at any time.
    Unfenced = 3,
}

/// One instance's fence.
#[derive(Debug, Default)]
pub(crate) struct Fence {
    verdict: AtomicU8,
}

impl Fence {
    /// A fence that holds nothing up.
    pub(crate) const fn open() -> Self {
        Self { verdict: AtomicU8::new(Verdict::Replay as u8) }
    }

    pub(crate) fn verdict(&self) -> Verdict {
        // Acquire pairs with `decide`: what the instance did last is visible to the worker that
        // runs its requests again.
        match self.verdict.load(Ordering::Acquire) {
            1 => Verdict::Replay,
            2 => Verdict::Fail,
            3 => Verdict::Unfenced,
            _ => Verdict::Wait,
        }
    }

    pub(crate) fn decide(&self, verdict: Verdict) {
        self.verdict.store(verdict as u8, Ordering::Release);
    }
}
