//! A connection in use: what was sent on it and not answered, and the bytes on their way.
//!
//! A queue's worker does all of it in [`Link::turn`]: it encodes what waits, sends as much as the
//! socket takes, receives what is there and decodes it straight to where the guest wants it. Queues
//! may share a connection; then the first that comes receives for all. No call waits.
//!
//! At a moment when nothing is in flight the connection is at a message's boundary, and it can be
//! taken along by another instance as it is.

use crate::answers;
use crate::common::Common;
use crate::connect::{self, Connection};
use crate::job::{Item, Lists, Mail, Work};
use crate::marks::{DEPTH, Mark};
use crate::negotiate::Export;
use crate::outgoing::Outgoing;
use crate::server::Process;
use crate::wire::{self, Command, Decoder, Event};
use domain_api::QueueIndex;
use domain_io::engine::PortEnd;
use domain_io::tcp::Silence;
use rustix::net::{self, RecvFlags};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes that are received at a time.
const RECEIVED: usize = 256 << 10;
/// Bytes that wait to be sent, above which no request is added.
const MOST_OUT: usize = 1 << 20;
/// How often a turn receives: others want to be served, too.
const ROUNDS: usize = 8;
/// How often a request may be answered by a server that it is going down. Each connection to it
/// may say so once before it is left.
const MOST_REFUSALS: u32 = 20;
/// Whose a flush is that no request has asked for.
const NO_QUEUE: QueueIndex = QueueIndex(u32::MAX);
/// Largest trim and write-zeroes: 4 GiB less the largest block.
const LARGEST_RANGE: u64 = (4 << 30) - (64 << 10);

/// One that was sent and not answered.
struct Sent {
    cookie: u64,
    /// Whose it is. None, if its queue is gone.
    item: Option<Item>,
    queue: QueueIndex,
    work: Work,
    /// Where and how much, of what was asked in this message.
    offset: u64,
    len: u64,
}

struct State {
    out: Outgoing,
    buffer: Vec<u8>,
    decoder: Decoder,
    table: Vec<Option<Sent>>,
    free: Vec<u8>,
    /// Number of the next message.
    sequence: u64,
    broken: bool,
}

/// A connection.
pub(crate) struct Link {
    /// Its place among the connections.
    pub(crate) slot: usize,
    /// No other one is called so, in this instance.
    pub(crate) name: u32,
    pub(crate) export: Export,
    pub(crate) server: Option<Process>,
    socket: OwnedFd,
    state: Mutex<State>,
    /// How many are in flight, for a look without the lock.
    busy: AtomicUsize,
    /// Nothing new is to be sent on it.
    closing: AtomicBool,
    /// That is so because the server is going down.
    leaving: AtomicBool,
}

/// What a connection leaves that has ended.
pub(crate) struct Left {
    /// What it had not answered, oldest first. None for one whose queue is gone.
    pub(crate) items: Vec<(QueueIndex, Option<Item>)>,
    /// What it may still change.
    pub(crate) ranges: Vec<Range<u64>>,
    /// A flush was among it, and one that no request has asked for.
    pub(crate) has_flush: bool,
    pub(crate) has_own_flush: bool,
}

/// What a turn has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Turn {
    /// The socket takes no more now.
    pub(crate) is_blocked: bool,
    /// It has no room for what waits.
    pub(crate) is_full: bool,
}

