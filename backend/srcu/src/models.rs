//! Models of this crate's own code: every interleaving, within a bound, under the memory model's
//! rules.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p srcu --release --lib`.
//!
//! A model's value holds a cell that the checker watches. A section reads it; an exchange and the
//! thread that frees a value write to it. So an access that is not ordered after, or before, all
//! others is found, even if it did no harm in that run. What is freed is leaked in truth, so that a
//! mistake shows as a broken rule and not as a broken process.
//!
//! Each mistake of `mutation.rs` is planted in a process of its own, in which the model that is
//! about it must fail.
//!
//! Not modelled: time (deadlines call `give_up` directly), the spinning before a wait, spurious
//! wakes, more than three threads, `check_outside` beyond its result, and orders that need more
//! preemptions than the bound. Read-modify-writes that a weak machine lets fail for no reason do
//! not fail here.

use crate::mutation::Mutation;
use crate::{Cell, Exchange, Gate, Handover, Reader};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use std::sync::Arc;
use std::time::Duration;

const POISON: u64 = u64::MAX;

struct Value {
    generation: u64,
    body: UnsafeCell<u64>,
}

// SAFETY: the checker finds out if the cell is written to while it is shared, and ends the model.
unsafe impl Sync for Value {}

impl Value {
    fn new(generation: u64) -> Self {
        Self { generation, body: UnsafeCell::new(generation) }
    }

    /// What a section does.
    fn check(&self) -> u64 {
        // SAFETY: the checker looks whether another thread writes.
        let body = self.body.with(|body| unsafe { *body });
        assert_eq!(body, self.generation, "a value that was freed");
        body
    }

    /// What must be alone: an exchange.
    fn alone(&self) {
        // SAFETY: the checker looks whether another thread reads or writes.
        self.body.with_mut(|body| {
            assert_eq!(unsafe { *body }, self.generation, "a value that was freed")
        });
    }
}

fn free(value: Box<Value>) {
    // SAFETY: as in `alone`.
    value.body.with_mut(|body| unsafe { *body = POISON });
    std::mem::forget(value);
}

fn exchange(generation: u64) -> Exchange<Value> {
    Box::new(move |old| {
        old.alone();
        Some(Value::new(generation))
    })
}

/// A worker that owes nothing: `times` looks, then it leaves.
fn work(reader: &mut Reader<Value>, times: usize) {
    let mut newest = 0;
    for _ in 0..times {
        let gate = reader.quiescent();
        let generation = reader.read().check();
        assert!(generation >= newest, "an older value than before");
        newest = generation;
        if gate == Gate::Shut {
            reader.arrive();
            let generation = reader.read().check();
            assert!(generation >= newest, "an older value than before");
            newest = generation;
        }
    }
}

/// A reader for another thread: forgets that this one made it.
fn attach(cell: &Arc<Cell<Value>>) -> Reader<Value> {
    let reader = cell.attach().unwrap();
    moves(cell, &reader);
    reader
}

fn moves(cell: &Arc<Cell<Value>>, reader: &Reader<Value>) {
    cell.slot(reader.index()).thread.store(0, Ordering::Relaxed);
}

/// Lies down and never wakes, if nothing has changed.
fn leak_sleep(reader: &mut Reader<Value>) -> bool {
    reader.sleep(false).map(std::mem::forget).is_some()
}

fn swap(cell: &Arc<Cell<Value>>, generation: u64) {
    let Ok(grace) = cell.swap(Value::new(generation)) else { panic!("busy") };
    let Ok(old) = grace.wait(Duration::MAX) else { panic!("no timeout was given") };
    free(old);
}

/// A handover without a deadline.
fn handover(cell: &Arc<Cell<Value>>, generation: u64) {
    let gate = cell.shut(exchange(generation)).unwrap();
    let Handover::Done { old: Some(old), panic: None, .. } = cell.await_exchange(gate, None) else {
        panic!("the exchange did not run");
    };
    free(old);
}

fn model(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.check(run);
}

fn cell(readers: usize) -> Arc<Cell<Value>> {
    Cell::new(Value::new(1), readers)
}

#[test]
fn section_against_swap() {
    model(4, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || work(&mut reader, 2));
        swap(&cell, 2);
        worker.join().unwrap();
    });
}

