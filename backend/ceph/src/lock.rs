//! The lock of an image: taken before rings run, and given back when they have stopped.
//!
//! Ceph's lock would come and go by itself, with the first write of whoever writes. Here it is
//! taken for good: another client that asks for it is refused, and what has it is not asked.
//!
//! ```text
//!   free --claim--> taking --> ours --release--> giving back --> free
//!                     |  a thread: whose is it?
//!                     |    nothing's: take it       a client's that is gone: break it, take it
//!                     `--> free, and an answer      another's: taken
//! ```
//!
//! Invariants: one thread at a time changes the lock; whoever asks waits no longer than it likes.

use crate::former::{Client, KEY};
use crate::handle::{Handle, meaning};
use domain_abi::{Claim, DomainError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long it may take to give it back.
const TO_GIVE_BACK: Duration = Duration::from_secs(10);

/// How often it is tried to break the lock of one that is gone, before it is said to be taken.
const TRIES: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// A thread takes it.
    Taking,
    /// A thread gives it back.
    GivingBack,
    Ours,
}

#[derive(Debug)]
struct Inner {
    state: State,
    /// How often a try has ended, and how the last one did.
    tries: u64,
    answer: Result<Claim, String>,
}

/// The lock of one image.
#[derive(Debug)]
pub(crate) struct Lock {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Default for Lock {
    fn default() -> Self {
        let inner = Inner { state: State::Free, tries: 0, answer: Ok(Claim::Nothing) };
        Self { inner: Mutex::new(inner), changed: Condvar::new() }
    }
}

impl Lock {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a thread work on the lock; its answer is the state after it, and what is said.
    fn begin(
        self: &Arc<Self>,
        inner: &mut Inner,
        state: State,
        work: impl FnOnce() -> (State, Result<Claim, String>) + Send + 'static,
    ) -> Result<(), DomainError> {
        let lock = Arc::clone(self);
        let thread = std::thread::Builder::new().name("ceph-lock".to_owned());
        let before = std::mem::replace(&mut inner.state, state);
        let spawned = thread.spawn(move || {
            let (state, answer) = work();
            let mut inner = lock.lock();
            inner.state = state;
            inner.answer = answer;
            inner.tries += 1;
            drop(inner);
            lock.changed.notify_all();
        });
        spawned.map(drop).map_err(|error| {
            inner.state = before;
            DomainError::new(format!("no thread for the lock of the image: {error}"))
        })
    }

    /// Waits until the thread that works on it has ended, if one does.
    fn settled<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        deadline: Instant,
    ) -> (MutexGuard<'a, Inner>, bool) {
        while matches!(inner.state, State::Taking | State::GivingBack) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return (inner, false);
            }
            let waited = self.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        (inner, true)
    }

    /// Takes it.
    pub(crate) fn claim(
        self: &Arc<Self>,
        handle: &Arc<Handle>,
        patience: Duration,
    ) -> Result<Claim, DomainError> {
        let deadline = Instant::now() + patience;
        let mut inner = self.lock();
        // The number of tries that had ended when the one began whose answer is ours.
        let mut asked = None;
        loop {
            match (inner.state, asked) {
                (State::Ours, _) => return Ok(Claim::Ours),
                (State::Free, Some(before)) if inner.tries != before => {
                    return inner.answer.clone().map_err(DomainError::new);
                }
                (State::Free, _) => {
                    asked = Some(inner.tries);
                    let handle = Arc::clone(handle);
                    let take = move || match take(&handle) {
                        Ok(Claim::Ours) => (State::Ours, Ok(Claim::Ours)),
                        answer => (State::Free, answer),
                    };
                    self.begin(&mut inner, State::Taking, take)?;
                }
                (State::Taking, None) => asked = Some(inner.tries),
                (State::Taking | State::GivingBack, _) => {}
            }
            let is_settled;
            (inner, is_settled) = self.settled(inner, deadline);
            if !is_settled {
                return Err(DomainError::new(
                    "its lock is being taken; if that does not end, look whether the cluster's OSDs and monitors run (`ceph -s`)",
                ));
            }
        }
    }

    /// Whether nothing can have been written that is not durable: each time that it is given back,
    /// all is made so before.
    pub(crate) fn is_clean(&self) -> bool {
        matches!(self.lock().state, State::Free | State::Taking)
    }

    /// Gives it back, after all that was written is durable.
    pub(crate) fn release(self: &Arc<Self>, handle: &Arc<Handle>) -> Result<(), DomainError> {
        let deadline = Instant::now() + TO_GIVE_BACK;
        let late =
            || DomainError::new("its lock is not given back yet: the cluster does not answer");
        let (mut inner, is_settled) = self.settled(self.lock(), deadline);
        if !is_settled {
            return Err(late());
        }
        if inner.state == State::Free {
            return Ok(());
        }
        let handle = Arc::clone(handle);
        let give_back = move || match give_back(&handle) {
            Ok(()) => (State::Free, Ok(Claim::Nothing)),
            Err(why) => (State::Ours, Err(why)),
        };
        self.begin(&mut inner, State::GivingBack, give_back)?;
        let (inner, is_settled) = self.settled(inner, deadline);
        if !is_settled {
            return Err(late());
        }
        inner.answer.clone().map(drop).map_err(DomainError::new)
    }
}

