//! A server that is ready beside the one that serves: to be exchanged with it, or to go on after
//! its death.
//!
//! An exchange: the candidate is started and prepared; the frontend is held, and the current server
//! stopped with nothing in flight; the candidate is activated with what the other has left; it
//! serves, and the other leaves. Whatever goes wrong before that, the other resumes.

use super::reexecution::program;
use super::{LEAVE_PATIENCE, Supervisor, Which};
use crate::front::Ticket;
use crate::process::{Ended, Program, Server, own_path};
use channel::ToServer;
use control::Code;
use control::messages::{Part, UpgradeDaemonRequest};
use control::rpc::RpcError;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long the current server may wait for what is in flight.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a candidate may take to be prepared.
const PREPARE_PATIENCE: Duration = Duration::from_secs(60);
/// How long the current server may take to stop. It has bounds of its own for each that it waits
/// for: another change (5 s), and then a takeover, what an earlier change has left, what is being
/// made durable, and its workers, 15 s each.
const STOP_PATIENCE: Duration = Duration::from_secs(75);
/// How long the others may take for their part.
const STEP_PATIENCE: Duration = Duration::from_secs(30);

/// How far an exchange is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The candidate gets ready.
    Preparing,
    /// The frontend is held until the server owes it nothing.
    Holding,
    /// The current server was told to stop.
    Stopping,
    /// The candidate was given the device.
    Activating,
    /// It is told what the session was.
    Replaying,
    /// The current server was told to go on.
    Resuming,
}

/// An exchange of the server.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) ticket: Ticket,
    pub(super) step: Step,
    begun: Instant,
    spawned: Instant,
    prepared: Instant,
    /// When the frontend was held.
    held: Instant,
    stopped: Instant,
    activated: Instant,
    pub(super) deadline: Instant,
    /// The program before, and its version, once its server has left.
    before: Option<(Program, Option<String>)>,
    /// Why it fails, once it does.
    pub(super) failure: Option<String>,
}

impl Exchange {
    /// One whose candidate was started just now.
    pub(super) fn begin(ticket: Ticket, begun: Instant) -> Self {
        let spawned = Instant::now();
        Self {
            ticket,
            step: Step::Preparing,
            begun,
            spawned,
            prepared: spawned,
            held: spawned,
            stopped: spawned,
            activated: spawned,
            deadline: begun + PREPARE_PATIENCE,
            before: None,
            failure: None,
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.step != Step::Preparing && self.step != Step::Replaying
    }

    pub(super) const fn deadline(&self) -> Instant {
        self.deadline
    }
}

pub(super) fn failed(message: impl Into<String>) -> RpcError {
    RpcError::new(Code::ExchangeFailed, message)
}

impl Supervisor {
    /// A client wants the daemon to be exchanged.
    pub(super) fn upgrade_daemon(&mut self, ticket: Ticket, request: UpgradeDaemonRequest) {
        // What a device needs whose servers do not live is another program for them.
        let is_for_servers = self.is_given_up && request.only.is_none();
        if request.only != Some(Part::Server) && !is_for_servers {
            self.begin_reexecution(ticket, request);
            return;
        }
        let own = || own_path().ok().filter(|_| is_for_servers);
        let path = request.path.or_else(own);
        let path = path.unwrap_or_else(|| self.options.program.path.clone());
        match Program::open(&path) {
            Ok(program) if program.is_executable() => self.begin_exchange(ticket, program),
            Ok(_) => {
                let message = format!("{} is no program", path.display());
                self.answer(ticket, Err(RpcError::new(Code::ProgramUnusable, message)));
            }
            Err(error) => {
                let message = format!("{}: {error}", path.display());
                self.answer(ticket, Err(RpcError::new(Code::ProgramUnusable, message)));
            }
        }
    }

    pub(super) fn answer(&mut self, ticket: Ticket, answer: Result<Value, RpcError>) {
        let answer = self.complete(ticket, answer);
        if let Some(front) = &mut self.front {
            front.answer(ticket, answer);
        }
    }

