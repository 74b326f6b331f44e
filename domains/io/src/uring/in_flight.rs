//! One request in a ring: what is to be done, how far it has come, and the entry that asks the
//! kernel for the rest.

use crate::aligned::Aligned;
use domain_abi::RawSegment;
use domain_api::Request;
use io_uring::{opcode, squeue, types};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;

/// `Files::image` in the ring's table of files.
const IMAGE: types::Fixed = types::Fixed(0);
/// `Files::sync`.
const SYNC: types::Fixed = types::Fixed(1);
/// `Files::witness`.
const WITNESS: types::Fixed = types::Fixed(2);
/// The kernel's limit of iovecs in one entry (`IOV_MAX` in limits.h).
const IOV_MAX: usize = 1024;
/// Zeros that are written at a time, and what they are aligned to: the most that direct I/O asks
/// for.
const ZEROS_LEN: usize = 256 << 10;
const ZEROS_ALIGN: usize = 4096;
/// How often an entry that the kernel had no time or memory for is submitted again.
const RETRIES: u32 = 1000;

/// What to do for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Read from the file into the request's buffer.
    Read,
    /// Write the request's buffer to the file.
    Write {
        /// It is durable before it ends (`RWF_DSYNC`).
        durable: bool,
    },
    /// Make durable whatever was written to the file before (`fdatasync`), through
    /// [`Files::sync`](super::Files::sync). Linux reports a failed write-back once to each open
    /// file description.
    SyncData,
    /// The same through [`Files::witness`](super::Files::witness).
    SyncWitness,
    /// Read into the memory that comes with the job. Ends well at the end of the file, with less.
    ReadAligned,
    /// Write the memory that comes with the job.
    WriteAligned {
        /// As for `Write`.
        durable: bool,
    },
    /// Give the space of the request's range back (`FALLOC_FL_PUNCH_HOLE`).
    PunchHole,
    /// Make the request's range read as zeros, keeping the space (`FALLOC_FL_ZERO_RANGE`).
    ZeroRange,
    /// Write zeros to the request's range, the plain way.
    WriteZeros,
}

impl Work {
    /// Whether it moves data.
    #[must_use]
    #[inline]
    pub const fn is_transfer(self) -> bool {
        matches!(
            self,
            Self::Read
                | Self::Write { .. }
                | Self::WriteZeros
                | Self::ReadAligned
                | Self::WriteAligned { .. }
        )
    }

    /// Whether it changes what is in the file from where the guest has it.
    #[must_use]
    #[inline]
    pub const fn is_change(self) -> bool {
        matches!(
            self,
            Self::Write { .. }
                | Self::WriteAligned { .. }
                | Self::WriteZeros
                | Self::PunchHole
                | Self::ZeroRange
        )
    }

    /// Whether it makes durable what was written before.
    #[must_use]
    #[inline]
    pub const fn is_sync(self) -> bool {
        matches!(self, Self::SyncData | Self::SyncWitness)
    }
}

/// How a completion moves a request on.
pub(super) enum Progress {
    /// There is more to do.
    More,
    /// It has ended.
    Ended(io::Result<()>),
}

/// A request in the ring.
pub(super) struct InFlight {
    pub(super) request: Request,
    pub(super) work: Work,
    /// Bytes that are done.
    done: u64,
    /// The segments that are left, where these are not the request's own. Replaced only while the
    /// kernel has no entry for this request.
    rest: Vec<RawSegment>,
    /// How often the kernel may still be asked again.
    retries: u32,
    /// What is moved instead of the request's buffer.
    pub(super) aligned: Option<Box<Aligned>>,
}

impl InFlight {
    pub(super) const fn new(
        request: Request,
        work: Work,
        done: u64,
        aligned: Option<Box<Aligned>>,
    ) -> Self {
        Self { request, work, done, rest: Vec::new(), retries: RETRIES, aligned }
    }

    /// Does not try again what is interrupted from now on.
    pub(super) const fn give_up(&mut self) {
        self.retries = 0;
    }

    /// Takes a completion's result in.
    pub(super) fn progress(&mut self, result: i32) -> Progress {
        if result < 0 {
            let code = -result;
            if matches!(code, libc::EAGAIN | libc::EINTR) && self.retries > 0 {
                self.retries -= 1;
                return Progress::More;
            }
            return Progress::Ended(Err(io::Error::from_raw_os_error(code)));
        }
        let nothing = match self.work {
            Work::SyncData | Work::SyncWitness | Work::PunchHole | Work::ZeroRange => {
                return Progress::Ended(Ok(()));
            }
            Work::ReadAligned | Work::WriteAligned { .. } => return self.progress_aligned(result),
            Work::Read => io::ErrorKind::UnexpectedEof,
            Work::Write { .. } | Work::WriteZeros => io::ErrorKind::WriteZero,
        };
        self.done += u64::from(result.unsigned_abs());
        if self.done >= self.request.len() {
            Progress::Ended(Ok(()))
        } else if result == 0 {
            Progress::Ended(Err(nothing.into()))
        } else {
            Progress::More
        }
    }

