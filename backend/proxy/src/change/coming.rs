//! A standby that is on its way: after a recovery it is loaded beside what serves already.
//!
//! A takeover that finds none waits for this one, however long it takes to be loaded, and has it
//! before it has become the standby. It holds the lock of changes meanwhile, which loading does not
//! need, and which what is loaded waits for before it becomes the standby.

use crate::domain::LoadedDomain;
use crate::signal::{Signal, lock};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How often it is said that the standby is waited for.
const REPORT_EVERY: Duration = Duration::from_secs(10);

#[derive(Default)]
enum State {
    #[default]
    Nothing,
    OnItsWay,
    There(LoadedDomain),
}

/// Where it is until it is the standby.
#[derive(Default)]
pub(crate) struct ComingStandby(Mutex<State>);

impl ComingStandby {
    /// One is being loaded from now on, until this says that it is there, or goes.
    pub(crate) fn begin<'a>(&'a self, signal: &'a Signal) -> OnItsWay<'a> {
        *lock(&self.0) = State::OnItsWay;
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

    /// The same, waited for if it is being loaded.
    pub(crate) fn wait(&self, signal: &Signal) -> Option<LoadedDomain> {
        let is_decided = || (!matches!(*lock(&self.0), State::OnItsWay)).then_some(());
        while signal.wait(Instant::now() + REPORT_EVERY, is_decided).is_none() {
            log::error!("the standby is still being loaded; the takeover waits for it");
        }
        self.take()
    }
}

/// Says that a standby is being loaded, as long as it is there.
pub(crate) struct OnItsWay<'a> {
    coming: &'a ComingStandby,
    signal: &'a Signal,
}

impl OnItsWay<'_> {
    /// It is loaded.
    pub(crate) fn arrived(self, domain: LoadedDomain) {
        *lock(&self.coming.0) = State::There(domain);
    }
}

impl Drop for OnItsWay<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.coming.0);
        if matches!(*state, State::OnItsWay) {
            *state = State::Nothing;
        }
        drop(state);
        self.signal.announce();
    }
}
