//! One queue of the disk: what its worker does at once, and what it leaves to a ring.
//!
//! ```text
//!   request -> at once? -- yes --> done
//!                |no / in part
//!                v
//!              ring -> kernel -> ended -> more to be done for it (a plainer way, fdatasync) -> ring
//!                                  |
//!                                  v
//!                                 done
//! ```
//!
//! At once goes what only copies: reads from the page cache (the kernel says so itself, `RWF_NOWAIT`), writes into it, and everything on a file
//! system in memory. Writes that turn out to wait, for dirty pages or a journal, go to the ring for a while ([`Pace`]). Direct I/O goes to the ring. What
//! needs a bounce buffer is so rare that the worker waits for it. Without direct I/O the ring is made when a request first needs it (`engine`).
//!
//! **Flush.** It has to cover the writes that had completed before it was submitted, by this queue or another, this instance or another. Completed means
//! that the data is in the page cache or on the device; `fdatasync` on the file takes all of that with it, whoever wrote it, and it is
//! submitted later than those writes completed. Writes that are still in flight are owed nothing. So no request is ever held back for
//! another (no `IOSQE_IO_DRAIN`, no links).
//!
//! **Without a write cache** a write is durable before it completes. The setting may change while writes are in flight, so it is looked at once more when a
//! write has ended: whatever was not written durably is followed by an `fdatasync` of its own.
//!
//! Where no ring can be had everything is done by the worker, one after the other ([`Disk::serve`]).

use crate::bounce::Bounce;
use crate::disk::Disk;
use crate::engine::Engine;
use crate::pace::Pace;
use domain_api::uring::{Ended, Ring, Work};
use domain_api::{Batch, Completions, Op, QueueIndex, Request, Status, file_io};
use std::io;
use std::time::Instant;

/// What a worker keeps for its queue.
#[derive(Debug)]
pub struct Queue {
    index: QueueIndex,
    bounce: Bounce,
    /// None, if no request has needed it yet, or it cannot be had.
    ring: Option<Ring>,
    /// Whether one can be had when it is needed.
    may_have_ring: bool,
    reads: Pace,
    writes: Pace,
    /// How often the disk had been told to cancel when this queue last looked.
    cancels_seen: u32,
}

/// What to do next for a request.
enum Next {
    /// Tell the guest.
    Done(Status),
    /// Leave it to the ring, from this byte on.
    Ring(Work, u64),
}

impl Queue {
    /// A queue, on the thread that will serve it.
    pub(crate) fn new(engine: &Engine, disk: &Disk, index: QueueIndex) -> Self {
        let at_once = engine.wants_rings_at_once(disk.image());
        let ring = at_once.then(|| engine.ring(disk.image(), index)).flatten();
        Self {
            index,
            bounce: Bounce::default(),
            // One that could not be had now is not tried for again under a request.
            may_have_ring: engine.wants_rings() && (ring.is_some() || !at_once),
            ring,
            reads: Pace::default(),
            writes: Pace::default(),
            cancels_seen: disk.cancels(),
        }
    }

    pub(crate) const fn index(&self) -> QueueIndex {
        self.index
    }

    pub(crate) fn into_ring(self) -> Option<Ring> {
        self.ring
    }

    pub(crate) fn submit(
        &mut self,
        engine: &Engine,
        disk: &Disk,
        batch: &mut Batch<'_>,
        completions: &mut Completions<'_>,
    ) {
        if !self.may_have_ring {
            while let Some(request) = batch.next() {
                let status = disk.serve(&mut self.bounce, &request);
                completions.complete(request, status);
            }
            return;
        }
        self.heed_cancel(disk);
        // A full ring may have room again when what it has is submitted and some of that ends in the call. If not, the rest stays with the host,
        // which comes back when something has ended.
        while !batch.is_empty() && self.has_room() {
            while self.has_room()
                && let Some(request) = batch.next()
            {
                let next = self.begin(disk, &request);
                self.go_on(engine, disk, request, next, completions);
            }
            self.collect(engine, disk, completions);
        }
    }

    pub(crate) fn reap(&mut self, engine: &Engine, disk: &Disk, completions: &mut Completions<'_>) {
        self.heed_cancel(disk);
        self.collect(engine, disk, completions);
    }

    /// Gives up what is in flight if that was asked for. Looked at before anything new is taken, which was not meant.
    #[inline]
    fn heed_cancel(&mut self, disk: &Disk) {
        let cancels = disk.cancels();
        if cancels != self.cancels_seen {
            self.cancels_seen = cancels;
            self.ring.iter_mut().for_each(Ring::cancel);
        }
    }

    fn has_room(&self) -> bool {
        self.ring.as_ref().is_none_or(Ring::has_room)
    }

    fn collect(&mut self, engine: &Engine, disk: &Disk, completions: &mut Completions<'_>) {
        while let Some(Ended { request, work, result }) = self.ring.as_mut().and_then(Ring::advance) {
            let next = self.ended(disk, &request, work, result);
            self.go_on(engine, disk, request, next, completions);
        }
    }

    #[inline]
    fn go_on(
        &mut self,
        engine: &Engine,
        disk: &Disk,
        request: Request,
        next: Next,
        completions: &mut Completions<'_>,
    ) {
        match (next, &mut self.ring) {
            (Next::Done(status), _) => completions.complete(request, status),
            (Next::Ring(work, done), Some(ring)) => ring.push(request, work, done),
            (Next::Ring(work, done), None) => {
                self.first_for_ring(engine, disk, request, work, done, completions);
            }
        }
    }

