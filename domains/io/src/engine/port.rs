//! The port of a queue: where its requests are while they wait for something.

use domain_api::Request;
use std::io;

/// What the engine has to know of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    /// Makes durable what had ended before it began.
    Sync,
    /// Changes the guest's data where it is. On storage that asks for more than a sector it needs
    /// its range to itself ([`ranges`](super::ranges)).
    Change,
    /// Anything else, above all reads.
    Other,
}

/// A job that has ended.
#[derive(Debug)]
#[must_use = "the request in it must be completed"]
pub struct PortEnd<J> {
    /// The request, ours again.
    pub request: Request,
    /// What was done for it.
    pub job: J,
    /// How that went.
    pub result: io::Result<()>,
}

/// Where the requests of one queue are while they wait for something.
///
/// **What a port promises.**
///
/// - It is used by one thread, the queue's own, from the moment it is opened.
/// - It owns a request from `push` until `advance` hands it back, exactly once, with the job and
///   its result. It never waits, and never completes a request itself.
/// - A job that takes several tries (a short read, an interrupted call) is the port's to finish;
///   one that ends well has been done in full.
/// - Jobs are carried out in any order, at the same time. The engine relies on none.
/// - While `advance` returns `None` and jobs are in flight, the end of any of them wakes the
///   worker, as [`Host::notify`](domain_api::Host::notify) does. None is lost between the two.
/// - A port that is dropped with jobs in flight returns when none of them touches guest memory any
///   more, on whichever thread: so memory is safe where an instance dies.
///
/// **What is not called.** `push` without `has_room` before it, but for a request that the engine
/// kept room for ([`capacity`](Port::capacity)); anything after `close`, but `drop`; `close` while
/// anything is in flight. There is no call that waits for the end of one job, and none that takes a
/// single job back.
pub trait Port: Send {
    /// What is to be done for a request.
    type Job;

    /// What sort of job it is: the same for as long as it exists.
    fn kind(job: &Self::Job) -> JobKind;

    /// How many jobs it has room for, all in all.
    fn capacity(&self) -> usize;

    /// How many it has.
    fn in_flight(&self) -> usize;

    /// Whether another one can be pushed.
    fn has_room(&self) -> bool;

    /// Takes a request, to have `job` done for it.
    fn push(&mut self, request: Request, job: Self::Job);

    /// Hands back a request whose job has ended, if there is one.
    fn advance(&mut self) -> Option<PortEnd<Self::Job>>;

    /// Gives up what is in flight, as far as that can be: its jobs end soon, those that were given
    /// up with `ECANCELED`.
    fn cancel(&mut self);

    /// The queue is done: lets go of what others may wait for. Nothing is in flight.
    fn close(&mut self) {}
}
