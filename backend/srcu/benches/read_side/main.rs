//! What a read section costs over the call that it is around: ours, and what one would take
//! otherwise.
//!
//! `cargo bench -p srcu`. A section is an indirect call of an empty function. *Bare* is a pointer
//! load and that call, which no upgrade could wait for. Rounds of all schemes are interleaved, so
//! that a drifting clock meets all alike; the table has medians over the rounds. With two readers,
//! the slower one counts.
#![cfg(not(loom))]

mod urcu;

use std::hint::black_box;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Barrier, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use crossbeam_epoch::Atomic;
use srcu::{Cell, Gate, Handover};
use urcu::Urcu;

const SECTIONS: u32 = 400_000;
const ROUNDS: usize = 41;
const HANDOVERS: usize = 20_001;

/// What stands for a domain: a call that the compiler cannot see through.
struct Device(fn(u64) -> u64);

#[inline(never)]
fn empty(request: u64) -> u64 {
    request
}

impl Device {
    fn new() -> Self {
        Self(black_box(empty))
    }

    #[inline(always)]
    fn call(&self, request: u64) {
        black_box((self.0)(request));
    }
}

/// Nanoseconds per section.
fn time(mut section: impl FnMut(u64)) -> f64 {
    let started = Instant::now();
    (0..u64::from(SECTIONS)).for_each(&mut section);
    started.elapsed().as_nanos() as f64 / f64::from(SECTIONS)
}

fn bare(cell: &AtomicPtr<Device>) -> f64 {
    // SAFETY: it is not replaced.
    time(|request| unsafe { &*cell.load(Ordering::Acquire) }.call(request))
}

fn ours(cell: &Arc<Cell<Device>>) -> f64 {
    let mut reader = cell.attach().expect("a slot for each");
    time(|request| {
        if reader.quiescent() == Gate::Shut {
            reader.arrive();
        }
        reader.read().call(request);
    })
}

fn arc_swap(cell: &ArcSwap<Device>) -> f64 {
    time(|request| cell.load().call(request))
}

fn arc_swap_cache(cell: &ArcSwap<Device>) -> f64 {
    let mut cache = arc_swap::Cache::new(cell);
    time(|request| cache.load().call(request))
}

fn rw_lock(cell: &RwLock<Arc<Device>>) -> f64 {
    time(|request| cell.read().unwrap().call(request))
}

fn parking_lot(cell: &parking_lot::RwLock<Arc<Device>>) -> f64 {
    time(|request| cell.read().call(request))
}

fn epoch(cell: &Atomic<Device>) -> f64 {
    time(|request| {
        let guard = crossbeam_epoch::pin();
        // SAFETY: it is not replaced.
        unsafe { cell.load(Ordering::Acquire, &guard).deref() }.call(request);
    })
}

/// Runs `scheme` on so many threads at once; the slowest's time.
fn together(readers: usize, scheme: &(dyn Fn() -> f64 + Sync)) -> f64 {
    let barrier = Barrier::new(readers);
    let run = || {
        barrier.wait();
        scheme()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..readers).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).fold(0.0, f64::max)
    })
}

fn sorted<N: PartialOrd>(mut numbers: Vec<N>) -> Vec<N> {
    numbers.sort_by(|a, b| a.partial_cmp(b).unwrap());
    numbers
}

fn sections(urcu: Option<&Urcu>) {
    let pointer = AtomicPtr::new(Box::into_raw(Box::new(Device::new())));
    let cell = Cell::new(Device::new(), 2);
    let arc = ArcSwap::from_pointee(Device::new());
    let std_lock = RwLock::new(Arc::new(Device::new()));
    let lock = parking_lot::RwLock::new(Arc::new(Device::new()));
    let atomic = Atomic::new(Device::new());
    let schemes: [(&str, &(dyn Fn() -> f64 + Sync)); 7] = [
        ("bare", &|| bare(&pointer)),
        ("srcu quiescent + read", &|| ours(&cell)),
        ("arc-swap Cache", &|| arc_swap_cache(&arc)),
        ("arc-swap load", &|| arc_swap(&arc)),
        ("crossbeam-epoch pin", &|| epoch(&atomic)),
        ("parking_lot RwLock<Arc>", &|| parking_lot(&lock)),
        ("std RwLock<Arc>", &|| rw_lock(&std_lock)),
    ];
    for readers in [1, 2] {
        let mut times = vec![Vec::new(); schemes.len()];
        let mut in_c = Vec::new();
        for _ in 0..ROUNDS {
            in_c.extend(urcu.map(|urcu| urcu.sections(readers, SECTIONS)));
            for (times, (_, scheme)) in times.iter_mut().zip(schemes) {
                times.push(together(readers, scheme));
            }
        }
        let medians: Vec<f64> = times.into_iter().map(|times| sorted(times)[ROUNDS / 2]).collect();
        println!("\n{readers} reader(s)               ns/section     added  times bare");
        let in_c = urcu.map(|_| ("liburcu-memb, in C", sorted(in_c)[ROUNDS / 2]));
        for (name, median) in
            schemes.iter().map(|(name, _)| *name).zip(medians.iter().copied()).chain(in_c)
        {
            println!(
                "{name:<26}{median:>10.2}{:>10.2}{:>12.2}",
                median - medians[0],
                median / medians[0]
            );
        }
    }
}

/// Gate shut to gate open, with an exchange that swaps an empty device, and readers that never
/// sleep.
fn rendezvous(readers: usize) {
    let cell = Cell::new(Device::new(), readers.max(1));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let pauses = thread::scope(|scope| {
        for _ in 0..readers {
            scope.spawn(|| {
                let mut reader = cell.attach().expect("a slot for each");
                while !stop.load(Ordering::Relaxed) {
                    if reader.quiescent() == Gate::Shut {
                        reader.arrive();
                    }
                    reader.read().call(1);
                }
            });
        }
        thread::sleep(Duration::from_millis(5));
        let handovers = if readers == 0 { HANDOVERS } else { HANDOVERS / 20 };
        let mut pauses = Vec::new();
        for _ in 0..handovers {
            let exchange = Box::new(|_: &Device| Some(Device::new()));
            let Ok(Handover::Done { pause, .. }) =
                cell.handover(exchange, || {}, Duration::from_secs(5))
            else {
                panic!("it timed out")
            };
            pauses.push(pause.as_nanos());
            if readers > 0 {
                thread::sleep(Duration::from_micros(50));
            }
        }
        stop.store(true, Ordering::Relaxed);
        sorted(pauses)
    });
    let at = |percent: usize| pauses[pauses.len() * percent / 100] as f64 / 1000.0;
    println!("{readers} busy reader(s): {:.2} µs, p99 {:.2} µs", at(50), at(99));
}

fn main() {
    let urcu = Urcu::build();
    if urcu.is_none() {
        println!("liburcu-memb is left out: it takes a C compiler and Debian's liburcu-dev");
    }
    sections(urcu.as_ref());
    println!("\nrendezvous, gate shut to open, median:");
    (0..=2).for_each(rendezvous);
    if let Some(urcu) = &urcu {
        println!("\nliburcu-memb, synchronize_rcu(), median:");
        for readers in 0..=2 {
            let [median, p99] = urcu.wait(readers, HANDOVERS / 20).map(|ns| ns / 1000.0);
            println!("{readers} busy reader(s): {median:.2} µs, p99 {p99:.2} µs");
        }
    }
}
