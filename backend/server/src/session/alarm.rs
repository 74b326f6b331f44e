//! A queue's timer: it wakes the queue's thread when its rate limit may let something through.

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

/// Whole time and a rest, none.
const ZERO: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// See the module's page.
pub(super) struct Alarm(OwnedFd);

impl Alarm {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Readable when it is due.
    pub(super) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Makes it due at `at`, and not at what was said before.
    pub(super) fn set(&self, at: Instant) {
        let left = at.saturating_duration_since(Instant::now());
        let it_value = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            // None at all would turn it off.
            tv_nsec: i64::from(left.subsec_nanos()).max(1),
        };
        let new = Itimerspec { it_interval: ZERO, it_value };
        if let Err(error) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &new) {
            log::error!("a timer is not set: {error}");
        }
    }

    /// Takes it as seen. It may have been set anew since it was due.
    pub(super) fn seen(&self) {
        match rustix::io::read(&self.0, &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => log::error!("a timer cannot be read: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};
    use std::time::Duration;

    fn is_due(alarm: &Alarm, within: Duration) -> bool {
        let within = Timespec::try_from(within).unwrap();
        poll(&mut [PollFd::new(&alarm.0, PollFlags::IN)], Some(&within)).unwrap() == 1
    }

    #[test]
    fn it_is_due_at_its_time_and_once() {
        let (alarm, short) = (Alarm::new().unwrap(), Duration::from_millis(20));
        assert!(!is_due(&alarm, Duration::ZERO));
        let began = Instant::now();
        alarm.set(began + short);
        assert!(is_due(&alarm, Duration::from_secs(10)) && began.elapsed() >= short);
        alarm.seen();
        assert!(!is_due(&alarm, short));
        // What is over already is due at once.
        alarm.set(began);
        assert!(is_due(&alarm, Duration::from_secs(10)));
        // Set anew before it is seen: nothing is waited for.
        alarm.set(Instant::now() + Duration::from_secs(600));
        alarm.seen();
        assert!(!is_due(&alarm, Duration::ZERO));
    }
}
