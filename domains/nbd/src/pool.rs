//! The connections of an instance: which there are, and what becomes of requests whose connection
//! has ended.
//!
//! Which connections there are is the keeper's to change (`keeper`); queues use them (`port`).
//!
//! **A connection that breaks** gives back what it had not answered, to be sent again on another
//! one. A request on which connections die again and again is sent alone, so that no other one is
//! blamed, and at last answered with an error.

use crate::announced::Announced;
use crate::common::{Common, Options, lock};
use crate::job::Mail;
use crate::link::{Left, Link};
use crate::server::Process;
use crate::uri::Target;
use domain_api::{Host, Level, QueueIndex};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// How many requests servers read at a time from one connection.
pub(crate) const READ_AT_ONCE: usize = 16;

/// Which connections there are.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    pub(crate) links: Vec<Option<Arc<Link>>>,
    /// How many of them are to be had.
    pub(crate) wanted: usize,
    /// How many the server allows.
    pub(crate) allowed: usize,
    /// Names given so far.
    pub(crate) names: u32,
    /// What serves the last one, or has served it. None if there was none, or if the next one is
    /// held to lead to the same.
    pub(crate) server: Option<Option<Process>>,
    /// Where the last one leads to, if the server is at a host.
    pub(crate) address: Option<SocketAddr>,
}

/// The connections of an instance.
pub(crate) struct Pool {
    common: Common,
    announced: Mutex<Announced>,
    /// The same, without what changes: for each request.
    told: Announced,
    slots: Mutex<Slots>,
    /// Counts changes of `slots`.
    version: AtomicU64,
    /// Since when there is no connection, in nanoseconds of the host's clock; 0 if there is one.
    lost_since_ns: AtomicU64,
    /// The same, since when there is none but to servers that are going down.
    left_since_ns: AtomicU64,
    /// The keeper is to change nothing: the storage is not ours.
    pub(crate) resting: AtomicBool,
    pub(crate) ending: AtomicBool,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("target", &self.target).finish_non_exhaustive()
    }
}

impl std::ops::Deref for Pool {
    type Target = Common;

    fn deref(&self) -> &Common {
        &self.common
    }
}

impl Pool {
    pub(crate) fn new(
        host: Host,
        target: Target,
        options: Options,
        announced: Announced,
    ) -> io::Result<Self> {
        Ok(Self {
            common: Common::new(host, target, options)?,
            announced: Mutex::new(announced),
            told: announced,
            slots: Mutex::default(),
            version: AtomicU64::new(0),
            lost_since_ns: AtomicU64::new(0),
            left_since_ns: AtomicU64::new(0),
            resting: AtomicBool::new(true),
            ending: AtomicBool::new(false),
        })
    }

    pub(crate) fn announced(&self) -> Announced {
        *lock(&self.announced)
    }

    /// What was announced, but for the capacity.
    #[inline]
    pub(crate) const fn told(&self) -> &Announced {
        &self.told
    }

    pub(crate) fn announce(&self, announced: Announced) {
        *lock(&self.announced) = announced;
    }

    pub(crate) fn slots(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }

    /// Which connections there are has changed: queues are to look again. With `slots` held.
    pub(crate) fn changed(&self, slots: &Slots) {
        // One that is to be closed still answers what is in flight, and is not lost until then.
        let is_lost = slots.links.iter().flatten().next().is_none();
        // But one that goes down may never come to an end of that.
        let is_left = slots.links.iter().flatten().all(|link| link.is_leaving());
        let now = u64::try_from(self.host.clock().as_nanos()).unwrap_or(u64::MAX).max(1);
        for (is_so, since) in [(is_lost, &self.lost_since_ns), (is_left, &self.left_since_ns)] {
            if !is_so {
                since.store(0, Ordering::Relaxed);
            } else if since.load(Ordering::Relaxed) == 0 {
                since.store(now, Ordering::Relaxed);
            }
        }
        // Release pairs with the Acquire in `version`; the links themselves are behind the lock.
        self.version.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// How long there has been no connection.
    pub(crate) fn lost_for(&self) -> Option<Duration> {
        self.since(&self.lost_since_ns)
    }

    fn since(&self, stamp: &AtomicU64) -> Option<Duration> {
        let since = stamp.load(Ordering::Relaxed);
        (since != 0).then(|| self.host.clock().saturating_sub(Duration::from_nanos(since)))
    }

    /// Whether requests are not to wait for a connection any longer.
    pub(crate) fn has_timed_out(&self) -> bool {
        self.options
            .timeout
            .is_some_and(|most| self.since(&self.left_since_ns).is_some_and(|left| left >= most))
    }

    /// How many requests may be in flight on one connection: more than a server reads are better
    /// sent elsewhere, if there is an elsewhere.
    pub(crate) fn depth(slots: &Slots) -> usize {
        if slots.links.iter().flatten().count() > 1 { READ_AT_ONCE } else { crate::marks::DEPTH }
    }

    /// A queue lets go of its port.
    pub(crate) fn detach(&self, queue: QueueIndex) {
        self.detached(queue);
        let links = self.slots().links.clone();
        links.iter().flatten().for_each(|link| link.abandon(queue));
        drop(self.take_mail(queue));
        // A suspect may have gone with it.
        self.notify_all();
    }

    /// A connection has ended.
    pub(crate) fn lost(&self, link: &Arc<Link>, why: &str) {
        let Some(left) = link.break_off() else { return };
        let Left { items, ranges, has_flush, has_own_flush } = left;
        if has_flush {
            self.note_unflushed();
        }
        let until = self.host.clock() + self.options.settle;
        self.old.add(ranges, until, link.server, self.marks());
        if let Some(marks) = self.marks() {
            (0..crate::marks::DEPTH).for_each(|index| marks.clear(link.slot, index));
        }
        let newest = {
            let mut slots = self.slots();
            let held = slots.links.get_mut(link.slot);
            if let Some(slot) =
                held.filter(|held| held.as_ref().is_some_and(|l| Arc::ptr_eq(l, link)))
            {
                *slot = None;
            }
            self.changed(&slots);
            slots.names
        };
        if !link.is_closing() || !items.is_empty() {
            self.host.count("nbd_connections_lost", 1);
            let line = format!(
                "the connection to {} has ended ({why}) with {} requests in flight; connecting anew",
                self.target,
                items.len()
            );
            self.host.log(Level::Warn, &line);
        }
        for (queue, item) in items {
            self.answered(item.as_ref().map(|item| &item.job));
            if let Some(mut item) = item {
                item.job.is_repeated = true;
                let mail = if item.job.is_to_blame(link.name, newest) {
                    self.blame(item, "connection after connection has ended on it")
                } else {
                    Mail::Again(item)
                };
                self.post(queue, [mail]);
            }
        }
        if has_own_flush {
            self.own_flush.undone();
        }
        self.wake_keeper();
        self.notify_all();
    }

    /// More connections would be of use.
    pub(crate) fn want_more(&self) {
        let mut slots = self.slots();
        let most = slots.allowed.min(self.options.connections);
        if slots.wanted < most && slots.links.iter().flatten().count() >= slots.wanted {
            slots.wanted += 1;
            drop(slots);
            self.wake_keeper();
        }
    }
}
