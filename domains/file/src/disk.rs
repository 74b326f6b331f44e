//! The disk: an image, what is known about its file system, and what becomes of errors.
//!
//! Whatever a file system cannot do is done in a plainer way, down to writing zeros; the guest sees the same disk on all of them. The plain way of a
//! request, on the calling thread from beginning to end, is here ([`Disk::serve`]); how a queue keeps its worker from waiting is in [`crate::queue`].
//!
//! **A sync that failed is for ever.** The kernel tells of a write-back that failed once, and takes the
//! pages for clean from then on. So the storage is marked, and from then on each sync fails, by
//! whichever instance and queue, until the image is opened anew.
//!
//! Deliberately unknown here: which file it is, and who serves which queue.

use crate::bounce::Bounce;
use crate::edges::{self, Ranges};
use crate::image::Image;
use crate::offload::Offload;
use crate::trouble::Trouble;
use domain_api::uring::Work;
use domain_api::{Host, Op, Request, Status, file_io};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

// All flags but `write_through` are hints; nothing is published by them, so Relaxed does.

/// An image, and how it takes requests.
#[derive(Debug)]
pub(crate) struct Disk {
    host: Host,
    image: Image,
    /// Each write is durable before it completes.
    write_through: AtomicBool,
    /// The storage is marked, as far as this instance has looked.
    failed: AtomicBool,
    /// The storage's own description was asked whether a predecessor was told of a failure.
    witnessed: AtomicBool,
    /// The file system has said that it has no such thing: not asked again.
    no_punch_hole: AtomicBool,
    no_zero_range: AtomicBool,
    no_reads_at_once: AtomicBool,
    /// How often the host has asked to cancel.
    cancels: AtomicU32,
    ranges: Ranges,
    offload: Offload,
    trouble: Trouble,
}

impl Disk {
    pub(crate) fn new(host: Host, image: Image) -> Self {
        Self {
            host,
            image,
            write_through: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            witnessed: AtomicBool::new(false),
            no_punch_hole: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_reads_at_once: AtomicBool::new(false),
            cancels: AtomicU32::new(0),
            ranges: Ranges::new(host),
            offload: Offload::new(host),
            trouble: Trouble::new(host),
        }
    }

    pub(crate) const fn image(&self) -> &Image {
        &self.image
    }

    /// Who may change which range, of requests that do not fit.
    pub(crate) const fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    pub(crate) const fn offload(&self) -> &Offload {
        &self.offload
    }

    pub(crate) fn set_write_cache(&self, on: bool) {
        // SeqCst here and in `is_write_through`: either a write that ends now sees the flag, or the `fdatasync` below sees the write.
        self.write_through.store(!on, Ordering::SeqCst);
        // From now on nothing is volatile; if this fails, what was has just been lost.
        if !on && let Err(error) = self.sync_ended(self.image.file().sync_data()) {
            self.trouble.report("turning the write cache off", &error);
        }
    }

