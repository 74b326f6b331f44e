//! Whose the data behind the disk is: claimed while rings run, given back when they have stopped.
//!
//! A session says when it [wants](DomainProxy::want_claim) the claim, before its first ring runs,
//! and tries until it has it; it [gives it back](DomainProxy::give_back) when its last ring has
//! stopped. The domain makes the claim, on something in storage: so it stays made over an upgrade,
//! a takeover, and the death of the process.
//!
//! Invariants: nothing is released that a session wants; what may still be written to is not
//! released; a device that is being given to another process is neither claimed nor released here,
//! because the claim goes with it.

use crate::claims::{ClaimState, Held};
use crate::device::DomainProxy;
use crate::domain::LoadedDomain;
use crate::record::code::Code;
use crate::record::report::{Options, Refusal};
use crate::signal::lock;
use domain_abi::Claim;
use domain_host::CallError;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

/// How often a claim that is being made or given back is looked at again.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// The pause before the data is given back that could not be; it is doubled.
const LET_GO_AGAIN: Duration = Duration::from_millis(20);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Whether rings may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// They may.
    Yes,
    /// Another program uses the disk's data.
    Taken,
    /// It cannot be told now, for this reason; or for none, and soon.
    NotNow(Option<String>),
}

impl DomainProxy {
    /// A session's first ring is about to run: from now on the claim is not given back.
    pub fn want_claim(&self) {
        self.claims.wanted.fetch_add(1, Ordering::SeqCst);
    }

    /// Claims the data for a session that wants it. Does not wait for another program, but for a
    /// claim that is being given back, if it is to `wait`.
    #[must_use]
    pub fn claim(self: &Arc<Self>, wait: bool) -> Claimed {
        let claims = &self.claims;
        let held = if wait { Some(lock(&claims.held)) } else { claims.try_lock() };
        let Some(mut held) = held else { return Claimed::NotNow(None) };
        if held.is_leaving {
            return Claimed::NotNow(None);
        }
        // Where nothing serves, nothing is written; what serves next is claimed for first.
        let Some(live) = self.live() else { return Claimed::Yes };
        let claimed = match live.instance.claim() {
            Ok(Claim::Nothing) => {
                held.is_ours = false;
                Claimed::Yes
            }
            Ok(Claim::Ours) => {
                held.is_ours = true;
                Claimed::Yes
            }
            Ok(Claim::Taken) => Claimed::Taken,
            Err(CallError::Failed(_)) if live.is_dead() => Claimed::NotNow(None),
            Err(CallError::Failed(why)) => {
                Claimed::NotNow(Some(format!("{} cannot claim the disk: {why}", live.label())))
            }
            Err(CallError::Panicked(why)) => {
                self.died(&live, &format!("{} has panicked in its claim: {why}", live.label()));
                Claimed::NotNow(None)
            }
        };
        claims.is_waiting.store(claimed == Claimed::Taken, Ordering::Relaxed);
        claimed
    }

    /// A session's last ring has stopped. The data is claimed until
    /// [`release_claim`](Self::release_claim) has made what was written durable.
    pub fn give_back(&self) {
        self.claims.wanted.fetch_sub(1, Ordering::SeqCst);
    }

    /// The data may be written to although no ring runs: it stays claimed until the process ends.
    pub fn keep_claim(&self) {
        self.claims.is_kept.store(true, Ordering::SeqCst);
    }

    /// Whether there is something to be given back.
    #[must_use]
    pub fn has_claimed(&self) -> bool {
        self.claims.try_lock().is_none_or(|held| held.is_ours)
    }

    /// Makes what was written durable, and lets others use the data, unless a session wants it.
    /// Takes as long as the storage does.
    pub fn release_claim(self: &Arc<Self>) {
        self.let_go(|held| held.is_ours);
    }

    /// The same, of what may have been claimed before this process had the device, or by a domain
    /// that was prepared. What a session wants is given back with the rings.
    pub fn settle_claim(self: &Arc<Self>) {
        if self.claims.is_wanted() {
            lock(&self.claims.held).is_ours = true;
            return;
        }
        self.let_go(|_| true);
    }

