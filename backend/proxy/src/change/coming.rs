//! A standby that is on its way: after a recovery it is loaded beside what serves already.
//!
//! A takeover that finds none waits for this one, but not for ever, and has it before it has become
//! the standby. It holds the lock of changes meanwhile, which loading does not need, and which what
//! is loaded waits for before it becomes the standby. Operators' commands wait until it is the
//! standby, because a rollback is to find it, and no longer than a takeover does: an upgrade is not
//! to be held up by one that is never there.

use crate::domain::LoadedDomain;
use crate::signal::{Signal, lock};
use std::sync::Mutex;
use std::time::{Duration, Instant};

#[derive(Default)]
enum State {
    /// None is loaded, or waited for.
    #[default]
    Nothing,
    OnItsWay {
        since: Instant,
    },
    There(LoadedDomain),
}

/// Where it is until it is the standby.
#[derive(Default)]
pub(crate) struct ComingStandby(Mutex<State>);

impl ComingStandby {
    /// One is being loaded from now on, until this says that it is there, or goes.
    pub(crate) fn begin<'a>(&'a self, signal: &'a Signal) -> OnItsWay<'a> {
        *lock(&self.0) = State::OnItsWay { since: Instant::now() };
        OnItsWay { coming: self, signal }
    }

    /// What was loaded, unless a takeover has had it.
    pub(crate) fn take(&self) -> Option<LoadedDomain> {
        let mut state = lock(&self.0);
        match std::mem::take(&mut *state) {
            State::There(domain) => Some(domain),
            other => {
                *state = other;
                None
            }
        }
    }

    /// The same, waited for until `deadline` if it is being loaded. After that it is never had.
    pub(crate) fn wait(&self, signal: &Signal, deadline: Instant) -> Option<LoadedDomain> {
        let is_decided = || (!matches!(*lock(&self.0), State::OnItsWay { .. })).then_some(());
        let _ = signal.wait(deadline, is_decided);
        let state = std::mem::take(&mut *lock(&self.0));
        signal.announce();
        match state {
            State::There(domain) => Some(domain),
            State::Nothing => None,
            State::OnItsWay { .. } => {
                log::error!("the standby is still being loaded, and is not waited for any more");
                None
            }
        }
    }

    /// Whether operators' commands wait for it: it is about to be the standby, or has been loaded
    /// for less than `patience`.
    pub(crate) fn holds_up(&self, patience: Duration) -> bool {
        match *lock(&self.0) {
            State::Nothing => false,
            State::OnItsWay { since } => since.elapsed() < patience,
            State::There(_) => true,
        }
    }
}

/// Says that a standby is being loaded, as long as it is there.
pub(crate) struct OnItsWay<'a> {
    coming: &'a ComingStandby,
    signal: &'a Signal,
}

impl OnItsWay<'_> {
    /// It is loaded. It comes back if it is not waited for any more.
    pub(crate) fn arrived(self, domain: LoadedDomain) -> Result<(), LoadedDomain> {
        let mut state = lock(&self.coming.0);
        if !matches!(*state, State::OnItsWay { .. }) {
            return Err(domain);
        }
        *state = State::There(domain);
        Ok(())
    }
}

impl Drop for OnItsWay<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.coming.0);
        if matches!(*state, State::OnItsWay { .. }) {
            *state = State::Nothing;
        }
        drop(state);
        self.signal.announce();
    }
}
