//! Whether it is worth trying to serve a request at once, on the worker itself, judged by how it
//! went lately.
//!
//! A read of cached data costs less by far when it is copied in the call than when a thread is
//! woken for it, so it is tried first. Where the data is not cached, the attempt is lost time, and
//! where a write has to wait, the whole queue waits with it. A few bad attempts in a row end the
//! trying for a while; then one is made to see whether the times have changed.

use std::time::Duration;

/// Bad attempts in a row after which there is a pause.
const PATIENCE: u32 = 4;
/// Requests in a pause.
const PAUSE: u32 = 64;
/// A write that took longer has waited for something; copying even a megabyte takes less.
const SLOW: Duration = Duration::from_millis(1);

/// How attempts of one kind go, on one queue.
#[derive(Debug, Default)]
pub struct InlineHeuristic {
    bad: u32,
    pause: u32,
}

impl InlineHeuristic {
    /// Whether to try the next one.
    #[inline]
    #[must_use]
    pub const fn worth_trying(&mut self) -> bool {
        if self.pause == 0 {
            return true;
        }
        self.pause -= 1;
        false
    }

    /// It was served at once.
    #[inline]
    pub const fn worked(&mut self) {
        self.bad = 0;
    }

    /// It could not be served at once.
    pub const fn failed(&mut self) {
        // Stays at the limit, so that after a pause one failure is enough for the next.
        if self.bad + 1 < PATIENCE {
            self.bad += 1;
        } else {
            self.pause = PAUSE;
        }
    }

    /// It was served, and took so long. Waiting in the worker even once is too much.
    #[inline]
    pub fn took(&mut self, time: Duration) {
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

    fn tried(heuristic: &mut InlineHeuristic, of: u32) -> usize {
        (0..of).filter(|_| heuristic.worth_trying()).count()
    }

    #[test]
    fn failures_in_a_row_make_a_pause_and_one_more_another() {
        let mut heuristic = InlineHeuristic::default();
        for _ in 0..10 * PATIENCE {
            assert!(heuristic.worth_trying());
            heuristic.failed();
            assert!(heuristic.worth_trying());
            heuristic.worked();
        }
        for _ in 0..PATIENCE {
            assert!(heuristic.worth_trying());
            heuristic.failed();
        }
        assert_eq!(tried(&mut heuristic, PAUSE), 0);
        assert!(heuristic.worth_trying());
        heuristic.failed();
        assert_eq!(tried(&mut heuristic, PAUSE), 0);
        assert!(heuristic.worth_trying());
        heuristic.worked();
        heuristic.failed();
        assert_eq!(tried(&mut heuristic, 100), 100);
    }

    #[test]
    fn a_slow_one_makes_a_pause_at_once() {
        let mut heuristic = InlineHeuristic::default();
        heuristic.took(SLOW);
        assert!(heuristic.worth_trying());
        heuristic.took(SLOW * 2);
        assert_eq!(tried(&mut heuristic, PAUSE), 0);
        assert!(heuristic.worth_trying());
    }
}
