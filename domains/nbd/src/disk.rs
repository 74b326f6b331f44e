//! The disk: what each request maps to, and what becomes of errors.

use crate::job::{Job, Work};
use crate::pool::Pool;
use crate::port::NbdPort;
use domain_api::{Host, Level, Op, QueueIndex, Request, Status};
use domain_io::engine::{AfterSync, Backend, Opens, QueueState, Shared, is_cancelled, ranges};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

type Step = domain_io::engine::Step<Job>;

/// How long turning the write cache off waits for a server; its caller holds up a frontend.
const DURABLE_WITHIN: Duration = Duration::from_secs(5);

/// An export as a disk.
#[derive(Debug)]
pub struct Disk {
    host: Host,
    shared: Shared,
    pool: Arc<Pool>,
    /// Each write is durable before it completes.
    write_through: AtomicBool,
}

impl Disk {
    pub(crate) fn new(host: Host, pool: Arc<Pool>) -> Self {
        Self { host, shared: Shared::new(host), pool, write_through: AtomicBool::new(false) }
    }

    pub(crate) const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    pub(crate) fn set_write_cache(&self, on: bool) {
        // SeqCst here and in `ended`: either a write that ends now sees the flag, or the flush that
        // is asked for now sees the write.
        self.write_through.store(!on, Ordering::SeqCst);
        if on || !self.pool.told().flush {
            return;
        }
        // From now on nothing is volatile, and what was is durable when this comes back. An
        // instance that is not activated yet, or hands the disk on, has it sent as soon as it
        // serves.
        let pool = &self.pool;
        let number = pool.want_flush();
        let is_in_vain =
            || pool.resting.load(Ordering::Relaxed) || pool.ending.load(Ordering::Relaxed);
        if !pool.own_flush.wait(number, DURABLE_WITHIN, is_in_vain) && !is_in_vain() {
            let line = format!(
                "the write cache was turned off, and {} has not answered the flush for it in {} s: what was \
                 written before may not be durable until it does",
                pool.target,
                DURABLE_WITHIN.as_secs()
            );
            self.host.log(Level::Error, &line);
        }
    }

    /// Fails if what was written may be lost, as any instance has found.
    fn check_storage(&self) -> io::Result<()> {
        if self.host.storage().failure().is_none() {
            return Ok(());
        }
        Err(io::Error::other(
            "the server has failed to write data back before, and what was lost then stays lost",
        ))
    }
}

impl Backend for Disk {
    type Port = NbdPort;
    type Local = ();

    #[inline]
    fn shared(&self) -> &Shared {
        &self.shared
    }

    fn opens(&self) -> Opens {
        Opens::AtOnce
    }

    fn local(&self, _: QueueIndex) {}

    fn open(&self, (): &(), queue: QueueIndex) -> Option<NbdPort> {
        Some(NbdPort::open(&self.pool, queue))
    }

    #[inline]
    fn begin(&self, _: &mut QueueState<Self>, request: &Request) -> Step {
        let Some(op) = request.op() else { return Step::Done(Status::Unsupported) };
        let announced = self.pool.told();
        if op == Op::Flush {
            if !announced.flush {
                // The operator has said that the data may be lost, or nothing is written.
                return Step::Done(Status::Ok);
            }
            return match self.check_storage() {
                Ok(()) => Step::Sync,
                Err(error) => Step::Done(self.shared.failed(request, &error)),
            };
        }
        // A disk with larger blocks has no smaller ones.
        if op != Op::Read && announced.read_only
            || ranges::has_edges(request, u64::from(announced.block_size))
        {
            return Step::Done(Status::IoError);
        }
        if request.is_empty() {
            return Step::Done(Status::Ok);
        }
        let work = match op {
            Op::Read => Work::Read,
            Op::Write => Work::Write,
            Op::Discard if announced.discard => Work::Trim,
            Op::WriteZeroes { may_unmap } if announced.write_zeroes => Work::Zeroes { may_unmap },
            Op::Discard | Op::WriteZeroes { .. } | Op::Flush => {
                return Step::Done(Status::Unsupported);
            }
        };
        Step::Push(Job::new(work))
    }

    #[inline]
    fn ended(
        &self,
        _: &mut QueueState<Self>,
        request: &Request,
        job: Job,
        result: io::Result<()>,
    ) -> Step {
        let is_written = matches!(job.work, Work::Write | Work::Zeroes { .. });
        // A server that announces no flush is asked for none: it may answer with an error.
        let syncs = is_written && self.pool.told().flush;
        match result {
            Ok(()) if syncs && self.write_through.load(Ordering::SeqCst) => Step::Sync,
            Ok(()) => Step::Done(Status::Ok),
            Err(error) => Step::Done(self.shared.failed(request, &error)),
        }
    }

    fn serve(&self, (): &mut (), request: &Request) -> Status {
        // There is always a port.
        self.shared.failed(request, &io::ErrorKind::Unsupported.into())
    }

    fn sync_job(&self) -> Job {
        Job::new(Work::Flush)
    }

    fn synced(&self, _: Job, result: io::Result<()>) -> AfterSync<Job> {
        // Only what a server has answered has a number. Which one says little: a full disk or a
        // quota may be the reason, and many errors come as EINVAL.
        if let Err(error) = &result
            && error.raw_os_error().is_some()
            && !is_cancelled(error)
        {
            self.pool.flush_failed();
        }
        AfterSync::Done(result.and_then(|()| self.check_storage()))
    }
}
