//! Chains that become requests, and the table of requests that are in flight on a queue.
//!
//! The table owns what a request points to: the list of its segments, and the snapshot of guest
//! memory that the segments and the status byte lie in. So it alone decides when either may change:
//!
//! * an entry is that of a chain's first descriptor, its *head*, which names one chain at a time:
//!   the driver must not offer it again before it was given back (virtio 1.2, 2.7.13), whether a
//!   domain has it or it is answered here when the batch ends;
//! * the list of an entry is written between [`Parser::next`] and the moment when the entry is in
//!   use, and not before the entry is free again;
//! * the snapshot is replaced by [`RequestTable::replace_snapshot`], which keeps the old one mapped
//!   for ever if an entry is in use, as dropping the table does.
//!
//! What it relies on is that an entry is given back only when its request has ended or was never
//! taken by a domain. The proxy checks each completion against what is in flight before it says
//! that something has ended; an entry that is not in use is not given back a second time.

use crate::dirty::GuestMemory;
use crate::memory::Snapshot;
use crate::view::Used;
use domain_abi::{RawRequest, RawSegment, op};
use std::sync::Arc;
use virtio_blk::{
    Asked, DescriptorTable, Limits, MalformedChain, Parsed, SEG_MAX, StatusSlot, Translator, Usual,
    WireStatus, parse, used_len,
};

/// Beside the kinds of requests, in [`Entry::op`]: the chain is not for the domain, and what it
/// asks for is in the other bits.
const ANSWERED: u32 = 1 << 31;
/// What a chain asks for that is no request: the serial number, something else, nothing.
const SERIAL: u32 = op::WRITE_ZEROES + 1;
const UNKNOWN: u32 = SERIAL + 1;
const NOTHING: u32 = u32::MAX;

/// Whether an entry is in use, and where its status byte is.
#[derive(Clone, Copy, Default)]
enum Place {
    /// It was never in use, or what was in it had no status byte.
    #[default]
    Nowhere,
    /// It was in use.
    Ended(StatusSlot),
    /// It is.
    Used(StatusSlot),
    /// It is that of a chain which is answered without the domain when its batch ends.
    Answered(StatusSlot),
    /// It is that of a chain which goes back without an answer then.
    Unanswered,
}

/// A request: what is needed to end it, and, until another one takes the entry, to say what was
/// written into guest memory for it.
#[derive(Default)]
pub(crate) struct Entry {
    op: u32,
    len: u64,
    place: Place,
    /// It is, or was when it was used last, of an earlier snapshot, which stays mapped.
    is_stranded: bool,
    segments: Vec<RawSegment>,
}

impl Entry {
    #[inline(always)]
    const fn is_in_use(&self) -> bool {
        matches!(self.place, Place::Used(_))
    }

    /// Whether the driver may offer the entry's head.
    #[inline(always)]
    pub(crate) const fn is_free(&self) -> bool {
        matches!(self.place, Place::Nowhere | Place::Ended(_))
    }

    /// The entry's chain, if it was not for the domain, is given back.
    const fn given_back(&mut self) {
        match self.place {
            Place::Answered(status_at) => self.place = Place::Ended(status_at),
            Place::Unanswered => self.place = Place::Nowhere,
            Place::Nowhere | Place::Ended(_) | Place::Used(_) => {}
        }
    }

    /// The entry, which is not in use and has its segments already, is that of a request from now
    /// on.
    #[inline(always)]
    fn request(
        &mut self,
        op: u32,
        flags: u32,
        offset: u64,
        len: u64,
        status_at: StatusSlot,
    ) -> RawRequest {
        (self.op, self.len) = (op, len);
        (self.place, self.is_stranded) = (Place::Used(status_at), false);
        // SAFETY: the list belongs to an entry that is in use from here on. It is written in
        // `usual`, `Parser::next` and `give_up_long` only, for an entry that is not in use, as this
        // one is not before `end` or `discard`, of a request that has ended or was never submitted;
        // `set_aside` moves it to where it is never written. The list's own memory does not move
        // when the entry does, and is never given back while the entry is in use (`drop`).
        unsafe { RawRequest::new(op, flags, offset, len, &self.segments) }
    }

    /// The entry, which is not in use, is that of a usual request from now on.
    #[inline(always)]
    pub(crate) fn usual(&mut self, usual: &Usual) -> RawRequest {
        self.segments.clear();
        self.segments.push(usual.data);
        self.request(usual.op, 0, usual.offset, usual.data.len() as u64, usual.status_at)
    }

