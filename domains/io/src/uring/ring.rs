//! The ring itself, and one that nothing has begun yet.

use super::end::EndWatch;
use super::in_flight::{InFlight, Progress, Work, Zeros};
use crate::aligned::Aligned;
use domain_api::Request;
use io_uring::{IoUring, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

/// Most entries of the submission queue.
const MAX_SUBMISSIONS: usize = 256;
/// How many requests wait for each other before they are submitted: enough to share a system call,
/// few enough that a slow device starts on the first of a deep queue while the rest is being
/// prepared. What answers within the call gains nothing from that: once completions wait to be
/// taken, the rest is submitted together.
const AT_ONCE: usize = 4;
/// What the completion of a cancellation is called; requests are called by their slots.
const CANCELLATION: u64 = u64::MAX;
/// Where the files are that a ring holds and does not use.
const HELD_AT: u32 = 4;
/// How many there can be.
const MOST_HELD: usize = 2;
/// How long a dropped ring waits for the kernel.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// A request that has ended.
#[derive(Debug)]
#[must_use = "the request in it must be completed"]
pub struct Ended {
    /// The request, ours again.
    pub request: Request,
    /// What was done with it.
    pub work: Work,
    /// The memory that the work was about, where that was not the request's own.
    pub aligned: Option<Box<Aligned>>,
    /// How that went. [`io::ErrorKind::UnexpectedEof`] and [`io::ErrorKind::WriteZero`] say that
    /// there was less of the file than of the buffer.
    pub result: io::Result<()>,
}

/// The descriptors of one file that a ring uses.
#[derive(Debug, Clone, Copy)]
pub struct Files<'a> {
    /// For data.
    pub image: &'a File,
    /// For [`Work::SyncData`]: best another open file description, because each is told once of a
    /// write-back that failed.
    pub sync: &'a File,
    /// For [`Work::SyncWitness`]: one that is told of what others were told of.
    pub witness: &'a File,
}

/// A ring that does nothing yet and belongs to no thread.
pub struct PreparedRing {
    /// Taken by the ring that begins, as is the next one.
    io: Option<IoUring>,
    end: Option<EndWatch>,
    depth: usize,
}

impl std::fmt::Debug for PreparedRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedRing").field("depth", &self.depth).finish_non_exhaustive()
    }
}

impl PreparedRing {
    /// A ring for a file with room for `depth` requests.
    ///
    /// # Errors
    /// What the kernel says: it has no io_uring, does not allow it, or is too old (5.11); or there
    /// is no memory or descriptor left.
    ///
    /// # Panics
    /// If `depth` is 0 or more than 16384.
    pub fn new(files: Files<'_>, depth: usize) -> io::Result<Self> {
        assert!((1..=1 << 14).contains(&depth), "a ring for {depth} requests");
        let io = build(depth)?;
        let (end, dying) = EndWatch::new()?;
        // In the order that `in_flight` has.
        let Files { image, sync, witness } = files;
        let files = [image, sync, witness].map(File::as_raw_fd);
        let mut all = [-1; HELD_AT as usize + MOST_HELD];
        all[..3].copy_from_slice(&files);
        all[3] = dying.as_raw_fd();
        io.submitter().register_files(&all)?;
        Ok(Self { io: Some(io), end: Some(end), depth })
    }

