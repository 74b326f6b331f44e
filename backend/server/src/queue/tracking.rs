//! What a worker has of the region in which requests in flight are marked.

use crate::inflight::{Inflight, SharedInflight};
use domain_abi::RawRequest;
use proxy::slot_of;
use std::sync::Arc;
use virtqueue::RequestTable;
use virtqueue::inflight::{Marked, Tracker};

/// No version of what the session shares.
const NONE: u64 = u64::MAX;

/// The queue's part of the region. It outlives a [`RingState`](super::ring::RingState) as long as
/// something is in flight, so that nothing which this process has in flight is taken for what an
/// earlier one had.
pub(super) struct Tracking {
    /// The version that was taken up when the ring was turned on.
    version: u64,
    /// The marks; none without a region.
    pub(super) tracker: Option<Tracker>,
    /// What was in flight in an earlier process, until it is submitted.
    pub(super) replay: Option<Replay>,
}

impl Default for Tracking {
    fn default() -> Self {
        Self { version: NONE, tracker: None, replay: None }
    }
}

impl Tracking {
    /// Of a version that is taken up, which may have no region.
    pub(super) const fn new(
        version: u64,
        tracker: Option<Tracker>,
        replay: Option<Replay>,
    ) -> Self {
        Self { version, tracker, replay }
    }

    /// Whether another region is to be taken up before anything is taken from the ring.
    #[inline(always)]
    pub(super) fn is_outdated(&self, shared: &SharedInflight) -> bool {
        self.version != shared.version()
    }

    /// The ring is off. If nothing is in flight, what is turned on next is another one, as far as
    /// can be known: its driver may have begun anew.
    ///
    /// The region keeps what it says, which is that nothing is in flight. Were it forgotten here,
    /// and the process killed before the frontend is told where the ring has stopped, the next one
    /// would go on where the ring was started.
    pub(super) fn ring_is_off(&mut self, in_flight: usize) {
        if in_flight == 0 {
            (self.version, self.tracker) = (NONE, None);
        }
    }

    /// How many requests of an earlier process are still to be submitted.
    pub(super) fn to_replay(&self) -> usize {
        self.replay.as_ref().map_or(0, |replay| replay.marked.len() - replay.next)
    }
}

/// Marks the chains of a batch, which were just taken: no domain has seen them.
#[inline(always)]
pub(super) fn mark(tracker: &mut Tracker, requests: &RequestTable, batch: &[RawRequest]) {
    let head = |request: &RawRequest| slot_of(request.tag) as u16;
    if !requests.has_immediate() {
        return tracker.mark(batch.iter().map(head));
    }
    for after in 0..=batch.len() {
        requests.immediate(after).for_each(|head| tracker.mark_any(head));
        batch.get(after).into_iter().for_each(|request| tracker.mark_any(head(request)));
    }
}

/// Requests that were in flight in an earlier process.
pub(super) struct Replay {
    /// All of them, in the order in which they run again.
    marked: Vec<Marked>,
    /// How many of them have been submitted.
    next: usize,
    inflight: Arc<Inflight>,
}

impl Replay {
    /// None if there is nothing to replay.
    pub(super) fn of(marked: Vec<Marked>, inflight: Arc<Inflight>) -> Option<Self> {
        (!marked.is_empty()).then_some(Self { marked, next: 0, inflight })
    }

    /// Whether one request is awaited before the next is submitted.
    pub(super) fn is_cautious(&self) -> bool {
        self.inflight.cautious
    }

    /// Whether the request does not run again.
    pub(super) fn is_quarantined(&self, queue: usize, marked: Marked) -> bool {
        self.inflight.quarantine.iter().any(|other| {
            (other.queue, other.head, other.counter) == (queue, marked.head, marked.counter)
        })
    }

    /// What comes next.
    pub(super) fn rest(&self) -> &[Marked] {
        &self.marked[self.next..]
    }

    /// So many have been taken.
    pub(super) fn took(&mut self, chains: usize) {
        self.next += chains;
    }

    /// The last so many of what was taken were not submitted.
    pub(super) fn returned(&mut self, chains: usize) {
        self.next -= chains;
    }
}