    pub(super) fn begin_exchange(&mut self, ticket: Ticket, program: Program) {
        let now = Instant::now();
        let is_busy = self.exchange.is_some() || self.reexecution.is_some();
        if is_busy || self.stopped.is_some() || self.ending.is_some() {
            let message = "another exchange of the daemon is under way";
            self.answer(ticket, Err(RpcError::new(Code::ExchangeRuns, message)));
            return;
        }
        if self.serving().is_none() {
            // A program that serves is what a device without a server needs. If this one does not,
            // the one that has is gone back to.
            self.options.program = program;
            self.program_before.clone_from(&self.served);
            self.deaths.another_program();
            if self.is_given_up {
                self.deaths.forgive();
                self.is_given_up = false;
                self.start_at = Some(now);
            }
            let message = "no server serves; the next one is started from this program";
            self.answer(ticket, Err(RpcError::new(Code::NoServer, message)));
            return;
        }
        self.dismiss_candidate();
        match self.start_candidate(&program) {
            Ok(candidate) => {
                self.candidate = Some(candidate);
                self.exchange = Some(Exchange::begin(ticket, now));
                self.tell_facts();
            }
            Err(error) => {
                let message = format!("the program cannot be started: {error}");
                self.answer(ticket, Err(RpcError::new(Code::ProgramUnusable, message)));
            }
        }
    }

    /// The candidate waits for the device.
    pub(super) fn candidate_is_prepared(&mut self) {
        let Some(candidate) = &self.candidate else { return };
        if !candidate.is_prepared {
            candidate.server.kill();
            return;
        }
        if self.server.is_none() && self.outage.is_some() && self.promote_candidate() {
            return;
        }
        if let (None, Some(candidate)) = (&self.exchange, &self.candidate) {
            let pid = candidate.server.pid.as_raw_nonzero();
            log::info!("process {pid} is the spare: it serves when the server dies");
        }
        let now = Instant::now();
        if let Some(exchange) = &mut self.exchange
            && exchange.step == Step::Preparing
        {
            (exchange.prepared, exchange.held) = (now, now);
            (exchange.step, exchange.deadline) = (Step::Holding, now + STEP_PATIENCE);
            if let Some(session) = &mut self.session {
                session.relay.pause(true);
            }
            if let Some(front) = &mut self.front {
                front.hold();
            }
        }
    }

    pub(super) fn settle_exchange(&mut self, now: Instant) {
        let Some(exchange) = &mut self.exchange else { return };
        match exchange.step {
            Step::Holding => {
                let is_idle = self.session.as_ref().is_none_or(|session| session.relay.is_idle());
                let serves = self.server.as_ref().is_some_and(|server| server.ready.is_some());
                // What it has left is to be whole when it stops.
                let is_told = self.vault_again_at.is_none();
                if is_idle && serves && is_told && self.ending_session.is_none() {
                    exchange.held = now;
                    (exchange.step, exchange.deadline) = (Step::Stopping, now + STOP_PATIENCE);
                    let drain_timeout_ms = DRAIN_TIMEOUT.as_millis() as u64;
                    self.send(&ToServer::Stop { drain_timeout_ms });
                    return;
                }
            }
            Step::Replaying => {
                // A session that waits for an upgrade is given to no server.
                if self.session.is_none() || self.vault.awaits_upgrade() {
                    self.session_is_up();
                    return;
                }
            }
            Step::Preparing | Step::Stopping | Step::Activating | Step::Resuming => {}
        }
        if self.exchange.as_ref().is_some_and(|exchange| exchange.deadline <= now) {
            self.exchange_takes_too_long();
        }
    }

    fn exchange_takes_too_long(&mut self) {
        let Some(exchange) = &mut self.exchange else { return };
        exchange.deadline = Instant::now() + STEP_PATIENCE;
        match exchange.step {
            Step::Preparing => self.fail("the new server does not get ready in time"),
            Step::Holding => self.fail("the server does not answer in time"),
            // It has the device, and cannot be asked for it.
            Step::Stopping | Step::Resuming => {
                log::error!("the server does not say whether it has stopped, and is ended");
                if let Some(server) = &self.server {
                    server.kill();
                }
            }
            Step::Activating | Step::Replaying => {
                log::error!("the new server does not take the device in time, and is ended");
                if let Some(server) = &self.server {
                    server.kill();
                }
            }
        }
    }

