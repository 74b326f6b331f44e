//! The table of what is in flight on a queue: who has which request, what it is called, and what it
//! was, to be run again.
//!
//! A request that ends in the call that submits it never comes here; the batch that it is in says
//! all that there is to know. What does not is entered when the call has returned. While the call
//! lasts nobody needs the table: it is the worker's own, and the worker is in the call.
//!
//! Invariants: a slot is taken by one generation or by nobody; what it says about a request stays
//! when the generation that had it has died.

use crate::Ended;
use crate::queue::{QueueLine, add};
use domain_abi::Status;
use domain_abi::{self as abi, RawCompletion, RawRequest};
use std::fmt;

/// A slot; a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Flight {
    /// As it was submitted. Its generation is who has it; 0 is nobody.
    request: RawRequest,
    /// The how-manieth request it was.
    order: u64,
}

/// All slots of a queue. Those that were never needed are not there yet, so that a ring costs what
/// of it is used.
pub(crate) struct Flights(Vec<Flight>);

impl Flights {
    /// With room for `slots` of them.
    pub(crate) fn new(slots: usize) -> Self {
        Self(Vec::with_capacity(slots))
    }

    /// How many there are: all that were ever needed are among them.
    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    /// Who has the request in a slot; 0 is nobody.
    pub(crate) fn generation(&self, slot: usize) -> u64 {
        self.0.get(slot).map_or(0, |flight| flight.request.generation)
    }

    /// The how-manieth the request in a slot was.
    pub(crate) fn order(&self, slot: usize) -> u64 {
        self.0[slot].order
    }

    /// The request in a slot, with the name that it had last.
    pub(crate) fn request(&self, slot: usize) -> RawRequest {
        self.0[slot].request
    }

    /// Enters a request, with who has it in its generation.
    #[inline]
    pub(crate) fn enter(&mut self, request: &RawRequest, order: u64) {
        let slot = slot_of(request.tag);
        if slot >= self.0.len() {
            self.grow(slot + 1);
        }
        self.0[slot] = Flight { request: *request, order };
    }

    #[cold]
    fn grow(&mut self, len: usize) {
        self.0.resize(len, Flight { request: RawRequest::nothing(), order: 0 });
    }

    /// Nobody has the request in a slot any more; what it was stays known.
    pub(crate) fn let_go(&mut self, slot: usize) {
        self.0[slot].request.generation = 0;
    }

    /// Closes the slot that a completion by a lane is about. Returns `None` if it is about no
    /// request that is in flight there.
    #[inline]
    fn close(&mut self, naming: Naming, completion: &RawCompletion) -> Option<usize> {
        let slot = slot_of(completion.tag);
        let flight = self.0.get_mut(slot)?;
        let known = completion.tag == naming.tag(slot)
            && completion.generation == naming.generation
            && flight.request.generation == naming.generation;
        if !known {
            return None;
        }
        flight.request.generation = 0;
        Some(slot)
    }

    /// Takes a lane's completions over: checks each, frees its slot, reports it. Returns how many
    /// were good.
    pub(crate) fn settle(
        &mut self,
        completed: &[RawCompletion],
        naming: Naming,
        line: &QueueLine,
        ended: &mut impl FnMut(Ended),
    ) -> usize {
        let (mut count, mut errors) = (0, 0);
        for completion in completed {
            let Some(slot) = self.close(naming, completion) else {
                log::error!(
                    "{naming}: completed request {:#x} of generation {}, which is not in flight; dropped",
                    completion.tag,
                    completion.generation
                );
                continue;
            };
            count += 1;
            errors += u64::from(completion.status != abi::status::OK);
            ended(Ended { slot, status: status(completion), written: completion.written });
        }
        add(&line.requests, count as u64);
        if errors > 0 {
            add(&line.errors, errors);
        }
        count
    }
}

/// What requests of one queue of one instance are called at the ABI.
///
/// A tag is the request's slot in its lowest 16 bits, its queue in the next 8, and the generation
/// above: so that a domain that mixes up queues is caught, and a completion of an earlier
/// generation is never taken for one of this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Naming {
    base: u64,
    generation: u64,
}

const SLOT_BITS: u32 = 16;
const QUEUE_BITS: u32 = 8;

/// Most slots that a queue can have.
pub(crate) const SLOT_LIMIT: usize = 1 << SLOT_BITS;

impl Naming {
    /// For requests that nobody has yet.
    pub(crate) const NOBODY: Self = Self { base: 0, generation: 0 };

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

impl fmt::Display for Naming {
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
        let (naming, mut flights) = (Naming::new(3, 7), Flights::new(4));
        let mut request = RawRequest::nothing();
        naming.name(&mut request, 2);
        assert!(naming.named(&request) && !Naming::new(2, 7).named(&request));
        flights.enter(&request, 11);
        let completion = |queue, generation, slot, said| {
            let tag = Naming::new(queue, generation).tag(slot);
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
            assert_eq!(flights.close(naming, &wrong), None, "{wrong:?}");
        }
        let of_another = Naming::new(3, 8);
        assert_eq!(
            flights.close(of_another, &completion(3, 8, 2, 8)),
            None,
            "another generation's"
        );
        assert_eq!(flights.generation(2), 7);
        assert_eq!(flights.close(naming, &completion(3, 7, 2, 7)), Some(2));
        assert_eq!(flights.close(naming, &completion(3, 7, 2, 7)), None, "twice");
        assert_eq!((flights.order(2), slot_of(flights.request(2).tag)), (11, 2));
    }
}
