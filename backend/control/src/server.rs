//! The control socket's server: one thread accepts, and each client gets a thread of its own.
//!
//! The accepting thread never waits for a client: a client that is refused is told so in one write
//! that does not block. Clients that say nothing and watch nothing keep no other out: they make
//! room. The thread owns the [`SocketFile`], so that the name is gone as soon as no client would be
//! accepted any more.
//!
//! Ending takes a bounded time whatever clients and operations do. First no client is accepted and
//! nothing more is read, so that idle clients leave at once and replies under way still arrive;
//! then the connections are cut; then the threads that are left, each inside an operation that does
//! not come back, are counted and left alone.
//!
//! [`Adopting`] is the same without a socket: another process accepts.
//!
//! It does not know what is said on a connection.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use crate::clients::{ClientSlot, Clients, refuse};
use crate::code::Code;
use crate::connection::Connection;
use crate::limits::Limits;
use crate::operations::Operations;
use crate::peer::Commanders;
use crate::rpc::RpcError;
use crate::socket::{SocketError, SocketFile, SocketName};

/// How long to let accepting rest when the process has no descriptor or thread left for a client.
const EXHAUSTED: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

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
        let service = Service {
            commanders: Commanders::of_this_process(),
            operations,
            limits,
            clients: Arc::clone(&clients),
        };
        let acceptor = Acceptor { socket, service, wake: Arc::clone(&wake) };
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
        // No client is accepted from here on, so the clients that there are get fewer only.
        end_clients(&self.clients, self.stop_patience)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// What clients are served with.
#[derive(Debug)]
struct Service<O> {
    commanders: Commanders,
    operations: Arc<O>,
    limits: Limits,
    clients: Arc<Clients>,
}

/// A server without a socket: it is given its clients. Dropping it ends all connections.
#[derive(Debug)]
pub struct Adopting<O> {
    service: Service<O>,
}

impl<O: Operations> Adopting<O> {
    /// With no clients yet.
    #[must_use]
    pub fn new(operations: Arc<O>, limits: Limits) -> Self {
        let commanders = Commanders::of_this_process();
        Self { service: Service { commanders, operations, limits, clients: Arc::default() } }
    }

    /// Serves a client that another process has accepted; if it may not command, or there is no
    /// place for it, it is told so.
    pub fn adopt(&self, stream: UnixStream) {
        if let Err((stream, error)) = self.service.serve(stream) {
            refuse(&stream, error);
        }
    }
}

impl<O> Drop for Adopting<O> {
    fn drop(&mut self) {
        let Service { clients, limits, .. } = &self.service;
        end_clients(clients, limits.stop_patience);
    }
}

/// Ends all connections; how many clients are left inside an operation.
fn end_clients(clients: &Clients, patience: Duration) -> usize {
    let left = clients.end(patience);
    if left > 0 {
        log::warn!("{left} client(s) of the control socket are left waiting for an operation");
    }
    left
}

/// The thread that accepts.
struct Acceptor<O> {
    socket: SocketFile,
    service: Service<O>,
    wake: Arc<OwnedFd>,
}

impl<O: Operations> Acceptor<O> {
    fn run(self) {
        while !self.wait(true, None) {
            match self.socket.listener().accept() {
                Ok((stream, _)) => {
                    if let Err((stream, error)) = self.service.serve(stream) {
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
                    self.service.operations.accept_failed(&e);
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
}

impl<O: Operations> Service<O> {
    /// Gives a client a thread, or says why not.
    fn serve(&self, stream: UnixStream) -> Result<(), (Arc<UnixStream>, RpcError)> {
        let stream = Arc::new(stream);
        let refused =
            |code, message: String| Err((Arc::clone(&stream), RpcError::new(code, message)));
        if let Err(error) = self.commanders.check(&stream) {
            return Err((stream, error));
        }
        let most = self.limits.connections;
        let Some(slot) = ClientSlot::take(&self.clients, &stream, &self.limits) else {
            return refused(
                Code::TooManyConnections,
                format!(
                    "there are {most} connections to the control socket, the most it serves; close one"
                ),
            );
        };
        let connection =
            Connection::new(Arc::clone(&stream), Arc::clone(&self.operations), self.limits);
        let served = thread::Builder::new().name("control-client".to_owned()).spawn(move || {
            let slot = slot;
            connection.run(&slot.clients.stopping, &slot.activity);
        });
        if let Err(e) = served {
            log::warn!("cannot serve a client of the control socket: {e}");
            return refused(
                Code::NoResources,
                format!("the daemon cannot start a thread for you: {e}"),
            );
        }
        Ok(())
    }
}
