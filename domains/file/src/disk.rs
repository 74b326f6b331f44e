//! The disk: an image, what is known about its file system, and what becomes of errors.
//!
//! Whatever a file system cannot do is done in a plainer way, down to writing zeros; the guest sees
//! the same disk on all of them. The plain way of a request, on the calling thread from beginning
//! to end, is here ([`Disk::serve`]); how a queue keeps its worker from waiting is in
//! [`crate::queue`].
//!
//! **A sync that failed is for ever.** The kernel tells of a write-back that failed once, and takes
//! the pages for clean from then on. So the storage is marked, and from then on each sync fails, by
//! whichever instance and queue, until the image is opened anew.
//!
//! Deliberately unknown here: which file it is, and who serves which queue.

use crate::bounce::Bounce;
use crate::edges::{self, Ranges};
use crate::image::Image;
use crate::offload::Offload;
use crate::trouble::Trouble;
use domain_api::{Host, Op, Request, Status};
use domain_io::file_io;
use domain_io::uring::Work;
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// What a guest's requests are multiples of.
const SECTOR: u64 = 512;

// All flags but `write_through` are hints; nothing is published by them, so Relaxed does.

/// An image, and how it takes requests.
#[derive(Debug)]
pub(crate) struct Disk {
    host: Host,
    image: Image,
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
    /// How often the host has asked to cancel.
    cancels: AtomicU32,
    ranges: Ranges,
    offload: Offload,
    trouble: Trouble,
}

