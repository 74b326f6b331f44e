//! Sleepable RCU for a handful of long-lived readers, with a gate.
//!
//! A [`Cell`] holds one value. Readers, one per worker thread, use it all the time; now and then an
//! upgrader replaces it. Two ways:
//!
//! * [`Cell::swap`] publishes a new value first and then waits until no reader uses the old one. No
//!   reader ever waits.
//! * [`Cell::handover`] shuts a gate, lets every reader come to it between two read sections, runs
//!   an *exchange* while none of them is inside, and opens it again.
//!
//! The scheme is quiescent-state-based: a reader does not count itself in and out, it says when it
//! is *between* sections, and only when it is asked. A read section therefore costs one load of a
//! line that is written only by upgrades, and two compares (`benches/read_side` has the figures).
//!
//! Why not count in and out: the flag-then-count order of the textbook is wrong (a reader passes
//! the flag, the upgrader sees zero and frees, the reader counts itself in), and the right order
//! costs a full barrier per section on one side or a round of interrupts on the other.
//! `tests/stress.rs` keeps the wrong one, and sees it fail.
//!
//! # The states of a slot
//!
//! ```text
//!              attach                     sleep(owing: false)
//!   Absent ------------------> Online ---------------------------> Asleep
//!     ^                        |  ^ |  ^                              |
//!     |         leave          |  | |  |            wake              |
//!     +------------------------+  | |  +------------------------------+
//!                                 | | sleep(owing: true)
//!                arrive, gate     | +------> Owing --> wake --> Online
//!                opens again      |
//!                     Arrived <---+
//! ```
//!
//! `Absent` and `Asleep` slots can be *claimed* for a shut gate by the first that gets there with a
//! compare-and-swap: the upgrader, a reader that arrives, or the reader that has just left. A
//! claimed reader that wakes waits at the gate like one that arrived; so does one that would attach
//! to a claimed slot. A reader that lay down and then sees the gate, unclaimed, gets up again.
//!
//! A reader whose guard of a sleep was leaked ([`Asleep::until_quiescent`]) is awake for the
//! compiler and asleep for the slot. It then has no value, and finds out: `quiescent`, `arrive` and
//! `sleep` wake it first, `read` panics, and dropping it turns `Asleep` into `Absent` with the
//! claim, if any, left as it is.
//!
//! # Why it is right
//!
//! Notation: W is the cell's word, S a reader's slot, P the pointer to the value. Epochs grow by
//! one with every change of W, and only the holder of the *exchange slot* changes W, or P.
//!
//! 1. *An online reader's value is not freed.* A reader uses P only as loaded after it saw some W
//!    of epoch e, open or shut, and S holds an epoch <= e with kind `Online` from before that load
//!    until it stores a newer epoch, or another kind, with Release, after its last use. `swap`
//!    frees only after it has read, with Acquire, from every slot an epoch >= its own or a kind
//!    that is outside. So each use happens before the free. Read-modify-writes by others (a claim,
//!    the next reader in the same slot) continue the release sequence.
//! 2. *A reader that comes online during a swap sees the new value or is waited for.* Reader: S :=
//!    Online, fence(SeqCst), load W. Upgrader: W := new, fence(SeqCst), load S. Of two SeqCst
//!    fences one is first: either the reader's load sees the new W, and with it (P is stored before
//!    W, Release; W is loaded with Acquire) the new P; or the upgrader's load sees Online, with an
//!    old epoch, and waits (case 1). A reader that finds W as it was when it lay down keeps its
//!    value: had anything been published since and freed, it would have seen another W. It is
//!    enough to see a slot outside once: the load may be on another thread than the fence, as long
//!    as it happens after it.
//! 3. *A reader that goes to sleep does not miss the gate.* Reader: S := Asleep, fence(SeqCst),
//!    load W. Upgrader: W := shut, fence(SeqCst), load S. Either the upgrader sees Asleep and
//!    claims it, or the reader sees W shut, and takes its slot back with a compare-and-swap, or
//!    finds it claimed *for that very gate*, and sleeps on. A claim for an earlier gate, by a
//!    thread that is late, counts for nothing. The same holds for leaving, where the reader claims
//!    for itself what it has left.
//! 4. *Each slot arrives at most once per gate.* A slot is counted by the successful
//!    compare-and-swap from (lower epoch, Absent or Asleep) to (gate's epoch, same kind), or by its
//!    online reader's own `arrive`. No transition leads from one to the other while the gate is
//!    shut: a claimed reader stays until it opens. Nor does the epoch of a slot outside ever fall
//!    while it can be claimed, so that a claimer from a gate that was given up takes nothing away
//!    from the gate of now; were it to, a slot would be counted twice, and an exchange run with a
//!    reader inside. The count carries the gate's epoch, so that an arrival at a gate that was
//!    given up meanwhile counts nowhere.
//! 5. *The exchange is alone.* It runs in the thread that brings the count to zero (AcqRel on the
//!    count: a release sequence over all arrivals, so it sees everything that every reader did
//!    before arriving; and a claim acquires what the sleeper did). Giving up is a compare-and-swap
//!    on the same word that succeeds only while the count is not zero.
//! 6. *No reader stays at an open gate.* A waiter looks at W under the mutex before it waits; the
//!    opener stores W and then takes the mutex, and then notifies. An exchange that panics, a
//!    deadline, and a `wake_owing` that panics all open the gate.
//!
//! # How far it is proved
//!
//! `src/models.rs` runs this code in a model checker, and plants each mistake of `src/mutation.rs`
//! to see that it is found: in cases 1 to 6 each fence and each Acquire or Release that the case
//! rests on, the compare-and-swaps, the order of epochs, the wake and its second look, and every
//! way to open. `tests/stress.rs` runs it by chance, `tests/api.rs` promise by promise.
//!
//! On paper only:
//!
//! * more than two readers at a gate, more than two swaps in a row, and schedules beyond the bound
//!   of preemptions; within it the search is not complete either, because the checker reorders an
//!   access only against the last one of the same object;
//! * fences of the standard: the checker's SeqCst fences synchronise with each other, which is a
//!   little more than the standard says. Its SeqCst accesses are no more than AcqRel, so nothing
//!   here rests on one;
//! * deadlines (the models call what they call), the spinning before a wait, spurious wakes and
//!   failures;
//! * a grace period that is polled on another thread than the one that swapped (case 2);
//! * 48 bits of epoch (an assertion), 16 of count (at most 65,535 slots);
//! * which thread a reader is on: a diagnosis, not a part of the protocol.
//!
//! Deliberately absent: what the value is, how requests are drained (a reader arrives when it says
//! so), and one upgrade at a time (the caller's lock; an update while a handover runs is an error
//! here, not a wait).

