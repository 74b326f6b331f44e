//! The device: what serves it, and everything else that the ways of requests and changes share.
//!
//! What serves it is [`Live`], and nothing else says so. The cell is what workers see of it: it is
//! changed first where a domain is published or taken out of service, and [`Live`] follows under
//! the lock of changes.

use crate::canary::Canary;
use crate::change::coming::ComingStandby;
use crate::change::prepare::Preparer;
use crate::change::refusals::stopping;
use crate::claims::Claims;
use crate::datapath::queue::Queues;
use crate::domain::LoadedDomain;
use crate::environment::Environment;
use crate::keeping::Keeping;
use crate::record::events::Events;
use crate::record::history::History;
use crate::record::report::{Change, DomainRecord, Entry, Event, Outcome, Refusal};
use crate::record::residents::Residents;
use crate::record::status::State;
use crate::signal::{Signal, lock};
use domain_abi::{Capabilities, DeviceInfo};
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError};
use std::time::{Duration, Instant, SystemTime};
use storage::{DomainId, Storage};

/// What serves the device.
pub(crate) enum Live {
    /// This domain. It may have died just now, and not be known to have.
    Serving(LoadedDomain),
    /// A domain that has died, and is to be replaced; nothing, once every worker has left it.
    TakingOver(Option<LoadedDomain>),
    /// Nothing, for this reason: the live domain has died, and none could take over.
    Faulted(String),
}

impl Live {
    /// The domain that serves, or did until it died.
    const fn domain(&self) -> Option<&LoadedDomain> {
        match self {
            Self::Serving(domain) | Self::TakingOver(Some(domain)) => Some(domain),
            Self::TakingOver(None) | Self::Faulted(_) => None,
        }
    }
}

/// What changes only under the lock of changes, and may be looked at without it.
struct View {
    live: Live,
    /// The live domain, or the last one that was.
    record: Arc<DomainRecord>,
    generation: u64,
    /// Domains whose death is known and not dealt with yet.
    dying: HashSet<DomainId>,
    /// Why requests that a replaced domain had stay unanswered, if some do.
    unfenced: Option<String>,
    standby: Option<Arc<DomainRecord>>,
    /// The domain that was replaced and is still in use, in a sentence.
    retiring: Option<String>,
    /// Changes that are under way: an operator's, and a takeover that comes between its phases.
    changing: u32,
    history: History,
    /// What had to be left, for the end.
    left: Vec<String>,
}

impl View {
    fn live_has_died(&self) -> bool {
        self.live.domain().is_some_and(|live| live.is_dead())
    }

    fn fault(&self) -> Option<&String> {
        match &self.live {
            Live::Faulted(why) => Some(why),
            _ => self.unfenced.as_ref(),
        }
    }

    /// Shows which domains there are beside the live one.
    fn show(&mut self, others: &Others) {
        self.standby = others.standby.as_ref().map(|standby| standby.record());
        self.retiring = others.retiring.as_ref().map(|retiring| {
            let label = retiring.domain.label();
            format!("{label}: replaced, and still has requests in flight")
        });
    }

    fn state(&self) -> State {
        match self.live {
            _ if self.fault().is_some() => State::Faulted,
            Live::Serving(_) if self.changing == 0 => State::Serving,
            _ => State::Upgrading,
        }
    }
}

/// An instance that was replaced and may still be in use.
pub(crate) struct Retiring {
    pub(crate) domain: LoadedDomain,
    pub(crate) grace: Option<srcu::Grace<Option<LoadedDomain>>>,
}

/// The domains beside the live one. The lock of changes protects them.
#[derive(Default)]
pub(crate) struct Others {
    pub(crate) standby: Option<LoadedDomain>,
    pub(crate) retiring: Option<Retiring>,
}

/// The lock of changes, held.
pub(crate) struct Changing<'a> {
    /// Before what follows: it is released before that is announced.
    others: MutexGuard<'a, Others>,
    _released: Announced<'a>,
}

impl std::ops::Deref for Changing<'_> {
    type Target = Others;

    fn deref(&self) -> &Others {
        &self.others
    }
}

impl std::ops::DerefMut for Changing<'_> {
    fn deref_mut(&mut self) -> &mut Others {
        &mut self.others
    }
}

/// Announces a change when it goes.
struct Announced<'a>(&'a Signal);

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        self.0.announce();
    }
}