impl Link {
    pub(crate) fn new(slot: usize, name: u32, connection: Connection, nonce: u32) -> Self {
        let Connection { socket, export, server } = connection;
        let state = State {
            out: Outgoing::default(),
            buffer: Vec::new(),
            decoder: Decoder::default(),
            table: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH as u8).rev().collect(),
            sequence: u64::from(nonce) << 32,
            broken: false,
        };
        Self {
            slot,
            name,
            export,
            server,
            socket,
            state: Mutex::new(state),
            busy: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Requests in flight.
    pub(crate) fn busy(&self) -> usize {
        self.busy.load(Ordering::Relaxed)
    }

    /// Sends nothing new on it.
    pub(crate) fn close_when_idle(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    /// The same, because the server is going down.
    pub(crate) fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.close_when_idle();
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// Whether nothing is in flight or half said, so that it can be handed on.
    pub(crate) fn is_at_rest(&self) -> bool {
        let state = self.lock();
        !state.broken
            && state.free.len() == DEPTH
            && state.out.len() == 0
            && !state.decoder.is_within_a_reply()
    }

    /// Ends the connection, also where another process has a descriptor of it.
    pub(crate) fn shut(&self) {
        connect::end(&self.socket);
    }

    /// Whether the server's host does not acknowledge what is sent to it. One that does not read
    /// does.
    pub(crate) fn is_unheard(&self) -> bool {
        self.busy() > 0 && Silence::of(self.socket()).is_some_and(Silence::is_long)
    }

    /// Sends and receives what can be, for the queue of `lists`. An error is the connection's end.
    pub(crate) fn turn(
        &self,
        pool: &Common,
        lists: &mut Lists,
        limit: usize,
    ) -> Result<Turn, String> {
        let mut state = self.lock();
        let mut turn = Turn { is_blocked: false, is_full: false };
        if state.broken {
            return Ok(turn);
        }
        let mut free = state.free.len();
        for _ in 0..ROUNDS {
            if !lists.waiting.is_empty() && !self.is_closing() {
                turn.is_full = state.fill(self, pool, lists, limit);
            }
            turn.is_blocked = self.send(&mut state).map_err(|error| error.to_string())?;
            let in_flight = DEPTH - state.free.len();
            if in_flight > 0 {
                self.receive(&mut state, pool, lists)?;
            }
            free = state.free.len();
            let has_ended = DEPTH - free < in_flight;
            if !has_ended || lists.waiting.is_empty() || self.is_closing() {
                return Ok(turn);
            }
            // There is room for what waits, or a further piece of what has ended.
        }
        if free == DEPTH {
            // Nothing else would bring the next turn.
            pool.notify_all();
        }
        Ok(turn)
    }

    /// Sends what was encoded. Returns whether some of it has to wait.
    fn send(&self, state: &mut State) -> io::Result<bool> {
        match state.out.send(self.socket()) {
            // Replies may be there that were sent before the end; the next receive sees it.
            Err(rustix::io::Errno::PIPE) if state.free.len() < DEPTH => Ok(false),
            result => result.map_err(io::Error::from),
        }
    }

    fn receive(&self, state: &mut State, pool: &Common, lists: &mut Lists) -> Result<(), String> {
        if state.buffer.is_empty() {
            state.buffer = vec![0; RECEIVED];
        }
        for _ in 0..ROUNDS {
            let received = match net::recv(&self.socket, &mut state.buffer[..], RecvFlags::DONTWAIT)
            {
                Ok((0, _)) => return Err("the server has closed it".to_owned()),
                Ok((received, _)) => received,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(io::Error::from(error).to_string()),
            };
            let buffer = std::mem::take(&mut state.buffer);
            let outcome = self.decode(state, &buffer[..received], pool, lists);
            state.buffer = buffer;
            outcome?;
            if state.free.len() == DEPTH {
                return Ok(());
            }
        }
        // There may be more, and nothing else would say so.
        pool.notify_all();
        Ok(())
    }

    fn decode(
        &self,
        state: &mut State,
        mut bytes: &[u8],
        pool: &Common,
        lists: &mut Lists,
    ) -> Result<(), String> {
        loop {
            let State { decoder, table, .. } = state;
            let event = decoder.next(&mut bytes, |cookie| {
                let sent = table[answers::index(cookie)].as_ref()?;
                let data = if sent.work == Work::Read { sent.len } else { 0 };
                (sent.cookie == cookie).then_some(data)
            });
            match event.map_err(|violation| violation.to_string())? {
                None => return Ok(()),
                Some(Event::Data { cookie, at, bytes }) => {
                    let sent = table[answers::index(cookie)].as_ref().expect("just looked at");
                    if let Some(Item { request, job }) = &sent.item {
                        request.buffer().copy_from_slice((job.done + at) as usize, bytes);
                    }
                }
                Some(Event::Ended { cookie, error }) => {
                    self.ended(state, answers::index(cookie), error, pool, lists);
                }
            }
        }
    }

    /// A message was answered.
    fn ended(&self, state: &mut State, index: usize, error: u32, pool: &Common, lists: &mut Lists) {
        let sent = state.take(index).expect("the decoder has found it");
        self.count(state, pool);
        if error != wire::error::SHUTDOWN {
            pool.note_answer();
        }
        pool.answered(sent.item.as_ref().map(|item| &item.job));
        if sent.work.is_change() {
            pool.clear_mark(self.slot, index);
        }
        if sent.work.is_change() && error == 0 || sent.work == Work::Flush && error != 0 {
            pool.note_unflushed();
        }
        let Some(Item { request, mut job }) = sent.item else {
            return self.ended_without_request(sent.work, sent.queue, error, pool);
        };
        let mail = match error {
            0 => {
                job.done += sent.len;
                if job.done < job.total(&request) {
                    Mail::Again(Item { request, job })
                } else {
                    Mail::Done(pool.concluded(PortEnd { request, job, result: Ok(()) }))
                }
            }
            // It has done nothing of it.
            wire::error::SHUTDOWN => {
                self.leave();
                pool.going_down();
                job.refusals += 1;
                let item = Item { request, job };
                // One that goes down does so at some time.
                if item.job.refusals > MOST_REFUSALS {
                    pool.blame(item, "the server says that it is going down, again and again")
                } else {
                    Mail::Again(item)
                }
            }
            error => {
                let result = Err(wire::error::told(error));
                Mail::Done(pool.concluded(PortEnd { request, job, result }))
            }
        };
        if sent.queue == lists.queue {
            match mail {
                Mail::Again(item) => lists.waiting.push_front(item),
                Mail::Done(end) => lists.done.push_back(end),
            }
        } else {
            pool.post(sent.queue, [mail]);
            pool.host.notify(sent.queue);
        }
    }

    /// The same, of a flush of our own, or of what a queue has left that is gone.
    fn ended_without_request(&self, work: Work, queue: QueueIndex, error: u32, pool: &Common) {
        let goes_down = error == wire::error::SHUTDOWN;
        if goes_down {
            self.leave();
            pool.going_down();
        } else if error != 0 && work == Work::Flush {
            pool.flush_failed();
        }
        if queue == NO_QUEUE {
            if goes_down {
                pool.own_flush.undone()
            } else {
                pool.own_flush.answered()
            }
            pool.wake_keeper();
        }
    }

    fn count(&self, state: &State, pool: &Common) {
        let busy = DEPTH - state.free.len();
        self.busy.store(busy, Ordering::Relaxed);
        if busy == 0 && self.is_closing() {
            pool.wake_keeper();
        }
    }

    /// Sends a flush that no request has asked for. The next receive takes in its answer. Returns
    /// whether there was room for it.
    pub(crate) fn flush(&self, pool: &Common) -> bool {
        let mut state = self.lock();
        if state.broken || self.is_closing() || state.free.is_empty() {
            return false;
        }
        let work = Work::Flush;
        let (index, cookie) = state.next_cookie(work);
        state.out.push(&wire::request(Command::Flush, 0, cookie, 0, 0));
        state.table[usize::from(index)] =
            Some(Sent { cookie, item: None, queue: NO_QUEUE, work, offset: 0, len: 0 });
        pool.takes_unflushed();
        pool.own_flush.sent();
        pool.sent();
        self.count(&state, pool);
        // What fails here is seen by what receives.
        let _ = self.send(&mut state);
        true
    }

    /// The connection has ended: takes out what it had not answered, with the ranges that it may
    /// still change. Only the first call gets anything.
    pub(crate) fn break_off(&self) -> Option<Left> {
        let mut state = self.lock();
        if std::mem::replace(&mut state.broken, true) {
            return None;
        }
        self.shut();
        let (mut items, mut ranges) = (Vec::new(), Vec::new());
        let mut left: Vec<Sent> = (0..DEPTH).filter_map(|index| state.take(index)).collect();
        left.sort_by_key(|sent| sent.cookie);
        let has_flush = left.iter().any(|sent| sent.work == Work::Flush);
        let has_own_flush = left.iter().any(|sent| sent.queue == NO_QUEUE);
        for sent in left {
            if sent.work.is_change() {
                ranges.push(sent.offset..sent.offset + sent.len);
            }
            items.push((sent.queue, sent.item));
        }
        state.out = Outgoing::default();
        self.busy.store(0, Ordering::Relaxed);
        Some(Left { items, ranges, has_flush, has_own_flush })
    }

    /// A queue is gone: what it has in flight is no queue's. Its memory is not touched any more.
    pub(crate) fn abandon(&self, queue: QueueIndex) {
        let mut state = self.lock();
        state.table.iter_mut().flatten().filter(|sent| sent.queue == queue).for_each(|sent| {
            sent.item = None;
        });
    }
}

impl State {
    fn take(&mut self, index: usize) -> Option<Sent> {
        let sent = self.table[index].take()?;
        self.free.push(index as u8);
        Some(sent)
    }

    fn next_cookie(&mut self, work: Work) -> (u8, u64) {
        let index = self.free.pop().expect("looked at before");
        // The upper half stays: it is the connection's (`answers`).
        let counter = self.sequence.wrapping_add(1 << 8) & 0xffff_ff00;
        self.sequence = self.sequence & !0xffff_ffff | counter;
        (index, self.sequence | u64::from(answers::low_byte(index, work == Work::Flush)))
    }

    /// Encodes what waits, as far as there is room. Returns whether there was none.
    fn fill(&mut self, link: &Link, pool: &Common, lists: &mut Lists, limit: usize) -> bool {
        let mut at = 0;
        while at < lists.waiting.len() {
            if DEPTH - self.free.len() >= limit || self.out.len() >= MOST_OUT {
                return true;
            }
            let Item { request, job } = &mut lists.waiting[at];
            if !pool.may_send(request, job) {
                at += 1;
                continue;
            }
            let Some(item) = lists.waiting.remove(at) else { break };
            self.encode(link, pool, lists.queue, item);
        }
        false
    }

    fn encode(&mut self, link: &Link, pool: &Common, queue: QueueIndex, item: Item) {
        let Item { request, job } = &item;
        let (work, done) = (job.work, job.done);
        let left = job.total(request) - done;
        let largest = match work {
            Work::Read | Work::Write => u64::from(link.export.maximum),
            Work::Flush => 0,
            Work::Trim | Work::Zeroes { .. } => LARGEST_RANGE,
        };
        let len = left.min(largest);
        let offset = if work == Work::Flush { 0 } else { request.offset() + done };
        let (command, flags) = match work {
            Work::Read => (Command::Read, 0),
            Work::Write => (Command::Write, 0),
            Work::Flush => (Command::Flush, 0),
            Work::Trim => (Command::Trim, 0),
            Work::Zeroes { may_unmap: true } => (Command::WriteZeroes, 0),
            Work::Zeroes { may_unmap: false } => (Command::WriteZeroes, wire::NO_HOLE),
        };
        let (index, cookie) = self.next_cookie(work);
        if work == Work::Flush {
            pool.takes_unflushed();
        }
        // Before the first byte of it can be read by the server.
        if work.is_change() {
            pool.set_mark(link.slot, index.into(), Mark::new(offset, len));
        }
        self.out.push(&wire::request(command, flags, cookie, offset, len as u32));
        if work == Work::Write {
            request.buffer().copy_to_slice(done as usize, self.out.room(len as usize));
        }
        self.table[usize::from(index)] =
            Some(Sent { cookie, item: Some(item), queue, work, offset, len });
        pool.sent();
        link.count(self, pool);
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("slot", &self.slot).field("busy", &self.busy()).finish()
    }
}