    /// The first request that is to wait without its worker makes the ring for it. If there is none to be had, the worker serves it, and all that follow.
    #[cold]
    fn first_for_ring(
        &mut self,
        engine: &Engine,
        disk: &Disk,
        request: Request,
        work: Work,
        done: u64,
        completions: &mut Completions<'_>,
    ) {
        self.ring = if self.may_have_ring { engine.ring(disk.image(), self.index) } else { None };
        if let Some(ring) = &mut self.ring {
            ring.push(request, work, done);
        } else {
            self.may_have_ring = false;
            let status = disk.serve(&mut self.bounce, &request);
            completions.complete(request, status);
        }
    }

    #[inline]
    fn begin(&mut self, disk: &Disk, request: &Request) -> Next {
        let Some(op) = request.op() else { return Next::Done(Status::Unsupported) };
        if op != Op::Flush {
            if !matches!(op, Op::Read) && !disk.image().mode().write {
                // The host does not let a guest come this far.
                return Next::Done(Status::IoError);
            }
            if request.is_empty() {
                return Next::Done(Status::Ok);
            }
        }
        match op {
            Op::Read | Op::Write if !disk.takes(request) => Next::Done(disk.serve(&mut self.bounce, request)),
            Op::Read => self.begin_read(disk, request),
            Op::Write => self.begin_write(disk, request),
            Op::Flush if disk.image().is_in_memory() => Next::Done(disk.serve(&mut self.bounce, request)),
            Op::Flush => Next::Ring(Work::SyncData, 0),
            Op::Discard if disk.can_punch_hole() => Next::Ring(Work::PunchHole, 0),
            Op::Discard => Next::Done(Status::Ok),
            Op::WriteZeroes { may_unmap: true } if disk.can_punch_hole() => Next::Ring(Work::PunchHole, 0),
            Op::WriteZeroes { .. } if disk.can_zero_range() => Next::Ring(Work::ZeroRange, 0),
            Op::WriteZeroes { .. } => Next::Ring(Work::WriteZeros, 0),
        }
    }

    #[inline]
    fn begin_read(&mut self, disk: &Disk, request: &Request) -> Next {
        if disk.image().is_in_memory() {
            return Next::Done(disk.serve(&mut self.bounce, request));
        }
        if disk.image().mode().direct || !disk.tries_reads() || !self.reads.worth_trying() {
            return Next::Ring(Work::Read, 0);
        }
        match file_io::read_at_once(disk.image().file(), request.offset(), &request.buffer()) {
            Ok(done) if done == request.len() => {
                self.reads.worked();
                Next::Done(Status::Ok)
            }
            // The rest is on the disk, and part of it is likely being read ahead by now.
            Ok(done) => Next::Ring(Work::Read, done),
            Err(error) => {
                match error.kind() {
                    io::ErrorKind::Unsupported => disk.stop_trying_reads(),
                    _ => self.reads.failed(),
                }
                // Whatever it is, the ring has the same error, or a better idea.
                Next::Ring(Work::Read, 0)
            }
        }
    }

    #[inline]
    fn begin_write(&mut self, disk: &Disk, request: &Request) -> Next {
        let durable = disk.is_write_through();
        if disk.image().is_in_memory() {
            return Next::Done(disk.serve(&mut self.bounce, request));
        }
        let work = Work::Write { durable };
        if durable || disk.image().mode().direct || !self.writes.worth_trying() {
            return Next::Ring(work, 0);
        }
        // Few file systems can say beforehand whether a write into the page cache would wait (ext4 cannot), so the clock tells afterwards.
        let started = Instant::now();
        let status = disk.serve(&mut self.bounce, request);
        self.writes.took(started.elapsed());
        Next::Done(status)
    }

    /// What follows when the ring is done with `work`.
    fn ended(&mut self, disk: &Disk, request: &Request, work: Work, result: io::Result<()>) -> Next {
        let op = request.op();
        let error = match result {
            Ok(()) => {
                let covered = matches!(work, Work::SyncData | Work::Write { durable: true });
                let writes = matches!(op, Some(Op::Write | Op::WriteZeroes { .. }));
                return if writes && !covered && disk.is_write_through() {
                    Next::Ring(Work::SyncData, 0)
                } else {
                    Next::Done(Status::Ok)
                };
            }
            Err(error) => error,
        };
        let cannot = disk.cannot(work, &error);
        match work {
            // Only a hint: a file system that cannot take it leaves the data where it is.
            Work::PunchHole if cannot && op == Some(Op::Discard) => Next::Done(Status::Ok),
            Work::PunchHole if cannot && disk.can_zero_range() => Next::Ring(Work::ZeroRange, 0),
            Work::PunchHole | Work::ZeroRange if cannot => Next::Ring(Work::WriteZeros, 0),
            // The kernel did not like the guest's memory after all; a bounce buffer may help.
            Work::Read | Work::Write { .. } if disk.is_misaligned(&error) => {
                Next::Done(disk.serve_bounced(&mut self.bounce, request))
            }
            _ => Next::Done(disk.failed(request, &error)),
        }
    }
}
