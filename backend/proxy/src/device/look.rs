//! What the device says of itself.

use super::DomainProxy;
use crate::record::report::{DomainRecord, Entry, Event};
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

    /// The number of the newest event.
    #[must_use]
    pub fn last_event(&self) -> u64 {
        self.events.last()
    }
}
