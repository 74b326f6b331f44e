//! What the host does for an instance: a safe trait for the keeper of the storage, and the C
//! functions in front of it.

use crate::answer::answer;
use crate::image::{HostImage, ImageSide};
use crate::region::HostRegion;
use crate::tasks::{Task, Tasks};
use domain_abi::{self as abi, HostVtable, RawBytes, RawMessage, RawRegion, TaskEntry};
use domain_abi::{DomainError, Level, Params, QueueIndex, RawImage};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Storage, log and notifiers, as one instance sees them. Each instance has one of its own, which
/// knows whose it is.
pub trait HostServices: Send + Sync {
    /// A line for the log.
    fn log(&self, level: Level, line: &str);
    /// Something can be reaped on `queue`.
    fn notify(&self, queue: QueueIndex);
    /// A dup of the eventfd that [`notify`](Self::notify) writes to; `None` where notifications go
    /// another way.
    fn notifier_fd(&self, queue: QueueIndex) -> Option<OwnedFd> {
        let _ = queue;
        None
    }
    /// The queues that have workers now, one bit each.
    fn served_queues(&self) -> u64 {
        0
    }
    /// The storage's schema number, 0 if it is empty.
    fn schema(&self) -> u32;
    /// Sets it.
    ///
    /// # Errors
    /// The storage is not this instance's.
    fn set_schema(&self, schema: u32) -> Result<(), DomainError>;
    /// Length of a region, 0 if there is none.
    fn region_len(&self, key: &str) -> u64;
    /// Opens or makes a region.
    ///
    /// # Errors
    /// The storage is not this instance's, the length is another one, or there is no memory.
    fn region(&self, key: &str, len: u64) -> Result<Arc<HostRegion>, DomainError>;
    /// Makes a region longer, which stays where it is mapped.
    ///
    /// # Errors
    /// The storage is not this instance's, there is no such region, it is longer, or it cannot be
    /// as long.
    fn grow_region(&self, key: &str, len: u64) -> Result<Arc<HostRegion>, DomainError>;
    /// The bytes at `key`.
    fn bytes(&self, key: &str) -> Option<Arc<Vec<u8>>>;
    /// Sets them.
    ///
    /// # Errors
    /// The storage is not this instance's.
    fn set_bytes(&self, key: &str, value: &[u8]) -> Result<(), DomainError>;
    /// A dup of the file at `key`, if there is one.
    ///
    /// # Errors
    /// There is one, and no descriptor is left for a dup.
    fn file(&self, key: &str) -> io::Result<Option<File>>;
    /// Keeps `file` at `key`.
    ///
    /// # Errors
    /// The storage is not this instance's.
    fn set_file(&self, key: &str, file: File) -> Result<(), DomainError>;
    /// Marks the storage as one that may have lost what was written to it; the first sentence
    /// stays.
    fn mark_storage_failed(&self, sentence: &str);
    /// What it was marked with.
    fn storage_failure(&self) -> Option<String>;
    /// Adds to a counter of the device.
    fn count(&self, name: &str, count: u64) {
        let _ = (name, count);
    }
    /// Opens an image through `engine`. One that is open for the device already is that one.
    ///
    /// # Errors
    /// A sentence for the operator.
    fn open_image(&self, engine: &str, params: &Params) -> Result<Arc<dyn HostImage>, DomainError> {
        let _ = params;
        Err(DomainError::new(format!("this host opens no images through `{engine}`")))
    }
}

/// One instance's host table and what stands behind it. Pinned in its `Arc`: the table's `ctx`
/// points to it.
pub(crate) struct HostSide {
    table: HostVtable,
    services: Arc<dyn HostServices>,
    tasks: Tasks,
    /// Regions that the module knows the addresses of: kept mapped as long as its code may run.
    regions: Mutex<Vec<Arc<HostRegion>>>,
    /// Images that it has, as long. Boxed, because it knows where they are.
    #[allow(clippy::vec_box)]
    images: Mutex<Vec<Box<ImageSide>>>,
    started: Instant,
}

// SAFETY: `table` is constant after `new`; `ctx` in it is our own address, everything behind it is
// Sync.
unsafe impl Send for HostSide {}
// SAFETY: as above.
unsafe impl Sync for HostSide {}