fn give_back(handle: &Handle) -> Result<(), String> {
    // It flushes first.
    let failed = |what: &str, errno| format!("{what} {}: {}", handle.label(), meaning(errno));
    match handle.release() {
        Err(errno) if handle.is_owner() != Ok(false) => {
            Err(failed("cannot give back the lock of", errno))
        }
        _ => Ok(()),
    }
}

/// Takes the lock, unless another client that lives has it.
fn take(handle: &Handle) -> Result<Claim, String> {
    let failed = |what: &str, errno| format!("{what} {}: {}", handle.label(), meaning(errno));
    for _ in 0..TRIES {
        if !handle.is_owner().map_err(|errno| failed("cannot look at the lock of", errno))?
            && let Some(owner) =
                handle.owner().map_err(|errno| failed("cannot look at the lock of", errno))?
        {
            let noted = handle.note(KEY).map_err(|errno| failed("cannot read notes of", errno))?;
            let former = noted.as_deref().and_then(Client::parse);
            if former.is_some_and(|former| former.is_dead(&owner)) {
                log::info!(
                    "image {} is locked by {owner}, a daemon of this host that has ended: its lock is broken",
                    handle.label()
                );
                match handle.break_lock(&owner) {
                    // It is not there any more, or is another's.
                    Ok(()) | Err(libc::ENOENT | libc::EBUSY | libc::EAGAIN) => continue,
                    Err(errno) => {
                        let what = format!(
                            "cannot break the lock of {owner}, which has ended (its user needs mon 'profile rbd'), on"
                        );
                        return Err(failed(&what, errno));
                    }
                }
            }
            // One that does not even watch the image is gone for half a minute or more, and Ceph
            // breaks its lock by itself.
            let is_there = handle.is_watched_by(&owner);
            if is_there.map_err(|errno| failed("cannot list watchers of", errno))? {
                return Ok(Claim::Taken);
            }
        }
        return match handle.acquire() {
            Ok(()) => {
                // Before anything is written: what dies without it is waited for.
                note(handle);
                Ok(Claim::Ours)
            }
            // Another one was faster.
            Err(libc::EROFS | libc::EBUSY | libc::EAGAIN) => Ok(Claim::Taken),
            Err(errno) => Err(failed("cannot take the lock of", errno)),
        };
    }
    Ok(Claim::Taken)
}

/// Writes down whose the lock is.
fn note(handle: &Handle) {
    let noted = handle.owner().and_then(|owner| {
        let client = owner.as_deref().and_then(Client::this).ok_or(libc::ENOENT)?;
        handle.set_note(KEY, &client.text())
    });
    if let Err(errno) = noted {
        log::warn!(
            "cannot write down in image {} that its lock is this daemon's ({}): after a kill, the next one waits 30 s for it",
            handle.label(),
            meaning(errno)
        );
    }
}
