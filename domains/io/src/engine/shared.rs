//! What all queues of one instance have in common, whatever the backend is.

use super::error_log::ErrorLog;
use super::offload::Offload;
use super::ranges::Ranges;
use domain_api::{Host, Op, Request, Status};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

/// The engine's state of one instance. A backend owns it, because it uses it, too.
#[derive(Debug)]
pub struct Shared {
    ranges: Ranges,
    offload: Offload,
    error_log: ErrorLog,
    /// How often the host has asked to cancel. A hint: nothing is published by it, so Relaxed does.
    cancels: AtomicU32,
}

impl Shared {
    /// Of a new instance.
    #[must_use]
    pub fn new(host: Host) -> Self {
        Self {
            ranges: Ranges::new(host),
            offload: Offload::new(host),
            error_log: ErrorLog::new(host),
            cancels: AtomicU32::new(0),
        }
    }

    /// Which request may change which range.
    #[inline]
    pub const fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    pub(super) const fn offload(&self) -> &Offload {
        &self.offload
    }

    /// What the operator hears.
    pub const fn error_log(&self) -> &ErrorLog {
        &self.error_log
    }

    /// Asks all queues to give up what is in flight; each does so when it reaps.
    pub(super) fn cancel(&self) {
        self.cancels.fetch_add(1, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn cancels(&self) -> u32 {
        self.cancels.load(Ordering::Relaxed)
    }

    /// How the guest hears of `result`; the operator hears of an error.
    #[inline]
    pub fn status(&self, request: &Request, result: io::Result<()>) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => self.failed(request, &error),
        }
    }

    /// Says that a request has failed.
    #[cold]
    pub fn failed(&self, request: &Request, error: &io::Error) -> Status {
        let what = match request.op() {
            Some(Op::Read) => "read",
            Some(Op::Write) => "write",
            Some(Op::Flush) => "flush",
            Some(Op::Discard) => "discard",
            Some(Op::WriteZeroes { .. }) | None => "write zeroes",
        };
        self.error_log.report(what, error);
        Status::IoError
    }
}
