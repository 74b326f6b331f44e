//! Whether it is worth trying to serve a request at once, on the worker itself, judged by how it
//! went lately.
//!
//! A read of cached data costs less by far when it is copied in the call than when anybody is woken
//! for it, so it is tried first. Where the data is not cached, the attempt is lost time, and where
//! a write has to wait, the whole queue waits with it. A few bad attempts in a row end the trying
//! for a while; then one is made to see whether the times have changed.

use std::time::Duration;

/// Bad attempts in a row after which there is a pause.
const PATIENCE: u32 = 4;
/// Requests in a pause.
const PAUSE: u32 = 64;
/// A write that took longer has waited for something; copying even a megabyte takes less.
const SLOW: Duration = Duration::from_millis(1);

/// How attempts of one kind go, on one queue.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    bad: u32,
    pause: u32,
}

impl Pace {
    /// Whether to try the next one.
    #[inline]
    pub(crate) const fn worth_trying(&mut self) -> bool {
        if self.pause == 0 {
            return true;
        }
        self.pause -= 1;
        false
    }

    /// It was served at once.
    #[inline]
    pub(crate) const fn worked(&mut self) {
        self.bad = 0;
    }

    /// It could not be served at once.
    pub(crate) const fn failed(&mut self) {
        // Stays at the limit, so that after a pause one failure is enough for the next.
        if self.bad + 1 < PATIENCE {
            self.bad += 1;
        } else {
            self.pause = PAUSE;
        }
    }

    /// It was served, and took so long. Waiting in the worker even once is too much.
    #[inline]
    pub(crate) fn took(&mut self, time: Duration) {
        if time > SLOW {
            self.bad = PATIENCE - 1;
            self.pause = PAUSE;
        } else {
            self.worked();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(pace: &mut Pace, of: u32) -> usize {
        (0..of).filter(|_| pace.worth_trying()).count()
    }

    #[test]
    fn failures_in_a_row_make_a_pause_and_one_more_another() {
        let mut pace = Pace::default();
        for _ in 0..10 * PATIENCE {
            assert!(pace.worth_trying());
            pace.failed();
            assert!(pace.worth_trying());
            pace.worked();
        }
        for _ in 0..PATIENCE {
            assert!(pace.worth_trying());
            pace.failed();
        }
        assert_eq!(tried(&mut pace, PAUSE), 0);
        assert!(pace.worth_trying());
        pace.failed();
        assert_eq!(tried(&mut pace, PAUSE), 0);
        assert!(pace.worth_trying());
        pace.worked();
        pace.failed();
        assert_eq!(tried(&mut pace, 100), 100);
    }

    #[test]
    fn a_slow_one_makes_a_pause_at_once() {
        let mut pace = Pace::default();
        pace.took(SLOW);
        assert!(pace.worth_trying());
        pace.took(SLOW * 2);
        assert_eq!(tried(&mut pace, PAUSE), 0);
        assert!(pace.worth_trying());
    }
}
