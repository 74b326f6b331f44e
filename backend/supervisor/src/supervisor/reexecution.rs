//! The supervisor's own program is exchanged, in the same process, while the server serves on.
//!
//! First the new program looks at the state as a child. If it can go on with it, and nothing else
//! is under way, it is executed in place. Only after that is the server exchanged, if that is
//! wanted, too: what carries that out is the new program, and a new program that is of no use has
//! changed nothing by then.

use super::packing::{Given, Order};
use super::{Signals, Supervisor};
use crate::front::Ticket;
use crate::process::{Program, own_path};
use crate::reexec::{self, Check, CheckFailure, Written};
use control::Code;
use control::messages::{Part, UpgradeDaemonRequest};
use control::rpc::RpcError;
use serde_json::{Map, Value, json};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// How long to wait for the disk of the state directory.
const DISK_PATIENCE: Duration = Duration::from_millis(500);

/// A program that is to take over this process.
#[derive(Debug)]
pub(super) struct Reexecution {
    program: Program,
    order: Order,
    check: Check,
    begun: Instant,
}

impl Reexecution {
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.check.pidfd()
    }

    pub(super) const fn deadline(&self) -> Instant {
        self.check.deadline()
    }
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A program's version as answers have it.
pub(super) fn program(version: Option<&str>) -> Value {
    json!({ "name": "vhost-hotswap", "version": version })
}

impl Supervisor {
    /// A client wants the supervisor to be exchanged, and perhaps the server as well.
    pub(super) fn begin_reexecution(&mut self, ticket: Ticket, request: UpgradeDaemonRequest) {
        let begun = Instant::now();
        let refusal = if self.exchange.is_some() || self.stopped.is_some() {
            Some("another exchange of the daemon is under way")
        } else if self.reexecution.is_some() {
            Some("another exchange of the supervisor is under way")
        } else {
            self.unrest()
        };
        if let Some(why) = refusal {
            self.answer(ticket, Err(RpcError::new(Code::ExchangeRuns, why)));
            return;
        }
        let path = request.path.map_or_else(own_path, Ok);
        let opened = path.and_then(|path| {
            Program::open(&path).map_err(|error| {
                std::io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            })
        });
        let program = match opened {
            Ok(program) => program,
            Err(error) => {
                let error = RpcError::new(Code::ProgramUnusable, error.to_string());
                self.answer(ticket, Err(error));
                return;
            }
        };
        let mut order = Order {
            ticket,
            then: (request.only != Some(Part::Supervisor)).then(|| program.clone()),
            from: env!("CARGO_PKG_VERSION").to_owned(),
            start_us: 0,
            prepare_us: 0,
            packed: SystemTime::now(),
            came_back_from: None,
        };
        let check = {
            let (state, packing) = self.pack(order.clone());
            Written::write(&state, packing).and_then(|state| Check::start(&program, &state))
        };
        match check {
            Ok(check) => {
                order.start_us = us(begun.elapsed());
                self.reexecution =
                    Some(Reexecution { program, order, check, begun: Instant::now() });
            }
            Err(error) => {
                let message = format!("{} cannot be run: {error}", program.path.display());
                self.answer(ticket, Err(RpcError::new(Code::ProgramUnusable, message)));
            }
        }
    }

