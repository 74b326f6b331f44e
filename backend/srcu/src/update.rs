//! The upgrader's side: swap and its grace period, handover and its rendezvous.

use crate::mutation::{Mutation, planted};
use crate::sync::{Ordering, full_fence, lock, order, spins, this_thread, yield_now};
use crate::word::{Kind, Pending, SlotWord, Word};
use crate::{Cell, ExchangeSlot};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What runs while every reader is at the gate: gets the value, and returns its successor, or
/// `None` to keep it.
///
/// It must not attach or wake a reader of the same cell: that panics, and is reported like any
/// other panic of an exchange.
pub type Exchange<T> = Box<dyn FnOnce(&T) -> Option<T> + Send>;

/// Why an update was not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateError {
    /// The calling thread has a reader online: it would wait for itself.
    InsideReadSection,
    /// A handover is under way.
    Busy,
}

impl std::fmt::Display for UpdateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::InsideReadSection => {
                "an update cannot be made by a thread whose reader is online: it would wait for itself"
            }
            Self::Busy => "another update is under way",
        })
    }
}

impl std::error::Error for UpdateError {}

/// The readers that hold an update up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stalled {
    /// Their [`Reader::index`](crate::Reader::index).
    pub readers: Vec<usize>,
}

/// How a handover ended.
pub enum Handover<T> {
    /// The exchange ran.
    Done {
        /// The old value, if the exchange returned a new one. No reader uses it.
        old: Option<Box<T>>,
        /// From gate shut to the last arrival.
        drain: Duration,
        /// From gate shut to gate open.
        pause: Duration,
        /// What the exchange panicked with, if it did; the old value was kept.
        panic: Option<Box<dyn Any + Send>>,
    },
    /// Not every reader arrived in time. The exchange did not run, the gate is open again.
    TimedOut {
        /// Who did not.
        stalled: Stalled,
        /// From gate shut to gate open.
        pause: Duration,
    },
}

pub(crate) struct Outcome<T> {
    old: Option<Box<T>>,
    started: Instant,
    opened: Instant,
    panic: Option<Box<dyn Any + Send>>,
}

impl<T: Send + Sync> Cell<T> {
    /// Publishes `new` at once and returns the old value's grace period. No reader waits.
    ///
    /// Earlier grace periods need not have ended.
    ///
    /// # Errors
    /// Nothing was published.
    pub fn swap(self: &Arc<Self>, new: T) -> Result<Grace<T>, UpdateError> {
        self.check_outside()?;
        let exchange_slot = lock(&self.exchange_slot);
        if !matches!(*exchange_slot, ExchangeSlot::Empty) {
            return Err(UpdateError::Busy);
        }
        let epoch = self.word().next_epoch();
        let new = Box::into_raw(Box::new(new));
        // AcqRel: Release publishes what `new` points to, Acquire takes over what the last
        // publication did.
        let old = self.head.0.value.swap(new, Ordering::AcqRel);
        // Release pairs with the Acquire in `word`: who sees this sees the new pointer.
        self.store_word(Word::open(epoch));
        // Case 2: pairs with the fence of a reader that comes online.
        full_fence(Mutation::NoFenceSwap);
        drop(exchange_slot);
        Ok(Grace { cell: Arc::clone(self), old, epoch, next: 0 })
    }

    /// Shuts the gate, waits until every reader has arrived or lies outside, runs `exchange`, and
    /// opens the gate.
    ///
    /// `wake_owing` is called once after the gate was shut, to wake readers that sleep and owe. It
    /// must not wait for anything that waits for the gate. The deadline `timeout` covers the
    /// rendezvous; an exchange that runs is waited for. The last to arrive runs the exchange: any
    /// reader's thread, or this one.
    ///
    /// # Errors
    /// The gate was not shut.
    ///
    /// # Panics If `wake_owing` does, after the gate was opened again. The exchange may have run;
    /// the old value is then dropped here.
    pub fn handover(
        self: &Arc<Self>,
        exchange: Exchange<T>,
        wake_owing: impl FnOnce(),
        timeout: Duration,
    ) -> Result<Handover<T>, UpdateError> {
        self.handover_while(exchange, wake_owing, timeout, |_| Duration::ZERO)
    }