    /// The exchange fails, before the current server was stopped.
    pub(super) fn fail(&mut self, why: &str) {
        self.dismiss_candidate();
        if let Some(exchange) = self.exchange.take() {
            log::warn!("the server is not exchanged: {why}");
            self.answer(exchange.ticket, Err(failed(why)));
        }
        self.go_on();
    }

    /// The current server goes on as before.
    fn go_on(&mut self) {
        if let Some(session) = &mut self.session {
            session.relay.pause(false);
        }
        if let Some(front) = &mut self.front
            && self.server.is_some()
        {
            front.server_up();
        }
        self.tell_facts();
        self.pass_end_on();
    }

    /// No exchange goes on, and no candidate stays.
    pub(super) fn give_exchange_up(&mut self) {
        let is_early = self
            .exchange
            .as_ref()
            .is_none_or(|exchange| matches!(exchange.step, Step::Preparing | Step::Holding));
        if is_early && (self.exchange.is_some() || self.candidate.is_some()) {
            self.fail("something has come between");
        }
    }

    /// The end is wanted: what was begun is undone, so that the server that had the device ends in
    /// its order. `false` if a server has to say first that it has come back, or has the device.
    pub(super) fn undo_exchange(&mut self) -> bool {
        let step = self.exchange.as_mut().map(|exchange| {
            exchange.failure.get_or_insert_with(|| "the daemon is about to end".to_owned());
            exchange.step
        });
        match step {
            None | Some(Step::Preparing | Step::Holding | Step::Replaying) => {
                self.give_exchange_up();
                return true;
            }
            Some(Step::Stopping) => self.dismiss_candidate(),
            Some(Step::Activating) => {
                // The other one cannot go on if it is dead.
                if let (Some(server), Some(_)) = (&self.server, &self.stopped) {
                    server.kill();
                }
            }
            Some(Step::Resuming) => {}
        }
        false
    }

    /// The current server has nothing in flight, and given the storage up.
    pub(super) fn has_stopped(&mut self, drain_ns: u64) {
        let now = Instant::now();
        // What it had is the next one's, which counts anew.
        if self.exchange.as_ref().is_some_and(Exchange::is_stopping) {
            self.none_in_flight();
        }
        let Some(exchange) = &mut self.exchange else { return };
        if exchange.step != Step::Stopping {
            return;
        }
        log::debug!("the server has stopped, {} us after it was asked", drain_ns / 1000);
        exchange.stopped = now;
        let why = if self.vault_again_at.is_some() {
            "what the server has left was lost on its way"
        } else {
            "the new server has died"
        };
        let Some(candidate) = self.candidate.take_if(|_| self.vault_again_at.is_none()) else {
            exchange.failure.get_or_insert_with(|| why.to_owned());
            exchange.step = Step::Resuming;
            self.dismiss_candidate();
            self.send(&ToServer::Resume);
            return;
        };
        (exchange.step, exchange.deadline) = (Step::Activating, now + STEP_PATIENCE);
        self.stopped = self.server.take();
        // What the candidate says has numbers of its own.
        self.vault_before = Some(self.vault.clone());
        // And answers questions of its own.
        self.pulse.begin_anew(now);
        self.activate(candidate);
    }

    pub(super) fn has_not_stopped(&mut self, code: &str, message: &str) {
        let is_stopping =
            self.exchange.as_ref().is_some_and(|exchange| exchange.step == Step::Stopping);
        if is_stopping {
            self.fail(&format!("the server could not be stopped: {message} ({code})"));
        }
    }

    pub(super) fn has_resumed(&mut self) {
        let Some(exchange) = self.exchange.take_if(|one| one.step == Step::Resuming) else {
            return;
        };
        let why = exchange.failure.as_deref().unwrap_or("the new server has died");
        log::warn!("the server is not exchanged: {why}");
        self.answer(exchange.ticket, Err(failed(why)));
        self.go_on();
    }

