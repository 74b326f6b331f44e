//! The server that has the device: what it says, its death; and the frontend's session with it.

use super::{AFTER_A_FAILURE, Supervisor, Which};
use crate::deaths::{Choices, Death, Next};
use crate::descriptor::Descriptor;
use crate::front::{Facts, Phase, ServerFacts, SupervisorFacts};
use crate::process::{Ended, Server};
use crate::region::Region;
use crate::relay::Relay;
use crate::session::Session;
use channel::{Channel, Received, ToServer, ToSupervisor, VERSION};
use serde_json::json;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

/// How long after a vault was lost it is asked for again: descriptors may be there again by then.
const VAULT_AGAIN: Duration = Duration::from_secs(1);

fn milliseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The borrows that a packet takes.
pub(super) fn borrowed(descriptors: &[Descriptor]) -> Vec<BorrowedFd<'_>> {
    descriptors.iter().map(AsFd::as_fd).collect()
}

impl Supervisor {
    /// Whether the operator wants servers to be.
    pub(super) fn is_to_be_confined(&self) -> bool {
        self.options.settings.sandbox.as_ref().is_some_and(|sandbox| sandbox.enforces)
    }

    /// A server has said something.
    pub(super) fn told_by(&mut self, which: Which, message: ToSupervisor, files: Vec<OwnedFd>) {
        match message {
            ToSupervisor::Ready { version, program, serves, tells_events, confined } => {
                if which == Which::Current {
                    if self.is_to_be_confined() && !confined {
                        log::error!("the server is not confined: its program knows no --sandbox");
                    }
                    self.is_ready(version, program, &serves, tells_events);
                }
            }
            ToSupervisor::Prepared { version, program, confined } => {
                let is_fit = confined || !self.is_to_be_confined();
                if let (Which::Candidate, Some(candidate)) = (which, &mut self.candidate) {
                    candidate.server.version = Some(program);
                    candidate.is_prepared = version == VERSION && is_fit;
                    if !is_fit {
                        let why = "the new server does not confine itself, and --sandbox=on is to \
                                   hold: its program is older than that";
                        candidate.server.failure = Some(("sandbox".to_owned(), why.to_owned()));
                    }
                    candidate.prepared = Some(Instant::now());
                    self.candidate_is_prepared();
                }
            }
            ToSupervisor::Failed { code, message } => {
                log::debug!("a server says: {message} ({code})");
                let server = match which {
                    Which::Current => self.server.as_mut(),
                    Which::Candidate => self.candidate.as_mut().map(|other| &mut other.server),
                    Which::Stopped | Which::Leaving(_) => None,
                };
                if let Some(server) = server {
                    server.failure = Some((code, message));
                }
            }
            ToSupervisor::Vault { vault, new } => {
                // Another one has nothing to say of the device.
                if which == Which::Current {
                    match self.vault.take(*vault, &new, files) {
                        Ok(()) => {
                            // Each says all that there is.
                            self.vault_again_at = None;
                            self.keep_in_store();
                        }
                        Err(why) => {
                            log::error!("what the server wants to be kept is not: {why}");
                            self.vault_is_lost(which);
                        }
                    }
                    // What was waited for may have come.
                    self.give_session();
                }
            }
            ToSupervisor::Aside => {
                let server = self.which_mut(which);
                if let (Some(server), Some(end)) = (server, files.into_iter().next()) {
                    server.aside = Some(Channel::from_socket(end));
                }
            }
            ToSupervisor::Happened { event } => {
                // One that was stopped may say what has happened before that.
                if matches!(which, Which::Current | Which::Stopped) {
                    self.has_happened(event);
                }
            }
            // It was looked at before.
            ToSupervisor::Look => {}
            ToSupervisor::SessionEnded { number, error } => {
                // One that was stopped has its session still, which may end meanwhile.
                if matches!(which, Which::Current | Which::Stopped) {
                    self.session_has_ended(number, error);
                }
            }
            ToSupervisor::InflightTaken => {
                if let (Which::Current, Some(session)) = (which, &mut self.session) {
                    session.relay.inflight_is_taken();
                }
            }
            ToSupervisor::Stopped { drain_ns } => {
                if which == Which::Current {
                    self.has_stopped(drain_ns);
                }
            }
            ToSupervisor::NotStopped { code, message } => {
                if which == Which::Current {
                    self.has_not_stopped(&code, &message);
                }
            }
            ToSupervisor::Resumed => {
                if which == Which::Current {
                    self.has_resumed();
                }
            }
            ToSupervisor::Pong { number, stuck } => {
                if which == Which::Current {
                    self.pong(number, &stuck);
                }
            }
            ToSupervisor::ConfigChanged => {
                if let (Which::Current, Some(session)) = (which, &mut self.session) {
                    let effect = session.relay.config_has_changed();
                    session.apply(effect, None);
                }
            }
            ToSupervisor::ShutdownWanted => self.end("shutdown"),
        }
    }