impl HostSide {
    pub(crate) fn new(services: Arc<dyn HostServices>) -> Arc<Self> {
        Arc::new_cyclic(|me: &std::sync::Weak<Self>| {
            let ctx = me.as_ptr().cast_mut().cast::<c_void>();
            Self {
                table: HostVtable {
                    size: size_of::<HostVtable>() as u32,
                    abi_version: abi::ABI_VERSION,
                    ctx,
                    log,
                    clock_ns,
                    notify,
                    schema,
                    set_schema,
                    region_len,
                    region,
                    bytes_get,
                    bytes_put,
                    fd_dup,
                    fd_put,
                    spawn,
                    timer,
                    notifier_fd,
                    served_queues,
                    storage_failed,
                    storage_failure,
                    count,
                    region_grow,
                    image_open,
                },
                services,
                tasks: Tasks::default(),
                regions: Mutex::new(Vec::new()),
                images: Mutex::new(Vec::new()),
                started: Instant::now(),
            }
        })
    }

    pub(crate) const fn vtable(&self) -> *const HostVtable {
        &raw const self.table
    }

    pub(crate) const fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    pub(crate) fn services(&self) -> &dyn HostServices {
        &*self.services
    }

    /// Tells the module where a region is, and keeps it mapped as long as its code may run.
    ///
    /// # Safety
    /// `out` is valid for one structure.
    unsafe fn hand_out_region(
        &self,
        region: Arc<HostRegion>,
        out: *mut RawRegion,
    ) -> Result<(), DomainError> {
        // SAFETY: the caller's contract.
        unsafe { out.write(RawRegion { base: region.base(), len: region.len(), fd: region.fd() }) };
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        if !regions.iter().any(|known| Arc::ptr_eq(known, &region)) {
            regions.push(region);
        }
        Ok(())
    }
}

/// A host table over `services` that is valid for ever, for a benchmark that calls a domain without
/// an [`Instance`](crate::Instance).
#[must_use]
pub fn leaked_table(services: Arc<dyn HostServices>) -> &'static HostVtable {
    let side: *const HostSide = Arc::into_raw(HostSide::new(services));
    // SAFETY: the count that `into_raw` kept is never given back.
    unsafe { &(*side).table }
}

/// # Safety
/// `ctx` is the `HostSide` of a module whose `fini` has not returned.
unsafe fn side<'a>(ctx: *mut c_void) -> &'a HostSide {
    // SAFETY: the caller's contract; `HostSide::new` made it.
    unsafe { &*ctx.cast::<HostSide>() }
}

/// # Safety
/// `bytes` is valid for the call.
unsafe fn text<'a>(bytes: RawBytes) -> std::borrow::Cow<'a, str> {
    if bytes.len == 0 {
        return std::borrow::Cow::Borrowed("");
    }
    // SAFETY: the caller's contract.
    String::from_utf8_lossy(unsafe { std::slice::from_raw_parts(bytes.bytes, bytes.len) })
}

unsafe extern "C" fn log(ctx: *mut c_void, level: u32, line: RawBytes) {
    let level = match level {
        1 => Level::Error,
        2 => Level::Warn,
        3 => Level::Info,
        _ => Level::Debug,
    };
    // SAFETY: abi::HostVtable: `ctx` is ours, `line` valid for the call.
    let (side, line) = unsafe { (side(ctx), text(line)) };
    let _ = catch_unwind(AssertUnwindSafe(|| side.services.log(level, &line)));
}

unsafe extern "C" fn clock_ns(ctx: *mut c_void) -> u64 {
    // SAFETY: abi::HostVtable: `ctx` is ours.
    u64::try_from(unsafe { side(ctx) }.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

unsafe extern "C" fn notify(ctx: *mut c_void, queue: u32) {
    // SAFETY: abi::HostVtable: `ctx` is ours.
    let side = unsafe { side(ctx) };
    let _ = catch_unwind(AssertUnwindSafe(|| side.services.notify(QueueIndex(queue))));
}

unsafe extern "C" fn schema(ctx: *mut c_void) -> u32 {
    // SAFETY: abi::HostVtable: `ctx` is ours.
    let side = unsafe { side(ctx) };
    catch_unwind(AssertUnwindSafe(|| side.services.schema())).unwrap_or(0)
}

unsafe extern "C" fn set_schema(ctx: *mut c_void, schema: u32, message: *mut RawMessage) -> u32 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `message` valid.
    unsafe { answer(message, || side(ctx).services.set_schema(schema)) }
}

unsafe extern "C" fn region_len(ctx: *mut c_void, key: RawBytes) -> u64 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `key` valid for the call.
    let (side, key) = unsafe { (side(ctx), text(key)) };
    catch_unwind(AssertUnwindSafe(|| side.services.region_len(&key))).unwrap_or(0)
}

