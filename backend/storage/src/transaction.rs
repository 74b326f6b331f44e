//! The state of the device, owned by one instance at a time, or by the host.
//!
//! Regions, bytes and files live on the shared heap, and the instance that owns the storage owns
//! these objects; a handover moves them, which costs a map operation per object and nothing per
//! byte. Every instance may look, only the owner may open regions or change anything. Who owns is
//! what the heap says of the root, an object that every storage has.
//!
//! A successor gets the storage in a transaction ([`Storage::begin`]). If it takes the storage up,
//! the transaction is committed ([`Storage::commit`]); if not, everything that the successor made
//! goes, and what it replaced comes back ([`Storage::rollback`]). What it wrote into a region that
//! was there before cannot be undone: a domain does that only once it serves.
//!
//! What has to know what there is ([`Storage::contents`]) is told of each change
//! ([`Storage::tell`]): of one outside of a transaction when it is made, of those in one when it is
//! committed, of a failure at once.

use crate::contents::{Contents, Filling, Numbered};
use crate::heap::{DomainId, HeapError, RRef, RRefVec, SharedHeap};
use domain_abi::DomainError;
use domain_host::HostRegion;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// What holds the storage while no instance does.
const HOST: DomainId = DomainId(0);

/// What to put back if the successor cannot take the storage up.
struct Transaction {
    from: DomainId,
    schema: u32,
    /// What was at each key that was changed since, nothing included.
    regions: BTreeMap<String, Option<RRef<HostRegion>>>,
    bytes: BTreeMap<String, Option<RRefVec<u8>>>,
    files: BTreeMap<String, Option<RRef<File>>>,
}

impl Transaction {
    /// Whether something is not as it was at its beginning, with this schema.
    fn has_changed(&self, schema: u32) -> bool {
        let keys = self.regions.len() + self.bytes.len() + self.files.len();
        keys != 0 || schema != self.schema
    }
}

#[derive(Default)]
struct Inner {
    schema: u32,
    regions: BTreeMap<String, RRef<HostRegion>>,
    bytes: BTreeMap<String, RRefVec<u8>>,
    files: BTreeMap<String, RRef<File>>,
    transaction: Option<Transaction>,
    /// Why something that was written may be lost. Never undone, so it is no part of a transaction.
    failure: Option<String>,
    /// What instances have counted.
    counters: BTreeMap<String, u64>,
}

/// The storage of the device.
pub struct Storage {
    heap: SharedHeap,
    /// Its owner is the storage's.
    root: RRef<()>,
    inner: Mutex<Inner>,
    /// Told of changes, without the lock.
    listener: OnceLock<Listener>,
}

/// What is told of changes.
type Listener = Box<dyn Fn() + Send + Sync>;

impl Default for Storage {
    fn default() -> Self {
        let heap = SharedHeap::default();
        let root = heap.insert(HOST, (), 0);
        Self { heap, root, inner: Mutex::default(), listener: OnceLock::new() }
    }
}

impl Storage {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `listener` told of each change from now on, on the thread that makes it. A second
    /// listener is not told.
    pub fn tell(&self, listener: impl Fn() + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }

    /// Something has changed for good, unless there is a transaction.
    fn changed(&self, inner: MutexGuard<'_, Inner>) {
        let is_final = inner.transaction.is_none();
        drop(inner);
        if is_final {
            self.notify();
        }
    }

    fn notify(&self) {
        if let Some(listener) = self.listener.get() {
            listener();
        }
    }

    /// What there is now. In a transaction it is what would be committed.
    pub fn contents(&self) -> Contents {
        let inner = self.lock();
        Contents {
            schema: inner.schema,
            regions: self.numbered(&inner.regions),
            bytes: self.numbered(&inner.bytes),
            files: self.numbered(&inner.files),
            failure: inner.failure.clone(),
            counters: inner.counters.clone(),
        }
    }

