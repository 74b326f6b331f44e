//! A server with operations that are made up, and a client that can do everything wrong.
#![allow(dead_code, unreachable_pub)]

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use control::messages::{LimitRequest, ResizeRequest, RollbackRequest, UpgradeRequest};
use control::{Limits, OperationError, Operations, Server};
use serde_json::{Value, json};
use tempfile::TempDir;

/// No answer takes this long.
pub const LIMIT: Duration = Duration::from_secs(20);
/// More than any socket buffer holds.
pub const FLOOD_TEXT: usize = 4096;

/// Operations that remember what they were asked.
#[derive(Default)]
pub struct Mock {
    pub statuses: AtomicUsize,
    pub shutdowns: AtomicUsize,
    pub upgrades: Mutex<VecDeque<UpgradeRequest>>,
    pub rollbacks: Mutex<VecDeque<RollbackRequest>>,
    pub resizes: Mutex<VecDeque<ResizeRequest>>,
    pub events: Mutex<Vec<Value>>,
    pub news: Condvar,
    pub flood: AtomicBool,
}

impl Mock {
    pub fn happen(&self, event: Value) {
        self.events.lock().unwrap().push(event);
        self.news.notify_all();
    }
}

impl Operations for Mock {
    fn status(&self) -> Value {
        self.statuses.fetch_add(1, Ordering::SeqCst);
        json!({"generation": 1, "state": "serving", "domain": {"name": "ramdisk", "version": "1.0.0"}})
    }

    fn upgrade(&self, request: UpgradeRequest) -> Result<Value, OperationError> {
        let name = request.name.clone();
        self.upgrades.lock().unwrap().push_back(request);
        match name.as_str() {
            "refused" => Err(OperationError {
                code: "drain_timeout",
                message: "queue 0 has 3 requests in flight; ask for a longer drain".to_owned(),
                data: Some(json!({"queue": 0, "in_flight": 3})),
            }),
            "panics" => panic!("this is asked for by a test"),
            "stuck" => {
                thread::sleep(Duration::from_secs(30));
                Ok(json!({}))
            }
            "slow" => {
                thread::sleep(Duration::from_millis(300));
                Ok(json!({"slow": true}))
            }
            name => Ok(json!({
                "generation": 2, "mode": "handover",
                "from": {"name": "ramdisk", "version": "1.0.0"}, "to": {"name": name, "version": "2.0.0"},
                "phases_us": {"drain": 3, "quiesce": 1, "activate": 2, "pause": 12},
            })),
        }
    }

    fn check(&self, request: UpgradeRequest) -> Result<Value, OperationError> {
        match request.name.as_str() {
            "refused" => Err(OperationError {
                code: "swap_not_possible",
                message: "these cannot serve side by side".to_owned(),
                data: None,
            }),
            name => Ok(json!({"accepted": true, "to": {"name": name, "version": "2.0.0"}})),
        }
    }

    fn limit(&self, request: LimitRequest) -> Result<Value, OperationError> {
        Ok(json!({"limits": {"iops": request.iops, "off": request.off}}))
    }

    fn rollback(&self, request: RollbackRequest) -> Result<Value, OperationError> {
        self.rollbacks.lock().unwrap().push_back(request);
        Err(OperationError {
            code: "no_standby",
            message: "there is no standby".to_owned(),
            data: None,
        })
    }

    fn resize(&self, request: ResizeRequest) -> Result<Value, OperationError> {
        let size = request.size;
        self.resizes.lock().unwrap().push_back(request);
        match size {
            512 => Err(OperationError {
                code: "resize_shrinks",
                message: "512 bytes are fewer".to_owned(),
                data: None,
            }),
            size => Ok(json!({"generation": 1, "capacity_before": 1024, "capacity": size})),
        }
    }

    fn history(&self) -> Value {
        json!([{"generation": 1, "outcome": "started"}, {"generation": 2, "outcome": "committed"}])
    }

    fn next_event(&self, after: u64, timeout: Duration) -> Option<(u64, Value)> {
        if self.flood.load(Ordering::SeqCst) {
            return Some((after + 1, json!({"event": "x".repeat(FLOOD_TEXT)})));
        }
        let events = self.events.lock().unwrap();
        let at = usize::try_from(after).unwrap();
        let (events, _) =
            self.news.wait_timeout_while(events, timeout, |events| events.len() <= at).unwrap();
        events.get(at).map(|event| (after + 1, event.clone()))
    }

    fn last_event(&self) -> u64 {
        self.events.lock().unwrap().len() as u64
    }

    fn shutdown(&self) {
        self.shutdowns.fetch_add(1, Ordering::SeqCst);
    }
}

/// A server with made-up operations in a directory of its own.
pub struct Fixture {
    pub mock: Arc<Mock>,
    pub server: Server,
    pub directory: TempDir,
}

pub fn fixture() -> Fixture {
    fixture_with(Limits::default())
}

pub fn fixture_with(limits: Limits) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let mock = Arc::new(Mock::default());
    let server =
        Server::start_with(&directory.path().join("control"), Arc::clone(&mock), limits).unwrap();
    Fixture { mock, server, directory }
}

impl Fixture {
    pub fn connect(&self) -> Client {
        Client::connect(self.server.path())
    }

    /// Connects as soon as the server has noticed that an earlier client is gone.
    pub fn connect_at_last(&self) -> Client {
        let mut client = self.connect();
        eventually("a free connection", || {
            let served = client
                .try_call("status", json!({}))
                .is_some_and(|reply| reply.get("result").is_some());
            if !served {
                client = self.connect();
            }
            served
        });
        client
    }

    pub fn ctl(&self, args: &[&str]) -> Output {
        self.ctl_command(args).output().unwrap()
    }

    pub fn ctl_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hotswapctl"));
        command
            .arg("--control-path")
            .arg(self.server.path())
            .args(args)
            .current_dir(self.directory.path());
        command
    }
}

pub struct Client(pub BufReader<UnixStream>);

impl Client {
    pub fn connect(path: &Path) -> Client {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        Client(BufReader::new(stream))
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// The next line; `None` at the end of the connection.
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(e) => panic!("no answer: {e}"),
        }
    }

    pub fn try_call(&mut self, method: &str, params: Value) -> Option<Value> {
        let call = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let _ = self.0.get_mut().write_all(format!("{call}\n").as_bytes());
        self.receive()
    }

    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.try_call(method, params).expect("an answer")
    }

    pub fn works(&mut self) {
        let reply = self.call("status", json!({}));
        assert_eq!(reply["result"]["generation"], 1, "{reply}");
    }
}

#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
pub fn assert_error(reply: &Value, code: i64, name: &str, says: &str) {
    assert_eq!(reply["jsonrpc"], "2.0", "{reply}");
    assert_eq!(reply["error"]["code"], code, "{reply}");
    assert_eq!(reply["error"]["data"]["code"], name, "{reply}");
    assert!(
        reply["error"]["message"].as_str().unwrap().contains(says),
        "`{says}` is not in {reply}"
    );
    assert!(reply.get("result").is_none(), "{reply}");
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
