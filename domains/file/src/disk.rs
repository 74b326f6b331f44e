//! The disk: an image, what is known about its file system, and what becomes of errors.
//!
//! Whatever a file system cannot do is done in a plainer way, down to writing zeros; the guest sees
//! the same disk on all of them. What each request maps to is in `backend`, for a queue that does
//! not wait, and in `serve`, for a worker that does everything itself.
//!
//! **A sync that failed is for ever.** The kernel tells of a write-back that failed once, and takes
//! the pages for clean from then on. So the storage is marked, and from then on each sync fails, of
//! any instance and queue, until the image is opened anew.
//!
//! Deliberately unknown here: which file it is, and which queues there are.

use crate::image::Image;
use crate::rings::Rings;
use domain_api::{Host, Request, Status};
use domain_io::engine::{SECTOR, Shared, is_cancelled, ranges};
use domain_io::uring::Work;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

// All flags but `write_through` are hints; nothing is published by them, so Relaxed does.

/// An image, and how it takes requests.
#[derive(Debug)]
pub struct Disk {
    host: Host,
    shared: Shared,
    image: Image,
    rings: Rings,
    /// What is synced through where no queue asks for it, and where a queue has no descriptor of
    /// its own.
    own_sync: File,
    /// Each write is durable before it completes.
    write_through: AtomicBool,
    /// The storage is marked, as far as this instance has looked.
    failed: AtomicBool,
    /// The witness was asked whether a predecessor was told of a failure, since this instance was
    /// activated.
    witnessed: AtomicBool,
    /// The file system has said that it has no such thing: not asked again.
    no_punch_hole: AtomicBool,
    no_zero_range: AtomicBool,
    no_reads_at_once: AtomicBool,
}

impl Disk {
    /// `own_sync` is a description of the image's own to sync through.
    pub(crate) fn new(host: Host, image: Image, own_sync: File, rings: Rings) -> Self {
        Self {
            host,
            shared: Shared::new(host),
            image,
            rings,
            own_sync,
            write_through: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            witnessed: AtomicBool::new(false),
            no_punch_hole: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_reads_at_once: AtomicBool::new(false),
        }
    }

    /// It serves from now on, maybe once more: others may have been told of a failure meanwhile.
    pub(crate) fn activated(&self) {
        self.witnessed.store(false, Ordering::Relaxed);
    }

    /// See the field.
    pub(crate) const fn own_sync(&self) -> &File {
        &self.own_sync
    }

    pub(crate) const fn image(&self) -> &Image {
        &self.image
    }

    pub(crate) const fn rings(&self) -> &Rings {
        &self.rings
    }

    pub(crate) const fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(crate) fn set_write_cache(&self, on: bool) {
        // SeqCst here and in `is_write_through`: either a write that ends now sees the flag, or the
        // `fdatasync` below sees the write.
        self.write_through.store(!on, Ordering::SeqCst);
        // From now on nothing is volatile; if this fails, what was has just been lost.
        if !on && let Err(error) = self.sync_all() {
            self.shared.error_log().report("turning the write cache off", &error);
        }
    }

