//! What the crate promises to its callers, one promise a test.
//!
//! Nothing here depends on luck: where threads take part, they are brought to a known place first.
//! No test needs the system beyond threads and time, so that an interpreter can run them too.

use srcu::{Cell, Gate, Handover, Reader, Stalled, UpdateError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(20);

fn plus_one(cell: &Arc<Cell<u64>>, timeout: Duration) -> Handover<u64> {
    cell.handover(Box::new(|value| Some(value + 1)), || {}, timeout).unwrap()
}

fn old(handover: Handover<u64>) -> Option<u64> {
    match handover {
        Handover::Done { old, panic: None, .. } => old.map(|old| *old),
        Handover::Done { .. } => panic!("the exchange panicked"),
        Handover::TimedOut { stalled, .. } => panic!("{stalled:?}"),
    }
}

fn stalled<T>(handover: Handover<T>) -> Vec<usize> {
    match handover {
        Handover::TimedOut { stalled, .. } => stalled.readers,
        Handover::Done { .. } => panic!("it was done"),
    }
}

/// Another thread, to its end.
fn elsewhere<R: Send>(run: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// Waits for what another thread is about to do.
fn until(mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < LONG, "it does not happen");
        thread::yield_now();
    }
}

#[test]
fn when_the_time_is_up_somebody_else_may_say_not_yet() {
    let cell = Cell::new(1, 2);
    let (mut one, two) = (cell.attach().unwrap(), cell.attach().unwrap());
    drop(two);
    let (told, heard) = mpsc::channel();
    thread::scope(|scope| {
        let upgrade = scope.spawn(|| {
            let more = |stalled: &Stalled| {
                told.send(stalled.readers.clone()).unwrap();
                SHORT
            };
            cell.handover_while(Box::new(|value| Some(value + 1)), || {}, Duration::ZERO, more)
        });
        // It is asked again and again, and always about the one that is missing.
        for _ in 0..3 {
            assert_eq!(heard.recv().unwrap(), [0]);
        }
        assert_eq!(one.quiescent(), Gate::Shut);
        one.arrive();
        assert_eq!(old(upgrade.join().unwrap().unwrap()), Some(1));
    });
    // Then it is given up, and the gate is open.
    let mut longer = [SHORT, Duration::ZERO].into_iter();
    let more = |_: &Stalled| longer.next().unwrap();
    let given_up =
        elsewhere(|| cell.handover_while(Box::new(|_| None), || {}, SHORT, more).unwrap());
    assert_eq!(stalled(given_up), [0]);
    assert_eq!(one.quiescent(), Gate::Changed);
}

#[test]
fn who_panics_when_the_time_is_up_leaves_the_gate_open() {
    let cell = Cell::new(1, 1);
    let mut reader = cell.attach().unwrap();
    let panics = |_: &Stalled| -> Duration { panic!("on purpose") };
    elsewhere(|| {
        let upgrade = || cell.handover_while(Box::new(|_| None), || {}, SHORT, panics);
        assert!(catch_unwind(AssertUnwindSafe(upgrade)).is_err());
    });
    assert_ne!(reader.quiescent(), Gate::Shut);
    drop(reader);
    assert_eq!(old(plus_one(&cell, LONG)), Some(1));
}

#[test]
fn a_reader_sees_a_swap_at_its_next_pass() {
    let cell = Cell::new(1, 1);
    let mut reader = cell.attach().unwrap();
    assert_eq!((reader.quiescent(), *reader.read()), (Gate::Open, 1));
    let grace = elsewhere(|| cell.swap(2).unwrap());
    assert_eq!(*reader.read(), 1, "not before its next quiescent state");
    assert_eq!((reader.quiescent(), *reader.read()), (Gate::Changed, 2));
    assert_eq!(reader.quiescent(), Gate::Open);
    assert_eq!(*grace.wait(LONG).ok().unwrap(), 1);
}

#[test]
fn a_handover_without_readers_runs_at_once() {
    let cell = Cell::new(1, 3);
    assert_eq!(old(plus_one(&cell, Duration::ZERO)), Some(1));
    assert_eq!(*cell.attach().unwrap().read(), 2);
}

