//! What neither the ring nor a worker should do: a device's discard.
//!
//! It is an ioctl, which may take as long as the device likes, and a worker has a guest to serve.
//! So a thread of the host's does it, made when the first one comes.

use domain_api::{Host, QueueIndex, Request};
use domain_io::file_io;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A discard that has been carried out.
pub(crate) type Done = (Request, io::Result<()>);

struct Job {
    queue: QueueIndex,
    request: Request,
    range: Range<u64>,
}

#[derive(Default)]
struct Inner {
    jobs: VecDeque<Job>,
    done: Vec<(QueueIndex, Done)>,
    started: bool,
    ending: bool,
}

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// The thread, and what is to be done.
pub(crate) struct Offload {
    host: Host,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Offload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offload").finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, host: Host, file: &File) {
        let mut inner = self.lock();
        while !inner.ending {
            let Some(Job { queue, request, range }) = inner.jobs.pop_front() else {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(inner);
            let result = file_io::discard_device(file, range.start, range.end - range.start);
            inner = self.lock();
            inner.done.push((queue, (request, result)));
            host.notify(queue);
        }
    }
}

impl Offload {
    pub(crate) fn new(host: Host) -> Self {
        Self { host, shared: Arc::default() }
    }

    /// Has `range` of the device `file` discarded for `request`, and `queue` notified of its end.
    /// The request comes back if there is no thread.
    pub(crate) fn discard(
        &self,
        file: &File,
        queue: QueueIndex,
        request: Request,
        range: Range<u64>,
    ) -> Result<(), Request> {
        let mut inner = self.shared.lock();
        if !inner.started && self.start(file).is_err() {
            return Err(request);
        }
        inner.started = true;
        inner.jobs.push_back(Job { queue, request, range });
        drop(inner);
        self.shared.changed.notify_one();
        Ok(())
    }

    fn start(&self, file: &File) -> Result<(), ()> {
        let (host, shared) = (self.host, Arc::clone(&self.shared));
        let file = file.try_clone().map_err(|_| ())?;
        self.host.spawn("discard", move || shared.serve(host, &file)).map_err(|_| ())
    }

    /// What has been done for `queue`.
    pub(crate) fn done(&self, queue: QueueIndex) -> Vec<Done> {
        let mut inner = self.shared.lock();
        let (mine, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut inner.done).into_iter().partition(|(of, _)| *of == queue);
        inner.done = others;
        mine.into_iter().map(|(_, done)| done).collect()
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        // The host joins the thread; what it has not begun is not owed to anybody any more.
        self.shared.lock().ending = true;
        self.shared.changed.notify_all();
    }
}
