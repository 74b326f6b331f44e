//! A look at the first ring: is its guest's memory shared at all?
//!
//! If what is mapped here is not the guest's memory (QEMU without `share=on` shows a file that it
//! does not use itself) nothing ever comes, and the guest waits for ever. So some seconds after the
//! first ring was started, with nothing in it, the log says so.

use crate::log_limit;
use crate::sync::lock;
use log::Level;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmm_sys_util::timerfd::TimerFd;

/// How long a guest may take from the start of its first ring to its first request, before its
/// memory is suspected.
const TO_BEGIN: Duration = Duration::from_secs(5);

/// What to do about memory that is not shared.
pub(super) const SHARE: &str =
    "start QEMU with share=on for its memory backend, and with memory-backend= for the machine";

/// The look of one session.
pub(super) struct Lookout {
    timer: Mutex<TimerFd>,
    /// It was set.
    is_set: AtomicBool,
    /// Something was taken from some ring.
    has_taken: AtomicBool,
}

impl Lookout {
    pub(super) fn new() -> io::Result<Self> {
        let timer = Mutex::new(TimerFd::new()?);
        Ok(Self { timer, is_set: AtomicBool::new(false), has_taken: AtomicBool::new(false) })
    }

    /// Readable when the look is due.
    pub(super) fn fd(&self) -> RawFd {
        lock(&self.timer).as_raw_fd()
    }

    /// The worker of `queue` has taken something from its ring, or has not; `is_blank` says whether
    /// the ring is on, and has never been written to.
    pub(super) fn note(&self, queue: usize, has_taken: bool, is_blank: impl FnOnce() -> bool) {
        if has_taken {
            self.has_taken.store(true, Ordering::Relaxed);
        } else if queue == 0 && is_blank() && !self.is_set.swap(true, Ordering::Relaxed) {
            // It fails for no time that is neither zero nor negative.
            let _ = lock(&self.timer).reset(TO_BEGIN, None);
        }
    }

    /// The look is due; the first ring `is_blank` or not.
    pub(super) fn look(&self, is_blank: bool) {
        // It is due, so this does not wait.
        let _ = lock(&self.timer).wait();
        if is_blank && !self.has_taken.load(Ordering::Relaxed) {
            log_limit::say(
                Level::Warn,
                "nothing comes",
                format_args!(
                    "there has been nothing in the guest's first ring since it was started {} s ago. If the guest waits for its disk, its memory is not shared: {SHARE}",
                    TO_BEGIN.as_secs()
                ),
            );
        }
    }
}