    fn numbered<T: Send + Sync + 'static>(
        &self,
        objects: &BTreeMap<String, RRef<T>>,
    ) -> Vec<Numbered<T>> {
        let numbered = objects.iter().filter_map(|(key, &reference)| {
            let object = self.heap.get(reference).ok()?;
            Some(Numbered { key: key.clone(), number: reference.number(), object })
        });
        numbered.collect()
    }

    /// Puts in what another storage held, in place of all that is in this one. To be called while
    /// the host holds it and no transaction is open; nothing is told of it.
    ///
    /// # Panics
    /// If an instance holds it.
    pub fn fill(&self, filling: Filling) {
        let mut inner = self.lock();
        assert_eq!(self.owner(), HOST, "a storage is filled before an instance takes it up");
        let Inner { regions, bytes, files, .. } = &mut *inner;
        free(&self.heap, std::mem::take(regions).into_values(), HOST);
        free(&self.heap, std::mem::take(bytes).into_values(), HOST);
        free(&self.heap, std::mem::take(files).into_values(), HOST);
        for (key, region) in filling.regions {
            let len = region.len() as u64;
            regions.insert(key, self.heap.insert(HOST, region, len));
        }
        for (key, value) in filling.bytes {
            let len = value.len() as u64;
            bytes.insert(key, self.heap.insert(HOST, value, len));
        }
        for (key, file) in filling.files {
            files.insert(key, self.heap.insert(HOST, file, 0));
        }
        inner.schema = filling.schema;
        inner.failure = filling.failure;
        inner.counters = filling.counters;
    }

    /// The schema number, 0 while it is empty.
    pub fn schema(&self) -> u32 {
        self.lock().schema
    }

    /// Why something that was written may be lost, if an instance has said so.
    pub fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// What instances have counted, by name.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        self.lock().counters.clone()
    }

    /// The instance that owns the storage, or the host.
    fn owner(&self) -> DomainId {
        self.heap.owner(self.root).expect("the root is never freed")
    }

    fn owned(&self, by: DomainId) -> Result<MutexGuard<'_, Inner>, DomainError> {
        let inner = self.lock();
        if self.owner() == by {
            Ok(inner)
        } else {
            Err(DomainError::new(
                "the storage is not this instance's: it may be changed from activate to quiesce only",
            ))
        }
    }

    /// Gives everything to `to`; the cost follows the number of objects.
    pub fn move_to(&self, to: DomainId) {
        self.move_all(&self.lock(), to);
    }

    /// The same, for what has the lock: the owner does not change between a look and this.
    fn move_all(&self, inner: &Inner, to: DomainId) {
        let from = self.owner();
        let moved = |result: Result<(), HeapError>| {
            result.expect("the storage's objects belong to the storage's owner");
        };
        inner.regions.values().for_each(|&object| moved(self.heap.move_to(object, from, to)));
        inner.bytes.values().for_each(|&object| moved(self.heap.move_to(object, from, to)));
        inner.files.values().for_each(|&object| moved(self.heap.move_to(object, from, to)));
        moved(self.heap.move_to(self.root, from, to));
    }

    /// Gives everything to `to`, which may not be able to take it up. A transaction that is open is
    /// committed first.
    pub fn begin(&self, to: DomainId) {
        self.commit();
        let mut inner = self.lock();
        inner.transaction = Some(Transaction {
            from: self.owner(),
            schema: inner.schema,
            regions: BTreeMap::new(),
            bytes: BTreeMap::new(),
            files: BTreeMap::new(),
        });
        self.move_all(&inner, to);
    }

    /// The owner has taken the storage up: what was replaced since [`begin`](Self::begin) is not
    /// needed any more. Nothing happens without a transaction.
    pub fn commit(&self) {
        let mut inner = self.lock();
        let Some(transaction) = inner.transaction.take() else { return };
        let owner = self.owner();
        let is_changed = transaction.has_changed(inner.schema);
        free(&self.heap, transaction.regions.into_values().flatten(), owner);
        free(&self.heap, transaction.bytes.into_values().flatten(), owner);
        free(&self.heap, transaction.files.into_values().flatten(), owner);
        if is_changed {
            self.changed(inner);
        }
    }

    /// The owner could not take the storage up: it is again as it was at [`begin`](Self::begin),
    /// and belongs to the owner before. Nothing happens without a transaction.
    pub fn rollback(&self) {
        let mut inner = self.lock();
        let Some(transaction) = inner.transaction.take() else { return };
        let owner = self.owner();
        inner.schema = transaction.schema;
        put_back(&self.heap, &mut inner.regions, transaction.regions, owner);
        put_back(&self.heap, &mut inner.bytes, transaction.bytes, owner);
        put_back(&self.heap, &mut inner.files, transaction.files, owner);
        self.move_all(&inner, transaction.from);
    }

    /// Frees what the instance `id`, which has ended, still owned; never the storage, which the
    /// host holds until a successor takes it up. Says how many objects were freed.
    pub fn reclaim(&self, id: DomainId) -> usize {
        let inner = self.lock();
        if self.owner() == id {
            // It died as the owner.
            self.move_all(&inner, HOST);
        }
        drop(inner);
        self.heap.reclaim(id).objects
    }

    /// Sets the schema number.
    ///
    /// # Errors
    /// `by` does not own the storage.
    pub fn set_schema(&self, by: DomainId, schema: u32) -> Result<(), DomainError> {
        let mut inner = self.owned(by)?;
        if std::mem::replace(&mut inner.schema, schema) != schema {
            self.changed(inner);
        }
        Ok(())
    }

    /// Length of the region at `key` in bytes, 0 if there is none.
    pub fn region_len(&self, key: &str) -> u64 {
        let inner = self.lock();
        let region = inner.regions.get(key).and_then(|&object| self.heap.get(object).ok());
        region.map_or(0, |region| region.len() as u64)
    }

    /// Opens the region at `key`, or makes it, with `len` zero bytes.
    ///
    /// # Errors
    /// `by` does not own the storage, the region has another length, or there is no memory.
    pub fn region(
        &self,
        by: DomainId,
        key: &str,
        len: u64,
    ) -> Result<Arc<HostRegion>, DomainError> {
        let gone = |error: HeapError| DomainError::new(error.to_string());
        let mut inner = self.owned(by)?;
        if let Some(&object) = inner.regions.get(key) {
            let region = self.heap.get(object).map_err(gone)?;
            let has = region.len() as u64;
            return if has == len {
                Ok(region)
            } else {
                Err(DomainError::new(format!("region `{key}` has {has} bytes, not {len}")))
            };
        }
        let region = HostRegion::create(key, len).map_err(|error| {
            DomainError::new(format!("cannot make region `{key}` of {len} bytes: {error}"))
        })?;
        let Inner { regions, transaction, .. } = &mut *inner;
        let object = self.heap.insert(by, region, len);
        let earlier = transaction.as_mut().map(|transaction| &mut transaction.regions);
        put(&self.heap, regions, earlier, key, object, by);
        let region = self.heap.get(object).map_err(gone);
        self.changed(inner);
        region
    }

    /// The bytes at `key`.
    pub fn bytes(&self, key: &str) -> Option<Arc<Vec<u8>>> {
        let inner = self.lock();
        self.heap.get(*inner.bytes.get(key)?).ok()
    }

    /// Sets the bytes at `key`.
    ///
    /// # Errors
    /// `by` does not own the storage.
    pub fn set_bytes(&self, by: DomainId, key: &str, value: &[u8]) -> Result<(), DomainError> {
        let mut inner = self.owned(by)?;
        let Inner { bytes, transaction, .. } = &mut *inner;
        let object = self.heap.insert(by, value.to_vec(), value.len() as u64);
        let earlier = transaction.as_mut().map(|transaction| &mut transaction.bytes);
        put(&self.heap, bytes, earlier, key, object, by);
        self.changed(inner);
        Ok(())
    }

    /// A dup of the file at `key`.
    pub fn file(&self, key: &str) -> Option<File> {
        let inner = self.lock();
        self.heap.get(*inner.files.get(key)?).ok()?.try_clone().ok()
    }

    /// Keeps `file` at `key`.
    ///
    /// # Errors
    /// `by` does not own the storage.
    pub fn set_file(&self, by: DomainId, key: &str, file: File) -> Result<(), DomainError> {
        let mut inner = self.owned(by)?;
        let Inner { files, transaction, .. } = &mut *inner;
        let object = self.heap.insert(by, file, 0);
        let earlier = transaction.as_mut().map(|transaction| &mut transaction.files);
        put(&self.heap, files, earlier, key, object, by);
        self.changed(inner);
        Ok(())
    }

    /// Marks the storage as one that may have lost what was written to it. Any instance may, and
    /// nothing undoes it. Says whether this is the first sentence, which is the one that stays.
    pub fn mark_failed(&self, sentence: &str) -> bool {
        let mut inner = self.lock();
        let is_first = inner.failure.is_none();
        if is_first {
            inner.failure = Some(sentence.to_owned());
            drop(inner);
            self.notify();
        }
        is_first
    }

    /// Adds to a counter of the device.
    pub fn count(&self, name: &str, count: u64) {
        *self.lock().counters.entry(name.to_owned()).or_default() += count;
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

/// Puts `object` at `key`. What was there before is freed, or kept in `earlier` in case
/// that it has to come back.
fn put<T>(
    heap: &SharedHeap,
    objects: &mut BTreeMap<String, RRef<T>>,
    earlier: Option<&mut BTreeMap<String, Option<RRef<T>>>>,
    key: &str,
    object: RRef<T>,
    owner: DomainId,
) {
    let replaced = objects.insert(key.to_owned(), object);
    match earlier {
        // Of several changes only the first one hides what was there before the transaction.
        Some(earlier) if !earlier.contains_key(key) => {
            earlier.insert(key.to_owned(), replaced);
        }
        _ => free(heap, replaced, owner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The storage as one instance sees it.
    struct Services<'a> {
        id: DomainId,
        storage: &'a Storage,
    }

    impl Services<'_> {
        fn region(&self, key: &str, len: u64) -> Result<Arc<HostRegion>, DomainError> {
            self.storage.region(self.id, key, len)
        }
        fn set_bytes(&self, key: &str, value: &[u8]) -> Result<(), DomainError> {
            self.storage.set_bytes(self.id, key, value)
        }
        fn set_file(&self, key: &str, file: File) -> Result<(), DomainError> {
            self.storage.set_file(self.id, key, file)
        }
        fn set_schema(&self, schema: u32) -> Result<(), DomainError> {
            self.storage.set_schema(self.id, schema)
        }
        fn bytes(&self, key: &str) -> Option<Arc<Vec<u8>>> {
            self.storage.bytes(key)
        }
        fn file(&self, key: &str) -> Option<File> {
            self.storage.file(key)
        }
        fn region_len(&self, key: &str) -> u64 {
            self.storage.region_len(key)
        }
        fn schema(&self) -> u32 {
            self.storage.schema()
        }
    }

    fn services(storage: &Storage, id: u64) -> Services<'_> {
        Services { id: DomainId(id), storage }
    }

    #[test]
    #[cfg_attr(miri, ignore = "regions are memfds")]
    fn only_the_owner_changes_things_and_everything_moves_without_a_copy() {
        let storage = Storage::default();
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
    #[cfg_attr(miri, ignore = "regions are memfds")]
    fn a_failure_once_marked_stays() {
        let storage = Storage::default();
        let (a, b) = (services(&storage, 1), services(&storage, 2));
        storage.move_to(a.id);
        storage.begin(b.id);
        assert!(storage.mark_failed("the first"));
        assert!(!storage.mark_failed("another"));
        storage.count("things", 2);
        storage.count("things", 1);
        storage.rollback();
        storage.reclaim(a.id);
        assert_eq!(storage.failure().as_deref(), Some("the first"));
        assert_eq!(storage.counters(), BTreeMap::from([("things".to_owned(), 3)]));
    }

    #[test]
    #[cfg_attr(miri, ignore = "regions are memfds")]
    fn what_is_not_taken_up_comes_back_as_it_was_and_nothing_else_stays() {
        let storage = Storage::default();
        let (a, b) = (services(&storage, 1), services(&storage, 2));
        let directory = |services: &Services<'_>| {
            services.file("file").map(|file| file.metadata().unwrap().is_dir())
        };
        storage.move_to(a.id);
        a.region("disk", 8192).unwrap();
        a.set_bytes("note", b"x").unwrap();
        a.set_file("file", File::open("/dev/null").unwrap()).unwrap();
        a.set_schema(3).unwrap();
        for takes_up in [false, true] {
            let before = storage.heap.owned(a.id);
            storage.begin(b.id);
            b.region("more", 4096).unwrap();
            for value in [b"1", b"2", b"3"] {
                b.set_bytes("note", value).unwrap();
                b.set_bytes("new", value).unwrap();
            }
            b.set_file("file", File::open("/").unwrap()).unwrap();
            b.set_schema(4).unwrap();
            if takes_up {
                storage.commit();
                storage.rollback();
                assert_eq!(storage.heap.owned(b.id).objects, 6, "what was replaced is freed");
                assert_eq!((b.bytes("note").unwrap().as_slice(), b.schema()), (&b"3"[..], 4));
                assert_eq!((b.region_len("more"), directory(&b)), (4096, Some(true)));
                assert!(a.set_schema(5).is_err());
            } else {
                storage.rollback();
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

    #[test]
    #[cfg_attr(miri, ignore = "regions are memfds")]
    fn each_change_is_told_once_and_objects_keep_their_numbers() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let storage = Arc::new(Storage::default());
        let told = Arc::<AtomicUsize>::default();
        storage.tell({
            let (storage, told) = (Arc::downgrade(&storage), Arc::clone(&told));
            move || {
                // It may look at the storage.
                storage.upgrade().unwrap().contents();
                told.fetch_add(1, Ordering::Relaxed);
            }
        });
        let news = || told.swap(0, Ordering::Relaxed);
        let numbers = || {
            let Contents { regions, bytes, files, .. } = storage.contents();
            let number = |number: Option<u64>| number.unwrap_or_default();
            [
                number(regions.first().map(|object| object.number)),
                number(bytes.first().map(|object| object.number)),
                number(files.first().map(|object| object.number)),
            ]
        };
        let (a, b) = (services(&storage, 1), services(&storage, 2));
        storage.move_to(a.id);
        a.region("disk", 4096).unwrap();
        a.set_bytes("note", b"x").unwrap();
        a.set_file("file", File::open("/dev/null").unwrap()).unwrap();
        a.set_schema(1).unwrap();
        assert_eq!(news(), 4);
        a.set_schema(1).unwrap();
        a.region("disk", 4096).unwrap();
        assert_eq!(news(), 0, "nothing has changed");
        let before = numbers();
        // One that changes nothing, one that is taken back, one that is committed.
        storage.begin(b.id);
        b.region("disk", 4096).unwrap();
        b.set_schema(1).unwrap();
        storage.commit();
        assert_eq!((news(), numbers()), (0, before));
        storage.begin(a.id);
        a.set_bytes("note", b"y").unwrap();
        a.set_schema(2).unwrap();
        storage.rollback();
        assert_eq!((news(), numbers()), (0, before));
        storage.begin(a.id);
        a.set_bytes("note", b"y").unwrap();
        assert_eq!(news(), 0, "not before it is committed");
        assert!(storage.mark_failed("lost") && news() == 1, "a failure is told at once");
        storage.mark_failed("another");
        storage.commit();
        assert_eq!(news(), 1);
        let now = numbers();
        assert_eq!((now[0], now[2]), (before[0], before[2]));
        assert!(!before.contains(&now[1]), "another object has another number");
        storage.begin(b.id);
        b.set_schema(3).unwrap();
        storage.commit();
        assert_eq!(news(), 1, "of a schema alone");
    }

    #[test]
    #[cfg_attr(miri, ignore = "regions are memfds")]
    fn another_storage_is_filled_with_what_there_is() {
        let (old, new) = (Storage::default(), Storage::default());
        let a = services(&old, 1);
        old.move_to(a.id);
        let region = a.region("disk", 8192).unwrap();
        let memfd = |region: &HostRegion| File::from(region.memfd().try_clone_to_owned().unwrap());
        std::os::unix::fs::FileExt::write_at(&memfd(&region), b"data", 100).unwrap();
        a.set_bytes("note", b"x").unwrap();
        a.set_file("file", File::open("/").unwrap()).unwrap();
        a.set_schema(7).unwrap();
        old.mark_failed("lost");
        old.count("things", 3);
        let contents = old.contents();
        let filling = || Filling {
            schema: contents.schema,
            regions: contents
                .regions
                .iter()
                .map(|region| {
                    let len = region.object.len() as u64;
                    let file = memfd(&region.object);
                    assert!(HostRegion::from_memfd(file.try_clone().unwrap(), len + 1).is_err());
                    (region.key.clone(), HostRegion::from_memfd(file, len).unwrap())
                })
                .collect(),
            bytes: contents
                .bytes
                .iter()
                .map(|bytes| (bytes.key.clone(), bytes.object.to_vec()))
                .collect(),
            files: contents
                .files
                .iter()
                .map(|file| (file.key.clone(), file.object.try_clone().unwrap()))
                .collect(),
            failure: contents.failure.clone(),
            counters: contents.counters.clone(),
        };
        for _ in 0..2 {
            new.fill(filling());
        }
        assert_eq!(new.heap.owned(HOST).objects, 4, "the root and three objects");
        new.begin(DomainId(5));
        let b = services(&new, 5);
        let mapped = b.region("disk", 8192).unwrap();
        let mut read = [0; 4];
        std::os::unix::fs::FileExt::read_at(&memfd(&mapped), &mut read, 100).unwrap();
        assert_eq!((&read, b.schema()), (b"data", 7));
        assert_eq!(b.bytes("note").unwrap().as_slice(), b"x");
        assert!(b.file("file").unwrap().metadata().unwrap().is_dir());
        assert_eq!(new.failure().as_deref(), Some("lost"));
        assert_eq!(new.counters()["things"], 3);
        new.commit();
    }

    #[test]
    fn what_is_reclaimed_of_one_that_gives_the_storage_away_is_not_taken_from_the_next() {
        let storage = Storage::default();
        storage.move_to(DomainId(1));
        // So many that it takes its time to give them away.
        for key in 0..200 {
            storage.set_bytes(DomainId(1), &format!("{key}"), b"x").unwrap();
        }
        for round in 0..if cfg!(miri) { 3 } else { 500 } {
            let (old, next) = (DomainId(2 * round + 1), DomainId(2 * round + 2));
            storage.move_to(old);
            let start = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    start.wait();
                    storage.reclaim(old);
                });
                start.wait();
                storage.move_to(next);
            });
            assert_eq!(storage.owner(), next, "in round {round}");
        }
    }
}