#[test]
fn attach_against_swap() {
    model(4, || {
        let cell = cell(1);
        let other = Arc::clone(&cell);
        let worker = thread::spawn(move || {
            let mut reader = attach(&other);
            reader.read().check();
            work(&mut reader, 1);
        });
        swap(&cell, 2);
        worker.join().unwrap();
    });
}

#[test]
fn sleep_against_swap() {
    model(4, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || {
            reader.read().check();
            drop(reader.sleep(false));
            reader.read().check();
            work(&mut reader, 1);
        });
        swap(&cell, 2);
        worker.join().unwrap();
    });
}

#[test]
fn two_swaps() {
    model(3, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || work(&mut reader, 2));
        let first = cell.swap(Value::new(2)).ok().unwrap();
        let second = cell.swap(Value::new(3)).ok().unwrap();
        for grace in [second, first] {
            free(grace.wait(Duration::MAX).ok().unwrap());
        }
        worker.join().unwrap();
    });
}

#[test]
fn leave_against_swap() {
    model(4, || {
        let cell = cell(1);
        let reader = attach(&cell);
        let other = Arc::clone(&cell);
        let worker = thread::spawn(move || {
            reader.read().check();
            drop(reader);
            // Another one in the same slot: the grace period must see through it.
            attach(&other).read().check();
        });
        swap(&cell, 2);
        worker.join().unwrap();
    });
}

#[test]
fn section_against_handover() {
    model(4, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || work(&mut reader, 2));
        handover(&cell, 2);
        worker.join().unwrap();
    });
}

#[test]
fn sleep_against_handover() {
    model(4, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || {
            reader.read().check();
            drop(reader.sleep(false));
            reader.read().check();
            work(&mut reader, 1);
        });
        handover(&cell, 2);
        worker.join().unwrap();
    });
}

/// It is not woken: the gate must take it as it lies.
#[test]
fn sleep_for_good_against_handover() {
    model(4, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || {
            reader.read().check();
            if !leak_sleep(&mut reader) {
                work(&mut reader, 1);
            }
            // Neither awake nor gone: the model has no more use for it.
            std::mem::forget(reader);
        });
        handover(&cell, 2);
        worker.join().unwrap();
    });
}

#[test]
fn leaked_sleep_against_handover() {
    model(3, || {
        let cell = cell(2);
        let mut reader = attach(&cell);
        let mut busy = attach(&cell);
        assert!(leak_sleep(&mut reader));
        let leaver = thread::spawn(move || drop(reader));
        let worker = thread::spawn(move || work(&mut busy, 1));
        handover(&cell, 2);
        leaver.join().unwrap();
        worker.join().unwrap();
    });
}

#[test]
fn leaked_sleep_used_again() {
    model(4, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || {
            leak_sleep(&mut reader);
            work(&mut reader, 2);
        });
        handover(&cell, 2);
        worker.join().unwrap();
    });
}

#[test]
fn two_readers_against_handover() {
    model(2, || {
        let cell = cell(2);
        let [mut one, mut two] = [attach(&cell), attach(&cell)];
        let one = thread::spawn(move || work(&mut one, 1));
        let two = thread::spawn(move || work(&mut two, 2));
        handover(&cell, 2);
        one.join().unwrap();
        two.join().unwrap();
    });
}

/// One parks at the gate, one is claimed or wakes there.
#[test]
fn park_and_wake() {
    model(2, || {
        let cell = cell(2);
        let mut parks = attach(&cell);
        let mut wakes = attach(&cell);
        let parks = thread::spawn(move || work(&mut parks, 1));
        let wakes = thread::spawn(move || {
            drop(wakes.sleep(false));
            wakes.read().check();
            work(&mut wakes, 1);
        });
        handover(&cell, 2);
        parks.join().unwrap();
        wakes.join().unwrap();
    });
}

/// Sleeps while it owes, before and at the gate; collects at the shut gate; arrives when nothing is
/// owed.
#[test]
fn owing_against_handover() {
    model(3, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || {
            drop(reader.sleep(true));
            reader.read().check();
            if reader.quiescent() == Gate::Shut {
                reader.read().check();
                drop(reader.sleep(true));
                reader.read().check();
                assert_eq!(reader.quiescent(), Gate::Shut, "the gate cannot open without us");
                reader.arrive();
                assert_eq!(reader.read().check(), 2);
            }
        });
        handover(&cell, 2);
        worker.join().unwrap();
    });
}

