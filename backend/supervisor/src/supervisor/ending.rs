//! The end of the daemon, in its order: the server answers what is in flight, flushes and ends.

use super::Supervisor;
use channel::ToServer;
use std::time::{Duration, Instant};

/// How long a server may take to end. It has a bound of 15 s of its own.
const END_PATIENCE: Duration = Duration::from_secs(16);
/// The end, once it is wanted.
#[derive(Debug)]
pub(super) struct Ending {
    deadline: Instant,
    /// What the server is still to be told.
    why: Option<String>,
}

impl Ending {
    pub(super) const fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Supervisor {
    /// The end is wanted.
    pub(super) fn end(&mut self, why: &str) {
        if self.ending.is_some() {
            return;
        }
        self.store.say("STOPPING=1");
        self.start_at = None;
        let is_undone = self.undo_exchange();
        self.ending =
            Some(Ending { deadline: Instant::now() + END_PATIENCE, why: Some(why.to_owned()) });
        if !is_undone {
            // The server that has the device then is told.
            return;
        }
        if self.serving().is_some() {
            self.pass_end_on();
            return;
        }
        if let Some(server) = &self.server {
            server.kill();
        }
        if self.has_served || self.is_given_up {
            log::error!("{why}: stopping, while no server serves");
            self.over = Some(Ok(1));
        } else {
            log::info!("{why}: stopping before anything is served");
            self.over = Some(Ok(0));
        }
    }

    /// The server that serves is told of the end, if that is wanted and it does not know.
    pub(super) fn pass_end_on(&mut self) {
        if let Some(ending) = &mut self.ending
            && let Some(why) = ending.why.take()
        {
            ending.deadline = Instant::now() + END_PATIENCE;
            self.send(&ToServer::Shutdown { why });
        }
    }

    /// A server that does not end is ended.
    pub(super) fn settle_ending(&mut self, now: Instant) {
        if self.ending.as_ref().is_some_and(|ending| ending.deadline <= now) {
            log::error!("the server does not end; what is in flight is left");
            if let Some(server) = &self.server {
                server.kill();
            }
            self.over = Some(Ok(1));
        }
    }
}
