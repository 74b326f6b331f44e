//! Images that the host has open for a device, and the C functions in front of them.
//!
//! Whoever opens images implements [`ImageOpener`] and [`HostImage`]; what ends is told through an
//! [`ImageEnd`], from any thread. Here is what is between that and a module: lanes, in which ends
//! wait for the worker of a queue.
//!
//! Invariants: each request that was begun ends exactly once; a lane that is closed has nothing in
//! flight, so nothing of the instance or the guest is touched after that.

use crate::answer::answer;
use domain_abi::{self as abi, ImageVtable, RawImage, RawImageEnd, RawImageInfo, RawMessage};
use domain_abi::{Claim, DomainError, ImageInfo, Params, QueueIndex, RawRequest};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// An I/O error, where nothing better is known.
const EIO: i32 = 5;

/// An image that is open.
pub trait HostImage: Send + Sync {
    /// What it is, as of the last look. Does not wait.
    fn info(&self) -> ImageInfo;
    /// Claims it for this host's own use. Waits for `patience` at most; what is not done by then
    /// goes on, and is an error now. To claim what is claimed changes nothing.
    ///
    /// # Errors
    /// It is not done yet, or cannot be done.
    fn claim(&self, patience: Duration) -> Result<Claim, DomainError>;
    /// Makes durable what was written, and lets others use it.
    ///
    /// # Errors
    /// It stays claimed.
    fn release(&self) -> Result<(), DomainError>;
    /// Makes it `capacity` bytes long, unless it is as long or longer.
    ///
    /// # Errors
    /// It is as it was.
    fn resize(&self, capacity: u64) -> Result<(), DomainError>;
    /// Begins a request; `end` is completed when the image is done with it, maybe in this call.
    ///
    /// # Safety
    /// All that `request` points to stays valid until `end` is completed or dropped.
    unsafe fn begin(&self, request: &RawRequest, end: ImageEnd);
    /// Why it cannot be used any more, if that is so; then another one has to be opened.
    fn lost(&self) -> Option<String> {
        None
    }
    /// It is not used any more, as the process is about to end.
    fn close(&self) {}
}

/// What opens images.
pub trait ImageOpener: Send + Sync {
    /// Opens one. May take seconds, and gives up then; or after `patience`, if that is longer.
    ///
    /// # Errors
    /// A sentence for the operator.
    fn open(
        &self,
        engine: &str,
        params: &Params,
        patience: Duration,
    ) -> Result<Arc<dyn HostImage>, DomainError>;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What wakes the worker of a queue.
type Wake = Arc<dyn Fn(QueueIndex) + Send + Sync>;

/// What a lane has in flight, and what has ended.
#[derive(Default)]
struct Ends {
    in_flight: usize,
    ended: Vec<RawImageEnd>,
    /// None when the lane was closed: what ends a request may have it for a moment longer.
    wake: Option<Wake>,
}

/// A lane, as ends see it.
struct Lane {
    queue: QueueIndex,
    ends: Mutex<Ends>,
    /// Rung when nothing is in flight any more.
    idle: Condvar,
}

/// The right to end one request. One that is dropped ends it with an I/O error.
pub struct ImageEnd {
    lane: Arc<Lane>,
    tag: u64,
    result: Result<(), i32>,
}

impl std::fmt::Debug for ImageEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageEnd").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl ImageEnd {
    /// The request has ended: well, or with this `errno`.
    pub fn complete(mut self, result: Result<(), i32>) {
        self.result = result;
    }
}

impl Drop for ImageEnd {
    fn drop(&mut self) {
        let result = self.result.map_or_else(|errno| -i64::from(errno), |()| 0);
        let mut ends = lock(&self.lane.ends);
        // What ended before and was not collected has notified the queue, which collects all.
        let is_first = ends.ended.is_empty();
        ends.ended.push(RawImageEnd { tag: self.tag, result });
        ends.in_flight -= 1;
        // With the lock, so that nothing of the instance's host is used after the lane's end.
        if let Some(wake) = ends.wake.as_ref().filter(|_| is_first) {
            wake(self.lane.queue);
        }
        if ends.in_flight == 0 {
            self.lane.idle.notify_all();
        }
    }
}

/// An image, as one instance has it. The module knows where it is, so it stays until `fini` has
/// returned.
pub(crate) struct ImageSide {
    image: Arc<dyn HostImage>,
    wake: Wake,
}

/// A lane, as the module has it.
struct LaneSide {
    image: Arc<dyn HostImage>,
    lane: Arc<Lane>,
}

static TABLE: ImageVtable = ImageVtable {
    size: size_of::<ImageVtable>() as u32,
    abi_version: abi::ABI_VERSION,
    info,
    claim,
    release,
    resize,
    lane_open,
    lane_begin,
    lane_reap,
    lane_close,
};

impl ImageSide {
    pub(crate) fn new(image: Arc<dyn HostImage>, wake: Wake) -> Box<Self> {
        Box::new(Self { image, wake })
    }

    /// What the module gets; valid as long as the box.
    pub(crate) fn raw(&self) -> RawImage {
        RawImage { table: &raw const TABLE, image: std::ptr::from_ref(self).cast_mut().cast() }
    }
}

