//! How long a thread is waited for: by its own time, not by time in which it is given no CPU.
//!
//! On a busy machine a thread that would end at once can be late without its own fault. The clock
//! of the wait stands still while it is ready to run and does not run, as two looks in a row tell,
//! and before it has begun. There is a bound for that, too. Without `/proc`, or without
//! `CONFIG_SCHED_INFO`, all time is the thread's own.

use std::fs;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// Between two looks at a thread.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A thread's id, from the moment that it has begun.
#[derive(Debug, Default)]
pub(crate) struct ThreadId(AtomicI32);

impl ThreadId {
    /// It is the calling thread's.
    pub(crate) fn set(&self) {
        // SAFETY: no arguments, and it cannot fail.
        self.0.store(unsafe { libc::gettid() }, Ordering::Relaxed);
    }

    fn look(&self) -> Look {
        let id = self.0.load(Ordering::Relaxed);
        if id == 0 {
            return Look::NotBegun;
        }
        let read = |what| fs::read_to_string(format!("/proc/self/task/{id}/{what}"));
        let (stat, schedstat) =
            (read("stat").unwrap_or_default(), read("schedstat").unwrap_or_default());
        look(&stat, &schedstat)
    }
}

/// What a look at a thread says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    NotBegun,
    /// It runs, or would if it were given a CPU: how long it has run.
    Ready(Duration),
    /// Asleep, gone, or not known.
    Other,
}

/// Reads proc(5)'s `stat` and `schedstat` (`ran waited turns`).
fn look(stat: &str, schedstat: &str) -> Look {
    // The state comes after the name, which may hold anything.
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    let mut numbers = schedstat.split_ascii_whitespace().map(str::parse::<u64>);
    let mut next = || numbers.next()?.ok();
    match (state, next(), next(), next()) {
        // No turns at all: the kernel does not count.
        (Some('R'), Some(ran), Some(_), Some(turns)) if turns > 0 => {
            Look::Ready(Duration::from_nanos(ran))
        }
        _ => Look::Other,
    }
}

/// The clock of a wait, which stands still while its thread is given no CPU.
pub(crate) struct Patience {
    began: Instant,
    patience: Duration,
    bound: Duration,
    /// How long the threads that were waited for were given no CPU.
    starved: Duration,
    looked: Instant,
    seen: Look,
}

impl Patience {
    /// A wait of `patience`, from now on, that time in which a thread is given no CPU makes longer
    /// by at most `bound`.
    pub(crate) fn new(patience: Duration, bound: Duration) -> Self {
        let (now, starved) = (Instant::now(), Duration::ZERO);
        Self { began: now, patience, bound, starved, looked: now, seen: Look::Other }
    }

    /// Whether `thread` has been waited for long enough. To be asked every millisecond or so; for
    /// one thread after the other.
    pub(crate) fn is_over(&mut self, thread: &ThreadId) -> bool {
        let now = Instant::now();
        let since = now - self.looked;
        if since >= LOOK_AGAIN {
            let seen = thread.look();
            self.starved += match (self.seen, seen) {
                // Nor had it begun at any look before.
                (_, Look::NotBegun) => since,
                (Look::Ready(before), Look::Ready(ran)) => {
                    since.saturating_sub(ran.saturating_sub(before))
                }
                _ => Duration::ZERO,
            };
            (self.looked, self.seen) = (now, seen);
        }
        now - self.began >= self.patience + self.starved.min(self.bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_the_kernel_writes_is_read() {
        let stat = "12 (a) S (b)) R 1 2";
        assert_eq!(look(stat, "675 1346 3\n"), Look::Ready(Duration::from_nanos(675)));
        assert_eq!(look("12 (a) S 1 2", "675 1346 3\n"), Look::Other, "it sleeps");
        assert_eq!(look(stat, "0 0 0\n"), Look::Other, "it is not counted");
        assert_eq!((look("", "1 2 3"), look(stat, "1 2")), (Look::Other, Look::Other));
    }

    #[test]
    fn a_thread_that_has_not_begun_has_had_no_time() {
        let (id, mut patience) = (ThreadId::default(), Patience::new(50 * MS, 60_000 * MS));
        let began = Instant::now();
        while began.elapsed() < 300 * MS {
            assert!(!patience.is_over(&id));
            std::thread::sleep(MS);
        }
        patience.bound = 200 * MS;
        assert!(patience.is_over(&id), "there is a bound");
    }
}
