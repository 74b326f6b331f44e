//! One client: what it asks, who answers it, and its stream to the server.
//!
//! One request at a time is out, so the answers have the order of the requests, whichever process
//! they come from.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use control::Limits;
use control::lines::Line;
use control::messages::DEVICE;
use control::rpc::{RpcError, event, parse_line};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::answers::{self, Kind, Said};
use super::pipe::{PackedPipe, Pipe};
use super::shared::{ANSWER_MAX, Server, Shared};
use super::{Ticket, Wish};
use crate::slots::{Missing, Packing, Unpacking};

/// How long a client is left without a server that has just closed its stream: as a rule it has
/// died, and the loop says so in a moment.
const AFTER_A_LOSS: Duration = Duration::from_millis(100);

/// How much is done for a client before the others have their turn.
const STEPS: usize = 64;

/// A request that is the server's to answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Request {
    line: Vec<u8>,
    kind: Kind,
    /// None: it is not answered.
    id: Option<Value>,
}

/// The request that is out.
#[derive(Debug)]
enum Asked {
    /// It has not been passed on, since then.
    Waiting(Request, Instant),
    /// The server has it.
    Passed(Request),
    /// The loop has it.
    Own(Ticket, Value),
}

/// A connected client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) pipe: Pipe,
    pub(super) server: Option<Pipe>,
    asked: Option<Asked>,
    watching: bool,
    /// The next answer of the server is to a line of the front's own.
    subscribing: bool,
    /// The number of the last event it got.
    last_event: u64,
    /// Not to be given a server before.
    not_before: Instant,
    /// Its turn ended though it could go on.
    has_more: bool,
    /// When it was last heard or answered.
    pub(super) active: Instant,
    /// When it has asked for what is out.
    asked_at: Instant,
}

/// A [`Client`] in a packed state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct PackedClient {
    pipe: PackedPipe,
    server: Option<PackedPipe>,
    asked: Option<PackedAsked>,
    watching: bool,
    subscribing: bool,
    last_event: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PackedAsked {
    Waiting(Request),
    Passed(Request),
    Own(Ticket, Value),
}

