//! Errors of requests, and whose they are: a canary's, or the device's own.
//!
//! Where an earlier generation has failed in the same direction (a bad sector that is read, a flush
//! of a disk that has lost writes), a canary that fails as well is not to blame. The last places
//! where that happened are remembered. An error at a place that was not touched before is taken for
//! the canary's: to be taken back for a bad sector costs nothing but another try.
//!
//! Only what ends with an error comes here.

use crate::signal::{Signal, lock};
use domain_abi::{RawRequest, op, status};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// How many places are remembered.
const KEPT: usize = 1024;

/// What has failed where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    op: u32,
    from: u64,
    to: u64,
}

impl Place {
    /// Whether a failure here explains one there.
    const fn explains(&self, other: &Self) -> bool {
        self.op == other.op
            && (self.op == op::FLUSH || self.from < other.to && other.from < self.to)
    }
}

/// What of them there were so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counted {
    /// Those of the canary.
    pub(crate) own: u64,
    /// Those at places where an earlier generation has failed, too.
    pub(crate) explained: u64,
}

#[derive(Debug, Default)]
struct Inner {
    known: VecDeque<Place>,
    /// The generation on trial; 0 is none.
    canary: u64,
    counted: Counted,
}

/// See the module's page.
pub(crate) struct ErrorLog {
    inner: Mutex<Inner>,
    signal: Arc<Signal>,
}

impl ErrorLog {
    pub(crate) fn new(signal: &Arc<Signal>) -> Self {
        Self { inner: Mutex::default(), signal: Arc::clone(signal) }
    }

    /// `generation` has ended a request with an error.
    #[cold]
    pub(crate) fn note(&self, generation: u64, request: &RawRequest, how: u32) {
        let kind = request.op();
        if how == status::UNSUPPORTED && matches!(kind, op::DISCARD | op::WRITE_ZEROES) {
            // Storage may not be able to, and says so; nothing is lost.
            return;
        }
        let place =
            Place { op: kind, from: request.offset(), to: request.offset() + request.len() };
        let mut inner = lock(&self.inner);
        if inner.canary != generation {
            if !inner.known.contains(&place) {
                inner.known.push_back(place);
                if inner.known.len() > KEPT {
                    inner.known.pop_front();
                }
            }
            return;
        }
        if inner.known.iter().any(|known| known.explains(&place)) {
            inner.counted.explained += 1;
            return;
        }
        inner.counted.own += 1;
        drop(inner);
        self.signal.announce();
    }

    /// The errors of `generation` are counted from now on.
    pub(crate) fn begin(&self, generation: u64) {
        let mut inner = lock(&self.inner);
        (inner.canary, inner.counted) = (generation, Counted::default());
    }

    pub(crate) fn counted(&self) -> Counted {
        lock(&self.inner).counted
    }

    pub(crate) fn end(&self) {
        lock(&self.inner).canary = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> ErrorLog {
        ErrorLog::new(&Arc::default())
    }

    #[test]
    fn a_place_explains_what_overlaps_it_in_its_direction() {
        let place = |op, from, to| Place { op, from, to };
        let known = place(op::READ, 4096, 8192);
        assert!(known.explains(&place(op::READ, 0, 4097)));
        assert!(known.explains(&place(op::READ, 8191, 9000)));
        assert!(!known.explains(&place(op::READ, 8192, 9000)));
        assert!(!known.explains(&place(op::WRITE, 4096, 8192)));
        assert!(place(op::FLUSH, 0, 0).explains(&place(op::FLUSH, 0, 0)));
    }

    #[test]
    fn errors_of_the_generation_on_trial_are_counted_and_others_explain_them() {
        let (log, flush) = (log(), RawRequest::flush());
        log.begin(2);
        log.note(2, &flush, status::IO_ERROR);
        assert_eq!(log.counted(), Counted { own: 1, explained: 0 });
        // What is left of the one before fails as well.
        log.note(1, &flush, status::IO_ERROR);
        log.note(2, &flush, status::IO_ERROR);
        assert_eq!(log.counted(), Counted { own: 1, explained: 1 });
        log.end();
        log.note(2, &flush, status::IO_ERROR);
        log.begin(3);
        assert_eq!(log.counted(), Counted::default());
        log.note(3, &flush, status::IO_ERROR);
        assert_eq!(log.counted(), Counted { own: 0, explained: 1 });
        (0..2 * KEPT).for_each(|_| log.note(1, &flush, status::IO_ERROR));
        assert_eq!(lock(&log.inner).known.len(), 1);
    }
}
