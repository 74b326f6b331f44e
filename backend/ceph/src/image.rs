//! An image, as the host's side has it.

use crate::deadline::within;
use crate::fate::Fate;
use crate::handle::{Handle, Unopened, meaning};
use crate::lock::Lock;
use crate::spec::Spec;
use domain_abi::{Claim, DomainError, ImageInfo, RawRequest, op};
use domain_host::{HostImage, ImageEnd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

/// How long it may take to open one, where nothing has more patience.
const TO_OPEN: Duration = Duration::from_secs(15);
/// Between two tries.
const PAUSE: Duration = Duration::from_secs(6);
/// How long it may take to have its size changed.
const TO_RESIZE: Duration = Duration::from_secs(10);
/// How long the end of the process waits for it to be closed.
const TO_CLOSE: Duration = Duration::from_secs(3);

/// What Ceph's client discards by at least (`rbd_discard_granularity_bytes`), and what is good for
/// any I/O.
const GRANULARITY: u32 = 64 << 10;

/// A handle that may be taken away.
type Slot = RwLock<Option<Arc<Handle>>>;

/// What is open in this process. librbd is the process's, too.
static OPEN: Mutex<Open> = Mutex::new(Open { slots: Vec::new(), busy: 0, is_over: false });
/// Rung when there is one less.
static IDLE: Condvar = Condvar::new();

struct Open {
    slots: Vec<Weak<Slot>>,
    /// How many are being opened, with patience for it, or closed.
    busy: usize,
    /// The process is about to end: what is opened now is closed again.
    is_over: bool,
}

fn lock_open() -> MutexGuard<'static, Open> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An image is being opened or closed; the end of the process waits for it.
struct Busy;

impl Busy {
    fn begin() -> Self {
        lock_open().busy += 1;
        Self
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        lock_open().busy -= 1;
        IDLE.notify_all();
    }
}

/// Closes all that is open in this process, or is being opened; the process is about to end. Waits
/// for that, and for what is being closed, for some seconds at most. A client that just disappears
/// is waited for by the others: they tell each other of each change, and Ceph gives up on it after
/// half a minute.
pub fn close_all() {
    let mut open = lock_open();
    open.is_over = true;
    let slots = std::mem::take(&mut open.slots);
    let is_busy = open.busy > 0;
    drop(open);
    let handles: Vec<_> = slots.iter().filter_map(|slot| take(&*slot.upgrade()?)).collect();
    if handles.is_empty() && !is_busy {
        return;
    }
    let close = move || {
        drop(handles);
        drop(IDLE.wait_while(lock_open(), |open| open.busy > 0));
    };
    if within(TO_CLOSE, close).is_none() {
        log::warn!("images are not closed yet: the cluster does not answer");
    }
}

fn take(slot: &Slot) -> Option<Arc<Handle>> {
    slot.write().unwrap_or_else(PoisonError::into_inner).take()
}

/// An image that is open.
#[derive(Debug)]
pub(crate) struct Image {
    /// Empty when it was closed.
    handle: Arc<Slot>,
    fate: Arc<Fate>,
    lock: Arc<Lock>,
    size: AtomicU64,
    read_only: bool,
    id: (u64, u64),
}

/// What is known when it was opened.
struct Opened {
    handle: Arc<Slot>,
    size: u64,
    id: (u64, u64),
}

impl Image {
    /// Opens one. While the cluster does not answer, it is tried for as long as `patience` has it.
    pub(crate) fn open(spec: &Spec, patience: Duration) -> Result<Self, DomainError> {
        let deadline = Instant::now() + patience.max(TO_OPEN);
        let fate = Arc::new(Fate::new(spec.label()));
        let read_only = spec.read_only;
        let opened = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (theirs, fate) = (spec.clone(), Arc::clone(&fate));
            let busy = Busy::begin();
            let opened = within(left, move || open(&theirs, fate));
            drop(busy);
            let opened = opened.ok_or_else(|| {
                Unopened::Silent(format!(
                    "image {} was not opened for {} s; look whether the cluster's OSDs run (`ceph -s`)",
                    spec.label(),
                    patience.max(TO_OPEN).as_secs()
                ))
            });
            match opened.flatten() {
                Ok(opened) => break opened,
                Err(Unopened::Silent(why)) if Instant::now() + PAUSE < deadline => {
                    if patience > TO_OPEN {
                        log::warn!("{why}; trying on");
                    }
                    std::thread::sleep(PAUSE);
                }
                Err(Unopened::Silent(why) | Unopened::Refused(why)) => {
                    return Err(DomainError::new(why));
                }
            }
        };
        let Opened { handle, size, id } = opened;
        Ok(Self { handle, fate, lock: Arc::default(), size: AtomicU64::new(size), read_only, id })
    }

    fn handle(&self) -> Result<Arc<Handle>, DomainError> {
        if let Some(why) = self.fate.lost() {
            return Err(DomainError::new(why.clone()));
        }
        let handle = self.handle.read().unwrap_or_else(PoisonError::into_inner);
        handle.clone().ok_or_else(|| DomainError::new("the image is closed"))
    }
}

