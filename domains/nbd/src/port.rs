//! The port of a queue: what waits to be sent, and which connections it may go on.
//!
//! A queue begins with the connection of its number, and goes on to the next ones where that has as
//! much in flight as a server reads at a time. Readiness of sockets comes through the worker's
//! eventfd ([`Watch`]).

use crate::job::{Item, Job, Lists, Mail};
use crate::link::Link;
use crate::pool::{Pool, READ_AT_ONCE};
use domain_api::{Host, Level, QueueIndex, Request};
use domain_io::engine::{JobKind, Port, PortEnd};
use domain_io::socket::{News, Watch};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Requests that a queue takes: as many as its ring can have.
const CAPACITY: usize = 1024;
/// How often a socket is looked at where nothing can be had that says when.
const LOOK: Duration = Duration::from_micros(250);
const ECANCELED: i32 = 125;

struct Used {
    link: Arc<Link>,
    /// Watched for something to read.
    is_watched: bool,
    /// Watched for room to send.
    is_blocked: bool,
}

/// A queue's way to the server.
pub struct NbdPort {
    pool: Arc<Pool>,
    lists: Lists,
    links: Vec<Used>,
    /// Of `pool`, when `links` was made.
    version: u64,
    /// Most requests on one connection.
    depth: usize,
    /// All that it has.
    taken: usize,
    watch: Option<Watch>,
}

impl NbdPort {
    pub(crate) fn open(pool: &Arc<Pool>, queue: QueueIndex) -> Self {
        pool.attach(queue);
        let watch = watch(pool.host, queue);
        Self {
            pool: Arc::clone(pool),
            lists: Lists::new(queue),
            links: Vec::new(),
            version: 0,
            depth: 0,
            taken: 0,
            watch,
        }
    }

    /// Sends and receives what can be.
    fn turn(&mut self) {
        if self.version != self.pool.version() {
            self.follow();
        }
        let mut is_full = false;
        for at in 0..self.links.len() {
            let used = &mut self.links[at];
            let may_send = !self.lists.waiting.is_empty() && !used.link.is_closing();
            if !may_send && used.link.busy() == 0 {
                continue;
            }
            match used.link.turn(&self.pool, &mut self.lists, self.depth) {
                Ok(turn) => {
                    is_full |= turn.is_full || used.link.busy() > READ_AT_ONCE;
                    if turn.is_blocked && !used.is_blocked {
                        used.is_blocked = watch_writing(&mut self.watch, used);
                    }
                    if !used.is_watched && used.link.busy() > 0 {
                        watch_reading(&mut self.watch, used);
                    }
                }
                Err(why) => {
                    let link = Arc::clone(&used.link);
                    self.pool.lost(&link, &why);
                }
            }
        }
        if is_full && self.links.len() < self.pool.options.connections {
            self.pool.want_more();
        }
        self.collect_mail();
        if !self.lists.waiting.is_empty() && self.pool.has_timed_out() {
            self.give_up_waiting(|| io::Error::new(io::ErrorKind::TimedOut, "there is no server"));
        }
    }

    /// Takes in which connections there are.
    #[cold]
    fn follow(&mut self) {
        self.version = self.pool.version();
        let slots = self.pool.slots();
        self.depth = Pool::depth(&slots);
        let count = slots.links.len().max(1);
        let first = self.lists.queue.0 as usize % count;
        let links: Vec<Arc<Link>> =
            (0..count).filter_map(|n| slots.links.get((first + n) % count)?.clone()).collect();
        drop(slots);
        let before = std::mem::take(&mut self.links);
        for used in &before {
            let stays = links.iter().any(|link| Arc::ptr_eq(link, &used.link));
            if let (false, Some(watch)) = (stays, &mut self.watch) {
                watch.forget(used.link.name);
            }
        }
        for link in links {
            let was = before.iter().find(|used| Arc::ptr_eq(&used.link, &link));
            self.links.push(Used {
                is_watched: was.is_some_and(|used| used.is_watched),
                is_blocked: was.is_some_and(|used| used.is_blocked),
                link,
            });
        }
    }

