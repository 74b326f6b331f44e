//! The loop, with servers that a test plays.

mod clients;
mod ending;
mod exchange;
mod standstill;
mod starting;
mod vaults;

use super::candidate::Candidate;
use super::exchange::{Exchange, Step};
use super::scripted::{self, file, ready};
use super::*;
use crate::front::Front;
use crate::process::{Ended, Played};
use crate::region::Region;
use crate::relay::Relay;
use channel::Module;
use control::{Limits, SocketFile};
use std::os::unix::net::UnixStream;
use std::path::Path;
use tempfile::TempDir;

/// A supervisor of a device that has been served, with the live module `a`, and with no server.
pub(super) struct Stage {
    pub(super) supervisor: Supervisor,
    _end: UnixStream,
    _directory: TempDir,
}

fn module(name: &str, image: channel::Kept) -> Module {
    Module { name: name.into(), sha256: name.into(), ..scripted::module(image) }
}

impl Stage {
    pub(super) fn new(hang_timeout: Option<Duration>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (options, end) = scripted::options(directory.path());
        let supervision = Supervision { has_spare: false, hang_timeout };
        let mut supervisor = Supervisor::new(Options { supervision, ..options });
        let live = Some(module("a", 1));
        let list = channel::Vault { generation: 3, live, ..channel::Vault::default() };
        supervisor.vault.take(list, &[1], vec![file()]).unwrap();
        let control = directory.path().join("control");
        let control = SocketFile::listen(&control, 0o600).unwrap();
        supervisor.front = Some(Front::new(control, Limits::default()).unwrap());
        (supervisor.has_served, supervisor.start_at) = (true, None);
        Self { supervisor, _end: end, _directory: directory }
    }

    /// A server serves.
    pub(super) fn serve(&mut self) -> Played {
        let (mut server, played) = Server::played();
        server.ready = Some(Instant::now());
        self.supervisor.server = Some(server);
        played
    }

    /// A candidate was begun with the module that is live.
    pub(super) fn begin_candidate(&mut self, is_prepared: bool) -> Played {
        let (server, played) = Server::played();
        let live = self.supervisor.vault.live().map(ToOwned::to_owned);
        self.supervisor.candidate = Some(Candidate { server, is_prepared, prepared: None, live });
        played
    }

    /// An exchange has come so far.
    pub(super) fn exchange(&mut self, step: Step) {
        let ticket = self.supervisor.front.as_mut().unwrap().any_ticket();
        let mut exchange = Exchange::begin(ticket, Instant::now());
        exchange.step = step;
        self.supervisor.exchange = Some(exchange);
    }

    /// A frontend is connected that has said nothing.
    pub(super) fn connect(&mut self) -> UnixStream {
        let (frontend, ours) = UnixStream::pair().unwrap();
        let relay = Relay::new(Region::own(1).unwrap(), None, 128);
        self.supervisor.sessions += 1;
        self.supervisor.session =
            Some(Session::new(self.supervisor.sessions, frontend.into(), relay));
        ours
    }

    /// Turns of the loop, until it `is` so.
    pub(super) fn turn_until(&mut self, is: impl Fn(&Supervisor) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            self.supervisor.settle();
            if is(&self.supervisor) {
                return;
            }
            assert!(Instant::now() < deadline, "it does not come to that: {:?}", self.supervisor);
            self.supervisor.turn().unwrap();
        }
    }
}

/// What a server was told by now.
pub(super) fn told(played: &Played) -> Vec<ToServer> {
    let next = || match played.channel.try_receive() {
        Ok(Received::Message(message, _)) => Some(message),
        _ => None,
    };
    std::iter::from_fn(next).collect()
}

/// A server says something.
pub(super) fn say(played: &Played, message: &ToSupervisor) {
    played.channel.send(message, &[]).unwrap();
}

pub(super) fn prepared() -> ToSupervisor {
    ToSupervisor::Prepared { version: channel::VERSION, program: "1.0.0".into(), confined: false }
}
