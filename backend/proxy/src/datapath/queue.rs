//! What all may know about a queue: what wakes its worker, and how it is doing.
//!
//! Each queue has a line of its own, written by its worker alone with plain stores; the upgrader
//! and `status` only read. So counting costs the worker no shared line and no read-modify-write.

use crate::datapath::cpu_time::Thread;
use crate::record::serialize;
use arc_swap::ArcSwapOption;
use serde::Serialize;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Wakes a worker.
pub trait Notifier: Send + Sync {
    /// The worker looks at its queue soon. Called from any thread, any number of times.
    fn notify(&self);

    /// A dup of the eventfd that [`notify`](Self::notify) writes to, where it does; for domains
    /// that have the kernel notify.
    fn fd(&self) -> Option<OwnedFd> {
        None
    }
}

/// How a queue is doing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct QueueStatus {
    /// Its number.
    pub index: usize,
    /// Requests that were submitted and have not ended.
    pub in_flight: u64,
    /// How long the oldest of them may have been in flight, to a few milliseconds; at most. The
    /// clock is not read for each batch (`worker::UNCLOCKED`).
    #[serde(rename = "oldest_age_us", serialize_with = "serialize::micros")]
    pub oldest_age: Duration,
    /// Requests that have ended.
    pub requests: u64,
    /// Of these, with an error that the guest was told of.
    pub errors: u64,
    /// Chains that were no requests at all.
    pub malformed: u64,
    /// How often its worker waited at a shut gate.
    pub parks: u64,
    /// Requests that were run again after a takeover.
    pub replayed: u64,
    /// How long its worker has waited for a CPU, since its thread began.
    #[serde(rename = "cpu_wait_us", serialize_with = "serialize::micros")]
    pub cpu_wait: Duration,
}

/// One queue's line.
#[repr(align(128))]
#[derive(Default)]
pub(crate) struct QueueLine {
    /// Twice how often its worker has passed the gate; odd while it is asleep, or waits at it.
    pub(crate) passes: AtomicU64,
    pub(crate) in_flight: AtomicU64,
    /// Coarse monotonic nanoseconds since when something has been in flight without a break.
    pub(crate) busy_since: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) parks: AtomicU64,
    pub(crate) replayed: AtomicU64,
}

impl QueueLine {
    /// Its worker passes the gate, and is awake.
    #[inline]
    pub(crate) fn pass(&self) {
        let passes = self.passes.load(Ordering::Relaxed);
        self.passes.store((passes | 1).wrapping_add(1), Ordering::Relaxed);
    }

    /// Its worker is about to sleep, or to wait at the gate.
    pub(crate) fn rest(&self) {
        self.passes.store(self.passes.load(Ordering::Relaxed) | 1, Ordering::Relaxed);
    }
}

/// Where a worker is on its way, to be held against where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Its queue.
    pub queue: usize,
    passes: u64,
    /// It runs, or would if it were given a CPU.
    is_ready: bool,
    /// How long it has run.
    ran: Duration,
}

impl Footprint {
    /// How long a worker has to have run to be told from one that was given no CPU.
    const OWN_TIME: Duration = Duration::from_millis(10);

    /// Whether it is awake and has not come by since `before`, though it could have.
    #[must_use]
    pub fn is_stuck_since(&self, before: &Self) -> bool {
        let has_moved = self.passes != before.passes || self.passes & 1 != 0;
        let is_starved = self.is_ready && self.ran.saturating_sub(before.ran) < Self::OWN_TIME;
        self.queue == before.queue && !has_moved && !is_starved
    }
}

/// What serves a queue.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) queue: usize,
    /// Nothing where the kernel does not tell of it.
    pub(crate) thread: Option<Thread>,
}