    /// Makes it the calling thread's. Completions are written to the eventfd `wake`. What is
    /// `held`, two at most, stays open until the kernel has no request of this ring any more, also
    /// if the process is gone by then.
    ///
    /// # Errors
    /// What the kernel says.
    ///
    /// # Panics
    /// If more is to be held.
    pub fn begin(mut self, wake: OwnedFd, held: &[&File]) -> io::Result<Ring> {
        assert!(held.len() <= MOST_HELD, "{held:?}");
        let io = self.io.as_ref().expect("there until it begins");
        let submitter = io.submitter();
        submitter.register_eventfd(wake.as_raw_fd())?;
        let modern = io.params().is_setup_single_issuer();
        if modern {
            submitter.register_enable_rings()?;
        }
        if !held.is_empty() {
            let held: Vec<_> = held.iter().map(|file| file.as_raw_fd()).collect();
            if submitter.register_files_update(HELD_AT, &held)? != held.len() {
                return Err(io::Error::other("the kernel does not hold all files"));
            }
        }
        let (io, end) = (self.io.take(), self.end.take());
        Ok(Ring {
            can_be_quiet: cfg!(target_arch = "x86_64") && modern,
            io: ManuallyDrop::new(io.expect("looked at just above")),
            depth: self.depth,
            slots: Vec::with_capacity(self.depth),
            free: Vec::with_capacity(self.depth),
            zeros: Zeros::default(),
            wake,
            end: end.expect("taken together with it"),
            released: false,
            quiet: false,
            cancelling: false,
        })
    }
}

impl Drop for PreparedRing {
    fn drop(&mut self) {
        if let Some(io) = &self.io {
            // As in `Ring::release_files`. It belongs to no thread yet, so any may do this.
            let _ = io.submitter().unregister_files();
        }
    }
}

/// A ring for one file, one queue, one thread.
pub struct Ring {
    /// Dropped by hand, because closing it comes before anything that the kernel may use is freed.
    io: ManuallyDrop<IoUring>,
    /// Requests that it has room for.
    depth: usize,
    /// By slot. As many as there have been at a time, because memory that was never touched costs
    /// nothing, and at most `depth`. What the kernel is told of is behind pointers.
    slots: Vec<Option<InFlight>>,
    /// Slots that are empty.
    free: Vec<u32>,
    zeros: Zeros,
    wake: OwnedFd,
    end: EndWatch,
    /// The kernel has let go of the files.
    released: bool,
    /// Whether wake-ups can be off; see the module's text.
    can_be_quiet: bool,
    quiet: bool,
    /// A cancellation is under way; one at a time, so that there is always room for its completion.
    cancelling: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring for a file with room for `depth` requests, whose completions are written to the
    /// eventfd `wake`. The calling thread's.
    ///
    /// # Errors
    /// As for [`PreparedRing::new`].
    ///
    /// # Panics
    /// As for [`PreparedRing::new`].
    pub fn new(files: Files<'_>, wake: OwnedFd, depth: usize) -> io::Result<Self> {
        PreparedRing::new(files, depth)?.begin(wake, &[])
    }

    /// Has the kernel let go of the ring's files, on the thread that began the ring. Nothing can be
    /// pushed any more. Without this it lets go of them some 50 ms after the ring was closed, even
    /// if the process is gone by then, and their file system is busy until it has.
    ///
    /// # Panics
    /// If something is in flight.
    pub fn release_files(&mut self) {
        assert_eq!(self.in_flight(), 0, "requests use the files");
        // Fails where another thread began the ring; then they go when the ring does.
        self.released = self.io.submitter().unregister_files().is_ok();
    }

    /// Whether a ring can be made here at all.
    ///
    /// # Errors
    /// As for [`PreparedRing::new`].
    pub fn probe() -> io::Result<()> {
        build(1).map(drop)
    }

    /// How many requests it has room for.
    #[must_use]
    pub const fn depth(&self) -> usize {
        self.depth
    }

