//! Everything at once, by chance, on the real machine; and a control that shows that this would
//! find the textbook's mistake.
//!
//! Ten seconds, or `SRCU_STRESS_SECONDS`. In the manner of the kernel's `rcutorture`: the value is
//! poisoned when it is dropped, sections look at it several times, and every thread counts what it
//! sees.
#![cfg(not(loom))]

use srcu::{Cell, Gate, Handover, Reader, UpdateError};
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const SOUND: u64 = 0x5afe_5afe_5afe_5afe;
const POISON: u64 = 0xdead_dead_dead_dead;
const READERS: usize = 4;
const UPGRADERS: usize = 2;

fn budget() -> Duration {
    let seconds =
        std::env::var("SRCU_STRESS_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(10))
}

struct Value {
    generation: u64,
    canary: AtomicU64,
}

impl Value {
    fn new(generation: u64) -> Self {
        Self { generation, canary: AtomicU64::new(SOUND) }
    }

    fn check(&self) -> u64 {
        assert_eq!(self.canary.load(Ordering::Relaxed), SOUND, "a value that was freed");
        self.generation
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        assert_eq!(self.canary.swap(POISON, Ordering::Relaxed), SOUND, "freed twice");
    }
}

/// xorshift64*: chance does not have to be good here.
struct Chance(u64);

impl Chance {
    fn new() -> Self {
        Self(RandomState::new().build_hasher().finish() | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Mostly nothing, sometimes long.
    fn dawdle(&mut self) {
        match self.below(1000) {
            0 => thread::sleep(Duration::from_micros(self.below(300))),
            1..20 => thread::yield_now(),
            _ => (0..self.below(60)).for_each(|_| std::hint::spin_loop()),
        }
    }
}

#[derive(Default)]
struct World {
    stop: AtomicBool,
    /// Readers in a section.
    inside: AtomicUsize,
    sections: AtomicU64,
    swaps: AtomicU64,
    handovers: AtomicU64,
    timeouts: AtomicU64,
    busy: AtomicU64,
    panics: AtomicU64,
    /// The newest generation that was published.
    newest: AtomicU64,
    /// Who alone may upgrade, unless he does not ask.
    turn: Mutex<()>,
}

impl World {
    fn count(&self, what: &AtomicU64) {
        what.fetch_add(1, Ordering::Relaxed);
    }

    /// A section: looks at the value twice, with time between, and now and then panics.
    fn section(&self, reader: &Reader<Value>, newest: &mut u64, chance: &mut Chance) {
        struct Inside<'w>(&'w AtomicUsize);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.inside.fetch_add(1, Ordering::SeqCst);
        let _inside = Inside(&self.inside);
        let value = reader.read();
        let generation = value.check();
        assert!(generation >= *newest, "an older value than before");
        *newest = generation;
        chance.dawdle();
        value.check();
        self.count(&self.sections);
        if chance.one_in(20_000) {
            resume_unwind(Box::new("on purpose"));
        }
    }

    /// One reader's life, from attaching to leaving.
    fn life(&self, mut reader: Reader<Value>, chance: &mut Chance) {
        let (mut newest, mut owes) = (0, 0);
        while !self.stop.load(Ordering::Relaxed) && !chance.one_in(5_000) {
            match reader.quiescent() {
                Gate::Shut if owes == 0 => {
                    reader.arrive();
                    continue;
                }
                // Collects what is owed, at the shut gate, with the old value.
                Gate::Shut => owes -= 1,
                Gate::Open | Gate::Changed => owes += chance.below(2),
            }
            self.section(&reader, &mut newest, chance);
            owes = if chance.one_in(3) { 0 } else { owes };
            if chance.one_in(8) {
                let asleep = reader.sleep(owes > 0);
                if asleep.is_some() && chance.one_in(4) {
                    thread::sleep(Duration::from_micros(chance.below(200)));
                } else {
                    chance.dawdle();
                }
                match asleep {
                    Some(asleep) if owes == 0 && chance.one_in(50) => std::mem::forget(asleep),
                    _ => {}
                }
            }
        }
    }

    fn work(&self, cell: &Arc<Cell<Value>>) {
        let mut chance = Chance::new();
        while !self.stop.load(Ordering::Relaxed) {
            let Some(reader) = cell.attach() else { panic!("a slot for each") };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.life(reader, &mut chance))) {
                // Ours are not strings that std made.
                if panic.downcast_ref::<&str>() != Some(&"on purpose") {
                    self.stop.store(true, Ordering::Relaxed);
                    resume_unwind(panic);
                }
            }
        }
    }

    fn swap(&self, cell: &Arc<Cell<Value>>, chance: &mut Chance) {
        let turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let generation = self.newest.fetch_add(1, Ordering::Relaxed) + 1;
        let swapped = cell.swap(Value::new(generation));
        drop(turn);
        match swapped {
            Ok(mut grace) => {
                self.count(&self.swaps);
                loop {
                    match grace.wait(Duration::from_micros(chance.below(2_000))) {
                        Ok(old) => return assert!(old.check() < generation),
                        Err((unfinished, _)) => grace = unfinished,
                    }
                }
            }
            Err(UpdateError::Busy) => self.count(&self.busy),
            Err(error) => panic!("{error}"),
        }
    }

    fn handover(self: &Arc<Self>, cell: &Arc<Cell<Value>>, publishes: bool, chance: &mut Chance) {
        let (world, panics) = (Arc::clone(self), chance.one_in(10));
        let exchange = Box::new(move |old: &Value| {
            let alone = || assert_eq!(world.inside.load(Ordering::SeqCst), 0, "a reader is inside");
            alone();
            old.check();
            (0..50).for_each(|_| std::hint::spin_loop());
            alone();
            if panics {
                resume_unwind(Box::new("on purpose"));
            }
            publishes.then(|| Value::new(world.newest.fetch_add(1, Ordering::Relaxed) + 1))
        });
        let timeout = Duration::from_micros(chance.below(3_000));
        match cell.handover(exchange, || {}, timeout) {
            Ok(Handover::Done { old, panic, .. }) => {
                self.count(if panics { &self.panics } else { &self.handovers });
                if let Some(panic) =
                    panic.filter(|panic| panic.downcast_ref() != Some(&"on purpose"))
                {
                    resume_unwind(panic);
                }
                assert_eq!(old.map(|old| old.check()).is_some(), publishes && !panics);
            }
            Ok(Handover::TimedOut { .. }) => self.count(&self.timeouts),
            Err(UpdateError::Busy) => self.count(&self.busy),
            Err(error) => panic!("{error}"),
        }
    }

    /// Handovers: in turn, or out of turn, to contend. The latter do not publish, because a swap
    /// draws its generation first.
    fn upgrade(self: &Arc<Self>, cell: &Arc<Cell<Value>>) {
        let mut chance = Chance::new();
        while !self.stop.load(Ordering::Relaxed) {
            if chance.one_in(4) {
                self.handover(cell, false, &mut chance);
            } else {
                let turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                self.handover(cell, true, &mut chance);
                drop(turn);
                thread::sleep(Duration::from_micros(chance.below(200)));
            }
        }
    }

    fn swapper(self: &Arc<Self>, cell: &Arc<Cell<Value>>) {
        let mut chance = Chance::new();
        while !self.stop.load(Ordering::Relaxed) {
            self.swap(cell, &mut chance);
            thread::sleep(Duration::from_micros(chance.below(200)));
        }
    }
}