    /// Why this is no moment for another program.
    pub(super) fn unrest(&self) -> Option<&'static str> {
        if self.ending.is_some() {
            Some("the daemon ends")
        } else if self.is_given_up {
            Some(
                "no server lives: `upgrade` or `upgrade-daemon --only server` brings the disk back",
            )
        } else if self.serving().is_none() || self.start_at.is_some() {
            Some("the server is being brought back; try again")
        } else if self.exchange.is_some() || self.stopped.is_some() {
            Some("the server is being exchanged; try again")
        } else if self.vault_again_at.is_some() {
            Some("what the server keeps was lost on its way, and is asked for again; try again")
        } else {
            None
        }
    }

    pub(super) fn settle_reexecution(&mut self) {
        let Some(reexecution) = &mut self.reexecution else { return };
        let Some(result) = reexecution.check.result() else { return };
        reexecution.order.prepare_us = us(reexecution.begun.elapsed());
        // The front is packed without wishes.
        self.settle_front();
        let Some(Reexecution { program, order, .. }) = self.reexecution.take() else { return };
        let ticket = order.ticket;
        let path = program.path.display().to_string();
        let refusal = match result {
            Ok(willing) => match self.unrest() {
                Some(why) => (Code::ExchangeRuns, why.to_owned()),
                None if self.is_to_be_confined() && !willing.confines => (
                    Code::StateRefused,
                    format!(
                        "{path}: its servers would not be confined: it is older than --sandbox"
                    ),
                ),
                None => {
                    let goes_back = willing.goes_back;
                    (Code::ProgramUnusable, self.reexecute(&program, order, goes_back))
                }
            },
            Err(CheckFailure::Unusable(why)) => (Code::ProgramUnusable, format!("{path}: {why}")),
            Err(CheckFailure::Silent) => {
                (Code::ProgramSilent, format!("{path} does not answer in time, and is ended"))
            }
            Err(CheckFailure::Refused(why)) => (Code::StateRefused, format!("{path}: {why}")),
        };
        log::warn!("the supervisor is not exchanged: {}", refusal.1);
        self.answer(ticket, Err(RpcError::new(refusal.0, refusal.1)));
    }

    /// Runs the program in place of this one, which is run again if it `goes_back`. Comes back only
    /// if it cannot be run.
    fn reexecute(&mut self, program: &Program, mut order: Order, goes_back: bool) -> String {
        // A thread that waits for the disk would hold up the program's start, and the device.
        if !self.front.as_mut().is_none_or(|front| front.rest(DISK_PATIENCE)) {
            return "what has happened cannot be written to --state-dir: its disk does not answer"
                .to_owned();
        }
        self.dismiss_candidate();
        log::info!("the supervisor goes on as {}", program.path.display());
        self.reap_all();
        // What comes from now on waits until the next program handles signals.
        (self.options.signals.hold)();
        order.packed = SystemTime::now();
        let written = |order: Order| {
            let (state, packing) = self.pack(order);
            Written::write(&state, packing)
        };
        let way_back = goes_back.then(|| {
            let came_back_from = Some(program.path.clone());
            let state = written(Order { came_back_from, ..order.clone() })?;
            state.way_back(&Program::own()?)
        });
        let error = match way_back.transpose().and_then(|back| Ok((back, written(order)?))) {
            Ok((way_back, state)) => state.exec(program, way_back.as_ref()),
            Err(error) => error,
        };
        (self.options.signals.release)();
        self.put_spare_off();
        format!("{} cannot be run: {error}", program.path.display())
    }

    /// The first thing that a program does which goes on for another one.
    fn went_on(&mut self, order: Order, come: &[String]) {
        self.keep_in_store();
        match &order.came_back_from {
            Some(path) => self.came_back(order.ticket, path),
            None => self.succeeded(order),
        }
        if let Some(signal) = come.first() {
            self.end(signal);
        }
        self.put_spare_off();
    }

    /// This program goes on, because another one could not.
    fn came_back(&mut self, ticket: Ticket, path: &Path) {
        let message = format!(
            "{}: it could not go on after all, and the program before does; the log says why",
            path.display()
        );
        log::warn!("the supervisor is not exchanged: {message}");
        self.tell_facts();
        self.answer(ticket, Err(RpcError::new(Code::ProgramUnusable, message)));
    }

    /// This program goes on for another one.
    fn succeeded(&mut self, order: Order) {
        let took = order.packed.elapsed().unwrap_or_default();
        log::info!("the supervisor is another program, after {} us", us(took));
        let phases = json!({
            "start": order.start_us, "prepare": order.prepare_us, "replay": us(took), "pause": 0,
        });
        self.tell_facts();
        let (from, to) = (program(Some(&order.from)), program(Some(env!("CARGO_PKG_VERSION"))));
        self.event(
            "supervisor_exchanged",
            json!({ "from": &from, "to": &to, "phases_us": &phases }),
        );
        let answer = json!({ "what": ["supervisor"], "from": from, "to": to, "phases_us": phases });
        let ticket = order.ticket;
        match order.then {
            None => self.answer(ticket, Ok(answer)),
            Some(server) => {
                self.exchanged_self = Some((ticket, answer));
                self.begin_exchange(ticket, server);
            }
        }
    }

    /// What the client is told that wanted both to be exchanged; `answer` is about the server.
    pub(super) fn complete(
        &mut self,
        ticket: Ticket,
        answer: Result<Value, RpcError>,
    ) -> Result<Value, RpcError> {
        self.watched.exchange_ended(answer.is_ok());
        let Some((_, own)) = self.exchanged_self.take_if(|(own, _)| *own == ticket) else {
            return answer;
        };
        match answer {
            Ok(server) => Ok(merged(own, server)),
            Err(error) => Err(error.with_data(json!({ "done": own["what"] }))),
        }
    }
}

