//! The read path: what a queue's worker does with the live domain.
//!
//! A worker is an SRCU reader. Between batches it passes the gate ([`Worker::gate`]); if the live instance has changed it attaches to the new one, on its own
//! thread, and lets go of the old one as soon as nothing is in flight there. The usual case costs one load and a compare.
//!
//! Invariants: only this worker completes what it submitted; each completion is checked against the table of what is in flight, so a stale or invented
//! one is dropped; a lane (a queue of an instance) is dropped only when nothing is in flight on it.

use crate::DomainProxy;
use crate::queue::{QueueLine, add, coarse_now_ns};
use domain_api::abi::{self, RawRequest};
use domain_api::host::{CallError, CompletionBuffer, Instance, QueueHandle};
use domain_api::{QueueIndex, Status};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Whether requests may be submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// They may.
    Open,
    /// They may not: reap what is in flight, and when nothing is, [`Worker::wait_at_gate`].
    Shut,
}

/// A request that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The tag that it was submitted with.
    pub slot: usize,
    /// How.
    pub status: Status,
    /// Bytes that were written into its buffer.
    pub written: u32,
}

/// One queue of one instance, as long as something is in flight there or it is the live one.
struct Lane {
    handle: QueueHandle,
    generation: u64,
    in_flight: usize,
}

/// The worker's side of the proxy, for one queue. Stays on one thread.
pub struct Worker {
    proxy: Arc<DomainProxy>,
    queue: usize,
    reader: srcu::Reader<Arc<Instance>>,
    current: Option<Lane>,
    /// Earlier instances that still owe completions.
    earlier: Vec<Lane>,
    /// Per slot the generation that it is in flight with, 0 if it is not.
    flights: Box<[u64]>,
    completions: CompletionBuffer,
}

impl Worker {
    pub(crate) fn new(proxy: Arc<DomainProxy>, queue: usize, slots: usize) -> Option<Self> {
        let reader = proxy.cell().attach()?;
        let mut worker = Self {
            proxy,
            queue,
            reader,
            current: None,
            earlier: Vec::new(),
            flights: vec![0; slots].into_boxed_slice(),
            completions: CompletionBuffer::new(slots),
        };
        worker.adopt();
        Some(worker)
    }

    fn line(&self) -> &QueueLine {
        self.proxy.queues().line(self.queue)
    }

