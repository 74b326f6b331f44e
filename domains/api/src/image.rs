//! Images that the host opens for a device through a library: what a domain does with one.
//!
//! The handle stays with the host: an instance that asks for the image that its predecessor has
//! gets that one, open and claimed as it is.

use crate::host::{Host, with_message};
use crate::request::Request;
use domain_abi::{
    Claim, DomainError, ImageInfo, ImageVtable, Params, QueueIndex, RawImage, RawImageEnd,
    RawImageInfo, RawRequest, raw_bytes,
};
use std::ffi::c_void;
use std::io;
use std::time::Duration;

/// Ends that are collected in one call.
const AT_ONCE: usize = 64;

/// An image that the host has open. Copies are the same image.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    table: &'static ImageVtable,
    image: *mut c_void,
}

// SAFETY: the host takes calls with `image` from any thread (abi::ImageVtable), until no code of
// this module can run any more.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

impl Host {
    /// Opens an image through `engine`. One that is open for this device already, with the same
    /// parameters, is that one. It may take seconds, and gives up then: for
    /// [`prepare`](crate::BlockDomain::prepare).
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn open_image(self, engine: &str, params: &Params) -> Result<Image, DomainError> {
        let vtable = self.vtable();
        let pairs: Vec<_> = params
            .iter()
            .flat_map(|(key, value)| [raw_bytes(key.as_bytes()), raw_bytes(value.as_bytes())])
            .collect();
        let mut raw = RawImage { table: std::ptr::null(), image: std::ptr::null_mut() };
        // SAFETY: all pointers are valid for the call.
        with_message(|message| unsafe {
            let engine = raw_bytes(engine.as_bytes());
            let (pairs, count) = (pairs.as_ptr(), pairs.len());
            (vtable.image_open)(vtable.ctx, engine, pairs, count, &raw mut raw, message)
        })?;
        // SAFETY: a host that did not fail has set it; its first field is in every version.
        let size = unsafe { (*raw.table).size } as usize;
        if size < size_of::<ImageVtable>() {
            return Err(DomainError::new(format!(
                "this host's table of images has {size} bytes; upgrade the daemon"
            )));
        }
        // SAFETY: as large as ours, and valid until no code of this module can run any more.
        Ok(Image { table: unsafe { &*raw.table }, image: raw.image })
    }
}

impl Image {
    /// What it is, as of the host's last look.
    #[must_use]
    pub fn info(self) -> ImageInfo {
        let mut raw = RawImageInfo {
            size: size_of::<RawImageInfo>() as u32,
            read_only: 0,
            capacity: 0,
            optimal_io_size: 0,
            discard_granularity: 0,
            device: 0,
            inode: 0,
        };
        // SAFETY: `raw` is valid for the call.
        unsafe { (self.table.info)(self.image, &raw mut raw) };
        ImageInfo {
            capacity: raw.capacity,
            read_only: raw.read_only != 0,
            optimal_io_size: raw.optimal_io_size,
            discard_granularity: raw.discard_granularity,
            id: (raw.device, raw.inode),
        }
    }

    /// Claims it, as [`BlockDomain::claim`](crate::BlockDomain::claim) has it; waits for `patience`
    /// at most. What is not done by then goes on, and is asked for again.
    ///
    /// # Errors
    /// It is not done yet, or cannot be done.
    pub fn claim(self, patience: Duration) -> Result<Claim, DomainError> {
        let wait_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
        let mut claim = 0;
        // SAFETY: all pointers are valid for the call.
        with_message(|message| unsafe {
            (self.table.claim)(self.image, wait_ms, &raw mut claim, message)
        })?;
        Claim::from_raw(claim).ok_or_else(|| {
            DomainError::new(format!("the host claims in a way that there is not: {claim}"))
        })
    }

    /// Gives it back, as [`BlockDomain::release`](crate::BlockDomain::release) has it.
    ///
    /// # Errors
    /// It stays claimed.
    pub fn release(self) -> Result<(), DomainError> {
        // SAFETY: `message` is valid for the call.
        with_message(|message| unsafe { (self.table.release)(self.image, message) })
    }

    /// Makes it `capacity` bytes long, unless it is as long or longer.
    ///
    /// # Errors
    /// It is as it was.
    pub fn resize(self, capacity: u64) -> Result<(), DomainError> {
        // SAFETY: `message` is valid for the call.
        with_message(|message| unsafe { (self.table.resize)(self.image, capacity, message) })
    }

    /// A lane for the requests of one queue, at most `capacity` at a time.
    #[must_use]
    pub fn lane(self, queue: QueueIndex, capacity: usize) -> Lane {
        // SAFETY: a live image; the lane is closed once, in `drop`.
        let lane = unsafe { (self.table.lane_open)(self.image, queue.0) };
        Lane {
            table: self.table,
            lane,
            slots: (0..capacity).map(|_| None).collect(),
            free: (0..capacity).rev().collect(),
            ends: vec![RawImageEnd::default(); AT_ONCE],
            fresh: 0..0,
        }
    }
}

/// What is to be done for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageWork {
    /// What the request asks for.
    Request,
    /// A flush, whatever it asks for.
    Flush,
}

/// Where the requests of one queue are while an image has them. The worker is woken when some have
/// ended, as by [`Host::notify`].
///
/// One that is dropped with requests in flight waits until the image is done with them, however
/// long that takes.
#[derive(Debug)]
pub struct Lane {
    table: &'static ImageVtable,
    lane: *mut c_void,
    slots: Vec<Option<Request>>,
    free: Vec<usize>,
    ends: Vec<RawImageEnd>,
    /// Those of `ends` that were not handed out yet.
    fresh: std::ops::Range<usize>,
}

// SAFETY: the host takes calls with `lane` from one thread at a time (abi::ImageVtable), whichever
// it is, and `&mut` sees to that.
unsafe impl Send for Lane {}

impl Lane {
    /// How many requests it takes.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// How many it has.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Begins a request; returns by which number it comes back. It has room.
    ///
    /// # Panics
    /// If it has none.
    pub fn begin(&mut self, request: Request, work: ImageWork) -> usize {
        let slot = self.free.pop().expect("looked at before something is begun");
        let mut raw = match work {
            ImageWork::Request => *request.raw(),
            ImageWork::Flush => RawRequest::flush(),
        };
        raw.tag = slot as u64;
        // In its place first: it may end, and its end be seen, within the call.
        self.slots[slot] = Some(request);
        // SAFETY: what it points to stays valid until the request is completed, for which it has to
        // come back first: it lies in its slot, and `drop` waits.
        unsafe { (self.table.lane_begin)(self.lane, &raw const raw) };
        slot
    }

    /// Takes back a request that has ended, if there is one.
    pub fn take_ended(&mut self) -> Option<(usize, Request, io::Result<()>)> {
        if self.fresh.is_empty() && self.in_flight() > 0 {
            // SAFETY: there is room for as many as is said.
            let count = unsafe {
                (self.table.lane_reap)(self.lane, self.ends.as_mut_ptr(), self.ends.len())
            };
            self.fresh = 0..count.min(self.ends.len());
        }
        let RawImageEnd { tag, result } = self.ends[self.fresh.next()?];
        let slot = tag as usize;
        let request = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        let result = match i32::try_from(-result) {
            Ok(0) => Ok(()),
            Ok(errno) => Err(io::Error::from_raw_os_error(errno)),
            Err(_) => Err(io::ErrorKind::Other.into()),
        };
        Some((slot, request, result))
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once, and not used after that. It waits, so that the host is
        // done with what the requests in the slots point to.
        unsafe { (self.table.lane_close)(self.lane) };
    }
}
