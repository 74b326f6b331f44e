//! Whether a worker that has nothing to do looks again, or sleeps.
//!
//! To sleep and be woken costs both sides a system call and, on an idle CPU, far more than a request does; to look again costs this CPU. Which is
//! cheaper depends on how soon the next request comes, so the worker learns from how it went: looking for longer than the budget is never right (by
//! then, having slept would have cost less), and looking in vain is done ever more rarely.
//!
//! ```text
//!             nothing to do, no sleeps to skip                work
//!   at work ---------------------------------> looking -----------------> at work      in vain half as often: backoff / 2
//!      |                                          |
//!      | nothing to do, sleeps to skip            | budget spent: backoff * 2 + 1, skip so many sleeps
//!      v                                          v
//!    asleep                                     asleep
//! ```
//!
//! So a guest whose requests come slowly costs one budget in [`BACKOFF_MAX`] sleeps, a guest that is idle costs nothing, and where the driver
//! shares our CPU, so that looking keeps it from running, looking stops by itself.
//!
//! Deliberately absent: what is looked at, and everything that must not wait for a worker that looks: the worker checks it each time.

use std::time::{Duration, Instant};

/// Most sleeps between two attempts to do without.
const BACKOFF_MAX: u32 = 63;

/// A worker's experience.
#[derive(Debug)]
pub(crate) struct Poller {
    budget: Duration,
    looking: Looking,
    /// How many sleeps to skip after the next failure.
    backoff: u32,
    /// How many times to sleep at once.
    skip: u32,
}

/// Since when we have been looking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Looking {
    No,
    /// Since just now; the clock was not read, because most often work comes before it is needed.
    First,
    Since(Instant),
}

impl Poller {
    pub(crate) const fn new(budget: Duration) -> Self {
        Self { budget, looking: Looking::No, backoff: 0, skip: 0 }
    }

    /// The worker is awake again, for whatever reason.
    pub(crate) const fn begin(&mut self) {
        self.looking = Looking::No;
    }

    /// There was work.
    #[inline]
    pub(crate) fn busy(&mut self) {
        if self.looking != Looking::No {
            self.looking = Looking::No;
            self.backoff /= 2;
        }
    }

    /// There is nothing to do. Whether to look again; if not, the worker sleeps.
    #[inline]
    pub(crate) fn idle(&mut self) -> bool {
        match self.looking {
            Looking::No if self.budget.is_zero() => return false,
            Looking::No if self.skip > 0 => {
                self.skip -= 1;
                return false;
            }
            Looking::No => self.looking = Looking::First,
            Looking::First => self.looking = Looking::Since(Instant::now()),
            Looking::Since(since) if since.elapsed() >= self.budget => {
                self.in_vain();
                return false;
            }
            Looking::Since(_) => {}
        }
        true
    }

    fn in_vain(&mut self) {
        self.looking = Looking::No;
        self.backoff = (self.backoff * 2 + 1).min(BACKOFF_MAX);
        self.skip = self.backoff;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_micros(20);

    /// Looks in vain; whether it looked at all.
    fn look(poller: &mut Poller) -> bool {
        let mut looked = false;
        while poller.idle() {
            looked = true;
        }
        looked
    }

    /// How many sleeps there are before it looks again.
    fn sleeps(poller: &mut Poller) -> usize {
        std::iter::repeat_with(|| look(poller)).take_while(|looked| !looked).count()
    }

    #[test]
    fn without_a_budget_it_sleeps_at_once() {
        let mut poller = Poller::new(Duration::ZERO);
        assert!(!poller.idle());
        poller.busy();
        assert!(!poller.idle());
    }

    #[test]
    fn it_looks_for_as_long_as_the_budget() {
        let mut poller = Poller::new(BUDGET);
        let begun = Instant::now();
        assert!(look(&mut poller));
        assert!(begun.elapsed() >= BUDGET);
    }

    #[test]
    fn in_vain_it_looks_ever_more_rarely_but_never_gives_up() {
        let mut poller = Poller::new(BUDGET);
        let all: Vec<_> = (0..9).map(|_| sleeps(&mut poller)).collect();
        assert_eq!(all, [0, 1, 3, 7, 15, 31, 63, 63, 63]);
    }

    #[test]
    fn success_brings_it_back() {
        let mut poller = Poller::new(BUDGET);
        let failures: usize = (0..8).map(|_| sleeps(&mut poller)).sum();
        assert_eq!(failures, 1 + 3 + 7 + 15 + 31 + 63 + 63);
        while !poller.idle() {}
        for _ in 0..6 {
            poller.busy();
            assert!(poller.idle(), "after work it looks again at once");
        }
        while poller.idle() {}
        assert_eq!(sleeps(&mut poller), 1, "and what was in vain before is forgotten");
    }

    #[test]
    fn work_that_a_sleep_has_brought_proves_nothing() {
        let mut poller = Poller::new(BUDGET);
        assert!(look(&mut poller));
        assert!(!poller.idle(), "asleep");
        poller.busy();
        assert_eq!(poller.backoff, 1);
        assert!(look(&mut poller));
        assert_eq!(poller.backoff, 3);
    }
}
