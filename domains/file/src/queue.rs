//! One queue of the disk: what its worker does at once, and what it leaves to a ring.
//!
//! ```text
//!   request -> at once? -- yes --> done
//!                |no / in part
//!                v
//!              ring -> kernel -> ended -> more to be done (a plainer way, an edge, a sync) -> ring
//!                                  |
//!                                  v
//!                                 done
//! ```
//!
//! At once goes what only copies: reads from the page cache (the kernel says so itself,
//! `RWF_NOWAIT`), writes into it, and everything on a file system in memory. Writes that turn out
//! to wait, for dirty pages or a journal, go to the ring for a while ([`Pace`]). Direct I/O goes to
//! the ring. What does not fit the storage's alignment goes there by way of memory of its own
//! ([`crate::edges`]). Without direct I/O the ring is made when a request first needs it
//! (`engine`).
//!
//! **Flush.** It has to cover the writes that had completed before it was submitted, by this queue
//! or another, this instance or another. Completed means that the data is in the page cache or on
//! the device; `fdatasync` on the file takes all of that with it, whoever wrote it, and it is
//! submitted later than those writes completed. Writes that are still in flight are owed nothing.
//! So no request is ever held back for another (no `IOSQE_IO_DRAIN`, no links). Flushes that come
//! while one is under way share the next ([`crate::turn`]).
//!
//! **Without a write cache** a write is durable before it completes: direct I/O says so with the
//! write, and a write into the page cache is followed by a sync, which it shares with others. The
//! setting may change while writes are in flight, so it is looked at once more when a write has
//! ended: whatever was not written durably is followed by a sync.
//!
//! Where no ring can be had everything is done by the worker, one after the other
//! ([`Disk::serve`]).

use crate::bounce::Bounce;
use crate::disk::{Disk, is_cancelled};
use crate::edges;
use crate::engine::{DEPTH, Engine};
use crate::pace::Pace;
use crate::turn::Turn;
use domain_api::{Batch, Completions, Op, QueueIndex, Request, Status};
use domain_io::file_io;
use domain_io::uring::{Aligned, Ended, Ring, Work};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::time::Instant;

/// The least that storage asks for: a sector.
const SMALLEST: u64 = 512;
/// Most bytes of memory for a request that does not fit; what is longer the worker moves in pieces.
const MOST_ALIGNED: u64 = 1 << 20;

/// What a worker keeps for its queue.
#[derive(Debug)]
pub struct Queue {
    index: QueueIndex,
    bounce: Bounce,
    /// None, if no request has needed it yet, or it cannot be had.
    ring: Option<Ring>,
    /// Whether one can be had when it is needed.
    may_have_ring: bool,
    /// What it syncs through; without it, the disk's own descriptor.
    sync: Option<File>,
    turn: Turn,
    /// The request whose sync is done but for the witness, which another queue is asking.
    unwitnessed: Option<Request>,
    /// Ranges that requests in flight have to themselves, by tag.
    held: Vec<(u64, Range<u64>)>,
    /// How many changes are in the ring without a range, where that is direct.
    plain: u32,
    /// Requests that wait for such a range.
    blocked: VecDeque<Request>,
    /// How many requests are with the disk's thread.
    offloaded: usize,
    reads: Pace,
    writes: Pace,
    /// How often the disk had been told to cancel when this queue last looked.
    cancels_seen: u32,
}

/// What is left of a queue. It may take long to drop.
#[derive(Debug)]
pub struct Remains {
    _ring: Option<Ring>,
    _sync: Option<File>,
}

/// What to do next for a request.
enum Next {
    /// Tell the guest.
    Done(Status),
    /// Leave it to the ring, from this byte on.
    Ring(Work, u64),
    /// Leave it to the ring, with memory of its own.
    Aligned(Work, Box<Aligned>),
    /// Make durable what was written.
    Sync,
    /// Leave it to the disk's thread.
    Offload(Range<u64>),
    /// Begin again when a range is free.
    Blocked,
}