/// A reader that finds a gate before it found a swap, and sleeps there while it owes.
#[test]
fn owing_against_swap_and_handover() {
    model(2, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || {
            if reader.quiescent() == Gate::Shut {
                drop(reader.sleep(true));
                reader.read().check();
                reader.arrive();
            }
            reader.read().check();
        });
        let grace = cell.swap(Value::new(2)).ok().unwrap();
        let gate = cell.shut(exchange(3)).unwrap();
        free(grace.wait(Duration::MAX).ok().unwrap());
        let Handover::Done { old: Some(old), .. } = cell.await_exchange(gate, None) else {
            panic!()
        };
        free(old);
        worker.join().unwrap();
    });
}

#[test]
fn leave_against_handover() {
    model(4, || {
        let cell = cell(1);
        let reader = attach(&cell);
        let worker = thread::spawn(move || {
            reader.read().check();
            drop(reader);
        });
        handover(&cell, 2);
        worker.join().unwrap();
    });
}

#[test]
fn attach_against_handover() {
    model(4, || {
        let cell = cell(1);
        let other = Arc::clone(&cell);
        let worker = thread::spawn(move || {
            let mut reader = attach(&other);
            reader.read().check();
            work(&mut reader, 1);
        });
        handover(&cell, 2);
        worker.join().unwrap();
    });
}

/// Either the exchange runs and is reported, or it does not and the gate opens; never both.
#[test]
fn give_up_against_arrival() {
    model(4, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || work(&mut reader, 2));
        let gate = cell.shut(exchange(2)).unwrap();
        match cell.give_up(gate) {
            Some(Handover::TimedOut { .. }) => {}
            Some(Handover::Done { .. }) => panic!("given up and done"),
            None => {
                let Handover::Done { old: Some(old), .. } = cell.await_exchange(gate, None) else {
                    panic!()
                };
                free(old);
            }
        }
        worker.join().unwrap();
        let mut reader = attach(&cell);
        assert_ne!(reader.quiescent(), Gate::Shut, "left shut");
        reader.read().check();
    });
}

/// A thread that arrived at a gate that was given up is still busy claiming slots for it when the
/// next one is shut. The upgrader is a reader too, to save a thread.
#[test]
fn late_claim_against_next_gate() {
    model(2, || {
        let cell = cell(3);
        let mut late = attach(&cell);
        let mut other = attach(&cell);
        let gate = cell.shut(exchange(2)).unwrap();
        let late = thread::spawn(move || {
            late.arrive();
            late.read().check();
        });
        assert!(cell.give_up(gate).is_some(), "the other one has not arrived");
        let gate = cell.shut(exchange(2)).unwrap();
        other.arrive();
        other.read().check();
        let Handover::Done { old: Some(old), .. } = cell.await_exchange(gate, None) else {
            panic!()
        };
        free(old);
        late.join().unwrap();
    });
}

/// The same claimer, reduced to its claim, comes upon a reader that lies down at the next gate.
#[test]
fn late_claim_against_sleeper() {
    model(4, || {
        let cell = cell(1);
        let mut sleeper = attach(&cell);
        let gate = cell.shut(exchange(2)).unwrap();
        assert!(cell.give_up(gate).is_some(), "no reader has arrived");
        let other = Arc::clone(&cell);
        let late = thread::spawn(move || other.claim_all(gate.epoch));
        let gate = cell.shut(exchange(2)).unwrap();
        if !leak_sleep(&mut sleeper) {
            work(&mut sleeper, 1);
        }
        let Handover::Done { old: Some(old), .. } = cell.await_exchange(gate, None) else {
            panic!()
        };
        free(old);
        late.join().unwrap();
    });
}

#[test]
fn exchange_that_panics() {
    model(3, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let worker = thread::spawn(move || work(&mut reader, 2));
        let exchange: Exchange<Value> = Box::new(|old| {
            old.alone();
            std::panic::resume_unwind(Box::new("on purpose"))
        });
        let gate = cell.shut(exchange).unwrap();
        let Handover::Done { old: None, panic: Some(_), .. } = cell.await_exchange(gate, None)
        else {
            panic!()
        };
        worker.join().unwrap();
        assert_eq!(attach(&cell).read().check(), 1);
    });
}

