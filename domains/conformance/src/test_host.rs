//! A host in memory: storage that knows whose it is, a log that can be read, notifications that can
//! be waited for.
//!
//! It is stricter than a real host has to be: it remembers every attempt to use the storage without
//! owning it, so that a domain that swallows the error is caught as well.

use super::memory_image::MemoryImage;
use domain_api::{DomainError, Level, Params, QueueIndex};
use domain_host::{HostImage, HostRegion, HostServices};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What outlives instances.
#[derive(Default)]
pub struct TestStorage {
    contents: Mutex<Contents>,
    /// Images that were opened, by what was asked for.
    images: Mutex<Vec<(Params, Arc<MemoryImage>)>>,
}

impl std::fmt::Debug for TestStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestStorage").field("contents", &self.contents).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Contents {
    /// Number of the owner; 0 for none.
    owner: u64,
    /// Hosts made so far.
    hosts: u64,
    schema: u32,
    regions: BTreeMap<String, Arc<HostRegion>>,
    bytes: BTreeMap<String, Arc<Vec<u8>>>,
    files: BTreeMap<String, File>,
    has_no_descriptors: bool,
    failure: Option<String>,
    counters: BTreeMap<String, u64>,
}

impl TestStorage {
    /// An empty one.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The schema number that is set.
    #[must_use]
    pub fn schema(&self) -> u32 {
        lock(&self.contents).schema
    }

    /// A region, to look at its file.
    #[must_use]
    pub fn region(&self, key: &str) -> Option<Arc<HostRegion>> {
        lock(&self.contents).regions.get(key).map(Arc::clone)
    }

    /// What it is marked with.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        lock(&self.contents).failure.clone()
    }

    /// What was added to the counter `name`.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        lock(&self.contents).counters.get(name).copied().unwrap_or(0)
    }

    /// Whether instances are told that there is no descriptor for a dup of a file.
    pub fn run_out_of_descriptors(&self, is_out: bool) {
        lock(&self.contents).has_no_descriptors = is_out;
    }

    /// A dup of a file.
    #[must_use]
    pub fn file(&self, key: &str) -> Option<File> {
        lock(&self.contents).files.get(key).and_then(|file| file.try_clone().ok())
    }
}

/// What one instance sees of the host.
#[derive(Debug)]
pub struct TestHost {
    /// Which of the storage's hosts it is; not 0.
    pub(super) number: u64,
    storage: Arc<TestStorage>,
    lines: Mutex<Vec<(Level, String)>>,
    trespasses: Mutex<Vec<String>>,
    notified: Mutex<BTreeMap<u32, Bell>>,
}

/// What wakes a queue's worker: an eventfd, as in the daemon, because the kernel may ring it too.
#[derive(Debug)]
struct Bell {
    event: Arc<File>,
    /// How often it rang, as of the last look.
    rang: u64,
}

impl Bell {
    fn new() -> Self {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        Self { event: Arc::new(File::from(event)), rang: 0 }
    }

    fn look(&mut self) -> u64 {
        let mut count = [0; 8];
        if (&*self.event).read(&mut count).is_ok() {
            self.rang += u64::from_ne_bytes(count);
        }
        self.rang
    }
}

impl TestHost {
    /// A host for one instance on `storage`, which is not the instance's yet.
    #[must_use]
    pub fn new(storage: &Arc<TestStorage>) -> Arc<Self> {
        let mut contents = lock(&storage.contents);
        contents.hosts += 1;
        Arc::new(Self {
            number: contents.hosts,
            storage: Arc::clone(storage),
            lines: Mutex::default(),
            trespasses: Mutex::default(),
            notified: Mutex::default(),
        })
    }

    /// Makes this instance the storage's owner.
    pub fn own_storage(&self) {
        lock(&self.storage.contents).owner = self.number;
    }

    /// Lines logged so far.
    #[must_use]
    pub fn lines(&self) -> Vec<(Level, String)> {
        lock(&self.lines).clone()
    }

    /// Uses of the storage that only its owner may make, while this instance was not it.
    #[must_use]
    pub fn trespasses(&self) -> Vec<String> {
        lock(&self.trespasses).clone()
    }

    /// How often `queue` was notified.
    #[must_use]
    pub fn notifications(&self, queue: QueueIndex) -> u64 {
        self.bell(queue, Bell::look)
    }

    fn bell<R>(&self, queue: QueueIndex, f: impl FnOnce(&mut Bell) -> R) -> R {
        f(lock(&self.notified).entry(queue.0).or_insert_with(Bell::new))
    }

