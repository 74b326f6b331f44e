//! What each request maps to, for a queue whose worker is not to wait.
//!
//! At once goes what only copies: reads from the page cache (the kernel says so itself,
//! `RWF_NOWAIT`), writes into it, and everything on a file system in memory. Writes that turn out
//! to wait, for dirty pages or a journal, go to the ring for a while ([`InlineHeuristic`]). Direct
//! I/O goes to the ring. What does not fit the storage's alignment goes there by way of memory of
//! its own ([`modify`]). Without direct I/O the ring is made when a request first needs it
//! (`rings`).
//!
//! **Flush.** It has to cover the writes that had completed before it was submitted, by this queue
//! or another, this instance or another. Completed means that the data is in the page cache or on
//! the device; `fdatasync` on the file takes all of that with it, of any writer, and it is
//! submitted later than those writes completed. Writes that are still in flight are owed nothing.
//! So no request is ever held back for another (no `IOSQE_IO_DRAIN`, no links).
//!
//! **Without a write cache** a write is durable before it completes: direct I/O says so with the
//! write, and a write into the page cache is followed by a sync, which it shares with others. The
//! setting may change while writes are in flight, so it is looked at once more when a write has
//! ended: what was not written durably is followed by a sync.
//!
//! Where no ring can be had the worker does everything, one after the other (`serve`).
//!
//! [`InlineHeuristic`]: domain_io::engine::InlineHeuristic

use crate::disk::Disk;
use crate::serve::{Local, WITNESS};
use domain_api::{Op, QueueIndex, Request, Status};
use domain_io::Aligned;
use domain_io::engine::modify::{self, MOST_ALIGNED, Transfer};
use domain_io::engine::{
    AfterSync, Backend, Bounce, InlineHeuristic, Opens, QueueState, SECTOR, Shared, ranges,
};
use domain_io::file_io;
use domain_io::uring::{Ring, RingJob, Work};
use std::io;
use std::time::Instant;

type Step = domain_io::engine::Step<RingJob>;
type Queue = QueueState<Disk>;

impl Backend for Disk {
    type Port = Ring;
    type Local = Local;

    #[inline]
    fn shared(&self) -> &Shared {
        self.shared()
    }

    fn opens(&self) -> Opens {
        self.rings().opens(self.image())
    }

    fn local(&self, queue: QueueIndex) -> Local {
        Local {
            bounce: Bounce::default(),
            sync: self.rings().sync_file(self.image(), queue),
            reads: InlineHeuristic::default(),
            writes: InlineHeuristic::default(),
        }
    }

    fn open(&self, local: &Local, queue: QueueIndex) -> Option<Ring> {
        self.rings().ring(self.image(), local.sync_file(self), queue)
    }

    #[inline(always)]
    fn begin(&self, queue: &mut Queue, request: &Request) -> Step {
        let Some(op) = request.op() else { return Step::Done(Status::Unsupported) };
        if op != Op::Flush {
            if !matches!(op, Op::Read) && !self.image().mode().write {
                // The host does not let a guest come this far.
                return Step::Done(Status::IoError);
            }
            if request.is_empty() {
                return Step::Done(Status::Ok);
            }
        }
        if op != Op::Flush && !self.is_of_blocks(request) {
            // As a disk that has no smaller ones.
            return Step::Done(Status::IoError);
        }
        match op {
            Op::Read | Op::Write if self.image().is_in_memory() => {
                Step::Done(self.serve_here(&mut queue.local, request))
            }
            Op::Read if !self.takes(request, self.alignment()) => {
                self.begin_aligned(queue, request)
            }
            Op::Read => self.begin_read(queue, request),
            Op::Flush if self.image().is_in_memory() => {
                Step::Done(self.serve_here(&mut queue.local, request))
            }
            Op::Flush => match self.check_storage() {
                Ok(()) => {
                    self.image().follow_alignment();
                    Step::Sync
                }
                Err(error) => Step::Done(self.shared().failed(request, &error)),
            },
            Op::Discard if self.image().device_sector().is_some() => self.begin_discard(request),
            Op::Discard if !self.can_punch_hole() => Step::Done(Status::Unsupported),
            Op::Write | Op::Discard | Op::WriteZeroes { .. } => {
                self.begin_change(queue, request, op)
            }
        }
    }