    /// As [`handover`](Self::handover), but when the time is up `more` is asked, each time, how
    /// much longer those who have not arrived are to be waited for. Zero gives up.
    ///
    /// # Errors
    /// The gate was not shut.
    ///
    /// # Panics
    /// If `wake_owing` or `more` does, as for `wake_owing` in `handover`.
    pub fn handover_while(
        self: &Arc<Self>,
        exchange: Exchange<T>,
        wake_owing: impl FnOnce(),
        timeout: Duration,
        mut more: impl FnMut(&Stalled) -> Duration,
    ) -> Result<Handover<T>, UpdateError> {
        let gate = self.shut(exchange)?;
        let mut panic = catch_unwind(AssertUnwindSafe(wake_owing)).err();
        let timeout = if panic.is_some() { Duration::ZERO } else { timeout };
        let outcome = self.await_exchange_while(gate, Some(timeout), |stalled| {
            if panic.is_some() {
                return Duration::ZERO;
            }
            let asked = catch_unwind(AssertUnwindSafe(|| more(stalled)));
            asked.unwrap_or_else(|payload| {
                panic = Some(payload);
                Duration::ZERO
            })
        });
        match panic {
            None => Ok(outcome),
            Some(panic) => {
                drop(outcome);
                resume_unwind(panic)
            }
        }
    }

    /// Shuts the gate and claims the readers that are outside.
    pub(crate) fn shut(&self, exchange: Exchange<T>) -> Result<Shut, UpdateError> {
        self.check_outside()?;
        let mut exchange_slot = lock(&self.exchange_slot);
        if !matches!(*exchange_slot, ExchangeSlot::Empty) {
            return Err(UpdateError::Busy);
        }
        let epoch = self.word().next_epoch();
        *exchange_slot = ExchangeSlot::Waiting(exchange);
        // Relaxed: published by W. A late arrival at an earlier gate that sees it finds an epoch
        // that is not its own.
        self.pending.0.store(Pending::new(epoch, self.slots.len() as u64).0, Ordering::Relaxed);
        drop(exchange_slot);
        let at = Instant::now();
        // Release pairs with the Acquire in `word`: a thread that sees the
        // gate sees the count and the exchange slot.
        self.store_word(Word::shut(epoch));
        // Case 3: pairs with the fence of a reader that lies down or leaves.
        full_fence(Mutation::NoFenceShut);
        self.claim_all(epoch);
        Ok(Shut { epoch, at })
    }

    /// Changes W. Only the holder of the exchange slot does.
    fn store_word(&self, word: Word) {
        self.head.0.word.store(word.0, order(Ordering::Release, Mutation::RelaxedOpen));
    }

    /// Waits for the exchange of a shut gate, or gives it up after `timeout` (`None`: never).
    #[cfg(all(test, loom))]
    pub(crate) fn await_exchange(&self, gate: Shut, timeout: Option<Duration>) -> Handover<T> {
        self.await_exchange_while(gate, timeout, |_| Duration::ZERO)
    }

