//! What the host does for an instance: storage, log and notifiers, as that instance sees them.

use crate::datapath::queue::Queues;
use crate::images::Images;
use domain_abi::{DomainError, Level, Params, QueueIndex};
use domain_host::{HostImage, HostRegion, HostServices};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use storage::{DomainId, Storage};

/// The host as one instance sees it.
pub(crate) struct Services {
    pub(crate) id: DomainId,
    pub(crate) name: String,
    pub(crate) storage: Arc<Storage>,
    pub(crate) queues: Arc<Queues>,
    pub(crate) images: Arc<Images>,
}

impl HostServices for Services {
    fn log(&self, level: Level, line: &str) {
        let level = match level {
            Level::Error => log::Level::Error,
            Level::Warn => log::Level::Warn,
            Level::Info => log::Level::Info,
            Level::Debug => log::Level::Debug,
        };
        log::log!(target: "domain", level, "{} #{}: {line}", self.name, self.id.0);
    }

    fn notify(&self, queue: QueueIndex) {
        self.queues.notify(queue.0 as usize);
    }

    fn notifier_fd(&self, queue: QueueIndex) -> Option<OwnedFd> {
        self.queues.notifier_fd(queue.0 as usize)
    }

    fn served_queues(&self) -> u64 {
        self.queues.served()
    }

    fn schema(&self) -> u32 {
        self.storage.schema()
    }

    fn set_schema(&self, schema: u32) -> Result<(), DomainError> {
        self.storage.set_schema(self.id, schema)
    }

    fn region_len(&self, key: &str) -> u64 {
        self.storage.region_len(key)
    }

    fn region(&self, key: &str, len: u64) -> Result<Arc<HostRegion>, DomainError> {
        self.storage.region(self.id, key, len)
    }

    fn grow_region(&self, key: &str, len: u64) -> Result<Arc<HostRegion>, DomainError> {
        self.storage.grow_region(self.id, key, len)
    }

    fn bytes(&self, key: &str) -> Option<Arc<Vec<u8>>> {
        self.storage.bytes(key)
    }

    fn set_bytes(&self, key: &str, value: &[u8]) -> Result<(), DomainError> {
        self.storage.set_bytes(self.id, key, value)
    }

    fn file(&self, key: &str) -> std::io::Result<Option<File>> {
        self.storage.file(key)
    }

    fn set_file(&self, key: &str, file: File) -> Result<(), DomainError> {
        self.storage.set_file(self.id, key, file)
    }

    fn mark_storage_failed(&self, sentence: &str) {
        if self.storage.mark_failed(sentence) {
            log::error!("the storage has failed: {sentence}");
        }
    }

    fn storage_failure(&self) -> Option<String> {
        self.storage.failure()
    }

    fn count(&self, name: &str, count: u64) {
        self.storage.count(name, count);
    }

    fn open_image(&self, engine: &str, params: &Params) -> Result<Arc<dyn HostImage>, DomainError> {
        self.images.open(engine, params)
    }
}
