//! The reader's side: read sections, sleeping, arriving at the gate, leaving.
//!
//! Read the cases on the crate's page first; each fence and ordering below names its case.
//!
//! One invariant besides them: [`Reader`]'s `value` is null exactly while the slot is not `Online`.
//! Safe code can let go of the guard of a sleep and have the reader in its hands while the slot
//! says `Asleep`; every method finds out by this.

use crate::mutation::{Mutation, planted};
use crate::sync::{Ordering, full_fence, lock, order, spins, this_thread};
use crate::word::{Kind, Pending, SlotWord, Word};
use crate::{Cell, ExchangeSlot, Slot};
use std::ptr;
use std::sync::Arc;

/// What a reader finds between two read sections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Go on; the value is the one it was.
    Open,
    /// Go on; the value may be another one than before.
    Changed,
    /// Submit nothing new. [`Reader::read`] gives the value that the exchange will be given, to
    /// collect what is owed; when nothing is, [`Reader::arrive`]. The first time after a swap this
    /// is already the swap's new value.
    Shut,
}

/// One thread's right to use the value.
///
/// A reader that exists is online: it holds up upgrades until it next calls
/// [`quiescent`](Self::quiescent), [`sleep`](Self::sleep) or is dropped. All of these take `&mut
/// self`, so that nothing borrowed from [`read`](Self::read) can outlive them. One that is leaked
/// stays online for ever: no grace period ends, no handover succeeds, and both name it.
pub struct Reader<T: Send + Sync> {
    cell: Arc<Cell<T>>,
    index: usize,
    /// W as of the last time that we looked.
    seen: Word,
    /// The same if the gate was open then, else nothing: all that the usual case compares.
    open: Word,
    /// P as loaded after `seen`. Null: the slot is not online.
    value: *const T,
    /// Both, as of lying down: still good if W has not changed when we wake.
    before: (Word, *const T),
}

// SAFETY: a reader may move to another thread between calls: all that it shares is in atomics, and
// `value` is used under `&self` only. The value is used on that thread (`Sync`).
unsafe impl<T: Send + Sync> Send for Reader<T> {}

