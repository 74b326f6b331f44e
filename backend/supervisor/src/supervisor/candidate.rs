//! A server that is ready, or about to be, beside the one that serves: a spare, or what an exchange
//! gives the device to.

use super::exchange::{Step, failed};
use super::serving::borrowed;
use super::{LEAVE_PATIENCE, Supervisor};
use crate::process::{Ended, Program, Server};
use channel::ToServer;
use std::time::Instant;

/// A server that is ready, or about to be, and has no device.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) server: Server,
    pub(super) is_prepared: bool,
    pub(super) prepared: Option<Instant>,
    /// What it was prepared with.
    pub(super) live: Option<String>,
}

impl Candidate {
    pub(super) fn live(&self) -> Option<&str> {
        self.live.as_deref()
    }
}

impl Supervisor {
    pub(super) fn start_candidate(&self, program: &Program) -> std::io::Result<Candidate> {
        let server = self.start_with(program, true)?;
        let live = self.vault.live().map(ToOwned::to_owned);
        Ok(Candidate { server, is_prepared: false, prepared: None, live })
    }

    /// Ends a candidate that is not needed. It is told to leave, and not killed at once: what it
    /// has open elsewhere would be waited for by the server that goes on.
    pub(super) fn dismiss_candidate(&mut self) {
        if let Some(candidate) = self.candidate.take() {
            candidate.server.tell_to_leave();
            self.leaving.push((candidate.server, Instant::now() + LEAVE_PATIENCE));
        }
    }

    pub(super) fn activate(&mut self, candidate: Candidate) {
        let Some((vault, descriptors)) = self.vault.give() else {
            log::error!("there is nothing that a server could go on with");
            candidate.server.kill();
            self.server = Some(candidate.server);
            return;
        };
        let message = ToServer::Activate { vault: Box::new(vault) };
        if let Err(error) = candidate.server.channel.send(&message, &borrowed(&descriptors)) {
            log::error!("the new server is given no device: {error}");
            candidate.server.kill();
        }
        self.server = Some(candidate.server);
    }

    /// After a death: the candidate goes on, if there is one. `false` if not.
    pub(super) fn promote_candidate(&mut self) -> bool {
        let Some(candidate) = self
            .candidate
            .take_if(|candidate| candidate.is_prepared && candidate.live() == self.vault.live())
        else {
            return false;
        };
        if let Some(exchange) = self.exchange.take() {
            let died = "the server has died meanwhile; the new one goes on for it";
            self.answer(exchange.ticket, Err(failed(died)));
        }
        if let Some(session) = &mut self.session {
            session.relay.pause(false);
        }
        self.start_at = None;
        self.activate(candidate);
        true
    }

    pub(super) fn candidate_has_died(&mut self, ended: Ended) {
        let Some(candidate) = self.candidate.take() else { return };
        let why = match candidate.server.failure {
            Some((code, message)) => format!("{message} ({code})"),
            None => format!("the new server has ended with {ended}"),
        };
        let Some(exchange) = &mut self.exchange else {
            self.spare_has_died(&why);
            return;
        };
        match exchange.step {
            Step::Preparing | Step::Holding => self.fail(&why),
            // The current server says first whether it has stopped.
            _ => exchange.failure = Some(why),
        }
    }
}