    pub(crate) fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::SeqCst)
    }

    /// Asks all queues to give up what is in flight; each does so when it reaps.
    pub(crate) fn cancel(&self) {
        self.cancels.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn cancels(&self) -> u32 {
        self.cancels.load(Ordering::Relaxed)
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

    /// Counts a request that does not fit: `modified` if a block had to be read to change a part of it.
    pub(crate) fn count_unaligned(&self, modified: bool) {
        self.host.count(if modified { "read_modify_writes" } else { "bounced_requests" }, 1);
    }

    /// Serves a request from beginning to end. `sync` is what the queue syncs through.
    pub(crate) fn serve(&self, bounce: &mut Bounce, sync: &File, request: &Request) -> Status {
        let result = match request.op() {
            None => return Status::Unsupported,
            Some(Op::Read) => self.read(bounce, request),
            Some(Op::Flush) => {
                self.image.follow_alignment();
                self.sync(sync)
            }
            // The host does not let a guest come this far.
            Some(_) if !self.image.mode().write => return Status::IoError,
            Some(Op::Write) => self.write(bounce, sync, request),
            Some(Op::Discard) => return self.discard(request),
            Some(Op::WriteZeroes { may_unmap }) => self.write_zeroes(bounce, sync, request, may_unmap),
        };
        self.status(request, result)
    }

    pub(crate) fn status(&self, request: &Request, result: io::Result<()>) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => self.failed(request, &error),
        }
    }

    /// Says that a request has failed.
    #[cold]
    pub(crate) fn failed(&self, request: &Request, error: &io::Error) -> Status {
        let what = match request.op() {
            Some(Op::Read) => "read",
            Some(Op::Write) => "write",
            Some(Op::Flush) => "flush",
            Some(Op::Discard) => "discard",
            Some(Op::WriteZeroes { .. }) | None => "write zeroes",
        };
        self.trouble.report(what, error);
        Status::IoError
    }

    /// Whether the kernel may be given the guest's memory as it is.
    #[inline]
    pub(crate) fn takes(&self, request: &Request) -> bool {
        let fits = || {
            let alignment = self.image.alignment();
            !edges::has_edges(request, alignment) && request.buffer().is_aligned(alignment as usize)
        };
        !self.image.mode().direct || fits()
    }

    /// Whether a change of the request's range has to have the blocks at its edges to itself.
    pub(crate) fn has_edges(&self, request: &Request) -> bool {
        self.image.mode().direct && edges::has_edges(request, self.image.alignment())
    }

    /// Whether the kernel has refused the alignment of direct I/O.
    pub(crate) fn is_misaligned(&self, error: &io::Error) -> bool {
        self.image.mode().direct && error.kind() == io::ErrorKind::InvalidInput
    }

    /// Whether `error` says that the file system cannot do `work`, and a plainer way is to be taken. Remembers if it never can.
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

    /// Makes durable what was written to the image before, through `file`.
    fn sync(&self, file: &File) -> io::Result<()> {
        self.check_storage()?;
        self.sync_ended(file.sync_data())?;
        if !self.is_witnessed() {
            self.sync_ended(self.image.file().sync_data())?;
            self.set_witnessed();
        }
        Ok(())
    }

    /// Whether the storage's own description has been asked.
    pub(crate) fn is_witnessed(&self) -> bool {
        self.witnessed.load(Ordering::Relaxed)
    }

    pub(crate) fn set_witnessed(&self) {
        self.witnessed.store(true, Ordering::Relaxed);
    }

    /// Takes in how a sync has ended: one that has failed marks the storage, and on a storage that is
    /// marked, by anybody, none ends well.
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
        Err(io::Error::other("writing data back has failed before, and what was lost then stays lost"))
    }

    fn read(&self, bounce: &mut Bounce, request: &Request) -> io::Result<()> {
        let (file, offset, buffer) = (self.image.file(), request.offset(), request.buffer());
        if self.takes(request) {
            match file_io::read_at(file, offset, &buffer) {
                Err(error) if self.is_misaligned(&error) => {
                    self.image.ask_alignment_again();
                }
                result => return result,
            }
        }
        self.count_unaligned(false);
        bounce.read(file, self.image.alignment(), offset, &buffer)
    }

    fn write(&self, bounce: &mut Bounce, sync: &File, request: &Request) -> io::Result<()> {
        if self.takes(request) {
            let (offset, buffer) = (request.offset(), request.buffer());
            let result = if self.image.mode().direct && self.is_write_through() {
                file_io::write_at_durably(sync, offset, &buffer)
            } else {
                // Looked at again afterwards: it may have been turned on meanwhile.
                file_io::write_at(self.image.file(), offset, &buffer).and_then(|()| self.harden(sync))
            };
            match result {
                Err(error) if self.is_misaligned(&error) => {
                    self.image.ask_alignment_again();
                }
                result => return result,
            }
        }
        let has_edges = self.has_edges(request);
        self.count_unaligned(has_edges);
        self.having_range(has_edges, request, || self.write_bounced(bounce, sync, request))
    }

    /// Writes the data of a request, of which the caller has the range if it has edges.
    pub(crate) fn write_bounced(
        &self,
        bounce: &mut Bounce,
        sync: &File,
        request: &Request,
    ) -> io::Result<()> {
        let buffer = request.buffer();
        self.fill(bounce, request, |at, bytes| {
            buffer.copy_to_slice(at, bytes);
        })?;
        self.harden(sync)
    }

    /// Writes zeros to the range of a request, of which the caller has the range if it has edges.
    pub(crate) fn zero_bounced(&self, bounce: &mut Bounce, sync: &File, request: &Request) -> io::Result<()> {
        self.fill(bounce, request, |_, bytes| bytes.fill(0))?;
        self.harden(sync)
    }

    /// Reads a request's data by way of the bounce buffer.
    pub(crate) fn read_bounced(&self, bounce: &mut Bounce, request: &Request) -> io::Result<()> {
        bounce.read(self.image.file(), self.image.alignment(), request.offset(), &request.buffer())
    }

    fn fill(
        &self,
        bounce: &mut Bounce,
        request: &Request,
        fill: impl Fn(usize, &mut [u8]),
    ) -> io::Result<()> {
        let (alignment, start, end) =
            (self.image.alignment(), request.offset(), request.offset() + request.len());
        let Some(last) = self.partial_block(end) else {
            return bounce.write(self.image.file(), alignment, start..end, fill);
        };
        if start < last {
            bounce.write(self.image.file(), alignment, start..last, &fill)?;
        }
        // Direct I/O would make the file longer.
        let from = start.max(last);
        let mut bytes = vec![0; (end - from) as usize];
        fill((from - start) as usize, &mut bytes);
        let cached = self.image.cached()?;
        cached.write_all_at(&bytes, from)?;
        self.sync_ended(cached.sync_data())
    }

    /// Where the last block of the file begins, if it is no whole one and a write up to `end` reaches into it.
    pub(crate) fn partial_block(&self, end: u64) -> Option<u64> {
        let alignment = self.image.alignment();
        if end.is_multiple_of(alignment) || self.image.device_sector().is_some() {
            return None;
        }
        let len = self.image.file().metadata().ok()?.len();
        (end.next_multiple_of(alignment) > len).then(|| len / alignment * alignment)
    }

    /// Calls `f` with the range of the request to itself.
    fn having_range(
        &self,
        has_edges: bool,
        request: &Request,
        f: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if !has_edges {
            return f();
        }
        let range = edges::hull(request, self.image.alignment());
        if !self.ranges.take(&range) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let result = f();
        self.ranges.give_back(&range);
        result
    }

    fn discard(&self, request: &Request) -> Status {
        if self.image.device_sector().is_some() {
            let Some(range) = self.discarded(request) else { return Status::Ok };
            let result = file_io::discard_device(self.image.file(), range.start, range.end - range.start);
            return self.discard_ended(request, result);
        }
        let has_edges = self.has_edges(request);
        let mut done = false;
        let result = self.having_range(has_edges, request, || {
            done = self.attempt(Work::PunchHole, request)?;
            Ok(())
        });
        match result {
            Ok(()) if !done => Status::Unsupported,
            result => self.status(request, result),
        }
    }

    /// The part of a discard that a block device can take: whole sectors. The rest is too little to be given back.
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

    fn write_zeroes(
        &self,
        bounce: &mut Bounce,
        sync: &File,
        request: &Request,
        may_unmap: bool,
    ) -> io::Result<()> {
        self.having_range(self.has_edges(request), request, || {
            let done = may_unmap && self.attempt(Work::PunchHole, request)?;
            if !done && !self.attempt(Work::ZeroRange, request)? {
                return self.zero_bounced(bounce, sync, request);
            }
            self.harden(sync)
        })
    }

    /// Makes durable what was written, if the write cache is off.
    fn harden(&self, sync: &File) -> io::Result<()> {
        if self.is_write_through() { self.sync(sync) } else { Ok(()) }
    }

    /// Does what not every file system can do. Returns whether this one could.
    fn attempt(&self, work: Work, request: &Request) -> io::Result<bool> {
        let (file, offset, len) = (self.image.file(), request.offset(), request.len());
        let result = match work {
            Work::PunchHole if self.can_punch_hole() => file_io::punch_hole(file, offset, len),
            Work::ZeroRange if self.can_zero_range() => file_io::zero_range(file, offset, len),
            _ => return Ok(false),
        };
        match result {
            Ok(()) => Ok(true),
            Err(error) if self.cannot(work, &error) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Whether a sync that failed like this may have lost data. Not, if it was broken off.
fn lasts(error: &io::Error) -> bool {
    let broken_off =
        matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) || is_cancelled(error);
    !broken_off
}

/// Whether it was given up because somebody asked for it.
pub(crate) fn is_cancelled(error: &io::Error) -> bool {
    const ECANCELED: i32 = 125;
    error.raw_os_error() == Some(ECANCELED)
}
