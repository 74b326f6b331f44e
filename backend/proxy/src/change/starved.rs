//! Whether a worker that does not come hangs, or is not given a CPU.
//!
//! A deadline is there to tell a domain that keeps a request, or does not come back from a call. On
//! a busy machine a worker can be late without being at fault: it is ready to run, and others do.
//! Nor does the guest notice what is waited for it, because the requests of that queue wait for the
//! same worker; those of other queues do not wait for it for long (`drain.rs`). So a deadline
//! counts a worker's *own* time: what it ran, slept or was blocked, but not what it waited for a
//! CPU. A request that is stuck leaves its worker asleep, and that is its own time in full.
//!
//! ```text
//!         own time below the deadline, or ready to run and not run since the last look
//!   late ------------------------------------------------------------------------> look again
//!     |--- own time over the deadline -------------------------------------------> busy
//!     +--- all of the time over the deadline and the bound for this -------------> starved
//! ```
//!
//! A worker that is blocked in the kernel may wait for one that is starved: workers share the locks
//! of the process's memory, and the kernel hands such a lock to a thread that it then does not run.
//! So it is waited for as long as there is one that is starved, and then found busy.
//!
//! The kernel books a wait for a CPU when it ends (`run_delay`), so one that lasts is told by two
//! looks between which a thread was ready to run all the time and did not run. Where the kernel
//! says nothing (`cpu_time.rs`), all time counts as a worker's own.
//!
//! Deliberately absent: time that a hypervisor takes from the machine, which no thread is told of,
//! and threads of others that a worker waits for in turn.

use crate::datapath::cpu_time::{State, Thread, Times};
use crate::datapath::queue::{Queues, Seat};
use crate::record::report::Starved;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks at a thread that is ready to run.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What becomes of a worker that is late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Late {
    /// Wait so much longer, then judge again.
    Wait(Duration),
    /// It has had its time: it hangs, or keeps something.
    Busy,
    /// It has not, and will not be waited for any more.
    Starved,
    /// One has had its time, blocked in the kernel, and another has not.
    Both,
}

/// How much of the time since the watch began a worker has had for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Own {
    /// So much.
    Had(Duration),
    /// So much, and it is blocked in the kernel.
    Blocked(Duration),
    /// It waits for a CPU right now.
    Waits,
    /// It is ready to run; whether it does is seen at the next look.
    Unknown,
}

/// A worker that may be waited for.
struct Watched {
    slot: usize,
    seat: Arc<Seat>,
    before: Times,
    /// When it was seen ready to run at the last look, and what it had had by then.
    ready: Option<(Instant, Times)>,
    /// How long it has waited for a CPU since the watch began, as of the last look.
    waited: Duration,
    /// What it did at the last look.
    state: Option<State>,
}

/// All workers, from a moment on.
pub(crate) struct Watch {
    since: Instant,
    workers: Vec<Watched>,
}

impl Watch {
    /// From now on.
    pub(crate) fn begin(queues: &Queues) -> Self {
        let workers = queues.seats().filter_map(|(slot, seat)| {
            let before = seat.thread.as_ref()?.times()?;
            Some(Watched { slot, seat, before, ready: None, waited: Duration::ZERO, state: None })
        });
        Self { workers: workers.collect(), since: Instant::now() }
    }

    /// What becomes of those that are `missing`, by the slot of their reader, if each may take
    /// `patience` of its own time, and all of it together `bound` more.
    pub(crate) fn judge(&mut self, missing: &[usize], patience: Duration, bound: Duration) -> Late {
        let elapsed = self.since.elapsed();
        // A worker that is between saying that it has come and being counted is not missing, and is
        // waited for: it is among those that would run.
        let ready = if missing.is_empty() { self.ready() } else { Vec::new() };
        let late = if missing.is_empty() { &ready } else { missing };
        if late.is_empty() {
            return if elapsed < patience { Late::Wait(LOOK_AGAIN) } else { Late::Busy };
        }
        let (mut is_known, mut is_blocked, mut is_starved) = (true, false, false);
        for &slot in late {
            let worker = self.workers.iter_mut().find(|worker| worker.slot == slot);
            match worker.map_or(Own::Had(elapsed), |worker| worker.own_time(elapsed)) {
                Own::Blocked(own) => is_blocked |= own >= patience,
                Own::Had(own) if own >= patience => return Late::Busy,
                Own::Had(_) => {}
                Own::Waits => is_starved = true,
                Own::Unknown => is_known = false,
            }
        }
        if is_blocked && is_known && !is_starved {
            return Late::Busy;
        }
        if elapsed < patience + bound || !is_known {
            Late::Wait(LOOK_AGAIN)
        } else if self.starved(late).is_empty() {
            // None has waited for a CPU: that it has had its time is only not booked yet.
            Late::Busy
        } else if is_blocked {
            Late::Both
        } else {
            Late::Starved
        }
    }

