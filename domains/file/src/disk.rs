//! The disk: an image, what is known about its file system, and what becomes of errors.
//!
//! Whatever a file system cannot do is done in a plainer way, down to writing zeros; the guest sees the same disk on all of them. The plain way of a
//! request, on the calling thread from beginning to end, is here ([`Disk::serve`]); how a queue keeps its worker from waiting is in [`crate::queue`].
//!
//! Deliberately unknown here: which file it is, and who serves which queue.

use crate::bounce::Bounce;
use crate::image::Image;
use crate::trouble::Trouble;
use domain_api::uring::Work;
use domain_api::{Host, Op, Request, Status, file_io};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

// All flags but `write_through` are hints; nothing is published by them, so Relaxed does.

/// An image, and how it takes requests.
#[derive(Debug)]
pub(crate) struct Disk {
    image: Image,
    /// Each write is durable before it completes.
    write_through: AtomicBool,
    /// The file system has said that it has no such thing: not asked again.
    no_punch_hole: AtomicBool,
    no_zero_range: AtomicBool,
    no_reads_at_once: AtomicBool,
    /// How often the host has asked to cancel.
    cancels: AtomicU32,
    trouble: Trouble,
}

impl Disk {
    pub(crate) fn new(host: Host, image: Image) -> Self {
        Self {
            image,
            write_through: AtomicBool::new(false),
            no_punch_hole: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_reads_at_once: AtomicBool::new(false),
            cancels: AtomicU32::new(0),
            trouble: Trouble::new(host),
        }
    }

    pub(crate) const fn image(&self) -> &Image {
        &self.image
    }

    pub(crate) fn set_write_cache(&self, on: bool) {
        // SeqCst here and in `is_write_through`: either a write that ends now sees the flag, or the `fdatasync` below sees the write.
        self.write_through.store(!on, Ordering::SeqCst);
        if !on && let Err(error) = self.image.file().sync_data() {
            // From now on nothing is volatile; what was, has just been lost.
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

    /// Serves a request from beginning to end.
    pub(crate) fn serve(&self, bounce: &mut Bounce, request: &Request) -> Status {
        let result = match request.op() {
            None => return Status::Unsupported,
            Some(Op::Read) => self.read(bounce, request),
            Some(Op::Flush) => self.image.file().sync_data(),
            // The host does not let a guest come this far.
            Some(_) if !self.image.mode().write => return Status::IoError,
            Some(Op::Write) => self.write(bounce, request),
            Some(Op::Discard) => self.discard(request),
            Some(Op::WriteZeroes { may_unmap }) => self.write_zeroes(bounce, request, may_unmap),
        };
        self.status(request, result)
    }

    /// Serves a read or a write whose memory the kernel does not take.
    pub(crate) fn serve_bounced(&self, bounce: &mut Bounce, request: &Request) -> Status {
        let result = match request.op() {
            Some(Op::Read) => bounce.read(self.image.file(), request.offset(), &request.buffer()),
            Some(Op::Write) => self.write_bounced(bounce, request),
            _ => return Status::Unsupported,
        };
        self.status(request, result)
    }

    fn status(&self, request: &Request, result: io::Result<()>) -> Status {
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
    pub(crate) fn takes(&self, request: &Request) -> bool {
        !self.image.mode().direct || request.buffer().is_aligned(self.image.block_size() as usize)
    }

    /// Whether the kernel refused the alignment after all, and a bounce buffer may help.
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

    fn read(&self, bounce: &mut Bounce, request: &Request) -> io::Result<()> {
        let (file, offset, buffer) = (self.image.file(), request.offset(), request.buffer());
        if self.takes(request) {
            match file_io::read_at(file, offset, &buffer) {
                Err(error) if self.is_misaligned(&error) => {}
                result => return result,
            }
        }
        bounce.read(file, offset, &buffer)
    }

    fn write(&self, bounce: &mut Bounce, request: &Request) -> io::Result<()> {
        if !self.takes(request) {
            return self.write_bounced(bounce, request);
        }
        let (file, offset, buffer) = (self.image.file(), request.offset(), request.buffer());
        let result = if self.is_write_through() {
            file_io::write_at_durably(file, offset, &buffer)
        } else {
            // Looked at again afterwards: it may have been turned on meanwhile.
            file_io::write_at(file, offset, &buffer).and_then(|()| self.harden())
        };
        match result {
            Err(error) if self.is_misaligned(&error) => self.write_bounced(bounce, request),
            result => result,
        }
    }

    fn write_bounced(&self, bounce: &mut Bounce, request: &Request) -> io::Result<()> {
        bounce.write(self.image.file(), request.offset(), &request.buffer())?;
        self.harden()
    }

    fn discard(&self, request: &Request) -> io::Result<()> {
        // Only a hint: a file system that cannot take it leaves the data where it is.
        self.attempt(Work::PunchHole, request).map(|_| ())
    }

    fn write_zeroes(&self, bounce: &mut Bounce, request: &Request, may_unmap: bool) -> io::Result<()> {
        let done = may_unmap && self.attempt(Work::PunchHole, request)?;
        if !done && !self.attempt(Work::ZeroRange, request)? {
            bounce.write_zeros(self.image.file(), request.offset(), request.len())?;
        }
        self.harden()
    }

    /// Makes durable what was written, if the write cache is off.
    fn harden(&self) -> io::Result<()> {
        if self.is_write_through() { self.image.file().sync_data() } else { Ok(()) }
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
