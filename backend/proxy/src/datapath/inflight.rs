//! The table of what is in flight on a queue: which domain has which request, what it is called,
//! and what it was, to be run again.
//!
//! A request that ends in the call that submits it never comes here; the batch that it is in says
//! all that there is to know. What does not is entered when the call has returned. While the call
//! lasts the table is not needed: it is the worker's own, and the worker is in the call.
//!
//! Invariants: a slot is taken by one generation or by none; what it says about a request stays
//! when the generation that had it has died.

use crate::canary::errors::ErrorLog;
use crate::change::fence::Fence;
use crate::datapath::progress::Ended;
use crate::datapath::queue::{QueueLine, add};
use domain_abi::Status;
use domain_abi::{self as abi, RawCompletion, RawRequest};
use std::fmt;
use std::sync::Arc;

/// A slot; a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Inflight {
    /// As it was submitted. Its generation is the one that has it; 0 is none.
    request: RawRequest,
    /// It was the n-th request.
    order: u64,
}

/// All slots of a queue. Those that were never needed are not there yet, so that a ring costs what
/// of it is used.
pub(crate) struct InflightTable(Vec<Inflight>);

impl InflightTable {
    /// With room for `slots` of them.
    pub(crate) fn new(slots: usize) -> Self {
        Self(Vec::with_capacity(slots))
    }

    /// How many there are: all that were ever needed are among them.
    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    /// Which generation has the request in a slot; 0 is none.
    pub(crate) fn generation(&self, slot: usize) -> u64 {
        self.0.get(slot).map_or(0, |flight| flight.request.generation)
    }

    /// The request in a slot was the n-th.
    pub(crate) fn order(&self, slot: usize) -> u64 {
        self.0[slot].order
    }

    /// The request in a slot, with the name that it had last.
    pub(crate) fn request(&self, slot: usize) -> RawRequest {
        self.0[slot].request
    }

    /// Enters a request, with the domain that has it in its generation.
    #[inline]
    pub(crate) fn enter(&mut self, request: &RawRequest, order: u64) {
        let slot = slot_of(request.tag);
        if slot >= self.0.len() {
            self.grow(slot + 1);
        }
        self.0[slot] = Inflight { request: *request, order };
    }

    #[cold]
    fn grow(&mut self, len: usize) {
        self.0.resize(len, Inflight { request: RawRequest::nothing(), order: 0 });
    }

    /// No generation has the request in a slot any more; what it was stays known.
    pub(crate) fn let_go(&mut self, slot: usize) {
        self.0[slot].request.generation = 0;
    }

    /// Closes the slot that a completion of an attached queue is about. Returns `None` if it is
    /// about no request that is in flight there.
    #[inline]
    fn close(&mut self, tags: TagScheme, completion: &RawCompletion) -> Option<usize> {
        let slot = slot_of(completion.tag);
        let flight = self.0.get_mut(slot)?;
        let known = completion.tag == tags.tag(slot)
            && completion.generation == tags.generation
            && flight.request.generation == tags.generation;
        if !known {
            return None;
        }
        flight.request.generation = 0;
        Some(slot)
    }

    /// Takes a queue's completions over: checks each, frees its slot, reports it. Returns how many
    /// were good.
    pub(crate) fn complete(
        &mut self,
        completed: &[RawCompletion],
        tags: TagScheme,
        line: &QueueLine,
        log: &ErrorLog,
        ended: &mut impl FnMut(Ended),
    ) -> usize {
        let (mut count, mut errors) = (0, 0);
        for completion in completed {
            let Some(slot) = self.close(tags, completion) else {
                log::error!(
                    "{tags}: completed request {:#x} of generation {}, which is not in flight; dropped",
                    completion.tag,
                    completion.generation
                );
                continue;
            };
            count += 1;
            if completion.status != abi::status::OK {
                errors += 1;
                log.note(tags.generation, &self.0[slot].request, completion.status);
            }
            ended(Ended { slot, status: status(completion), written: completion.written });
        }
        add(&line.requests, count as u64);
        if errors > 0 {
            add(&line.errors, errors);
        }
        count
    }
}