/// # Safety
/// `image` comes from [`ImageSide::raw`], and the module's `fini` has not returned.
unsafe fn side<'a>(image: *mut c_void) -> &'a ImageSide {
    // SAFETY: the caller's contract; `HostSide` keeps the box until then.
    unsafe { &*image.cast::<ImageSide>() }
}

/// # Safety
/// `lane` comes from `lane_open`, and was not closed.
unsafe fn lane_side<'a>(lane: *mut c_void) -> &'a LaneSide {
    // SAFETY: the caller's contract; a box until `lane_close`.
    unsafe { &*lane.cast::<LaneSide>() }
}

unsafe extern "C" fn info(image: *mut c_void, out: *mut RawImageInfo) {
    // SAFETY: abi::ImageVtable: `image` is ours.
    let side = unsafe { side(image) };
    let info = catch_unwind(AssertUnwindSafe(|| side.image.info())).unwrap_or_default();
    let raw = RawImageInfo {
        size: size_of::<RawImageInfo>() as u32,
        read_only: u32::from(info.read_only),
        capacity: info.capacity,
        optimal_io_size: info.optimal_io_size,
        discard_granularity: info.discard_granularity,
        device: info.id.0,
        inode: info.id.1,
    };
    // SAFETY: `out` is valid for as many bytes as its first field says (abi::ImageVtable).
    unsafe {
        let len = ((*out).size as usize).min(size_of::<RawImageInfo>());
        std::ptr::copy_nonoverlapping((&raw const raw).cast::<u8>(), out.cast(), len);
    }
}

unsafe extern "C" fn claim(
    image: *mut c_void,
    wait_ms: u32,
    out: *mut u32,
    message: *mut RawMessage,
) -> u32 {
    // SAFETY: abi::ImageVtable: `image` is ours, `out` and `message` are valid.
    unsafe {
        let side = side(image);
        answer(message, || {
            let claim = side.image.claim(Duration::from_millis(u64::from(wait_ms)))?;
            out.write(claim as u32);
            Ok(())
        })
    }
}

unsafe extern "C" fn release(image: *mut c_void, message: *mut RawMessage) -> u32 {
    // SAFETY: abi::ImageVtable: `image` is ours, `message` is valid.
    unsafe {
        let side = side(image);
        answer(message, || side.image.release())
    }
}

unsafe extern "C" fn resize(image: *mut c_void, capacity: u64, message: *mut RawMessage) -> u32 {
    // SAFETY: abi::ImageVtable: `image` is ours, `message` is valid.
    unsafe {
        let side = side(image);
        answer(message, || side.image.resize(capacity))
    }
}

unsafe extern "C" fn lane_open(image: *mut c_void, queue: u32) -> *mut c_void {
    // SAFETY: abi::ImageVtable: `image` is ours.
    let side = unsafe { side(image) };
    let lane = Arc::new(Lane {
        queue: QueueIndex(queue),
        ends: Mutex::new(Ends { wake: Some(Arc::clone(&side.wake)), ..Ends::default() }),
        idle: Condvar::new(),
    });
    Box::into_raw(Box::new(LaneSide { image: Arc::clone(&side.image), lane })).cast()
}

unsafe extern "C" fn lane_begin(lane: *mut c_void, request: *const RawRequest) {
    // SAFETY: abi::ImageVtable: `lane` is ours, `request` is valid for the call.
    let (side, request) = unsafe { (lane_side(lane), &*request) };
    lock(&side.lane.ends).in_flight += 1;
    let end = ImageEnd { lane: Arc::clone(&side.lane), tag: request.tag, result: Err(EIO) };
    // SAFETY: what `request` points to stays valid until it comes back (abi::ImageVtable), and it
    // does when `end` is completed or dropped.
    let begun = || unsafe { side.image.begin(request, end) };
    let _ = catch_unwind(AssertUnwindSafe(begun));
}

unsafe extern "C" fn lane_reap(lane: *mut c_void, out: *mut RawImageEnd, capacity: usize) -> usize {
    // SAFETY: abi::ImageVtable: `lane` is ours.
    let side = unsafe { lane_side(lane) };
    let mut ends = lock(&side.lane.ends);
    let count = ends.ended.len().min(capacity);
    // SAFETY: `count` entries are there, and fit (abi::ImageVtable); the module's memory cannot
    // overlap our list.
    unsafe { std::ptr::copy_nonoverlapping(ends.ended.as_ptr(), out, count) };
    ends.ended.drain(..count);
    // The next end would not notify.
    if let Some(wake) = ends.wake.as_ref().filter(|_| !ends.ended.is_empty()) {
        wake(side.lane.queue);
    }
    count
}

unsafe extern "C" fn lane_close(lane: *mut c_void) {
    // SAFETY: it comes from `lane_open`, and is used no more (abi::ImageVtable).
    let side = unsafe { Box::from_raw(lane.cast::<LaneSide>()) };
    let mut ends = lock(&side.lane.ends);
    while ends.in_flight > 0 {
        ends = side.lane.idle.wait(ends).unwrap_or_else(PoisonError::into_inner);
    }
    ends.wake = None;
}