#[test]
fn an_exchange_may_keep_the_value() {
    let cell = Cell::new(1, 1);
    assert_eq!(old(cell.handover(Box::new(|_| None), || {}, LONG).unwrap()), None);
    assert_eq!(*cell.attach().unwrap().read(), 1);
}

#[test]
fn an_exchange_that_panics_keeps_the_value_and_is_reported() {
    let cell = Cell::new(1, 1);
    let Handover::Done { old: None, panic: Some(panic), .. } =
        cell.handover(Box::new(|_| panic!("on purpose")), || {}, LONG).unwrap()
    else {
        panic!("not reported")
    };
    assert_eq!(panic.downcast_ref(), Some(&"on purpose"));
    assert_eq!(*cell.attach().unwrap().read(), 1);
    assert_eq!(old(plus_one(&cell, LONG)), Some(1), "the next one goes on");
}

#[test]
fn an_update_from_a_thread_whose_reader_is_online_is_refused() {
    let cell = Cell::new(1, 1);
    let mut reader = cell.attach().unwrap();
    let refused =
        |outcome: Option<UpdateError>| assert_eq!(outcome, Some(UpdateError::InsideReadSection));
    refused(cell.swap(2).err());
    refused(cell.handover(Box::new(|_| None), || {}, LONG).err());
    let asleep = reader.sleep(true).unwrap();
    refused(cell.handover(Box::new(|_| None), || {}, LONG).err());
    drop(asleep);
    let asleep = reader.sleep(false).unwrap();
    assert_eq!(old(plus_one(&cell, LONG)), Some(1), "asleep is outside");
    drop(asleep);
    assert_eq!((reader.quiescent(), *reader.read()), (Gate::Changed, 2));
    drop(reader);
    assert_eq!(old(plus_one(&cell, LONG)), Some(2));
}

#[test]
fn a_thread_is_not_taken_for_one_that_has_ended() {
    let cell = Cell::new(1, 1);
    // The reader outlives the thread that it was made on; the next thread may well get the same
    // stack and thread-locals.
    let _reader = elsewhere(|| cell.attach().unwrap());
    for _ in 0..8 {
        elsewhere(|| drop(cell.swap(2).unwrap()));
    }
}

#[test]
fn a_reader_that_moved_is_known_where_it_woke() {
    let cell = Cell::new(1, 1);
    let mut reader = elsewhere(|| cell.attach().unwrap());
    drop(reader.sleep(false));
    assert_eq!(cell.swap(2).err(), Some(UpdateError::InsideReadSection));
}

#[test]
fn an_update_while_another_runs_is_busy() {
    let cell = Cell::new(1, 1);
    let inside = Arc::clone(&cell);
    let exchange = Box::new(move |_: &u64| {
        assert_eq!(inside.swap(7).err(), Some(UpdateError::Busy));
        assert_eq!(inside.handover(Box::new(|_| None), || {}, LONG).err(), Some(UpdateError::Busy));
        None
    });
    assert_eq!(old(cell.handover(exchange, || {}, LONG).unwrap()), None);
    let busy = || assert_eq!(cell.swap(7).err(), Some(UpdateError::Busy));
    let _reader = elsewhere(|| cell.attach().unwrap());
    assert_eq!(stalled(cell.handover(Box::new(|_| None), busy, SHORT).unwrap()), [0]);
}