/// A request that a dead instance left unanswered, to be run again.
pub(crate) struct PendingReplay {
    pub(crate) slot: usize,
    /// The dead instance's.
    pub(crate) fence: Arc<Fence>,
}

/// What requests of one queue of one instance are called at the ABI.
///
/// A tag is the request's slot in its lowest 16 bits, its queue in the next 8, and the generation
/// above: so that a domain that mixes up queues is caught, and a completion of an earlier
/// generation is never taken for one of this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagScheme {
    base: u64,
    generation: u64,
}

const SLOT_BITS: u32 = 16;
const QUEUE_BITS: u32 = 8;

/// Most slots that a queue can have.
pub(crate) const SLOT_LIMIT: usize = 1 << SLOT_BITS;

impl TagScheme {
    /// For requests that no domain has yet.
    pub(crate) const NONE: Self = Self { base: 0, generation: 0 };

    pub(crate) const fn new(queue: usize, generation: u64) -> Self {
        assert!(queue < 1 << QUEUE_BITS, "queues are numbered in 8 bits");
        Self { base: (generation << QUEUE_BITS | queue as u64) << SLOT_BITS, generation }
    }

    /// Names a request by its slot.
    #[inline]
    pub const fn name(self, request: &mut RawRequest, slot: usize) {
        request.tag = self.tag(slot);
        request.generation = self.generation;
    }

    #[inline]
    const fn tag(self, slot: usize) -> u64 {
        self.base + slot as u64
    }

    /// Which instance takes requests of these names; 0 is none.
    #[must_use]
    #[inline]
    pub const fn generation(self) -> u64 {
        self.generation
    }

    /// Whether a request has a name of this kind.
    pub(crate) const fn named(self, request: &RawRequest) -> bool {
        request.tag == self.tag(slot_of(request.tag)) && request.generation == self.generation
    }
}

impl fmt::Display for TagScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queue = self.base >> SLOT_BITS & ((1 << QUEUE_BITS) - 1);
        write!(f, "queue {queue}: generation {}", self.generation)
    }
}

/// The slot that a tag names.
#[must_use]
#[inline]
pub const fn slot_of(tag: u64) -> usize {
    tag as usize & (SLOT_LIMIT - 1)
}

/// How a completion says that it went.
const fn status(completion: &RawCompletion) -> Status {
    match completion.status {
        abi::status::OK => Status::Ok,
        abi::status::UNSUPPORTED => Status::Unsupported,
        _ => Status::IoError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_completion_of_what_is_in_flight_closes_a_slot_and_only_once() {
        let (tags, mut table) = (TagScheme::new(3, 7), InflightTable::new(4));
        let mut request = RawRequest::nothing();
        tags.name(&mut request, 2);
        assert!(tags.named(&request) && !TagScheme::new(2, 7).named(&request));
        table.enter(&request, 11);
        let completion = |queue, generation, slot, said| {
            let tag = TagScheme::new(queue, generation).tag(slot);
            RawCompletion { tag, generation: said, status: 0, written: 0 }
        };
        for wrong in [
            completion(3, 7, 1, 7),
            completion(2, 7, 2, 7),
            completion(3, 6, 2, 6),
            completion(3, 6, 2, 7),
            completion(3, 7, 2, 6),
            completion(3, 7, 4, 7),
            RawCompletion { tag: u64::MAX, ..completion(3, 7, 2, 7) },
        ] {
            assert_eq!(table.close(tags, &wrong), None, "{wrong:?}");
        }
        let of_another = TagScheme::new(3, 8);
        assert_eq!(table.close(of_another, &completion(3, 8, 2, 8)), None, "another generation's");
        assert_eq!(table.generation(2), 7);
        assert_eq!(table.close(tags, &completion(3, 7, 2, 7)), Some(2));
        assert_eq!(table.close(tags, &completion(3, 7, 2, 7)), None, "twice");
        assert_eq!((table.order(2), slot_of(table.request(2).tag)), (11, 2));
    }
}