    /// How many requests are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.current.iter().chain(&self.earlier).map(|lane| lane.in_flight).sum()
    }

    /// Passes the gate, between two batches.
    #[inline]
    pub fn gate(&mut self) -> Gate {
        match self.reader.pass() {
            srcu::Gate::Open => Gate::Open,
            srcu::Gate::Changed => {
                self.adopt();
                Gate::Open
            }
            srcu::Gate::Shut => Gate::Shut,
        }
    }

    /// Waits until the gate opens, with nothing in flight. May run the exchange of the upgrade.
    pub fn wait_at_gate(&mut self) {
        debug_assert_eq!(self.in_flight(), 0, "whoever owes completions must reap them, not wait");
        add(&self.line().parks, 1);
        self.reader.arrive();
    }

    /// Says that this worker is about to sleep; the next [`gate`](Self::gate) wakes it. Returns `false` if it must look again first.
    pub fn sleep(&mut self) -> bool {
        let owing = self.in_flight() > 0;
        // The event loop cannot hold the guard; a reader whose guard is leaked is woken by its next `pass`.
        self.reader.sleep(owing).map(std::mem::forget).is_some()
    }

    /// Attaches to the live instance.
    #[cold]
    fn adopt(&mut self) {
        let live = Arc::clone(self.reader.read());
        if self.current.as_ref().is_some_and(|lane| Arc::ptr_eq(lane.handle.instance(), &live)) {
            return;
        }
        if let Some(lane) = self.current.take() {
            self.earlier.push(lane);
        }
        self.drop_idle_lanes();
        let generation = live.generation();
        match live.attach(QueueIndex(self.queue as u32)) {
            Ok(handle) => self.current = Some(Lane { handle, generation, in_flight: 0 }),
            Err(error) => self.proxy.fault(&live, &format!("attaching queue {}: {error}", self.queue)),
        }
    }

    fn drop_idle_lanes(&mut self) {
        self.earlier.retain(|lane| lane.in_flight > 0);
    }

    /// Submits requests, whose tags are their slots, to the live domain; calls `ended` for each request that ended at once. Returns how many from the
    /// front were taken: the rest is the caller's again.
    pub fn submit(&mut self, requests: &mut [RawRequest], mut ended: impl FnMut(Ended)) -> usize {
        let Some(lane) = self.current.as_mut().filter(|lane| !lane.handle.instance().is_dead()) else {
            // Nobody is there to do it. Answered, so that the guest does not hang; `status` says why.
            let line = self.proxy.queues().line(self.queue);
            for request in requests.iter() {
                ended(Ended { slot: request.tag as usize, status: Status::IoError, written: 0 });
            }
            add(&line.requests, requests.len() as u64);
            add(&line.errors, requests.len() as u64);
            return requests.len();
        };
        let line = self.proxy.queues().line(self.queue);
        for request in requests.iter_mut() {
            let slot = request.tag as usize;
            debug_assert_eq!(self.flights[slot], 0, "a slot is submitted once at a time");
            self.flights[slot] = lane.generation;
            request.tag = tag(self.queue, slot);
            request.generation = lane.generation;
        }
        if lane.in_flight == 0 {
            line.busy_since.store(coarse_now_ns(), Ordering::Relaxed);
        }
        // Before the call, so that a domain that does not come back is seen with what it has.
        line.in_flight.store((lane.in_flight + requests.len()) as u64, Ordering::Relaxed);
        let result = lane.handle.submit(requests, &mut self.completions);
        lane.in_flight += requests.len();
        let accepted = match &result {
            Ok(accepted) => *accepted,
            Err(_) => requests.len(),
        };
        for request in &mut requests[accepted..] {
            let slot = untag(request.tag);
            self.flights[slot] = 0;
            request.tag = slot as u64;
            lane.in_flight -= 1;
        }
        finish(&self.completions, &mut self.flights, self.queue, lane, line, &mut ended);
        if let Err(error) = result {
            self.lose(error, &mut ended);
        }
        self.publish_in_flight();
        accepted
    }

    /// Collects what has ended since; calls `ended` for each.
    pub fn reap(&mut self, mut ended: impl FnMut(Ended)) {
        let line = self.proxy.queues().line(self.queue);
        let mut failed = None;
        for lane in self.current.iter_mut().chain(&mut self.earlier).filter(|lane| lane.in_flight > 0) {
            let result = lane.handle.reap(&mut self.completions);
            finish(&self.completions, &mut self.flights, self.queue, lane, line, &mut ended);
            if let Err(error) = result {
                failed = Some(error);
            }
        }
        if let Some(error) = failed {
            self.lose(error, &mut ended);
        }
        self.drop_idle_lanes();
        self.publish_in_flight();
    }

    fn publish_in_flight(&self) {
        self.line().in_flight.store(self.in_flight() as u64, Ordering::Relaxed);
    }

    /// An instance has panicked: what it had not completed ends with an I/O error.
    #[cold]
    fn lose(&mut self, error: CallError, ended: &mut impl FnMut(Ended)) {
        let line = self.proxy.queues().line(self.queue);
        for lane in self.current.iter_mut().chain(&mut self.earlier) {
            if matches!(error, CallError::Panicked(_)) && !lane.handle.instance().is_dead() {
                continue;
            }
            self.proxy.fault(lane.handle.instance(), &error.to_string());
            for (slot, flight) in self.flights.iter_mut().enumerate().filter(|(_, f)| **f == lane.generation)
            {
                *flight = 0;
                lane.in_flight -= 1;
                ended(Ended { slot, status: Status::IoError, written: 0 });
                add(&line.requests, 1);
                add(&line.errors, 1);
            }
        }
        self.drop_idle_lanes();
    }

    /// Asks the domain to end what is in flight.
    pub fn cancel(&self) {
        for lane in self.current.iter().chain(&self.earlier).filter(|lane| lane.in_flight > 0) {
            if let Err(error) = lane.handle.instance().cancel() {
                log::warn!("queue {}: cancelling: {error}", self.queue);
            }
        }
    }

    /// Counts requests that were answered without the domain.
    pub fn count_answered(&self, requests: u64, errors: u64) {
        add(&self.line().requests, requests);
        add(&self.line().errors, errors);
    }

    /// Counts chains that were no requests.
    pub fn count_malformed(&self, chains: u64) {
        add(&self.line().malformed, chains);
    }
}

/// Takes a lane's completions over: checks each, frees its slot, reports it.
#[inline]
fn finish(
    completions: &CompletionBuffer,
    flights: &mut [u64],
    queue: usize,
    lane: &mut Lane,
    line: &QueueLine,
    ended: &mut impl FnMut(Ended),
) {
    let mut count = 0;
    let mut errors = 0;
    for completion in completions.completed() {
        let slot = untag(completion.tag);
        let known = completion.tag == tag(queue, slot)
            && completion.generation == lane.generation
            && flights.get(slot) == Some(&lane.generation);
        if !known {
            log::error!(
                "queue {queue}: generation {} completed request {:#x} of generation {}, which is not in flight; dropped",
                lane.generation,
                completion.tag,
                completion.generation
            );
            continue;
        }
        flights[slot] = 0;
        lane.in_flight -= 1;
        count += 1;
        let status = match completion.status {
            abi::status::OK => Status::Ok,
            abi::status::UNSUPPORTED => Status::Unsupported,
            _ => Status::IoError,
        };
        errors += u64::from(status != Status::Ok);
        ended(Ended { slot, status, written: completion.written });
    }
    add(&line.requests, count);
    if errors > 0 {
        add(&line.errors, errors);
    }
}

/// What a request is called at the ABI: its queue too, so that a domain that mixes queues up is caught.
const fn tag(queue: usize, slot: usize) -> u64 {
    (queue as u64) << 32 | slot as u64
}

const fn untag(tag: u64) -> usize {
    (tag & 0xffff_ffff) as usize
}

impl Drop for Worker {
    fn drop(&mut self) {
        for lane in self.current.take().into_iter().chain(self.earlier.drain(..)) {
            if lane.in_flight > 0 && !lane.handle.instance().is_dead() {
                log::error!(
                    "queue {}: {} requests of generation {} never ended; the instance stays resident",
                    self.queue,
                    lane.in_flight,
                    lane.generation
                );
                // It may still write to their buffers' bookkeeping: it must not be destroyed under them.
                std::mem::forget(lane.handle);
            }
        }
        self.proxy.queues().set_notifier(self.queue, None);
        self.line().in_flight.store(0, Ordering::Relaxed);
    }
}