    pub(crate) fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::SeqCst)
    }

    pub(crate) fn can_punch_hole(&self) -> bool {
        !self.no_punch_hole.load(Ordering::Relaxed)
    }

    pub(crate) fn can_zero_range(&self) -> bool {
        !self.no_zero_range.load(Ordering::Relaxed)
    }

    /// Whether the file system can tell what it has cached, as far as is known.
    pub(crate) fn tries_reads(&self) -> bool {
        !self.no_reads_at_once.load(Ordering::Relaxed)
    }

    pub(crate) fn stop_trying_reads(&self) {
        self.no_reads_at_once.store(true, Ordering::Relaxed);
    }

    /// Counts a request that does not fit: one of which a block has to be read to change a part of
    /// it, or another.
    pub(crate) fn count_unaligned(&self, modified: bool) {
        self.host.count(if modified { "read_modify_writes" } else { "bounced_requests" }, 1);
    }

    /// Whether a request is one of the disk's blocks, as a driver that was told of them sends it. A
    /// disk with blocks of 512 bytes takes all that the host lets through.
    #[inline]
    pub(crate) fn is_of_blocks(&self, request: &Request) -> bool {
        !ranges::has_edges(request, u64::from(self.image.announced().block_size))
    }

    /// How the guest hears of `result`; the operator hears of an error.
    pub(crate) fn status(&self, request: &Request, result: io::Result<()>) -> Status {
        self.shared.status(request, result)
    }

    /// Whether a direct write is to be durable by itself.
    pub(crate) fn is_durable_by_itself(&self) -> bool {
        self.image.writes_durably() && self.is_write_through()
    }

    /// What offsets and lengths must be multiples of now: of one request it is to be asked once.
    #[inline]
    pub(crate) fn alignment(&self) -> u64 {
        if self.image.mode().direct { self.image.alignment() } else { SECTOR }
    }

    /// Whether the kernel may be given the guest's memory as it is.
    #[inline]
    pub(crate) fn takes(&self, request: &Request, alignment: u64) -> bool {
        let fits = || {
            !ranges::has_edges(request, alignment)
                && request.buffer().is_aligned(self.image.memory_alignment())
        };
        !self.image.mode().direct || fits()
    }

    /// Whether the kernel has refused the alignment of direct I/O.
    pub(crate) fn is_misaligned(&self, error: &io::Error) -> bool {
        self.image.mode().direct && error.kind() == io::ErrorKind::InvalidInput
    }

    /// Whether the storage asks for more than `alignment`, with which direct I/O has just failed
    /// like this. A device that has begun to while a request was on its way fails that with EIO.
    pub(crate) fn asks_for_more(&self, error: &io::Error, alignment: u64) -> bool {
        const EIO: i32 = 5;
        let may_ask = self.is_misaligned(error)
            || self.image.mode().direct && error.raw_os_error() == Some(EIO);
        if may_ask {
            self.image.ask_alignment_again();
        }
        may_ask && self.alignment() > alignment
    }

    /// Whether `error` says that the file system cannot do `work`, and a plainer way is to be
    /// taken. Remembers if it never can.
    pub(crate) fn cannot(&self, work: Work, error: &io::Error) -> bool {
        let never = match work {
            Work::PunchHole => &self.no_punch_hole,
            Work::ZeroRange => &self.no_zero_range,
            _ => return false,
        };
        match error.kind() {
            io::ErrorKind::Unsupported => {
                never.store(true, Ordering::Relaxed);
                true
            }
            // Not this range: a block device whose blocks are larger than 512 bytes, for one.
            io::ErrorKind::InvalidInput => true,
            _ => false,
        }
    }

    /// Whether the witness has been asked.
    pub(crate) fn is_witnessed(&self) -> bool {
        self.witnessed.load(Ordering::Relaxed)
    }

    pub(crate) fn set_witnessed(&self) {
        self.witnessed.store(true, Ordering::Relaxed);
    }

    /// Takes in how a sync has ended: one that has failed marks the storage, and on a storage that
    /// is marked, by any instance, none ends well.
    pub(crate) fn sync_ended(&self, result: io::Result<()>) -> io::Result<()> {
        let Err(error) = result else { return self.check_storage() };
        if lasts(&error) {
            self.host.storage().mark_failed(&format!(
                "writing data back has failed ({error}): what was written since the flush before may be lost; \
                 see to the storage, look after the file system in the image, and start the daemon anew"
            ));
            self.failed.store(true, Ordering::Relaxed);
        }
        Err(error)
    }

    /// Fails if the storage is marked.
    pub(crate) fn check_storage(&self) -> io::Result<()> {
        if !self.failed.load(Ordering::Relaxed) {
            if self.host.storage().failure().is_none() {
                return Ok(());
            }
            self.failed.store(true, Ordering::Relaxed);
        }
        Err(io::Error::other(
            "writing data back has failed before, and what was lost then stays lost",
        ))
    }

    /// Where the last block of the file begins, if it is no whole one and a write up to `end`
    /// reaches into it.
    pub(crate) fn partial_block(&self, end: u64, alignment: u64) -> Option<u64> {
        if end.is_multiple_of(alignment) || self.image.device_sector().is_some() {
            return None;
        }
        let len = self.image.file().metadata().ok()?.len();
        (end.next_multiple_of(alignment) > len).then(|| len / alignment * alignment)
    }

    /// The part of a discard that a block device can take: whole sectors. The rest is too little to
    /// be given back.
    pub(crate) fn discarded(&self, request: &Request) -> Option<Range<u64>> {
        let sector = u64::from(self.image.device_sector()?);
        let (start, end) = (request.offset(), request.offset() + request.len());
        let range = start.next_multiple_of(sector)..end / sector * sector;
        (!range.is_empty()).then_some(range)
    }

    /// Answers a device's discard. What was not done is not answered well.
    pub(crate) fn discard_ended(&self, request: &Request, result: io::Result<()>) -> Status {
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
            result => self.status(request, result),
        }
    }
}

/// Whether a sync that failed like this may have lost data. Not, if it was broken off.
fn lasts(error: &io::Error) -> bool {
    let broken_off = matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
        || is_cancelled(error);
    !broken_off
}
