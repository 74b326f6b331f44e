//! The control front: clients of the control socket, on their way to a server that may die.
//!
//! The supervisor accepts the clients. What a client says is passed on to the server, and what the
//! server answers is passed back, byte for byte, with these exceptions: `status` gets the members
//! `supervisor` and `server`, and is answered here while no server lives; `upgrade_daemon` is
//! answered here; a request that the server had when it died is answered here with `server_died`;
//! `watch` goes on over a death and over an exchange.
//!
//! [`Front`] is a state machine that never waits. The loop that drives it:
//!
//! 1. before each wait, [`Front::polled`] says which descriptors are looked at, and
//!    [`Front::deadline`] when at the latest to come back;
//! 2. after it, [`Front::servers_are`]; then [`Front::ready`] for each of them on which something
//!    has happened, and once [`Front::tick`];
//! 3. whenever the server changes: [`Front::server_up`], [`Front::hold`], [`Front::server_gone`];
//!    whenever there is news: [`Front::tell`], [`Front::event`], [`Front::answer`];
//! 4. after all of these, [`Front::wishes`] says what the loop is to do for it.

mod answers;
mod client;
mod facts;
mod packing;
mod pipe;
mod shared;
#[cfg(test)]
mod tests;
mod token;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use control::lines::Line;
use control::messages::UpgradeDaemonRequest;
use control::rpc::{Action, RpcError};
use control::{Code, Commanders, Limits, SocketFile, how_to_have_more, refuse};
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use telemetry::{Book, book};

use answers::Said;
use client::Client;
pub use facts::{Facts, Phase, ServerFacts, SupervisorFacts};
pub use packing::PackedFront;
use pipe::Pipe;
use shared::{Server, Shared};
pub use token::{Polled, Token};

use crate::said::Said as SaidBefore;

/// How long a request waits for a server before it is answered with `no_server`. `hotswapctl`
/// waits twice as long for the quickest answers.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to let accepting rest when the process has no descriptor left for a client.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// Most clients that are let in at a time; more wait for the next turn of the loop.
const AT_A_TIME: usize = 64;

/// Names a request that the loop answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ticket(u64);

/// What the loop is to do for the front.
#[derive(Debug)]
pub enum Wish {
    /// Send this stream to the server, with [`channel::ToServer::Client`].
    Client(OwnedFd),
    /// Exchange the daemon's program, and then [`Front::answer`].
    UpgradeDaemon(Ticket, UpgradeDaemonRequest),
    /// [`Front::answer`] with the metrics.
    Metrics(Ticket),
    /// End the daemon. Only asked for while no server lives; else the server hears it.
    Shutdown,
    /// Start a server for an upgrade, without a live domain: none is started any more with the one
    /// that there was. May be wished more than once.
    Revive,
}

impl Wish {
    /// What the loop is to do itself for a request.
    fn of(action: &Action, ticket: Ticket) -> Option<Self> {
        match action {
            Action::UpgradeDaemon(request) => Some(Self::UpgradeDaemon(ticket, request.clone())),
            Action::Metrics => Some(Self::Metrics(ticket)),
            _ => None,
        }
    }
}

/// All clients of the control socket.
#[derive(Debug)]
pub struct Front {
    socket: SocketFile,
    commanders: Commanders,
    /// The servers' processes, in which modules run: they may not command.
    servers: Vec<u32>,
    /// Those that have ended, as long as connections of theirs may wait to be accepted.
    former: Vec<u32>,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    shared: Shared,
    /// Asks for the device's state, so that it is known when no server lives.
    observer: Option<Pipe>,
    /// Accepting rests until then.
    accept_again: Option<Instant>,
    /// What clients have brought about, and the log has said.
    said: SaidBefore,
}

