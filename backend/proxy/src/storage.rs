//! Storage: the state of the device, owned by the host, lent to one instance at a time.
//!
//! Regions, bytes and files live on the shared heap, and the instance that owns the storage owns these objects; a handover moves them, which costs a
//! map operation per object and nothing per byte. Everybody may look, only the owner may open regions or change anything.
//!
//! Deliberately absent: what the bytes mean. The schema number says which domains know.

use domain_api::host::{HostRegion, HostServices};
use domain_api::{DomainError, Level, QueueIndex};
use shared_heap::{DomainId, RRef, RRefVec, SharedHeap};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::queue::Queues;

/// Who holds the storage while no instance does.
pub(crate) const HOST: DomainId = DomainId(0);

#[derive(Default)]
struct Inner {
    owner: Option<DomainId>,
    schema: u32,
    regions: BTreeMap<String, RRef<HostRegion>>,
    bytes: BTreeMap<String, RRefVec<u8>>,
    files: BTreeMap<String, RRef<File>>,
}

/// The storage of the device.
#[derive(Default)]
pub(crate) struct Storage {
    heap: SharedHeap,
    inner: Mutex<Inner>,
}

impl Storage {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The schema number, 0 while it is empty.
    pub(crate) fn schema(&self) -> u32 {
        self.lock().schema
    }

    /// Gives everything to `to`; the cost follows the number of objects.
    pub(crate) fn move_to(&self, to: DomainId) {
        let mut inner = self.lock();
        if let Some(from) = inner.owner {
            let moved = |result: Result<(), shared_heap::HeapError>| {
                result.expect("the storage's objects belong to the storage's owner");
            };
            inner.regions.values().for_each(|&object| moved(self.heap.move_to(object, from, to)));
            inner.bytes.values().for_each(|&object| moved(self.heap.move_to(object, from, to)));
            inner.files.values().for_each(|&object| moved(self.heap.move_to(object, from, to)));
        }
        inner.owner = Some(to);
    }

    /// Gives everything to `to`, from somebody who could not take it up. It had `schema` then, and has it again.
    pub(crate) fn give_back(&self, to: DomainId, schema: u32) {
        self.move_to(to);
        self.lock().schema = schema;
    }

    /// Keeps everything without an owner, until somebody takes it up: the host itself holds it meanwhile.
    pub(crate) fn orphan(&self) {
        self.move_to(HOST);
    }

    /// Frees what an instance that ended still owned; never the storage.
    pub(crate) fn reclaim(&self, id: DomainId) -> usize {
        if self.lock().owner == Some(id) {
            // It died as the owner.
            self.orphan();
        }
        self.heap.reclaim(id).objects
    }
}

/// The host as one instance sees it.
pub(crate) struct Services {
    pub(crate) id: DomainId,
    pub(crate) name: String,
    pub(crate) storage: Arc<Storage>,
    pub(crate) queues: Arc<Queues>,
}

impl Services {
    fn owned(&self) -> Result<MutexGuard<'_, Inner>, DomainError> {
        let inner = self.storage.lock();
        if inner.owner == Some(self.id) {
            Ok(inner)
        } else {
            Err(DomainError::new(
                "the storage is not this instance's: it may be changed from activate to quiesce only",
            ))
        }
    }
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

    fn schema(&self) -> u32 {
        self.storage.schema()
    }

    fn set_schema(&self, schema: u32) -> Result<(), DomainError> {
        self.owned()?.schema = schema;
        Ok(())
    }

    fn region_len(&self, key: &str) -> u64 {
        let inner = self.storage.lock();
        let region = inner.regions.get(key).and_then(|&object| self.storage.heap.get(object).ok());
        region.map_or(0, |region| region.len() as u64)
    }

    fn region(&self, key: &str, len: u64) -> Result<Arc<HostRegion>, DomainError> {
        let mut inner = self.owned()?;
        if let Some(&object) = inner.regions.get(key) {
            let region =
                self.storage.heap.get(object).map_err(|error| DomainError::new(error.to_string()))?;
            return if region.len() as u64 == len {
                Ok(region)
            } else {
                Err(DomainError::new(format!("region `{key}` has {} bytes, not {len}", region.len())))
            };
        }
        let region = HostRegion::create(key, len).map_err(|error| {
            DomainError::new(format!("cannot make region `{key}` of {len} bytes: {error}"))
        })?;
        let object = self.storage.heap.insert(self.id, region, len);
        inner.regions.insert(key.to_owned(), object);
        self.storage.heap.get(object).map_err(|error| DomainError::new(error.to_string()))
    }

    fn bytes(&self, key: &str) -> Option<Arc<Vec<u8>>> {
        let inner = self.storage.lock();
        self.storage.heap.get(*inner.bytes.get(key)?).ok()
    }

    fn set_bytes(&self, key: &str, value: &[u8]) -> Result<(), DomainError> {
        let mut inner = self.owned()?;
        let object = self.storage.heap.insert(self.id, value.to_vec(), value.len() as u64);
        if let Some(earlier) = inner.bytes.insert(key.to_owned(), object) {
            let _ = self.storage.heap.free(earlier, self.id);
        }
        Ok(())
    }

    fn file(&self, key: &str) -> Option<File> {
        let inner = self.storage.lock();
        self.storage.heap.get(*inner.files.get(key)?).ok()?.try_clone().ok()
    }

    fn set_file(&self, key: &str, file: File) -> Result<(), DomainError> {
        let mut inner = self.owned()?;
        let object = self.storage.heap.insert(self.id, file, 0);
        if let Some(earlier) = inner.files.insert(key.to_owned(), object) {
            let _ = self.storage.heap.free(earlier, self.id);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn services(storage: &Arc<Storage>, id: u64) -> Services {
        Services {
            id: DomainId(id),
            name: "test".to_owned(),
            storage: Arc::clone(storage),
            queues: Arc::new(Queues::new(1)),
        }
    }

    #[test]
    fn only_the_owner_changes_things_and_everything_moves_without_a_copy() {
        let storage = Arc::new(Storage::default());
        let (a, b) = (services(&storage, 1), services(&storage, 2));
        storage.move_to(a.id);
        let region = a.region("disk", 8192).unwrap();
        a.set_bytes("note", b"x").unwrap();
        a.set_schema(3).unwrap();
        assert!(
            b.region("disk", 8192).is_err() && b.set_bytes("note", b"y").is_err() && b.set_schema(4).is_err()
        );
        assert_eq!(
            (b.region_len("disk"), b.schema(), b.bytes("note").unwrap().as_slice()),
            (8192, 3, &b"x"[..])
        );
        storage.move_to(b.id);
        assert!(a.set_bytes("note", b"z").is_err());
        assert_eq!(b.region("disk", 8192).unwrap().base(), region.base());
        assert!(b.region("disk", 4096).unwrap_err().to_string().contains("8192"));
        b.set_bytes("note", b"y").unwrap();
        assert_eq!(storage.reclaim(a.id), 0);
        assert_eq!(b.bytes("note").unwrap().as_slice(), b"y");
    }
}