/// The answer about both, of those about the supervisor and the server.
fn merged(mut own: Value, server: Value) -> Value {
    let list = |value: &Value| value["what"].as_array().cloned().unwrap_or_default();
    own["what"] = [list(&own), list(&server)].concat().into();
    let mut phases: Map<String, Value> = own["phases_us"].as_object().cloned().unwrap_or_default();
    for (phase, time) in server["phases_us"].as_object().into_iter().flatten() {
        let before = phases.get(phase).and_then(Value::as_u64).unwrap_or(0);
        phases.insert(phase.clone(), (before + time.as_u64().unwrap_or(0)).into());
    }
    own["phases_us"] = phases.into();
    own
}

/// What another program of this process was.
#[derive(Debug)]
pub struct Resumed {
    supervisor: Supervisor,
    order: Order,
    come: Vec<String>,
}

impl Resumed {
    /// What was put into `socket`.
    ///
    /// # Errors
    /// There is no going on: a sentence that says why. Nothing was changed.
    pub fn read(
        socket: OwnedFd,
        ends: Vec<(String, OwnedFd)>,
        signals: Signals,
    ) -> Result<Self, String> {
        let unpacked = reexec::read::<Given>(socket).and_then(|(state, mut unpacking)| {
            Supervisor::unpack(state, ends, signals, &mut unpacking)
        });
        let (supervisor, order, come) = unpacked.map_err(|error| error.to_string())?;
        Ok(Self { supervisor, order, come })
    }

    /// Goes on with it, until told to stop. Returns the process's exit status.
    ///
    /// # Errors
    /// As for [`run`](super::run).
    pub fn run(mut self) -> Result<i32, String> {
        self.supervisor.went_on(self.order, &self.come);
        self.supervisor.run()
    }
}

/// Says whether this program could go on with the state in descriptor `fd`. Returns the process's
/// exit status.
#[must_use]
pub fn check_state(fd: RawFd) -> u8 {
    reexec::answer_check::<Given>(fd, Given::find_fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_about_both_has_the_times_of_both() {
        let own = json!({
            "what": ["supervisor"], "from": program(Some("1")), "to": program(Some("2")),
            "phases_us": {"start": 1, "prepare": 2, "replay": 3, "pause": 0},
        });
        let server = json!({
            "what": ["server"], "from": program(Some("0")), "to": program(Some("2")),
            "phases_us": {"start": 10, "prepare": 20, "stop": 5, "replay": 30, "pause": 40},
        });
        let both = json!({
            "what": ["supervisor", "server"], "from": program(Some("1")), "to": program(Some("2")),
            "phases_us": {"start": 11, "prepare": 22, "stop": 5, "replay": 33, "pause": 40},
        });
        assert_eq!(merged(own, server), both);
    }
}
