//! What the device says of itself.

use super::{DomainProxy, Live};
use crate::record::canary::CanaryState;
use crate::record::report::{Change, DomainRecord, Entry, Event};
use crate::record::status::Status;
use crate::signal::lock;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

impl DomainProxy {
    /// The live domain has a new record.
    pub(crate) fn set_record(&self, record: &Arc<DomainRecord>) {
        lock(&self.view).record = Arc::clone(record);
        // Release pairs with the Acquire in `capacity`: the domain serves as much by now.
        self.capacity.store(record.info.capacity, Ordering::Release);
    }

    /// How many bytes a guest may be told that the disk has. It only grows.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// What is mapped now though nothing needs it, and why.
    pub(crate) fn look_at_residents(&self) -> Vec<String> {
        let mut all = self.residents.look();
        all.extend(lock(&self.view).retiring.clone());
        all
    }

    /// Everything at a glance.
    #[must_use]
    pub fn status(&self) -> Status {
        let queues = self.queues.status();
        let resident = self.look_at_residents();
        let view = lock(&self.view);
        Status {
            generation: view.generation,
            state: view.state(),
            fault: view.fault().cloned(),
            domain: (*view.record).clone(),
            standby: view.standby.as_deref().cloned(),
            queues,
            counts: view.history.counts(),
            resident,
            storage_failure: self.storage.failure(),
            counters: self.storage.counters(),
        }
    }

    /// What has become of the live domain since `generation` was that, and how, in words; `None`:
    /// it still is, or the change is under way.
    pub(crate) fn replaced_by(&self, generation: u64) -> Option<(CanaryState, String)> {
        let view = lock(&self.view);
        if let Live::Faulted(why) = &view.live {
            return Some((CanaryState::Faulted, format!("it has died: {why}")));
        }
        if view.generation == generation || view.changing > 0 {
            return None;
        }
        let last = view.history.entries().last().map(|entry| entry.change);
        let how = match last {
            Some(Change::Takeover) => "it has died, and its standby took over".to_owned(),
            Some(Change::Rollback) => "it was rolled back by a command".to_owned(),
            _ => format!("generation {} serves", view.generation),
        };
        Some((CanaryState::TakenBack, how))
    }

    /// Tells what happened to clients that watch.
    pub(crate) fn happened(&self, event: Event) {
        self.events.push(event);
    }

    /// What has been asked for and how it ended, oldest first; the last 1024.
    #[must_use]
    pub fn history(&self) -> Vec<Entry> {
        lock(&self.view).history.entries().cloned().collect()
    }

    /// The next event after number `after`, waiting up to `timeout` for it.
    #[must_use]
    pub fn next_event(&self, after: u64, timeout: Duration) -> Option<(u64, Event)> {
        self.events.next(after, timeout)
    }

    /// Has `hook` called after each event, by the thread to which it happens, which may hold any
    /// lock of the device but that of its events.
    pub fn on_event(&self, hook: impl Fn() + Send + Sync + 'static) {
        self.events.on_push(Box::new(hook));
    }

    /// The number of the newest event.
    #[must_use]
    pub fn last_event(&self) -> u64 {
        self.events.last()
    }
}