impl Disk {
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn new(host: Host, image: Image) -> io::Result<Self> {
        Ok(Self {
            host,
            own_sync: image.sync_file(host)?,
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
        })
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

    /// Who may change which range, of requests that do not fit.
    pub(crate) const fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    pub(crate) const fn offload(&self) -> &Offload {
        &self.offload
    }

    pub(crate) fn set_write_cache(&self, on: bool) {
        // SeqCst here and in `is_write_through`: either a write that ends now sees the flag, or the
        // `fdatasync` below sees the write.
        self.write_through.store(!on, Ordering::SeqCst);
        // From now on nothing is volatile; if this fails, what was has just been lost.
        if !on && let Err(error) = self.sync_ended(self.own_sync.sync_data()) {
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

    /// Counts a request that does not fit: one of which a block has to be read to change a part of
    /// it, or another.
    pub(crate) fn count_unaligned(&self, modified: bool) {
        self.host.count(if modified { "read_modify_writes" } else { "bounced_requests" }, 1);
    }

    /// Whether a request is one of the disk's blocks, as a driver that was told of them sends it. A
    /// disk with blocks of 512 bytes takes all that the host lets through.
    #[inline]
    pub(crate) fn is_of_blocks(&self, request: &Request) -> bool {
        !edges::has_edges(request, u64::from(self.image.announced().block_size))
    }

    /// Serves a request from beginning to end. `sync` is what the queue syncs through.
    pub(crate) fn serve(&self, bounce: &mut Bounce, sync: &File, request: &Request) -> Status {
        let result = match request.op() {
            None => return Status::Unsupported,
            Some(Op::Read) if !self.is_of_blocks(request) => return Status::IoError,
            Some(Op::Read) => self.read(bounce, request),
            Some(Op::Flush) => {
                self.image.follow_alignment();
                self.sync(sync)
            }
            // The host does not let a guest come this far.
            Some(_) if !self.image.mode().write => return Status::IoError,
            Some(_) if !self.is_of_blocks(request) => return Status::IoError,
            Some(Op::Write) => self.write(bounce, sync, request),
            Some(Op::Discard) => return self.discard(request),
            Some(Op::WriteZeroes { may_unmap }) => {
                self.write_zeroes(bounce, sync, request, may_unmap)
            }
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

    /// What offsets and lengths must be multiples of now: of one request it is to be asked once.
    #[inline]
    pub(crate) fn alignment(&self) -> u64 {
        if self.image.mode().direct { self.image.alignment() } else { SECTOR }
    }

    /// Whether the kernel may be given the guest's memory as it is.
    #[inline]
    pub(crate) fn takes(&self, request: &Request, alignment: u64) -> bool {
        let fits = || {
            !edges::has_edges(request, alignment)
                && request.buffer().is_aligned(self.image.memory_alignment())
        };
        !self.image.mode().direct || fits()
    }

    /// Whether a change has to have its range to itself.
    #[inline]
    pub(crate) const fn takes_ranges(alignment: u64) -> bool {
        alignment > SECTOR
    }

    /// Whether changes without a range may be in flight where others need one.
    pub(crate) fn may_have_plain(&self) -> bool {
        self.image.has_grown()
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

    /// Makes durable what was written to the image before, through `file`.
    fn sync(&self, file: &File) -> io::Result<()> {
        self.check_storage()?;
        self.sync_ended(file.sync_data())?;
        if !self.is_witnessed() {
            if !self.ranges.take(&edges::WITNESS, false) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let asked = self.sync_ended(self.image.witness().sync_data());
            self.ranges.give_back(&edges::WITNESS);
            asked?;
            self.set_witnessed();
        }
        Ok(())
    }

    /// Whether the witness has been asked.
    pub(crate) fn is_witnessed(&self) -> bool {
        self.witnessed.load(Ordering::Relaxed)
    }

    pub(crate) fn set_witnessed(&self) {
        self.witnessed.store(true, Ordering::Relaxed);
    }

    /// Takes in how a sync has ended: one that has failed marks the storage, and on a storage that
    /// is marked, by anybody, none ends well.
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

    fn read(&self, bounce: &mut Bounce, request: &Request) -> io::Result<()> {
        let alignment = self.alignment();
        if self.takes(request, alignment) {
            match file_io::read_at(self.image.file(), request.offset(), &request.buffer()) {
                Err(error)
                    if self.asks_for_more(&error, alignment) || self.is_misaligned(&error) => {}
                result => return result,
            }
        }
        self.count_unaligned(false);
        self.read_bounced(bounce, request)
    }

    /// Reads a request's data by way of the bounce buffer.
    pub(crate) fn read_bounced(&self, bounce: &mut Bounce, request: &Request) -> io::Result<()> {
        loop {
            let alignment = self.alignment();
            let buffer = request.buffer();
            match bounce.read(self.image.file(), alignment, request.offset(), &buffer) {
                Err(error) if self.asks_for_more(&error, alignment) => {}
                result => return result,
            }
        }
    }

    fn write(&self, bounce: &mut Bounce, sync: &File, request: &Request) -> io::Result<()> {
        let data = |bounce: &mut Bounce, alignment| {
            if self.takes(request, alignment) {
                let (file, offset, buffer) =
                    (self.image.file(), request.offset(), request.buffer());
                let result = if self.image.writes_durably() && self.is_write_through() {
                    file_io::write_at_durably(file, offset, &buffer)
                } else {
                    // Looked at again afterwards: it may have been turned on meanwhile.
                    file_io::write_at(file, offset, &buffer).and_then(|()| self.harden(sync))
                };
                match result {
                    // Only its memory is in the way, or the storage asks for more, which is found
                    // out below.
                    Err(error) if self.is_misaligned(&error) => {}
                    result => return result,
                }
            }
            self.count_unaligned(edges::has_edges(request, alignment));
            self.write_bounced(bounce, sync, request, alignment)
        };
        self.change(bounce, request, data)
    }

    /// Makes a change with the range of its request to itself, where that is needed; once more if
    /// the storage asks for more than it did.
    fn change(
        &self,
        bounce: &mut Bounce,
        request: &Request,
        make: impl Fn(&mut Bounce, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        if !self.image.mode().direct {
            return make(bounce, SECTOR);
        }
        loop {
            let plain = self.ranges.plain_at_worker();
            // Only now, see `edges`.
            let alignment = self.alignment();
            let result = if Self::takes_ranges(alignment) {
                drop(plain);
                let range = edges::hull(request, alignment);
                if !self.ranges.take(&range, self.may_have_plain()) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                let result = make(bounce, alignment);
                self.ranges.give_back(&range);
                result
            } else {
                make(bounce, alignment)
            };
            match result {
                Err(error) if self.asks_for_more(&error, alignment) => {}
                result => return result,
            }
        }
    }

    /// Writes the data of a request, in blocks of `alignment`. Who calls has its range, where that
    /// is needed.
    ///
    /// # Errors
    /// One for which [`asks_for_more`](Self::asks_for_more) holds, if the storage does.
    pub(crate) fn write_bounced(
        &self,
        bounce: &mut Bounce,
        sync: &File,
        request: &Request,
        alignment: u64,
    ) -> io::Result<()> {
        let buffer = request.buffer();
        self.fill(bounce, request, alignment, |at, bytes| {
            buffer.copy_to_slice(at, bytes);
        })?;
        self.harden(sync)
    }

    /// Writes zeros to the range of a request; as [`write_bounced`](Self::write_bounced).
    ///
    /// # Errors
    /// As there.
    pub(crate) fn zero_bounced(
        &self,
        bounce: &mut Bounce,
        sync: &File,
        request: &Request,
        alignment: u64,
    ) -> io::Result<()> {
        self.fill(bounce, request, alignment, |_, bytes| bytes.fill(0))?;
        self.harden(sync)
    }

    fn fill(
        &self,
        bounce: &mut Bounce,
        request: &Request,
        alignment: u64,
        fill: impl Fn(usize, &mut [u8]),
    ) -> io::Result<()> {
        let (start, end) = (request.offset(), request.offset() + request.len());
        let Some(last) = self.partial_block(end, alignment) else {
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

    /// Where the last block of the file begins, if it is no whole one and a write up to `end`
    /// reaches into it.
    pub(crate) fn partial_block(&self, end: u64, alignment: u64) -> Option<u64> {
        if end.is_multiple_of(alignment) || self.image.device_sector().is_some() {
            return None;
        }
        let len = self.image.file().metadata().ok()?.len();
        (end.next_multiple_of(alignment) > len).then(|| len / alignment * alignment)
    }

    fn discard(&self, request: &Request) -> Status {
        if self.image.device_sector().is_some() {
            let Some(range) = self.discarded(request) else { return Status::Ok };
            let result =
                file_io::discard_device(self.image.file(), range.start, range.end - range.start);
            return self.discard_ended(request, result);
        }
        let done = Cell::new(false);
        let result = self.change(&mut Bounce::default(), request, |_, _| {
            done.set(self.attempt(Work::PunchHole, request)?);
            Ok(())
        });
        match result {
            Ok(()) if !done.get() => Status::Unsupported,
            result => self.status(request, result),
        }
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

    fn write_zeroes(
        &self,
        bounce: &mut Bounce,
        sync: &File,
        request: &Request,
        may_unmap: bool,
    ) -> io::Result<()> {
        self.change(bounce, request, |bounce, alignment| {
            let done = may_unmap && self.attempt(Work::PunchHole, request)?;
            if !done && !self.attempt(Work::ZeroRange, request)? {
                return self.zero_bounced(bounce, sync, request, alignment);
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
    let broken_off = matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
        || is_cancelled(error);
    !broken_off
}

/// Whether it was given up because somebody asked for it.
pub(crate) fn is_cancelled(error: &io::Error) -> bool {
    const ECANCELED: i32 = 125;
    error.raw_os_error() == Some(ECANCELED)
}
