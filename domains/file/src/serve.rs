//! The plain way of a request: on the calling thread, from beginning to end.

use crate::disk::Disk;
use domain_api::{Op, Request, Status};
use domain_io::engine::{Backend, Bounce, InlineHeuristic, ranges};
use domain_io::file_io;
use domain_io::uring::Work;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Stands for the storage's witness among the ranges: one sync goes through it at a time. No range
/// of a file is there.
pub(crate) const WITNESS: Range<u64> = u64::MAX - 1..u64::MAX;

/// What a queue keeps for the disk.
#[derive(Debug)]
pub struct Local {
    pub(crate) bounce: Bounce,
    /// What it syncs through; without it, the disk's own descriptor.
    pub(crate) sync: Option<File>,
    pub(crate) reads: InlineHeuristic,
    pub(crate) writes: InlineHeuristic,
}

impl Local {
    /// What it syncs through.
    pub(crate) fn sync_file<'a>(&'a self, disk: &'a Disk) -> &'a File {
        self.sync.as_ref().unwrap_or(disk.own_sync())
    }
}

impl Disk {
    /// Serves a request from beginning to end.
    pub(crate) fn serve_here(&self, local: &mut Local, request: &Request) -> Status {
        let result = match request.op() {
            None => return Status::Unsupported,
            Some(Op::Read) if !self.is_of_blocks(request) => return Status::IoError,
            Some(Op::Read) => self.read(local, request),
            Some(Op::Flush) => {
                self.image().follow_alignment();
                self.sync(local)
            }
            // The host does not let a guest come this far.
            Some(_) if !self.image().mode().write => return Status::IoError,
            Some(_) if !self.is_of_blocks(request) => return Status::IoError,
            Some(Op::Write) => self.write(local, request),
            Some(Op::Discard) => return self.discard(request),
            Some(Op::WriteZeroes { may_unmap }) => self.write_zeroes(local, request, may_unmap),
        };
        self.status(request, result)
    }

    /// Makes durable what was written to the image before.
    fn sync(&self, local: &Local) -> io::Result<()> {
        self.sync_through(local.sync_file(self))
    }

    /// The same, where no queue asks for it.
    pub(crate) fn sync_all(&self) -> io::Result<()> {
        self.sync_through(self.own_sync())
    }

    fn sync_through(&self, file: &File) -> io::Result<()> {
        self.check_storage()?;
        self.sync_ended(file.sync_data())?;
        if !self.is_witnessed() {
            let ranges = self.shared().ranges();
            if !ranges.take(&WITNESS, false) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let asked = self.sync_ended(self.image().witness().sync_data());
            ranges.give_back(&WITNESS);
            asked?;
            self.set_witnessed();
        }
        Ok(())
    }

    fn read(&self, local: &mut Local, request: &Request) -> io::Result<()> {
        let alignment = self.alignment();
        if self.takes(request, alignment) {
            match file_io::read_at(self.image().file(), request.offset(), &request.buffer()) {
                Err(error)
                    if self.asks_for_more(&error, alignment) || self.is_misaligned(&error) => {}
                result => return result,
            }
        }
        self.count_unaligned(false);
        self.read_bounced(local, request)
    }

    /// Reads a request's data by way of the bounce buffer.
    pub(crate) fn read_bounced(&self, local: &mut Local, request: &Request) -> io::Result<()> {
        loop {
            let alignment = self.alignment();
            let (file, buffer) = (self.image().file(), request.buffer());
            match local.bounce.read(file, alignment, request.offset(), &buffer) {
                Err(error) if self.asks_for_more(&error, alignment) => {}
                result => return result,
            }
        }
    }