    /// Hears what a server has put aside.
    pub(super) fn hear_aside(&mut self, which: Which) {
        while let Some(aside) = self.which(which).and_then(|server| server.aside.as_ref()) {
            match aside.try_receive::<ToSupervisor>() {
                Ok(Received::Message(message @ ToSupervisor::Vault { .. }, files)) => {
                    self.told_by(which, message, files);
                }
                Ok(Received::Message(..)) => log::warn!("the server puts aside what is no vault"),
                Ok(Received::Nothing | Received::End) => break,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    log::warn!("the server puts aside what is not understood: {error}");
                    self.vault_is_lost(which);
                }
                Err(error) => {
                    log::error!("what the server puts aside is not heard: {error}");
                    break;
                }
            }
        }
    }

    /// A vault of a server has come that cannot be kept, or may have come.
    pub(super) fn vault_is_lost(&mut self, which: Which) {
        if which == Which::Current {
            self.vault_again_at.get_or_insert_with(|| Instant::now() + VAULT_AGAIN);
        }
    }

    /// When the server is to say its vault again. One that is not ready yet hears no commands.
    pub(super) fn vault_deadline(&self) -> Option<Instant> {
        self.vault_again_at.filter(|_| self.serving().is_some())
    }

    pub(super) fn settle_vault(&mut self, now: Instant) {
        if self.vault_deadline().is_some_and(|at| at <= now) {
            // Until it has come.
            self.vault_again_at = Some(now + VAULT_AGAIN);
            self.send(&ToServer::VaultAgain);
        }
    }

    fn is_ready(&mut self, version: u32, program: String, serves: &str, tells_events: bool) {
        if self.ending.is_some() && self.stopped.is_some() {
            // It was killed for the other one to end in its order.
            return;
        }
        let Some(server) = &mut self.server else { return };
        if version != VERSION {
            log::error!("the server speaks version {version} of the channel, not {VERSION}");
            server.kill();
            return;
        }
        server.ready = Some(Instant::now());
        server.since = SystemTime::now();
        server.version = Some(program);
        self.served = Some(server.program.clone());
        self.is_given_up = false;
        if !self.has_served {
            self.has_served = true;
            log::debug!("{serves}");
            self.make_front();
            self.store.say(&format!("READY=1\nSTATUS={serves}"));
        }
        self.leave_stopped();
        self.give_session();
        if let Some(outage) = self.outage.take() {
            self.recoveries += 1;
            let ms = outage.since.elapsed().as_millis();
            log::info!("another server serves {ms} ms after the death of the one before");
            self.event("recovered", json!({"after_ms": ms}));
        }
        self.pulse.begin_anew(Instant::now());
        self.tell_facts();
        if let Some(front) = &mut self.front {
            front.tells_events(tells_events);
            front.server_up();
        }
        self.put_spare_off();
        self.pass_end_on();
    }

    /// Gives the frontend's session to the server that serves.
    pub(super) fn give_session(&mut self) {
        let (Some(server), Some(session)) = (&self.server, &mut self.session) else { return };
        let is_left = self.ending_session.is_none();
        let is_to_be_given = session.is_to_be_given() && self.ending.is_none();
        if server.ready.is_none() || !is_to_be_given || self.vault.awaits_upgrade() || !is_left {
            return;
        }
        if let Err(error) = session.give_to(&server.channel, &self.deaths) {
            // It is dead, which is about to be known, or there are no descriptors.
            log::error!("the server gets no session: {error}");
            server.kill();
        }
    }

    pub(super) fn accept(&mut self) {
        let stream = match self.options.frontends.listener().accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::warn!("a frontend cannot be let in: {error}");
                self.accept_at = Some(Instant::now() + AFTER_A_FAILURE);
                return;
            }
        };
        match Region::own(self.options.settings.queues) {
            Ok(region) if !self.is_free() || self.waiting.is_some() => {
                self.let_wait(stream.into(), region);
            }
            Ok(region) => {
                self.sessions += 1;
                let largest = self.options.settings.queue_size;
                let relay = Relay::new(region, self.told, largest);
                self.session = Some(Session::new(self.sessions, stream.into(), relay));
                self.give_session();
            }
            Err(error) => {
                log::warn!("a frontend cannot be served: no in-flight region: {error}");
                self.accept_at = Some(Instant::now() + AFTER_A_FAILURE);
            }
        }
    }

    /// A frontend does not wait for ever for a server that does not look at its rings.
    pub(super) fn settle_rings(&mut self, now: Instant) {
        if let (Some(server), Some(session), None) = (&self.server, &mut self.session, &self.ending)
            && session.rings_take_too_long(now)
        {
            log::error!("the server does not look at the guest's rings, and is ended");
            server.kill();
        }
    }

    fn session_has_ended(&mut self, number: u64, error: Option<String>) {
        if self.ending_session == Some(number) {
            self.ending_session = None;
        }
        if let Some(error) = &error {
            self.said.say(&format!("the session ended: {error}"));
            self.accept_at = Some(Instant::now() + AFTER_A_FAILURE);
        }
        if let Some(session) = &mut self.session
            && session.number == number
        {
            session.server_has_ended_it();
            // There is nothing left to end.
            session.was_given = false;
        }
        // It may have waited for that.
        self.give_session();
    }

    pub(super) fn current_has_died(&mut self, ended: Ended) {
        let Some(server) = self.server.take() else { return };
        self.pulse.begin_anew(Instant::now());
        // The next one says all of it.
        self.vault_again_at = None;
        self.none_in_flight();
        if self.stopped.is_none() {
            self.ending_session = None;
            if let Some(session) = &mut self.session {
                session.take_back();
            }
        }
        if self.ending.is_some() && self.stopped.is_none() {
            let status = match ended {
                Ended::Exited(status) => status,
                Ended::Signalled(_) | Ended::Unknown => 1,
            };
            if status != 0 && !matches!(ended, Ended::Exited(_)) {
                log::error!("the server has ended with {ended}");
            }
            self.over = Some(Ok(status));
            return;
        }
        if self.resume_stopped(ended, &server) {
            return;
        }
        if let Some(front) = &mut self.front {
            front.server_gone();
        }
        if !self.has_device() {
            self.over = Some(Err(match server.failure {
                Some((_, message)) => message,
                None => format!("the server has ended with {ended} before it served"),
            }));
            return;
        }
        let pid = server.pid;
        let why = match &server.failure {
            Some((code, message)) => format!("server {pid}: {message} ({code})"),
            None => format!("the server, process {pid}, has died: {ended}"),
        };
        log::error!("{why}");
        self.none_serves(why);
        self.event("server_died", json!({"pid": pid.as_raw_nonzero(), "how": ended.to_string()}));
        let served = server.ready.map(|ready| ready.elapsed());
        self.decide(ended, served, Some(server));
        self.tell_facts();
    }

    /// What comes after a death.
    pub(super) fn decide(
        &mut self,
        ended: Ended,
        served: Option<std::time::Duration>,
        server: Option<Server>,
    ) {
        // A kept disk's first server may not have got so far.
        self.make_front();
        let oldest = self.session.as_ref().map(|session| session.relay.region().oldest());
        // The frontend's doing, and not the module's or a request's.
        let is_cut_short = self.session.as_mut().is_some_and(Session::end_without_region);
        let death = Death {
            served,
            is_crash: ended.is_crash() && !is_cut_short,
            module: self.vault.live().map(ToOwned::to_owned),
            oldest: oldest.unwrap_or_default(),
        };
        // Of another program than what comes next nothing is known by this death.
        let is_of_next = server.as_ref().is_none_or(|one| one.program == self.options.program);
        let choices = Choices {
            has_program: is_of_next && self.program_before.is_some(),
            has_standby: self.vault.has_standby(),
        };
        let next = self.deaths.died(&death, choices);
        if !is_of_next {
            self.deaths.another_program();
        }
        match next {
            Next::GiveUp => {
                log::error!("no server lives: the device is faulted until it is upgraded");
                self.is_given_up = true;
                // A candidate has the module that no server has lived with.
                self.fail("no server lives");
                if !self.has_served {
                    // Commands are taken, and the manager need not start it again.
                    self.store.say("READY=1\nSTATUS=faulted until it is upgraded: no server lives");
                }
                self.event("faulted", json!({}));
            }
            Next::Start { after, falls_back, takes_standby } => {
                if takes_standby && let Some(name) = self.vault.fall_back() {
                    log::error!("the domain has ended its server again: `{name}` goes on");
                    self.keep_in_store();
                }
                if falls_back && let Some(before) = self.program_before.take() {
                    log::error!("the program does not serve: the one before goes on");
                    self.options.program = before;
                }
                drop(server);
                if takes_standby || falls_back {
                    self.give_exchange_up();
                }
                if self.promote_candidate() {
                    return;
                }
                self.exchange_has_lost_its_server();
                self.start_at = Some(Instant::now() + after);
            }
        }
        // At once, without another look at the clock.
        if self.start_at.is_some_and(|at| at <= Instant::now()) {
            self.start_at = None;
            self.start_server();
        }
    }

    /// Starts a server for an upgrade, after none has lived. Rings stay stopped until that has
    /// brought a domain.
    pub(super) fn revive(&mut self) {
        if !self.is_given_up {
            return;
        }
        self.is_given_up = false;
        self.deaths.forgive();
        self.vault.drop_live("no server has lived with the domain that there was");
        self.keep_in_store();
        self.start_at = Some(Instant::now());
        self.tell_facts();
    }

    /// Tells the control front what it says of the processes.
    pub(super) fn tell_facts(&mut self) {
        let phase = if self.is_given_up {
            Phase::Faulted
        } else if self.serving().is_none() {
            Phase::Recovering
        } else if self.exchange.is_some() {
            Phase::Upgrading
        } else {
            Phase::Serving
        };
        let version = || env!("CARGO_PKG_VERSION").to_owned();
        let server = self.server.as_ref();
        let facts = Facts {
            phase,
            why: self.outage.as_ref().map(|outage| outage.why.clone()),
            supervisor: SupervisorFacts {
                pid: std::process::id(),
                version: version(),
                since: milliseconds(self.since),
                store: self.store.facts(),
            },
            server: ServerFacts {
                pid: server.and_then(|server| server.pid.as_raw_nonzero().get().try_into().ok()),
                version: server.and_then(|server| server.version.clone()).unwrap_or_else(version),
                since: server.map_or(0, |server| milliseconds(server.since)),
                deaths: self.deaths.count,
                recoveries: self.recoveries,
                quarantined: self.deaths.quarantined_count,
                stuck: self.pulse.stuck().to_vec(),
            },
        };
        if let Some(front) = &mut self.front {
            front.tell(facts);
        }
    }
}
