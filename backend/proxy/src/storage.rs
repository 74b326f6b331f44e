//! Storage: the state of the device, owned by the host, lent to one instance at a time.
//!
//! Regions, bytes and files live on the shared heap, and the instance that owns the storage owns
//! these objects; a handover moves them, which costs a map operation per object and nothing per
//! byte. Everybody may look, only the owner may open regions or change anything.
//!
//! A successor gets the storage on trial ([`Storage::lend`]). If it takes it up, it keeps it
//! ([`Storage::keep`]); if not, everything that it made goes, and what it replaced comes back
//! ([`Storage::take_back`]). What it wrote into a region that was there before cannot be undone: a
//! domain does that only once it serves.
//!
//! Deliberately absent: what the bytes mean. The schema number says which domains know.

use ::storage::{DomainId, RRef, RRefVec, SharedHeap};
use domain_api::host::{HostRegion, HostServices};
use domain_api::{DomainError, Level, QueueIndex};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::queue::Queues;

/// Who holds the storage while no instance does.
pub(crate) const HOST: DomainId = DomainId(0);

/// What to put back if whoever has the storage on trial cannot take it up.
struct Trial {
    from: DomainId,
    schema: u32,
    /// What was at each key that was changed since, nothing included.
    regions: BTreeMap<String, Option<RRef<HostRegion>>>,
    bytes: BTreeMap<String, Option<RRefVec<u8>>>,
    files: BTreeMap<String, Option<RRef<File>>>,
}

#[derive(Default)]
struct Inner {
    owner: Option<DomainId>,
    schema: u32,
    regions: BTreeMap<String, RRef<HostRegion>>,
    bytes: BTreeMap<String, RRefVec<u8>>,
    files: BTreeMap<String, RRef<File>>,
    trial: Option<Trial>,
    /// Why something that was written may be lost. Never undone, so it is no part of a trial.
    failure: Option<String>,
    /// What instances have counted.
    counters: BTreeMap<String, u64>,
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

    /// Why something that was written may be lost, if an instance has said so.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// What instances have counted, by name.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        self.lock().counters.clone()
    }

    /// Gives everything to `to`; the cost follows the number of objects.
    pub(crate) fn move_to(&self, to: DomainId) {
        let mut inner = self.lock();
        if let Some(from) = inner.owner {
            let moved = |result: Result<(), ::storage::HeapError>| {
                result.expect("the storage's objects belong to the storage's owner");
            };
            inner.regions.values().for_each(|&object| moved(self.heap.move_to(object, from, to)));
            inner.bytes.values().for_each(|&object| moved(self.heap.move_to(object, from, to)));
            inner.files.values().for_each(|&object| moved(self.heap.move_to(object, from, to)));
        }
        inner.owner = Some(to);
    }

    /// Gives everything to `to`, who may not be able to take it up.
    pub(crate) fn lend(&self, to: DomainId) {
        self.keep();
        let mut inner = self.lock();
        inner.trial = Some(Trial {
            from: inner.owner.unwrap_or(HOST),
            schema: inner.schema,
            regions: BTreeMap::new(),
            bytes: BTreeMap::new(),
            files: BTreeMap::new(),
        });
        drop(inner);
        self.move_to(to);
    }

    /// Whoever has it on trial has taken it up: what was replaced since is not needed any more.
    pub(crate) fn keep(&self) {
        let mut inner = self.lock();
        let (Some(trial), Some(owner)) = (inner.trial.take(), inner.owner) else { return };
        free(&self.heap, trial.regions.into_values().flatten(), owner);
        free(&self.heap, trial.bytes.into_values().flatten(), owner);
        free(&self.heap, trial.files.into_values().flatten(), owner);
    }

    /// Whoever has it on trial could not take it up: it is again as it was, and whose it was.
    pub(crate) fn take_back(&self) {
        let mut inner = self.lock();
        let (Some(trial), Some(owner)) = (inner.trial.take(), inner.owner) else { return };
        inner.schema = trial.schema;
        put_back(&self.heap, &mut inner.regions, trial.regions, owner);
        put_back(&self.heap, &mut inner.bytes, trial.bytes, owner);
        put_back(&self.heap, &mut inner.files, trial.files, owner);
        drop(inner);
        self.move_to(trial.from);
    }

    /// Keeps everything without an owner, until somebody takes it up: the host itself holds it
    /// meanwhile.
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

fn free<T>(heap: &SharedHeap, objects: impl IntoIterator<Item = RRef<T>>, owner: DomainId) {
    for object in objects {
        let freed = heap.free(object, owner);
        debug_assert!(
            freed.is_ok(),
            "the storage's objects belong to the storage's owner: {freed:?}"
        );
    }
}

/// Undoes the changes to one kind of object.
fn put_back<T>(
    heap: &SharedHeap,
    now: &mut BTreeMap<String, RRef<T>>,
    before: BTreeMap<String, Option<RRef<T>>>,
    owner: DomainId,
) {
    for (key, earlier) in before {
        let made = match earlier {
            Some(earlier) => now.insert(key, earlier),
            None => now.remove(&key),
        };
        free(heap, made, owner);
    }
}

