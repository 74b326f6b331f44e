//! The client's side of the control socket: connect, call, wait for events.
//!
//! Invariants: nothing waits for ever for an answer, and a daemon that answers nonsense, or too
//! much, is an error with a sentence, never a panic.
//!
//! Deliberately absent: more than one call at a time, and reconnecting. A command that may have
//! been carried out must not be sent twice by a program; the sentence says how to find out.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Serialize;
use serde_json::{Value, json};

use crate::code::Code;

/// How long to wait for the daemon to take a connection or a request.
const TAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer that is believed.
const ANSWER_MAX: u64 = 64 << 20;

/// Why there is no result.
#[derive(Debug)]
pub struct Failure {
    /// A stable word.
    pub code: String,
    /// A sentence.
    pub message: String,
    /// What else the daemon said for programs.
    pub data: Option<Value>,
}

impl Failure {
    /// A failure of our own.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code: code.as_str().to_owned(), message: message.into(), data: None }
    }

    /// The daemon's, from the `error` member of its reply.
    fn from_reply(error: &Value) -> Self {
        let message = error["message"]
            .as_str()
            .unwrap_or("the daemon refused, and did not say why")
            .to_owned();
        let code = match error["data"]["code"].as_str() {
            Some(code) => code.to_owned(),
            None => format!("json_rpc {}", error["code"]),
        };
        let mut data = error["data"].as_object().cloned().unwrap_or_default();
        data.remove("code");
        Self { code, message, data: (!data.is_empty()).then_some(Value::Object(data)) }
    }
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// No daemon listens there, or it may not be used.
    pub fn connect(path: &Path) -> Result<Client, Failure> {
        connect(path).map(|stream| Client { stream: BufReader::new(stream) }).map_err(|e| {
            let path = path.display();
            Failure::new(
                Code::Unreachable,
                match e {
                    Errno::NOENT | Errno::CONNREFUSED | Errno::NOTDIR => {
                        format!(
                            "no daemon listens on {path}; start one, or give its --control-path"
                        )
                    }
                    Errno::ACCESS | Errno::PERM => {
                        format!(
                            "you may not use {path}; be root or the user that the daemon runs as"
                        )
                    }
                    Errno::AGAIN => {
                        format!("the daemon at {path} does not take connections; see its log")
                    }
                    e => format!("cannot connect to {path}: {}", io::Error::from(e)),
                },
            )
        })
    }

    /// Calls a method and waits for its result.
    ///
    /// # Errors
    /// The daemon refuses, does not answer in time, or is gone.
    pub fn call(
        &mut self,
        method: &str,
        params: &impl Serialize,
        timeout: Duration,
    ) -> Result<Value, Failure> {
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let sent = self.stream.get_mut().write_all(format!("{request}\n").as_bytes());
        // A daemon that refuses the connection says so and hangs up, perhaps before it was asked.
        if let Err(e) = sent
            && !matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
        {
            return Err(Failure::new(Code::Unreachable, format!("cannot send the request: {e}")));
        }
        let deadline = Instant::now() + timeout;
        let reply = self.receive(Some(deadline), || {
            format!(
                "the daemon has not answered `{method}` within {} s; it may still be at it, `hotswapctl status` tells",
                timeout.as_secs()
            )
        })?;
        match reply.get("error") {
            Some(error) => Err(Failure::from_reply(error)),
            None if reply["id"] == 1 => Ok(reply["result"].clone()),
            None => Err(Failure::new(
                Code::BadReply,
                "the daemon answered something that was not asked",
            )),
        }
    }

    /// Waits for the next event of a `watch`, however long it takes.
    ///
    /// # Errors
    /// The daemon has ended the connection, or talks nonsense.
    pub fn next_event(&mut self) -> Result<Value, Failure> {
        let mut event = self.receive(None, String::new)?;
        match event.get("error") {
            Some(error) => Err(Failure::from_reply(error)),
            None => Ok(event["params"].take()),
        }
    }

    fn receive(
        &mut self,
        deadline: Option<Instant>,
        too_late: impl Fn() -> String,
    ) -> Result<Value, Failure> {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            // Zero would mean no limit at all.
            let rest = deadline
                .map(|d| d.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
            let stream = self.stream.get_ref();
            let room = ANSWER_MAX - line.len() as u64;
            let read = stream
                .set_read_timeout(rest)
                .and_then(|()| (&mut self.stream).take(room).read_until(b'\n', &mut line));
            match read {
                Ok(0) if room == 0 => {
                    return Err(Failure::new(Code::BadReply, "the daemon's answer has no end"));
                }
                Ok(0) => return Err(hung_up()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Failure::new(Code::Timeout, too_late()));
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(hung_up()),
                Err(e) => {
                    return Err(Failure::new(
                        Code::Unreachable,
                        format!("cannot read the answer: {e}"),
                    ));
                }
            }
        }
        match serde_json::from_slice(&line) {
            Ok(reply @ Value::Object(_)) => Ok(reply),
            _ => {
                Err(Failure::new(Code::BadReply, "what listens there does not answer in JSON-RPC"))
            }
        }
    }
}

fn hung_up() -> Failure {
    Failure::new(
        Code::Disconnected,
        "the daemon has ended the connection; if it still runs, its log says why",
    )
}

/// Like `UnixStream::connect`, but not waiting for ever for a place in the backlog.
fn connect(path: &Path) -> Result<UnixStream, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_socket_timeout(&socket, Timeout::Send, Some(TAKE_TIMEOUT))?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}
