//! One queue's marks.

use super::layout::{Cell, FRESH, VERSION};
use super::recovery::{Recovery, Ring, recover};
use super::region::{Part, Region, RegionError};
use crate::view::Used;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

/// The marks of a queue whose ring is on. Only its worker has it.
pub struct Tracker {
    pub(super) part: Part,
    /// The number of the next chain.
    pub(super) counter: u64,
    pub(super) last_batch_head: u16,
    /// Chains that were taken and cannot be marked, because their head is none of the ring's. Each
    /// is the last of its batch, and answered, or given back, with it.
    pub(super) unmarked: u16,
}

impl Tracker {
    /// Begins to track what is in flight on a ring that is turned on, and says what was in flight
    /// before.
    ///
    /// # Errors
    /// The region is not made for this ring.
    pub fn start(
        region: &Arc<Region>,
        queue: usize,
        ring: Ring,
    ) -> Result<(Self, Recovery), RegionError> {
        let part = Part::new(region, queue, ring.size)?;
        let (version, desc_num) = (part.header().version.get(), part.header().desc_num.get());
        if version != FRESH && (version, desc_num) != (VERSION, part.len()) {
            return Err(RegionError::OtherLayout { version, desc_num });
        }
        let recovery = recover(&part, ring);
        part.header().features.put(0);
        let newest = recovery.resubmit.last().map_or(0, |newest| newest.counter);
        let last_batch_head = part.header().last_batch_head.get();
        let tracker = Self {
            part,
            // No process lives to see it wrap.
            counter: newest.wrapping_add(1),
            last_batch_head,
            unmarked: 0,
        };
        Ok((tracker, recovery))
    }

    /// The ring of `queue` is never taken up, because it cannot be: what waits for that need not
    /// any more.
    pub fn pass_by(region: &Arc<Region>, queue: usize) {
        if let Ok(part) = Part::new(region, queue, 1) {
            part.header().features.put(0);
        }
    }

    /// Marks chains whose heads are the ring's, when they are taken and before anything is done for
    /// them: of each its counter, then its mark (steps 2 to 4 of "When receiving available buffers
    /// from the driver" in the specification). Chains are marked in the order of the ring.
    #[inline(always)]
    pub fn mark(&mut self, heads: impl IntoIterator<Item = u16>) {
        let (entries, mut counter) = (self.part.entries(), self.counter);
        for head in heads {
            let entry = entries.at(head);
            entry.counter.put_anywhere(counter);
            counter = counter.wrapping_add(1);
            // Release: the counter is there before it.
            entry.inflight.put(1);
        }
        self.counter = counter;
    }

    /// As [`mark`](Self::mark), of a chain that may have a head of any number. One whose head there
    /// is not has no mark, and must be the last of its batch.
    #[cold]
    pub fn mark_any(&mut self, head: u16) {
        if self.part.has(head) {
            self.mark([head]);
        } else {
            self.unmarked += 1;
        }
    }

    /// Takes the mark off a chain that goes back to the ring. Chains go back from the last to the
    /// first: so that what is marked is what the ring has in front of the next chain, always.
    #[cold]
    pub fn unmark(&mut self, head: u16) {
        if self.part.has(head) {
            self.part.entry(head).inflight.put(0);
        } else {
            self.unmarked -= 1;
        }
    }

    /// Whether some of what is published next has no mark.
    #[inline(always)]
    pub(crate) const fn has_unmarked(&self) -> bool {
        self.unmarked > 0
    }

    /// Puts a request that is published next into the list, in front of `last` (step 2 of the
    /// specification's "When supplying used buffers to the driver"). Returns the list's new head.
    #[inline(always)]
    pub(crate) fn chain(&self, head: u16, last: u16) -> u16 {
        self.part.entries().at(head).next.put_anywhere(last);
        head
    }

    /// The head of the list.
    #[inline(always)]
    pub(crate) const fn last_batch_head(&self) -> u16 {
        self.last_batch_head
    }

    /// The list is complete (step 3). The ring's used index comes next.
    #[inline(always)]
    pub(crate) fn chained(&mut self, last: u16) {
        self.last_batch_head = last;
        self.part.header().last_batch_head.put_anywhere(last);
    }

    /// The ring's used index is `used_idx`: takes the marks of what it has published off, and says
    /// that this was done (steps 6 and 7).
    #[inline(always)]
    pub(crate) fn published(&mut self, used: &[Used], used_idx: u16) {
        // No mark goes before the used index is there.
        compiler_fence(Ordering::SeqCst);
        if self.unmarked > 0 {
            self.unmark_marked(used);
        } else {
            let entries = self.part.entries();
            used.iter().for_each(|element| entries.at(element.head).inflight.put_anywhere(0));
        }
        // Release: the marks are off before it.
        self.part.header().used_idx.put(used_idx);
    }

    /// Puts what is published next into the list, if some of it has no mark. `used_idx` is the
    /// ring's, as it is still.
    ///
    /// What has no mark is not in the list, so the region's index goes ahead by its number before
    /// the ring's goes. Once both have gone, they differ by the length of the list; until then, by
    /// more than any list is long.
    #[cold]
    pub(crate) fn chain_marked(&mut self, used: &[Used], used_idx: u16) {
        let header = self.part.header();
        header.used_idx.put(used_idx.wrapping_add(self.unmarked));
        for element in used.iter().filter(|element| self.part.has(element.head)) {
            self.last_batch_head = self.chain(element.head, self.last_batch_head);
        }
        self.chained(self.last_batch_head);
    }

    /// As [`published`](Self::published), if some of it has no mark.
    #[cold]
    fn unmark_marked(&mut self, used: &[Used]) {
        for element in used.iter().filter(|element| self.part.has(element.head)) {
            self.part.entry(element.head).inflight.put(0);
        }
        self.unmarked = 0;
    }
}