impl Front {
    /// Serves the clients of `socket`. There is no server yet.
    ///
    /// # Errors
    /// The socket cannot be made one that does not wait.
    pub fn new(socket: SocketFile, limits: Limits) -> io::Result<Self> {
        socket.listener().set_nonblocking(true)?;
        Ok(Self {
            socket,
            commanders: Commanders::of_this_process(),
            servers: Vec::new(),
            former: Vec::new(),
            clients: BTreeMap::new(),
            next_client: 0,
            shared: Shared {
                limits,
                patience: PATIENCE,
                server: Server::Gone,
                facts: None,
                last_status: None,
                is_stale: false,
                wishes: Vec::new(),
                next_ticket: 0,
                last_event: 0,
                events_before: 0,
                book: Book::default(),
                tells_events: false,
            },
            observer: None,
            accept_again: None,
            said: SaidBefore::default(),
        })
    }

    /// Goes on with what has happened before.
    #[must_use]
    pub fn with_book(mut self, book: Book) -> Self {
        self.shared.last_event = book.last();
        self.shared.events_before = book.last();
        self.shared.book = book;
        self
    }

    /// The socket that clients connect to.
    #[must_use]
    pub const fn socket(&self) -> &SocketFile {
        &self.socket
    }

    /// A number that no request has had.
    #[cfg(test)]
    pub(crate) const fn any_ticket(&mut self) -> Ticket {
        self.shared.ticket()
    }

