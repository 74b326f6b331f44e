//! The end of the device: what was written is made durable, the domain writes down what it has, and
//! what cannot be ended is named.
//!
//! The workers have left by then, so the flush is submitted from here, on a queue that is not used.
//!
//! Invariant: nothing is asked of an instance that has died. If it dies before or in its end, its
//! standby takes over and is asked instead; if none can, that is left behind, and said.

use crate::datapath::queue::Notifier;
use crate::device::DomainProxy;
use crate::domain::LoadedDomain;
use crate::record::report::Phases;
use domain_abi::{self as abi, RawRequest};
use domain_abi::{Capabilities, DeviceInfo};
use domain_host::{CallError, CompletionBuffer};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Until when a takeover and the last flush are waited for, from the wish to end on.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(13);

/// How often it is looked for its end, which is not always told.
const LOOK_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// What the domain rings when the flush has ended.
struct Bell(Arc<OwnedFd>);

impl Notifier for Bell {
    fn notify(&self) {
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    fn fd(&self) -> Option<OwnedFd> {
        self.0.try_clone().ok()
    }
}

impl DomainProxy {
    /// From now on no change is begun, and one that is under way ends at its next boundary. A
    /// takeover was not asked for: it goes on, because a domain has to flush.
    pub fn begin_stop(&self) {
        self.stopping.get_or_init(Instant::now);
        self.signal.announce();
    }

    /// Ends the device, after all workers have left: the live domain flushes and writes down what
    /// it has. If it dies before that is done, its standby takes over and does it.
    ///
    /// Returns what had to be left, in sentences. If that is nothing, what was written is durable.
    pub fn stop(self: &Arc<Self>) -> Vec<String> {
        self.begin_stop();
        let deadline = *self.stopping.get_or_init(Instant::now) + FLUSH_TIMEOUT;
        let mut said = Vec::new();
        let mut death = None;
        // Each takeover uses an instance up, so this ends.
        let others = loop {
            let Some(mut others) = self.lock_alive(deadline, || false) else {
                said.push(unflushed(death, "the change that is under way has not ended in time"));
                break None;
            };
            // The workers have left; what they have let go of is not left behind.
            if self.release(&mut others, Duration::ZERO) {
                self.finish_retiring(&mut others, Duration::ZERO, &mut Phases::default());
            }
            let Some(live) = self.live() else {
                if death.is_some() || is_flushed(&self.record().info) {
                    let fault = self.fault();
                    said.push(unflushed(death, fault.as_deref().unwrap_or("nobody took over")));
                }
                break Some(others);
            };
            let Err(how) = self.end_live(&live, deadline, &mut said) else { break Some(others) };
            // The takeover needs the lock, and waits for our reference to be gone.
            drop(others);
            self.died(&live, &how);
            death = Some(how);
        };
        let mut left = self.take_left();
        left.append(&mut said);
        // Said whatever the last flush was answered with, and also where no domain is left to ask.
        left.extend(
            self.storage.failure().map(|why| format!("a disk that may have lost data: {why}")),
        );
        if let Some(standby) = others.and_then(|mut others| others.standby.take()) {
            let _ = self.retire(standby, Duration::ZERO, &mut Phases::default());
        }
        self.preparer.images.close();
        left.extend(self.look_at_residents());
        left
    }

    /// Has the live domain flush and write down what it has. What does not work is `said`.
    ///
    /// # Errors
    /// In which step it has died.
    fn end_live(
        &self,
        live: &LoadedDomain,
        deadline: Instant,
        said: &mut Vec<String>,
    ) -> Result<(), String> {
        let name = &live.record().name;
        let flushed = self.flush(live, deadline);
        let flushed = flushed.map_err(|why| format!("the last flush of `{name}`: {why}"));
        if live.is_dead() {
            // Also when it has died after its flush, in letting go of the queue.
            return Err(flushed
                .err()
                .unwrap_or_else(|| format!("`{name}` has died after its last flush")));
        }
        said.extend(flushed.err());
        match live.instance.quiesce() {
            Ok(()) => Ok(()),
            Err(error) => {
                let sentence = format!("`{name}` did not quiesce: {error}");
                if matches!(error, CallError::Panicked(_)) {
                    // There is nothing that it could resume.
                    live.instance.mark_dead();
                }
                if live.is_dead() {
                    return Err(sentence);
                }
                said.push(sentence);
                Ok(())
            }
        }
    }

    /// Makes what has been written durable, where there is such a thing.
    fn flush(&self, live: &LoadedDomain, deadline: Instant) -> Result<(), String> {
        if !is_flushed(&live.record().info) {
            return Ok(());
        }
        let is_free = |queue: &usize| !live.is_abandoned(*queue);
        let queue = (0..self.queues.len())
            .find(is_free)
            .ok_or("each queue has requests that never ended")?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = Arc::new(
            bell.map_err(|error| format!("no descriptor to be told of its end: {error}"))?,
        );
        self.queues.set_notifier(queue, Some(Box::new(Bell(Arc::clone(&bell)))));
        let result = flush_on(live, queue, &bell, deadline);
        self.queues.set_notifier(queue, None);
        result
    }
}

/// Whether something can have been written that is not durable yet.
fn is_flushed(info: &DeviceInfo) -> bool {
    let can = |capability| info.capabilities.contains(capability);
    can(Capabilities::FLUSH) && !can(Capabilities::READ_ONLY)
}

/// No domain is there to flush.
fn unflushed(death: Option<String>, why: &str) -> String {
    let death = death.map(|death| format!("{death}; ")).unwrap_or_default();
    format!("{death}nobody was there to flush: {why}: what was written last may not be on the disk")
}

/// Submits a flush on `queue`, and waits for its end.
fn flush_on(
    live: &LoadedDomain,
    queue: usize,
    bell: &OwnedFd,
    deadline: Instant,
) -> Result<(), String> {
    let mut attachment = live.attach(queue).map_err(|error| {
        // As for a worker: what cannot be attached to cannot serve.
        live.instance.mark_dead();
        error.to_string()
    })?;
    let mut completions = CompletionBuffer::new(1);
    let request = RawRequest::flush();
    let taken = attachment
        .handle
        .submit(&[request], &mut completions)
        .map_err(|error| error.to_string())?;
    if taken == 0 {
        return Err("the domain did not take it".to_owned());
    }
    loop {
        if let Some(completion) = completions.completed().first() {
            return match completion.status {
                abi::status::OK => Ok(()),
                _ => Err("an I/O error: what was written last may not be on the disk".to_owned()),
            };
        }
        if Instant::now() >= deadline {
            // It may still complete: its queue stays, and is not waited for.
            attachment.abandon();
            return Err(
                "it has not ended in time: what was written last may not be on the disk".to_owned()
            );
        }
        let _ = poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&LOOK_EVERY));
        let _ = rustix::io::read(bell, &mut [0; 8]);
        attachment.handle.reap(&mut completions).map_err(|error| error.to_string())?;
    }
}
