//! How a server is started, and what if it cannot be.

use super::Supervisor;
use super::serving::borrowed;
use crate::descriptor::Descriptor;
use crate::process::{Ended, Program, Server};
use channel::{Start, ToServer, VERSION};
use rustix::io::Errno;
use std::io;
use std::time::{Duration, Instant};

/// How long after there was too little of something for another process it is tried again.
const START_AGAIN: Duration = Duration::from_millis(100);

/// No server serves.
#[derive(Debug)]
pub(super) struct Outage {
    pub(super) since: Instant,
    /// What became of the last one.
    pub(super) why: String,
}

impl Supervisor {
    /// What a server is told first.
    fn start_message(&self, prepare_only: bool) -> (ToServer, Vec<Descriptor>) {
        let (start, descriptors) = match self.vault.give() {
            Some((vault, objects)) => (Start::Vault(Box::new(vault)), objects),
            None => {
                let (domain, params) = (self.options.domain.clone(), self.options.params.clone());
                (Start::First { domain, params }, Vec::new())
            }
        };
        let settings = self.options.settings.clone();
        let message = ToServer::Start {
            version: VERSION,
            settings,
            start,
            prepare_only,
            hears_aside: true,
            hears_events: true,
        };
        (message, descriptors)
    }

    /// Starts a server, and tells it what to begin with.
    pub(super) fn start_with(&self, program: &Program, prepare_only: bool) -> io::Result<Server> {
        let server = Server::start(program)?;
        self.give_counters(&server);
        let (message, descriptors) = self.start_message(prepare_only);
        // If it cannot be told, it is dead, or has to be; that is found out as any death.
        server.channel.send(&message, &borrowed(&descriptors)).unwrap_or_else(|_| server.kill());
        Ok(server)
    }

    /// Starts the server that is to have the device.
    pub(super) fn start_server(&mut self) {
        if self.server.is_some() {
            return;
        }
        match self.start_with(&self.options.program, false) {
            Ok(server) => self.server = Some(server),
            Err(error) if self.has_device() => self.cannot_start(&error),
            Err(error) => self.over = Some(Err(format!("cannot start a server: {error}"))),
        }
        self.tell_facts();
    }

    /// Begins an outage, or says what has come to pass in it.
    pub(super) fn none_serves(&mut self, why: String) {
        let since = self.outage.take().map_or_else(Instant::now, |outage| outage.since);
        self.outage = Some(Outage { since, why });
    }

    /// No process could be made of the program. What the machine lacks says nothing of a program or
    /// of a module, and may be there again in a moment; all else is as a death.
    pub(super) fn cannot_start(&mut self, error: &io::Error) {
        let sentence = format!("cannot start a server: {error}");
        if !is_shortage(error) {
            log::error!("{sentence}");
            self.none_serves(sentence);
            return self.decide(Ended::Unknown, None, None);
        }
        let sentence = format!("{sentence}; it is tried again and again");
        self.said.say(&sentence);
        self.none_serves(sentence);
        // A kept disk has had no server yet.
        self.make_front();
        self.start_at = Some(Instant::now() + START_AGAIN);
    }
}

/// Whether there is too little of something for another process.
fn is_shortage(error: &io::Error) -> bool {
    let short = [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE, Errno::NOBUFS];
    Errno::from_io_error(error).is_some_and(|errno| short.contains(&errno))
}