#[cfg(all(test, loom))]
mod models;
mod mutation;
mod reader;
mod sync;
mod update;
mod word;

pub use reader::{Asleep, Gate, Reader};
pub use update::{Exchange, Grace, Handover, Stalled, UpdateError};

use std::sync::Arc;
use sync::{AtomicPtr, AtomicU64, Condvar, Mutex};
use word::{Pending, SlotWord, Word};

/// Two cache lines, so that neither the line nor its prefetched neighbour is shared.
#[repr(align(128))]
struct Line<T>(T);

/// Written by upgrades only; read by every reader before every section.
struct Head<T> {
    word: AtomicU64,
    value: AtomicPtr<T>,
}

/// One reader's line: `word` is written by the reader, and by what claims it.
struct Slot {
    word: AtomicU64,
    /// Which thread the reader was last seen on (`sync::this_thread`). Not part of the protocol,
    /// nor of the models.
    thread: std::sync::atomic::AtomicU64,
}

/// What the upgrader leaves at the gate for the last arrival, and what it finds there afterwards.
enum ExchangeSlot<T> {
    Empty,
    Waiting(Exchange<T>),
    /// On which thread.
    Running(u64),
    Done(update::Outcome<T>),
}

/// A value that readers use while it is replaced. See the crate's page.
pub struct Cell<T> {
    head: Line<Head<T>>,
    pending: Line<AtomicU64>,
    slots: Box<[Line<Slot>]>,
    exchange_slot: Mutex<ExchangeSlot<T>>,
    /// Notified when a gate opens; its mutex is `exchange_slot`.
    opened: Condvar,
}

// SAFETY: the value is shared with reader threads (`Sync`) and moves to the upgrader's thread when
// it is replaced (`Send`); everything else in the cell is atomics and a mutex.
unsafe impl<T: Send + Sync> Sync for Cell<T> {}
// SAFETY: as above; the raw pointer owns its value.
unsafe impl<T: Send + Sync> Send for Cell<T> {}

impl<T: Send + Sync> Cell<T> {
    /// A cell with its first value, gate open, and room for `readers` readers (at most 65,535).
    ///
    /// # Panics
    /// If `readers` is 0 or more than that.
    pub fn new(value: T, readers: usize) -> Arc<Self> {
        assert!(
            readers > 0 && readers <= usize::from(u16::MAX),
            "a gate counts its readers in 16 bits"
        );
        let slot = || {
            let word = AtomicU64::new(SlotWord::new(0, word::Kind::Absent).0);
            Line(Slot { word, thread: std::sync::atomic::AtomicU64::new(0) })
        };
        Arc::new(Self {
            head: Line(Head {
                word: AtomicU64::new(Word::FIRST.0),
                value: AtomicPtr::new(Box::into_raw(Box::new(value))),
            }),
            pending: Line(AtomicU64::new(Pending::NONE.0)),
            slots: (0..readers).map(|_| slot()).collect(),
            exchange_slot: Mutex::new(ExchangeSlot::Empty),
            opened: Condvar::new(),
        })
    }
}

impl<T> Drop for Cell<T> {
    fn drop(&mut self) {
        let value = self.head.0.value.load(sync::Ordering::Relaxed);
        // SAFETY: the pointer came from `Box::into_raw` and is replaced only together with its
        // ownership; readers hold an `Arc` of the cell, so none is left.
        drop(unsafe { Box::from_raw(value) });
    }
}
