//! The service manager's store of descriptors: what outlives the supervisor, too.
//!
//! A disk that is memory is gone with the processes that hold it; the manager holds it meanwhile.
//! Stored are the vault's objects, each under a name of its own, and a [`Record`] that says what
//! they are. The frontend's connection and what it has in flight are not: it connects again, and
//! brings the in-flight region. Disks whose data is behind a file are not stored either: nothing
//! of them is lost, and a lock that the manager held would keep others from an image that nothing
//! serves.
//!
//! The manager says nothing: not that there is no room, not that an entry is gone. So messages go
//! in an order in which each prefix of them leaves a record that is whole; a barrier says when all
//! have been looked at; and what comes back at the next start is held against the record.

pub mod name;
mod plan;
pub mod record;

use crate::descriptor::Descriptor;
use crate::notify::Manager;
use crate::vault::Vault;
use name::Name;
use plan::Unkept;
use record::{Entry, Fault, Identity, Record, StartedAs};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::io::PipeReader;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

/// When a manager that had no room, or was not there, is told again.
const AGAIN: Duration = Duration::from_millis(50);
/// When a change is tried again that could not be kept.
const KEEP_AGAIN: Duration = Duration::from_secs(1);
/// How long what is still to be said is said at the end.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Something that the manager is to be told.
#[derive(Debug)]
enum Message {
    Put(Name, Descriptor),
    Remove(Name),
    Text(String),
}

/// How far an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    /// To be stored.
    Coming,
    /// The manager was told of it.
    Stored,
    /// To be removed.
    Going,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    file: Identity,
    step: Step,
}

/// What `status` says of the store.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StoreFacts {
    /// Whether the disk is there.
    pub state: StoreState,
    /// How many entries there are.
    pub entries: usize,
    /// How many there can be, where the manager says so.
    pub limit: Option<usize>,
    /// Why it is not stored, if it is to be and is not.
    pub why: Option<String>,
    /// What was not there any more at the start.
    pub lost: Option<String>,
}

/// Whether the disk is in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreState {
    /// There is no service manager.
    #[default]
    None,
    /// The disk's data is not in memory.
    NotNeeded,
    /// The manager has been told, and has not looked yet.
    Storing,
    /// It is there.
    Held,
    /// The manager has looked, and does not say how much room there is.
    Unconfirmed,
    /// It is not there.
    Failed,
}

/// What was in the store.
#[derive(Debug)]
pub struct KeptDisk {
    /// The vault.
    pub vault: Vault,
    /// Numbers of sessions up to this one are used up.
    pub sessions: u64,
    /// What it was started as.
    pub started_as: StartedAs,
}

/// For the next program of this process.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct PackedStore {
    held: Vec<(String, Held)>,
    numbers: u64,
    lost: Option<String>,
    #[serde(default)]
    started_as: Option<StartedAs>,
}

/// The store.
#[derive(Debug, Default)]
pub struct Store {
    manager: Option<Manager>,
    limit: Option<usize>,
    held: BTreeMap<Name, Held>,
    /// Numbers of names up to this one are used up.
    numbers: u64,
    /// What the disk was started as, if that was not by this process.
    started_as: Option<StartedAs>,
    /// What the last record says.
    said: Option<Record>,
    /// The disk is to be there.
    is_needed: bool,
    queue: VecDeque<Message>,
    barrier: Option<PipeReader>,
    wants_barrier: bool,
    again_at: Option<Instant>,
    /// When the vault is to be kept that could not be.
    keep_at: Option<Instant>,
    /// The log was told that the manager is not there.
    is_told: bool,
    why: Option<String>,
    lost: Option<String>,
}

impl Store {
    /// That of a manager, which has room for `limit` entries, if it says so.
    #[must_use]
    pub fn of(manager: Option<Manager>, limit: Option<usize>) -> Self {
        Self { manager, limit, ..Self::default() }
    }

    /// That of the environment.
    #[must_use]
    pub fn from_environment() -> Self {
        let limit = std::env::var("FDSTORE").ok().and_then(|limit| limit.parse().ok());
        Self::of(Manager::from_environment(), limit)
    }