    /// How many requests are in the ring.
    #[must_use]
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether another one can be pushed.
    #[must_use]
    #[inline]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty() || self.slots.len() < self.depth
    }

    /// Puts a request into the ring, to have `work` done from its byte `done` on. It is submitted
    /// with a few others, by [`advance`](Self::advance) at the latest, which must be called before
    /// the worker sleeps: wake-ups may be off until then.
    ///
    /// # Panics
    /// If there is no room.
    #[inline]
    pub fn push(&mut self, request: Request, work: Work, done: u64) {
        self.put(InFlight::new(request, work, done, None));
    }

    /// As [`push`](Self::push), to move data between the file and memory that is not the request's:
    /// `work` is [`Work::ReadAligned`] or [`Work::WriteAligned`], and is about the
    /// [window](Aligned::set_window) of `aligned`.
    ///
    /// # Panics
    /// If there is no room.
    pub fn push_aligned(&mut self, request: Request, work: Work, aligned: Box<Aligned>) {
        self.put(InFlight::new(request, work, 0, Some(aligned)));
    }

    #[inline]
    fn put(&mut self, one: InFlight) {
        assert!(self.has_room(), "has_room was asked before");
        debug_assert!(!self.released, "a ring whose files are released");
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        });
        self.slots[slot as usize] = Some(one);
        self.queue(slot);
        if self.io.submission().len() >= AT_ONCE && self.io.completion().is_empty() {
            self.be_quiet();
            // What the kernel cannot take now stays queued, for `advance`.
            let _ = self.enter();
        }
    }

    /// Asks the kernel to give up what is in flight, as far as it can: what waits for a thread or a
    /// condition, not what a disk is doing. Requests end as ever, and those that were given up end
    /// with `ECANCELED`.
    pub fn cancel(&mut self) {
        if self.in_flight() == 0 || self.cancelling {
            return;
        }
        self.cancelling = true;
        self.slots.iter_mut().flatten().for_each(InFlight::give_up);
        let all = opcode::AsyncCancel2::new(types::CancelBuilder::any().all());
        // SAFETY: the entry names no memory.
        unsafe { self.enqueue(&all.build().user_data(CANCELLATION)) };
    }

    /// Submits what was pushed, and takes out a request that has ended. Never waits.
    ///
    /// Call it until it returns `None`: only then the next completion is sure to wake the worker.
    #[inline]
    pub fn advance(&mut self) -> Option<Ended> {
        // Whether the kernel was called for completions alone.
        let mut called = false;
        loop {
            if let Some(ended) = self.take() {
                return Some(ended);
            }
            if self.io.submission().is_empty() {
                if !self.kernel_announces() {
                    if self.be_loud() {
                        continue;
                    }
                    return None;
                }
                if called {
                    self.be_loud();
                    if !self.kernel_has_some() {
                        return None;
                    }
                }
                called = true;
            }
            self.be_quiet();
            if !self.enter() {
                self.be_loud();
                // Nothing may ever complete to bring us back: we come back by ourselves.
                self.nudge();
                return None;
            }
        }
    }

    /// Takes completions off the queue until one ends a request.
    #[inline]
    fn take(&mut self) -> Option<Ended> {
        loop {
            let entry = self.io.completion().next()?;
            if entry.user_data() == CANCELLATION {
                // How many it found, or that this kernel cannot; either way the requests end by
                // themselves.
                self.cancelling = false;
                continue;
            }
            let slot = entry.user_data() as usize;
            let one = self.slots[slot].as_mut().expect("the kernel completes what is in flight");
            match one.progress(entry.result()) {
                Progress::More => self.queue(slot as u32),
                Progress::Ended(result) => {
                    let InFlight { request, work, aligned, .. } =
                        self.slots[slot].take().expect("looked at just above");
                    self.free.push(slot as u32);
                    return Some(Ended { request, work, aligned, result });
                }
            }
        }
    }

    /// Queues what is left to do of a request.
    #[inline]
    fn queue(&mut self, slot: u32) {
        let one = self.slots[slot as usize].as_mut().expect("one that was just put there, or kept");
        let entry = one.entry(&mut self.zeros).user_data(u64::from(slot));
        // SAFETY: what the entry names is guest memory that stays until the request has been
        // completed (RawSegment::new), which its owner can do only after `take` has given it back;
        // lists of segments of the host's, which stay as long (RawRequest::new), or of the slot's
        // own, which is freed by `take`, as its `Aligned` memory is given away only there; and the
        // zeros. `drop` frees none of the latter before the kernel is done with all of it.
        unsafe { self.enqueue(&entry) };
    }

    /// # Safety
    /// The memory that `entry` names is valid until it has completed or the kernel is done with
    /// this ring.
    unsafe fn enqueue(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's contract.
        while unsafe { self.io.submission().push(entry) }.is_err() {
            self.be_quiet();
            if !self.enter() {
                // The kernel is out of memory and the queue is full. There is room in the table for
                // what cannot be queued, but nowhere to remember it; the kernel's shortage passes.
                std::thread::yield_now();
            }
        }
    }

    /// Whether the kernel has said that it has completions, which it hands over only when it is
    /// called.
    #[inline]
    fn kernel_announces(&mut self) -> bool {
        let submissions = self.io.submission();
        submissions.taskrun() || submissions.cq_overflow()
    }

    /// Whether it has any.
    #[cold]
    fn kernel_has_some(&self) -> bool {
        let mut watched =
            libc::pollfd { fd: self.io.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid structure. An error, which there is no reason for, is taken for a yes.
        (unsafe { libc::poll(&raw mut watched, 1, 0) }) != 0
    }

    /// Calls the kernel. Returns `false` if it can take nothing now.
    fn enter(&mut self) -> bool {
        match self.io.submit() {
            Ok(_) => true,
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => true,
                // No memory for requests, or completions to be taken off first.
                Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => !self.io.completion().is_empty(),
                _ => panic!("io_uring: {error}"),
            },
        }
    }

    /// Turns wake-ups off, where that is safe.
    #[inline]
    fn be_quiet(&mut self) {
        if self.can_be_quiet && !self.quiet {
            self.quiet = true;
            self.io.completion().disable_eventfd();
        }
    }

    /// Turns wake-ups on. Returns whether something has come meanwhile that may not have caused
    /// one.
    #[inline]
    fn be_loud(&mut self) -> bool {
        if !self.quiet {
            return false;
        }
        self.quiet = false;
        self.io.completion().enable_eventfd();
        // Pairs with the kernel's barrier between setting IORING_SQ_TASKRUN and looking at what was
        // just turned on.
        fence(Ordering::SeqCst);
        self.io.submission().taskrun() || !self.io.completion().is_empty()
    }

    /// Wakes the worker ourselves.
    fn nudge(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes and an open descriptor. It fails only if the counter is
        // full, and then the worker is awake.
        let _ = unsafe { libc::write(self.wake.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: dropped here only, and not used again.
        unsafe { ManuallyDrop::drop(&mut self.io) };
        let in_flight = self.in_flight();
        if in_flight == 0 {
            return;
        }
        // A host that destroys an instance whose requests have not ended relies on this: afterwards
        // nothing writes to guest memory any more.
        if self.end.wait(END_TIMEOUT) {
            return;
        }
        std::mem::forget(std::mem::take(&mut self.slots));
        std::mem::forget(std::mem::take(&mut self.zeros));
        if !std::thread::panicking() {
            // Not quietly: a host that thinks that these requests are over would run them again.
            panic!(
                "the kernel still has {in_flight} requests {} s after their ring was closed",
                END_TIMEOUT.as_secs()
            );
        }
    }
}

/// Makes a ring as the kernel can; one that is single-issuer is no thread's yet.
fn build(depth: usize) -> io::Result<IoUring> {
    let entries = depth.min(MAX_SUBMISSIONS) as u32;
    // Room for everything that can be in flight and a cancellation, so that it never overflows.
    let completions = (depth as u32 + 1).max(entries).next_power_of_two();
    let modern = IoUring::builder()
        .setup_cqsize(completions)
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_r_disabled()
        .build(entries);
    let io = match modern {
        // Linux before 6.1.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_cqsize(completions).build(entries)?
        }
        other => other?,
    };
    let params = io.params();
    // With these came everything else that is used here, but for cancelling.
    if params.is_feature_submit_stable()
        && params.is_feature_nodrop()
        && params.is_feature_ext_arg()
    {
        Ok(io)
    } else {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring is too old"))
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