unsafe extern "C" fn region(
    ctx: *mut c_void,
    key: RawBytes,
    len: u64,
    out: *mut RawRegion,
    message: *mut RawMessage,
) -> u32 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `key` valid for the call.
    let (side, key) = unsafe { (side(ctx), text(key)) };
    // SAFETY: `out` and `message` are valid (abi::HostVtable).
    unsafe { answer(message, || side.hand_out_region(side.services.region(&key, len)?, out)) }
}

unsafe extern "C" fn region_grow(
    ctx: *mut c_void,
    key: RawBytes,
    len: u64,
    out: *mut RawRegion,
    message: *mut RawMessage,
) -> u32 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `key` valid for the call.
    let (side, key) = unsafe { (side(ctx), text(key)) };
    // SAFETY: `out` and `message` are valid (abi::HostVtable).
    unsafe { answer(message, || side.hand_out_region(side.services.grow_region(&key, len)?, out)) }
}

unsafe extern "C" fn bytes_get(
    ctx: *mut c_void,
    key: RawBytes,
    out: *mut u8,
    capacity: usize,
) -> u64 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `key` valid for the call.
    let (side, key) = unsafe { (side(ctx), text(key)) };
    let found = catch_unwind(AssertUnwindSafe(|| side.services.bytes(&key))).unwrap_or(None);
    // SAFETY: `out` has room for `capacity` bytes (abi::HostVtable).
    unsafe { hand_out(found.as_deref().map(Vec::as_slice), out, capacity) }
}

/// Copies what fits, and says how much there is; `u64::MAX` for nothing.
///
/// # Safety
/// `out` has room for `capacity` bytes.
unsafe fn hand_out(value: Option<&[u8]>, out: *mut u8, capacity: usize) -> u64 {
    let Some(value) = value else { return u64::MAX };
    // SAFETY: the caller's contract; the module's buffer cannot overlap the host's value.
    unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), out, value.len().min(capacity)) };
    value.len() as u64
}

unsafe extern "C" fn bytes_put(
    ctx: *mut c_void,
    key: RawBytes,
    value: RawBytes,
    message: *mut RawMessage,
) -> u32 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `key` valid for the call.
    let (side, key) = unsafe { (side(ctx), text(key)) };
    let value = if value.len == 0 {
        &[][..]
    } else {
        // SAFETY: valid for the call (abi::HostVtable).
        unsafe { std::slice::from_raw_parts(value.bytes, value.len) }
    };
    // SAFETY: `message` is valid (abi::HostVtable).
    unsafe { answer(message, || side.services.set_bytes(&key, value)) }
}

unsafe extern "C" fn fd_dup(ctx: *mut c_void, key: RawBytes) -> i32 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `key` valid for the call.
    let (side, key) = unsafe { (side(ctx), text(key)) };
    match catch_unwind(AssertUnwindSafe(|| side.services.file(&key))) {
        Ok(Ok(Some(file))) => OwnedFd::from(file).into_raw_fd(),
        Ok(Ok(None)) => -1,
        // -1 is none.
        Ok(Err(error)) => -error.raw_os_error().filter(|errno| *errno > 1).unwrap_or(libc::EIO),
        Err(_) => -libc::EIO,
    }
}

unsafe extern "C" fn fd_put(
    ctx: *mut c_void,
    key: RawBytes,
    fd: i32,
    message: *mut RawMessage,
) -> u32 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `key` valid for the call.
    let (side, key) = unsafe { (side(ctx), text(key)) };
    let work = || {
        // SAFETY: `fd` is open for the call (abi::HostVtable) and stays the module's: we only dup
        // it.
        let theirs = ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
        let ours = theirs.try_clone().map_err(|error| {
            DomainError::new(format!("cannot dup descriptor {}: {error}", theirs.as_raw_fd()))
        })?;
        side.services.set_file(&key, ours)
    };
    // SAFETY: `message` is valid (abi::HostVtable).
    unsafe { answer(message, work) }
}

