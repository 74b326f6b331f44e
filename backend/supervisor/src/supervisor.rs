//! The loop: one thread that never waits for anything but all of it at once.
//!
//! What is looked at: signals, the frontends' listening socket, the session's two sockets, the
//! channel and the death of each server, the control front's clients, and the clock.

mod candidate;
mod commands;
mod ending;
mod exchange;
mod leaving;
mod options;
mod packing;
mod pulse;
mod reexecution;
#[cfg(test)]
mod scripted;
mod serving;
mod spare;
mod starting;
mod storing;
#[cfg(test)]
mod tests;
mod waiting;
mod watched;

use crate::deaths::Deaths;
use crate::front::{Front, Ticket, Token};
use crate::process::{Program, Server};
use crate::said::Said;
use crate::session::{Over, Session};
use crate::store::{KeptDisk, Store};
use crate::vault::Vault;
use candidate::Candidate;
use channel::{Received, ToServer, ToSupervisor};
use ending::Ending;
use exchange::Exchange;
use leaving::Dead;
pub use options::{ListenSocket, Options, Signals, Supervision};
use pulse::Pulse;
use reexecution::Reexecution;
pub use reexecution::{Resumed, check_state};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use starting::Outage;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant, SystemTime};
use telemetry::tally::Tally;
use waiting::Waiting;
pub use watched::Metrics;

/// How long a server may take that was told to leave at once.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);
/// How long frontends are left alone when one could not be served: it may come again at once.
const AFTER_A_FAILURE: Duration = Duration::from_millis(100);

/// Which of the servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// The one that has the device, or is about to.
    Current,
    /// The one that had it, and may get it back.
    Stopped,
    /// The one that may get it.
    Candidate,
    /// One that was told to leave.
    Leaving(usize),
}

/// Something that is looked at.
#[derive(Debug, Clone, Copy)]
enum Source {
    End(usize),
    Frontends,
    Frontend,
    Waiting,
    Inner,
    Channel(Which),
    Death(Which),
    Check,
    Store,
    Front(Token),
    Page,
}

/// What is told to those who watch.
#[derive(Debug, Default)]
struct Watched {
    /// Nothing, if nothing was asked for.
    metrics: Option<Metrics>,
    tally: Tally,
}

/// All that there is.
#[derive(Debug)]
pub struct Supervisor {
    options: Options,
    since: SystemTime,
    vault: Vault,
    /// As the stopped server has left it.
    vault_before: Option<Vault>,
    /// A vault of the server was lost, and none has come since: when it is to say it again.
    vault_again_at: Option<Instant>,
    store: Store,
    deaths: Deaths,
    recoveries: u64,
    /// The program that has served before the current one.
    program_before: Option<Program>,
    /// The program that has served last.
    served: Option<Program>,
    server: Option<Server>,
    stopped: Option<Server>,
    candidate: Option<Candidate>,
    /// No spare is begun before.
    spare_at: Instant,
    exchange: Option<Exchange>,
    reexecution: Option<Reexecution>,
    /// What the client is told of the supervisor that waits for the server's exchange.
    exchanged_self: Option<(Ticket, serde_json::Value)>,
    leaving: Vec<(Server, Instant)>,
    dead: Vec<Dead>,
    /// When another server is to be started.
    start_at: Option<Instant>,
    /// Until another server serves.
    outage: Option<Outage>,
    has_served: bool,
    /// The disk was in the store: it is gone on with, whatever becomes of its servers.
    is_kept: bool,
    is_given_up: bool,
    session: Option<Session>,
    /// A second frontend's, whose rings run when those of the other have stopped.
    waiting: Option<Waiting>,
    sessions: u64,
    /// The session that the server has not left yet.
    ending_session: Option<u64>,
    /// Frontends are not heard before.
    accept_at: Option<Instant>,
    /// The size of the disk that a frontend was told last.
    told: Option<u64>,
    front: Option<Front>,
    pulse: Pulse,
    watched: Watched,
    /// What a frontend brings about is not said again and again.
    said: Said,
    ending: Option<Ending>,
    /// The process's exit status, or why there is no device.
    over: Option<Result<i32, String>>,
}

