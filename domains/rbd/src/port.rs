//! The port of a queue: a lane of the image. Requests wait there for as long as the cluster takes.

use domain_api::{Image, ImageWork, Lane, QueueIndex, Request};
use domain_io::engine::{JobKind, Port, PortEnd};

/// Requests that a queue takes: as many as its ring can have.
const CAPACITY: usize = 1024;

/// What is to be done for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    pub(crate) kind: JobKind,
}

/// A queue's way to the image.
#[derive(Debug)]
pub struct RbdPort {
    lane: Lane,
    /// By the number of the request in the lane.
    jobs: Vec<JobKind>,
}

impl RbdPort {
    pub(crate) fn open(image: Image, queue: QueueIndex) -> Self {
        let lane = image.lane(queue, CAPACITY);
        Self { lane, jobs: vec![JobKind::Other; CAPACITY] }
    }
}

impl Port for RbdPort {
    type Job = Job;

    fn kind(job: &Job) -> JobKind {
        job.kind
    }

    fn capacity(&self) -> usize {
        self.lane.capacity()
    }

    fn in_flight(&self) -> usize {
        self.lane.in_flight()
    }

    #[inline]
    fn has_room(&self) -> bool {
        self.lane.in_flight() < self.lane.capacity()
    }

    #[inline]
    fn push(&mut self, request: Request, job: Job) {
        let work = if job.kind == JobKind::Sync { ImageWork::Flush } else { ImageWork::Request };
        let number = self.lane.begin(request, work);
        self.jobs[number] = job.kind;
    }

    #[inline]
    fn advance(&mut self) -> Option<PortEnd<Job>> {
        let (number, request, result) = self.lane.take_ended()?;
        Some(PortEnd { request, job: Job { kind: self.jobs[number] }, result })
    }

    fn cancel(&mut self) {
        // The cluster takes nothing back.
    }
}
