//! The end of the device: what was written is made durable, the domain writes down what it has, and what cannot be ended is named.
//!
//! The workers have left by then, so the flush is submitted from here, on a queue that nobody uses.

use crate::queue::Notifier;
use crate::report::Phases;
use crate::upgrade::lock;
use crate::{DomainProxy, Member};
use domain_api::abi::{self, RawRequest};
use domain_api::host::CompletionBuffer;
use domain_api::{Capabilities, QueueIndex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Until when the last flush is waited for, from the wish to end on.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(13);

/// How often somebody looks for its end who was not told of it.
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
    /// From now on no change is begun, and one that is under way ends at its next boundary.
    pub fn begin_stop(&self) {
        self.stopping.get_or_init(Instant::now);
    }

    /// Whether the device is about to end.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping.get().is_some()
    }

    /// Ends the device, after all workers have left: the live domain flushes and writes down what it has.
    ///
    /// Returns what had to be left, in sentences.
    pub fn stop(&self) -> Vec<String> {
        self.begin_stop();
        let mut upgrades = lock(&self.upgrades);
        // The workers have left; what they have let go of is not left behind.
        if self.release(&mut upgrades, Duration::ZERO) {
            self.finish_leaving(&mut upgrades, &mut Phases::default());
        }
        let mut left = std::mem::take(&mut lock(&self.view).left);
        if let Some(live) = self.live().filter(|live| !live.instance.is_dead())
            && let Err(why) = self.flush(&live)
        {
            left.push(format!("the last flush of `{}`: {why}", live.record.name));
        }
        // Said whatever the last flush was answered with, and also where nobody is left to ask.
        left.extend(self.storage.failure().map(|why| format!("a disk that may have lost data: {why}")));
        if let Some(live) = self.live().filter(|live| !live.instance.is_dead())
            && let Err(error) = live.instance.quiesce()
        {
            left.push(format!("`{}` did not quiesce: {error}", live.record.name));
        }
        if let Some(standby) = upgrades.standby.take() {
            let _ = self.retire(standby, &mut Phases::default());
        }
        left.extend(self.residents());
        left
    }

    /// Makes what has been written durable, where there is such a thing.
    fn flush(&self, live: &Member) -> Result<(), String> {
        let can = |capability| live.record.info.capabilities.contains(capability);
        if !can(Capabilities::FLUSH) || can(Capabilities::READ_ONLY) {
            return Ok(());
        }
        let is_free = |queue: &usize| !live.fence.is_abandoned(*queue);
        let queue = (0..self.queues.len()).find(is_free).ok_or("each queue has requests that never ended")?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = Arc::new(bell.map_err(|error| format!("no descriptor to be told of its end: {error}"))?);
        self.queues.set_notifier(queue, Some(Box::new(Bell(Arc::clone(&bell)))));
        let deadline = *self.stopping.get_or_init(Instant::now) + FLUSH_TIMEOUT;
        let result = flush_on(live, queue, &bell, deadline);
        self.queues.set_notifier(queue, None);
        result
    }
}

/// Submits a flush on `queue`, and waits for its end.
fn flush_on(live: &Member, queue: usize, bell: &OwnedFd, deadline: Instant) -> Result<(), String> {
    let attached = live.instance.attach(QueueIndex(queue as u32));
    let mut handle = attached.map_err(|error| error.to_string())?;
    let mut completions = CompletionBuffer::new(1);
    let request = RawRequest::flush();
    let taken = handle.submit(&[request], &mut completions).map_err(|error| error.to_string())?;
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
            // It may still complete: its queue stays.
            std::mem::forget(handle);
            return Err("it has not ended in time: what was written last may not be on the disk".to_owned());
        }
        let _ = poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&LOOK_EVERY));
        let _ = rustix::io::read(bell, &mut [0; 8]);
        handle.reap(&mut completions).map_err(|error| error.to_string())?;
    }
}