/// Serves until told to stop, from `kept` on if that was in the service manager's store. Returns
/// the process's exit status.
///
/// # Errors
/// There is no device: a sentence that says why.
pub fn run(options: Options, store: Store, kept: Option<KeptDisk>) -> Result<i32, String> {
    let mut supervisor = Supervisor::new(options);
    supervisor.store = store;
    let is_kept = kept.is_some();
    if let Some(kept) = kept {
        supervisor.go_on_with(kept);
    }
    supervisor.run().map_err(|sentence| match is_kept {
        true => format!("{sentence}; the disk stays in the service manager's store"),
        false => sentence,
    })
}

impl Supervisor {
    fn run(mut self) -> Result<i32, String> {
        loop {
            self.settle();
            if let Some(over) = self.over.take() {
                self.see_off();
                self.store.finish();
                return over;
            }
            self.turn().map_err(|error| format!("cannot wait: {error}"))?;
        }
    }

    fn turn(&mut self) -> io::Result<()> {
        let Some(happened) = self.wait()? else { return Ok(()) };
        // Those that are found to be dead now are among them still.
        let servers = self.server_pids();
        if let Some(front) = &mut self.front {
            let is_listener =
                |source| matches!(source, Source::Front(token) if token.is_listener());
            front.servers_are(servers, happened.iter().any(|&(source, _)| is_listener(source)));
        }
        for (source, what) in happened {
            self.happened(source, what);
        }
        Ok(())
    }

    fn new(mut options: Options) -> Self {
        let pulse = Pulse::new(options.supervision.hang_timeout);
        let watched = Watched { metrics: options.metrics.take(), tally: Tally::default() };
        Self {
            options,
            since: SystemTime::now(),
            vault: Vault::default(),
            vault_before: None,
            vault_again_at: None,
            store: Store::default(),
            deaths: Deaths::default(),
            recoveries: 0,
            program_before: None,
            served: None,
            server: None,
            stopped: None,
            candidate: None,
            spare_at: Instant::now(),
            exchange: None,
            reexecution: None,
            exchanged_self: None,
            leaving: Vec::new(),
            dead: Vec::new(),
            start_at: Some(Instant::now()),
            outage: None,
            has_served: false,
            is_kept: false,
            is_given_up: false,
            session: None,
            waiting: None,
            sessions: 0,
            ending_session: None,
            accept_at: None,
            told: None,
            front: None,
            pulse,
            watched,
            said: Said::default(),
            ending: None,
            over: None,
        }
    }

    fn which(&self, which: Which) -> Option<&Server> {
        match which {
            Which::Current => self.server.as_ref(),
            Which::Stopped => self.stopped.as_ref(),
            Which::Candidate => self.candidate.as_ref().map(|candidate| &candidate.server),
            Which::Leaving(at) => self.leaving.get(at).map(|(server, _)| server),
        }
    }

    /// Whether there is a device that another server can go on with.
    const fn has_device(&self) -> bool {
        self.has_served || self.is_kept
    }

    /// A server that serves.
    fn serving(&self) -> Option<&Server> {
        self.server.as_ref().filter(|server| server.ready.is_some())
    }

    fn whiches(&self) -> impl Iterator<Item = Which> + use<> {
        let leaving = (0..self.leaving.len()).rev().map(Which::Leaving);
        [Which::Current, Which::Stopped, Which::Candidate].into_iter().chain(leaving)
    }

    /// The processes in which modules run.
    fn server_pids(&self) -> Vec<u32> {
        let pid = |server: &Server| server.pid.as_raw_nonzero().get().cast_unsigned();
        self.whiches().filter_map(|which| self.which(which).map(pid)).collect()
    }

