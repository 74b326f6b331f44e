//! The keeper: the instance's thread that has connections made, let go of and followed, so that no
//! worker ever waits for a server.
//!
//! A connection that ends while nothing is in flight is seen here, and made anew before it is
//! needed. While there is none, the server is tried every [`RETRY`] for a while, then more rarely.

use crate::connect::{self, Connection};
use crate::job::Lists;
use crate::link::Link;
use crate::negotiate::flags;
use crate::pool::{Pool, Slots};
use crate::server::Process;
use domain_api::{DomainError, Level, QueueIndex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often a lost server is tried.
const RETRY: Duration = Duration::from_millis(50);
/// The same, after [`LONG`].
const RARELY: Duration = Duration::from_millis(500);
const LONG: Duration = Duration::from_secs(60);
/// When a further connection is tried again that could not be had.
const LATER: Duration = Duration::from_secs(5);

/// How long connections that are used no more are awaited without a word.
const QUIETLY: Duration = Duration::from_secs(1);

/// Storage key of a connection's descriptor.
pub(crate) fn key(slot: usize) -> String {
    format!("connection.{slot}")
}

/// Starts it.
pub(crate) fn start(pool: &Arc<Pool>) -> Result<(), DomainError> {
    let shared = Arc::clone(pool);
    pool.host.spawn("nbd", move || Keeper::new(shared).run())
}

struct Keeper {
    pool: Arc<Pool>,
    /// What was last said of why there is no connection.
    said: Option<String>,
    /// Since when all connections are used no more, and whether that was said.
    awaits_since: Option<Duration>,
    said_awaited: bool,
    /// Further connections are not tried before then, as long as there are as many as when the last
    /// one was tried in vain.
    later: Option<(Duration, usize)>,
    /// How often in a row they were.
    vain: u32,
    /// Has a flush of our own in flight.
    flushing: Option<Arc<Link>>,
    /// Connections in a row on which nothing was answered, and when the next one may be made.
    barren: u32,
    not_before: Duration,
}

impl Keeper {
    fn new(pool: Arc<Pool>) -> Self {
        let not_before = Duration::ZERO;
        Self {
            pool,
            said: None,
            awaits_since: None,
            said_awaited: false,
            later: None,
            vain: 0,
            flushing: None,
            barren: 0,
            not_before,
        }
    }
}

impl Keeper {
    fn run(mut self) {
        while !self.pool.ending.load(Ordering::Relaxed) {
            let pause = if self.pool.resting.load(Ordering::Relaxed) {
                // Its connection has ended, or is a successor's.
                self.flushing = None;
                None
            } else {
                self.keep()
            };
            self.wait(pause);
        }
    }

    /// Does what is to be done; how long there is nothing more.
    fn keep(&mut self) -> Option<Duration> {
        self.say_awaited();
        tend(&self.pool);
        let mut pause = self.reconnect();
        self.send_flush();
        self.receive_flush();
        if self.pool.old.len() > 0 || self.pool.own_flush.is_wanted() {
            pause = Some(pause.unwrap_or(RETRY).min(RETRY));
        }
        pause
    }

    /// Says once that connections are awaited which are used no more, if they do not end.
    fn say_awaited(&mut self) {
        let pool = &self.pool;
        let links = pool.slots().links.clone();
        let mut links = links.iter().flatten().peekable();
        if links.peek().is_none() || !links.clone().all(|link| link.is_closing()) {
            (self.awaits_since, self.said_awaited) = (None, false);
            return;
        }
        let now = pool.host.clock();
        let since = *self.awaits_since.get_or_insert(now);
        if now.saturating_sub(since) >= QUIETLY && !self.said_awaited {
            self.said_awaited = true;
            let goes_down = links.clone().all(|link| link.is_leaving());
            let why = if goes_down { "the server is going down" } else { "the size is asked for" };
            let line = format!(
                "no request is sent to {} any more ({why}) before it has answered the {} that it has; then it is connected to anew",
                pool.target,
                links.map(|link| link.busy()).sum::<usize>(),
            );
            pool.host.log(Level::Warn, &line);
        }
    }

    /// Sends a flush of our own, if one is asked for and a connection has room for it.
    fn send_flush(&mut self) {
        let pool = &self.pool;
        if pool.own_flush.is_wanted() {
            let slots = pool.slots();
            // Looked at under the lock that resting begins with: nothing is in flight from then on.
            if !pool.resting.load(Ordering::Relaxed) {
                self.flushing = slots.links.iter().flatten().find(|link| link.flush(pool)).cloned();
            }
        }
    }

    /// Takes in the answer to a flush of our own, and whatever else is there.
    fn receive_flush(&mut self) {
        let Some(link) = &self.flushing else { return };
        // Of no queue: what is a queue's goes there.
        let mut lists = Lists::new(QueueIndex(u32::MAX));
        if let Err(why) = link.turn(&self.pool, &mut lists, 0) {
            let link = Arc::clone(link);
            self.pool.lost(&link, &why);
        }
        if !self.pool.own_flush.is_in_flight() {
            self.flushing = None;
        }
    }

    /// Tries to have what is wanted; how long to wait before the next try.
    fn reconnect(&mut self) -> Option<Duration> {
        loop {
            let (slot, there) = {
                let slots = self.pool.slots();
                let wanted = slots.wanted.max(1);
                let slot =
                    (0..wanted).find(|slot| slots.links.get(*slot).is_none_or(Option::is_none))?;
                (slot, slots.links.iter().flatten().count())
            };
            let is_first = there == 0;
            let now = self.pool.host.clock();
            if is_first && now < self.not_before {
                return Some(self.not_before - now);
            }
            if !is_first {
                // Its answer is the keeper's to take in.
                if self.pool.own_flush.is_pending() {
                    return Some(RETRY);
                }
                if let Some((later, of)) = self.later
                    && there >= of
                    && now < later
                {
                    return Some(later - now);
                }
            }
            if let Err(why) = self.try_slot(slot, is_first) {
                if is_over(&self.pool) {
                    return None;
                }
                if !is_first && is_needed(&self.pool) {
                    continue;
                }
                if !is_first {
                    let pause = LATER * (1 << self.vain.min(6));
                    self.vain += 1;
                    self.later = Some((self.pool.host.clock() + pause, there));
                    // Until a queue asks for more again.
                    self.pool.slots().wanted = there;
                    return Some(pause);
                }
                if self.said.as_ref() != Some(&why) {
                    let line = format!("cannot connect to {}: {why}; trying on", self.pool.target);
                    self.pool.host.log(Level::Warn, &line);
                    self.said = Some(why);
                }
                let lost = self.pool.lost_for().unwrap_or_default();
                return Some(if lost < LONG { RETRY } else { RARELY });
            }
        }
    }

    fn try_slot(&mut self, slot: usize, is_first: bool) -> Result<(), String> {
        let pool = &self.pool;
        let stop = || {
            if is_over(pool) {
                return true;
            }
            // Nothing else is to wait for a server that does not greet.
            tend(pool);
            !is_first && is_needed(pool)
        };
        let last = pool.slots().address;
        let connection =
            connect::connect(&pool.target, last, &stop).map_err(|refusal| refusal.to_string())?;
        let announced = pool.announced();
        announced
            .fits(&connection.export)
            .map_err(|why| format!("the export is not the guest's disk any more: {why}"))?;
        let lost = pool.lost_for();
        let mut slots = pool.slots();
        // Looked at under the lock that resting begins with.
        if pool.resting.load(Ordering::Relaxed) {
            return Err("the disk is being handed on".to_owned());
        }
        let was_alone = slots.links.iter().all(Option::is_none);
        let before = slots.server;
        let link = add(pool, &mut slots, slot, connection);
        if was_alone {
            tell_of_unflushed(pool, before, link.server);
        }
        drop(slots);
        keep_descriptor(pool, &link);
        if let Some(lost) = lost {
            // A server that greets and goes is not greeted without end.
            self.barren = if pool.takes_answers() { 0 } else { self.barren + 1 };
            let pause = RETRY * (1 << self.barren.min(7)) / 2;
            self.not_before =
                pool.host.clock() + if self.barren > 1 { pause } else { Duration::ZERO };
            let line = format!("connected to {} again after {} ms", pool.target, lost.as_millis());
            pool.host.log(Level::Info, &line);
            pool.host.count("nbd_reconnects", 1);
        }
        self.said = None;
        if !is_first {
            (self.later, self.vain) = (None, 0);
        }
        self.pool.notify_all();
        Ok(())
    }

    /// Waits until there may be something to do.
    fn wait(&self, pause: Option<Duration>) {
        let links: Vec<_> = {
            let slots = self.pool.slots();
            slots.links.iter().flatten().filter(|link| link.busy() == 0).cloned().collect()
        };
        let mut watched = vec![PollFd::from_borrowed_fd(self.pool.keeper(), PollFlags::IN)];
        // Those that are in use are looked at by their queues.
        watched.extend(
            links.iter().map(|link| PollFd::from_borrowed_fd(link.socket(), PollFlags::RDHUP)),
        );
        if let Some(link) = &self.flushing {
            watched.push(PollFd::from_borrowed_fd(link.socket(), PollFlags::IN));
        }
        // Connections become idle without a word, and are looked at every now and then.
        let pause = pause.unwrap_or(Duration::from_millis(500)).max(Duration::from_millis(1));
        let pause = Timespec { tv_sec: 0, tv_nsec: pause.as_nanos().min(999_999_999) as i64 };
        if !matches!(poll(&mut watched, Some(&pause)), Ok(1..)) {
            return;
        }
        if !watched[0].revents().is_empty() {
            let _ = rustix::io::read(self.pool.keeper(), &mut [0; 8]);
        }
        let ended: Vec<bool> =
            watched[1..].iter().map(|watched| !watched.revents().is_empty()).collect();
        for (link, _) in links.iter().zip(ended).filter(|(_, ended)| *ended) {
            // Nothing is awaited on it, so whatever is half said is of no use.
            if link.busy() == 0 && !self.pool.resting.load(Ordering::Relaxed) {
                self.pool.lost(link, "the server has closed it");
            }
        }
    }
}

/// Does what depends on no server: what is to be closed, what has settled, what has timed out.
fn tend(pool: &Pool) {
    if pool.takes_going_down() {
        let slots = pool.slots();
        slots.links.iter().flatten().for_each(|link| link.leave());
        pool.changed(&slots);
    }
    let links = pool.slots().links.clone();
    for link in links.iter().flatten() {
        if link.is_closing() && link.busy() == 0 {
            pool.lost(link, "it was given up");
        } else if link.is_unheard() {
            pool.lost(link, "its host does not acknowledge what is sent to it");
        }
    }
    let has_settled = pool.old.len() > 0 && {
        // Under the lock that resting begins with: the marks are a successor's then.
        let _slots = pool.slots();
        !pool.resting.load(Ordering::Relaxed) && pool.old.settle(pool.host.clock(), pool.marks())
    };
    if has_settled || pool.has_timed_out() {
        pool.notify_all();
    }
}

/// Whether the keeper is to change nothing any more, for now or for good.
fn is_over(pool: &Pool) -> bool {
    pool.ending.load(Ordering::Relaxed) || pool.resting.load(Ordering::Relaxed)
}

/// Whether the keeper has more to do than to have a further connection.
fn is_needed(pool: &Pool) -> bool {
    pool.lost_for().is_some() || pool.own_flush.is_pending()
}

/// Takes a new connection into use.
pub(crate) fn add(
    pool: &Pool,
    slots: &mut Slots,
    slot: usize,
    connection: Connection,
) -> Arc<Link> {
    slots.allowed = if connection.export.has(flags::MULTI_CONN) { crate::marks::LINKS } else { 1 };
    slots.names += 1;
    slots.address = connect::address(&connection.socket).or(slots.address);
    // A guest that knew it could only make its own disk less safe.
    let nonce = pool.host.clock().as_nanos() as u32 ^ slots.names << 24;
    if let Some(marks) = pool.marks() {
        marks.set_nonce(slot, nonce);
    }
    let link = Arc::new(Link::new(slot, slots.names, connection, nonce));
    slots.server = Some(link.server);
    if slots.links.len() <= slot {
        slots.links.resize(slot + 1, None);
    }
    slots.wanted = slots.wanted.max(slot + 1).min(slots.allowed.max(slot + 1));
    slots.links[slot] = Some(Arc::clone(&link));
    if let Some(marks) = pool.marks() {
        // Also that it is not known: what is in flight is not the one's before.
        marks.set_server(link.server.map_or((0, 0), |server| (server.number, server.start)));
    }
    pool.changed(slots);
    link
}

/// The first connection after a time without any is `server`'s, if that is known: tells of writes
/// that may have gone with the one `before`.
fn tell_of_unflushed(pool: &Pool, before: Option<Option<Process>>, server: Option<Process>) {
    let may_differ = before.is_some_and(|before| server.is_none() || before != server);
    if may_differ && pool.told().flush && pool.takes_unflushed() {
        pool.host.count("nbd_unflushed", 1);
        let line = format!(
            "another server may have come for {}, with writes answered before that the guest has not flushed yet: \
             what the one before has not left to its storage is lost, and the guest's next flush does not say so",
            pool.target
        );
        pool.host.log(Level::Warn, &line);
    }
}

/// Leaves a connection's descriptor in storage, so that one that goes on can end it.
pub(crate) fn keep_descriptor(pool: &Pool, link: &Link) {
    let kept = link
        .socket()
        .try_clone_to_owned()
        .map(File::from)
        .map_err(|_| ())
        .and_then(|file| pool.host.storage().set_file(&key(link.slot), &file).map_err(drop));
    if kept.is_err() {
        pool.host.log(Level::Debug, "a connection could not be kept in storage");
    }
}
