//! A second frontend.
//!
//! One that connects while another one is served is let in, because it would stand still otherwise,
//! and its whole guest with it. It is answered, and its rings run when those of the other have
//! stopped, or the other has left: so a guest goes from one QEMU to another on the same host, and
//! back if the other one fails. The two take turns as their rings start. A third is turned away,
//! and so is one that says nothing.

use super::Supervisor;
use crate::region::Region;
use crate::relay::Relay;
use crate::session::{Over, Session};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

/// How long a second frontend may say nothing.
const SILENCE: Duration = Duration::from_secs(2);

/// The session of a frontend that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) session: Session,
    since: Instant,
}

impl Waiting {
    pub(super) fn new(session: Session) -> Self {
        Self { session, since: Instant::now() }
    }

    /// When it has been silent for too long.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (!self.session.has_spoken()).then(|| self.since + SILENCE)
    }
}

impl Supervisor {
    /// A frontend has connected that cannot be served now.
    pub(super) fn let_wait(&mut self, stream: OwnedFd, region: Region) {
        if self.waiting.is_some() {
            self.said.say("a third frontend has connected, and is turned away: one is served, and one waits for it to stop");
            return;
        }
        self.sessions += 1;
        let largest = self.options.settings.queue_size;
        let mut session =
            Session::new(self.sessions, stream, Relay::new(region, self.told, largest));
        session.wait();
        self.waiting = Some(Waiting::new(session));
        log::info!(
            "a second frontend has connected: its rings run when those of the first have stopped"
        );
    }

    pub(super) fn settle_waiting(&mut self, now: Instant) {
        let Some(waiting) = &mut self.waiting else { return };
        let is_silent = waiting.deadline().is_some_and(|deadline| deadline <= now);
        let waiting = &mut waiting.session;
        waiting.pump(None);
        if waiting.over().is_none() && is_silent && !waiting.has_spoken() {
            self.said.say("a second frontend has said nothing, and is turned away");
            self.waiting = None;
            return;
        }
        match waiting.over() {
            None => {}
            Some(why) => {
                match why {
                    Over::Gone | Over::Ended => {
                        log::info!("the frontend that waited has disconnected")
                    }
                    Over::Refused(why) => {
                        self.said.say(&format!("the session that waited ended: {why}"))
                    }
                }
                self.waiting = None;
                return;
            }
        }
        let Some(session) = &mut self.session else {
            if self.is_free() {
                self.take_turns();
            }
            return;
        };
        for answer in session.take_answers() {
            let answer = waiting.relay.question_is_answered(answer);
            waiting.apply(answer, None);
        }
        if !session.relay.asks_for_other() {
            waiting.relay.question_is_lost();
        }
        if !session.relay.is_held()
            && let Some(question) = waiting.relay.question()
        {
            let asked = session.relay.ask_for_other(question);
            // What it answers is heard at the next turn, which comes with it.
            session.apply(asked, None);
        } else if waiting.relay.wants_server() && session.relay.may_wait() {
            self.take_turns();
        }
    }

    /// The server is to leave a session, if it has it, and says when it has. If it has not, it may
    /// still be leaving the one before.
    pub(super) const fn is_to_leave(&mut self, session: u64, was_given: bool) {
        if was_given {
            self.ending_session = Some(session);
        }
    }

    /// The session that waits has the server from now on, and the other, if it is there, waits.
    fn take_turns(&mut self) {
        let Some(Waiting { session: mut next, .. }) = self.waiting.take() else { return };
        if let Some(mut before) = self.session.take() {
            log::info!("the second frontend's rings run: those of the first have stopped");
            // First of all.
            self.is_to_leave(before.number, before.was_given);
            before.wait();
            self.waiting = Some(Waiting::new(before));
        }
        next.relay.stop_waiting();
        self.session = Some(next);
        self.give_session();
    }
}