    /// Whether a frontend can be let in now: to be served, or to wait, or to be turned away.
    fn takes_frontends(&self) -> bool {
        let has_one = self.session.is_some() || self.waiting.is_some();
        (has_one || self.is_free()) && self.ending.is_none()
    }

    /// Whether a frontend can be served now.
    fn is_free(&self) -> bool {
        let is_stable =
            self.stopped.is_none() && !self.exchange.as_ref().is_some_and(Exchange::is_stopping);
        let is_free = self.session.is_none() && self.ending_session.is_none();
        is_free && is_stable && self.serving().is_some()
    }

    /// What has happened; nothing is known of it if a signal came between.
    fn wait(&self) -> io::Result<Option<Vec<(Source, PollFlags)>>> {
        let mut watched: Vec<(Source, BorrowedFd<'_>, PollFlags)> = Vec::new();
        let now = Instant::now();
        if self.ending.is_none() {
            for (at, (_, end)) in self.options.ends.iter().enumerate() {
                watched.push((Source::End(at), end.as_fd(), PollFlags::IN));
            }
        }
        if self.takes_frontends() && self.accept_at.is_none_or(|at| at <= now) {
            let listener = self.options.frontends.listener().as_fd();
            watched.push((Source::Frontends, listener, PollFlags::IN));
        }
        if let Some(session) = &self.session {
            let frontend = session.frontend().map(|(fd, flags)| (Source::Frontend, fd, flags));
            let inner = session.inner().map(|(fd, flags)| (Source::Inner, fd, flags));
            watched.extend(frontend.into_iter().chain(inner));
        }
        if let Some(waiting) = &self.waiting {
            let frontend = waiting.session.frontend();
            watched.extend(frontend.map(|(fd, flags)| (Source::Waiting, fd, flags)));
        }
        for which in self.whiches() {
            let Some(server) = self.which(which) else { continue };
            if !server.is_silent {
                watched.push((Source::Channel(which), server.channel.as_fd(), PollFlags::IN));
            }
            watched.push((Source::Death(which), server.pidfd(), PollFlags::IN));
        }
        if let Some(reexecution) = &self.reexecution {
            watched.push((Source::Check, reexecution.pidfd(), PollFlags::IN));
        }
        if let Some(barrier) = self.store.awaited() {
            watched.push((Source::Store, barrier, PollFlags::IN));
        }
        if let Some(metrics) = &self.watched.metrics {
            let polled = metrics.polled().into_iter();
            watched.extend(polled.map(|(fd, interest)| (Source::Page, fd, interest)));
        }
        if let Some(front) = &self.front {
            let polled = front.polled().into_iter();
            watched.extend(polled.map(|one| (Source::Front(one.token), one.fd, one.interest)));
        }
        let mut fds: Vec<PollFd<'_>> = watched
            .iter()
            .map(|&(_, fd, interest)| PollFd::from_borrowed_fd(fd, interest))
            .collect();
        let timeout = self.deadline().map(|at| at.saturating_duration_since(now));
        let timeout = timeout.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let happened = watched.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(Some(happened.map(|((source, ..), fd)| (*source, fd.revents())).collect()))
    }

    /// When there is something to do even if nothing happens.
    fn deadline(&self) -> Option<Instant> {
        let accept = self.accept_at.filter(|_| self.takes_frontends());
        let accept = accept.filter(|&at| at > Instant::now());
        [
            self.start_at,
            self.vault_deadline(),
            accept,
            self.session.as_ref().and_then(Session::deadline),
            self.waiting.as_ref().and_then(Waiting::deadline),
            self.ending.as_ref().map(Ending::deadline),
            self.front.as_ref().and_then(Front::deadline),
            self.watched.metrics.as_ref().and_then(Metrics::deadline),
            self.next_question(),
            self.leaving.iter().map(|(_, deadline)| *deadline).min(),
            self.next_to_reap(),
            self.exchange.as_ref().map(Exchange::deadline),
            self.reexecution.as_ref().map(Reexecution::deadline),
            self.spare_deadline(),
            self.store.deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn happened(&mut self, source: Source, what: PollFlags) {
        match source {
            Source::End(at) => {
                let why = self.options.ends[at].0.clone();
                self.end(&why);
            }
            Source::Frontends => self.accept(),
            Source::Frontend => {
                if let Some(session) = &mut self.session {
                    session.frontend_is_ready(what);
                }
            }
            Source::Waiting => {
                if let Some(waiting) = &mut self.waiting {
                    waiting.session.frontend_is_ready(what);
                }
            }
            // Pumped whenever something has happened.
            Source::Inner => {}
            // Looked at at each turn.
            Source::Check | Source::Page => {}
            Source::Store => self.store_has_looked(),
            Source::Channel(which) => self.hear(which),
            Source::Death(which) => self.bury(which),
            Source::Front(token) => {
                if let Some(front) = &mut self.front {
                    front.ready(token, what);
                }
            }
        }
    }

    /// Hears all that a server has said.
    fn hear(&mut self, which: Which) {
        while let Some(server) = self.which(which) {
            let heard = server.channel.try_receive::<ToSupervisor>();
            // What was put aside before that is known first.
            self.hear_aside(which);
            match heard {
                Ok(Received::Message(message, files)) => self.told_by(which, message, files),
                Ok(Received::Nothing) => break,
                Ok(Received::End) => {
                    // It is about to die, or has to.
                    self.set_silent(which);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    log::warn!("the server says what is not understood: {error}");
                    self.vault_is_lost(which);
                }
                Err(error) => {
                    log::error!("the server is not heard any more: {error}");
                    // One that ends by itself has its time limit.
                    if self.ending.is_none() {
                        self.which(which).inspect(|server| server.kill());
                    }
                    self.set_silent(which);
                    break;
                }
            }
        }
    }

    fn which_mut(&mut self, which: Which) -> Option<&mut Server> {
        match which {
            Which::Current => self.server.as_mut(),
            Which::Stopped => self.stopped.as_mut(),
            Which::Candidate => self.candidate.as_mut().map(|candidate| &mut candidate.server),
            Which::Leaving(at) => self.leaving.get_mut(at).map(|(server, _)| server),
        }
    }

    fn set_silent(&mut self, which: Which) {
        if let Some(server) = self.which_mut(which) {
            server.is_silent = true;
        }
    }

    fn send(&self, message: &ToServer) {
        if let Some(server) = &self.server
            && let Err(error) = server.channel.send(message, &[])
        {
            log::debug!("the server is not told: {error}");
        }
    }

    /// Does all that is due.
    fn settle(&mut self) {
        let now = Instant::now();
        self.settle_session();
        self.settle_rings(now);
        self.settle_waiting(now);
        if self.start_at.is_some_and(|at| at <= now) {
            self.start_at = None;
            self.start_server();
        }
        self.settle_exchange(now);
        self.settle_pulse(now);
        self.settle_reexecution();
        self.settle_vault(now);
        self.settle_store(now);
        self.settle_history();
        self.settle_pages();
        self.settle_front();
        self.settle_leaving(now);
        self.settle_spare(now);
        self.settle_ending(now);
    }

    fn settle_session(&mut self) {
        let Some(session) = &mut self.session else { return };
        session.pump(self.server.as_ref().map(|server| &server.channel));
        self.told = session.relay.told();
        let Some(why) = session.over() else {
            if session.relay.is_up() {
                self.session_is_up();
            }
            return;
        };
        match why {
            Over::Gone => log::info!("the frontend has disconnected"),
            Over::Ended => {}
            Over::Refused(why) => self.said.say(&format!("the session ended: {why}")),
        }
        let (number, was_given) = (session.number, session.was_given);
        self.session = None;
        self.is_to_leave(number, was_given);
        self.deaths.forgive();
    }
}
