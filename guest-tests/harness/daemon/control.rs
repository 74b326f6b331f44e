//! The control socket by hand: JSON-RPC 2.0, one object per line.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// How long a command may take; nothing the daemon does comes near it.
pub(super) const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// An error reply.
#[derive(Clone, Debug)]
pub struct RpcError {
    /// JSON-RPC's number.
    pub code: i64,
    /// The sentence for people.
    pub message: String,
    /// What else was said; `data.code` is the stable name.
    pub data: Value,
}

impl RpcError {
    /// The stable name of the error, `data.code`; empty when there is none.
    pub fn name(&self) -> &str {
        self.data["code"].as_str().unwrap_or("")
    }

    /// Reads the `error` member of a reply.
    pub fn from_reply(error: &Value) -> RpcError {
        RpcError {
            code: error["code"].as_i64().unwrap_or(0),
            message: error["message"].as_str().unwrap_or("").to_owned(),
            data: error["data"].clone(),
        }
    }
}

/// A connection to the control socket: JSON-RPC 2.0, one object per line.
pub struct Control {
    stream: BufReader<UnixStream>,
    next_id: u64,
}

impl Control {
    /// Connects.
    pub fn connect(path: &Path) -> io::Result<Control> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(COMMAND_LIMIT))?;
        stream.set_write_timeout(Some(COMMAND_LIMIT))?;
        Ok(Control { stream: BufReader::new(stream), next_id: 1 })
    }

    /// Calls a method and waits for its reply.
    ///
    /// Panics when the daemon hangs up or answers something that is not a reply to this call.
    pub fn request(&mut self, method: &str, params: Value) -> Result<Value, RpcError> {
        let id = self.next_id;
        self.next_id += 1;
        let call = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        self.send_raw(format!("{call}\n").as_bytes())
            .unwrap_or_else(|e| panic!("sending {method}: {e}"));
        let reply =
            self.receive().unwrap_or_else(|e| panic!("waiting for the reply to {method}: {e}"));
        let reply = reply.unwrap_or_else(|| panic!("the daemon hung up on {method}"));
        assert_eq!(reply["id"], id, "a reply to something else: {reply}");
        match reply.get("error") {
            Some(error) => Err(RpcError::from_reply(error)),
            None => Ok(reply["result"].clone()),
        }
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Receives one line; `None` when the daemon has hung up.
    pub fn receive(&mut self) -> io::Result<Option<Value>> {
        let mut line = Vec::new();
        match self.stream.read_until(b'\n', &mut line) {
            Ok(0) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(e) => Err(e),
            Ok(_) => serde_json::from_slice(&line).map(Some).map_err(io::Error::other),
        }
    }
}
