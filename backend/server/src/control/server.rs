//! The control socket's server: one thread accepts, and each client gets a thread of its own.
//!
//! The accepting thread never waits for a client: whom it refuses it tells in one write that does
//! not block. Clients that say nothing and watch nothing keep nobody out: they make room. It owns
//! the [`SocketFile`], so that the name is gone as soon as nobody would accept any more.
//!
//! Ending takes a bounded time whatever clients and operations do. First nobody is accepted and
//! nothing more is read, so that idle clients leave at once and replies under way still arrive;
//! then the connections are cut; then the threads that are left, each inside an operation that does
//! not come back, are counted and left alone.
//!
//! It does not know what is said on a connection.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::Level;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use serde_json::Value;

use super::connection::Connection;
use super::peer::Commanders;
use super::rpc::{self, RpcError};
use super::{Operations, SocketError, SocketFile, SocketName};
use crate::log_limit::{self, how_to_have_more};

/// How long to let accepting rest when the process has no descriptor or thread left for a client.
const EXHAUSTED: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What a client may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Clients at a time. One more takes the place of the one that has been idle longest, or is
    /// refused with a sentence.
    pub connections: usize,
    /// How long a client must have had nothing to say before it has to make room for another one.
    pub idle: Duration,
    /// Bytes of a line, without its end.
    pub line: usize,
    /// How long a client may take to fetch a reply or an event; then it is cut off.
    pub write_timeout: Duration,
    /// How long [`Server::stop`] waits for replies under way, and again for cut connections.
    pub stop_patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 32,
            line: 64 << 10,
            idle: Duration::from_secs(1),
            write_timeout: Duration::from_secs(5),
            stop_patience: Duration::from_secs(1),
        }
    }
}

/// A running control socket. Dropping it stops it, as [`Server::stop`] does.
#[derive(Debug)]
pub struct Server {
    name: Arc<SocketName>,
    clients: Arc<Clients>,
    stop_patience: Duration,
    acceptor: Option<(thread::JoinHandle<()>, Arc<OwnedFd>)>,
}

impl Server {
    /// Listens on `path` with the default limits.
    ///
    /// # Errors
    /// The path cannot be listened on, or the process has no thread or descriptor left.
    pub fn start<O: Operations>(path: &Path, operations: Arc<O>) -> Result<Server, SocketError> {
        Server::start_with(path, operations, Limits::default())
    }