    /// The entry is in use no more; where the status goes, if it was.
    #[inline(always)]
    const fn free(&mut self) -> Option<StatusSlot> {
        let Place::Used(status_at) = self.place else { return None };
        self.place = Place::Ended(status_at);
        Some(status_at)
    }
}

/// A chain of a batch that is not for the domain.
struct ImmediateAnswer {
    /// How many of the batch's requests are before it.
    after: usize,
    used: Used,
    /// Its answer; without one it was no request at all.
    answer: Option<(StatusSlot, WireStatus)>,
}

/// What [`RequestTable::end_batch`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BatchEnd {
    /// Chains that were answered without the domain.
    pub answered: u64,
    /// Of these, with an error.
    pub errors: u64,
    /// Chains that could not be answered.
    pub malformed: u64,
    /// Chains that go back to the ring: those behind the first request that was not taken.
    pub returned: usize,
}

/// What became of a chain.
#[derive(Debug, Clone, Copy)]
pub enum Chain {
    /// For the domain, with its head, whose entry in the table is in use from now on.
    Request(u16, RawRequest),
    /// Its head is that of a chain which was taken and not given back: the ring makes no sense.
    InUse(u16),
    /// It is answered without the domain when the batch ends. Comes with the first address of it
    /// that is outside of guest memory.
    Answer(Option<u64>),
    /// It cannot be answered, and its descriptors go back to the driver when the batch ends.
    Malformed {
        /// Its first descriptor.
        head: u16,
        /// What is wrong with it.
        reason: MalformedChain,
        /// The first address of it that is outside of guest memory.
        outside: Option<u64>,
    },
}

/// The requests of a queue, by head. An entry is made when its head is first used, or a higher one,
/// so that a ring costs what of it is used.
pub struct RequestTable {
    entries: Vec<Entry>,
    /// How many of them are in use.
    in_use: usize,
    /// Requests that never end, and whose heads may be used again.
    set_aside: Vec<Entry>,
    /// How many entries there can be.
    limit: usize,
    /// What addresses are looked up in.
    snapshot: Option<Snapshot>,
    /// Looks them up there.
    translator: Option<Translator<Arc<GuestMemory>>>,
    /// The chains of the batch that are not for the domain.
    immediate: Vec<ImmediateAnswer>,
}

impl RequestTable {
    /// For `limit` requests in flight, taken in batches of up to `batch` chains, without a map.
    #[must_use]
    pub fn new(limit: u16, batch: usize) -> Self {
        let limit = usize::from(limit);
        Self {
            entries: Vec::new(),
            in_use: 0,
            set_aside: Vec::new(),
            limit,
            snapshot: None,
            translator: None,
            immediate: Vec::with_capacity(batch),
        }
    }

    /// How many entries are in use.
    #[must_use]
    #[inline]
    pub const fn in_use(&self) -> usize {
        self.in_use
    }

    /// Whether the entry of a head is in use.
    #[must_use]
    pub fn is_in_use(&self, head: u16) -> bool {
        self.entries.get(usize::from(head)).is_some_and(Entry::is_in_use)
    }

    /// Whether a head is that of a chain of the batch which is not for the domain.
    #[must_use]
    pub fn is_immediate(&self, head: u16) -> bool {
        self.immediate.iter().any(|chain| chain.used.head == head)
    }

    /// Frees the head of a request that will never end, for the driver of a ring that was set up
    /// again. What the request points to stays.
    pub fn set_aside(&mut self, head: u16) {
        if let Some(entry) =
            self.entries.get_mut(usize::from(head)).filter(|entry| entry.is_in_use())
        {
            self.set_aside.push(std::mem::take(entry));
            self.in_use -= 1;
        }
    }

    /// What addresses are looked up in; none before the first
    /// [`replace_snapshot`](Self::replace_snapshot).
    #[must_use]
    #[inline]
    pub const fn snapshot(&self) -> Option<&Snapshot> {
        self.snapshot.as_ref()
    }

    /// Has addresses looked up in `snapshot` from now on. To be called when nothing is in flight
    /// but what will never end; for its sake the memory that it may still be written to stays
    /// mapped.
    pub fn replace_snapshot(&mut self, snapshot: Snapshot) {
        let mut is_needed = false;
        for entry in self.entries.iter_mut().chain(&mut self.set_aside) {
            let is_in_use = entry.is_in_use();
            is_needed |= is_in_use && !entry.is_stranded;
            entry.is_stranded = is_in_use;
        }
        if is_needed {
            self.snapshot.iter().for_each(Snapshot::leak);
        }
        self.give_back_immediate();
        // SAFETY: what comes out of a parse goes into an entry that is in use, or into `immediate`.
        // The snapshot leaves this table here and in `drop` only: both keep it mapped for ever if
        // an entry of it is in use, `immediate` is empty now, and after `drop` nothing reads it.
        // An `Arc` refers to one map. Regions are mapped read-write by vhost-user-backend, and
        // references into them are not made.
        self.translator = Some(unsafe { Translator::new(Arc::clone(snapshot.memory())) });
        self.snapshot = Some(snapshot);
    }