/// Ends the process if `done` does not come true: a lost wake would hang the test for ever.
fn watchdog(limit: Duration) -> Arc<AtomicBool> {
    let done = Arc::new(AtomicBool::new(false));
    let watched = Arc::clone(&done);
    thread::spawn(move || {
        let started = Instant::now();
        while !watched.load(Ordering::Relaxed) {
            if started.elapsed() > limit {
                eprintln!("hung: a reader was not woken");
                std::process::abort();
            }
            thread::sleep(Duration::from_millis(50));
        }
    });
    done
}

fn torture(budget: Duration, swaps: bool, handovers: bool) -> Arc<World> {
    let done = watchdog(budget + Duration::from_secs(30));
    let (world, cell) = (Arc::new(World::default()), Cell::new(Value::new(0), READERS));
    thread::scope(|scope| {
        (0..READERS).for_each(|_| drop(scope.spawn(|| world.work(&cell))));
        if swaps {
            scope.spawn(|| world.swapper(&cell));
        }
        if handovers {
            (0..UPGRADERS).for_each(|_| drop(scope.spawn(|| world.upgrade(&cell))));
        }
        let started = Instant::now();
        while started.elapsed() < budget && !world.stop.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(20));
        }
        world.stop.store(true, Ordering::Relaxed);
    });
    done.store(true, Ordering::Relaxed);
    println!(
        "{:?} sections, {:?} swaps, {:?} handovers, {:?} timed out, {:?} panicked, {:?} times busy",
        world.sections, world.swaps, world.handovers, world.timeouts, world.panics, world.busy
    );
    world
}