    /// Listens on `path`.
    ///
    /// # Errors
    /// As for [`Server::start`].
    pub fn start_with<O: Operations>(
        path: &Path,
        operations: Arc<O>,
        limits: Limits,
    ) -> Result<Server, SocketError> {
        let system = |source: io::Error| SocketError::System { path: path.to_owned(), source };
        let socket = SocketFile::listen(path, 0o600)?;
        socket.listener().set_nonblocking(true).map_err(system)?;
        let wake =
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| system(e.into()))?;
        let wake = Arc::new(wake);
        let clients = Arc::new(Clients::default());
        let name = Arc::clone(socket.name());
        let acceptor = Acceptor {
            socket,
            commanders: Commanders::of_this_process(),
            operations,
            limits,
            wake: Arc::clone(&wake),
            clients: Arc::clone(&clients),
        };
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || acceptor.run())
            .map_err(system)?;
        Ok(Server {
            name,
            clients,
            stop_patience: limits.stop_patience,
            acceptor: Some((thread, wake)),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.name.path()
    }

    /// The name in the file system.
    #[must_use]
    pub const fn name(&self) -> &Arc<SocketName> {
        &self.name
    }

    /// Removes the socket and ends all connections, in a bounded time ([`Limits::stop_patience`],
    /// twice).
    ///
    /// Returns the number of clients whose operation did not come back; their threads are left
    /// behind.
    pub fn stop(mut self) -> usize {
        self.end()
    }

    fn end(&mut self) -> usize {
        let Some((thread, wake)) = self.acceptor.take() else { return 0 };
        let woken = rustix::io::write(&*wake, &1u64.to_ne_bytes());
        assert_eq!(woken, Ok(8), "an eventfd takes its first number");
        if thread.join().is_err() {
            log::error!("the control socket's thread has panicked");
        }
        // Nobody is accepted from here on, so the clients that there are get fewer only.
        let left = self.clients.end(self.stop_patience);
        if left > 0 {
            log::warn!("{left} client(s) of the control socket are left waiting for an operation");
        }
        left
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// The thread that accepts.
struct Acceptor<O> {
    socket: SocketFile,
    commanders: Commanders,
    operations: Arc<O>,
    limits: Limits,
    wake: Arc<OwnedFd>,
    clients: Arc<Clients>,
}

impl<O: Operations> Acceptor<O> {
    fn run(self) {
        while !self.wait(true, None) {
            match self.socket.listener().accept() {
                Ok((stream, _)) => {
                    if let Err((stream, error)) = self.serve(stream) {
                        refuse(&stream, error);
                    }
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    // Descriptors or memory have run out; the client stays in the backlog
                    // meanwhile.
                    log_limit::say(
                        Level::Warn,
                        "control client",
                        format_args!(
                            "cannot accept a client on the control socket, which has to wait: {}",
                            how_to_have_more(&e)
                        ),
                    );
                    if self.wait(false, Some(&EXHAUSTED)) {
                        break;
                    }
                }
            }
        }
    }

    /// Waits for the end, and for a client if `clients`; whether it is the end.
    fn wait(&self, clients: bool, timeout: Option<&Timespec>) -> bool {
        let interest = if clients { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
            PollFd::new(self.socket.listener(), interest),
        ];
        // An interrupted wait comes back with nothing to do.
        let ready = rustix::event::poll(&mut fds, timeout);
        ready.is_ok() && !fds[0].revents().is_empty()
    }

    /// Gives a client a thread, or says why not.
    fn serve(&self, stream: UnixStream) -> Result<(), (Arc<UnixStream>, RpcError)> {
        let stream = Arc::new(stream);
        let refused =
            |name, message: String| Err((Arc::clone(&stream), RpcError::refused(name, message)));
        if let Err(error) = self.commanders.check(&stream) {
            return Err((stream, error));
        }
        let most = self.limits.connections;
        let Some(seat) = Seat::take(&self.clients, &stream, &self.limits) else {
            return refused(
                "too_many_connections",
                format!(
                    "there are {most} connections to the control socket, the most it serves; close one"
                ),
            );
        };
        let connection =
            Connection::new(Arc::clone(&stream), Arc::clone(&self.operations), self.limits);
        let served = thread::Builder::new().name("control-client".to_owned()).spawn(move || {
            let seat = seat;
            connection.run(&seat.clients.stopping, &seat.idle);
        });
        served.map_err(|e| {
            log::warn!("cannot serve a client of the control socket: {e}");
            (
                stream,
                RpcError::refused(
                    "no_resources",
                    format!("the daemon cannot start a thread for you: {e}"),
                ),
            )
        })?;
        Ok(())
    }
}

/// Tells a client why it is not served, if it can be told at once.
fn refuse(stream: &UnixStream, error: RpcError) {
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
enum Doing {
    /// It is being served.
    #[default]
    Something,
    /// It has had nothing to say since then.
    Nothing(Instant),
    /// It has been told to connect again: what it says now is not listened to.
    Leaving,
}

/// Whether a client is idle.
#[derive(Debug, Default)]
pub(super) struct Idle(Mutex<Doing>);

impl Idle {
    fn lock(&self) -> MutexGuard<'_, Doing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits with `wait` for what a client has to say. `None` if it has been cut off meanwhile.
    pub(super) fn during<R>(&self, wait: impl FnOnce() -> R) -> Option<R> {
        *self.lock() = Doing::Nothing(Instant::now());
        let heard = wait();
        let mut doing = self.lock();
        let stays = *doing != Doing::Leaving;
        *doing = Doing::Something;
        stays.then_some(heard)
    }

    fn since(&self) -> Option<Instant> {
        match *self.lock() {
            Doing::Nothing(since) => Some(since),
            Doing::Something | Doing::Leaving => None,
        }
    }

    /// Whether it is idle still, and is not listened to from now on.
    fn cut(&self, since: Instant) -> bool {
        let mut doing = self.lock();
        let is_idle = *doing == Doing::Nothing(since);
        if is_idle {
            *doing = Doing::Leaving;
        }
        is_idle
    }
}

/// Everybody who is connected.
#[derive(Debug, Default)]
struct Clients {
    /// Set once; a connection looks at it between two requests, nothing else is published by it.
    stopping: AtomicBool,
    seats: Mutex<Seats>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct Seats {
    next: u64,
    taken: BTreeMap<u64, (Arc<UnixStream>, Arc<Idle>)>,
}

impl Seats {
    /// Cuts off who has been idle longest, and for `least` at least. Whether there was one.
    fn make_room(&mut self, least: Duration) -> bool {
        let idle =
            self.taken.iter().filter_map(|(&number, (_, idle))| idle.since().zip(Some(number)));
        let Some((since, number)) = idle.min().filter(|(since, _)| since.elapsed() >= least) else {
            return false;
        };
        if !self.taken.get(&number).is_some_and(|(_, idle)| idle.cut(since)) {
            return false;
        }
        if let Some((stream, _)) = self.taken.remove(&number) {
            let message =
                "this connection was idle, and another client needed its place; connect again";
            refuse(&stream, RpcError::refused("too_many_connections", message.to_owned()));
            // It fails if the client is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        true
    }
}

impl Clients {
    fn seats(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes everybody leave; how many did not.
    fn end(&self, patience: Duration) -> usize {
        self.stopping.store(true, Ordering::Relaxed);
        for how in [Shutdown::Read, Shutdown::Both] {
            if self.hang_up(how, patience) == 0 {
                return 0;
            }
        }
        self.seats().taken.len()
    }

    /// Shuts all connections down in one way and waits; how many are left.
    fn hang_up(&self, how: Shutdown, patience: Duration) -> usize {
        let deadline = Instant::now() + patience;
        let mut seats = self.seats();
        for (stream, _) in seats.taken.values() {
            // It fails if the client is gone already.
            let _ = stream.shutdown(how);
        }
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            if seats.taken.is_empty() || rest.is_zero() {
                return seats.taken.len();
            }
            (seats, _) =
                self.left.wait_timeout(seats, rest).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A client's place among [`Clients`]; given back on drop, so by a panic as well.
struct Seat {
    clients: Arc<Clients>,
    number: u64,
    idle: Arc<Idle>,
}

impl Seat {
    fn take(clients: &Arc<Clients>, stream: &Arc<UnixStream>, limits: &Limits) -> Option<Seat> {
        let mut seats = clients.seats();
        if seats.taken.len() >= limits.connections && !seats.make_room(limits.idle) {
            return None;
        }
        let number = seats.next;
        seats.next += 1;
        let idle = Arc::new(Idle::default());
        seats.taken.insert(number, (Arc::clone(stream), Arc::clone(&idle)));
        Some(Seat { clients: Arc::clone(clients), number, idle })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.clients.seats().taken.remove(&self.number);
        self.clients.left.notify_all();
    }
}