    /// Waits for the exchange of a shut gate. After `timeout` it is given up, unless `more` says
    /// not yet.
    fn await_exchange_while(
        &self,
        gate: Shut,
        timeout: Option<Duration>,
        mut more: impl FnMut(&Stalled) -> Duration,
    ) -> Handover<T> {
        let mut deadline = timeout.and_then(|timeout| gate.at.checked_add(timeout));
        let mut exchange_slot = lock(&self.exchange_slot);
        loop {
            if matches!(*exchange_slot, ExchangeSlot::Done(_)) {
                let ExchangeSlot::Done(outcome) =
                    std::mem::replace(&mut *exchange_slot, ExchangeSlot::Empty)
                else {
                    unreachable!()
                };
                return Handover::Done {
                    old: outcome.old,
                    drain: outcome.started.saturating_duration_since(gate.at),
                    pause: outcome.opened.saturating_duration_since(gate.at),
                    panic: outcome.panic,
                };
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            exchange_slot = match left {
                Some(Duration::ZERO) => {
                    drop(exchange_slot);
                    let longer = more(&self.missing(gate));
                    if !longer.is_zero() {
                        deadline = Instant::now().checked_add(longer);
                        exchange_slot = lock(&self.exchange_slot);
                        continue;
                    }
                    if let Some(given_up) = self.give_up(gate) {
                        return given_up;
                    }
                    // Too late: the exchange is running, and is waited for.
                    deadline = None;
                    lock(&self.exchange_slot)
                }
                Some(left) => {
                    self.opened
                        .wait_timeout(exchange_slot, left)
                        .unwrap_or_else(|poisoned| poisoned.into_inner())
                        .0
                }
                None => {
                    self.opened.wait(exchange_slot).unwrap_or_else(|poisoned| poisoned.into_inner())
                }
            };
        }
    }

    /// Opens the gate without an exchange, unless it has begun.
    pub(crate) fn give_up(&self, gate: Shut) -> Option<Handover<T>> {
        let mut found = Pending(self.pending.0.load(Ordering::Relaxed));
        let stalled = loop {
            if (found.epoch() != gate.epoch || found.count() == 0)
                && !planted(Mutation::GiveUpBlindly)
            {
                return None;
            }
            let stalled = self.missing(gate);
            // Case 5: an arrival that comes after this counts nowhere. Relaxed: a failure reads
            // nothing, a success publishes nothing; W does.
            let none = Pending::NONE.0;
            match self.pending.0.compare_exchange(
                found.0,
                none,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => break stalled,
                Err(now) => found = Pending(now),
            }
        };
        if !planted(Mutation::ShutAfterGiveUp) {
            self.store_word(Word::open(gate.epoch + 1));
        }
        let pause = gate.at.elapsed();
        let unrun = std::mem::replace(&mut *lock(&self.exchange_slot), ExchangeSlot::Empty);
        // Case 6: after the mutex was taken, after W was stored.
        if !planted(Mutation::NoNotify) {
            self.opened.notify_all();
        }
        drop(unrun);
        Some(Handover::TimedOut { stalled, pause })
    }

    /// Runs the exchange, publishes, opens. Called by the thread that arrived last at the gate of
    /// `epoch`.
    pub(crate) fn run_exchange(&self, epoch: u64) {
        let running = ExchangeSlot::Running(this_thread());
        let ExchangeSlot::Waiting(exchange) =
            std::mem::replace(&mut *lock(&self.exchange_slot), running)
        else {
            unreachable!(
                "the count reaches zero once per gate, with the exchange on the exchange_slot"
            )
        };
        let started = Instant::now();
        let value = self.head.0.value.load(Ordering::Acquire);
        // SAFETY: only an update frees the value, and this is the only one under way
        // (`ExchangeSlot`).
        let result = catch_unwind(AssertUnwindSafe(|| exchange(unsafe { &*value })));
        let (old, panic) = match result {
            Ok(Some(new)) => {
                // Release: P may be seen before W is, and then what it points to must be visible
                // too.
                self.head.0.value.store(Box::into_raw(Box::new(new)), Ordering::Release);
                // SAFETY: it came from `Box::into_raw`, it is not in the cell any more, and every
                // reader has arrived or lies outside: none uses it, and each loads the pointer
                // again before it reads (case 2).
                (Some(unsafe { Box::from_raw(value) }), None)
            }
            Ok(None) => (None, None),
            Err(panic) => (None, Some(panic)),
        };
        if planted(Mutation::ShutAfterPanic) && panic.is_some() {
            return;
        }
        // Relaxed: the next one to look at it has the exchange slot, or finds an epoch that is not
        // its own either way.
        self.pending.0.store(Pending::NONE.0, Ordering::Relaxed);
        // Release pairs with the Acquire in `word`: who sees the gate open sees the new value.
        self.store_word(Word::open(epoch + 1));
        let opened = Instant::now();
        *lock(&self.exchange_slot) = ExchangeSlot::Done(Outcome { old, started, opened, panic });
        // Case 6: after the mutex was taken, after W was stored.
        if !planted(Mutation::NoNotify) {
            self.opened.notify_all();
        }
    }

    /// A thread whose reader is online must not wait for it.
    ///
    /// Exact for a reader that stays on one thread. One that has moved is taken to be where it last
    /// attached, woke or found something changed; the worst that follows is a refusal too many, or
    /// an update that waits until its time is out.
    fn check_outside(&self) -> Result<(), UpdateError> {
        let me = this_thread();
        let inside = |slot: &crate::Line<crate::Slot>| {
            slot.0.thread.load(Ordering::Relaxed) == me
                && matches!(
                    SlotWord(slot.0.word.load(Ordering::Relaxed)).kind(),
                    Kind::Online | Kind::Owing
                )
        };
        if self.slots.iter().any(inside) { Err(UpdateError::InsideReadSection) } else { Ok(()) }
    }

    /// Who has not arrived at a gate.
    fn missing(&self, gate: Shut) -> Stalled {
        self.stalled(|slot| !slot.is_outside() || slot.epoch() != gate.epoch)
    }

    fn stalled(&self, holds_up: impl Fn(SlotWord) -> bool) -> Stalled {
        let holds_up =
            |&index: &usize| holds_up(SlotWord(self.slot(index).word.load(Ordering::Relaxed)));
        Stalled { readers: (0..self.slots.len()).filter(holds_up).collect() }
    }
}

/// A gate that is shut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shut {
    pub(crate) epoch: u64,
    at: Instant,
}