impl<T: Send + Sync> Cell<T> {
    /// Adds a reader. Returns `None` if all slots are taken.
    ///
    /// Waits if the free slot already counts as arrived at a shut gate. Otherwise the reader takes
    /// part in the rendezvous like any other: its first [`quiescent`](Reader::quiescent) says
    /// [`Gate::Shut`].
    ///
    /// # Panics
    /// Inside an exchange, which would wait for itself.
    pub fn attach(self: &Arc<Self>) -> Option<Reader<T>> {
        'again: loop {
            for index in 0..self.slots.len() {
                let slot = self.slot(index);
                // Acquire: if it was claimed, W as the claimer saw it, or newer, is what `is_held`
                // sees.
                let found = SlotWord(slot.word.load(Ordering::Acquire));
                if found.kind() != Kind::Absent {
                    continue;
                }
                if self.is_held(found) && !planted(Mutation::AttachHeld) {
                    self.wait_open(Word::shut(found.epoch()));
                    continue 'again;
                }
                let online = SlotWord::new(0, Kind::Online);
                let early = self.early_look();
                // AcqRel: Acquire pairs with the leaving reader's Release; Release hands that on to
                // `Grace::poll`.
                if slot
                    .word
                    .compare_exchange(found.0, online.0, Ordering::AcqRel, Ordering::Relaxed)
                    .is_err()
                {
                    continue 'again;
                }
                // Case 2: pairs with the upgrader's, after its store to W.
                full_fence(Mutation::NoFenceOnline);
                let mut reader = Reader {
                    cell: Arc::clone(self),
                    index,
                    seen: Word::NONE,
                    open: Word::NONE,
                    value: ptr::null(),
                    before: Reader::<T>::NOTHING,
                };
                reader.adopt(early.map_or_else(|| self.word(), |(word, _)| word));
                if let Some((_, value)) = early {
                    reader.value = value;
                }
                return Some(reader);
            }
            return None;
        }
    }

    pub(crate) fn slot(&self, index: usize) -> &Slot {
        &self.slots[index].0
    }

    pub(crate) fn word(&self) -> Word {
        // Acquire pairs with the Release of the thread that published or opened: P and everything
        // before it is visible.
        Word(self.head.0.word.load(Ordering::Acquire))
    }

    /// The textbook's mistake, if it is planted: what W and P say before the slot says that we are
    /// online.
    fn early_look(&self) -> Option<(Word, *const T)> {
        planted(Mutation::LookThenCount)
            .then(|| (self.word(), self.head.0.value.load(Ordering::Acquire).cast_const()))
    }

    /// Whether a slot that is not online counts as arrived at the gate that is shut now.
    fn is_held(&self, slot: SlotWord) -> bool {
        self.word() == Word::shut(slot.epoch())
    }

    /// Waits until W is no longer `shut`.
    fn wait_open(&self, shut: Word) {
        for _ in 0..spins() {
            if self.word() != shut {
                return;
            }
            std::hint::spin_loop();
        }
        let early = planted(Mutation::NoRecheck) && self.word() == shut;
        let mut exchange_slot = lock(&self.exchange_slot);
        if early {
            drop(self.opened.wait(exchange_slot));
            return;
        }
        while self.word() == shut {
            assert!(
                !matches!(*exchange_slot, ExchangeSlot::Running(thread) if thread == this_thread()),
                "an exchange must not attach or wake a reader of its own cell: it would wait for itself"
            );
            exchange_slot =
                self.opened.wait(exchange_slot).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Counts one slot as arrived at the gate of `epoch`, if it is still there; the last one runs
    /// the exchange.
    fn count_arrival(&self, epoch: u64) {
        let pending = &self.pending.0;
        let mut found = Pending(pending.load(Ordering::Relaxed));
        // Another epoch: that gate was given up. Count 0 cannot be, this slot has not been counted
        // yet.
        while found.epoch() == epoch && found.count() > 0 {
            let less = Pending::new(epoch, found.count() - 1);
            // AcqRel: Release hands what we did to the last arrival, Acquire takes what all the
            // earlier ones did (case 5).
            let arrival = order(Ordering::AcqRel, Mutation::RelaxedArrival);
            match pending.compare_exchange_weak(found.0, less.0, arrival, Ordering::Relaxed) {
                Ok(_) if less.count() == 0 => return self.run_exchange(epoch),
                Ok(_) => return,
                Err(now) => found = Pending(now),
            }
        }
    }

    /// Claims every slot that lies outside.
    pub(crate) fn claim_all(&self, epoch: u64) {
        for index in 0..self.slots.len() {
            self.claim(index, epoch);
        }
    }

    /// Claims a slot that is `Absent` or `Asleep` for the gate of `epoch`, and counts it.
    ///
    /// That gate may have been given up, and another one shut, since the caller looked: epochs of
    /// slots only grow, so that a late claim never takes away what a newer gate has claimed and
    /// counted (case 4).
    fn claim(&self, index: usize, epoch: u64) {
        let slot = self.slot(index);
        let is_claimable = |found: SlotWord| {
            matches!(found.kind(), Kind::Absent | Kind::Asleep)
                && (found.epoch() < epoch
                    || planted(Mutation::ClaimTwice)
                    || planted(Mutation::ClaimBackwards) && found.epoch() != epoch)
        };
        let mut found = SlotWord(slot.word.load(Ordering::Relaxed));
        while is_claimable(found) {
            let claimed = SlotWord::new(epoch, found.kind());
            if planted(Mutation::ClaimByStore) {
                slot.word.store(claimed.0, Ordering::Release);
                return self.count_arrival(epoch);
            }
            // AcqRel: Acquire pairs with the Release of the reader's `sleep` or leaving, for the
            // exchange to see what it did; Release shows W to a reader that finds itself claimed
            // (`is_held`).
            let claim = order(Ordering::AcqRel, Mutation::RelaxedClaim);
            match slot.word.compare_exchange_weak(found.0, claimed.0, claim, Ordering::Relaxed) {
                Ok(_) => return self.count_arrival(epoch),
                Err(now) => found = SlotWord(now),
            }
        }
    }
}

impl<T: Send + Sync> Reader<T> {
    /// `before`, when nothing from before is good.
    const NOTHING: (Word, *const T) = (Word::NONE, ptr::null());

    /// Which slot it has: its own until it is dropped.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }

    /// Stands between two read sections. The usual case, nothing changed, is one load and a
    /// compare.
    ///
    /// Wakes a reader whose sleep was not ended ([`Asleep::until_quiescent`]); that waits while it
    /// counts as arrived at a shut gate.
    #[inline]
    pub fn quiescent(&mut self) -> Gate {
        if self.cell.word() == self.open { Gate::Open } else { self.look() }
    }

    /// The value. Stays the same, and valid, until the next call that takes `&mut self`.
    ///
    /// # Panics In a sleep that was left to end with the next [`quiescent`](Self::quiescent)
    /// ([`Asleep::until_quiescent`]), or whose guard was leaked.
    #[inline]
    #[must_use]
    pub fn read(&self) -> &T {
        // SAFETY: `value` is null, or our slot has been `Online`, since before it was loaded, with
        // an epoch not after the one that it was loaded at; so no upgrade frees it before we
        // announce more (case 1), which takes `&mut self`.
        match unsafe { self.value.as_ref() } {
            Some(value) => value,
            None => not_online(),
        }
    }

    #[cold]
    #[inline(never)]
    fn look(&mut self) -> Gate {
        self.wake_if_asleep();
        let word = self.cell.word();
        if word != self.seen {
            return self.adopt(word);
        }
        if word.is_shut() { Gate::Shut } else { Gate::Open }
    }

    /// Online, and between two sections: takes note of a W that is new to us, and takes up the
    /// value of now.
    fn adopt(&mut self, word: Word) -> Gate {
        self.open = if word.is_shut() { Word::NONE } else { word };
        if planted(Mutation::KeepOldAtGate) && word.is_shut() && !self.value.is_null() {
            self.seen = word;
            return Gate::Shut;
        }
        self.cell.slot(self.index).thread.store(this_thread(), Ordering::Relaxed);
        // Release inside: every use of the old value comes before this announcement (case 1).
        self.announce(SlotWord::new(word.epoch(), Kind::Online));
        self.seen = word;
        // Acquire pairs with the publication: P may be newer than W, and then what it points to
        // must be visible too.
        self.value = self.cell.head.0.value.load(Ordering::Acquire);
        if word.is_shut() { Gate::Shut } else { Gate::Changed }
    }

    /// Only from `Online`, `Owing` and `Arrived`: no other thread changes a slot that says so.
    fn announce(&self, slot: SlotWord) {
        let release = order(Ordering::Release, Mutation::RelaxedAnnounce);
        self.cell.slot(self.index).word.store(slot.0, release);
    }

    /// Arrives at the shut gate, with nothing in flight, and waits until it opens. The last to
    /// arrive runs the exchange.
    ///
    /// Afterwards [`quiescent`](Self::quiescent) tells what is there now. Does nothing if the gate
    /// is open.
    pub fn arrive(&mut self) {
        self.wake_if_asleep();
        let word = self.cell.word();
        if !word.is_shut() {
            return;
        }
        self.before = Self::NOTHING;
        self.go_outside(SlotWord::new(word.epoch(), Kind::Arrived));
        // The upgrader does this too, but it may not have a CPU just now.
        self.cell.claim_all(word.epoch());
        self.cell.count_arrival(word.epoch());
        self.come_online();
    }

    /// Announces that we are outside, after the last use of the value (case 1).
    fn go_outside(&mut self, slot: SlotWord) {
        (self.seen, self.open) = (Word::NONE, Word::NONE);
        self.value = ptr::null();
        self.announce(slot);
    }

    fn wake_if_asleep(&mut self) {
        if self.value.is_null() {
            self.come_online();
        }
    }

    /// Back from `Arrived`, `Asleep` or `Owing`. Waits while the slot counts as arrived at a shut
    /// gate.
    fn come_online(&mut self) {
        let cell = &self.cell;
        let slot = cell.slot(self.index);
        // Acquire: if we have been claimed, W as the claimer saw it, or newer, is what `is_held`
        // sees.
        let mut found = SlotWord(slot.word.load(Ordering::Acquire));
        loop {
            let holds = matches!(found.kind(), Kind::Arrived | Kind::Asleep);
            if holds && cell.is_held(found) && !planted(Mutation::WakeHeld) {
                cell.wait_open(Word::shut(found.epoch()));
            }
            let early = cell.early_look().map(|(word, _)| word);
            // Epoch 0: nothing seen yet; an upgrader that finds this waits for us.
            let online = SlotWord::new(0, Kind::Online);
            match slot.word.compare_exchange(found.0, online.0, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return self.resume(early),
                Err(now) => found = SlotWord(now),
            }
        }
    }

    /// The slot has just become online, with epoch 0: is what we knew before still so?
    fn resume(&mut self, early: Option<Word>) {
        self.cell.slot(self.index).thread.store(this_thread(), Ordering::Relaxed);
        // Cases 2 and 3: pairs with the upgrader's, after its store to W.
        full_fence(Mutation::NoFenceOnline);
        let word = early.unwrap_or_else(|| self.cell.word());
        if word == self.before.0 {
            // Nothing has happened; say so, because `quiescent` will not say it again.
            self.announce(SlotWord::new(word.epoch(), Kind::Online));
            (self.seen, self.value) = self.before;
            self.open = if word.is_shut() { Word::NONE } else { word };
        } else {
            // Not the pointer from before: while we were outside it may have been freed. `seen`
            // stays nothing, so that the next `quiescent` says that something changed.
            self.value = self.cell.head.0.value.load(Ordering::Acquire);
        }
    }

    /// Goes to sleep outside any read section. The sleep ends when the guard is dropped.
    ///
    /// `owing` says that completions are still to come: this reader may not be claimed for a
    /// handover, it has to be woken, to collect, and to arrive. It holds up no swap's grace period:
    /// the thread that retires the old value must know by itself what it still owes. Waking waits
    /// only if the reader did not owe and counts as arrived at a gate that is shut.
    ///
    /// Returns `None`, still online, if something has changed since the last
    /// [`quiescent`](Self::quiescent): look again first. A reader that owes may sleep at a shut
    /// gate that it has seen, one that does not must [`arrive`](Self::arrive).
    pub fn sleep(&mut self, owing: bool) -> Option<Asleep<'_, T>> {
        self.wake_if_asleep();
        if !owing && self.seen.is_shut() {
            return None;
        }
        let seen = self.seen;
        self.before = (seen, self.value);
        let lying = SlotWord::new(seen.epoch(), if owing { Kind::Owing } else { Kind::Asleep });
        self.go_outside(lying);
        // Case 3: pairs with the upgrader's, after its store to W.
        full_fence(Mutation::NoFenceOutside);
        let word = self.cell.word();
        if word != seen && !self.is_taken(word) {
            self.come_online();
            return None;
        }
        Some(Asleep { reader: self })
    }

    /// Asleep, and W says `word`: whether the gate that it tells of has us as arrived already, so
    /// that we can sleep on.
    fn is_taken(&self, word: Word) -> bool {
        let slot = &self.cell.slot(self.index).word;
        if planted(Mutation::SleepOnAnyClaim) {
            let lying = SlotWord::new(self.before.0.epoch(), Kind::Asleep).0;
            return slot
                .compare_exchange(lying, lying, Ordering::AcqRel, Ordering::Relaxed)
                .is_err();
        }
        // Relaxed: nothing is read on the strength of it.
        let slot = SlotWord(slot.load(Ordering::Relaxed));
        slot.kind() == Kind::Asleep && word == Word::shut(slot.epoch())
    }
}