    /// What to look at.
    #[must_use]
    pub fn polled(&self) -> Vec<Polled<'_>> {
        let mut polled = Vec::new();
        let look = |token, pipe: &Pipe, hear| Some((token, pipe.interest(hear)?));
        if self.accept_again.is_none() {
            let fd = self.socket.listener().as_fd();
            polled.push(Polled { token: Token::LISTENER, fd, interest: PollFlags::IN });
        }
        for (&number, client) in &self.clients {
            if let Some((token, interest)) =
                look(Token::of(number, false), &client.pipe, client.can_speak())
            {
                polled.push(Polled { token, fd: client.pipe.as_fd(), interest });
            }
            // Its end would be said again and again while there is no room for what came before.
            let server = client.server.as_ref().filter(|_| client.pipe.is_sent());
            if let Some(server) = server
                && let Some((token, interest)) = look(Token::of(number, true), server, true)
            {
                polled.push(Polled { token, fd: server.as_fd(), interest });
            }
        }
        if let Some(observer) = &self.observer
            && let Some((token, interest)) = look(Token::OBSERVER, observer, true)
        {
            polled.push(Polled { token, fd: observer.as_fd(), interest });
        }
        polled
    }

    /// When [`Front::tick`] is due at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let clients = self.clients.values().filter_map(|client| client.deadline(&self.shared));
        clients.chain(self.accept_again).min()
    }

    /// These are the servers' processes now, and were when it was looked whether clients wait to be
    /// let in, `has_waiting` if any did. Those that were servers before are not forgotten before
    /// they can have no connection any more that is not accepted.
    pub fn servers_are(&mut self, servers: Vec<u32>, has_waiting: bool) {
        self.former.extend(self.servers.iter().filter(|server| !servers.contains(server)));
        self.former.retain(|server| !servers.contains(server));
        // It is not looked at while accepting rests.
        if !has_waiting && self.accept_again.is_none() {
            self.former.clear();
        }
        self.servers = servers;
    }

    /// Something has happened on a descriptor.
    pub fn ready(&mut self, token: Token, what: PollFlags) {
        match token {
            Token::LISTENER => self.accept(),
            Token::OBSERVER => self.observe(),
            Token(number) => self.with_client(number >> 1, |client, shared| {
                let is_gone = what.intersects(PollFlags::HUP | PollFlags::ERR);
                if number & 1 == 0 && is_gone {
                    client.pipe.hang_up();
                } else if number & 1 == 0 {
                    client.pipe.flush()?;
                } else if let Some(server) = &mut client.server {
                    // If it cannot be sent, the stream's end is found by reading.
                    let _ = server.flush();
                }
                client.advance(shared)
            }),
        }
        self.ask_state();
    }

    /// Time has passed.
    pub fn tick(&mut self) {
        let now = Instant::now();
        self.accept_again = self.accept_again.filter(|&again| again > now);
        let is_due = |client: &Client| client.deadline(&self.shared).is_some_and(|due| due <= now);
        let due = self.clients.iter().filter(|(_, client)| is_due(client));
        for number in due.map(|(&number, _)| number).collect::<Vec<_>>() {
            self.with_client(number, Client::advance);
        }
        self.ask_state();
    }

    /// What is to be done for the front. Each is said once.
    pub fn wishes(&mut self) -> Vec<Wish> {
        std::mem::take(&mut self.shared.wishes)
    }

    /// A server serves from now on (it has said `Ready`, or `Resumed` after [`Front::hold`]).
    pub fn server_up(&mut self) {
        self.shared.server = Server::Up;
        self.shared.is_stale = true;
        self.ask_state();
        self.with_all(|client, shared| {
            client.server_up();
            client.advance(shared)
        });
    }

    /// Pass nothing on from now on: the server is about to be stopped. What it has been given
    /// already is still answered by it.
    pub fn hold(&mut self) {
        self.shared.server = Server::Held;
    }

    /// The server is dead, or has been told to exit. What it had and has not answered is answered
    /// here. Its last words are heard first.
    pub fn server_gone(&mut self) {
        self.observe();
        self.observer = None;
        self.with_all(|client, shared| client.server_gone(shared).map(|()| true));
        self.shared.server = Server::Gone;
        // The next server counts from 1.
        self.shared.events_before = self.shared.last_event;
        self.with_all(Client::advance);
    }

    /// What `status` says of the processes, from now on.
    pub fn tell(&mut self, facts: Facts) {
        self.shared.facts = Some(facts);
    }

    /// Something has happened that those who watch should know: `event` names it, `members` has
    /// what else there is to say.
    pub fn event(&mut self, event: &str, members: Value) {
        let Value::Object(event) = answers::event(event, members) else { return };
        self.happened(event);
    }

    /// As [`event`](Self::event), of an event that is whole; it is kept, as far as it
    /// [fits](book::fit).
    pub fn happened(&mut self, event: Map<String, Value>) {
        let mut event = book::fit(event);
        event.entry("time_ms").or_insert_with(answers::time_ms);
        self.shared.book.skip_to(self.shared.last_event);
        self.shared.last_event = self.shared.book.note(event.clone());
        self.with_all(|client, shared| client.tell(&event, shared).map(|()| true));
        if self.shared.server == Server::Gone {
            self.shared.events_before = self.shared.last_event;
        }
        // What begins is not over: to ask now would take time from it.
        self.shared.is_stale |= event.get("event").is_none_or(|name| name != "started");
    }

    /// Why what has happened could not be written down, said once.
    pub fn trouble(&mut self) -> Option<String> {
        self.shared.book.trouble()
    }

    /// All that has happened is written down, and nothing is until more happens. `false` if the
    /// disk takes longer than `patience`.
    pub fn rest(&mut self, patience: Duration) -> bool {
        self.shared.book.rest(patience)
    }

    /// Whether the server says all that happens by [`happened`](Self::happened), so that clients
    /// need not ask it.
    pub const fn tells_events(&mut self, tells: bool) {
        self.shared.tells_events = tells;
    }

    /// What `status` says, as far as it is known here.
    #[must_use]
    pub fn status(&self) -> Value {
        let Shared { last_status, facts, server, .. } = &self.shared;
        match (server, last_status) {
            (Server::Up, Some(state)) => answers::status(state.clone(), facts.as_ref()),
            _ => answers::own_status(last_status.as_ref(), facts.as_ref()),
        }
    }

    /// What is known here of the device's state is old.
    pub fn look_again(&mut self) {
        self.shared.is_stale = true;
        self.ask_state();
    }

    /// A request that was wished for is answered.
    pub fn answer(&mut self, ticket: Ticket, answer: Result<Value, RpcError>) {
        self.with_all(|client, shared| match client.settle(ticket, &answer)? {
            true => client.advance(shared),
            false => Ok(true),
        });
        self.ask_state();
    }

    fn with_client(
        &mut self,
        number: u64,
        act: impl FnOnce(&mut Client, &mut Shared) -> io::Result<bool>,
    ) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        let stays = act(client, &mut self.shared).unwrap_or_else(|error| {
            if error.kind() == io::ErrorKind::TimedOut {
                log::warn!(
                    "a client of the control socket does not read what it asked for; it is cut off"
                );
            } else {
                log::debug!("a client of the control socket is gone: {error}");
            }
            false
        });
        if !stays {
            self.clients.remove(&number);
        }
    }

    fn with_all(&mut self, mut act: impl FnMut(&mut Client, &mut Shared) -> io::Result<bool>) {
        for number in self.clients.keys().copied().collect::<Vec<_>>() {
            self.with_client(number, &mut act);
        }
    }

    fn accept(&mut self) {
        // The loop has more to do, however many come.
        for _ in 0..AT_A_TIME {
            match self.socket.listener().accept() {
                Ok((stream, _)) => {
                    if let Err((stream, error)) = self.admit(stream) {
                        refuse(&stream, error);
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        self.former.clear();
                        return;
                    }
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        let why = how_to_have_more(&error);
                        self.said.say(&format!(
                            "cannot accept a client on the control socket, which has to wait: {why}"
                        ));
                        self.accept_again = Some(Instant::now() + EXHAUSTED);
                        return;
                    }
                },
            }
        }
    }

    /// Gives a client a place, or says why not.
    fn admit(&mut self, stream: UnixStream) -> Result<(), (UnixStream, RpcError)> {
        let is_server = |pid| self.servers.contains(&pid) || self.former.contains(&pid);
        if let Err(error) = self.commanders.check_but(&stream, is_server) {
            return Err((stream, error));
        }
        let most = self.shared.limits.connections;
        if self.clients.len() >= most && !self.make_room() {
            let message = format!(
                "there are {most} connections to the control socket, the most it serves; close one"
            );
            return Err((stream, RpcError::new(Code::TooManyConnections, message)));
        }
        match Client::new(stream, &self.shared.limits) {
            Ok(client) => {
                self.clients.insert(self.next_client, client);
                self.next_client += 1;
            }
            Err(error) => log::warn!("cannot serve a client of the control socket: {error}"),
        }
        Ok(())
    }

    /// Forgets a client that has gone before its answer, or evicts the one that has been idle
    /// longest, and long enough. Whether there was one.
    fn make_room(&mut self) -> bool {
        let left = self.clients.iter().find(|(_, client)| client.has_left_a_request());
        if let Some((&number, _)) = left {
            self.clients.remove(&number);
            return true;
        }
        let idle = self.clients.iter().filter(|(_, client)| client.is_idle());
        let longest = idle.min_by_key(|(_, client)| client.active);
        let long_enough =
            longest.filter(|(_, client)| client.active.elapsed() >= self.shared.limits.idle);
        let Some((&number, _)) = long_enough else { return false };
        let message =
            "this connection was idle, and another client needed its place; connect again";
        let error = RpcError::new(Code::TooManyConnections, message);
        self.with_client(number, |client, _| {
            client.pipe.say(&answers::line(&Value::Null, Err(error))).map(|()| false)
        });
        true
    }

    /// Asks the server for the device's state if it may have changed.
    fn ask_state(&mut self) {
        if self.shared.is_stale && self.shared.server == Server::Up && self.observer.is_none() {
            self.shared.is_stale = false;
            let asked = self.shared.connect().and_then(|mut pipe| {
                pipe.say(answers::STATUS)?;
                Ok(pipe)
            });
            self.observer = asked.ok();
        }
    }

    fn observe(&mut self) {
        let Some(observer) = &mut self.observer else { return };
        match observer.next_line() {
            Ok(None) if !observer.is_over() => return,
            Ok(Some(Line::Whole(line))) => {
                if let Some(Said::Answer(Some(state), _)) = answers::read(&line) {
                    self.shared.last_status = Some(state);
                }
            }
            _ => {}
        }
        self.observer = None;
    }
}
