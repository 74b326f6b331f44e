//! QEMU's machine protocol: one JSON object per line, one reply per command, events in between.
//!
//! Only what the tests need of it: send a command, return what it says, skip events.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

/// A monitor that never answers means a QEMU that hangs.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// A connected monitor in command mode.
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Shakes hands on a connection that QEMU made to us.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        let mut qmp = Qmp { stream: BufReader::new(stream) };
        let greeting = qmp.receive()?;
        if greeting.get("QMP").is_none() {
            return Err(io::Error::other(format!("not a QMP greeting: {greeting}")));
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs one command and gives back its `return` value; its `error` becomes an error.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut reply = self.receive()?;
            if let Some(error) = reply.get("error") {
                return Err(io::Error::other(format!("QMP {command}: {error}")));
            }
            if let Some(value) = reply.get_mut("return") {
                return Ok(value.take());
            }
            // Anything else is an event, which may come at any time.
        }
    }

    fn receive(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU closed its monitor"));
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }
}