impl Queue {
    /// A queue, on the thread that will serve it.
    pub(crate) fn new(engine: &Engine, disk: &Disk, index: QueueIndex) -> Self {
        let image = disk.image();
        let sync = engine.sync_file(image, index);
        let at_once = engine.wants_rings_at_once(image);
        let ring = at_once
            .then(|| engine.ring(image, sync.as_ref().unwrap_or(disk.own_sync()), index))
            .flatten();
        Self {
            index,
            bounce: Bounce::default(),
            // One that could not be had now is not tried for again under a request.
            may_have_ring: engine.wants_rings() && (ring.is_some() || !at_once),
            ring,
            sync,
            turn: Turn::default(),
            unwitnessed: None,
            held: Vec::new(),
            plain: 0,
            blocked: VecDeque::new(),
            offloaded: 0,
            reads: Pace::default(),
            writes: Pace::default(),
            cancels_seen: disk.cancels(),
        }
    }

    pub(crate) const fn index(&self) -> QueueIndex {
        self.index
    }

    /// Nothing is done with it any more, and its ring lets go of the image.
    pub(crate) fn into_remains(self) -> Remains {
        let mut ring = self.ring;
        ring.iter_mut().for_each(Ring::release_files);
        Remains { _ring: ring, _sync: self.sync }
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
                let status = self.serve(disk, &request);
                completions.complete(request, status);
            }
            return;
        }
        self.heed_cancel(disk);
        // A full ring may have room again when what it has is submitted and some of that ends in
        // the call. If not, the rest stays with the host, which comes back when something has
        // ended.
        while !batch.is_empty() && self.has_room() {
            while self.has_room()
                && let Some(request) = batch.next()
            {
                let next = self.begin(engine, disk, &request);
                self.go_on(engine, disk, request, next, completions);
            }
            self.collect(engine, disk, completions);
        }
    }

    pub(crate) fn reap(&mut self, engine: &Engine, disk: &Disk, completions: &mut Completions<'_>) {
        self.heed_cancel(disk);
        self.collect(engine, disk, completions);
    }

    /// Gives up what is in flight if that was asked for. Looked at before anything new is taken,
    /// which was not meant.
    #[inline]
    fn heed_cancel(&mut self, disk: &Disk) {
        let cancels = disk.cancels();
        if cancels != self.cancels_seen {
            self.cancels_seen = cancels;
            self.ring.iter_mut().for_each(Ring::cancel);
        }
    }

    /// Whether the ring can take one more, and all that wait beside it.
    #[inline]
    fn has_room(&self) -> bool {
        let beside = self.turn.len()
            + self.blocked.len()
            + self.offloaded
            + usize::from(self.unwitnessed.is_some());
        self.ring.as_ref().is_none_or(|ring| {
            ring.has_room() && (beside == 0 || ring.in_flight() + beside < DEPTH)
        })
    }

    /// Serves a request here and now.
    fn serve(&mut self, disk: &Disk, request: &Request) -> Status {
        let sync = self.sync.as_ref().unwrap_or(disk.own_sync());
        disk.serve(&mut self.bounce, sync, request)
    }

    fn collect(&mut self, engine: &Engine, disk: &Disk, completions: &mut Completions<'_>) {
        loop {
            while let Some(ended) = self.ring.as_mut().and_then(Ring::advance) {
                let Ended { request, work, aligned, result } = ended;
                if is_change(work) && disk.image().mode().direct && !self.holds(&request) {
                    self.count_plain(disk, self.plain - 1);
                }
                if matches!(work, Work::SyncData | Work::SyncWitness) {
                    self.synced(disk, request, work, result, completions);
                } else {
                    let next = self.ended(engine, disk, &request, work, aligned, result);
                    self.go_on(engine, disk, request, next, completions);
                }
            }
            if self.offloaded > 0 {
                for (request, result) in disk.offload().done(self.index) {
                    self.offloaded -= 1;
                    let status = disk.discard_ended(&request, result);
                    completions.complete(request, status);
                }
            }
            let mut again = false;
            if let Some(request) = self.unwitnessed.take() {
                self.ask_witness(disk, request, completions);
                again = self.unwitnessed.is_none();
            }
            again |= self.unblock(engine, disk, completions);
            if !again {
                return;
            }
        }
    }

    /// Begins what waited for a range. Whether any of it could.
    fn unblock(&mut self, engine: &Engine, disk: &Disk, completions: &mut Completions<'_>) -> bool {
        let before = self.blocked.len();
        for _ in 0..before {
            let Some(request) = self.blocked.pop_front() else { break };
            let next = self.begin(engine, disk, &request);
            self.go_on(engine, disk, request, next, completions);
        }
        self.blocked.len() < before
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
        match next {
            Next::Done(status) => self.done(disk, request, status, completions),
            Next::Ring(work, done) if self.ring.is_some() => {
                let is_plain =
                    is_change(work) && disk.image().mode().direct && !self.holds(&request);
                if is_plain {
                    return self.push_plain(engine, disk, request, work, done, completions);
                }
                let Some(ring) = &mut self.ring else { unreachable!("looked at just above") };
                ring.push(request, work, done);
            }
            Next::Blocked => self.blocked.push_back(request),
            next => self.go_on_elsewhere(engine, disk, request, next, completions),
        }
    }

    /// Whether a request has its range to itself.
    #[inline]
    fn holds(&self, request: &Request) -> bool {
        !self.held.is_empty() && self.held.iter().any(|(tag, _)| *tag == request.id().tag)
    }

    /// A change without a range: counted first, and then it is looked whether it needs one by now
    /// (`edges`).
    #[inline]
    fn push_plain(
        &mut self,
        engine: &Engine,
        disk: &Disk,
        request: Request,
        work: Work,
        done: u64,
        completions: &mut Completions<'_>,
    ) {
        if self.counts_as_plain(disk) {
            let Some(ring) = &mut self.ring else { unreachable!("looked at by who calls") };
            return ring.push(request, work, done);
        }
        let next = self.begin(engine, disk, &request);
        self.go_on(engine, disk, request, next, completions);
    }

    /// Counts one more change without a range, unless it needs one by now.
    #[inline]
    fn counts_as_plain(&mut self, disk: &Disk) -> bool {
        self.plain += 1;
        disk.ranges().set_plain(self.index, self.plain);
        // Only now, see `edges`.
        let counts = !Disk::takes_ranges(disk.alignment());
        if !counts {
            self.count_plain(disk, self.plain - 1);
        }
        counts
    }

    /// Says how many changes without a range are left.
    #[inline]
    fn count_plain(&mut self, disk: &Disk, left: u32) {
        self.plain = left;
        disk.ranges().set_plain(self.index, left);
        if left == 0 && disk.may_have_plain() {
            disk.ranges().look_again();
        }
    }

    #[inline]
    fn done(
        &mut self,
        disk: &Disk,
        request: Request,
        status: Status,
        completions: &mut Completions<'_>,
    ) {
        if !self.held.is_empty() {
            self.give_back(disk, &request);
        }
        completions.complete(request, status);
    }

    /// Gives back the range that a request has to itself, if it has one.
    #[cold]
    fn give_back(&mut self, disk: &Disk, request: &Request) {
        let tag = request.id().tag;
        if let Some(at) = self.held.iter().position(|(of, _)| *of == tag) {
            disk.ranges().give_back(&self.held.swap_remove(at).1);
        }
    }

    /// What is rarer than reads and writes that fit. The first request that is to wait without its
    /// worker makes the ring for it. If there is none to be had, the worker serves it, and all that
    /// follow.
    #[inline(never)]
    fn go_on_elsewhere(
        &mut self,
        engine: &Engine,
        disk: &Disk,
        request: Request,
        next: Next,
        completions: &mut Completions<'_>,
    ) {
        if let Next::Offload(range) = next {
            match disk.offload().discard(disk.image().file(), self.index, request, range) {
                Ok(()) => self.offloaded += 1,
                Err(request) => {
                    let status = self.serve(disk, &request);
                    completions.complete(request, status);
                }
            }
            return;
        }
        if !self.make_ring(engine, disk) {
            // It takes its range itself.
            if !self.held.is_empty() {
                self.give_back(disk, &request);
            }
            let status = self.serve(disk, &request);
            return completions.complete(request, status);
        }
        if matches!(next, Next::Ring(..)) {
            return self.go_on(engine, disk, request, next, completions);
        }
        if matches!(next, Next::Aligned(Work::WriteAligned { .. }, _))
            && !self.holds(&request)
            && !self.counts_as_plain(disk)
        {
            let next = self.begin(engine, disk, &request);
            return self.go_on(engine, disk, request, next, completions);
        }
        let Some(ring) = &mut self.ring else { unreachable!("just made") };
        match next {
            Next::Aligned(work, aligned) => ring.push_aligned(request, work, aligned),
            Next::Sync => {
                if let Some(first) = self.turn.join(request) {
                    ring.push(first, Work::SyncData, 0);
                }
            }
            Next::Done(_) | Next::Blocked | Next::Offload(_) | Next::Ring(..) => {
                unreachable!("dealt with above")
            }
        }
    }

    /// Makes the ring, if there is none yet. Whether there is one now.
    fn make_ring(&mut self, engine: &Engine, disk: &Disk) -> bool {
        if self.ring.is_none() && self.may_have_ring {
            let sync = self.sync.as_ref().unwrap_or(disk.own_sync());
            self.ring = engine.ring(disk.image(), sync, self.index);
            self.may_have_ring = self.ring.is_some();
        }
        self.ring.is_some()
    }

    #[inline]
    fn begin(&mut self, engine: &Engine, disk: &Disk, request: &Request) -> Next {
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
        if op != Op::Flush && !disk.is_of_blocks(request) {
            // As a disk that has no smaller ones.
            return Next::Done(Status::IoError);
        }
        match op {
            Op::Read | Op::Write if disk.image().is_in_memory() => {
                Next::Done(self.serve(disk, request))
            }
            Op::Read if !disk.takes(request, disk.alignment()) => {
                self.begin_aligned(engine, disk, request)
            }
            Op::Read => self.begin_read(disk, request),
            Op::Flush if disk.image().is_in_memory() => Next::Done(self.serve(disk, request)),
            Op::Flush => match disk.check_storage() {
                Ok(()) => {
                    disk.image().follow_alignment();
                    Next::Sync
                }
                Err(error) => Next::Done(disk.failed(request, &error)),
            },
            Op::Discard if disk.image().device_sector().is_some() => {
                // What is less than a sector cannot be given back.
                disk.discarded(request).map_or(Next::Done(Status::Ok), Next::Offload)
            }
            Op::Discard if !disk.can_punch_hole() => Next::Done(Status::Unsupported),
            Op::Write | Op::Discard | Op::WriteZeroes { .. } => {
                self.begin_change(engine, disk, request, op)
            }
        }
    }

    /// A change: with its range to itself, where that is needed.
    #[inline]
    fn begin_change(&mut self, engine: &Engine, disk: &Disk, request: &Request, op: Op) -> Next {
        let alignment = disk.alignment();
        if Disk::takes_ranges(alignment) && !self.take_range(disk, request, alignment) {
            return Next::Blocked;
        }
        match op {
            Op::Write if !disk.takes(request, alignment) => {
                self.begin_aligned(engine, disk, request)
            }
            Op::Write => self.begin_write(disk, request),
            Op::Discard => Next::Ring(Work::PunchHole, 0),
            Op::WriteZeroes { may_unmap: true } if disk.can_punch_hole() => {
                Next::Ring(Work::PunchHole, 0)
            }
            _ if disk.can_zero_range() => Next::Ring(Work::ZeroRange, 0),
            _ => self.write_zeros(engine, disk, request),
        }
    }

    #[inline]
    fn begin_read(&mut self, disk: &Disk, request: &Request) -> Next {
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
        if disk.image().mode().direct {
            return Next::Ring(Work::Write { durable: is_durable(disk) }, 0);
        }
        if !self.writes.worth_trying() {
            return Next::Ring(Work::Write { durable: false }, 0);
        }
        // Few file systems can say beforehand whether a write into the page cache would wait (ext4
        // cannot), so the clock tells afterwards.
        let started = Instant::now();
        let result = file_io::write_at(disk.image().file(), request.offset(), &request.buffer());
        self.writes.took(started.elapsed());
        match result {
            Ok(()) if disk.is_write_through() => Next::Sync,
            result => Next::Done(disk.status(request, result)),
        }
    }

    /// Takes the range of a request, if it is free.
    #[cold]
    fn take_range(&mut self, disk: &Disk, request: &Request, alignment: u64) -> bool {
        let range = edges::hull(request, alignment);
        let taken = disk.ranges().try_take(&range, disk.may_have_plain(), self.index);
        if taken {
            self.held.push((request.id().tag, range));
        }
        taken
    }

    /// The range that a request has to itself, or that it is read from.
    fn range(&self, disk: &Disk, request: &Request) -> Range<u64> {
        let held = self.held.iter().find(|(tag, _)| *tag == request.id().tag);
        held.map_or_else(|| edges::hull(request, disk.alignment()), |(_, range)| range.clone())
    }

    /// A read, or a write that has its range if it needs one, which the kernel does not take as it
    /// is.
    #[cold]
    fn begin_aligned(&mut self, engine: &Engine, disk: &Disk, request: &Request) -> Next {
        if !self.make_ring(engine, disk) {
            if !self.held.is_empty() {
                self.give_back(disk, request);
            }
            return Next::Done(self.serve(disk, request));
        }
        let range = self.range(disk, request);
        let len = range.end - range.start;
        let reads = request.op() == Some(Op::Read);
        let (head, tail) =
            (request.offset() > range.start, request.offset() + request.len() < range.end);
        disk.count_unaligned(!reads && (head || tail));
        if reads {
            if len > MOST_ALIGNED {
                let result = disk.read_bounced(&mut self.bounce, request);
                return Next::Done(disk.status(request, result));
            }
            return Next::Aligned(
                Work::ReadAligned,
                Box::new(Aligned::new(range.start, len as usize)),
            );
        }
        // The one that the range was made with, or a smaller one, which serves as well.
        let alignment = disk.alignment().min(len);
        let end = request.offset() + request.len();
        if len > MOST_ALIGNED || disk.partial_block(end, alignment).is_some() {
            let sync = self.sync.as_ref().unwrap_or(disk.own_sync());
            let result = disk.write_bounced(&mut self.bounce, sync, request, alignment);
            return self.bounced(engine, disk, request, alignment, result);
        }
        let (mut aligned, len) = (Box::new(Aligned::new(range.start, len as usize)), len as usize);
        let block = alignment as usize;
        match (head, tail) {
            (false, false) => return fill_and_write(disk, request, aligned),
            // Both blocks at once, where they are neighbours.
            _ if len <= 2 * block => {}
            (true, _) => aligned.set_window(0..block),
            (false, true) => aligned.set_window(len - block..len),
        }
        Next::Aligned(Work::ReadAligned, aligned)
    }

    /// How a change has ended that the worker has made by way of the bounce buffer.
    fn bounced(
        &mut self,
        engine: &Engine,
        disk: &Disk,
        request: &Request,
        alignment: u64,
        result: io::Result<()>,
    ) -> Next {
        match result {
            Err(error) if disk.asks_for_more(&error, alignment) => {
                if !self.held.is_empty() {
                    self.give_back(disk, request);
                }
                self.begin(engine, disk, request)
            }
            result => Next::Done(disk.status(request, result)),
        }
    }

    /// What follows when a piece of a request that does not fit has been moved.
    #[cold]
    fn moved(
        &mut self,
        disk: &Disk,
        request: &Request,
        work: Work,
        mut aligned: Box<Aligned>,
    ) -> Next {
        let from = (request.offset() - aligned.offset()) as usize;
        let (to, len) = (from + request.len() as usize, aligned.bytes().len());
        if matches!(work, Work::WriteAligned { .. }) {
            let durable = matches!(work, Work::WriteAligned { durable: true });
            return if disk.is_write_through() && !durable {
                Next::Sync
            } else {
                Next::Done(Status::Ok)
            };
        }
        let window = aligned.window();
        if request.op() == Some(Op::Read) {
            if aligned.moved() < to {
                return Next::Done(disk.failed(request, &io::ErrorKind::UnexpectedEof.into()));
            }
            request.buffer().copy_from_slice(0, &aligned.bytes()[from..to]);
            return Next::Done(Status::Ok);
        }
        if aligned.moved() < window.len() {
            return Next::Done(disk.failed(request, &io::ErrorKind::UnexpectedEof.into()));
        }
        // The first block has been read, and the last one is still to come.
        if window.start == 0 && window.end < len && to < len {
            aligned.set_window(len - window.end..len);
            return Next::Aligned(Work::ReadAligned, aligned);
        }
        fill_and_write(disk, request, aligned)
    }

    /// Zeros by writing them, of a request that has its range to itself if it has edges.
    fn write_zeros(&mut self, engine: &Engine, disk: &Disk, request: &Request) -> Next {
        let range = self.range(disk, request);
        let alignment = disk.alignment().min(range.end - range.start);
        if !edges::has_edges(request, alignment) {
            return Next::Ring(Work::WriteZeros, 0);
        }
        disk.count_unaligned(true);
        let sync = self.sync.as_ref().unwrap_or(disk.own_sync());
        let result = disk.zero_bounced(&mut self.bounce, sync, request, alignment);
        self.bounced(engine, disk, request, alignment, result)
    }

    /// What follows when the ring is done with `work`.
    fn ended(
        &mut self,
        engine: &Engine,
        disk: &Disk,
        request: &Request,
        work: Work,
        aligned: Option<Box<Aligned>>,
        result: io::Result<()>,
    ) -> Next {
        let op = request.op();
        let error = match (result, aligned) {
            (Ok(()), Some(aligned)) => return self.moved(disk, request, work, aligned),
            (Ok(()), None) => {
                let covered = matches!(work, Work::Write { durable: true });
                let writes = matches!(op, Some(Op::Write | Op::WriteZeroes { .. }));
                return if writes && !covered && disk.is_write_through() {
                    Next::Sync
                } else {
                    Next::Done(Status::Ok)
                };
            }
            (Err(error), aligned) if is_transfer(work) => {
                return self.refused(engine, disk, request, work, aligned, &error);
            }
            (Err(error), _) => error,
        };
        let cannot = disk.cannot(work, &error);
        match work {
            // A hint, but one that was not taken is not answered well.
            Work::PunchHole if cannot && op == Some(Op::Discard) => Next::Done(Status::Unsupported),
            Work::PunchHole if cannot && disk.can_zero_range() => Next::Ring(Work::ZeroRange, 0),
            Work::PunchHole | Work::ZeroRange if cannot => self.write_zeros(engine, disk, request),
            _ => Next::Done(disk.failed(request, &error)),
        }
    }

    /// What follows when data could not be moved: once more, if the kernel did not like the guest's
    /// memory, or the storage asks for more than it did.
    #[cold]
    fn refused(
        &mut self,
        engine: &Engine,
        disk: &Disk,
        request: &Request,
        work: Work,
        aligned: Option<Box<Aligned>>,
        error: &io::Error,
    ) -> Next {
        let had_range = self.holds(request);
        // What it was carried out on: the memory that it had, its range, or itself.
        let made_with = match &aligned {
            Some(aligned) => aligned.offset()..aligned.offset() + aligned.bytes().len() as u64,
            None if had_range => self.range(disk, request),
            None => edges::hull(request, SMALLEST),
        };
        if disk.asks_for_more(error, SMALLEST) {
            let lacks_range = is_change(work) && !had_range;
            if edges::hull(request, disk.alignment()) != made_with || lacks_range {
                if had_range {
                    self.give_back(disk, request);
                }
                return self.begin(engine, disk, request);
            }
        }
        if disk.is_misaligned(error) && aligned.is_none() && work != Work::WriteZeros {
            return self.begin_aligned(engine, disk, request);
        }
        Next::Done(disk.failed(request, error))
    }

    /// A sync has ended, for the request that it went with and all that ride on it.
    fn synced(
        &mut self,
        disk: &Disk,
        request: Request,
        work: Work,
        result: io::Result<()>,
        completions: &mut Completions<'_>,
    ) {
        if work == Work::SyncData && result.is_ok() && !disk.is_witnessed() {
            return self.ask_witness(disk, request, completions);
        }
        if work == Work::SyncWitness {
            // What it has said is kept before the next one asks.
            let result = disk.sync_ended(result);
            if result.is_ok() {
                disk.set_witnessed();
            }
            disk.ranges().give_back(&edges::WITNESS);
            return self.conclude(disk, request, result, completions);
        }
        self.conclude(disk, request, result, completions);
    }

    /// Has the witness asked, by one queue at a time: of two the one would be told, and the other
    /// answer well.
    #[cold]
    fn ask_witness(&mut self, disk: &Disk, request: Request, completions: &mut Completions<'_>) {
        if disk.is_witnessed() {
            return self.conclude(disk, request, Ok(()), completions);
        }
        if !disk.ranges().try_take(&edges::WITNESS, false, self.index) {
            self.unwitnessed = Some(request);
            return;
        }
        let Some(ring) = &mut self.ring else { unreachable!("its sync has ended there") };
        ring.push(request, Work::SyncWitness, 0);
    }

    /// Answers a request whose sync has ended, and all that ride on it; begins the next one.
    fn conclude(
        &mut self,
        disk: &Disk,
        request: Request,
        result: io::Result<()>,
        completions: &mut Completions<'_>,
    ) {
        let given_up = result.as_ref().is_err_and(is_cancelled);
        let outcome = disk.sync_ended(result);
        let mut served = self.turn.riders();
        served.push(request);
        loop {
            for request in served.drain(..) {
                let status = match &outcome {
                    Ok(()) => Status::Ok,
                    Err(error) => disk.failed(&request, error),
                };
                self.done(disk, request, status, completions);
            }
            let Some(first) = self.turn.next() else { return };
            if given_up {
                // All that was in flight was to be given up.
                served = self.turn.riders();
                served.push(first);
                continue;
            }
            let Some(ring) = &mut self.ring else { unreachable!("it has ended there") };
            return ring.push(first, Work::SyncData, 0);
        }
    }
}

/// Whether it moves data.
const fn is_transfer(work: Work) -> bool {
    matches!(
        work,
        Work::Read
            | Work::Write { .. }
            | Work::WriteZeros
            | Work::ReadAligned
            | Work::WriteAligned { .. }
    )
}

/// Whether it changes what is in the file from where the guest has it, and may do so without a
/// range.
const fn is_change(work: Work) -> bool {
    matches!(
        work,
        Work::Write { .. }
            | Work::WriteAligned { .. }
            | Work::WriteZeros
            | Work::PunchHole
            | Work::ZeroRange
    )
}

/// Whether a direct write is to be durable by itself.
fn is_durable(disk: &Disk) -> bool {
    disk.image().writes_durably() && disk.is_write_through()
}

/// Puts the guest's data between the edges, and writes all of it.
fn fill_and_write(disk: &Disk, request: &Request, mut aligned: Box<Aligned>) -> Next {
    let from = (request.offset() - aligned.offset()) as usize;
    let (to, len) = (from + request.len() as usize, aligned.bytes().len());
    request.buffer().copy_to_slice(0, &mut aligned.bytes_mut()[from..to]);
    aligned.set_window(0..len);
    Next::Aligned(Work::WriteAligned { durable: is_durable(disk) }, aligned)
}