/// The device's side of the live domain. See the crate's page.
pub struct DomainProxy {
    pub(crate) cell: Arc<srcu::Cell<Option<LoadedDomain>>>,
    pub(crate) preparer: Preparer,
    pub(crate) storage: Arc<Storage>,
    pub(crate) queues: Arc<Queues>,
    pub(crate) environment: Arc<Environment>,
    pub(crate) residents: Arc<Residents>,
    /// Rung when something has changed that may be waited for.
    pub(crate) signal: Arc<Signal>,
    events: Events,
    /// Held by the operator's command that is being carried out.
    pub(crate) operator: Mutex<()>,
    /// Held by what replaces the live domain: an operator's command, or a takeover, which comes
    /// between its phases.
    changes: Mutex<Others>,
    /// A standby that is being loaded, and that a takeover waits for.
    pub(crate) coming: ComingStandby,
    view: Mutex<View>,
    /// What must outlive the process. It has what the guest was offered, as capabilities that a
    /// successor must have.
    pub(crate) keeping: Arc<Keeping>,
    /// What the live domain serves, in bytes, as far as a guest may be told.
    capacity: AtomicU64,
    /// The capacity that a domain is being given, or was when it died; 0 for none.
    pub(crate) attempted: AtomicU64,
    pub(crate) canary: Canary,
    /// Whose the data is.
    pub(crate) claims: Claims,
    /// Told when the configuration space has changed.
    pub(crate) config_hook: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Since when the device is about to end.
    pub(crate) stopping: OnceLock<Instant>,
}

impl DomainProxy {
    /// A device of what is ready. `published` is what workers find: what serves, if anything does.
    pub(crate) fn assemble(
        preparer: Preparer,
        queues: usize,
        published: Option<LoadedDomain>,
        live: Live,
        record: Arc<DomainRecord>,
        generation: u64,
    ) -> Arc<Self> {
        let capacity = AtomicU64::new(record.info.capacity);
        let canary = Canary::new(&preparer.signal);
        let view = View {
            record,
            generation,
            live,
            dying: HashSet::new(),
            unfenced: None,
            standby: None,
            retiring: None,
            changing: 0,
            history: History::default(),
            left: Vec::new(),
        };
        Arc::new(Self {
            cell: srcu::Cell::new(published, queues),
            keeping: Keeping::new(&preparer.storage),
            storage: Arc::clone(&preparer.storage),
            queues: Arc::clone(&preparer.queues),
            environment: Arc::clone(&preparer.environment),
            residents: Arc::clone(&preparer.residents),
            signal: Arc::clone(&preparer.signal),
            preparer,
            events: Events::default(),
            operator: Mutex::default(),
            changes: Mutex::default(),
            coming: ComingStandby::default(),
            view: Mutex::new(view),
            capacity,
            attempted: AtomicU64::new(0),
            canary,
            claims: Claims::default(),
            config_hook: OnceLock::new(),
            stopping: OnceLock::new(),
        })
    }

