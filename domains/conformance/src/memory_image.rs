//! An image in memory, as a host opens it for an instance: requests end on a thread of its own, the
//! last one first.

use domain_abi::{RawRequest, op};
use domain_api::{Buffer, Claim, DomainError, ImageInfo};
use domain_host::{HostImage, ImageEnd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of a new image.
const SIZE: usize = 2 << 20;
const EINVAL: i32 = 22;

struct Order {
    request: RawRequest,
    end: ImageEnd,
}

/// An image of 2 MiB in memory. It ends with its thread when nothing has it any more.
pub struct MemoryImage {
    bytes: Arc<Mutex<Vec<u8>>>,
    read_only: bool,
    orders: Mutex<Sender<Order>>,
    /// It is claimed.
    pub is_claimed: AtomicBool,
    /// Another program has it.
    pub is_taken: AtomicBool,
    /// It was taken away.
    pub is_lost: AtomicBool,
    /// It was closed.
    pub is_closed: AtomicBool,
}

impl std::fmt::Debug for MemoryImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryImage").field("read_only", &self.read_only).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryImage {
    /// A new one.
    #[must_use]
    pub fn new(read_only: bool) -> Arc<Self> {
        let bytes = Arc::new(Mutex::new(vec![0; SIZE]));
        let (orders, taken) = channel();
        let theirs = Arc::clone(&bytes);
        std::thread::spawn(move || serve(&theirs, &taken));
        Arc::new(Self {
            bytes,
            read_only,
            orders: Mutex::new(orders),
            is_claimed: AtomicBool::new(false),
            is_taken: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
        })
    }
}

fn serve(bytes: &Mutex<Vec<u8>>, orders: &Receiver<Order>) {
    while let Ok(first) = orders.recv() {
        let mut all = vec![first];
        all.extend(orders.try_iter());
        while let Some(Order { request, end }) = all.pop() {
            end.complete(carry_out(&mut lock(bytes), &request));
        }
    }
}

fn carry_out(bytes: &mut [u8], request: &RawRequest) -> Result<(), i32> {
    if request.op() == op::FLUSH {
        return Ok(());
    }
    let (from, len) = (request.offset() as usize, request.len() as usize);
    let range = bytes.get_mut(from..from + len).ok_or(EINVAL)?;
    let (segments, count) = request.segments();
    let segments = if count == 0 {
        &[][..]
    } else {
        // SAFETY: valid until the request has ended (HostImage::begin), which it has not.
        unsafe { std::slice::from_raw_parts(segments, count) }
    };
    // SAFETY: as above, and accessed by copies only.
    let buffer = unsafe { Buffer::from_segments(segments) };
    match request.op() {
        op::READ => drop(buffer.copy_from_slice(0, range)),
        op::WRITE => drop(buffer.copy_to_slice(0, range)),
        _ => range.fill(0),
    }
    Ok(())
}

impl HostImage for MemoryImage {
    fn info(&self) -> ImageInfo {
        ImageInfo {
            capacity: lock(&self.bytes).len() as u64,
            read_only: self.read_only,
            optimal_io_size: 4096,
            discard_granularity: 4096,
            id: (1, 2),
        }
    }

    fn claim(&self, _: Duration) -> Result<Claim, DomainError> {
        if self.read_only {
            return Ok(Claim::Nothing);
        }
        if self.is_taken.load(Ordering::Relaxed) {
            return Ok(Claim::Taken);
        }
        self.is_claimed.store(true, Ordering::Relaxed);
        Ok(Claim::Ours)
    }

    fn release(&self) -> Result<(), DomainError> {
        self.is_claimed.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        let mut bytes = lock(&self.bytes);
        let len = bytes.len().max(capacity as usize);
        bytes.resize(len, 0);
        Ok(())
    }

    unsafe fn begin(&self, request: &RawRequest, end: ImageEnd) {
        // It cannot fail while there is a thread; what is dropped has ended, too.
        let _ = lock(&self.orders).send(Order { request: *request, end });
    }

    fn lost(&self) -> Option<String> {
        self.is_lost.load(Ordering::Relaxed).then(|| "it was taken away".to_owned())
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }
}
