//! Whether a worker that has nothing to do looks again, or sleeps.
//!
//! To sleep and be woken costs both sides a system call and, on an idle CPU, far more than a
//! request does; to look again costs this CPU. Which is cheaper depends on how soon the next
//! request comes, so the worker learns from how it went: looking for longer than the budget is
//! never right (by then, having slept would have cost less), and looking in vain is done ever more
//! rarely.
//!
//! ```text
//!             nothing to do, no sleeps to skip              work
//!   at work ---------------------------------> looking ---------------> at work
//!      |                                          |              (in vain half as often:
//!      | nothing to do,                           |               backoff / 2)
//!      | sleeps to skip                           | budget spent: backoff * 2 + 1,
//!      v                                          v skip so many sleeps
//!    asleep                                     asleep
//! ```
//!
//! What is awaited makes a difference, and is remembered apart:
//!
//! - A guest sends its next request when it has thought about its answers, and spares its kick if
//!   we look. One that was given several answers at once reads them all before it has much to send,
//!   and all that it sends shares the cost of the look: the budget is twice as long.
//! - A device that a domain waits for comes with an interrupt whether we look or not, and most take
//!   longer than to sleep and be woken: the budget is small ([`DEVICE_BUDGET`]). It is what is
//!   awaited when the domain owes answers and the guest has had none since its requests were last
//!   taken.
//!
//! So a guest whose requests come slowly costs one look in [`BACKOFF_MAX`] sleeps, a guest that is
//! idle costs nothing, and where the driver shares our CPU, so that looking keeps it from running,
//! looking stops by itself.
//!
//! Deliberately absent: what is looked at, and everything that must not wait for a worker that
//! looks: the worker checks it each time.

use std::time::{Duration, Instant};

/// Most sleeps between two attempts to do without.
const BACKOFF_MAX: u32 = 63;

/// Longest look for a device's answer: enough for one that answers about as fast as a CPU wakes up.
const DEVICE_BUDGET: Duration = Duration::from_micros(10);

/// A worker's experience.
#[derive(Debug)]
pub(crate) struct Poller {
    guest: Experience,
    guest_with_many: Experience,
    device: Experience,
}

impl Poller {
    /// Looks for `budget` for the next request of a guest that was given one answer.
    pub(crate) const fn new(budget: Duration) -> Self {
        let short =
            if budget.as_nanos() < DEVICE_BUDGET.as_nanos() { budget } else { DEVICE_BUDGET };
        Self {
            guest: Experience::new(budget),
            guest_with_many: Experience::new(budget.saturating_mul(2)),
            device: Experience::new(short),
        }
    }

    /// The worker is awake again, for whatever reason.
    pub(crate) const fn begin(&mut self) {
        self.guest.begin();
        self.guest_with_many.begin();
        self.device.begin();
    }

    /// The guest has sent requests.
    #[inline]
    pub(crate) fn guest_came(&mut self) {
        self.guest.busy();
        self.guest_with_many.busy();
        self.device.busy();
    }

    /// The domain has answered. That says nothing of the guest: a look at its ring goes on where it
    /// is, so that answers that trickle in do not prolong it.
    #[inline]
    pub(crate) fn device_came(&mut self) {
        self.device.busy();
    }

    /// There is nothing to do. Whether to look again; if not, the worker sleeps.
    #[inline]
    pub(crate) fn idle(&mut self, awaited: Awaited) -> bool {
        match awaited {
            Awaited::Guest => self.guest.idle(),
            Awaited::GuestWithMany => self.guest_with_many.idle(),
            Awaited::Device => self.device.idle(),
        }
    }
}

/// What is expected to come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Awaited {
    /// The guest, with its next request.
    Guest,
    /// The guest, with its next requests, when it has read the several answers that it was given.
    GuestWithMany,
    /// The device behind the domain, with an answer.
    Device,
}

impl Awaited {
    /// After so many answers since the guest's requests were last taken, while it is owed so many
    /// more.
    #[inline]
    pub(crate) const fn after(answers: usize, owed: usize) -> Self {
        match (answers, owed) {
            (0, 1..) => Self::Device,
            (0 | 1, _) => Self::Guest,
            (2.., _) => Self::GuestWithMany,
        }
    }
}

/// How it went with one of them.
#[derive(Debug)]
struct Experience {
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

impl Experience {
    const fn new(budget: Duration) -> Self {
        Self { budget, looking: Looking::No, backoff: 0, skip: 0 }
    }

    const fn begin(&mut self) {
        self.looking = Looking::No;
    }

    #[inline]
    fn busy(&mut self) {
        if self.looking != Looking::No {
            self.looking = Looking::No;
            self.backoff /= 2;
        }
    }

