//! What does the I/O: the kernel by way of io_uring, or the workers themselves.
//!
//! To make a ring takes 50 us, and an upgrade may come at any time. With direct I/O nearly each
//! request needs one, so rings are made at preparing for the queues that are served then. Otherwise
//! a queue makes one for the first request that is not a copy; many never have one.

use crate::fence;
use crate::image::Image;
use domain_api::{DomainError, Host, Level, Params, QueueIndex};
use domain_io::engine::Opens;
use domain_io::uring::{PreparedRing, Ring};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Requests that a queue's ring has room for: the longest virtqueue that is in use.
pub(crate) const DEPTH: usize = 1024;

/// What is made for a queue before a guest waits for it.
#[derive(Debug)]
struct Prepared {
    index: QueueIndex,
    sync: Option<File>,
    ring: Option<PreparedRing>,
}

/// The chosen way.
#[derive(Debug)]
pub(crate) struct Rings {
    uring: bool,
    host: Host,
    /// For the queues that were served when this instance was prepared.
    prepared: Mutex<Vec<Prepared>>,
    /// How loudly to say that there is none: it may not have been asked for.
    loud: Level,
    /// It was said that a queue does without.
    said: AtomicBool,
}

impl Rings {
    /// What `aio` asks for, for this image. Only a user who insists is told now that no ring can be
    /// had: the queues do without anyway.
    pub(crate) fn choose(host: Host, image: &Image, params: &Params) -> Result<Self, DomainError> {
        let wanted = params.get("aio").unwrap_or("auto");
        if !["auto", "io_uring", "sync"].contains(&wanted) {
            return Err(DomainError::new(format!(
                "parameter `aio` is `{wanted}`; use auto, io_uring or sync"
            )));
        }
        if wanted == "io_uring" {
            Ring::probe().map_err(|error| {
                DomainError::new(format!("{}; leave aio=io_uring out", why_not(&error)))
            })?;
        }
        let loud = if wanted == "io_uring" { Level::Warn } else { Level::Info };
        let uring = wanted != "sync";
        let prepare = |index| {
            let sync = image.sync_file(host)?;
            let wants_ring = uring && needs_rings(image);
            let ring =
                wants_ring.then(|| PreparedRing::new(image.files(&sync), DEPTH)).transpose()?;
            Ok(Prepared { index, sync: Some(sync), ring })
        };
        // All or none: if they do not all fit, what is left of descriptors or memory is needed for
        // other things. The queues then try for themselves, and say why not.
        let prepared: io::Result<Vec<_>> = host.served_queues().map(prepare).collect();
        let prepared = Mutex::new(prepared.unwrap_or_default());
        Ok(Self { host, uring, prepared, loud, said: AtomicBool::new(false) })
    }

    /// When a queue is to have a ring.
    pub(crate) fn opens(&self, image: &Image) -> Opens {
        if !self.uring {
            Opens::Never
        } else if needs_rings(image) {
            Opens::AtOnce
        } else {
            Opens::WhenNeeded
        }
    }

    /// A ring for a queue, on the thread that serves it. One that cannot have any does without: it
    /// is slower, not broken. `sync` is what the queue syncs through.
    pub(crate) fn ring(&self, image: &Image, sync: &File, index: QueueIndex) -> Option<Ring> {
        let made = || {
            let wake = self.host.notifier_fd(index).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::Unsupported,
                    "this host has no descriptor to wake a worker by",
                )
            })?;
            let ring = match self.take_prepared(index, |prepared| prepared.ring.take()) {
                Some(ring) => ring,
                None => PreparedRing::new(image.files(sync), DEPTH)?,
            };
            // What may be on its way to a device when the process is gone.
            let fence = image.mode().direct.then(|| fence::hold(self.host)).transpose()?;
            let lock = if fence.is_some() { image.lock_in_use(self.host)? } else { None };
            let held: Vec<&File> = fence.iter().chain(&lock).collect();
            ring.begin(wake, &held)
        };
        let said = |error: &io::Error| {
            // Relaxed: only whether it was said before.
            if !self.said.swap(true, Ordering::Relaxed) {
                let line = format!(
                    "queue {}: {}; its worker serves its requests",
                    index.0,
                    why_not(error)
                );
                self.host.log(self.loud, &line);
            }
        };
        made().inspect_err(said).ok()
    }

    /// What a queue syncs through, unless there is no descriptor left for it.
    pub(crate) fn sync_file(&self, image: &Image, index: QueueIndex) -> Option<File> {
        let prepared = self.take_prepared(index, |prepared| prepared.sync.take());
        prepared.or_else(|| image.sync_file(self.host).ok())
    }

    fn take_prepared<T>(
        &self,
        index: QueueIndex,
        take: impl FnOnce(&mut Prepared) -> Option<T>,
    ) -> Option<T> {
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        take(prepared.iter_mut().find(|prepared| prepared.index == index)?)
    }
}

/// Whether nearly each request of this image waits for a disk.
fn needs_rings(image: &Image) -> bool {
    image.mode().direct && !image.is_in_memory()
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