    /// The slots of the workers that run, or would if they were given a CPU.
    fn ready(&self) -> Vec<usize> {
        let is_ready =
            |worker: &&Watched| worker.seat.thread.as_ref().is_some_and(Thread::is_ready);
        self.workers.iter().filter(is_ready).map(|worker| worker.slot).collect()
    }

    /// Since when.
    pub(crate) fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// How long each of those that are `missing` has been waiting for a CPU.
    pub(crate) fn late(&self, missing: &[usize]) -> Vec<Starved> {
        let of = self.elapsed();
        let workers = self.workers.iter().filter(|worker| missing.contains(&worker.slot));
        workers
            .map(|worker| {
                let is_blocked = worker.state == Some(State::Blocked);
                Starved { queue: worker.seat.queue, waited: worker.waited, of, is_blocked }
            })
            .collect()
    }

    /// Which of those that are `missing` have been waiting for a CPU for a time that is worth a
    /// word.
    pub(crate) fn starved(&self, missing: &[usize]) -> Vec<Starved> {
        let late = self.late(missing).into_iter();
        late.filter(|worker| worker.waited >= LOOK_AGAIN).collect()
    }
}

impl Watched {
    /// How much of the time it has had for itself.
    fn own_time(&mut self, elapsed: Duration) -> Own {
        let Some((thread, now)) = self.seat.thread.as_ref().and_then(|t| Some((t, t.times()?)))
        else {
            // It is gone.
            return Own::Had(elapsed);
        };
        let booked = now.waited.saturating_sub(self.before.waited);
        self.waited = booked.min(elapsed);
        self.state = thread.state();
        if self.state != Some(State::Ready) {
            self.ready = None;
            let own = elapsed.saturating_sub(booked);
            let is_blocked = self.state == Some(State::Blocked);
            return if is_blocked { Own::Blocked(own) } else { Own::Had(own) };
        }
        let at = Instant::now();
        let Some((seen, then)) = self.ready.replace((at, now)) else { return Own::Unknown };
        // Ready to run then and now: what it has not run of it, and is not booked yet, it is
        // waiting.
        let ran = now.ran.saturating_sub(then.ran);
        let waits = (at - seen).saturating_sub(ran + now.waited.saturating_sub(then.waited));
        self.waited = (booked + waits).min(elapsed);
        let has_run = (now.ran, now.turns) != (then.ran, then.turns);
        if has_run {
            return Own::Had(elapsed.saturating_sub(self.waited));
        }
        // As of the first look: it has been waiting since.
        self.ready = Some((seen, then));
        Own::Waits
    }
}