    #[inline]
    fn ended(
        &self,
        queue: &mut Queue,
        request: &Request,
        job: RingJob,
        result: io::Result<()>,
    ) -> Step {
        let RingJob { work, aligned, .. } = job;
        let op = request.op();
        let error = match (result, aligned) {
            (Ok(()), Some(aligned)) => return self.moved(request, work, aligned),
            (Ok(()), None) => {
                let covered = matches!(work, Work::Write { durable: true });
                let writes = matches!(op, Some(Op::Write | Op::WriteZeroes { .. }));
                return if writes && !covered && self.is_write_through() {
                    Step::Sync
                } else {
                    Step::Done(Status::Ok)
                };
            }
            (Err(error), aligned) if work.is_transfer() => {
                return self.refused(queue, request, work, aligned, &error);
            }
            (Err(error), _) => error,
        };
        let cannot = self.cannot(work, &error);
        match work {
            // A hint, but one that was not taken is not answered well.
            Work::PunchHole if cannot && op == Some(Op::Discard) => Step::Done(Status::Unsupported),
            Work::PunchHole if cannot && self.can_zero_range() => push(Work::ZeroRange),
            Work::PunchHole | Work::ZeroRange if cannot => self.write_zeros(queue, request),
            _ => Step::Done(self.shared().failed(request, &error)),
        }
    }

    fn serve(&self, local: &mut Local, request: &Request) -> Status {
        self.serve_here(local, request)
    }

    fn sync_job(&self) -> RingJob {
        RingJob::new(Work::SyncData)
    }

    fn synced(&self, job: RingJob, result: io::Result<()>) -> AfterSync<RingJob> {
        if job.work == Work::SyncData && result.is_ok() && !self.is_witnessed() {
            // By one queue at a time: of two the one would be told, and the other answer well.
            return AfterSync::Then(RingJob::new(Work::SyncWitness), WITNESS);
        }
        let outcome = self.sync_ended(result);
        if job.work == Work::SyncWitness && outcome.is_ok() {
            self.set_witnessed();
        }
        AfterSync::Done(outcome)
    }

    fn offload_ended(&self, request: &Request, result: io::Result<()>) -> Status {
        self.discard_ended(request, result)
    }

    #[inline]
    fn alignment(&self) -> u64 {
        self.alignment()
    }

    #[inline]
    fn may_grow(&self) -> bool {
        self.image().mode().direct
    }

    #[inline]
    fn has_grown(&self) -> bool {
        self.image().has_grown()
    }
}

impl Disk {
    /// A change: with its range to itself, where that is needed.
    #[inline(always)]
    fn begin_change(&self, queue: &mut Queue, request: &Request, op: Op) -> Step {
        let alignment = self.alignment();
        if ranges::needs_range(alignment) && !queue.take_range(self, request, alignment) {
            return Step::Blocked;
        }
        match op {
            Op::Write if !self.takes(request, alignment) => self.begin_aligned(queue, request),
            Op::Write => self.begin_write(queue, request),
            Op::Discard => push(Work::PunchHole),
            Op::WriteZeroes { may_unmap: true } if self.can_punch_hole() => push(Work::PunchHole),
            _ if self.can_zero_range() => push(Work::ZeroRange),
            _ => self.write_zeros(queue, request),
        }
    }

    /// A device's discard.
    #[cold]
    fn begin_discard(&self, request: &Request) -> Step {
        // What is less than a sector cannot be given back.
        let Some(range) = self.discarded(request) else { return Step::Done(Status::Ok) };
        let Ok(device) = self.image().file().try_clone() else { return Step::Serve };
        let len = range.end - range.start;
        Step::Offload(Box::new(move || file_io::discard_device(&device, range.start, len)))
    }

    #[inline(always)]
    fn begin_read(&self, queue: &mut Queue, request: &Request) -> Step {
        let reads = &mut queue.local.reads;
        if self.image().mode().direct || !self.tries_reads() || !reads.worth_trying() {
            return push(Work::Read);
        }
        match file_io::read_at_once(self.image().file(), request.offset(), &request.buffer()) {
            Ok(done) if done == request.len() => {
                reads.worked();
                Step::Done(Status::Ok)
            }
            // The rest is on the disk, and part of it is likely being read ahead by now.
            Ok(done) => Step::Push(RingJob::rest(Work::Read, done)),
            Err(error) => {
                match error.kind() {
                    io::ErrorKind::Unsupported => self.stop_trying_reads(),
                    _ => reads.failed(),
                }
                // Whatever it is, the ring has the same error, or a better idea.
                push(Work::Read)
            }
        }
    }