    /// The new server serves: the one before leaves, and has the session no more.
    pub(super) fn leave_stopped(&mut self) {
        // What has happened before is known first.
        self.hear(Which::Stopped);
        let now = Instant::now();
        if let Some(old) = self.stopped.take() {
            self.stopped_is_left(&old);
            self.leaving.push((old, now + LEAVE_PATIENCE));
        }
        let Some(exchange) = &mut self.exchange else { return };
        if exchange.step != Step::Activating {
            return;
        }
        exchange.activated = now;
        (exchange.step, exchange.deadline) = (Step::Replaying, now + STEP_PATIENCE);
        self.program_before = exchange.before.as_ref().map(|(program, _)| program.clone());
        if let Some(server) = &self.server {
            self.options.program = server.program.clone();
        }
    }

    /// What the stopped server had is the next one's. Its program is known until that serves.
    fn stopped_is_left(&mut self, old: &Server) {
        self.vault_before = None;
        if let Some(session) = &mut self.session {
            session.take_back();
            session.relay.pause(false);
        }
        self.ending_session = None;
        if let Some(exchange) = &mut self.exchange {
            exchange.before = Some((old.program.clone(), old.version.clone()));
        }
        if let Some(front) = &mut self.front {
            front.server_gone();
        }
    }

    /// The session is what it was: an exchange is over.
    pub(super) fn session_is_up(&mut self) {
        let Some(exchange) = self.exchange.take_if(|one| one.step == Step::Replaying) else {
            return;
        };
        let now = Instant::now();
        let us = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
        };
        let phases = json!({
            "start": us(exchange.begun, exchange.spawned),
            "prepare": us(exchange.spawned, exchange.prepared),
            "stop": us(exchange.held, exchange.stopped),
            "activate": us(exchange.stopped, exchange.activated),
            "replay": us(exchange.activated, now),
            "pause": us(exchange.held, now),
        });
        log::info!("another server serves; the guest has waited {} us", us(exchange.held, now));
        let version = self.server.as_ref().and_then(|server| server.version.clone());
        let from = exchange.before.and_then(|(_, version)| version);
        let (from, to) = (program(from.as_deref()), program(version.as_deref()));
        let answer = json!({ "what": ["server"], "from": from, "to": to, "phases_us": phases });
        self.event("server_exchanged", json!({ "phases_us": phases }));
        self.answer(exchange.ticket, Ok(answer));
        self.tell_facts();
        self.dismiss();
        self.put_spare_off();
    }

    /// The current server has died while the one before can still go on. `false` if there is none.
    pub(super) fn resume_stopped(&mut self, ended: Ended, died: &Server) -> bool {
        let Some(old) = self.stopped.take() else {
            return false;
        };
        let why = match &died.failure {
            Some((code, message)) => format!("{message} ({code})"),
            None => format!("the new server has ended with {ended}"),
        };
        self.server = Some(old);
        if let Some(before) = self.vault_before.take() {
            self.vault = before;
            self.keep_in_store();
        }
        if let Some(exchange) = &mut self.exchange {
            exchange.failure.get_or_insert(why);
            exchange.step = Step::Resuming;
            exchange.deadline = Instant::now() + STEP_PATIENCE;
        }
        // Its session is the same still.
        self.send(&ToServer::Resume);
        true
    }

    /// The server has died, and the candidate cannot go on for it: what was begun with that server
    /// is over. A candidate that gets ready meanwhile is for the next one.
    pub(super) fn exchange_has_lost_its_server(&mut self) {
        self.dismiss();
        if self.exchange.as_ref().is_some_and(|one| one.step != Step::Preparing) {
            self.fail("the server has died meanwhile");
        }
    }

    pub(super) fn stopped_has_died(&mut self, ended: Ended) {
        log::warn!("the old server has ended with {ended} before it was told to");
        if let Some(old) = self.stopped.take() {
            // It has nothing any more that is needed. The exchange is over when the new one serves.
            self.stopped_is_left(&old);
        }
    }
}
