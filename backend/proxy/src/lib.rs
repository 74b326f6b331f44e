//! The proxy: what stands between a device's workers and its live domain.
//!
//! One [`DomainProxy`] per device. It holds the SRCU cell with the live instance, the storage that
//! outlives instances, the standby, and the upgrade lock. Workers use it through [`Worker`] (the
//! read path); operators through [`DomainProxy::upgrade`] and [`DomainProxy::rollback`].
//!
//! The ways by file name: `worker.rs` is the way of a request, `upgrade.rs` the way of an upgrade;
//! the crate `storage` keeps what both leave behind.
//!
//! Invariants: a request is completed by the instance that took it; the storage has one owner;
//! generations grow by one with every committed change; nothing of an instance is used after it was
//! retired.
//!
//! Deliberately absent: virtio, vhost-user, guest memory, JSON, files with modules in them
//! ([`domain_host::ModuleLoader`] finds those).

#![forbid(unsafe_code)]

mod code;
mod drain;
mod environment;
mod events;
mod fence;
mod flights;
mod queue;
mod report;
mod retire;
mod serialize;
mod services;
mod starved;
mod stop;
mod takeover;
mod upgrade;
mod wire;
mod worker;

pub use code::Code;
pub use flights::{Naming, slot_of};
pub use queue::{Notifier, QueueStatus};
pub use report::{
    Change, DomainRecord, Entry, Event, Mode, Options, Phases, Protocol, Refusal, Report, Starved,
    WhenBusy,
};
pub use wire::Blame;
pub use worker::{Ended, Gate, Worker};

use domain_abi::{Capabilities, DeviceInfo, Params};
use domain_host::{CallError, Instance, ModuleLoader, QUEUE_LIMIT, Resident};
use environment::Environment;
use events::Events;
use fence::Fence;
use queue::Queues;
use retire::Leaving;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};
use storage::{DomainId, Storage};
use upgrade::lock;

/// How many entries the history keeps.
const HISTORY: usize = 1024;

/// How long a takeover is waited for by whoever has to tell the guest how something ended.
const TAKEOVER_PATIENCE: Duration = Duration::from_secs(10);

/// An instance and what is known about it.
#[derive(Clone)]
pub(crate) struct Member {
    pub(crate) id: DomainId,
    pub(crate) instance: Arc<Instance>,
    pub(crate) fence: Arc<Fence>,
    /// Shared, so that a member can be cloned and dropped inside the bracket for next to nothing.
    pub(crate) record: Arc<DomainRecord>,
}

/// Whether there is somebody to submit to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Service {
    /// The live domain serves.
    Up = 0,
    /// It has died; requests wait for the takeover.
    Held = 1,
    /// It has died and nobody took over; requests end with I/O errors.
    Failed = 2,
}

/// What the upgrade lock protects.
#[derive(Default)]
pub(crate) struct Upgrades {
    standby: Option<Member>,
    leaving: Option<Leaving>,
}

/// What the device is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The live domain serves.
    Serving,
    /// It serves, and a change is under way.
    Upgrading,
    /// It has panicked: requests end with I/O errors until an upgrade brings the device back.
    Faulted,
}

impl State {
    /// Its name in JSON and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Upgrading => "upgrading",
            Self::Faulted => "faulted",
        }
    }
}

/// How many changes ended how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Counts {
    /// Committed upgrades.
    pub committed: u64,
    /// Refused upgrades and rollbacks.
    pub refused: u64,
    /// Committed rollbacks.
    pub rolled_back: u64,
    /// Takeovers by the standby.
    pub takeovers: u64,
}

/// Everything that `status` tells.
#[derive(Debug, Clone)]
pub struct Status {
    /// The live generation.
    pub generation: u64,
    /// What the device is doing.
    pub state: State,
    /// Why it is faulted, if it is.
    pub fault: Option<String>,
    /// The live domain.
    pub domain: DomainRecord,
    /// What a rollback would bring back.
    pub standby: Option<DomainRecord>,
    /// Queue by queue.
    pub queues: Vec<QueueStatus>,
    /// How changes ended so far.
    pub counts: Counts,
    /// Modules that are mapped though nothing needs them, and why.
    pub resident: Vec<String>,
    /// Why something that was written may be lost. It stays until the disk is opened anew.
    pub storage_failure: Option<String>,
    /// What domains have counted, by name.
    pub counters: BTreeMap<String, u64>,
}

