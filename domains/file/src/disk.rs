//! The way of a request to the image, and what becomes of errors.
//!
//! Whatever a file system cannot do is done in a plainer way, down to writing zeros; the guest sees the same disk on all of them.
//!
//! Deliberately unknown here: which file it is.

use crate::bounce::Bounce;
use crate::image::Image;
use crate::trouble::Trouble;
use domain_api::{Host, Op, Request, Status, file_io};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

// All flags here are hints or settings of their own; nothing else is published by them, so Relaxed does everywhere.

/// An image, and how it takes requests.
#[derive(Debug)]
pub(crate) struct Disk {
    image: Image,
    /// Each write is durable before it completes.
    write_through: AtomicBool,
    /// The file system has said that it has no such thing: not asked again.
    no_punch_hole: AtomicBool,
    no_zero_range: AtomicBool,
    trouble: Trouble,
}

impl Disk {
    pub(crate) fn new(host: Host, image: Image) -> Self {
        Self {
            image,
            write_through: AtomicBool::new(false),
            no_punch_hole: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            trouble: Trouble::new(host),
        }
    }

    pub(crate) const fn image(&self) -> &Image {
        &self.image
    }

    pub(crate) fn set_write_cache(&self, on: bool) {
        self.write_through.store(!on, Ordering::Relaxed);
        if !on && let Err(error) = self.image.file().sync_data() {
            // From now on nothing is volatile; what was, has just been lost.
            self.trouble.report("turning the write cache off", &error);
        }
    }

    pub(crate) fn serve(&self, bounce: &mut Bounce, request: &Request) -> Status {
        let op = request.op();
        let (what, result) = match op {
            None => return Status::Unsupported,
            Some(Op::Read) => ("read", self.read(bounce, request)),
            Some(Op::Flush) => ("flush", self.image.file().sync_data()),
            // The host does not let a guest come this far.
            Some(_) if !self.image.mode().write => return Status::IoError,
            Some(Op::Write) => ("write", self.write(bounce, request)),
            Some(Op::Discard) => ("discard", self.discard(request)),
            Some(Op::WriteZeroes { may_unmap }) => {
                ("write zeroes", self.write_zeroes(bounce, request, may_unmap))
            }
        };
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.trouble.report(what, &error);
                Status::IoError
            }
        }
    }

    /// Whether the kernel may be given the guest's memory as it is.
    fn takes(&self, request: &Request) -> bool {
        !self.image.mode().direct || request.buffer().is_aligned(self.image.block_size() as usize)
    }

    /// Whether the kernel refused the alignment after all, and a bounce buffer may help.
    fn misaligned(&self, result: &io::Result<()>) -> bool {
        self.image.mode().direct && matches!(result, Err(e) if e.kind() == io::ErrorKind::InvalidInput)
    }

    fn read(&self, bounce: &mut Bounce, request: &Request) -> io::Result<()> {
        let (file, offset, buffer) = (self.image.file(), request.offset(), request.buffer());
        if self.takes(request) {
            let result = file_io::read_at(file, offset, &buffer);
            if !self.misaligned(&result) {
                return result;
            }
        }
        bounce.read(file, offset, &buffer)
    }

    fn write(&self, bounce: &mut Bounce, request: &Request) -> io::Result<()> {
        let (file, offset, buffer) = (self.image.file(), request.offset(), request.buffer());
        let durable = self.write_through.load(Ordering::Relaxed);
        if self.takes(request) {
            let write = if durable { file_io::write_at_durably } else { file_io::write_at };
            let result = write(file, offset, &buffer);
            if !self.misaligned(&result) {
                return result;
            }
        }
        bounce.write(file, offset, &buffer)?;
        self.harden()
    }

    fn discard(&self, request: &Request) -> io::Result<()> {
        // Only a hint: a file system that cannot take it leaves the data where it is.
        self.punch_hole(request).map(|_| ())
    }

    fn write_zeroes(&self, bounce: &mut Bounce, request: &Request, may_unmap: bool) -> io::Result<()> {
        let done = may_unmap && self.punch_hole(request)?;
        if !done && !self.zero_range(request)? {
            bounce.write_zeros(self.image.file(), request.offset(), request.len())?;
        }
        self.harden()
    }

    /// Makes durable what was written, if the write cache is off.
    fn harden(&self) -> io::Result<()> {
        if self.write_through.load(Ordering::Relaxed) { self.image.file().sync_data() } else { Ok(()) }
    }

    /// Returns whether the file system could.
    fn punch_hole(&self, request: &Request) -> io::Result<bool> {
        attempt(&self.no_punch_hole, || {
            file_io::punch_hole(self.image.file(), request.offset(), request.len())
        })
    }

    /// Returns whether the file system could.
    fn zero_range(&self, request: &Request) -> io::Result<bool> {
        attempt(&self.no_zero_range, || {
            file_io::zero_range(self.image.file(), request.offset(), request.len())
        })
    }
}

/// Does what not every file system can do, and remembers if this one never can.
fn attempt(never: &AtomicBool, act: impl FnOnce() -> io::Result<()>) -> io::Result<bool> {
    if never.load(Ordering::Relaxed) {
        return Ok(false);
    }
    match act() {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            never.store(true, Ordering::Relaxed);
            Ok(false)
        }
        // Not this range: a block device whose blocks are larger than 512 bytes, for one.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(false),
        Err(error) => Err(error),
    }
}