#[cold]
#[inline(never)]
#[track_caller]
fn not_online() -> ! {
    panic!("a reader that sleeps has no value: quiescent() before read()")
}

/// A reader that sleeps. Dropping it wakes the reader.
#[must_use = "dropping it ends the sleep at once"]
pub struct Asleep<'r, T: Send + Sync> {
    reader: &'r mut Reader<T>,
}

impl<T: Send + Sync> Asleep<'_, T> {
    /// Lets the reader sleep on until its next [`quiescent`](Reader::quiescent), for an event loop
    /// that cannot hold the guard.
    pub fn until_quiescent(self) {
        std::mem::forget(self);
    }
}

impl<T: Send + Sync> Drop for Asleep<'_, T> {
    fn drop(&mut self) {
        self.reader.come_online();
    }
}

impl<T: Send + Sync> Drop for Reader<T> {
    /// Leaves. Leaving counts as arriving, so a reader that is dropped must have nothing in flight;
    /// it may run an exchange.
    fn drop(&mut self) {
        let slot = self.cell.slot(self.index);
        slot.thread.store(0, Ordering::Relaxed);
        // Only a leaked guard makes it anything but `Online`. A claim stays what it is.
        let mut found = SlotWord(slot.word.load(Ordering::Relaxed));
        loop {
            let epoch = if matches!(found.kind(), Kind::Asleep | Kind::Arrived) {
                found.epoch()
            } else {
                0
            };
            let absent = SlotWord::new(epoch, Kind::Absent);
            // Release: every use of the value comes before (case 1). Acquire: so does what a
            // claimer did.
            let release = order(Ordering::AcqRel, Mutation::RelaxedAnnounce);
            match slot.word.compare_exchange(found.0, absent.0, release, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => found = SlotWord(now),
            }
        }
        // Case 3: pairs with the upgrader's, after its store to W.
        full_fence(Mutation::NoFenceOutside);
        let word = self.cell.word();
        if word.is_shut() && !planted(Mutation::LeaveUncounted) {
            self.cell.claim(self.index, word.epoch());
        }
    }
}