/// Opens one, on a thread of its own.
fn open(spec: &Spec, fate: Arc<Fate>) -> Result<Opened, Unopened> {
    let opened = open_now(spec, fate);
    let mut open = lock_open();
    let is_over = open.is_over;
    if let Ok(opened) = &opened
        && !is_over
    {
        open.slots.retain(|slot| slot.strong_count() > 0);
        open.slots.push(Arc::downgrade(&opened.handle));
    }
    drop(open);
    if is_over {
        // Closed, before that is not waited for any more.
        drop(opened);
        return Err(Unopened::Refused("the process is about to end".to_owned()));
    }
    opened
}

fn open_now(spec: &Spec, fate: Arc<Fate>) -> Result<Opened, Unopened> {
    let label = fate.label.clone();
    let handle = Handle::open(spec, fate)?;
    let failed =
        |errno| Unopened::Refused(format!("image {label} cannot be looked at: {}", meaning(errno)));
    let size = handle.size().map_err(failed)?;
    let name = handle.identity().map_err(failed)?;
    let name = format!("{name}@{}", spec.snapshot.as_deref().unwrap_or(""));
    Ok(Opened { handle: Arc::new(RwLock::new(Some(Arc::new(handle)))), size, id: numbers(&name) })
}

/// Two numbers for a name, the same in each process and version: FNV-1a, forwards and backwards.
fn numbers(name: &str) -> (u64, u64) {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let begin = 0xcbf2_9ce4_8422_2325;
    (name.bytes().fold(begin, step), name.bytes().rev().fold(begin, step))
}

impl HostImage for Image {
    fn info(&self) -> ImageInfo {
        let writable = |number: u32| if self.read_only { 0 } else { number };
        ImageInfo {
            capacity: self.size.load(Ordering::Acquire),
            read_only: self.read_only,
            optimal_io_size: GRANULARITY,
            discard_granularity: writable(GRANULARITY),
            id: self.id,
        }
    }

    fn claim(&self, patience: Duration) -> Result<Claim, DomainError> {
        if self.read_only {
            return Ok(Claim::Nothing);
        }
        self.lock.claim(&self.handle()?, patience).map_err(|error| match self.fate.lost() {
            Some(why) => DomainError::new(why.clone()),
            None => error,
        })
    }

    fn release(&self) -> Result<(), DomainError> {
        // What is lost is another's already.
        if self.read_only || self.fate.lost().is_some() {
            return Ok(());
        }
        self.lock.release(&self.handle()?).or_else(|why| match self.fate.lost() {
            Some(_) => Ok(()),
            None => Err(why),
        })
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        let handle = self.handle()?;
        let resized = within(TO_RESIZE, move || {
            // Another program may have made it larger, or may do so in this moment.
            if handle.size()? < capacity {
                match handle.enlarge(capacity) {
                    Ok(()) | Err(libc::EINVAL) => {}
                    Err(errno) => return Err(errno),
                }
            }
            handle.size()
        });
        let label = &self.fate.label;
        let resized = resized.ok_or_else(|| {
            DomainError::new(format!(
                "image {label} was not resized for {} s, and may be yet; look whether the cluster's OSDs run",
                TO_RESIZE.as_secs()
            ))
        })?;
        let size = resized.map_err(|errno| {
            DomainError::new(match self.fate.lost() {
                Some(why) => why.clone(),
                None => format!("image {label} was not resized: {}", meaning(errno)),
            })
        })?;
        self.size.store(size, Ordering::Release);
        if size < capacity {
            return Err(DomainError::new(format!(
                "image {label} has {size} bytes, not {capacity}"
            )));
        }
        Ok(())
    }

    unsafe fn begin(&self, request: &RawRequest, end: ImageEnd) {
        // Without the lock librbd refuses a flush, too.
        if request.op() == op::FLUSH && (self.read_only || self.lock.is_clean()) {
            return end.complete(Ok(()));
        }
        let handle = self.handle.read().unwrap_or_else(PoisonError::into_inner);
        match &*handle {
            // SAFETY: the caller's contract.
            Some(handle) if self.fate.lost().is_none() => unsafe { handle.begin(request, end) },
            _ => end.complete(Err(libc::ESHUTDOWN)),
        }
    }

    fn lost(&self) -> Option<String> {
        self.fate.lost().cloned()
    }

    fn close(&self) {
        let handle = take(&self.handle);
        if within(TO_CLOSE, move || drop(handle)).is_none() {
            log::warn!("image {} is not closed yet: the cluster does not answer", self.fate.label);
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let busy = Busy::begin();
        let handle = take(&self.handle);
        if handle.is_some() {
            // It may take for ever, and only the end of the process waits for it.
            let _ = within(Duration::ZERO, move || {
                drop(handle);
                drop(busy);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_that_other_versions_have() {
        assert_eq!(numbers("a/1/b@"), numbers("a/1/b@"));
        assert_ne!(numbers("a/1/b@"), numbers("a/1/b@s"));
        assert_eq!(numbers("a").0, 0xaf63_dc4c_8601_ec8c, "FNV-1a of `a`");
    }
}