    fn let_go(self: &Arc<Self>, is_due: impl FnOnce(&Held) -> bool) {
        if !self.try_to_let_go(is_due) || self.claims.is_tried_again.swap(true, Ordering::AcqRel) {
            return;
        }
        // Nobody else comes back to it, and nobody is to wait for it.
        let proxy = Arc::downgrade(self);
        let tries = move || {
            let mut pause = LET_GO_AGAIN;
            loop {
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
                let Some(proxy) = proxy.upgrade() else { return };
                if proxy.is_stopping() || !proxy.try_to_let_go(|held| held.is_ours) {
                    proxy.claims.is_tried_again.store(false, Ordering::Release);
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("release".to_owned()).spawn(tries) {
            self.claims.is_tried_again.store(false, Ordering::Release);
            log::error!("no thread to give the disk back with: {error}");
        }
    }

    /// Gives the data back if that is due, and nobody wants it. Whether it has failed, and is to be
    /// tried again.
    fn try_to_let_go(self: &Arc<Self>, is_due: impl FnOnce(&Held) -> bool) -> bool {
        let mut held = lock(&self.claims.held);
        let is_kept = self.claims.is_kept.load(Ordering::SeqCst);
        if is_kept || held.is_leaving || self.claims.is_wanted() || !is_due(&held) {
            return false;
        }
        // Without one it stays as it is: the next that serves gives it back.
        let Some(live) = self.live() else { return false };
        match live.instance.release() {
            Ok(()) => held.is_ours = false,
            Err(CallError::Failed(why)) => {
                held.is_ours = true;
                // Once for all tries.
                if !self.claims.is_tried_again.load(Ordering::Acquire) {
                    log::error!(
                        "{} does not give the disk back to other programs, which is tried again: {why}",
                        live.label()
                    );
                }
                return true;
            }
            Err(CallError::Panicked(why)) => {
                self.died(&live, &format!("{} has panicked in giving back: {why}", live.label()));
            }
        }
        false
    }

    /// Whose the data is now.
    #[must_use]
    pub fn claim_state(&self) -> ClaimState {
        let is_wanted = self.claims.is_wanted();
        if is_wanted && self.claims.is_waiting.load(Ordering::Relaxed) {
            ClaimState::Waiting
        } else if is_wanted || self.has_claimed() {
            ClaimState::Claimed
        } else {
            ClaimState::Free
        }
    }

    /// Claims the data with `next`, which is to serve where nothing does, if rings run. Waits for
    /// what does not answer, for `limit`. The claim neither begins nor ends until what this returns
    /// is dropped.
    ///
    /// # Errors
    /// Another program uses it, or it cannot be told.
    pub(crate) fn claim_for(
        &self,
        next: &LoadedDomain,
        limit: Duration,
    ) -> Result<MutexGuard<'_, Held>, Refusal> {
        let deadline = Instant::now() + limit;
        let mut held = lock(&self.claims.held);
        let why = loop {
            // What the domain before had claimed may be lost with it, so it is claimed again.
            if !self.claims.is_wanted() {
                return Ok(held);
            }
            match next.instance.claim() {
                Ok(claim @ (Claim::Nothing | Claim::Ours)) => {
                    held.is_ours = claim == Claim::Ours;
                    return Ok(held);
                }
                Ok(Claim::Taken) => {
                    break "another program uses the disk's data; end that one".to_owned();
                }
                // One that is not done yet goes on, and is lost with `next`.
                Err(CallError::Failed(_)) if Instant::now() < deadline && !self.is_stopping() => {
                    std::thread::sleep(LOOK_EVERY);
                }
                Err(error) => break error.to_string(),
            }
        };
        let message = format!("{} cannot serve: {why}", next.label());
        Err(Refusal::new(Code::ActivateFailed, message))
    }

    /// The device goes to another process, and the claim with it.
    ///
    /// # Errors
    /// It is being given back, and that does not end.
    pub(crate) fn begin_leaving(&self, options: Options) -> Result<(), Refusal> {
        let deadline = Instant::now() + options.limit();
        loop {
            if let Some(mut held) = self.claims.try_lock() {
                held.is_leaving = true;
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Refusal::new(
                    Code::Busy,
                    "what was written is being made durable, and that does not end; look at the storage, then try again",
                ));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// It stays.
    pub(crate) fn end_leaving(self: &Arc<Self>) {
        lock(&self.claims.held).is_leaving = false;
        self.release_claim();
    }
}
