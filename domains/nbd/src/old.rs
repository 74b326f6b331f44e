//! Old changes: sent on connections that broke, not answered, and maybe carried out at any later
//! moment.
//!
//! Each is sent again at once: what it writes is the same. But a *newer* change of the same bytes
//! has to wait, or the old one could land on top of it. It waits until the process that has read
//! the old one is gone, or as long as the operator says (`settle`): no server says when it is
//! really done with a connection.

use crate::job::Job;
use crate::marks::{Mark, Marks};
use crate::server::Process;
use domain_api::Request;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Debug)]
struct Change {
    range: Range<u64>,
    /// By the host's clock.
    until: Duration,
    /// What has read it, if that is known.
    server: Option<Process>,
}

#[derive(Debug, Default)]
struct Lists {
    changes: Vec<Change>,
    /// What a predecessor that died had in flight: each comes once more, as it was.
    replays: Vec<Mark>,
}

/// Old changes.
#[derive(Debug, Default)]
pub(crate) struct Old {
    lists: Mutex<Lists>,
    /// How many there are. Zero says that no change has to wait; a change is added before the
    /// request that it belongs to is sent again, by a lock that both take, so Relaxed does.
    count: AtomicUsize,
}

impl Old {
    fn lock(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, lists: &Lists, marks: Option<&Marks>) {
        self.count.store(lists.changes.len(), Ordering::Relaxed);
        if let Some(marks) = marks {
            let ranges: Vec<_> = lists.changes.iter().map(|old| old.range.clone()).collect();
            marks.set_old(&ranges);
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Adds what a connection that broke had not answered.
    pub(crate) fn add(
        &self,
        ranges: Vec<Range<u64>>,
        until: Duration,
        server: Option<Process>,
        marks: Option<&Marks>,
    ) {
        if ranges.is_empty() {
            return;
        }
        let mut lists = self.lock();
        for range in ranges {
            lists.changes.push(Change { range, until, server });
        }
        self.changed(&lists, marks);
    }

    /// Begins with what a predecessor has left: what it had in flight if it died, and what was old
    /// then.
    pub(crate) fn begin(
        &self,
        in_flight: Vec<Mark>,
        old: &[Mark],
        until: Duration,
        server: Option<Process>,
        marks: &Marks,
    ) {
        let mut lists = self.lock();
        lists.changes = in_flight
            .iter()
            .chain(old)
            .map(|mark| Change { range: mark.range(), until, server })
            .collect();
        lists.replays = in_flight;
        self.changed(&lists, Some(marks));
        // Only now: what is in neither place is forgotten.
        marks.clear_links();
    }

    /// Whether a change has to wait for an old one.
    #[inline]
    pub(crate) fn holds_up(&self, request: &Request, job: &mut Job) -> bool {
        self.len() > 0 && job.work.is_change() && self.overlaps(request, job)
    }

    #[cold]
    fn overlaps(&self, request: &Request, job: &mut Job) -> bool {
        if job.is_repeated {
            return false;
        }
        let range = request.offset()..request.offset() + request.len();
        let mut lists = self.lock();
        let overlap = lists
            .changes
            .iter()
            .any(|old| old.range.start < range.end && range.start < old.range.end);
        if !overlap {
            return false;
        }
        let mark = Mark::new(range.start, request.len());
        if let Some(at) = lists.replays.iter().position(|replay| *replay == mark) {
            lists.replays.swap_remove(at);
            job.is_repeated = true;
        }
        !job.is_repeated
    }

    /// Forgets what cannot land any more. Whether there was any.
    pub(crate) fn settle(&self, now: Duration, marks: Option<&Marks>) -> bool {
        if self.len() == 0 {
            return false;
        }
        let mut lists = self.lock();
        let mut gone: Vec<Process> = Vec::new();
        let mut lives: Vec<Process> = Vec::new();
        let before = lists.changes.len();
        lists.changes.retain(|old| {
            let is_gone = old.server.is_some_and(|server| {
                if !gone.contains(&server) && !lives.contains(&server) {
                    if server.is_gone() { &mut gone } else { &mut lives }.push(server);
                }
                gone.contains(&server)
            });
            now < old.until && !is_gone
        });
        let settled = lists.changes.len() < before;
        if settled {
            if lists.changes.is_empty() {
                lists.replays.clear();
            }
            self.changed(&lists, marks);
        }
        settled
    }
}