#[test]
fn torture_of_each_and_both() {
    let world = torture(budget() / 4, true, false);
    assert!(world.swaps.load(Ordering::Relaxed) > 0);
    let world = torture(budget() / 4, false, true);
    assert!(
        world.handovers.load(Ordering::Relaxed) > 0 && world.panics.load(Ordering::Relaxed) > 0
    );
    let world = torture(budget() / 2, true, true);
    assert!(world.handovers.load(Ordering::Relaxed) > 0 && world.swaps.load(Ordering::Relaxed) > 0);
}

/// The textbook's scheme: a reader looks at the flag, and then counts itself in.
#[derive(Default)]
struct Textbook {
    shut: AtomicBool,
    inside: AtomicUsize,
    /// What a reader would use: sound while the gate is open.
    poisoned: AtomicBool,
    stop: AtomicBool,
    /// With one CPU nothing happens between two steps, unless a thread gives the CPU away there.
    has_one_cpu: bool,
}

impl Textbook {
    /// Between two steps whose order matters.
    fn between(&self) {
        if self.has_one_cpu {
            thread::yield_now();
        }
    }

    /// How many sections found what they must not.
    fn read(&self, counts_first: bool) -> u64 {
        let mut bad = 0;
        while !self.stop.load(Ordering::Relaxed) {
            if counts_first {
                self.inside.fetch_add(1, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                if self.shut.load(Ordering::SeqCst) {
                    self.inside.fetch_sub(1, Ordering::SeqCst);
                    self.between();
                    continue;
                }
            } else {
                let is_shut = self.shut.load(Ordering::SeqCst);
                self.between();
                if is_shut {
                    continue;
                }
                self.inside.fetch_add(1, Ordering::SeqCst);
            }
            bad += u64::from(self.poisoned.load(Ordering::SeqCst));
            self.inside.fetch_sub(1, Ordering::SeqCst);
        }
        bad
    }

    fn upgrade(&self) {
        self.shut.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        while self.inside.load(Ordering::SeqCst) != 0 {
            std::hint::spin_loop();
            self.between();
        }
        self.poisoned.store(true, Ordering::SeqCst);
        self.between();
        (0..100).for_each(|_| std::hint::spin_loop());
        self.poisoned.store(false, Ordering::SeqCst);
        self.shut.store(false, Ordering::SeqCst);
    }

    /// Bad sections and upgrades, after `budget` or the first bad one that is noticed.
    fn run(counts_first: bool, budget: Duration) -> (u64, u64) {
        let has_one_cpu = thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
        let textbook = Self { has_one_cpu, ..Self::default() };
        thread::scope(|scope| {
            let readers = [(); 2].map(|()| scope.spawn(|| textbook.read(counts_first)));
            let (started, mut upgrades) = (Instant::now(), 0);
            while started.elapsed() < budget {
                textbook.upgrade();
                upgrades += 1;
                (0..200).for_each(|_| std::hint::spin_loop());
                textbook.between();
            }
            textbook.stop.store(true, Ordering::Relaxed);
            (readers.into_iter().map(|reader| reader.join().unwrap()).sum(), upgrades)
        })
    }
}

#[test]
fn control_the_textbook_order_fails_here() {
    let done = watchdog(Duration::from_secs(120));
    for attempt in 1..=20 {
        let (bad, upgrades) = Textbook::run(false, Duration::from_secs(1));
        println!("attempt {attempt}: {bad} bad sections in {upgrades} upgrades");
        if bad > 0 {
            let (bad, upgrades) = Textbook::run(true, Duration::from_secs(1));
            println!("counted in first: {bad} bad sections in {upgrades} upgrades");
            assert_eq!(bad, 0, "the control's own control");
            return done.store(true, Ordering::Relaxed);
        }
    }
    panic!("the mistake was not seen: this machine's stress test shows little");
}
