//! What neither a port nor a worker should do, e.g. a device's discard: an ioctl, which may take as
//! long as the device likes, while the worker has a guest to serve.
//!
//! A thread of the host's does it, one after the other, made when the first task comes.

use domain_api::{Host, QueueIndex, Request};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What is to be done for a request. It owns what it needs: its instance may be gone by then.
pub type OffloadTask = Box<dyn FnOnce() -> io::Result<()> + Send>;

struct Ordered {
    queue: QueueIndex,
    request: Request,
    task: OffloadTask,
}

#[derive(Default)]
struct Lists {
    ordered: VecDeque<Ordered>,
    done: Vec<(QueueIndex, Request, io::Result<()>)>,
    started: bool,
    ending: bool,
}

#[derive(Default)]
struct OffloadThread {
    lists: Mutex<Lists>,
    changed: Condvar,
}

impl OffloadThread {
    fn lock(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, host: Host) {
        let mut lists = self.lock();
        while !lists.ending {
            let Some(Ordered { queue, request, task }) = lists.ordered.pop_front() else {
                lists = self.changed.wait(lists).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(lists);
            let result = task();
            lists = self.lock();
            lists.done.push((queue, request, result));
            host.notify(queue);
        }
    }
}

/// The thread, and what is to be done.
pub(super) struct Offload {
    host: Host,
    thread: Arc<OffloadThread>,
}

impl std::fmt::Debug for Offload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offload").finish_non_exhaustive()
    }
}

impl Offload {
    pub(super) fn new(host: Host) -> Self {
        Self { host, thread: Arc::default() }
    }

    /// Has `task` done for `request`, and `queue` notified of its end. The request comes back if
    /// there is no thread.
    pub(super) fn run(
        &self,
        queue: QueueIndex,
        request: Request,
        task: OffloadTask,
    ) -> Result<(), Request> {
        let mut lists = self.thread.lock();
        if !lists.started && !self.start() {
            return Err(request);
        }
        lists.started = true;
        lists.ordered.push_back(Ordered { queue, request, task });
        drop(lists);
        self.thread.changed.notify_one();
        Ok(())
    }

    fn start(&self) -> bool {
        let (host, thread) = (self.host, Arc::clone(&self.thread));
        self.host.spawn("discard", move || thread.serve(host)).is_ok()
    }

    /// What has been done for `queue`.
    pub(super) fn done(&self, queue: QueueIndex) -> Vec<(Request, io::Result<()>)> {
        let mut lists = self.thread.lock();
        let (mine, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut lists.done).into_iter().partition(|(of, ..)| *of == queue);
        lists.done = others;
        mine.into_iter().map(|(_, request, result)| (request, result)).collect()
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        // The host joins the thread; what it has not begun is not owed to any queue any more.
        self.thread.lock().ending = true;
        self.thread.changed.notify_all();
    }
}