    fn collect_mail(&mut self) {
        for mail in self.pool.take_mail(self.lists.queue) {
            match mail {
                Mail::Done(end) => self.lists.done.push_back(end),
                Mail::Again(item) => {
                    self.lists.waiting.push_back(item);
                    // To be sent by the next turn, which nothing else may bring.
                    self.pool.host.notify(self.lists.queue);
                }
            }
        }
    }

    fn give_up_waiting(&mut self, error: impl Fn() -> io::Error) {
        for Item { request, job } in self.lists.waiting.drain(..) {
            let end = self.pool.concluded(PortEnd { request, job, result: Err(error()) });
            self.lists.done.push_back(end);
        }
    }

    fn take_readiness(&mut self) {
        let Some(watch) = &mut self.watch else { return };
        while let Some(news) = watch.take() {
            let (News::Unwatched(name) | News::Writable(name)) = news;
            let Some(used) = self.links.iter_mut().find(|used| used.link.name == name) else {
                continue;
            };
            match news {
                News::Writable(_) => used.is_blocked = false,
                News::Unwatched(_) => {
                    used.is_watched = watch.reading(name, used.link.socket()).is_ok();
                }
            }
        }
    }
}

/// By the kernel if it can be; a host that has no eventfd for the queue looks by itself.
fn watch(host: Host, queue: QueueIndex) -> Option<Watch> {
    let by_ring = Watch::by_ring(host.notifier_fd(queue)?);
    let by_thread = |why: io::Error| {
        host.log(Level::Info, &format!("no io_uring ({why}): a thread waits for sockets instead"));
        let spawn = |task| host.spawn(&format!("nbd q{}", queue.0), task);
        Watch::by_thread(host.notifier_fd(queue).ok_or(io::ErrorKind::NotFound)?, spawn)
    };
    by_ring
        .or_else(by_thread)
        .inspect_err(|why| {
            let every = LOOK.as_micros();
            let line = format!("no thread either ({why}): sockets are looked at every {every} us");
            host.log(Level::Warn, &line);
        })
        .ok()
}

fn watch_reading(watch: &mut Option<Watch>, used: &mut Used) {
    if let Some(watch) = watch {
        used.is_watched = watch.reading(used.link.name, used.link.socket()).is_ok();
    }
}

/// Whether the kernel will say when the socket takes more.
fn watch_writing(watch: &mut Option<Watch>, used: &Used) -> bool {
    let Some(watch) = watch else { return false };
    watch.writing(used.link.name, used.link.socket()).is_ok()
}

impl Port for NbdPort {
    type Job = Job;

    fn kind(job: &Job) -> JobKind {
        job.kind()
    }

    fn capacity(&self) -> usize {
        CAPACITY
    }

    fn in_flight(&self) -> usize {
        self.taken
    }

    #[inline]
    fn has_room(&self) -> bool {
        self.taken < CAPACITY
    }

    #[inline]
    fn push(&mut self, request: Request, job: Job) {
        self.taken += 1;
        self.lists.waiting.push_back(Item { request, job });
    }

    #[inline]
    fn advance(&mut self) -> Option<PortEnd<Job>> {
        if self.taken == 0 {
            return None;
        }
        if self.lists.done.is_empty() {
            self.take_readiness();
            self.turn();
            if self.lists.done.is_empty() && self.watch.is_none() {
                let (host, queue) = (self.pool.host, self.lists.queue);
                // It fails when the instance ends.
                let _ = host.after(LOOK, move || host.notify(queue));
            }
        }
        let end = self.lists.done.pop_front()?;
        self.taken -= 1;
        Some(end)
    }

    fn cancel(&mut self) {
        self.collect_mail();
        self.give_up_waiting(|| io::Error::from_raw_os_error(ECANCELED));
    }

    fn close(&mut self) {
        if let Some(watch) = &mut self.watch {
            self.links.iter().for_each(|used| watch.forget(used.link.name));
        }
        self.pool.detach(self.lists.queue);
    }
}

impl Drop for NbdPort {
    fn drop(&mut self) {
        if self.taken > 0 {
            self.pool.detach(self.lists.queue);
        }
    }
}
