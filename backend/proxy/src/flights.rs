//! The table of what is in flight on a queue: who has which request, and what it was, to be run again.
//!
//! A request that ends in the call that submits it never comes here; the batch that it is in says all that there is to know. What does not is entered
//! when the call has returned. While the call lasts nobody needs the table: it is the worker's own, and the worker is in the call.
//!
//! Invariants: a slot is taken by one generation or by nobody; what it says about a request stays when the generation that had it has died.

use crate::Ended;
use crate::queue::{QueueLine, add};
use domain_api::Status;
use domain_api::abi::{self, RawCompletion, RawRequest};

/// A slot; a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Flight {
    /// As it was submitted. Its generation is who has it; 0 is nobody.
    request: RawRequest,
    /// The how-manieth request it was.
    order: u64,
}

/// All slots of a queue.
pub(crate) struct Flights(Box<[Flight]>);

impl Flights {
    pub(crate) fn new(slots: usize) -> Self {
        Self(vec![Flight { request: RawRequest::nothing(), order: 0 }; slots].into_boxed_slice())
    }

    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    /// Who has the request in a slot; 0 is nobody.
    pub(crate) fn generation(&self, slot: usize) -> u64 {
        self.0[slot].request.generation
    }

    /// The how-manieth the request in a slot was.
    pub(crate) fn order(&self, slot: usize) -> u64 {
        self.0[slot].order
    }

    /// The request in a slot, named by its slot as when it came.
    pub(crate) fn request(&self, slot: usize) -> RawRequest {
        let mut request = self.0[slot].request;
        request.tag = slot as u64;
        request
    }

    /// Enters a request, with who has it in its generation.
    #[inline]
    pub(crate) fn enter(&mut self, request: &RawRequest, order: u64) {
        self.0[untag(request.tag)] = Flight { request: *request, order };
    }

    /// Nobody has the request in a slot any more; what it was stays known.
    pub(crate) fn let_go(&mut self, slot: usize) {
        self.0[slot].request.generation = 0;
    }

    /// Closes the slot that a completion by `generation` on `queue` is about. Returns `None` if it is about no request that is in flight there.
    #[inline]
    fn close(&mut self, queue: usize, generation: u64, completion: &RawCompletion) -> Option<usize> {
        let slot = untag(completion.tag);
        let flight = self.0.get_mut(slot)?;
        let known = completion.tag == tag(queue, slot)
            && completion.generation == generation
            && flight.request.generation == generation;
        if !known {
            return None;
        }
        flight.request.generation = 0;
        Some(slot)
    }

    /// Takes completions by `generation` on `queue` over: checks each, frees its slot, reports it. Returns how many were good.
    pub(crate) fn settle(
        &mut self,
        completed: &[RawCompletion],
        queue: usize,
        generation: u64,
        line: &QueueLine,
        ended: &mut impl FnMut(Ended),
    ) -> usize {
        let (mut count, mut errors) = (0, 0);
        for completion in completed {
            if self.close(queue, generation, completion).is_none() {
                log::error!(
                    "queue {queue}: generation {generation} completed request {:#x} of generation {}, which is not in flight; dropped",
                    completion.tag,
                    completion.generation
                );
                continue;
            }
            count += 1;
            errors += u64::from(completion.status != abi::status::OK);
            ended(told(completion));
        }
        add(&line.requests, count as u64);
        if errors > 0 {
            add(&line.errors, errors);
        }
        count
    }
}

/// What a request is called at the ABI: its queue too, so that a domain that mixes queues up is caught.
pub(crate) const fn tag(queue: usize, slot: usize) -> u64 {
    (queue as u64) << 32 | slot as u64
}

/// The slot of a request.
pub(crate) const fn untag(tag: u64) -> usize {
    (tag & 0xffff_ffff) as usize
}

/// What a completion, which was checked, says.
#[inline]
pub(crate) const fn told(completion: &RawCompletion) -> Ended {
    let status = match completion.status {
        abi::status::OK => Status::Ok,
        abi::status::UNSUPPORTED => Status::Unsupported,
        _ => Status::IoError,
    };
    Ended { slot: untag(completion.tag), status, written: completion.written }
}

/// How many did not end well.
#[cold]
pub(crate) fn errors(completed: &[RawCompletion]) -> u64 {
    completed.iter().filter(|completion| completion.status != abi::status::OK).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_completion_of_what_is_in_flight_closes_a_slot_and_only_once() {
        let mut flights = Flights::new(4);
        let mut request = RawRequest::nothing();
        (request.tag, request.generation) = (tag(3, 2), 7);
        flights.enter(&request, 11);
        let completion = |tag, generation| RawCompletion { tag, generation, status: 0, written: 0 };
        for wrong in [
            completion(tag(3, 1), 7),
            completion(tag(2, 2), 7),
            completion(tag(3, 2), 6),
            completion(tag(3, 4), 7),
            completion(u64::MAX, 7),
        ] {
            assert_eq!(flights.close(3, 7, &wrong), None, "{wrong:?}");
        }
        assert_eq!(flights.close(3, 8, &completion(tag(3, 2), 8)), None, "another generation's");
        assert_eq!(flights.generation(2), 7);
        assert_eq!(flights.close(3, 7, &completion(tag(3, 2), 7)), Some(2));
        assert_eq!(flights.close(3, 7, &completion(tag(3, 2), 7)), None, "twice");
        assert_eq!((flights.order(2), flights.request(2).tag), (11, 2));
    }
}