/// An old value whose readers have not all moved on yet.
///
/// Dropping it unfinished leaks the value: it is not known whether it is still used.
#[must_use = "the old value is leaked unless the grace period is waited for"]
pub struct Grace<T> {
    cell: Arc<Cell<T>>,
    old: *mut T,
    epoch: u64,
    /// Slots below this have been seen outside, or with our epoch. They cannot come to hold the old
    /// value again.
    next: usize,
}

// SAFETY: it owns the old value, which is `Send`, and shares it with readers, which takes `Sync`.
unsafe impl<T: Send + Sync> Send for Grace<T> {}

impl<T: Send + Sync> Grace<T> {
    /// Whether every reader has moved on.
    pub fn poll(&mut self) -> bool {
        while let Some(slot) = self.cell.slots.get(self.next) {
            // Acquire pairs with the Release of the reader's announcement: its last use of the old
            // value is before it (case 1), through a claim or another reader's coming too, which
            // are read-modify-writes.
            let slot = SlotWord(slot.0.word.load(order(Ordering::Acquire, Mutation::RelaxedPoll)));
            if slot.kind() == Kind::Online && slot.epoch() < self.epoch {
                return false;
            }
            self.next += 1;
        }
        true
    }

    /// Waits for the readers and returns the old value.
    ///
    /// # Errors
    /// Who holds it up after `timeout`, with the grace period, to be waited for again.
    pub fn wait(mut self, timeout: Duration) -> Result<Box<T>, (Self, Stalled)> {
        let started = Instant::now();
        let mut looks = 0;
        while !self.poll() {
            // Readers must not pay for telling us, so we look: at once for a while, then ever more
            // rarely.
            looks += 1;
            if looks <= spins() {
                std::hint::spin_loop();
                continue;
            }
            if started.elapsed() >= timeout {
                let epoch = self.epoch;
                let stalled =
                    self.cell.stalled(|slot| slot.kind() == Kind::Online && slot.epoch() < epoch);
                return Err((self, stalled));
            }
            if cfg!(loom) {
                yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(u64::from(looks - spins()).min(50) * 20));
            }
        }
        // SAFETY: it came from `Box::into_raw`, `swap` took it out of the cell, and no reader uses
        // it any more (cases 1 and 2).
        let old = unsafe { Box::from_raw(self.old) };
        Ok(old)
    }
}