    #[inline(always)]
    fn begin_write(&self, queue: &mut Queue, request: &Request) -> Step {
        if self.image().mode().direct {
            return push(Work::Write { durable: self.is_durable_by_itself() });
        }
        let writes = &mut queue.local.writes;
        if !writes.worth_trying() {
            return push(Work::Write { durable: false });
        }
        // Few file systems can say beforehand whether a write into the page cache would wait (ext4
        // cannot), so the clock tells afterwards.
        let started = Instant::now();
        let result = file_io::write_at(self.image().file(), request.offset(), &request.buffer());
        writes.took(started.elapsed());
        match result {
            Ok(()) if self.is_write_through() => Step::Sync,
            result => Step::Done(self.status(request, result)),
        }
    }

    /// A read, or a write that has its range if it needs one, which the kernel does not take as it
    /// is.
    #[cold]
    fn begin_aligned(&self, queue: &mut Queue, request: &Request) -> Step {
        if !queue.has_port(self) {
            return Step::Serve;
        }
        let range = queue.range(self, request);
        let len = range.end - range.start;
        let reads = request.op() == Some(Op::Read);
        let (start, end) = (request.offset(), request.offset() + request.len());
        self.count_unaligned(!reads && (start > range.start || end < range.end));
        if reads && len > MOST_ALIGNED {
            let result = self.read_bounced(&mut queue.local, request);
            return Step::Done(self.status(request, result));
        }
        // The one that the range was made with, or a smaller one, which serves as well.
        let alignment = self.alignment().min(len);
        if !reads && (len > MOST_ALIGNED || self.partial_block(end, alignment).is_some()) {
            return self.change_bounced(queue, request, alignment);
        }
        self.transfer(request, modify::begin(request, &range, alignment))
    }

    /// A change that the worker makes by way of the bounce buffer.
    fn change_bounced(&self, queue: &mut Queue, request: &Request, alignment: u64) -> Step {
        match self.write_bounced(&mut queue.local, request, alignment) {
            Err(error) if self.asks_for_more(&error, alignment) => Step::Again,
            result => Step::Done(self.status(request, result)),
        }
    }

    fn transfer(&self, request: &Request, transfer: Transfer) -> Step {
        match transfer {
            Transfer::Read(aligned) => Step::Push(RingJob::aligned(Work::ReadAligned, aligned)),
            Transfer::Write(aligned) => {
                let work = Work::WriteAligned { durable: self.is_durable_by_itself() };
                Step::Push(RingJob::aligned(work, aligned))
            }
            Transfer::Done => Step::Done(Status::Ok),
            Transfer::CutShort => {
                let error = io::ErrorKind::UnexpectedEof.into();
                Step::Done(self.shared().failed(request, &error))
            }
        }
    }

    /// What follows when a piece of a request that does not fit has been moved.
    #[cold]
    fn moved(&self, request: &Request, work: Work, aligned: Box<Aligned>) -> Step {
        match work {
            Work::WriteAligned { durable: false } if self.is_write_through() => Step::Sync,
            Work::WriteAligned { .. } => Step::Done(Status::Ok),
            _ => self.transfer(request, modify::read_ended(request, aligned)),
        }
    }

    /// Zeros by writing them, of a request that has its range to itself if it has edges.
    fn write_zeros(&self, queue: &mut Queue, request: &Request) -> Step {
        let range = queue.range(self, request);
        let alignment = self.alignment().min(range.end - range.start);
        if !ranges::has_edges(request, alignment) {
            return push(Work::WriteZeros);
        }
        self.count_unaligned(true);
        self.change_bounced(queue, request, alignment)
    }

    /// What follows when data could not be moved: once more, if the kernel did not like the guest's
    /// memory, or the storage asks for more than it did.
    #[cold]
    fn refused(
        &self,
        queue: &mut Queue,
        request: &Request,
        work: Work,
        aligned: Option<Box<Aligned>>,
        error: &io::Error,
    ) -> Step {
        let had_range = queue.holds(request);
        // What it was carried out on: the memory that it had, its range, or itself.
        let made_with = match &aligned {
            Some(aligned) => aligned.offset()..aligned.offset() + aligned.bytes().len() as u64,
            None if had_range => queue.range(self, request),
            None => ranges::hull(request, SECTOR),
        };
        if self.asks_for_more(error, SECTOR) {
            let lacks_range = work.is_change() && !had_range;
            if ranges::hull(request, self.alignment()) != made_with || lacks_range {
                return Step::Again;
            }
        }
        if self.is_misaligned(error) && aligned.is_none() && work != Work::WriteZeros {
            return self.begin_aligned(queue, request);
        }
        Step::Done(self.shared().failed(request, error))
    }
}

/// All of it is left to the ring.
#[inline]
const fn push(work: Work) -> Step {
    Step::Push(RingJob::new(work))
}