#[test]
fn a_handover_that_times_out_names_who_is_missing_and_lets_everybody_go_on() {
    let cell = Cell::new(1, 5);
    let [mut arrives, busy, mut owes, mut sleeps] =
        elsewhere(|| [(); 4].map(|()| cell.attach().unwrap()));
    assert_eq!([&arrives, &busy, &owes, &sleeps].map(Reader::index), [0, 1, 2, 3]);
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        let arriving = scope.spawn(|| {
            barrier.wait();
            until(|| arrives.quiescent() == Gate::Shut);
            arrives.arrive();
            (arrives.quiescent(), *arrives.read())
        });
        let owing = owes.sleep(true).unwrap();
        let sleeping = sleeps.sleep(false).unwrap();
        let wake_owing = || {
            barrier.wait();
        };
        let handover = elsewhere(|| {
            cell.handover(Box::new(|_| unreachable!()), wake_owing, Duration::from_millis(200))
        });
        assert_eq!(stalled(handover.unwrap()), [1, 2]);
        assert_eq!(arriving.join().unwrap(), (Gate::Changed, 1), "the gate is open");
        drop((owing, sleeping));
    });
    for reader in [&mut owes, &mut sleeps] {
        assert_ne!(reader.quiescent(), Gate::Shut);
        assert_eq!(*reader.read(), 1);
    }
    drop((arrives, busy, owes, sleeps));
    assert_eq!(old(plus_one(&cell, LONG)), Some(1), "the next one goes on");
}

#[test]
fn a_reader_arrives_and_the_last_one_runs_the_exchange() {
    let cell = Cell::new(1, 2);
    let (ran_on, ran) = mpsc::channel();
    // The upgrader counts readers that are not there, and could be the last to arrive until it has;
    // then it nudges.
    let (wake_owing, was_woken) = mpsc::channel();
    let (attached, cell) = (Barrier::new(2), &cell);
    thread::scope(|scope| {
        let at = &attached;
        let worker = scope.spawn(move || {
            let mut reader = cell.attach().unwrap();
            at.wait();
            until(|| reader.quiescent() == Gate::Shut);
            was_woken.recv().unwrap();
            reader.arrive();
            assert_eq!((reader.quiescent(), *reader.read()), (Gate::Changed, 2));
            thread::current().id()
        });
        attached.wait();
        let exchange = Box::new(move |value: &u64| {
            ran_on.send(thread::current().id()).unwrap();
            Some(value + 1)
        });
        assert_eq!(
            old(cell.handover(exchange, move || wake_owing.send(()).unwrap(), LONG).unwrap()),
            Some(1)
        );
        assert_eq!(worker.join().unwrap(), ran.recv().unwrap());
    });
}

#[test]
fn an_owing_reader_collects_at_the_shut_gate() {
    let cell = Cell::new(1, 1);
    let mut reader = elsewhere(|| cell.attach().unwrap());
    let (wake_owing, was_woken) = mpsc::channel();
    thread::scope(|scope| {
        let asleep = reader.sleep(true).unwrap();
        let upgrade = scope.spawn(|| {
            cell.handover(Box::new(|v| Some(v + 1)), move || wake_owing.send(()).unwrap(), LONG)
        });
        was_woken.recv().unwrap();
        drop(asleep);
        assert_eq!((reader.quiescent(), *reader.read()), (Gate::Shut, 1));
        assert!(reader.sleep(false).is_none(), "not without arriving");
        drop(reader.sleep(true).expect("it has seen the gate"));
        assert_eq!((reader.quiescent(), *reader.read()), (Gate::Shut, 1));
        reader.arrive();
        assert_eq!((reader.quiescent(), *reader.read()), (Gate::Changed, 2));
        assert_eq!(old(upgrade.join().unwrap().unwrap()), Some(1));
    });
}

/// It found the gate before it found the swap, and kept a value through a sleep in which that was
/// freed.
#[test]
fn a_gate_is_seen_with_the_value_that_it_was_shut_on() {
    let cell = Cell::new(1, 1);
    let mut reader = elsewhere(|| cell.attach().unwrap());
    let mut grace = cell.swap(2).unwrap();
    thread::scope(|scope| {
        let upgrade = scope.spawn(|| plus_one(&cell, LONG));
        until(|| reader.quiescent() == Gate::Shut);
        drop(reader.sleep(true).unwrap());
        assert!(grace.poll());
        assert_eq!(*reader.read(), 2);
        reader.arrive();
        assert_eq!(old(upgrade.join().unwrap()), Some(2));
    });
    assert_eq!(*grace.wait(LONG).ok().unwrap(), 1);
}