    /// Takes back what was in the store: descriptors and their names, among which are others that
    /// the manager has passed. What there was, if that was a disk.
    ///
    /// # Errors
    /// There is a disk that only another program can go on with; it stays where it is.
    pub fn take_back(
        &mut self,
        passed: Vec<(String, OwnedFd)>,
    ) -> Result<Option<KeptDisk>, String> {
        let mut entries = Vec::new();
        for (text, descriptor) in passed {
            let named = Name::parse(&text).zip(Identity::of(&descriptor).ok());
            let Some((name, file)) = named else {
                log::warn!("the service manager passes `{text}`, which is none of this daemon's");
                continue;
            };
            self.numbers = self.numbers.max(name.number());
            self.held.insert(name, Held { file, step: Step::Stored });
            entries.push(Entry { name, file, descriptor: descriptor.into() });
        }
        let mut records: Vec<_> =
            entries.iter().filter(|entry| matches!(entry.name, Name::Record(_))).collect();
        records.sort_by_key(|entry| std::cmp::Reverse(entry.name));
        let mut lost = None;
        for entry in records {
            match Record::restore(entry, &entries) {
                Ok((Record { sessions, started_as, .. }, vault)) => {
                    (self.started_as, self.is_needed) = (Some(started_as.clone()), true);
                    self.lost = lost.map(|why| format!("the last change: {why}"));
                    return Ok(Some(KeptDisk { vault, sessions, started_as }));
                }
                Err(Fault::Version(why)) => {
                    return Err(format!(
                        "the service manager has kept a disk that is not understood: {why}; start \
                         that program again, or give the disk up: end the service (and, where it \
                         preserves its store, `systemctl clean --what=fdstore` it)"
                    ));
                }
                Err(Fault::NotNow(why)) => {
                    return Err(format!(
                        "the disk that the service manager has kept cannot be looked at: {why}; \
                         it stays there, and is looked at at the next start"
                    ));
                }
                Err(Fault::Lost(why)) => lost = lost.or(Some(why)),
            }
        }
        if !entries.is_empty() {
            let why = lost.unwrap_or_else(|| "the record is not there any more".to_owned());
            log::error!("the disk that the service manager has kept is lost: {why}");
            self.lost = Some(format!("the disk: {why}"));
            self.keep_nothing();
        }
        Ok(None)
    }

    /// Has the manager keep the vault, or nothing where there is nothing to keep.
    pub fn keep(&mut self, vault: &Vault, sessions: u64, started_as: &StartedAs) {
        if self.manager.is_none() {
            return;
        }
        let wanted = vault.give().filter(|(list, _)| is_memory(list));
        self.is_needed = wanted.is_some();
        let planned = match wanted {
            Some((list, descriptors)) => {
                let started_as = self.started_as.as_ref().unwrap_or(started_as).clone();
                let (awaits_upgrade, objects) = (vault.awaits_upgrade(), BTreeMap::new());
                let record = Record { sessions, started_as, list, awaits_upgrade, objects };
                self.plan(record, descriptors)
            }
            None => {
                self.keep_nothing();
                Ok(())
            }
        };
        self.keep_at = None;
        match planned {
            Ok(()) => self.why = None,
            Err(Unkept::DoesNotFit(why)) => {
                self.does_not_keep(why);
                self.keep_nothing();
            }
            // What is there is the disk as it was: better than none.
            Err(Unkept::NotNow(error)) => {
                self.keep_at = Some(Instant::now() + KEEP_AGAIN);
                self.does_not_keep(format!("its last change is tried again: {error}"));
            }
        }
        self.pump(Instant::now());
    }

    fn does_not_keep(&mut self, why: String) {
        if self.why.as_deref() != Some(&why) {
            log::error!("the service manager does not keep the disk: {why}");
        }
        self.why = Some(why);
    }

    /// Everything of the supervisor's is removed.
    fn keep_nothing(&mut self) {
        self.said = None;
        let all: Vec<Name> = self.held.keys().copied().collect();
        self.remove(all);
    }

    fn remove(&mut self, names: impl IntoIterator<Item = Name>) {
        for name in names {
            if let Some(held) = self.held.get_mut(&name).filter(|held| held.step != Step::Going) {
                held.step = Step::Going;
                self.queue.push_back(Message::Remove(name));
                self.wants_barrier = true;
            }
        }
    }

    /// Tells the manager something that is no matter of the store.
    pub fn say(&mut self, text: &str) {
        if self.manager.is_some() {
            self.queue.push_back(Message::Text(format!("{text}\n")));
            self.pump(Instant::now());
        }
    }

