//! The ring as the port of an engine's queue.

use super::in_flight::Work;
use super::ring::{Ended, Ring};
use crate::aligned::Aligned;
use crate::engine::{JobKind, Port, PortEnd};
use domain_api::Request;

/// What a ring is to do for a request.
#[derive(Debug)]
pub struct RingJob {
    /// Of which kind.
    pub work: Work,
    /// Bytes of the request that are done already.
    done: u64,
    /// The memory that it is about, where that is not the request's own.
    pub aligned: Option<Box<Aligned>>,
}

impl RingJob {
    /// All of it.
    #[must_use]
    #[inline]
    pub const fn new(work: Work) -> Self {
        Self::rest(work, 0)
    }

    /// From byte `done` of the request on.
    #[must_use]
    #[inline]
    pub const fn rest(work: Work, done: u64) -> Self {
        Self { work, done, aligned: None }
    }

    /// About the window of `aligned`; see [`Ring::push_aligned`].
    #[must_use]
    pub const fn aligned(work: Work, aligned: Box<Aligned>) -> Self {
        Self { work, done: 0, aligned: Some(aligned) }
    }
}

impl Port for Ring {
    type Job = RingJob;

    #[inline]
    fn kind(job: &RingJob) -> JobKind {
        if job.work.is_change() {
            JobKind::Change
        } else if job.work.is_sync() {
            JobKind::Sync
        } else {
            JobKind::Other
        }
    }

    #[inline]
    fn capacity(&self) -> usize {
        self.depth()
    }

    #[inline]
    fn in_flight(&self) -> usize {
        Self::in_flight(self)
    }

    #[inline]
    fn has_room(&self) -> bool {
        Self::has_room(self)
    }

    #[inline]
    fn push(&mut self, request: Request, job: RingJob) {
        let RingJob { work, done, aligned } = job;
        match aligned {
            None => Self::push(self, request, work, done),
            Some(aligned) => self.push_aligned(request, work, aligned),
        }
    }

    #[inline]
    fn advance(&mut self) -> Option<PortEnd<RingJob>> {
        let Ended { request, work, aligned, result } = Self::advance(self)?;
        Some(PortEnd { request, job: RingJob { work, done: 0, aligned }, result })
    }

    fn cancel(&mut self) {
        Self::cancel(self);
    }

    fn close(&mut self) {
        self.release_files();
    }
}