    fn write(&self, local: &mut Local, request: &Request) -> io::Result<()> {
        self.change(request, |alignment| {
            if self.takes(request, alignment) {
                let (file, offset, buffer) =
                    (self.image().file(), request.offset(), request.buffer());
                let result = if self.is_durable_by_itself() {
                    file_io::write_at_durably(file, offset, &buffer)
                } else {
                    // Looked at again afterwards: it may have been turned on meanwhile.
                    file_io::write_at(file, offset, &buffer).and_then(|()| self.harden(local))
                };
                match result {
                    // Only its memory is in the way, or the storage asks for more, which is found
                    // out below.
                    Err(error) if self.is_misaligned(&error) => {}
                    result => return result,
                }
            }
            self.count_unaligned(ranges::has_edges(request, alignment));
            self.write_bounced(local, request, alignment)
        })
    }

    /// Makes a change with the range of its request to itself, where that is needed; once more if
    /// the storage asks for more than it did.
    #[inline]
    fn change<R>(
        &self,
        request: &Request,
        mut make: impl FnMut(u64) -> io::Result<R>,
    ) -> io::Result<R> {
        loop {
            let mut made_with = 0;
            let result = self.change_at_worker(request, |alignment| {
                made_with = alignment;
                make(alignment)
            });
            match result {
                Err(error) if made_with > 0 && self.asks_for_more(&error, made_with) => {}
                result => return result,
            }
        }
    }

    /// Writes what a request wants written, its data or zeros, in blocks of `alignment`. It has its
    /// range to itself, where that is needed.
    ///
    /// # Errors
    /// One for which [`asks_for_more`](Self::asks_for_more) holds, if the storage does.
    pub(crate) fn write_bounced(
        &self,
        local: &mut Local,
        request: &Request,
        alignment: u64,
    ) -> io::Result<()> {
        let buffer = (request.op() == Some(Op::Write)).then(|| request.buffer());
        let fill = |at, bytes: &mut [u8]| match &buffer {
            Some(buffer) => {
                buffer.copy_to_slice(at, bytes);
            }
            None => bytes.fill(0),
        };
        let (start, end) = (request.offset(), request.offset() + request.len());
        let (bounce, file) = (&mut local.bounce, self.image().file());
        match self.partial_block(end, alignment) {
            None => bounce.write(file, alignment, start..end, fill)?,
            Some(last) => {
                if start < last {
                    bounce.write(file, alignment, start..last, fill)?;
                }
                // Direct I/O would make the file longer.
                let from = start.max(last);
                let mut bytes = vec![0; (end - from) as usize];
                fill((from - start) as usize, &mut bytes);
                let cached = self.image().cached()?;
                cached.write_all_at(&bytes, from)?;
                self.sync_ended(cached.sync_data())?;
            }
        }
        self.harden(local)
    }

    fn discard(&self, request: &Request) -> Status {
        if self.image().device_sector().is_some() {
            let Some(range) = self.discarded(request) else { return Status::Ok };
            let (file, len) = (self.image().file(), range.end - range.start);
            return self.discard_ended(request, file_io::discard_device(file, range.start, len));
        }
        match self.change(request, |_| self.attempt(Work::PunchHole, request)) {
            Ok(false) => Status::Unsupported,
            result => self.status(request, result.map(drop)),
        }
    }

    fn write_zeroes(
        &self,
        local: &mut Local,
        request: &Request,
        may_unmap: bool,
    ) -> io::Result<()> {
        self.change(request, |alignment| {
            let done = may_unmap && self.attempt(Work::PunchHole, request)?;
            if !done && !self.attempt(Work::ZeroRange, request)? {
                return self.write_bounced(local, request, alignment);
            }
            self.harden(local)
        })
    }

    /// Makes durable what was written, if the write cache is off.
    fn harden(&self, local: &Local) -> io::Result<()> {
        if self.is_write_through() { self.sync(local) } else { Ok(()) }
    }

    /// Does what not every file system can do. Returns whether this one could.
    fn attempt(&self, work: Work, request: &Request) -> io::Result<bool> {
        let (file, offset, len) = (self.image().file(), request.offset(), request.len());
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
