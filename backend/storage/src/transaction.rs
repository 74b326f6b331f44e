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
use std::io;
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

    /// Makes the region at `key` `len` bytes long, where it is. A transaction does not undo it, as
    /// it does not undo what is written into a region.
    ///
    /// # Errors
    /// `by` does not own the storage, there is no such region, it is longer, or it cannot be as
    /// long.
    pub fn grow_region(
        &self,
        by: DomainId,
        key: &str,
        len: u64,
    ) -> Result<Arc<HostRegion>, DomainError> {
        let inner = self.owned(by)?;
        let region = inner.regions.get(key).and_then(|&object| self.heap.get(object).ok());
        let region =
            region.ok_or_else(|| DomainError::new(format!("there is no region `{key}`")))?;
        let has = region.len() as u64;
        if len < has {
            return Err(DomainError::new(format!("region `{key}` has {has} bytes, not {len}")));
        }
        region.grow(len).map_err(|error| {
            DomainError::new(format!("region `{key}` does not grow to {len} bytes: {error}"))
        })?;
        self.changed(inner);
        Ok(region)
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

    /// A dup of the file at `key`, if there is one.
    ///
    /// # Errors
    /// There is one, and no descriptor is left for a dup.
    pub fn file(&self, key: &str) -> io::Result<Option<File>> {
        let inner = self.lock();
        let file = inner.files.get(key).and_then(|file| self.heap.get(*file).ok());
        file.map(|file| file.try_clone()).transpose()
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
mod tests;