    #[inline]
    fn idle(&mut self) -> bool {
        match self.looking {
            Looking::No if self.budget.is_zero() => return false,
            Looking::No if self.skip > 0 => {
                self.skip -= 1;
                return false;
            }
            Looking::No => self.looking = Looking::First,
            Looking::First => self.looking = Looking::Since(Instant::now()),
            Looking::Since(since) if since.elapsed() >= self.budget => {
                self.poll_missed();
                return false;
            }
            Looking::Since(_) => {}
        }
        true
    }

    fn poll_missed(&mut self) {
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
    fn look(poller: &mut Experience) -> bool {
        let mut looked = false;
        while poller.idle() {
            looked = true;
        }
        looked
    }

    /// How many sleeps there are before it looks again.
    fn sleeps(poller: &mut Experience) -> usize {
        std::iter::repeat_with(|| look(poller)).take_while(|looked| !looked).count()
    }

    #[test]
    fn without_a_budget_it_sleeps_at_once() {
        let mut poller = Experience::new(Duration::ZERO);
        assert!(!poller.idle());
        poller.busy();
        assert!(!poller.idle());
    }

    #[test]
    fn it_looks_for_as_long_as_the_budget() {
        let mut poller = Experience::new(BUDGET);
        let begun = Instant::now();
        assert!(look(&mut poller));
        assert!(begun.elapsed() >= BUDGET);
    }

    #[test]
    fn in_vain_it_looks_ever_more_rarely_but_never_gives_up() {
        let mut poller = Experience::new(BUDGET);
        let all: Vec<_> = (0..9).map(|_| sleeps(&mut poller)).collect();
        assert_eq!(all, [0, 1, 3, 7, 15, 31, 63, 63, 63]);
    }

    #[test]
    fn success_brings_it_back() {
        let mut poller = Experience::new(BUDGET);
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
        let mut poller = Experience::new(BUDGET);
        assert!(look(&mut poller));
        assert!(!poller.idle(), "asleep");
        poller.busy();
        assert_eq!(poller.backoff, 1);
        assert!(look(&mut poller));
        assert_eq!(poller.backoff, 3);
    }

    #[test]
    fn the_guest_is_awaited_once_it_has_been_answered() {
        assert_eq!(Awaited::after(0, 0), Awaited::Guest);
        assert_eq!(Awaited::after(0, 3), Awaited::Device);
        assert_eq!([Awaited::after(1, 0), Awaited::after(1, 3)], [Awaited::Guest; 2]);
        assert_eq!([Awaited::after(2, 0), Awaited::after(9, 3)], [Awaited::GuestWithMany; 2]);
    }

    #[test]
    fn answers_that_trickle_in_prolong_no_look_at_the_guest() {
        let mut poller = Poller::new(BUDGET);
        let begun = Instant::now();
        while poller.idle(Awaited::GuestWithMany) {
            poller.device_came();
            assert!(begun.elapsed() < 1000 * BUDGET);
        }
        assert_eq!(
            (poller.guest_with_many.backoff, poller.device.backoff),
            (1, 0),
            "it was in vain"
        );
        assert!(!poller.idle(Awaited::GuestWithMany));
        assert!(poller.idle(Awaited::GuestWithMany));
        poller.guest_came();
        assert_eq!(poller.guest_with_many.backoff, 0);
    }

    #[test]
    fn what_is_awaited_has_its_own_budget_and_history() {
        let mut poller = Poller::new(20 * DEVICE_BUDGET);
        let vain = |poller: &mut Poller, awaited| {
            std::iter::repeat_with(|| poller.idle(awaited)).take_while(|looks| *looks).count()
        };
        let begun = Instant::now();
        assert!(vain(&mut poller, Awaited::Device) > 0 && begun.elapsed() >= DEVICE_BUDGET);
        assert!(!poller.idle(Awaited::Device), "the next time it sleeps");
        assert_eq!(poller.guest.backoff, 0, "the guest had no part in it");
        let begun = Instant::now();
        assert!(vain(&mut poller, Awaited::Guest) > 0 && begun.elapsed() >= 20 * DEVICE_BUDGET);
        assert_eq!((poller.device.backoff, poller.guest.backoff), (1, 1));
        let begun = Instant::now();
        assert!(
            vain(&mut poller, Awaited::GuestWithMany) > 0 && begun.elapsed() >= 40 * DEVICE_BUDGET
        );
        assert!(!poller.idle(Awaited::GuestWithMany), "the next time it sleeps");
        assert_eq!(poller.device.budget, DEVICE_BUDGET);
        assert_eq!(
            Poller::new(BUDGET / 4).device.budget,
            BUDGET / 4,
            "never longer than what was asked for"
        );
        assert!(!Poller::new(Duration::ZERO).idle(Awaited::Device));
    }
}