    /// Begins a batch of chains of a queue's `table`, which lasts until
    /// [`end_batch`](Self::end_batch). Returns `None` without a snapshot.
    #[inline]
    pub fn parser(&mut self, table: DescriptorTable) -> Option<Parser<'_>> {
        if self.has_immediate() {
            self.give_back_immediate();
        }
        let Self { entries, in_use, limit, translator, immediate, .. } = self;
        let translator = translator.as_mut()?;
        translator.begin(table);
        Some(Parser { entries, in_use, limit: *limit, immediate, translator, requests: 0 })
    }

    /// A batch that was not ended is over.
    #[cold]
    fn give_back_immediate(&mut self) {
        for chain in self.immediate.drain(..) {
            if let Some(entry) = self.entries.get_mut(usize::from(chain.used.head)) {
                entry.given_back();
            }
        }
    }

    /// Ends the batch, of which the domain took `accepted` of `requests`: the chains that are not
    /// for the domain are answered and appended to `used`, up to the first request that it did not
    /// take. That request and all after it are to go back to the ring; the caller
    /// [discards](Self::discard) their entries.
    #[inline]
    pub fn end_batch(
        &mut self,
        accepted: usize,
        requests: usize,
        used: &mut Vec<Used>,
    ) -> BatchEnd {
        let mut end = BatchEnd { returned: requests - accepted, ..BatchEnd::default() };
        for chain in self.immediate.drain(..) {
            if let Some(entry) = self.entries.get_mut(usize::from(chain.used.head)) {
                entry.given_back();
            }
            if chain.after > accepted {
                end.returned += 1;
                continue;
            }
            match chain.answer {
                Some((status_at, status)) => {
                    status_at.write(status);
                    end.answered += 1;
                    end.errors += u64::from(status != WireStatus::Ok);
                }
                None => end.malformed += 1,
            }
            used.push(chain.used);
        }
        end
    }

    /// Whether the batch has chains that are not for the domain.
    #[must_use]
    #[inline]
    pub const fn has_immediate(&self) -> bool {
        !self.immediate.is_empty()
    }

    /// The heads of the chains of the batch that are not for the domain and have `after` of its
    /// requests before them, in their order.
    pub fn immediate(&self, after: usize) -> impl DoubleEndedIterator<Item = u16> {
        let is_there = move |chain: &&ImmediateAnswer| chain.after == after;
        self.immediate.iter().filter(is_there).map(|chain| chain.used.head)
    }

    /// Those of these chains that are answered and have at most `accepted` of the batch's requests
    /// before them: their heads, and whether the answer is an error.
    pub fn immediate_answers(&self, accepted: usize) -> impl Iterator<Item = (u16, bool)> {
        let is_due = move |chain: &&ImmediateAnswer| chain.after <= accepted;
        self.immediate.iter().filter(is_due).filter_map(|chain| {
            chain.answer.map(|(_, status)| (chain.used.head, status != WireStatus::Ok))
        })
    }

    /// What the last chain with this head asked for, and for how many bytes: one of [`op`], or, one
    /// more than the last of these, the serial number, or, two more, something else. `None` if it
    /// was no request.
    #[must_use]
    #[inline]
    pub fn asked(&self, head: usize) -> Option<(u32, u64)> {
        let entry = self.entries.get(head)?;
        (entry.op != NOTHING).then_some((entry.op & !ANSWERED, entry.len))
    }

    /// Ends a request: tells the guest its `status` (the domain's), and returns its element of the
    /// used ring. `written` is how much of its buffer was written. Returns `None` for an entry that
    /// is not in use.
    #[inline]
    pub fn end(&mut self, head: usize, status: u32, written: u32) -> Option<Used> {
        let entry = &mut self.entries[head];
        entry.free()?.write(WireStatus::from_completion(status));
        self.in_use -= 1; // `scripts/profile` counts requests by this line
        Some(Used { head: head as u16, len: used_len(entry.op, entry.len, written) })
    }

    /// Gives up the entry of a request that was not taken, or that has ended with nothing to be
    /// told.
    pub fn discard(&mut self, head: usize) {
        if self.entries[head].free().is_some() {
            self.in_use -= 1;
        }
    }

    /// Calls `each` with all that was written into guest memory for chains which have ended and
    /// are to be given back: their data, if they read any, and their status. Some of it may not
    /// have been written.
    pub fn written(&self, used: &[Used], mut each: impl FnMut(*const u8, usize)) {
        for entry in used.iter().filter_map(|used| self.entries.get(usize::from(used.head))) {
            if entry.op == op::READ || entry.op & ANSWERED != 0 {
                entry.segments.iter().for_each(|piece| each(piece.base(), piece.len()));
            }
            if let Place::Ended(status_at) = entry.place {
                each(status_at.at(), 1);
            }
        }
    }
}