    /// Takes the lock of changes.
    pub(crate) fn lock_changes(&self) -> Changing<'_> {
        Changing { others: lock(&self.changes), _released: Announced(&self.signal) }
    }

    /// Takes the lock of changes if nothing has it.
    pub(crate) fn try_lock_changes(&self) -> Option<Changing<'_>> {
        let others = match self.changes.try_lock() {
            Ok(others) => others,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Changing { others, _released: Announced(&self.signal) })
    }

    /// The live domain, or the last one that was.
    #[must_use]
    pub fn domain(&self) -> DomainRecord {
        (*self.record()).clone()
    }

    pub(crate) fn record(&self) -> Arc<DomainRecord> {
        Arc::clone(&lock(&self.view).record)
    }

    /// The domain that serves, or did until it died, if every worker has not left it yet.
    pub(crate) fn live(&self) -> Option<LoadedDomain> {
        lock(&self.view).live.domain().cloned()
    }

    /// Whether the live domain has died, and is still to be replaced.
    pub(crate) fn live_has_died(&self) -> bool {
        lock(&self.view).live_has_died()
    }

    /// Whether nothing serves, and nothing will before an upgrade.
    pub(crate) fn is_faulted(&self) -> bool {
        matches!(lock(&self.view).live, Live::Faulted(_))
    }

    /// Makes `next` what serves, after it was published.
    pub(crate) fn set_live(&self, next: &LoadedDomain) {
        let mut view = lock(&self.view);
        view.unfenced = None;
        view.record = next.record();
        self.capacity.store(view.record.info.capacity, Ordering::Release);
        self.attempted.store(0, Ordering::Relaxed);
        view.generation = next.instance.generation();
        view.live = if view.dying.contains(&next.id) {
            Live::TakingOver(Some(Arc::clone(next)))
        } else {
            Live::Serving(Arc::clone(next))
        };
        let generation = view.generation;
        drop(view);
        self.keeping.serves(next, generation, None);
        self.keeping.tell();
        self.signal.announce();
    }

    /// Takes the dead live domain out of service, after workers were told.
    pub(crate) fn take_dead(&self) -> LoadedDomain {
        let mut view = lock(&self.view);
        match std::mem::replace(&mut view.live, Live::TakingOver(None)) {
            Live::Serving(dead) | Live::TakingOver(Some(dead)) => dead,
            Live::TakingOver(None) | Live::Faulted(_) => {
                unreachable!("only a live domain dies as one")
            }
        }
    }

    /// Nothing serves, because of `why`.
    pub(crate) fn set_faulted(&self, why: &str) {
        lock(&self.view).live = Live::Faulted(why.to_owned());
        self.keeping.is_faulted(why);
        self.keeping.tell();
        self.signal.announce();
    }

    /// Requests that a replaced domain had stay unanswered, because of `why`.
    pub(crate) fn set_unfenced(&self, why: String) {
        lock(&self.view).unfenced = Some(why);
    }

    /// Why the device is faulted, if it is.
    pub(crate) fn fault(&self) -> Option<String> {
        lock(&self.view).fault().cloned()
    }

    /// Makes `next` what workers find, where they found nothing.
    pub(crate) fn publish(&self, next: &LoadedDomain) {
        let grace = self.cell.swap(Some(Arc::clone(next))).unwrap_or_else(|error| {
            unreachable!("under the lock of changes, on a thread without a reader: {error}")
        });
        self.set_live(next);
        // What the old value was, nothing, does not matter to any reader.
        drop(grace.wait(Duration::from_secs(1)));
        self.queues.notify_all();
    }

    pub(crate) fn next_generation(&self) -> u64 {
        lock(&self.view).generation + 1
    }

    /// Notes that a domain has died. Returns whether that is news.
    pub(crate) fn begin_dying(&self, dead: &LoadedDomain, reason: &str) -> bool {
        let mut view = lock(&self.view);
        if !view.dying.insert(dead.id) {
            return false;
        }
        log::error!("generation {} has died: {reason}", dead.instance.generation());
        if let Live::Serving(live) = &view.live
            && live.id == dead.id
        {
            view.live = Live::TakingOver(Some(Arc::clone(dead)));
        }
        drop(view);
        self.signal.announce();
        true
    }

    /// A death was dealt with, or has to be noticed again.
    pub(crate) fn end_dying(&self, dead: DomainId) {
        lock(&self.view).dying.remove(&dead);
        self.signal.announce();
    }

    /// Whether a death is not dealt with yet.
    pub(crate) fn is_dying(&self) -> bool {
        let view = lock(&self.view);
        !view.dying.is_empty() || view.live_has_died()
    }

    /// What a guest is to be told of the device; from now on every successor must have what
    /// `required` picks of it. Called when a session begins.
    ///
    /// Waits for a change that is under way, because that was held against what an earlier guest
    /// was told. Returns `None` if it takes longer than `patience`.
    pub fn offer(
        self: &Arc<Self>,
        patience: Duration,
        required: impl FnOnce(&DeviceInfo) -> Capabilities,
    ) -> Option<DeviceInfo> {
        let changing = self.lock_alive(Instant::now() + patience, || self.is_stopping())?;
        let mut info = self.domain().info;
        // What only a generation on trial has would leave it without a way back.
        if self.keeping.tried() == lock(&self.view).generation
            && let Some(standby) = &changing.standby
        {
            info.capabilities =
                Capabilities(info.capabilities.0 & standby.record().info.capabilities.0);
        }
        self.require(required(&info));
        Some(info)
    }

    /// Says which capabilities a guest relies on, so that every successor must have them. Called
    /// when a session ends, with those that were acknowledged.
    pub fn require(&self, capabilities: Capabilities) {
        self.keeping.require(capabilities);
        self.keeping.tell();
    }

    pub(crate) fn required_capabilities(&self) -> Capabilities {
        self.keeping.required()
    }

    /// Records that a frontend came or went.
    pub fn connected(&self, connected: bool) {
        self.events.push(Event::Connected(connected));
    }

    pub(crate) fn started(&self, change: Change, target: &str) {
        lock(&self.view).changing += 1;
        self.events.push(Event::Started { change, target: target.to_owned() });
    }

    /// Without `others` nothing of them has changed.
    pub(crate) fn ended<R: Clone + Into<Outcome>>(
        &self,
        others: Option<&Others>,
        change: Change,
        result: &Result<R, Refusal>,
    ) {
        let result = result.clone().map(Into::into);
        let entry = Entry { at: SystemTime::now(), change, result: result.clone() };
        entry.log();
        let mut view = lock(&self.view);
        view.changing -= 1;
        if let (Change::Takeover, Err(refusal)) = (change, &result) {
            let (generation, reason) = (view.generation, refusal.message.clone());
            self.events.push(Event::Faulted { generation, reason });
        }
        view.history.push(entry.clone());
        if let Some(others) = others {
            view.show(others);
        }
        drop(view);
        if let Some(others) = others {
            self.keeping.stands_by(others.standby.as_ref());
            self.keeping.tell();
        }
        self.events.push(Event::Ended(Box::new(entry)));
    }

    /// Shows which domains there are beside the live one.
    pub(crate) fn show(&self, others: &Others) {
        lock(&self.view).show(others);
        self.keeping.stands_by(others.standby.as_ref());
        self.keeping.tell();
    }

    /// Whether the device is about to end.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping.get().is_some()
    }

    pub(crate) fn check_stopping(&self) -> Result<(), Refusal> {
        if self.is_stopping() { Err(stopping()) } else { Ok(()) }
    }

    /// Records something that had to be left, for the end.
    pub fn leave_behind(&self, what: &str) {
        lock(&self.view).left.push(what.to_owned());
    }

    /// What had to be left so far; it is not told again.
    pub(crate) fn take_left(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.view).left)
    }
}

mod keep;
mod look;
mod start;
#[cfg(test)]
mod tests;
