//! What the scheduler says of a thread: how long it ran, and how long it waited for a CPU.
//!
//! Without `/proc`, or without `CONFIG_SCHED_INFO`, it says nothing.

use rustix::io::pread;
use rustix::thread::gettid;
use std::fs::{self, File};
use std::time::Duration;

/// A thread, and what the scheduler says of it.
#[derive(Debug)]
pub(crate) enum Thread {
    /// One of this process.
    Known {
        id: i32,
        /// Open as long as the thread serves: reading it costs a microsecond, opening it five more.
        schedstat: File,
    },
    /// One that has been in this state, and has not run, since it was made.
    #[cfg(test)]
    Still(State),
}

/// What a thread has had, since it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Times {
    pub(crate) ran: Duration,
    pub(crate) waited: Duration,
    /// How often it was given a CPU.
    pub(crate) turns: u64,
}

impl Thread {
    /// The calling one, if the kernel says anything about it.
    pub(crate) fn current() -> Option<Self> {
        let id = gettid().as_raw_nonzero().get();
        let schedstat = File::open(format!("/proc/self/task/{id}/schedstat")).ok()?;
        Some(Self::Known { id, schedstat })
    }

    /// How long it has waited for a CPU, all in all.
    pub(crate) fn waited(&self) -> Option<Duration> {
        self.times().map(|times| times.waited)
    }

    /// What it has had so far.
    pub(crate) fn times(&self) -> Option<Times> {
        match self {
            Self::Known { schedstat, .. } => {
                let mut text = [0; 96];
                let len = pread(schedstat, &mut text, 0).ok()?;
                parse_schedstat(std::str::from_utf8(&text[..len]).ok()?)
            }
            #[cfg(test)]
            Self::Still(_) => Some(Times::default()),
        }
    }

    /// What it does, as far as the kernel says it.
    pub(crate) fn state(&self) -> Option<State> {
        match self {
            Self::Known { id, .. } => {
                let stat = fs::read_to_string(format!("/proc/self/task/{id}/stat")).ok()?;
                parse_state(&stat)
            }
            #[cfg(test)]
            Self::Still(state) => Some(*state),
        }
    }

    /// Whether it runs, or would if it were given a CPU.
    pub(crate) fn is_ready(&self) -> bool {
        self.state() == Some(State::Ready)
    }
}

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It runs, or would if it were given a CPU.
    Ready,
    /// It waits for something in the kernel, and no signal ends that: for a disk, or for a lock.
    Blocked,
    /// It waits for something else, or is stopped.
    Asleep,
}

/// `ran waited turns`, the first two in nanoseconds (Linux,
/// Documentation/scheduler/sched-stats.rst).
fn parse_schedstat(text: &str) -> Option<Times> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse::<u64>);
    let mut next = || numbers.next()?.ok();
    let (ran, waited, turns) = (next()?, next()?, next()?);
    // All zero: the kernel does not count.
    (turns > 0).then_some(Times {
        ran: Duration::from_nanos(ran),
        waited: Duration::from_nanos(waited),
        turns,
    })
}

/// The state in proc(5)'s `stat`: after the name, which may hold anything.
fn parse_state(stat: &str) -> Option<State> {
    stat.rsplit_once(')')?.1.trim_start().chars().next().map(|letter| match letter {
        'R' => State::Ready,
        'D' => State::Blocked,
        _ => State::Asleep,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        let times =
            Times { ran: Duration::from_nanos(675), waited: Duration::from_nanos(1346), turns: 3 };
        assert_eq!(parse_schedstat("675 1346 3\n"), Some(times));
        assert_eq!(parse_schedstat("0 0 0\n"), None, "it is not counted");
        assert_eq!((parse_schedstat(""), parse_schedstat("1 2 x")), (None, None));
        assert_eq!(parse_state("12 (a) S (b)) R 1 2"), Some(State::Ready));
        assert_eq!(parse_state("12 (a) D 1 2"), Some(State::Blocked));
        assert_eq!(parse_state("12 (a) S 1 2"), Some(State::Asleep));
        assert_eq!((parse_state(""), parse_state("12 (a)")), (None, None));
    }
}
