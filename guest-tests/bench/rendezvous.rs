//! The least that a handover can take: threads that meet at a gate, and nothing else.
//!
//! As in a handover the gate is shut by one more thread, which then sleeps; the last thread to
//! arrive opens it again, and the time is from shut to open. Between two looks at the gate a thread
//! does nothing, or as much as a worker that serves a batch from memory. No upgrade can be quicker
//! than what does only this, on this machine, at that hour.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How often a thread that has arrived looks whether the gate is open before it sleeps, and for how
/// long it sleeps.
const LOOKS: u32 = 100;
const NAP: Duration = Duration::from_micros(50);

/// What a thread does between two looks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    Nothing,
    /// Copies so many pieces of 4 KiB.
    Copies(usize),
}

/// The gate, on a line of its own.
#[repr(align(128))]
struct Gate {
    /// Odd: shut. Each shutting and each opening adds one.
    epoch: AtomicU64,
}

/// Shut-to-open times in nanoseconds, `rounds` of them, one every `interval`. Bystanders are
/// threads that are busy too, but not with the gate.
pub(super) fn measure(
    threads: usize,
    bystanders: usize,
    work: Work,
    rounds: usize,
    interval: Duration,
) -> Vec<f64> {
    let gate = Gate { epoch: AtomicU64::new(0) };
    let arrived = AtomicUsize::new(0);
    let opened_ns = AtomicU64::new(0);
    let end = AtomicBool::new(false);
    let begin = Instant::now();
    let now = || begin.elapsed().as_nanos() as u64;
    thread::scope(|scope| {
        let closer = thread::current();
        for _ in 0..bystanders {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    black_box(());
                }
            });
        }
        for _ in 0..threads {
            let closer = closer.clone();
            let (gate, arrived, opened_ns, end) = (&gate, &arrived, &opened_ns, &end);
            scope.spawn(move || {
                let mut batch = Batch::new(work);
                while !end.load(Ordering::Relaxed) {
                    // Acquire, with the closer's Release: `arrived` was set to zero before.
                    let epoch = gate.epoch.load(Ordering::Acquire);
                    if epoch.is_multiple_of(2) {
                        batch.run();
                        continue;
                    }
                    // AcqRel: who arrives last has seen all others arrive.
                    if arrived.fetch_add(1, Ordering::AcqRel) + 1 == threads {
                        opened_ns.store(now(), Ordering::Relaxed);
                        // Release, with the Acquire of those who wait, the closer among them.
                        gate.epoch.store(epoch + 1, Ordering::Release);
                        closer.unpark();
                    }
                    // A thread that has to wait gives its CPU to those that are not there yet. It
                    // does not count when it comes back.
                    let mut looks = 0;
                    while gate.epoch.load(Ordering::Acquire) == epoch {
                        looks += 1;
                        if looks < LOOKS { spin_loop() } else { thread::sleep(NAP) }
                    }
                }
            });
        }
        let times = (0..rounds).map(|_| {
            thread::sleep(interval);
            arrived.store(0, Ordering::Relaxed);
            let shut = now();
            let epoch = gate.epoch.load(Ordering::Relaxed) + 1;
            gate.epoch.store(epoch, Ordering::Release);
            while gate.epoch.load(Ordering::Acquire) == epoch {
                thread::park();
            }
            opened_ns.load(Ordering::Relaxed).saturating_sub(shut) as f64
        });
        let times = times.collect();
        end.store(true, Ordering::Relaxed);
        times
    })
}

/// A disk that is larger than the caches of a core, and a buffer.
struct Batch {
    disk: Vec<u8>,
    buffers: Vec<u8>,
    pieces: usize,
    next: usize,
}

const PIECE: usize = 4096;

impl Batch {
    fn new(work: Work) -> Batch {
        match work {
            Work::Nothing => Batch { disk: Vec::new(), buffers: Vec::new(), pieces: 0, next: 0 },
            Work::Copies(pieces) => {
                Batch { disk: vec![1; 16 << 20], buffers: vec![0; pieces * PIECE], pieces, next: 1 }
            }
        }
    }

    fn run(&mut self) {
        if self.pieces == 0 {
            // Not even a spin hint, at which a hypervisor may take the CPU away.
            return;
        }
        let places = self.disk.len() / PIECE;
        for buffer in self.buffers.chunks_exact_mut(PIECE) {
            // Any step that is odd visits all places.
            self.next = (self.next + 2_147_483_647) % places;
            buffer.copy_from_slice(&self.disk[self.next * PIECE..][..PIECE]);
        }
        black_box(&mut self.buffers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_meet_and_go_on() {
        for (threads, bystanders, work) in
            [(1, 1, Work::Nothing), (2, 0, Work::Copies(4)), (3, 0, Work::Nothing)]
        {
            let times = measure(threads, bystanders, work, 20, Duration::from_micros(200));
            assert_eq!(times.len(), 20);
            assert!(times.iter().all(|&ns| ns < 5e9), "{times:?}");
        }
    }
}