/// What changes only under the upgrade lock, and may be looked at without it.
#[derive(Default)]
struct View {
    live: Option<Member>,
    /// The live domain, or the last one that was.
    record: Option<Arc<DomainRecord>>,
    generation: u64,
    /// Instances whose death is known and not dealt with yet, by address.
    dying: HashSet<usize>,
    standby: Option<Arc<DomainRecord>>,
    /// Changes that are under way: an operator's, and a takeover that comes between its phases.
    changing: u32,
    fault: Option<String>,
    counts: Counts,
    /// Whose modules stayed mapped when they were last looked at, and how to look again.
    resident: Vec<(String, Resident)>,
    leaving: Option<String>,
    left: Vec<String>,
    history: VecDeque<Entry>,
}

impl View {
    fn live_has_died(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.instance.is_dead())
    }

    /// Shows who else is there beside the live domain.
    fn show(&mut self, upgrades: &Upgrades) {
        self.standby = upgrades.standby.as_ref().map(|standby| standby.record.clone());
        self.leaving = upgrades.leaving.as_ref().map(|leaving| {
            let record = &leaving.member.record;
            format!(
                "`{}` {}: replaced, and still has requests in flight",
                record.name, record.version
            )
        });
    }
}

/// The device's side of the live domain. See the crate's page.
pub struct DomainProxy {
    cell: OnceLock<Arc<srcu::Cell<Option<Member>>>>,
    loader: Box<dyn ModuleLoader>,
    storage: Arc<Storage>,
    queues: Arc<Queues>,
    environment: Environment,
    events: Events,
    /// Held by the operator's command that is being carried out.
    operator: Mutex<()>,
    /// Held by whoever replaces the live domain: an operator's command, or a takeover, which comes
    /// between its phases.
    upgrades: Mutex<Upgrades>,
    view: Mutex<View>,
    /// What the guest was offered, as capabilities that a successor must have.
    required: AtomicU64,
    next_id: AtomicU64,
    service: AtomicU8,
    /// Since when the device is about to end.
    stopping: OnceLock<Instant>,
}

impl DomainProxy {
    /// Starts a device of `queues` queues with the domain `name`.
    ///
    /// # Errors
    /// Why the domain cannot be used.
    ///
    /// # Panics
    /// If `queues` is 0 or above [`QUEUE_LIMIT`]: the caller has checked its arguments.
    pub fn start(
        loader: Box<dyn ModuleLoader>,
        name: &str,
        params: Params,
        queues: usize,
    ) -> Result<Arc<Self>, Refusal> {
        assert!((1..=QUEUE_LIMIT).contains(&queues), "{queues} queues");
        let proxy = Self {
            cell: OnceLock::new(),
            loader,
            storage: Arc::new(Storage::default()),
            queues: Arc::new(Queues::new(queues)),
            environment: Environment::default(),
            events: Events::default(),
            operator: Mutex::default(),
            upgrades: Mutex::default(),
            service: AtomicU8::new(Service::Up as u8),
            view: Mutex::default(),
            required: AtomicU64::new(0),
            next_id: AtomicU64::new(0),
            stopping: OnceLock::new(),
        };
        let member = proxy.prepare(name, params, &mut Phases::default())?;
        proxy.storage.move_to(member.id);
        if let Err(error) = member.instance.activate() {
            return Err(Refusal::new(
                Code::ActivateFailed,
                format!("`{}` was not activated: {error}", member.record.name),
            ));
        }
        member.instance.set_generation(1);
        let cell = srcu::Cell::new(Some(member.clone()), queues);
        proxy.cell.set(cell).unwrap_or_else(|_| unreachable!("set once, here"));
        proxy.set_live(member);
        Ok(Arc::new(proxy))
    }

    pub(crate) fn cell(&self) -> &Arc<srcu::Cell<Option<Member>>> {
        self.cell.get().expect("set when the device was started")
    }

    pub(crate) fn queues(&self) -> &Queues {
        &self.queues
    }

    /// Makes the calling thread the worker of `queue`, with room for `slots` requests in flight.
    /// Waits while the gate is shut.
    ///
    /// Returns `None` if there are as many workers as queues already.
    pub fn worker(
        self: &Arc<Self>,
        queue: usize,
        slots: usize,
        notifier: Box<dyn Notifier>,
    ) -> Option<Worker> {
        // First, because attaching may ask for it.
        self.queues.set_notifier(queue, Some(notifier));
        Worker::new(Arc::clone(self), queue, slots)
    }