#[test]
fn sleep_is_refused_when_something_has_changed() {
    let cell = Cell::new(1, 1);
    let mut reader = cell.attach().unwrap();
    drop(elsewhere(|| cell.swap(2).unwrap()));
    assert!(reader.sleep(false).is_none());
    assert_eq!((reader.quiescent(), *reader.read()), (Gate::Changed, 2));
    assert!(reader.sleep(false).is_some());
}

#[test]
fn a_grace_period_that_does_not_end_can_be_waited_for_again() {
    let cell = Cell::new(1, 2);
    let [mut one, mut two] = elsewhere(|| [cell.attach().unwrap(), cell.attach().unwrap()]);
    let grace = cell.swap(2).unwrap();
    one.quiescent();
    let Err((mut grace, stalled)) = grace.wait(SHORT) else {
        panic!("the reader may still use it")
    };
    assert_eq!(stalled, Stalled { readers: vec![1] });
    assert!(!grace.poll());
    assert!(two.sleep(false).is_none(), "it has not seen the swap");
    two.quiescent();
    assert!(grace.poll());
    assert_eq!(*two.read(), 2);
    assert_eq!(*grace.wait(Duration::ZERO).ok().unwrap(), 1);
}

#[test]
fn grace_periods_may_overlap() {
    let cell = Cell::new(1, 1);
    let mut reader = elsewhere(|| cell.attach().unwrap());
    let mut first = cell.swap(2).unwrap();
    let mut second = cell.swap(3).unwrap();
    assert!(!first.poll() && !second.poll());
    assert_eq!((reader.quiescent(), *reader.read()), (Gate::Changed, 3));
    assert_eq!((*second.wait(LONG).ok().unwrap(), *first.wait(LONG).ok().unwrap()), (2, 1));
}

#[test]
fn there_is_room_for_as_many_readers_as_asked_for() {
    let cell = Cell::new(1, 2);
    let one = cell.attach().unwrap();
    let two = cell.attach().unwrap();
    assert!(cell.attach().is_none());
    assert_eq!((one.index(), two.index()), (0, 1));
    drop(one);
    assert_eq!(cell.attach().unwrap().index(), 0);
}

#[test]
fn a_cell_has_room_for_1_to_65535_readers() {
    assert!(catch_unwind(|| Cell::new(1, 0)).is_err());
    assert!(catch_unwind(|| Cell::new(1, 65_536)).is_err());
    // Each slot is a step that an interpreter takes minutes for.
    let most = if cfg!(miri) { 100 } else { 65_535 };
    assert_eq!(old(plus_one(&Cell::new(1, most), LONG)), Some(1));
}

#[test]
fn a_leaked_sleep_leaves_nothing_to_read_before_the_next_pass() {
    let cell = Cell::new(1, 1);
    let mut reader = cell.attach().unwrap();
    std::mem::forget(reader.sleep(false).unwrap());
    assert_eq!(old(plus_one(&cell, LONG)), Some(1), "asleep");
    assert!(catch_unwind(AssertUnwindSafe(|| *reader.read())).is_err(), "the value is gone");
    assert_eq!((reader.quiescent(), *reader.read()), (Gate::Changed, 2));
    std::mem::forget(reader.sleep(false).unwrap());
    assert_eq!(reader.sleep(false).map(drop), Some(()), "awake again, and asleep again");
    assert_eq!(*reader.read(), 2);
    reader.sleep(true).unwrap().until_quiescent();
    reader.arrive();
    assert_eq!(*reader.read(), 2);
}

/// Leaving must not count a second time a slot that was claimed in the sleep.
#[test]
fn a_reader_whose_sleep_was_leaked_leaves_without_arriving_twice() {
    let cell = Cell::new(1, 2);
    let [mut leaks, busy] = elsewhere(|| [cell.attach().unwrap(), cell.attach().unwrap()]);
    std::mem::forget(leaks.sleep(false).unwrap());
    let leave = move || drop(leaks);
    let handover = cell.handover(Box::new(|_| unreachable!("a reader is inside")), leave, SHORT);
    assert_eq!(stalled(handover.unwrap()), [1]);
    assert_eq!(*busy.read(), 1);
    drop(busy);
    assert_eq!(old(plus_one(&cell, LONG)), Some(1));
}