    /// Says what is to be said, as far as there is room.
    pub fn pump(&mut self, now: Instant) {
        let Some(manager) = &self.manager else { return };
        self.again_at = None;
        while let Some(message) = self.queue.front() {
            let said = match message {
                Message::Put(name, descriptor) => manager.say(
                    // Polled, it would be thrown out when it hangs up, as some descriptors do.
                    &format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"),
                    Some(descriptor.as_fd()),
                ),
                Message::Remove(name) => {
                    manager.say(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None)
                }
                Message::Text(text) => manager.say(text, None),
            };
            match said {
                Ok(true) if self.is_told => (self.is_told, self.why) = (false, None),
                Ok(true) => {}
                Ok(false) => {
                    self.again_at = Some(now + AGAIN);
                    return;
                }
                Err(error) => {
                    self.is_silent(&error, now);
                    return;
                }
            }
            match self.queue.pop_front() {
                Some(Message::Put(name, _)) => {
                    if let Some(held) = self.held.get_mut(&name)
                        && held.step == Step::Coming
                    {
                        held.step = Step::Stored;
                    }
                }
                Some(Message::Remove(name)) => _ = self.held.remove(&name),
                Some(Message::Text(_)) | None => {}
            }
        }
        if std::mem::take(&mut self.wants_barrier) {
            match manager.barrier() {
                Ok(Some(barrier)) => self.barrier = Some(barrier),
                Ok(None) => {
                    self.wants_barrier = true;
                    self.again_at = Some(now + AGAIN);
                }
                Err(error) => {
                    self.wants_barrier = true;
                    self.is_silent(&error, now);
                }
            }
        }
    }

    fn is_silent(&mut self, error: &std::io::Error, now: Instant) {
        if !std::mem::replace(&mut self.is_told, true) {
            log::error!("the service manager cannot be told anything: {error}");
        }
        self.why = Some(format!("the service manager cannot be told: {error}"));
        self.again_at = Some(now + 20 * AGAIN);
    }

    /// What hangs up when the manager has looked at everything that was said.
    #[must_use]
    pub fn awaited(&self) -> Option<BorrowedFd<'_>> {
        self.barrier.as_ref().map(AsFd::as_fd)
    }

    /// It has hung up.
    pub fn has_looked(&mut self) {
        self.barrier = None;
    }

    /// When there is something to be said again, or to be kept.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.again_at.into_iter().chain(self.keep_at).min()
    }

    /// Whether [`keep`](Self::keep) is to be called again: it could not do it the last time.
    #[must_use]
    pub fn is_to_keep(&self, now: Instant) -> bool {
        self.keep_at.is_some_and(|at| at <= now)
    }

    /// What is there is right: it is not tried to keep something else.
    pub const fn owe_nothing(&mut self) {
        self.keep_at = None;
    }

    /// Something could not be kept, and is due to be tried again.
    #[cfg(test)]
    pub(crate) fn owe(&mut self) {
        self.keep_at = Some(Instant::now());
    }

    /// Says what is still to be said, for a short time.
    pub fn finish(&mut self) {
        let deadline = Instant::now() + LAST_WORDS;
        self.pump(Instant::now());
        while self.again_at.is_some() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
            self.pump(Instant::now());
        }
    }

    /// What there is to say of it.
    #[must_use]
    pub fn facts(&self) -> StoreFacts {
        let is_told = self.queue.is_empty() && self.barrier.is_none() && !self.wants_barrier;
        let state = match () {
            () if self.manager.is_none() => StoreState::None,
            () if self.why.is_some() => StoreState::Failed,
            () if !self.is_needed => StoreState::NotNeeded,
            () if !is_told => StoreState::Storing,
            () if self.limit.is_some() => StoreState::Held,
            () => StoreState::Unconfirmed,
        };
        let entries = self.held.values().filter(|held| held.step == Step::Stored).count();
        let (why, lost) = (self.why.clone(), self.lost.clone());
        StoreFacts { state, entries, limit: self.limit, why, lost }
    }

    /// For the next program of this process. What is not said yet it says again.
    #[must_use]
    pub fn pack(&self) -> PackedStore {
        let held = self.held.iter().filter(|(_, held)| held.step != Step::Coming);
        PackedStore {
            held: held.map(|(name, held)| (name.to_string(), *held)).collect(),
            numbers: self.numbers,
            lost: self.lost.clone(),
            started_as: self.started_as.clone(),
        }
    }

    /// What another program of this process has packed. It is to be told to [`keep`](Self::keep)
    /// then.
    #[must_use]
    pub fn unpack(packed: PackedStore) -> Self {
        let held = packed.held.into_iter();
        let held = held.filter_map(|(name, held)| Some((Name::parse(&name)?, held)));
        // A removal that was not said is wanted again.
        let held = held.map(|(name, held)| (name, Held { step: Step::Stored, ..held }));
        Self {
            held: held.collect(),
            numbers: packed.numbers,
            lost: packed.lost,
            started_as: packed.started_as,
            ..Self::from_environment()
        }
    }
}

/// Whether all that a disk is is in memory.
fn is_memory(list: &channel::Vault) -> bool {
    !list.regions.is_empty() && list.files.is_empty()
}

#[cfg(test)]
mod tests;