/// Adds to a counter that only the calling thread writes.
#[inline]
pub(crate) fn add(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

/// Nanoseconds of the kernel's coarse monotonic clock: a few milliseconds of error, a few
/// nanoseconds of cost.
#[inline]
pub(crate) fn coarse_now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

/// All queues of the device.
pub(crate) struct Queues {
    lines: Box<[Arc<QueueLine>]>,
    notifiers: Box<[ArcSwapOption<Box<dyn Notifier>>]>,
    /// By the slot of the worker's reader, of which there are as many.
    seats: Box<[ArcSwapOption<Seat>]>,
}

impl Queues {
    pub(crate) fn new(queues: usize) -> Self {
        Self {
            lines: (0..queues).map(|_| Arc::default()).collect(),
            notifiers: (0..queues).map(|_| ArcSwapOption::empty()).collect(),
            seats: (0..queues).map(|_| ArcSwapOption::empty()).collect(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.lines.len()
    }

    pub(crate) fn line(&self, queue: usize) -> &Arc<QueueLine> {
        &self.lines[queue]
    }

    pub(crate) fn set_notifier(&self, queue: usize, notifier: Option<Box<dyn Notifier>>) {
        self.notifiers[queue].store(notifier.map(Arc::new));
    }

    pub(crate) fn notify(&self, queue: usize) {
        if let Some(notifier) = self.notifiers.get(queue).and_then(|slot| slot.load_full()) {
            notifier.notify();
        }
    }

    pub(crate) fn notifier_fd(&self, queue: usize) -> Option<OwnedFd> {
        self.notifiers
            .get(queue)
            .and_then(|slot| slot.load_full())
            .and_then(|notifier| notifier.fd())
    }

    /// Says what serves by the reader in `slot`.
    pub(crate) fn set_seat(&self, slot: usize, seat: Option<Seat>) {
        self.seats[slot].store(seat.map(Arc::new));
    }

    /// All that serve, by the slot of the reader.
    pub(crate) fn seats(&self) -> impl Iterator<Item = (usize, Arc<Seat>)> {
        let seats = self.seats.iter().enumerate();
        seats.filter_map(|(slot, seat)| Some((slot, seat.load_full()?)))
    }

    /// Where all workers are.
    pub(crate) fn footprints(&self) -> Vec<Footprint> {
        let footprint = |(_, seat): (usize, Arc<Seat>)| {
            let thread = seat.thread.as_ref();
            Footprint {
                queue: seat.queue,
                passes: self.lines[seat.queue].passes.load(Ordering::Relaxed),
                is_ready: thread.is_some_and(Thread::is_ready),
                ran: thread.and_then(Thread::times).unwrap_or_default().ran,
            }
        };
        self.seats().map(footprint).collect()
    }

    /// The slots of the readers that serve these queues, a bit each.
    pub(crate) fn slots_of(&self, queues: u64) -> Vec<usize> {
        self.seats()
            .filter(|(_, seat)| queues & 1 << seat.queue != 0)
            .map(|(slot, _)| slot)
            .collect()
    }

    /// Those that have workers, one bit each.
    pub(crate) fn served(&self) -> u64 {
        let bits = self.notifiers.iter().take(u64::BITS as usize).enumerate();
        bits.filter(|(_, slot)| slot.load().is_some()).fold(0, |bits, (queue, _)| bits | 1 << queue)
    }

    pub(crate) fn notify_all(&self) {
        (0..self.len()).for_each(|queue| self.notify(queue));
    }

    /// Those that have requests in flight.
    pub(crate) fn stuck(&self) -> Vec<QueueStatus> {
        self.status().into_iter().filter(|queue| queue.in_flight > 0).collect()
    }

    pub(crate) fn status(&self) -> Vec<QueueStatus> {
        let now = coarse_now_ns();
        let mut cpu_waits = vec![Duration::ZERO; self.len()];
        for (_, seat) in self.seats() {
            cpu_waits[seat.queue] =
                seat.thread.as_ref().and_then(Thread::waited).unwrap_or_default();
        }
        let one = |(index, line): (usize, &Arc<QueueLine>)| {
            let in_flight = line.in_flight.load(Ordering::Relaxed);
            let since = line.busy_since.load(Ordering::Relaxed);
            let age = if in_flight == 0 { 0 } else { now.saturating_sub(since) };
            QueueStatus {
                index,
                in_flight,
                oldest_age: Duration::from_nanos(age),
                requests: line.requests.load(Ordering::Relaxed),
                errors: line.errors.load(Ordering::Relaxed),
                malformed: line.malformed.load(Ordering::Relaxed),
                parks: line.parks.load(Ordering::Relaxed),
                replayed: line.replayed.load(Ordering::Relaxed),
                cpu_wait: cpu_waits[index],
            }
        };
        self.lines.iter().enumerate().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Silent;

    impl Notifier for Silent {
        fn notify(&self) {}
    }

    #[test]
    fn served_are_the_queues_that_have_workers() {
        let queues = Queues::new(64);
        assert_eq!(queues.served(), 0);
        for queue in [0, 5, 63] {
            queues.set_notifier(queue, Some(Box::new(Silent)));
        }
        assert_eq!(queues.served(), 1 | 1 << 5 | 1 << 63);
        queues.set_notifier(5, None);
        assert_eq!(queues.served(), 1 | 1 << 63);
    }
}