#[test]
fn a_reader_that_is_leaked_is_named() {
    let cell = Cell::new(1, 1);
    elsewhere(|| std::mem::forget(cell.attach()));
    assert_eq!(stalled(plus_one(&cell, SHORT)), [0]);
    assert_eq!(cell.swap(2).unwrap().wait(SHORT).err().unwrap().1.readers, [0]);
}

#[test]
fn an_exchange_that_would_wait_for_itself_panics() {
    let cell = Cell::new(1, 2);
    let inside = Arc::clone(&cell);
    let exchange = Box::new(move |_: &u64| {
        drop(inside.attach());
        Some(2)
    });
    let Handover::Done { old: None, panic: Some(_), .. } =
        cell.handover(exchange, || {}, LONG).unwrap()
    else {
        panic!("not reported")
    };
    assert_eq!(old(plus_one(&cell, LONG)), Some(1));
}

#[test]
fn a_reader_may_be_dropped_inside_an_exchange() {
    let cell = Cell::new(1, 2);
    let mut reader = cell.attach().unwrap();
    std::mem::forget(reader.sleep(false).unwrap());
    let exchange = Box::new(move |value: &u64| {
        drop(reader);
        Some(value + 1)
    });
    assert_eq!(old(cell.handover(exchange, || {}, LONG).unwrap()), Some(1));
    assert_eq!(old(plus_one(&cell, LONG)), Some(2));
}

#[test]
fn a_nudge_that_panics_leaves_the_gate_open() {
    let cell = Cell::new(1, 1);
    let mut reader = elsewhere(|| cell.attach().unwrap());
    let wake_owing = || panic!("on purpose");
    let upgrade = || cell.handover(Box::new(|v| Some(v + 1)), wake_owing, LONG);
    assert!(catch_unwind(AssertUnwindSafe(upgrade)).is_err());
    assert_eq!((reader.quiescent(), *reader.read()), (Gate::Changed, 1));
    drop(reader);
    // With no reader to wait for, the exchange has run before `wake_owing`.
    let upgrade = || cell.handover(Box::new(|v| Some(v + 1)), wake_owing, LONG);
    assert!(catch_unwind(AssertUnwindSafe(upgrade)).is_err());
    assert_eq!(old(plus_one(&cell, LONG)), Some(2));
}

#[test]
fn a_reader_that_panics_leaves_and_may_run_the_exchange_on_its_way() {
    let cell = Cell::new(1, 1);
    let attached = Barrier::new(2);
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut reader = cell.attach().unwrap();
            attached.wait();
            until(|| reader.quiescent() == Gate::Shut);
            let _value = reader.read();
            panic!("on purpose, in a section");
        });
        attached.wait();
        let exchange =
            Box::new(|_: &u64| panic!("on purpose, in an exchange, in a thread that unwinds"));
        let handover = cell.handover(exchange, || {}, LONG).unwrap();
        assert!(matches!(handover, Handover::Done { panic: Some(_), .. }));
        assert!(worker.join().is_err());
    });
    assert_eq!(old(plus_one(&cell, LONG)), Some(1));
}

#[test]
fn every_value_is_dropped_once() {
    struct Counted(Arc<AtomicUsize>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let drops = Arc::new(AtomicUsize::new(0));
    let cell = Cell::new(Counted(Arc::clone(&drops)), 1);
    drop(cell.swap(Counted(Arc::clone(&drops))).unwrap().wait(LONG));
    let new = Counted(Arc::clone(&drops));
    drop(cell.handover(Box::new(move |_| Some(new)), || {}, LONG));
    let unrun = Counted(Arc::clone(&drops));
    let reader = elsewhere(|| cell.attach().unwrap());
    drop(cell.handover(Box::new(move |_| Some(unrun)), || {}, Duration::ZERO));
    drop(cell);
    assert_eq!(drops.load(Ordering::Relaxed), 3, "a reader keeps the cell");
    drop(reader);
    assert_eq!(drops.load(Ordering::Relaxed), 4);
}