impl Drop for RequestTable {
    fn drop(&mut self) {
        if self.in_use > 0 || !self.set_aside.is_empty() {
            self.snapshot.iter().for_each(Snapshot::leak);
            // The lists of segments are still the domain's.
            std::mem::forget(std::mem::take(&mut self.entries));
            std::mem::forget(std::mem::take(&mut self.set_aside));
        }
    }
}

/// Takes the chains of one batch, one after the other.
pub struct Parser<'t> {
    pub(crate) entries: &'t mut Vec<Entry>,
    pub(crate) in_use: &'t mut usize,
    limit: usize,
    immediate: &'t mut Vec<ImmediateAnswer>,
    pub(crate) translator: &'t mut Translator<Arc<GuestMemory>>,
    pub(crate) requests: usize,
}

impl Parser<'_> {
    /// Takes the chain that begins with descriptor `head`, whatever it is.
    pub fn next(&mut self, head: u16, limits: &Limits) -> Chain {
        let (index, table) = (usize::from(head), self.translator.table());
        if index >= self.entries.len() && !self.make(index, table.size) {
            let reason = MalformedChain::Index { index: head, size: table.size };
            return self.malformed(head, reason, None);
        }
        let entry = &mut self.entries[index];
        if !entry.is_free() {
            return Chain::InUse(head);
        }
        match parse(table, head, self.translator, limits, &mut entry.segments) {
            Parsed::Request { op, flags, offset, len, status_at, head } => {
                *self.in_use += 1;
                self.requests += 1;
                Chain::Request(head, entry.request(op, flags, offset, len, status_at))
            }
            Parsed::Answer { head, status_at, status, written, asked } => {
                give_up_long(&mut entry.segments);
                // What is in the list was written.
                entry.place = Place::Answered(status_at);
                (entry.op, entry.len) = (ANSWERED | kind(asked), data_len(status, written));
                let used = Used { head, len: written };
                self.immediate.push(ImmediateAnswer {
                    after: self.requests,
                    used,
                    answer: Some((status_at, status)),
                });
                Chain::Answer(self.translator.take_outside())
            }
            Parsed::Malformed { head, reason } => {
                give_up_long(&mut entry.segments);
                (entry.op, entry.place) = (NOTHING, Place::Unanswered);
                let outside = self.translator.take_outside();
                self.malformed(head, reason, outside)
            }
        }
    }

    #[cold]
    fn malformed(&mut self, head: u16, reason: MalformedChain, outside: Option<u64>) -> Chain {
        let used = Used { head, len: 0 };
        self.immediate.push(ImmediateAnswer { after: self.requests, used, answer: None });
        Chain::Malformed { head, reason, outside }
    }

    /// Makes entries up to that of a head. Returns `false` if no chain can begin there.
    #[cold]
    fn make(&mut self, head: usize, size: u16) -> bool {
        let is_head = head < usize::from(size).min(self.limit);
        if is_head {
            self.entries.resize_with(head + 1, Entry::default);
        }
        is_head
    }
}

/// What [`RequestTable::asked`] says.
const fn kind(asked: Asked) -> u32 {
    match asked {
        Asked::Request(op) => op,
        Asked::Serial => SERIAL,
        Asked::Unknown => UNKNOWN,
    }
}

/// How many bytes a chain got that was answered with so many for the used ring.
fn data_len(status: WireStatus, written: u32) -> u64 {
    if status == WireStatus::Ok { u64::from(written.saturating_sub(1)) } else { 0 }
}

/// Gives up the room of a list that has become longer than a driver's that heeds `seg_max`. It is
/// that of a chain which is no request for the domain.
#[inline]
fn give_up_long(segments: &mut Vec<RawSegment>) {
    const USUAL: usize = (SEG_MAX as usize).next_power_of_two();
    if segments.capacity() > USUAL {
        // An answer's data is in the first of them, of which few have no length.
        segments.truncate(USUAL);
        segments.shrink_to(USUAL);
    }
}

#[cfg(test)]
#[path = "requests_tests.rs"]
mod tests;