/// Puts `object` at `key`. What was there before is freed, or kept in `trial` in case that it has
/// to come back.
fn put<T>(
    heap: &SharedHeap,
    objects: &mut BTreeMap<String, RRef<T>>,
    trial: Option<&mut BTreeMap<String, Option<RRef<T>>>>,
    key: &str,
    object: RRef<T>,
    owner: DomainId,
) {
    let earlier = objects.insert(key.to_owned(), object);
    match trial {
        // Of several changes only the first one hides what was there before the trial.
        Some(trial) if !trial.contains_key(key) => drop(trial.insert(key.to_owned(), earlier)),
        _ => free(heap, earlier, owner),
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

    fn served_queues(&self) -> u64 {
        self.queues.served()
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
            let region = self
                .storage
                .heap
                .get(object)
                .map_err(|error| DomainError::new(error.to_string()))?;
            return if region.len() as u64 == len {
                Ok(region)
            } else {
                Err(DomainError::new(format!(
                    "region `{key}` has {} bytes, not {len}",
                    region.len()
                )))
            };
        }
        let region = HostRegion::create(key, len).map_err(|error| {
            DomainError::new(format!("cannot make region `{key}` of {len} bytes: {error}"))
        })?;
        let Inner { regions, trial, .. } = &mut *inner;
        let object = self.storage.heap.insert(self.id, region, len);
        let trial = trial.as_mut().map(|trial| &mut trial.regions);
        put(&self.storage.heap, regions, trial, key, object, self.id);
        self.storage.heap.get(object).map_err(|error| DomainError::new(error.to_string()))
    }

    fn bytes(&self, key: &str) -> Option<Arc<Vec<u8>>> {
        let inner = self.storage.lock();
        self.storage.heap.get(*inner.bytes.get(key)?).ok()
    }

    fn set_bytes(&self, key: &str, value: &[u8]) -> Result<(), DomainError> {
        let mut inner = self.owned()?;
        let Inner { bytes, trial, .. } = &mut *inner;
        let object = self.storage.heap.insert(self.id, value.to_vec(), value.len() as u64);
        let trial = trial.as_mut().map(|trial| &mut trial.bytes);
        put(&self.storage.heap, bytes, trial, key, object, self.id);
        Ok(())
    }

    fn file(&self, key: &str) -> Option<File> {
        let inner = self.storage.lock();
        self.storage.heap.get(*inner.files.get(key)?).ok()?.try_clone().ok()
    }

    fn set_file(&self, key: &str, file: File) -> Result<(), DomainError> {
        let mut inner = self.owned()?;
        let Inner { files, trial, .. } = &mut *inner;
        let object = self.storage.heap.insert(self.id, file, 0);
        let trial = trial.as_mut().map(|trial| &mut trial.files);
        put(&self.storage.heap, files, trial, key, object, self.id);
        Ok(())
    }

    fn mark_storage_failed(&self, sentence: &str) {
        let mut inner = self.storage.lock();
        if inner.failure.is_none() {
            inner.failure = Some(sentence.to_owned());
            drop(inner);
            log::error!("the storage has failed: {sentence}");
        }
    }

    fn storage_failure(&self) -> Option<String> {
        self.storage.failure()
    }

    fn count(&self, name: &str, count: u64) {
        *self.storage.lock().counters.entry(name.to_owned()).or_default() += count;
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
            b.region("disk", 8192).is_err()
                && b.set_bytes("note", b"y").is_err()
                && b.set_schema(4).is_err()
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

    #[test]
    fn a_failure_is_marked_by_anybody_and_undone_by_nobody() {
        let storage = Arc::new(Storage::default());
        let (a, b) = (services(&storage, 1), services(&storage, 2));
        storage.move_to(a.id);
        storage.lend(b.id);
        a.mark_storage_failed("the first");
        b.mark_storage_failed("another");
        b.count("things", 2);
        a.count("things", 1);
        storage.take_back();
        storage.reclaim(a.id);
        assert_eq!(b.storage_failure().as_deref(), Some("the first"));
        assert_eq!(storage.counters(), BTreeMap::from([("things".to_owned(), 3)]));
    }

    #[test]
    fn what_is_not_taken_up_comes_back_as_it_was_and_nothing_else_stays() {
        let storage = Arc::new(Storage::default());
        let (a, b) = (services(&storage, 1), services(&storage, 2));
        let directory = |services: &Services| {
            services.file("file").map(|file| file.metadata().unwrap().is_dir())
        };
        storage.move_to(a.id);
        a.region("disk", 8192).unwrap();
        a.set_bytes("note", b"x").unwrap();
        a.set_file("file", File::open("/dev/null").unwrap()).unwrap();
        a.set_schema(3).unwrap();
        for takes_up in [false, true] {
            let before = storage.heap.owned(a.id);
            storage.lend(b.id);
            b.region("more", 4096).unwrap();
            for value in [b"1", b"2", b"3"] {
                b.set_bytes("note", value).unwrap();
                b.set_bytes("new", value).unwrap();
            }
            b.set_file("file", File::open("/").unwrap()).unwrap();
            b.set_schema(4).unwrap();
            if takes_up {
                storage.keep();
                storage.take_back();
                assert_eq!(storage.heap.owned(b.id).objects, 5, "what was replaced is freed");
                assert_eq!((b.bytes("note").unwrap().as_slice(), b.schema()), (&b"3"[..], 4));
                assert_eq!((b.region_len("more"), directory(&b)), (4096, Some(true)));
                assert!(a.set_schema(5).is_err());
            } else {
                storage.take_back();
                assert_eq!(
                    (storage.heap.owned(a.id), storage.heap.owned(b.id).objects),
                    (before, 0)
                );
                assert_eq!((a.bytes("note").unwrap().as_slice(), a.schema()), (&b"x"[..], 3));
                assert_eq!(
                    (a.region_len("more"), a.bytes("new"), directory(&a)),
                    (0, None, Some(false))
                );
                assert!(b.set_schema(5).is_err() && a.set_schema(3).is_ok());
            }
        }
    }
}
