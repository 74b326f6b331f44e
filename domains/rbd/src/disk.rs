//! The disk: what each request maps to, and what becomes of errors.

use crate::port::{Job, RbdPort};
use domain_api::{Host, Image, Op, QueueIndex, Request, Status};
use domain_io::engine::{AfterSync, Backend, JobKind, Opens, QueueState, Shared};
use std::io;

type Step = domain_io::engine::Step<Job>;

const ENOSPC: i32 = 28;
/// The client was locked out of the cluster.
const ESHUTDOWN: i32 = 108;
const EDQUOT: i32 = 122;

/// An image as a disk.
#[derive(Debug)]
pub struct Disk {
    shared: Shared,
    image: Image,
    read_only: bool,
}

impl Disk {
    pub(crate) fn new(host: Host, image: Image, read_only: bool) -> Self {
        Self { shared: Shared::new(host), image, read_only }
    }

    /// What the operator is to hear of an error.
    ///
    /// # Panics
    /// If the image is another's now: this instance has come to its end, and so has each other one
    /// that has the same handle.
    fn explained(error: io::Error) -> io::Error {
        match error.raw_os_error() {
            Some(ESHUTDOWN) => panic!(
                "the lock of the image was broken, so another program may use it; nothing more is written. If it is to be this daemon's again, upgrade to the same domain"
            ),
            Some(ENOSPC | EDQUOT) => io::Error::other(
                "the pool is full: make room in the cluster, or raise the pool's quota (`ceph osd pool set-quota`)",
            ),
            _ => error,
        }
    }
}

impl Backend for Disk {
    type Port = RbdPort;
    type Local = ();

    #[inline]
    fn shared(&self) -> &Shared {
        &self.shared
    }

    fn opens(&self) -> Opens {
        Opens::AtOnce
    }

    fn local(&self, _: QueueIndex) {}

    fn open(&self, (): &(), queue: QueueIndex) -> Option<RbdPort> {
        Some(RbdPort::open(self.image, queue))
    }

    #[inline]
    fn begin(&self, _: &mut QueueState<Self>, request: &Request) -> Step {
        let kind = match request.op() {
            Some(Op::Flush) => return Step::Sync,
            Some(Op::Read) => JobKind::Other,
            Some(Op::Write | Op::Discard | Op::WriteZeroes { .. }) if self.read_only => {
                return Step::Done(Status::IoError);
            }
            Some(Op::Write | Op::Discard | Op::WriteZeroes { .. }) => JobKind::Change,
            None => return Step::Done(Status::Unsupported),
        };
        if request.is_empty() { Step::Done(Status::Ok) } else { Step::Push(Job { kind }) }
    }

    #[inline]
    fn ended(
        &self,
        _: &mut QueueState<Self>,
        request: &Request,
        _: Job,
        result: io::Result<()>,
    ) -> Step {
        match result {
            Ok(()) => Step::Done(Status::Ok),
            Err(error) => Step::Done(self.shared.failed(request, &Self::explained(error))),
        }
    }

    fn serve(&self, (): &mut (), request: &Request) -> Status {
        // There is always a port.
        self.shared.failed(request, &io::ErrorKind::Unsupported.into())
    }

    fn sync_job(&self) -> Job {
        Job { kind: JobKind::Sync }
    }

    fn synced(&self, _: Job, result: io::Result<()>) -> AfterSync<Job> {
        AfterSync::Done(result.map_err(Self::explained))
    }
}
