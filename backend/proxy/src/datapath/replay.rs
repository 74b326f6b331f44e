//! What dead instances left: requests that are run again, in the order in which they came and
//! before anything new, or answered with an error.

use crate::change::fence::{Fence, Verdict};
use crate::datapath::inflight::{PendingReplay, TagScheme, slot_of};
use crate::datapath::progress::Ended;
use crate::datapath::queue::add;
use crate::datapath::worker::Worker;
use domain_abi::{RawRequest, Status};
use std::sync::Arc;

/// Most requests that run again in one call, and most of their bytes, but for one request: as many
/// as a worker takes from its ring at once, for the same reasons. An upgrade's gate waits for the
/// call, and so does the look at whether the worker moves.
const BATCH: usize = 16;
const BATCH_BYTES: u64 = 8 << 20;

impl Worker {
    /// There is no live domain: it has died, and another takes over soon, or none will.
    pub(super) fn submit_to_none(
        &mut self,
        requests: &mut [RawRequest],
        mut ended: impl FnMut(Ended),
    ) -> usize {
        if self.proxy.is_faulted() {
            for request in requests.iter() {
                ended(Ended { slot: slot_of(request.tag), status: Status::IoError, written: 0 });
            }
            add(&self.line.requests, requests.len() as u64);
            add(&self.line.errors, requests.len() as u64);
        } else {
            // It has just come, and is found at the next look; or it will come, or not. No dead
            // instance had these, so nothing has to be fenced off before they run.
            let fence = Arc::new(Fence::open());
            for request in requests.iter_mut() {
                let slot = slot_of(request.tag);
                TagScheme::NONE.name(request, slot);
                let order = self.next_order();
                self.inflight.enter(request, order);
                self.pending.push(PendingReplay { slot, fence: Arc::clone(&fence) });
            }
            self.publish_in_flight();
        }
        requests.len()
    }

    /// Whether more can run again now, and was left for the next time that completions are reaped,
    /// so that the gate is passed in between.
    #[must_use]
    #[inline]
    pub const fn replays_more(&self) -> bool {
        self.replays_more
    }

    /// Runs again, or answers, what dead instances left.
    #[cold]
    pub(super) fn replay_pending(&mut self, ended: &mut impl FnMut(Ended)) {
        self.replays_more = false;
        let line = &*self.line;
        // Fenced off, and nothing is left that could run them.
        let is_over = self.current.is_none() && self.proxy.is_faulted();
        let lost = &mut self.lost;
        self.pending.retain(|pending| {
            let fails = match pending.fence.verdict() {
                Verdict::Wait => false,
                Verdict::Replay => is_over,
                Verdict::Fail => true,
                Verdict::Unfenced => {
                    *lost += 1;
                    return false;
                }
            };
            if fails {
                ended(Ended { slot: pending.slot, status: Status::IoError, written: 0 });
                add(&line.requests, 1);
                add(&line.errors, 1);
            }
            !fails
        });
        // In order: one that has to wait holds up those behind it.
        let ready = self
            .pending
            .iter()
            .take_while(|pending| pending.fence.verdict() == Verdict::Replay)
            .count();
        if ready == 0 || !self.is_served() {
            return;
        }
        let tags = self.tags();
        let mut replay = std::mem::take(&mut self.replay);
        replay.clear();
        let mut bytes = 0;
        for pending in self.pending.iter().take(ready.min(BATCH)) {
            let mut request = self.inflight.request(pending.slot);
            tags.name(&mut request, pending.slot);
            bytes += request.len();
            replay.push(request);
            if bytes >= BATCH_BYTES {
                break;
            }
        }
        let (is_cut, ready) = (replay.len() < ready, replay.len());
        // Out of the list first: if this instance dies too, it makes pending of its own.
        let rest = self.pending.split_off(ready);
        let mut given = std::mem::take(&mut self.pending);
        self.publish_in_flight();
        let owing = self.owing_here();
        let accepted = self.offer(&replay, false, &mut *ended);
        add(&self.line.replayed, accepted as u64);
        self.replays_more = is_cut && accepted == ready;
        if accepted == 0 && owing == 0 && self.is_served() {
            // Against the contract; nothing would ever bring us back here.
            log::error!("queue {}: the domain takes no request although it has none", self.queue);
            self.note_failed(&replay[0]);
            ended(Ended { slot: given.remove(0).slot, status: Status::IoError, written: 0 });
            add(&self.line.requests, 1);
            add(&self.line.errors, 1);
        }
        let mut left = given.split_off(accepted);
        left.append(&mut self.pending);
        left.extend(rest);
        let inflight = &self.inflight;
        left.sort_by_key(|pending| inflight.order(pending.slot));
        self.pending = left;
        self.replay = replay;
    }
}
