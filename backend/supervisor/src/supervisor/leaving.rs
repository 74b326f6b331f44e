//! Servers that are done with: how they leave, and are known to be dead.
//!
//! A dead one is reaped some time after that, when no frontend waits: the kernel clears `/proc` of
//! the process then, and spins for as long as a last thread of it, or a reader of its files, does
//! the same and is not given a CPU. Seconds were seen (Linux 6.18, `shrink_dcache_parent`).

use super::{LEAVE_PATIENCE, Supervisor, Which};
use crate::process::reap;
use rustix::process::{Pid, WaitId};
use std::time::{Duration, Instant};

/// How long a dead process stays as it is, at least.
const REST: Duration = Duration::from_millis(100);

/// A process that has ended, and is to be reaped.
#[derive(Debug)]
pub(super) struct Dead {
    pid: Pid,
    since: Instant,
}

impl Supervisor {
    /// Those that are done with leave. Not earlier than the session is up again: what it takes to
    /// end a process would take CPUs from the new server while the guest waits for it.
    pub(super) fn dismiss(&mut self) {
        self.leaving.iter().for_each(|(server, _)| server.tell_to_leave());
    }

    /// The supervisor is about to end: those that leave do so before it, or are ended. A service
    /// manager would end them with it, in the middle of what they do.
    pub(super) fn see_off(&mut self) {
        self.dismiss();
        for (server, deadline) in std::mem::take(&mut self.leaving) {
            let left = deadline.saturating_duration_since(Instant::now());
            if !server.ends_within(left) {
                server.kill();
            }
        }
    }

    /// Ends those that do not leave, and reaps those that have.
    pub(super) fn settle_leaving(&mut self, now: Instant) {
        for (server, deadline) in &mut self.leaving {
            if *deadline <= now {
                server.kill();
                *deadline = now + LEAVE_PATIENCE;
            }
        }
        if self.next_to_reap().is_some_and(|at| at <= now) {
            self.dead.retain(|dead| dead.since + REST > now || !reap(WaitId::Pid(dead.pid)));
        }
    }

    /// When a dead server is to be reaped.
    pub(super) fn next_to_reap(&self) -> Option<Instant> {
        let is_quiet = self.exchange.is_none()
            && self.session.as_ref().is_none_or(|session| session.relay.is_up());
        self.dead.iter().filter(|_| is_quiet).map(|dead| dead.since + REST).min()
    }

    /// All that are dead are reaped: the next program of this process does not know of them.
    pub(super) fn reap_all(&mut self) {
        self.dead.retain(|dead| !reap(WaitId::Pid(dead.pid)));
    }

    /// A server has died, or not yet.
    pub(super) fn bury(&mut self, which: Which) {
        self.hear(which);
        let Some(server) = self.which(which) else { return };
        let Some(ended) = server.ended() else { return };
        self.dead.push(Dead { pid: server.pid, since: Instant::now() });
        match which {
            Which::Current => self.current_has_died(ended),
            Which::Stopped => self.stopped_has_died(ended),
            Which::Candidate => self.candidate_has_died(ended),
            Which::Leaving(at) => drop(self.leaving.remove(at)),
        }
    }
}