impl Client {
    pub(super) fn new(stream: UnixStream, limits: &Limits) -> io::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            pipe: Pipe::new(stream, limits.line)?,
            server: None,
            asked: None,
            watching: false,
            subscribing: false,
            last_event: 0,
            not_before: now,
            has_more: true,
            active: now,
            asked_at: now,
        })
    }

    /// Whether it has nothing to say and nothing to hear; half a line is nothing.
    pub(super) fn is_idle(&self) -> bool {
        self.asked.is_none() && !self.watching && !self.has_more && self.pipe.is_sent()
    }

    /// Whether it has gone, with a request that the server has, and carries out without it, or that
    /// nobody has begun.
    pub(super) fn has_left_a_request(&self) -> bool {
        let is_settled = match &self.asked {
            Some(Asked::Passed(_)) => self.server.as_ref().is_some_and(Pipe::is_sent),
            Some(Asked::Waiting(..)) => true,
            _ => false,
        };
        is_settled && self.pipe.is_hung_up() && self.pipe.is_empty()
    }

    /// Whether it can be heard now.
    pub(super) fn can_speak(&self) -> bool {
        self.asked.is_none() && self.pipe.is_sent()
    }

    /// When it has to be looked at though nothing has happened.
    pub(super) fn deadline(&self, shared: &Shared) -> Option<Instant> {
        let sent = self.pipe.deadline(shared.limits.write_timeout);
        let is_up = shared.server == Server::Up;
        let waits = match &self.asked {
            Some(Asked::Waiting(..)) if is_up => Some(self.not_before),
            Some(Asked::Waiting(_, since)) => Some(*since + shared.patience),
            _ => None,
        };
        let watches = self.watches_server(shared) && is_up;
        let more = self.has_more.then_some(self.active);
        [sent, waits, watches.then_some(self.not_before), more].into_iter().flatten().min()
    }

    /// Goes on as far as it can without waiting. Whether the client stays.
    pub(super) fn advance(&mut self, shared: &mut Shared) -> io::Result<bool> {
        if self.pipe.deadline(shared.limits.write_timeout).is_some_and(|end| end <= Instant::now())
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut left = STEPS;
        while left > 0
            && (self.hear_server(shared)? || self.ask_server(shared)? || self.hear(shared)?)
        {
            left -= 1;
        }
        self.has_more = left == 0;
        let is_done = self.can_speak() && self.pipe.is_over();
        Ok(!is_done || (self.watching && !self.pipe.is_hung_up()))
    }

    /// Takes one line of the client. Whether there was one.
    fn hear(&mut self, shared: &mut Shared) -> io::Result<bool> {
        if !self.can_speak() {
            return Ok(false);
        }
        let Some(line) = self.pipe.next_line()? else { return Ok(false) };
        self.active = Instant::now();
        let call = match parse_line(&line, shared.limits.line) {
            Ok(call) => call,
            Err((id, error)) => {
                return self.pipe.say(&answers::line(&id, Err(error))).map(|()| true);
            }
        };
        if let Ok(method) = &call.method
            && let Some(wish) = Wish::of(&method.action, Ticket(shared.next_ticket))
        {
            if let Err(error) = method.check_device(DEVICE) {
                self.reply(call.id.as_ref(), Err(error))?;
                return Ok(true);
            }
            let ticket = shared.ticket();
            shared.wishes.push(wish);
            self.asked = call.id.map(|id| Asked::Own(ticket, id));
            return Ok(true);
        }
        let Line::Whole(line) = line else { return Ok(true) };
        let mut kind = Kind::of(&call);
        if call.method.is_ok_and(|method| method.check_device(DEVICE).is_err()) {
            // The server refuses it.
            kind = Kind::Other;
        }
        let request = Request { line, kind, id: call.id };
        self.asked_at = self.active;
        self.asked = Some(Asked::Waiting(request, self.active));
        Ok(true)
    }

    /// Passes the waiting request on, or answers it if there is no server; begins the watch anew
    /// with a new server. Whether something was done.
    fn ask_server(&mut self, shared: &mut Shared) -> io::Result<bool> {
        let is_up = shared.server == Server::Up && self.not_before <= Instant::now();
        if self.watches_server(shared) && is_up {
            self.stream(shared)?.say(answers::WATCH)?;
            self.subscribing = true;
        }
        match self.asked.take() {
            Some(Asked::Waiting(request, _)) if shared.tells_events && request.kind.is_told() => {
                self.answer_told(&request, shared)?;
                Ok(true)
            }
            Some(Asked::Waiting(request, _)) if is_up => {
                let passed = self.stream(shared).and_then(|server| server.say(&request.line));
                if let Err(error) = passed {
                    log::debug!("a request could not be passed on: {error}");
                    self.asked = Some(Asked::Waiting(request, Instant::now()));
                    self.lose_server();
                    return Ok(false);
                }
                if request.id.is_some() {
                    self.asked = Some(Asked::Passed(request));
                } else {
                    // Its answer would say so; there is none.
                    self.watching |= request.kind == Kind::Watch;
                }
                Ok(true)
            }
            // It has been there a moment ago, and as a rule it is there again in another.
            Some(Asked::Waiting(request, since)) if shared.server == Server::Up => {
                self.asked = Some(Asked::Waiting(request, since));
                Ok(false)
            }
            Some(Asked::Waiting(request, since)) => self.answer_without(request, since, shared),
            other => {
                self.asked = other;
                Ok(false)
            }
        }
    }

    /// Whether a stream to the server is wanted, for what happens there.
    fn watches_server(&self, shared: &Shared) -> bool {
        self.watching && self.server.is_none() && !shared.tells_events
    }

    /// Answers a request about what has happened, all of which is known here.
    fn answer_told(&mut self, request: &Request, shared: &Shared) -> io::Result<()> {
        let is_watch = request.kind == Kind::Watch;
        self.watching |= is_watch;
        let answer = if is_watch { json!({"watching": true}) } else { shared.book.history() };
        self.reply(request.id.as_ref(), Ok(answer))
    }

    /// Answers a request that there is no server for, if that can be done.
    fn answer_without(
        &mut self,
        request: Request,
        since: Instant,
        shared: &mut Shared,
    ) -> io::Result<bool> {
        let is_gone = shared.server == Server::Gone;
        let answer = match request.kind {
            Kind::Status => {
                Ok(answers::own_status(shared.last_status.as_ref(), shared.facts.as_ref()))
            }
            Kind::Watch if is_gone => {
                self.watching = true;
                Ok(json!({"watching": true}))
            }
            Kind::Shutdown if is_gone => {
                shared.wishes.push(Wish::Shutdown);
                Ok(json!({"shutting_down": true}))
            }
            _ if since + shared.patience <= Instant::now() => {
                Err(if is_gone { answers::no_server() } else { answers::exchange_runs() })
            }
            kind => {
                if kind == Kind::Upgrade && shared.is_given_up() {
                    shared.wishes.push(Wish::Revive);
                }
                self.asked = Some(Asked::Waiting(request, since));
                return Ok(false);
            }
        };
        self.reply(request.id.as_ref(), answer)?;
        Ok(true)
    }

    fn reply(&mut self, id: Option<&Value>, answer: Result<Value, RpcError>) -> io::Result<()> {
        self.active = Instant::now();
        id.map_or(Ok(()), |id| self.pipe.say(&answers::line(id, answer)))
    }

    fn stream(&mut self, shared: &mut Shared) -> io::Result<&mut Pipe> {
        if self.server.is_none() {
            self.server = Some(shared.connect()?);
        }
        Ok(self.server.as_mut().expect("it was just made"))
    }

    /// Takes one line of the server, if there is room for it. Whether there was one.
    fn hear_server(&mut self, shared: &mut Shared) -> io::Result<bool> {
        let Some(server) = self.server.as_mut().filter(|_| self.pipe.is_sent()) else {
            return Ok(false);
        };
        let line = match server.next_line() {
            Ok(Some(Line::Whole(line))) => line,
            Ok(None) if !server.is_over() => return Ok(false),
            Ok(Some(Line::TooLong)) => return Ok(true),
            Ok(Some(Line::Half) | None) | Err(_) => {
                self.lose_server();
                return self.settle_lost();
            }
        };
        match answers::read(&line) {
            Some(Said::Event(members, number)) => {
                if self.watching {
                    self.pass_event(members, number.saturating_add(shared.events_before), shared)?;
                }
            }
            Some(Said::Answer(_, id)) if self.is_refusal(&id) => {
                self.lose_server();
                let Some(Asked::Passed(request)) = self.asked.take() else { return Ok(true) };
                if self.asked_at + shared.patience > Instant::now() {
                    self.asked = Some(Asked::Waiting(request, self.asked_at));
                } else {
                    let refusal = answers::as_answer_to(&line, request.id);
                    self.active = Instant::now();
                    self.pipe.say(&refusal)?;
                }
            }
            Some(Said::Answer(..)) if self.subscribing => self.subscribing = false,
            Some(Said::Answer(result, _)) => self.answered(line, result, shared)?,
            None => log::warn!("the server says something on a control stream that is no answer"),
        }
        Ok(true)
    }

    /// Whether an answer with this id is that to the stream itself, of which the server has read
    /// nothing: there is no place for it.
    fn is_refusal(&self, id: &Value) -> bool {
        let asked = match &self.asked {
            Some(Asked::Passed(request)) => request.id.as_ref(),
            _ => None,
        };
        id.is_null() && !self.subscribing && asked.is_some_and(|asked| !asked.is_null())
    }

    /// The server has answered.
    fn answered(
        &mut self,
        line: Vec<u8>,
        result: Option<Value>,
        shared: &mut Shared,
    ) -> io::Result<()> {
        let request = match self.asked.take() {
            Some(Asked::Passed(request)) => request,
            other => {
                // A refusal to serve this stream, as a rule: its end comes next.
                self.asked = other;
                return Ok(());
            }
        };
        match (request.kind, result) {
            (Kind::Status, Some(state)) => {
                shared.last_status = Some(state.clone());
                let told = answers::status(state, shared.facts.as_ref());
                return self.reply(request.id.as_ref(), Ok(told));
            }
            (Kind::Watch, Some(_)) => self.watching = true,
            (Kind::Other | Kind::Upgrade, _) => shared.is_stale = true,
            _ => {}
        }
        self.active = Instant::now();
        self.pipe.say(&line)
    }

    fn lose_server(&mut self) {
        self.server = None;
        self.subscribing = false;
        self.not_before = Instant::now() + AFTER_A_LOSS;
    }

    /// What the server had is asked again if it may be, else answered.
    fn settle_lost(&mut self) -> io::Result<bool> {
        let Some(Asked::Passed(request)) = self.asked.take_if(|it| matches!(it, Asked::Passed(_)))
        else {
            return Ok(true);
        };
        match request.kind {
            Kind::Other | Kind::Upgrade => {
                self.reply(request.id.as_ref(), Err(answers::server_died()))?;
            }
            Kind::Status | Kind::History | Kind::Watch | Kind::Shutdown => {
                self.asked = Some(Asked::Waiting(request, Instant::now()));
            }
        }
        Ok(true)
    }

    /// The server is gone: its last words are heard, and what it had is settled.
    pub(super) fn server_gone(&mut self, shared: &mut Shared) -> io::Result<()> {
        while self.hear_server(shared)? {}
        if self.server.is_some() {
            self.lose_server();
            self.settle_lost()?;
        }
        Ok(())
    }

    /// A server has come: it may be used at once.
    pub(super) fn server_up(&mut self) {
        self.not_before = Instant::now();
    }

    /// Says an event, unless the client does not watch.
    pub(super) fn tell(
        &mut self,
        members: &Map<String, Value>,
        shared: &mut Shared,
    ) -> io::Result<()> {
        if !self.watching {
            return Ok(());
        }
        self.pass_event(members.clone(), shared.last_event, shared)
    }

    /// Numbers only grow, whichever server they come from.
    fn pass_event(
        &mut self,
        members: Map<String, Value>,
        number: u64,
        shared: &mut Shared,
    ) -> io::Result<()> {
        let number = number.max(self.last_event.saturating_add(1));
        self.last_event = number;
        shared.last_event = shared.last_event.max(number);
        self.pipe.say(event(number, Value::Object(members)).to_string().as_bytes())
    }

    /// Answers the request with `ticket` if it is this client's. Whether it is.
    pub(super) fn settle(
        &mut self,
        ticket: Ticket,
        answer: &Result<Value, RpcError>,
    ) -> io::Result<bool> {
        let is_it = |asked: &mut Asked| matches!(asked, Asked::Own(own, _) if *own == ticket);
        let Some(Asked::Own(_, id)) = self.asked.take_if(is_it) else { return Ok(false) };
        self.reply(Some(&id), answer.clone()).map(|()| true)
    }

    pub(super) fn pack<'a>(&'a self, packing: &mut Packing<'a>) -> PackedClient {
        PackedClient {
            pipe: self.pipe.pack(packing),
            server: self.server.as_ref().map(|server| server.pack(packing)),
            asked: self.asked.as_ref().map(|asked| match asked {
                Asked::Waiting(request, _) => PackedAsked::Waiting(request.clone()),
                Asked::Passed(request) => PackedAsked::Passed(request.clone()),
                Asked::Own(ticket, id) => PackedAsked::Own(*ticket, id.clone()),
            }),
            watching: self.watching,
            subscribing: self.subscribing,
            last_event: self.last_event,
        }
    }

    pub(super) fn unpack(
        packed: PackedClient,
        limits: &Limits,
        unpacking: &mut Unpacking,
    ) -> Result<Self, Missing> {
        let now = Instant::now();
        let server = packed.server.map(|server| Pipe::unpack(server, ANSWER_MAX, unpacking));
        Ok(Self {
            pipe: Pipe::unpack(packed.pipe, limits.line, unpacking)?,
            server: server.transpose()?,
            asked: packed.asked.map(|asked| match asked {
                PackedAsked::Waiting(request) => Asked::Waiting(request, now),
                PackedAsked::Passed(request) => Asked::Passed(request),
                PackedAsked::Own(ticket, id) => Asked::Own(ticket, id),
            }),
            watching: packed.watching,
            subscribing: packed.subscribing,
            last_event: packed.last_event,
            not_before: now,
            has_more: true,
            active: now,
            asked_at: now,
        })
    }
}