    /// Waits until `queue` was notified more than `seen` times, or until `deadline`. Returns
    /// whether it was.
    #[must_use]
    pub fn wait_notified(&self, queue: QueueIndex, seen: u64, deadline: Instant) -> bool {
        let event = self.bell(queue, |bell| Arc::clone(&bell.event));
        while self.notifications(queue) <= seen {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let mut watched = [PollFd::new(&*event, PollFlags::IN)];
            let timeout = Timespec::try_from(left.min(Duration::from_secs(1))).ok();
            let _ = poll(&mut watched, timeout.as_ref());
        }
        true
    }

    fn owned(&self, what: &str) -> Result<MutexGuard<'_, Contents>, DomainError> {
        let contents = lock(&self.storage.contents);
        if contents.owner == self.number {
            return Ok(contents);
        }
        lock(&self.trespasses).push(what.to_owned());
        Err(DomainError::new(format!("cannot {what}: the storage is not this instance's")))
    }
}

impl HostServices for TestHost {
    fn log(&self, level: Level, line: &str) {
        lock(&self.lines).push((level, line.to_owned()));
    }

    fn notify(&self, queue: QueueIndex) {
        let event = self.bell(queue, |bell| Arc::clone(&bell.event));
        // Fails only if the counter is full.
        let _ = (&*event).write(&1u64.to_ne_bytes());
    }

    fn notifier_fd(&self, queue: QueueIndex) -> Option<OwnedFd> {
        self.bell(queue, |bell| bell.event.try_clone()).ok().map(OwnedFd::from)
    }

    fn served_queues(&self) -> u64 {
        // Not all that will be attached: a domain must do with either.
        1
    }

    fn schema(&self) -> u32 {
        self.storage.schema()
    }

    fn set_schema(&self, schema: u32) -> Result<(), DomainError> {
        self.owned("set the schema")?.schema = schema;
        Ok(())
    }

    fn region_len(&self, key: &str) -> u64 {
        self.storage.region(key).map_or(0, |region| region.len() as u64)
    }

    fn region(&self, key: &str, len: u64) -> Result<Arc<HostRegion>, DomainError> {
        let mut contents = self.owned(&format!("open region `{key}`"))?;
        if let Some(region) = contents.regions.get(key) {
            let there = region.len() as u64;
            return if there == len {
                Ok(Arc::clone(region))
            } else {
                Err(DomainError::new(format!("region `{key}` has {there} bytes, not {len}")))
            };
        }
        let region = HostRegion::create(key, len).map_err(|error| {
            DomainError::new(format!("no region `{key}` of {len} bytes: {error}"))
        })?;
        let region = Arc::new(region);
        contents.regions.insert(key.to_owned(), Arc::clone(&region));
        Ok(region)
    }

    fn grow_region(&self, key: &str, len: u64) -> Result<Arc<HostRegion>, DomainError> {
        let contents = self.owned(&format!("grow region `{key}`"))?;
        let there = contents.regions.get(key).filter(|region| region.len() as u64 <= len);
        let Some(region) = there else {
            return Err(DomainError::new(format!("no region `{key}` of at most {len} bytes")));
        };
        region.grow(len).map_err(|error| DomainError::new(format!("region `{key}`: {error}")))?;
        Ok(Arc::clone(region))
    }

    fn bytes(&self, key: &str) -> Option<Arc<Vec<u8>>> {
        lock(&self.storage.contents).bytes.get(key).map(Arc::clone)
    }

    fn set_bytes(&self, key: &str, value: &[u8]) -> Result<(), DomainError> {
        self.owned(&format!("set bytes `{key}`"))?
            .bytes
            .insert(key.to_owned(), Arc::new(value.to_vec()));
        Ok(())
    }

    fn file(&self, key: &str) -> io::Result<Option<File>> {
        if lock(&self.storage.contents).has_no_descriptors {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        Ok(self.storage.file(key))
    }

    fn set_file(&self, key: &str, file: File) -> Result<(), DomainError> {
        self.owned(&format!("keep file `{key}`"))?.files.insert(key.to_owned(), file);
        Ok(())
    }

    fn mark_storage_failed(&self, sentence: &str) {
        lock(&self.storage.contents).failure.get_or_insert_with(|| sentence.to_owned());
    }

    fn storage_failure(&self) -> Option<String> {
        self.storage.failure()
    }

    fn count(&self, name: &str, count: u64) {
        *lock(&self.storage.contents).counters.entry(name.to_owned()).or_default() += count;
    }

    fn open_image(&self, _: &str, params: &Params) -> Result<Arc<dyn HostImage>, DomainError> {
        let mut images = lock(&self.storage.images);
        if let Some((_, image)) = images.iter().find(|(of, _)| of == params) {
            return Ok(Arc::clone(image) as Arc<dyn HostImage>);
        }
        let image = MemoryImage::new(params.get("readonly") == Some("true"));
        images.push((params.clone(), Arc::clone(&image)));
        Ok(image)
    }
}
