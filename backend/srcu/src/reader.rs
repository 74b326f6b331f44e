//! The reader's side: read sections, sleeping, arriving at the gate, leaving.
//!
//! Read the cases on the crate's page first; each fence and ordering below names its case.

use crate::sync::{Ordering, SPINS, fence, lock};
use crate::update::this_thread;
use crate::word::{Kind, Pending, SlotWord, Word};
use crate::{Cell, Slot};
use std::sync::Arc;

/// What a reader finds between two read sections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Go on; the value is the one it was.
    Open,
    /// Go on; the value may be another one than before.
    Changed,
    /// Submit nothing new. [`Reader::read`] still gives the old value, to collect what is owed; when nothing is, [`Reader::arrive`].
    Shut,
}

/// One thread's right to use the value.
///
/// A reader that exists is online: it holds up upgrades until it next calls [`pass`](Self::pass), [`sleep`](Self::sleep) or is dropped. All of
/// these take `&mut self`, so that nothing borrowed from [`read`](Self::read) can outlive them.
pub struct Reader<T: Send + Sync> {
    cell: Arc<Cell<T>>,
    index: usize,
    /// W as of the last time that we looked.
    seen: Word,
    /// P as loaded after `seen`; null while asleep.
    value: *const T,
    asleep: bool,
    seen_before_sleep: Word,
    value_before_sleep: *const T,
}

// SAFETY: a reader may move to another thread between calls: all that it shares is in atomics, and `value` is used under `&self` only.
unsafe impl<T: Send + Sync> Send for Reader<T> {}