    fn progress_aligned(&mut self, result: i32) -> Progress {
        let aligned = self.aligned.as_mut().expect("pushed with it");
        aligned.moved += result.unsigned_abs() as usize;
        match (result, self.work) {
            _ if aligned.moved >= aligned.window.len() => Progress::Ended(Ok(())),
            (0, Work::ReadAligned) => Progress::Ended(Ok(())),
            // The end of the file: to ask for more would be no aligned request.
            (read, Work::ReadAligned) if read % 512 != 0 => Progress::Ended(Ok(())),
            (0, _) => Progress::Ended(Err(io::ErrorKind::WriteZero.into())),
            _ => Progress::More,
        }
    }

    /// The entry for what is left. The kernel must have no other one for this request.
    pub(super) fn entry(&mut self, zeros: &mut Zeros) -> squeue::Entry {
        let (offset, len) = (self.request.offset(), self.request.len());
        let at = offset + self.done;
        match self.work {
            Work::Read => match self.left() {
                [one] if let Ok(len) = u32::try_from(one.len()) => {
                    opcode::Read::new(IMAGE, one.base(), len).offset(at).build()
                }
                many => opcode::Readv::new(IMAGE, many.as_ptr().cast(), many.len() as u32)
                    .offset(at)
                    .build(),
            },
            Work::Write { durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                match self.left() {
                    [one] if let Ok(len) = u32::try_from(one.len()) => {
                        opcode::Write::new(IMAGE, one.base(), len)
                            .offset(at)
                            .rw_flags(flags)
                            .build()
                    }
                    many => opcode::Writev::new(IMAGE, many.as_ptr().cast(), many.len() as u32)
                        .offset(at)
                        .rw_flags(flags)
                        .build(),
                }
            }
            Work::ReadAligned => {
                let (base, len, at) = self.aligned.as_mut().expect("pushed with it").left();
                opcode::Read::new(IMAGE, base, len).offset(at).build()
            }
            Work::WriteAligned { durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                let (base, len, at) = self.aligned.as_mut().expect("pushed with it").left();
                opcode::Write::new(IMAGE, base.cast_const(), len).offset(at).rw_flags(flags).build()
            }
            Work::SyncData => opcode::Fsync::new(SYNC).flags(types::FsyncFlags::DATASYNC).build(),
            Work::SyncWitness => {
                opcode::Fsync::new(WITNESS).flags(types::FsyncFlags::DATASYNC).build()
            }
            Work::PunchHole => allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, len),
            Work::ZeroRange => allocate(libc::FALLOC_FL_ZERO_RANGE, offset, len),
            Work::WriteZeros => {
                let piece = (len - self.done).min(ZEROS_LEN as u64) as u32;
                opcode::Write::new(IMAGE, zeros.get(), piece).offset(at).build()
            }
        }
    }

    /// The segments that are left, as many as one entry takes.
    fn left(&mut self) -> &[RawSegment] {
        let buffer = self.request.buffer();
        if self.done == 0 {
            let all = buffer.segments();
            return &all[..all.len().min(IOV_MAX)];
        }
        let mut rest = std::mem::take(&mut self.rest);
        rest.clear();
        let (done, left) = (self.done as usize, (self.request.len() - self.done) as usize);
        buffer.for_range(done, left, |base, len| {
            if rest.len() < IOV_MAX {
                // SAFETY: a part of the request's own segments, which stay until it has completed.
                rest.push(unsafe { RawSegment::new(base, len) });
            }
        });
        self.rest = rest;
        &self.rest
    }
}

fn allocate(mode: i32, offset: u64, len: u64) -> squeue::Entry {
    opcode::Fallocate::new(IMAGE, len).offset(offset).mode(mode | libc::FALLOC_FL_KEEP_SIZE).build()
}

/// Zeros for the kernel to read, made when they are first needed.
#[derive(Default)]
pub(super) struct Zeros(Option<std::ptr::NonNull<u8>>);

// SAFETY: memory that it owns and that is not written.
unsafe impl Send for Zeros {}
// SAFETY: as above.
unsafe impl Sync for Zeros {}

impl Zeros {
    const LAYOUT: Layout = match Layout::from_size_align(ZEROS_LEN, ZEROS_ALIGN) {
        Ok(layout) => layout,
        Err(_) => panic!("a power of two, and small"),
    };

    fn get(&mut self) -> *const u8 {
        let made = *self.0.get_or_insert_with(|| {
            // SAFETY: the layout is not empty.
            let memory = unsafe { alloc_zeroed(Self::LAYOUT) };
            std::ptr::NonNull::new(memory).unwrap_or_else(|| handle_alloc_error(Self::LAYOUT))
        });
        made.as_ptr()
    }
}

impl Drop for Zeros {
    fn drop(&mut self) {
        if let Some(memory) = self.0 {
            // SAFETY: allocated in `get` with this layout; the ring is dropped only when the kernel
            // reads it no more.
            unsafe { dealloc(memory.as_ptr(), Self::LAYOUT) };
        }
    }
}