unsafe extern "C" fn spawn(
    ctx: *mut c_void,
    name: RawBytes,
    entry: TaskEntry,
    arg: *mut c_void,
    message: *mut RawMessage,
) -> u32 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `name` valid for the call, `entry` and `arg` a task
    // that we may call once.
    let (side, name, task) = unsafe { (side(ctx), text(name), Task::new(entry, arg)) };
    // SAFETY: `message` is valid (abi::HostVtable).
    unsafe { answer(message, || side.tasks.spawn(&name, task)) }
}

unsafe extern "C" fn timer(
    ctx: *mut c_void,
    delay_ns: u64,
    entry: TaskEntry,
    arg: *mut c_void,
    message: *mut RawMessage,
) -> u32 {
    // SAFETY: as in `spawn`.
    let (side, task) = unsafe { (side(ctx), Task::new(entry, arg)) };
    // SAFETY: `message` is valid (abi::HostVtable).
    unsafe { answer(message, || side.tasks.after(Duration::from_nanos(delay_ns), task)) }
}

unsafe extern "C" fn notifier_fd(ctx: *mut c_void, queue: u32) -> i32 {
    // SAFETY: abi::HostVtable: `ctx` is ours.
    let side = unsafe { side(ctx) };
    let fd = catch_unwind(AssertUnwindSafe(|| side.services.notifier_fd(QueueIndex(queue))))
        .unwrap_or(None);
    fd.map_or(-1, IntoRawFd::into_raw_fd)
}

unsafe extern "C" fn served_queues(ctx: *mut c_void) -> u64 {
    // SAFETY: abi::HostVtable: `ctx` is ours.
    let side = unsafe { side(ctx) };
    catch_unwind(AssertUnwindSafe(|| side.services.served_queues())).unwrap_or(0)
}

unsafe extern "C" fn storage_failed(ctx: *mut c_void, sentence: RawBytes) {
    // SAFETY: abi::HostVtable: `ctx` is ours, `sentence` valid for the call.
    let (side, sentence) = unsafe { (side(ctx), text(sentence)) };
    let _ = catch_unwind(AssertUnwindSafe(|| side.services.mark_storage_failed(&sentence)));
}

unsafe extern "C" fn storage_failure(ctx: *mut c_void, out: *mut u8, capacity: usize) -> u64 {
    // SAFETY: abi::HostVtable: `ctx` is ours.
    let side = unsafe { side(ctx) };
    let found = catch_unwind(AssertUnwindSafe(|| side.services.storage_failure())).unwrap_or(None);
    // SAFETY: `out` has room for `capacity` bytes (abi::HostVtable).
    unsafe { hand_out(found.as_deref().map(str::as_bytes), out, capacity) }
}

unsafe extern "C" fn count(ctx: *mut c_void, name: RawBytes, count: u64) {
    // SAFETY: abi::HostVtable: `ctx` is ours, `name` valid for the call.
    let (side, name) = unsafe { (side(ctx), text(name)) };
    let _ = catch_unwind(AssertUnwindSafe(|| side.services.count(&name, count)));
}

unsafe extern "C" fn image_open(
    ctx: *mut c_void,
    engine: RawBytes,
    params: *const RawBytes,
    param_count: usize,
    out: *mut RawImage,
    message: *mut RawMessage,
) -> u32 {
    // SAFETY: abi::HostVtable: `ctx` is ours, `engine` valid for the call.
    let (side, engine) = unsafe { (side(ctx), text(engine)) };
    let work = || {
        let mut given = Params::default();
        for pair in 0..param_count / 2 {
            // SAFETY: `params` are `param_count` texts that are valid for the call.
            let [key, value] = [0, 1].map(|half| unsafe { text(*params.add(pair * 2 + half)) });
            given.set(key.into_owned(), value.into_owned());
        }
        let services = Arc::clone(&side.services);
        let wake = Arc::new(move |queue| services.notify(queue));
        let image = ImageSide::new(side.services.open_image(&engine, &given)?, wake);
        // SAFETY: `out` is valid (abi::HostVtable).
        unsafe { out.write(image.raw()) };
        side.images.lock().unwrap_or_else(PoisonError::into_inner).push(image);
        Ok(())
    };
    // SAFETY: `message` is valid (abi::HostVtable).
    unsafe { answer(message, work) }
}
