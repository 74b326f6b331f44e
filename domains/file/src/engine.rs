//! Who does the I/O: the kernel by way of io_uring, or the workers themselves.

use crate::disk::Disk;
use crate::queue::Queue;
use domain_api::uring::{PreparedRing, Ring};
use domain_api::{DomainError, Host, Level, Params, QueueIndex};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Requests that a queue's ring has room for: the longest virtqueue that is in use.
const DEPTH: usize = 1024;

/// The chosen way.
#[derive(Debug)]
pub(crate) struct Engine {
    uring: bool,
    /// Rings for the queues that were served when this instance was prepared.
    prepared: Mutex<Vec<(QueueIndex, PreparedRing)>>,
    /// How loudly to say that there is none: it may not have been asked for.
    loud: Level,
    /// It was said that a queue does without.
    said: AtomicBool,
}

impl Engine {
    /// What `aio` asks for, for this file. Rings are made now where it is known which queues want one, because later a guest would wait for them.
    ///
    /// Only a user who insists is told now that none can be had: the queues do without anyway.
    pub(crate) fn choose(host: Host, file: &File, params: &Params) -> Result<Self, DomainError> {
        let wanted = params.get("aio").unwrap_or("auto");
        if !["auto", "io_uring", "sync"].contains(&wanted) {
            return Err(DomainError::new(format!(
                "parameter `aio` is `{wanted}`; use auto, io_uring or sync"
            )));
        }
        if wanted == "io_uring" {
            Ring::probe()
                .map_err(|error| DomainError::new(format!("{}; leave aio=io_uring out", why_not(&error))))?;
        }
        let loud = if wanted == "io_uring" { Level::Warn } else { Level::Info };
        let uring = wanted != "sync";
        let queues = host.served_queues().filter(|_| uring);
        // All or none: if they do not all fit, what is left of descriptors or memory is needed for other things. The queues then try for themselves, and say why not.
        let prepared: io::Result<Vec<_>> =
            queues.map(|index| Ok((index, PreparedRing::new(file, DEPTH)?))).collect();
        let prepared = Mutex::new(prepared.unwrap_or_default());
        Ok(Self { uring, prepared, loud, said: AtomicBool::new(false) })
    }

    /// A queue, on the thread that will serve it. One that cannot have a ring does without: it is slower, not broken.
    pub(crate) fn queue(&self, host: Host, disk: &Disk, index: QueueIndex) -> Queue {
        let ring = self.uring.then(|| {
            let wake = host.notifier_fd(index).ok_or_else(|| {
                io::Error::new(io::ErrorKind::Unsupported, "this host has no descriptor to wake a worker by")
            })?;
            match self.take_prepared(index) {
                Some(ring) => ring.begin(wake),
                None => Ring::new(disk.image().file(), wake, DEPTH),
            }
        });
        let ring = ring.and_then(|made| {
            made.inspect_err(|error| {
                // Relaxed: only whether somebody has said it before.
                if !self.said.swap(true, Ordering::Relaxed) {
                    let line =
                        format!("queue {}: {}; its worker serves its requests", index.0, why_not(error));
                    host.log(self.loud, &line);
                }
            })
            .ok()
        });
        Queue::new(disk, index, ring)
    }

    fn take_prepared(&self, index: QueueIndex) -> Option<PreparedRing> {
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let at = prepared.iter().position(|(of, _)| *of == index)?;
        Some(prepared.swap_remove(at).1)
    }
}

fn why_not(error: &io::Error) -> String {
    let why = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            " (a seccomp filter, or /proc/sys/kernel/io_uring_disabled, forbids it)"
        }
        io::ErrorKind::Unsupported => " (io_uring needs Linux 5.11)",
        _ => "",
    };
    format!("no io_uring: {error}{why}")
}