    /// The live domain, or the last one that was.
    ///
    /// # Panics
    /// Never: a started device has had one.
    #[must_use]
    pub fn domain(&self) -> DomainRecord {
        (*self.record().expect("a started device has had a live domain")).clone()
    }

    pub(crate) fn record(&self) -> Option<Arc<DomainRecord>> {
        lock(&self.view).record.clone()
    }

    pub(crate) fn service(&self) -> Service {
        match self.service.load(Ordering::Acquire) {
            0 => Service::Up,
            1 => Service::Held,
            _ => Service::Failed,
        }
    }

    pub(crate) fn set_service(&self, service: Service) {
        // Release pairs with the Acquire in `service`: who sees it sees what led to it.
        self.service.store(service as u8, Ordering::Release);
    }

    /// Takes the live domain out of service, for good.
    pub(crate) fn take_live(&self) -> Member {
        lock(&self.view).live.take().expect("only a live domain dies as one")
    }

    /// Makes `next` what workers find, where they found nobody.
    pub(crate) fn publish(&self, next: Member) {
        let grace = self.cell().swap(Some(next.clone())).unwrap_or_else(|error| {
            unreachable!("under the upgrade lock, on a thread without a reader: {error}")
        });
        self.set_live(next);
        // What the old value was, nobody, does not matter to anybody.
        drop(grace.wait(Duration::from_secs(1)));
        self.queues.notify_all();
    }

    pub(crate) fn live(&self) -> Option<Member> {
        lock(&self.view).live.clone()
    }

    pub(crate) fn set_live(&self, member: Member) {
        let mut view = lock(&self.view);
        view.fault = None;
        view.record = Some(member.record.clone());
        view.generation = member.instance.generation();
        view.live = Some(member);
        self.set_service(Service::Up);
    }

