//! The clients that are connected: their places, which of them are idle, and their end.
//!
//! A client is idle from when its thread waits for it to say something. A client more than there
//! are places for takes that of the one that has been idle longest, which is told so and not
//! listened to any more.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::code::Code;
use crate::limits::Limits;
use crate::rpc::{self, RpcError};

/// Tells a client why it is not served, if it can be told at once.
pub fn refuse(stream: &UnixStream, error: RpcError) {
    let line = format!("{}\n", rpc::reply(Value::Null, Err(error)));
    // A fresh connection has room for it. If it cannot be told, it sees the end of the connection.
    if let Err(e) =
        stream.set_nonblocking(true).and_then(|()| (&*stream).write_all(line.as_bytes()))
    {
        log::debug!("a client was refused without a word: {e}");
    }
}

/// What a client is doing.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum ClientState {
    /// It is being served.
    #[default]
    Busy,
    /// It has had nothing to say since then.
    IdleSince(Instant),
    /// It has been told to connect again: what it says now is not listened to.
    Evicted,
}

/// The state of one client, shared by its thread and the accepting one.
#[derive(Debug, Default)]
pub(crate) struct Activity(Mutex<ClientState>);

impl Activity {
    fn lock(&self) -> MutexGuard<'_, ClientState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits with `wait` for what a client has to say. `None` if it has been evicted meanwhile.
    pub(crate) fn idle_during<R>(&self, wait: impl FnOnce() -> R) -> Option<R> {
        *self.lock() = ClientState::IdleSince(Instant::now());
        let heard = wait();
        let mut state = self.lock();
        let stays = *state != ClientState::Evicted;
        *state = ClientState::Busy;
        stays.then_some(heard)
    }

    fn idle_since(&self) -> Option<Instant> {
        match *self.lock() {
            ClientState::IdleSince(since) => Some(since),
            ClientState::Busy | ClientState::Evicted => None,
        }
    }

    /// Whether it is idle still, and is not listened to from now on.
    fn evict(&self, since: Instant) -> bool {
        let mut state = self.lock();
        let is_idle = *state == ClientState::IdleSince(since);
        if is_idle {
            *state = ClientState::Evicted;
        }
        is_idle
    }
}

/// All clients that are connected.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    /// Set once; a connection looks at it between two requests, nothing else is published by it.
    pub(crate) stopping: AtomicBool,
    slots: Mutex<Slots>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct Slots {
    next: u64,
    taken: BTreeMap<u64, (Arc<UnixStream>, Arc<Activity>)>,
}

impl Slots {
    /// Evicts the client that has been idle longest, and for `least` at least. Whether there was
    /// one.
    fn make_room(&mut self, least: Duration) -> bool {
        let idle = self
            .taken
            .iter()
            .filter_map(|(&number, (_, activity))| activity.idle_since().zip(Some(number)));
        let Some((since, number)) = idle.min().filter(|(since, _)| since.elapsed() >= least) else {
            return false;
        };
        if !self.taken.get(&number).is_some_and(|(_, activity)| activity.evict(since)) {
            return false;
        }
        if let Some((stream, _)) = self.taken.remove(&number) {
            let message =
                "this connection was idle, and another client needed its place; connect again";
            refuse(&stream, RpcError::new(Code::TooManyConnections, message));
            // It fails if the client is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        true
    }
}

impl Clients {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes all of them leave; how many did not.
    pub(crate) fn end(&self, patience: Duration) -> usize {
        self.stopping.store(true, Ordering::Relaxed);
        for how in [Shutdown::Read, Shutdown::Both] {
            if self.hang_up(how, patience) == 0 {
                return 0;
            }
        }
        self.slots().taken.len()
    }

    /// Shuts all connections down in one way and waits; how many are left.
    fn hang_up(&self, how: Shutdown, patience: Duration) -> usize {
        let deadline = Instant::now() + patience;
        let mut slots = self.slots();
        for (stream, _) in slots.taken.values() {
            // It fails if the client is gone already.
            let _ = stream.shutdown(how);
        }
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            if slots.taken.is_empty() || rest.is_zero() {
                return slots.taken.len();
            }
            (slots, _) =
                self.left.wait_timeout(slots, rest).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A client's place among [`Clients`]; given back on drop, so by a panic as well.
pub(crate) struct ClientSlot {
    pub(crate) clients: Arc<Clients>,
    pub(crate) activity: Arc<Activity>,
    number: u64,
}

impl ClientSlot {
    pub(crate) fn take(
        clients: &Arc<Clients>,
        stream: &Arc<UnixStream>,
        limits: &Limits,
    ) -> Option<ClientSlot> {
        let mut slots = clients.slots();
        if slots.taken.len() >= limits.connections && !slots.make_room(limits.idle) {
            return None;
        }
        let number = slots.next;
        slots.next += 1;
        let activity = Arc::new(Activity::default());
        slots.taken.insert(number, (Arc::clone(stream), Arc::clone(&activity)));
        Some(ClientSlot { clients: Arc::clone(clients), activity, number })
    }
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        self.clients.slots().taken.remove(&self.number);
        self.clients.left.notify_all();
    }
}