impl<T: Send + Sync> Cell<T> {
    /// Adds a reader. Waits while a gate is shut.
    ///
    /// Returns `None` if all slots are taken.
    pub fn attach(self: &Arc<Self>) -> Option<Reader<T>> {
        'again: loop {
            for index in 0..self.slots.len() {
                let slot = self.slot(index);
                // Acquire: if it was claimed, W as the claimer saw it, or newer, is what `is_held` sees.
                let found = SlotWord(slot.word.load(Ordering::Acquire));
                if found.kind() != Kind::Absent {
                    continue;
                }
                if self.is_held(found) {
                    self.wait_open(Word::shut(found.epoch()));
                    continue 'again;
                }
                let online = SlotWord::new(0, Kind::Online);
                // AcqRel: Acquire pairs with the leaving reader's Release; the rest is the fence's.
                if slot.word.compare_exchange(found.0, online.0, Ordering::AcqRel, Ordering::Relaxed).is_err()
                {
                    continue 'again;
                }
                slot.thread.store(this_thread(), Ordering::Relaxed);
                fence(Ordering::SeqCst); // Case 2: pairs with the upgrader's fence after its store to W.
                let mut reader = Reader {
                    cell: Arc::clone(self),
                    index,
                    seen: Word(0),
                    value: std::ptr::null(),
                    asleep: false,
                    seen_before_sleep: Word(0),
                    value_before_sleep: std::ptr::null(),
                };
                reader.look();
                return Some(reader);
            }
            return None;
        }
    }

    pub(crate) fn slot(&self, index: usize) -> &Slot {
        &self.slots[index].0
    }

    pub(crate) fn word(&self) -> Word {
        // Acquire pairs with the Release of whoever published or opened: P and everything before it is visible.
        Word(self.head.0.word.load(Ordering::Acquire))
    }

    /// Whether a slot that is not online counts as arrived at the gate that is shut now.
    fn is_held(&self, slot: SlotWord) -> bool {
        self.word() == Word::shut(slot.epoch())
    }

    /// Waits until W is no longer `shut`.
    fn wait_open(&self, shut: Word) {
        for _ in 0..SPINS {
            if self.word() != shut {
                return;
            }
            std::hint::spin_loop();
        }
        let mut desk = lock(&self.desk);
        while self.word() == shut {
            desk = self.opened.wait(desk).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Counts one slot as arrived at the gate of `epoch`; the last one runs the exchange. Returns whether the gate was still there.
    pub(crate) fn count_arrival(&self, epoch: u64) -> bool {
        let pending = &self.pending.0;
        let mut found = Pending(pending.load(Ordering::Relaxed));
        loop {
            if found.epoch() != epoch || found.count() == 0 {
                return false;
            }
            let less = Pending::new(epoch, found.count() - 1);
            // AcqRel: Release hands what we did to the last arrival, Acquire takes what all the earlier ones did (case 5).
            match pending.compare_exchange_weak(found.0, less.0, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) if less.count() == 0 => {
                    self.run_exchange(epoch);
                    return true;
                }
                Ok(_) => return true,
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
    pub(crate) fn claim(&self, index: usize, epoch: u64) {
        let slot = self.slot(index);
        let mut found = SlotWord(slot.word.load(Ordering::Relaxed));
        while matches!(found.kind(), Kind::Absent | Kind::Asleep) && found.epoch() != epoch {
            let claimed = SlotWord::new(epoch, found.kind());
            // Acquire pairs with the Release of the reader's `sleep` or leaving: what it did is handed on to the exchange.
            match slot.word.compare_exchange_weak(found.0, claimed.0, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => {
                    self.count_arrival(epoch);
                    return;
                }
                Err(now) => found = SlotWord(now),
            }
        }
    }
}

impl<T: Send + Sync> Reader<T> {
    /// Which slot it has: its own until it is dropped.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }

    /// Stands between two read sections. The usual case, nothing changed, is one load and a compare.
    #[inline]
    pub fn pass(&mut self) -> Gate {
        let word = self.cell.word();
        if word == self.seen && !word.is_shut() { Gate::Open } else { self.look() }
    }

    /// The value. Stays the same, and valid, until the next call that takes `&mut self`.
    ///
    /// # Panics
    /// If the reader sleeps: [`pass`](Self::pass) first.
    #[inline]
    #[must_use]
    #[track_caller]
    pub fn read(&self) -> &T {
        assert!(!self.value.is_null(), "a sleeping reader must pass before it reads");
        // SAFETY: our slot has been `Online` with an epoch not after the one that `value` was loaded at, since before the load; so
        // no upgrade frees it before we announce more (case 1), which takes `&mut self`. While we sleep, `value` is null.
        unsafe { &*self.value }
    }

    #[cold]
    #[inline(never)]
    fn look(&mut self) -> Gate {
        self.wake();
        let word = self.cell.word();
        if word.is_shut() {
            if self.value.is_null() {
                // Fresh: the exchange cannot run before we arrive, so P stays what it is.
                self.value = self.cell.head.0.value.load(Ordering::Acquire);
            }
            self.seen = word;
            return Gate::Shut;
        }
        if word == self.seen {
            return Gate::Open;
        }
        // Release: every use of the old value comes before this announcement (case 1).
        self.announce(SlotWord::new(word.epoch(), Kind::Online));
        self.seen = word;
        // Acquire pairs with the publication: P may be newer than W, and then what it points to must be visible too.
        self.value = self.cell.head.0.value.load(Ordering::Acquire);
        Gate::Changed
    }

    fn announce(&self, slot: SlotWord) {
        self.cell.slot(self.index).word.store(slot.0, Ordering::Release);
    }

    /// Arrives at the shut gate, with nothing in flight, and waits until it opens. The last to arrive runs the exchange.
    ///
    /// Afterwards [`pass`](Self::pass) tells what is there now. Does nothing if the gate is open.
    pub fn arrive(&mut self) {
        self.wake();
        let word = self.cell.word();
        if !word.is_shut() {
            return;
        }
        self.announce(SlotWord::new(word.epoch(), Kind::Arrived));
        // The upgrader does this too, but it may not have a CPU just now.
        self.cell.claim_all(word.epoch());
        if self.cell.count_arrival(word.epoch()) {
            self.cell.wait_open(word);
        }
        self.come_online();
    }

    /// Back from `Arrived`, `Asleep` or `Owing`.
    fn come_online(&mut self) {
        let slot = self.cell.slot(self.index);
        // Acquire: if we have been claimed, W as the claimer saw it, or newer, is what `is_held` sees.
        let mut found = SlotWord(slot.word.load(Ordering::Acquire));
        loop {
            if found.kind() == Kind::Asleep && self.cell.is_held(found) {
                self.cell.wait_open(Word::shut(found.epoch()));
            }
            // Epoch 0: nothing seen yet; an upgrader that finds this waits for us.
            let online = SlotWord::new(0, Kind::Online);
            match slot.word.compare_exchange(found.0, online.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => found = SlotWord(now),
            }
        }
        slot.thread.store(this_thread(), Ordering::Relaxed);
        self.look_again();
    }

    /// The slot has just become online, with epoch 0: is what we know still so?
    fn look_again(&mut self) {
        fence(Ordering::SeqCst); // Cases 2 and 3: pairs with the upgrader's fence after its store to W.
        let word = self.cell.word();
        if word == self.seen {
            // Nothing has happened; say so, because `pass` will not say it again.
            self.announce(SlotWord::new(word.epoch(), Kind::Online));
        } else {
            // Not the pointer from before, whatever comes next: while we were outside it may have been freed.
            self.value = self.cell.head.0.value.load(Ordering::Acquire);
            self.seen = Word(0);
        }
    }

    /// Goes to sleep outside any read section; `owing` says that completions are still to come, so that nobody may claim this reader.
    ///
    /// Returns whether it sleeps. If not, something has changed since the last [`pass`](Self::pass), and it is still online: look again first. A
    /// reader that owes may sleep at a shut gate that it has seen. The next [`pass`](Self::pass) wakes it, and waits if it was claimed for a gate
    /// that is shut then.
    pub fn sleep(&mut self, owing: bool) -> bool {
        if self.asleep {
            return true;
        }
        if !owing && self.seen.is_shut() {
            return false;
        }
        let kind = if owing { Kind::Owing } else { Kind::Asleep };
        let lying = SlotWord::new(self.seen.epoch(), kind);
        // Release: every use of the value comes before (case 1).
        self.announce(lying);
        fence(Ordering::SeqCst); // Case 3: pairs with the upgrader's fence after its store to W.
        if self.cell.word() != self.seen {
            let online = SlotWord::new(0, Kind::Online);
            let slot = self.cell.slot(self.index);
            // If this fails we have been claimed, and sleep on: the gate takes us as arrived (case 3).
            if slot.word.compare_exchange(lying.0, online.0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                self.look_again();
                return false;
            }
        }
        // The next `pass` must not take the short way, and `read` must find nothing.
        self.asleep = true;
        self.seen_before_sleep = std::mem::replace(&mut self.seen, Word(0));
        self.value_before_sleep = std::mem::replace(&mut self.value, std::ptr::null());
        true
    }

    /// Ends a sleep, if there is one.
    fn wake(&mut self) {
        if std::mem::take(&mut self.asleep) {
            self.seen = self.seen_before_sleep;
            self.value = self.value_before_sleep;
            self.come_online();
        }
    }
}

impl<T: Send + Sync> Drop for Reader<T> {
    /// Leaves. Leaving counts as arriving, so whoever drops a reader must have nothing in flight; it may run an exchange.
    fn drop(&mut self) {
        self.cell.slot(self.index).thread.store(0, Ordering::Relaxed);
        let slot = self.cell.slot(self.index);
        let mut found = SlotWord(slot.word.load(Ordering::Acquire));
        loop {
            // A sleeper that was claimed has been counted: it keeps the claim (case 4).
            let epoch = if found.kind() == Kind::Asleep { found.epoch() } else { 0 };
            // Release: every use of the value comes before (case 1).
            let absent = SlotWord::new(epoch, Kind::Absent);
            match slot.word.compare_exchange(found.0, absent.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => found = SlotWord(now),
            }
        }
        fence(Ordering::SeqCst); // Case 3.
        let word = self.cell.word();
        if word.is_shut() {
            self.cell.claim(self.index, word.epoch());
        }
    }
}