/// In words, one after the other.
pub(crate) fn say(starved: &[Starved]) -> String {
    let one = |starved: &Starved| {
        let blocked = if starved.is_blocked { ", and is blocked in the kernel" } else { "" };
        format!(
            "the worker of queue {} waited for a CPU for {} ms of {} ms{blocked}",
            starved.queue,
            starved.waited.as_millis(),
            starved.of.as_millis()
        )
    };
    starved.iter().map(one).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    const MS: Duration = Duration::from_millis(1);

    /// A watch over one thread, as queue 3 in slot 5, that does `work` until it is told to end.
    fn watched<R>(work: impl Fn() + Sync, judge: impl FnOnce(&mut Watch) -> R) -> R {
        let (tell, told) = mpsc::channel();
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                tell.send(Thread::current()).expect("the test waits");
                while !end.load(Ordering::Relaxed) {
                    work();
                }
            });
            let thread = told.recv().expect("it is sent");
            let before = thread.as_ref().and_then(Thread::times).expect("this kernel counts");
            let seat = Arc::new(Seat { queue: 3, thread });
            let worker =
                Watched { slot: 5, seat, before, ready: None, waited: Duration::ZERO, state: None };
            let mut watch = Watch { since: Instant::now(), workers: vec![worker] };
            let result = judge(&mut watch);
            end.store(true, Ordering::Relaxed);
            result
        })
    }

    /// Judges until it is over; how long that took.
    fn verdict(watch: &mut Watch, patience: Duration, bound: Duration) -> (Late, Duration) {
        std::thread::sleep(patience);
        loop {
            match watch.judge(&[5], patience, bound) {
                Late::Wait(longer) => std::thread::sleep(longer),
                over => return (over, watch.elapsed()),
            }
        }
    }

    #[test]
    fn who_sleeps_or_runs_has_its_own_time() {
        let sleeps = || std::thread::sleep(20 * MS);
        let spins = || (0..10_000).for_each(|_| std::hint::spin_loop());
        let judge = |watch: &mut Watch| verdict(watch, 200 * MS, 20_000 * MS);
        assert_eq!(watched(sleeps, judge).0, Late::Busy);
        assert_eq!(watched(spins, judge).0, Late::Busy, "it has had a CPU, and has not come");
    }

    /// Threads that do not run, in slots 0 and 5.
    fn still(states: [State; 2]) -> Watch {
        let worker = |(slot, state)| Watched {
            slot,
            seat: Arc::new(Seat { queue: 3, thread: Some(Thread::Still(state)) }),
            before: Times::default(),
            ready: None,
            waited: Duration::ZERO,
            state: None,
        };
        let workers = [0, 5].into_iter().zip(states).map(worker).collect();
        Watch { since: Instant::now(), workers }
    }

    #[test]
    fn who_is_blocked_may_wait_for_who_is_starved() {
        use State::{Asleep, Blocked, Ready};
        for (states, verdict) in [
            ([Ready, Blocked], Late::Both),
            ([Blocked, Ready], Late::Both),
            ([Blocked, Blocked], Late::Busy),
            ([Asleep, Ready], Late::Busy),
            ([Asleep, Blocked], Late::Busy),
            ([Ready, Ready], Late::Starved),
        ] {
            let mut watch = still(states);
            std::thread::sleep(10 * MS);
            let first = watch.judge(&[0, 5], 5 * MS, 5 * MS);
            let knows_at_once = verdict == Late::Busy;
            assert_eq!(first == verdict, knows_at_once, "{states:?}: {first:?}");
            std::thread::sleep(20 * MS);
            assert_eq!(watch.judge(&[0, 5], 5 * MS, 5 * MS), verdict, "{states:?}");
        }
        let mut watch = still([Ready, Blocked]);
        std::thread::sleep(10 * MS);
        assert_eq!(watch.judge(&[5], 5 * MS, 5 * MS), Late::Busy, "the other one is not late");
        let late = watch.late(&[5]);
        assert!(late[0].is_blocked && say(&late).contains("is blocked in the kernel"), "{late:?}");
    }

    #[test]
    fn who_is_starved_between_coming_and_being_counted_is_not_taken_for_one_that_hangs() {
        for missing in [&[][..], &[5]] {
            let mut watch = still([State::Ready; 2]);
            // The first look comes late: it says nothing yet.
            std::thread::sleep(50 * MS);
            assert!(matches!(watch.judge(missing, 5 * MS, 5 * MS), Late::Wait(_)));
            std::thread::sleep(20 * MS);
            assert_eq!(watch.judge(missing, 5 * MS, 5 * MS), Late::Starved, "{missing:?}");
            assert!(matches!(watch.judge(missing, 5 * MS, 10_000 * MS), Late::Wait(_)));
        }
    }

    #[test]
    fn who_is_not_known_has_its_own_time() {
        let mut watch = Watch { since: Instant::now(), workers: Vec::new() };
        assert_eq!(watch.judge(&[5], Duration::ZERO, 1000 * MS), Late::Busy);
        assert_eq!(watch.judge(&[], Duration::ZERO, 1000 * MS), Late::Busy);
        assert!(matches!(watch.judge(&[5], 1000 * MS, Duration::ZERO), Late::Wait(_)));
        assert!(matches!(watch.judge(&[], 1000 * MS, Duration::ZERO), Late::Wait(_)));
    }
}