/// One at a time: both run, one after the other, or one is told that it is busy.
#[test]
fn two_upgraders() {
    model(3, || {
        let cell = cell(1);
        let mut reader = attach(&cell);
        let ran = Arc::new(AtomicUsize::new(0));
        let worker = thread::spawn(move || work(&mut reader, 1));
        let upgrade = |cell: Arc<Cell<Value>>, ran: Arc<AtomicUsize>| {
            let Ok(gate) = cell.shut(Box::new(|old| {
                old.alone();
                Some(Value::new(old.generation + 1))
            })) else {
                return;
            };
            let Handover::Done { old: Some(old), .. } = cell.await_exchange(gate, None) else {
                panic!()
            };
            free(old);
            ran.fetch_add(1, Ordering::Relaxed);
        };
        let (other, count) = (Arc::clone(&cell), Arc::clone(&ran));
        let second = thread::spawn(move || upgrade(other, count));
        upgrade(Arc::clone(&cell), Arc::clone(&ran));
        second.join().unwrap();
        worker.join().unwrap();
        let ran = ran.load(Ordering::Relaxed);
        assert_eq!(attach(&cell).read().check(), 1 + ran as u64);
        assert!(ran > 0);
    });
}

/// Runs a model with a mistake planted, in a process of its own: a model that fails may end in an
/// abort.
fn must_fail(mutation: Mutation, model: &str) {
    let name = format!("models::{model}");
    let run = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env("SRCU_MUTATION", format!("{mutation:?}"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout) + String::from_utf8_lossy(&run.stderr);
    assert!(said.contains("running 1 test"), "no such model: {name}");
    assert!(!run.status.success(), "{name} does not find {mutation:?}");
    let found = said.lines().skip_while(|line| !line.contains("panicked at")).nth(1);
    println!("{mutation:?}: {}", found.expect("it failed, but not by a panic"));
}

macro_rules! mutants {
    ($($name:ident: $mutation:ident breaks $model:ident;)*) => {
        mod mutants {
            $(#[test]
            fn $name() {
                let _ = super::$model;
                super::must_fail(super::Mutation::$mutation, stringify!($model));
            })*
        }
    };
}

mutants! {
    look_then_count: LookThenCount breaks attach_against_swap;
    look_then_count_at_waking: LookThenCount breaks sleep_against_swap;
    no_fence_attaching: NoFenceOnline breaks attach_against_swap;
    no_fence_waking: NoFenceOnline breaks sleep_against_swap;
    no_fence_sleeping: NoFenceOutside breaks sleep_for_good_against_handover;
    no_fence_leaving: NoFenceOutside breaks leave_against_handover;
    no_fence_in_swap: NoFenceSwap breaks attach_against_swap;
    no_fence_in_handover: NoFenceShut breaks sleep_for_good_against_handover;
    relaxed_announcement: RelaxedAnnounce breaks section_against_swap;
    relaxed_leaving: RelaxedAnnounce breaks leave_against_swap;
    relaxed_sleep: RelaxedAnnounce breaks sleep_against_handover;
    relaxed_poll: RelaxedPoll breaks section_against_swap;
    relaxed_arrival: RelaxedArrival breaks two_readers_against_handover;
    relaxed_claim: RelaxedClaim breaks sleep_against_handover;
    relaxed_publication: RelaxedOpen breaks section_against_handover;
    no_notification: NoNotify breaks section_against_handover;
    no_second_look: NoRecheck breaks two_readers_against_handover;
    shut_after_panic: ShutAfterPanic breaks exchange_that_panics;
    shut_after_giving_up: ShutAfterGiveUp breaks give_up_against_arrival;
    giving_up_blindly: GiveUpBlindly breaks give_up_against_arrival;
    claim_by_store: ClaimByStore breaks park_and_wake;
    claim_twice: ClaimTwice breaks park_and_wake;
    claim_backwards: ClaimBackwards breaks late_claim_against_next_gate;
    sleep_on_any_claim: SleepOnAnyClaim breaks late_claim_against_sleeper;
    waking_while_held: WakeHeld breaks sleep_against_handover;
    attaching_while_held: AttachHeld breaks attach_against_handover;
    keeping_the_old_value_at_the_gate: KeepOldAtGate breaks owing_against_swap_and_handover;
    leaving_uncounted: LeaveUncounted breaks leave_against_handover;
}