    pub(crate) fn next_id(&self) -> DomainId {
        DomainId(self.next_id.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub(crate) fn next_generation(&self) -> u64 {
        lock(&self.view).generation + 1
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
        let _upgrades = self.lock_alive(Instant::now() + patience, || self.is_stopping())?;
        let info = self.domain().info;
        self.require(required(&info));
        Some(info)
    }

    /// Says which capabilities a guest relies on, so that every successor must have them. Called
    /// when a session ends, with those that were acknowledged.
    pub fn require(&self, capabilities: Capabilities) {
        self.required.store(capabilities.0, Ordering::Relaxed);
    }

    pub(crate) fn required_capabilities(&self) -> Capabilities {
        Capabilities(self.required.load(Ordering::Relaxed))
    }

    /// Turns the write cache of the live domain, and of every successor, on or off.
    ///
    /// When it comes back from turning it off, what was completed before is durable. If the live
    /// domain dies meanwhile, it waits for the takeover, which sees to that. What could not be done
    /// is logged, and left behind at the end. Not to be called by a worker: a takeover waits for
    /// it.
    pub fn set_write_cache(self: &Arc<Self>, on: bool) {
        let (is_new, failed) = self.environment.set_write_cache(on);
        self.notice_deaths(failed.iter().map(|(who, _)| who));
        if on || !is_new || failed.is_empty() && !self.is_dying() {
            return;
        }
        let why = match self.catch_up_on(&failed) {
            Ok(()) => return,
            // The last flush is asked of whoever lives then.
            Err(_) if self.is_stopping() => return,
            Err(why) => why,
        };
        let sentence = format!(
            "the write cache was turned off, and what was written before may not be on the disk: {why}"
        );
        log::error!("{sentence}");
        self.leave_behind(&sentence);
    }

    /// Waits until nobody is dead who is still to be replaced, and has the live domain see to what
    /// those left who `failed`.
    fn catch_up_on(self: &Arc<Self>, failed: &[(Weak<Instance>, CallError)]) -> Result<(), String> {
        let deadline = Instant::now() + TAKEOVER_PATIENCE;
        loop {
            if !self.wait_alive(deadline) {
                return Err("a takeover is under way, and does not end".to_owned());
            }
            let Some(live) = self.live() else {
                // Whoever brings the device back sees to it.
                log::error!(
                    "the write cache is off, and what was written before may not be on the disk yet"
                );
                return Ok(());
            };
            // It was told, and has said why not; asking once more would not make it so.
            let said = failed.iter().find(|(who, _)| who.as_ptr() == Arc::as_ptr(&live.instance));
            if let Some((_, error)) = said {
                return Err(error.to_string());
            }
            // Others may have completed something after it was told.
            let Err(error) = self.environment.catch_up(&live.instance) else { return Ok(()) };
            if !live.instance.is_dead() {
                return Err(error.to_string());
            }
            drop(live);
            self.notice_death();
        }
    }

    /// Tells the live domain, and every successor, of guest memory that was mapped or is about to
    /// be unmapped.
    pub fn memory_changed(self: &Arc<Self>, address: usize, len: usize, added: bool) {
        let dead = self.environment.memory_changed(address, len, added);
        self.notice_deaths(&dead);
    }

    /// Records that a frontend came or went.
    pub fn connected(&self, connected: bool) {
        self.events.push(Event::Connected(connected));
    }

    pub(crate) fn started(&self, change: Change, target: &str) {
        lock(&self.view).changing += 1;
        self.events.push(Event::Started { change, target: target.to_owned() });
    }

    /// Without `upgrades` nothing of them has changed.
    pub(crate) fn ended(
        &self,
        upgrades: Option<&Upgrades>,
        change: Change,
        result: &Result<Report, Refusal>,
    ) {
        let entry = Entry { at: SystemTime::now(), change, result: result.clone() };
        match result {
            Ok(report) => log::info!(
                "{} to generation {}: `{}` {} -> `{}` {} by {}, pause {} us",
                change.name(),
                report.generation,
                report.from.name,
                report.from.version,
                report.to.name,
                report.to.version,
                report.protocol.name(),
                report.phases.pause.as_micros()
            ),
            Err(refusal) if change == Change::Takeover => {
                log::error!("faulted ({}): {}", refusal.code, refusal.message);
            }
            Err(refusal) => {
                log::warn!("{} refused ({}): {}", change.name(), refusal.code, refusal.message)
            }
        }
        let mut view = lock(&self.view);
        view.changing -= 1;
        match (change, result) {
            (Change::Takeover, Ok(_)) => view.counts.takeovers += 1,
            (Change::Takeover, Err(refusal)) => {
                view.fault = Some(refusal.message.clone());
                let (generation, reason) = (view.generation, refusal.message.clone());
                self.events.push(Event::Faulted { generation, reason });
            }
            (_, Err(_)) => view.counts.refused += 1,
            (Change::Upgrade, Ok(_)) => view.counts.committed += 1,
            (Change::Rollback, Ok(_)) => view.counts.rolled_back += 1,
        }
        if view.history.len() == HISTORY {
            view.history.pop_front();
        }
        view.history.push_back(entry.clone());
        if let Some(upgrades) = upgrades {
            view.show(upgrades);
        }
        drop(view);
        self.events.push(Event::Ended(Box::new(entry)));
    }

    /// Everything at a glance.
    #[must_use]
    pub fn status(&self) -> Status {
        let queues = self.queues.status();
        let resident = self.residents();
        let view = lock(&self.view);
        let record = view.record.as_ref().expect("a started device has had a live domain");
        Status {
            generation: view.generation,
            state: match (&view.fault, view.changing > 0 || self.service() == Service::Held) {
                (Some(_), _) => State::Faulted,
                (None, true) => State::Upgrading,
                (None, false) => State::Serving,
            },
            fault: view.fault.clone(),
            domain: (**record).clone(),
            standby: view.standby.as_deref().cloned(),
            queues,
            counts: view.counts,
            resident,
            storage_failure: self.storage.failure(),
            counters: self.storage.counters(),
        }
    }

    /// What has been asked for and how it ended, oldest first; the last 1024.
    #[must_use]
    pub fn history(&self) -> Vec<Entry> {
        lock(&self.view).history.iter().cloned().collect()
    }

    /// The next event after number `after`, waiting up to `timeout` for it.
    #[must_use]
    pub fn next_event(&self, after: u64, timeout: Duration) -> Option<(u64, Event)> {
        self.events.next(after, timeout)
    }

    /// The number of the newest event.
    #[must_use]
    pub fn last_event(&self) -> u64 {
        self.events.last()
    }

    pub(crate) fn check_stopping(&self) -> Result<(), Refusal> {
        if self.is_stopping() { Err(upgrade::stopping()) } else { Ok(()) }
    }

    /// Records something that had to be left, for the end.
    pub fn leave_behind(&self, what: &str) {
        lock(&self.view).left.push(what.to_owned());
    }
}
