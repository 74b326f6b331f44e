//! The control socket and `hotswapctl`, against operations that are made up.
//!
//! Everything that a client can do wrong, or maliciously, is done here; what the operations really
//! do is tested elsewhere. Every wait has an end.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_hotswap::control::{
    Limits, OperationError, Operations, RollbackRequest, Server, SocketError, SocketFile,
    UpgradeMode, UpgradeRequest, WhenBusy,
};

/// No answer takes this long.
const LIMIT: Duration = Duration::from_secs(20);
/// More than any socket buffer holds.
const FLOOD_TEXT: usize = 4096;

/// Operations that remember what they were asked.
#[derive(Default)]
struct Mock {
    statuses: AtomicUsize,
    shutdowns: AtomicUsize,
    upgrades: Mutex<VecDeque<UpgradeRequest>>,
    rollbacks: Mutex<VecDeque<RollbackRequest>>,
    events: Mutex<Vec<Value>>,
    news: Condvar,
    flood: AtomicBool,
}

impl Mock {
    fn happen(&self, event: Value) {
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
                thread::sleep(Duration::from_secs(3));
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

    fn rollback(&self, request: RollbackRequest) -> Result<Value, OperationError> {
        self.rollbacks.lock().unwrap().push_back(request);
        Err(OperationError {
            code: "no_standby",
            message: "there is no standby".to_owned(),
            data: None,
        })
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
struct Fixture {
    mock: Arc<Mock>,
    server: Server,
    directory: TempDir,
}

fn fixture() -> Fixture {
    fixture_with(Limits::default())
}

fn fixture_with(limits: Limits) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let mock = Arc::new(Mock::default());
    let server =
        Server::start_with(&directory.path().join("control"), Arc::clone(&mock), limits).unwrap();
    Fixture { mock, server, directory }
}

impl Fixture {
    fn connect(&self) -> Client {
        Client::connect(self.server.path())
    }

    /// Connects as soon as the server has noticed that an earlier client is gone.
    fn connect_at_last(&self) -> Client {
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

    fn ctl(&self, args: &[&str]) -> Output {
        self.ctl_command(args).output().unwrap()
    }

    fn ctl_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hotswapctl"));
        command
            .arg("--control-path")
            .arg(self.server.path())
            .args(args)
            .current_dir(self.directory.path());
        command
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(path: &Path) -> Client {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        Client(BufReader::new(stream))
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// The next line; `None` at the end of the connection.
    fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(e) => panic!("no answer: {e}"),
        }
    }

    fn try_call(&mut self, method: &str, params: Value) -> Option<Value> {
        let call = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let _ = self.0.get_mut().write_all(format!("{call}\n").as_bytes());
        self.receive()
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        self.try_call(method, params).expect("an answer")
    }

    fn works(&mut self) {
        let reply = self.call("status", json!({}));
        assert_eq!(reply["result"]["generation"], 1, "{reply}");
    }
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
fn assert_error(reply: &Value, code: i64, name: &str, says: &str) {
    assert_eq!(reply["jsonrpc"], "2.0", "{reply}");
    assert_eq!(reply["error"]["code"], code, "{reply}");
    assert_eq!(reply["error"]["data"]["code"], name, "{reply}");
    assert!(
        reply["error"]["message"].as_str().unwrap().contains(says),
        "`{says}` is not in {reply}"
    );
    assert!(reply.get("result").is_none(), "{reply}");
}

#[test]
fn bad_requests_have_exact_codes_and_leave_the_connection_good() {
    let fixture = fixture();
    let mut client = fixture.connect();
    let deep = "[".repeat(30_000) + &"]".repeat(30_000);
    let deep_id =
        format!(r#"{{"jsonrpc":"2.0","id":{}{}}}"#, "[".repeat(30_000), "]".repeat(30_000));
    let (parse, invalid) = ((-32700, "parse_error"), (-32600, "invalid_request"));
    for (line, (code, name), id, says) in [
        ("", parse, json!(null), "JSON"),
        ("\r", parse, json!(null), "JSON"),
        ("{", parse, json!(null), "JSON"),
        ("hello", parse, json!(null), "JSON"),
        (r#"{"jsonrpc":"2.0","id":1,"method":"status"} x"#, parse, json!(null), "trailing"),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"a\0\"}", parse, json!(null), "JSON"),
        (r#"{"jsonrpc":"2.0","id":1,"method":"\ud800"}"#, parse, json!(null), "JSON"),
        (r#"{"jsonrpc":"2.0","id":1e999,"method":"status"}"#, parse, json!(null), "range"),
        (&deep, parse, json!(null), "recursion"),
        (&deep_id, parse, json!(null), "recursion"),
        ("17", invalid, json!(null), "object"),
        ("null", invalid, json!(null), "object"),
        ("\"status\"", invalid, json!(null), "object"),
        ("[]", invalid, json!(null), "batches"),
        (r#"[{"jsonrpc":"2.0","id":1,"method":"status"}]"#, invalid, json!(null), "batches"),
        ("{}", invalid, json!(null), "jsonrpc"),
        (r#"{"id":1,"method":"status"}"#, invalid, json!(1), "jsonrpc"),
        (r#"{"jsonrpc":"1.0","id":"x","method":"status"}"#, invalid, json!("x"), "jsonrpc"),
        (r#"{"jsonrpc":2.0,"id":1,"method":"status"}"#, invalid, json!(1), "jsonrpc"),
        (r#"{"jsonrpc":"2.0","id":1}"#, invalid, json!(1), "method"),
        (r#"{"jsonrpc":"2.0","method":17}"#, invalid, json!(null), "method"),
        (r#"{"jsonrpc":"2.0","id":{},"method":"status"}"#, invalid, json!(null), "`id`"),
        (r#"{"jsonrpc":"2.0","id":1.5,"method":"status"}"#, invalid, json!(null), "`id`"),
        (
            r#"{"jsonrpc":"2.0","id":18446744073709551616,"method":"status"}"#,
            invalid,
            json!(null),
            "`id`",
        ),
        (r#"{"jsonrpc":"2.0","id":true,"method":"status"}"#, invalid, json!(null), "`id`"),
        (r#"{"jsonrpc":"2.0","id":1,"method":"status","params":"x"}"#, invalid, json!(1), "params"),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"status","params":null}"#,
            invalid,
            json!(1),
            "params",
        ),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"rollback","parms":{}}"#,
            invalid,
            json!(1),
            "`parms`",
        ),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"status","method":"shutdown"}"#,
            invalid,
            json!(null),
            "`method`",
        ),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"status","params":{"a":{"b":1,"b":1}}}"#,
            invalid,
            json!(null),
            "`b`",
        ),
    ] {
        client.send(format!("{line}\n"));
        let reply = client.receive().expect("an answer");
        assert_error(&reply, code, name, says);
        assert_eq!(reply["id"], id, "{line}: {reply}");
    }
    client.send(b"\xff\xfe{}\n");
    assert_error(&client.receive().unwrap(), -32700, "parse_error", "JSON");
    assert_eq!(fixture.mock.statuses.load(Ordering::SeqCst), 0, "a bad request was executed");
    assert_eq!(fixture.mock.shutdowns.load(Ordering::SeqCst), 0, "a bad request was executed");
    client.works();
}

#[test]
fn bad_methods_and_parameters_are_named() {
    let fixture = fixture();
    let mut client = fixture.connect();
    assert_error(&client.call("reboot", json!({})), -32601, "method_not_found", "`reboot`");
    assert_error(&client.call("", json!({})), -32601, "method_not_found", "there are status");
    for (method, params, says) in [
        ("status", json!({"verbose": true}), "`verbose`"),
        ("history", json!({"last": 1}), "`last`"),
        ("watch", json!({"x": 1}), "`x`"),
        ("shutdown", json!({"now": true}), "`now`"),
        ("status", json!([]), "by name"),
        ("upgrade", json!(["ramdisk"]), "by name"),
        ("upgrade", json!({}), "`name`"),
        ("upgrade", json!({"name": 17}), "string"),
        ("upgrade", json!({"name": ""}), "`name`"),
        ("upgrade", json!({"name": "a\0b"}), "`name`"),
        ("upgrade", json!({"name": "a\nb"}), "control characters"),
        ("upgrade", json!({"name": "a".repeat(4097)}), "4096"),
        ("upgrade", json!({"name": "a", "params": {"a\n[forged line]": "x"}}), "`params`"),
        ("upgrade", json!({"name": "a", "params": {"a": "x\n"}}), "`params`"),
        ("upgrade", json!({"name": "a", "mode": "fast"}), "`fast`"),
        ("upgrade", json!({"name": "a", "mode": "Swap"}), "`Swap`"),
        ("upgrade", json!({"name": "a", "when_busy": "wait"}), "`wait`"),
        ("upgrade", json!({"name": "a", "params": ["size=1M"]}), "map"),
        ("upgrade", json!({"name": "a", "params": {"size": 5}}), "string"),
        ("upgrade", json!({"name": "a", "params": {"": "x"}}), "`params`"),
        ("upgrade", json!({"name": "a", "params": {"a=b": "x"}}), "`params`"),
        ("upgrade", json!({"name": "a", "params": {"a": "\0"}}), "`params`"),
        ("upgrade", json!({"name": "a", "drain_timeout_ms": -1}), "u64"),
        ("upgrade", json!({"name": "a", "drain_timeout_ms": "1"}), "u64"),
        ("upgrade", json!({"name": "a", "drain_timeout_ms": 1.5}), "u64"),
        ("upgrade", json!({"name": "a", "drain_timeout_ms": 600_001}), "600000"),
        ("upgrade", json!({"name": "a", "drain_timeout_ms": u64::MAX}), "600000"),
        ("upgrade", json!({"name": "a", "starved_timeout_ms": 600_001}), "600000"),
        ("rollback", json!({"starved_timeout_ms": -1}), "u64"),
        ("upgrade", json!({"name": "a", "colour": "blue"}), "`colour`"),
        ("rollback", json!({"name": "a"}), "`name`"),
        ("rollback", json!({"drain_timeout_ms": null}), "u64"),
    ] {
        assert_error(&client.call(method, params), -32602, "invalid_params", says);
    }
    assert!(fixture.mock.upgrades.lock().unwrap().is_empty(), "a bad upgrade was executed");
    assert!(fixture.mock.rollbacks.lock().unwrap().is_empty(), "a bad rollback was executed");
    assert_eq!(fixture.mock.shutdowns.load(Ordering::SeqCst), 0);
    client.works();
}

#[test]
fn operations_get_what_was_sent_and_errors_say_their_code() {
    let fixture = fixture();
    let mut client = fixture.connect();
    let params = json!({"name": "next", "params": {"size": "1M"}, "mode": "swap", "drain_timeout_ms": 600_000,
                        "starved_timeout_ms": 0, "when_busy": "refuse"});
    assert_eq!(client.call("upgrade", params)["result"]["to"]["name"], "next");
    let asked = fixture.mock.upgrades.lock().unwrap().pop_front().unwrap();
    assert_eq!((asked.mode, asked.when_busy), (UpgradeMode::Swap, WhenBusy::Refuse));
    assert_eq!(
        (asked.drain_timeout, asked.starved_timeout),
        (Duration::from_secs(600), Duration::ZERO)
    );
    assert_eq!(asked.params.iter().collect::<Vec<_>>(), [("size", "1M")]);

    let refused = client.call("upgrade", json!({"name": "refused"}));
    assert_error(&refused, -32000, "drain_timeout", "3 requests in flight");
    assert_eq!(
        refused["error"]["data"],
        json!({"code": "drain_timeout", "queue": 0, "in_flight": 3})
    );
    assert_error(
        &client.call("rollback", json!({"drain_timeout_ms": 7})),
        -32000,
        "no_standby",
        "no standby",
    );
    let asked = fixture.mock.rollbacks.lock().unwrap().pop_front().unwrap();
    assert_eq!(
        asked,
        RollbackRequest {
            drain_timeout: Duration::from_millis(7),
            starved_timeout: Duration::from_secs(10),
            when_busy: WhenBusy::Queue
        }
    );
    assert_eq!(client.call("history", json!({}))["result"].as_array().map(Vec::len), Some(2));
    assert_error(
        &client.call("upgrade", json!({"name": "panics"})),
        -32603,
        "internal_error",
        "log",
    );
    client.works();
}

#[test]
fn notifications_are_executed_and_never_answered() {
    let fixture = fixture();
    let mut client = fixture.connect();
    for call in [
        json!({"jsonrpc": "2.0", "method": "upgrade", "params": {"name": "quiet"}}),
        json!({"jsonrpc": "2.0", "method": "upgrade", "params": {"name": "refused"}}),
        json!({"jsonrpc": "2.0", "method": "upgrade", "params": {"colour": "blue"}}),
        json!({"jsonrpc": "2.0", "method": "no_such_method"}),
    ] {
        client.send(format!("{call}\n"));
    }
    // The first thing that comes back is the answer to this. An id of null is an id.
    client.send("{\"jsonrpc\":\"2.0\",\"id\":null,\"method\":\"status\"}\n");
    let reply = client.receive().unwrap();
    assert_eq!(
        (&reply["id"], &reply["result"]["state"]),
        (&json!(null), &json!("serving")),
        "{reply}"
    );
    assert_eq!(fixture.mock.upgrades.lock().unwrap().len(), 2);
}

#[test]
fn pipelined_requests_are_answered_in_order_with_their_ids() {
    let fixture = fixture();
    let mut client = fixture.connect();
    let ids = [json!(1), json!("two"), json!(-3), json!(null), json!(u64::MAX), json!("")];
    let lines: String = ids
        .iter()
        .enumerate()
        .map(|(at, id)| {
            let name = if at == 0 { "slow" } else { "next" };
            format!(
                "{}\n",
                json!({"jsonrpc": "2.0", "id": id, "method": "upgrade", "params": {"name": name}})
            )
        })
        .collect();
    client.send(lines);
    client.0.get_ref().shutdown(Shutdown::Write).unwrap();
    for (at, id) in ids.iter().enumerate() {
        let reply = client.receive().expect("an answer, although nothing more is sent");
        assert_eq!(&reply["id"], id, "{reply}");
        assert_eq!(reply["result"]["slow"] == true, at == 0, "{reply}");
    }
    assert!(client.receive().is_none());
}

#[test]
fn half_a_line_is_answered_and_not_executed() {
    let fixture = fixture();
    for half in
        [r#"{"jsonrpc":"2.0","id":1,"method":"shutdown"}"#, r#"{"jsonrpc":"2.0","id":1,"me"#]
    {
        let mut client = fixture.connect();
        client.send(half);
        client.0.get_ref().shutdown(Shutdown::Write).unwrap();
        let reply = client.receive().expect("an answer");
        assert_error(&reply, -32700, "parse_error", "no end");
        assert_eq!(reply["id"], json!(null));
        assert!(client.receive().is_none(), "the connection is still open");
    }
    let mut client = fixture.connect();
    client.send(r#"{"jsonrpc":"2.0","#);
    drop(client);
    fixture.connect().works();
    assert_eq!(fixture.mock.shutdowns.load(Ordering::SeqCst), 0, "half a line was executed");
}

#[test]
fn a_line_of_ten_megabytes_is_refused_once_and_the_next_is_served() {
    let fixture = fixture();
    let mut client = fixture.connect();
    client.send(vec![b'x'; 10 << 20]);
    assert_error(&client.receive().unwrap(), -32600, "invalid_request", "65536");
    client.send("\n");
    client.works();
    // The largest that is taken, and one byte more.
    let call = |length: usize| {
        let call = r#"{"jsonrpc":"2.0","id":1,"method":"status"}"#;
        format!("{call}{}\n", " ".repeat(length - call.len()))
    };
    client.send(call(64 << 10));
    assert_eq!(client.receive().unwrap()["result"]["generation"], 1);
    client.send(call((64 << 10) + 1));
    assert_error(&client.receive().unwrap(), -32600, "invalid_request", "65536");
    client.works();
}

#[test]
fn of_a_hundred_connections_32_are_served_and_the_others_told() {
    let fixture = fixture();
    let mut clients: Vec<Client> = thread::scope(|scope| {
        let connecting: Vec<_> = (0..100).map(|_| scope.spawn(|| fixture.connect())).collect();
        connecting.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let mut served = Vec::new();
    let mut refused = 0;
    for mut client in clients.drain(..) {
        let reply = client.call("status", json!({}));
        if reply.get("result").is_some() {
            served.push(client);
        } else {
            assert_error(&reply, -32000, "too_many_connections", "32 connections");
            assert!(client.receive().is_none(), "a refused client is still connected");
            refused += 1;
        }
    }
    assert_eq!((served.len(), refused), (32, 68));
    // They are idle for a while, and still served; and who leaves makes room.
    thread::sleep(Duration::from_millis(300));
    served.iter_mut().for_each(Client::works);
    let output = fixture.ctl(&["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("(too_many_connections)"), "{output:?}");
    served.pop();
    fixture.connect_at_last().works();
}

#[test]
fn a_watcher_gets_events_and_is_still_answered() {
    let fixture = fixture();
    fixture.mock.happen(json!({"event": "before"}));
    let mut client = fixture.connect();
    assert_eq!(client.call("watch", json!({}))["result"], json!({"watching": true}));
    fixture.mock.happen(json!({"event": "first"}));
    let event =
        json!({"jsonrpc": "2.0", "method": "event", "params": {"event": "first", "sequence": 2}});
    assert_eq!(client.receive().unwrap(), event);
    client.works();
    assert_eq!(client.call("watch", json!({}))["result"], json!({"watching": true}));
    // Who has ended his side may still be listening.
    client.0.get_ref().shutdown(Shutdown::Write).unwrap();
    thread::sleep(Duration::from_millis(250));
    fixture.mock.happen(json!("second"));
    let event =
        json!({"jsonrpc": "2.0", "method": "event", "params": {"event": "second", "sequence": 3}});
    assert_eq!(client.receive().unwrap(), event);
}

#[test]
fn watchers_that_leave_give_their_place_back_although_nothing_happens() {
    let fixture = fixture_with(Limits { connections: 1, ..Limits::default() });
    for _ in 0..3 {
        let mut client = fixture.connect_at_last();
        client.call("watch", json!({}));
    }
    let mut client = fixture.connect_at_last();
    client.call("watch", json!({}));
    client.0.get_ref().shutdown(Shutdown::Write).unwrap();
    drop(client);
    fixture.connect_at_last().works();
}

#[test]
fn who_says_nothing_makes_room_for_who_does() {
    let idle = Duration::from_secs(1);
    let fixture = fixture_with(Limits { connections: 3, idle, ..Limits::default() });
    let mut watching = fixture.connect();
    watching.call("watch", json!({}));
    let mut oldest = fixture.connect();
    oldest.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"met");
    thread::sleep(Duration::from_millis(20));
    let mut other = fixture.connect();
    other.works();
    let early = fixture.connect().receive().expect("a refusal");
    assert_error(&early, -32000, "too_many_connections", "close one");
    thread::sleep(idle + idle / 5);
    fixture.connect().works();
    let told = oldest.receive().expect("a word");
    assert_error(&told, -32000, "too_many_connections", "connect again");
    assert!(oldest.receive().is_none(), "it is cut off");
    // Who watches is not idle, and whoever was idle for less time stays.
    fixture.mock.happen(json!({"event": "news"}));
    assert_eq!(watching.receive().expect("an event")["params"]["event"], "news");
    other.works();
}

#[test]
fn a_flood_leaves_room_for_requests() {
    let fixture = fixture();
    fixture.mock.flood.store(true, Ordering::SeqCst);
    let mut client = fixture.connect();
    client.call("watch", json!({}));
    client.send("{\"jsonrpc\":\"2.0\",\"id\":\"mine\",\"method\":\"status\"}\n");
    let answered = (0..10_000).any(|_| client.receive().unwrap()["id"] == "mine");
    assert!(answered, "ten thousand events, and no answer");
}

#[test]
fn who_does_not_read_is_cut_off_and_disturbs_nobody() {
    let limits =
        Limits { connections: 2, write_timeout: Duration::from_millis(300), ..Limits::default() };
    let fixture = fixture_with(limits);
    fixture.mock.flood.store(true, Ordering::SeqCst);
    let mut deaf = fixture.connect();
    deaf.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"watch\"}\n");
    let mut other = fixture.connect();
    other.works();
    // The place comes back by itself, although the client has closed nothing.
    let mut third = fixture.connect_at_last();
    third.works();
    other.works();
    // What is there to read ends, in the middle of a line perhaps.
    let mut rest = Vec::new();
    let _ = deaf.0.take(64 << 20).read_to_end(&mut rest);
    assert!(rest.len() > FLOOD_TEXT);
}

#[test]
fn a_slow_reader_is_cut_off_as_well() {
    let limits =
        Limits { connections: 1, write_timeout: Duration::from_millis(300), ..Limits::default() };
    let fixture = fixture_with(limits);
    fixture.mock.flood.store(true, Ordering::SeqCst);
    let mut slow = fixture.connect();
    slow.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"watch\"}\n");
    // It keeps asking and never reads: neither requests nor events may pile up anywhere.
    let mut sent = 0;
    while slow
        .0
        .get_mut()
        .write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"status\"}\n")
        .is_ok()
    {
        sent += 1;
        assert!(sent < 10_000_000, "a client that never reads is served for ever");
    }
    fixture.mock.flood.store(false, Ordering::SeqCst);
    fixture.connect_at_last().works();
}

#[test]
fn the_socket_is_private_from_the_first_instant() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    // Without a umask to hide behind. The other tests of this process make nothing that it matters
    // for.
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    let done = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let mut seen = std::collections::BTreeSet::new();
            while !done.load(Ordering::SeqCst) {
                seen.extend(
                    path.symlink_metadata().map(|metadata| metadata.permissions().mode() & 0o7777),
                );
            }
            seen
        });
        for _ in 0..300 {
            let server = Server::start(&path, Arc::new(Mock::default())).unwrap();
            server.stop();
        }
        done.store(true, Ordering::SeqCst);
        looking.join().unwrap()
    });
    rustix::process::umask(umask);
    assert_eq!(Vec::from_iter(seen), [0o600]);
}

#[test]
fn other_users_are_refused_even_if_they_get_in() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can be somebody else");
        return;
    }
    let fixture = fixture();
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap()
    };
    open(fixture.directory.path(), 0o755);
    // A copy, because the build directory may be closed to others.
    let program = fixture.directory.path().join("hotswapctl");
    std::fs::copy(env!("CARGO_BIN_EXE_hotswapctl"), &program).unwrap();
    open(&program, 0o755);
    let as_nobody = || {
        let mut command = Command::new(&program);
        command
            .arg("--control-path")
            .arg(fixture.server.path())
            .arg("status")
            .uid(65534)
            .gid(65534);
        let output = command.current_dir("/").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        text(&output.stderr)
    };
    assert!(as_nobody().contains("you may not use"), "the mode lets others in");
    open(fixture.server.path(), 0o666);
    assert!(as_nobody().contains("(permission_denied)"));
    assert_eq!(fixture.mock.statuses.load(Ordering::SeqCst), 0);
    fixture.connect().works();
}

#[test]
fn a_path_is_taken_from_the_dead_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.metadata().unwrap().file_type().is_socket(), "the remains are there");
    let server = Server::start(&path, Arc::new(Mock::default())).expect("the remains are replaced");
    let inode = path.metadata().unwrap().ino();

    let refused = Server::start(&path, Arc::new(Mock::default())).unwrap_err();
    assert!(matches!(&refused, SocketError::InUse(of) if *of == path), "{refused:?}");
    assert!(refused.to_string().contains("another daemon"), "{refused}");
    assert_eq!(path.metadata().unwrap().ino(), inode, "the living daemon's socket was touched");
    Client::connect(&path).works();
    assert_eq!(server.stop(), 0);
    assert!(!path.exists(), "the socket is left");

    std::fs::write(&path, "precious").unwrap();
    let refused = Server::start(&path, Arc::new(Mock::default())).unwrap_err();
    assert!(matches!(refused, SocketError::NotASocket(_)), "{refused:?}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let nowhere =
        Server::start(&directory.path().join("no/control"), Arc::new(Mock::default())).unwrap_err();
    assert!(matches!(nowhere, SocketError::System { .. }), "{nowhere:?}");
    assert!(nowhere.to_string().contains("No such file"), "{nowhere}");
    let empty = SocketFile::listen(Path::new(""), 0o600).unwrap_err();
    assert!(matches!(empty, SocketError::System { .. }), "{empty:?}");
    let long = SocketFile::listen(&directory.path().join("x".repeat(200)), 0o600).unwrap_err();
    assert!(matches!(long, SocketError::System { .. }), "{long:?}");
}

#[test]
fn a_full_backlog_is_a_living_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let socket = SocketFile::listen(&path, 0o600).unwrap();
    let clients: Vec<UnixStream> = (0..129).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let refused = SocketFile::listen(&path, 0o600).unwrap_err();
    assert!(matches!(refused, SocketError::InUse(_)), "{refused:?}");
    drop((clients, socket));
}

/// Eight that want a path at once; those who got it.
fn at_once(path: &Path) -> Vec<SocketFile> {
    let together = Barrier::new(8);
    thread::scope(|scope| {
        let listen = || {
            together.wait();
            SocketFile::listen(path, 0o600)
        };
        let starting = [(); 8].map(|()| scope.spawn(listen));
        starting.into_iter().filter_map(|one| one.join().unwrap().ok()).collect()
    })
}

#[test]
fn of_daemons_that_start_at_once_one_gets_the_path() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..300 {
        let path = directory.path().join(round.to_string());
        drop(UnixListener::bind(&path).unwrap());
        let won = at_once(&path);
        assert_eq!(won.len(), 1, "round {round}");
        UnixStream::connect(&path).expect("the one that won listens there");
    }
}

#[test]
fn a_new_path_goes_to_one_even_if_the_directory_cannot_be_locked() {
    let directory = tempfile::tempdir().unwrap();
    let locked = std::fs::File::open(directory.path()).unwrap();
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for round in 0..4 {
        let path = directory.path().join(round.to_string());
        let won = at_once(&path);
        assert_eq!(won.len(), 1, "round {round}");
        UnixStream::connect(&path).expect("the one that won listens there");
        std::mem::forget(won);
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 4, "other names are left");
}

#[test]
fn remains_go_to_one_even_if_the_directory_cannot_be_locked() {
    let directory = tempfile::tempdir().unwrap();
    let locked = std::fs::File::open(directory.path()).unwrap();
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for round in 0..6 {
        let path = directory.path().join(round.to_string());
        drop(UnixListener::bind(&path).unwrap());
        let won = at_once(&path);
        assert_eq!(won.len(), 1, "round {round}");
        UnixStream::connect(&path).expect("the one that won listens there");
        won[0].listener().set_nonblocking(true).unwrap();
        // Others may have looked before it came.
        while won[0].listener().accept().is_ok() {}
        UnixStream::connect(&path).unwrap();
        won[0].listener().accept().expect("the one that won has the path");
        std::mem::forget(won);
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 6, "other names are left");
}

#[test]
fn a_socket_that_can_be_seen_can_be_connected_to() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..3000 {
        let path = directory.path().join(round.to_string());
        let together = Barrier::new(2);
        thread::scope(|scope| {
            let looking = scope.spawn(|| {
                together.wait();
                let deadline = Instant::now() + Duration::from_secs(20);
                while path.symlink_metadata().is_err() {
                    assert!(Instant::now() < deadline, "round {round}: it never comes");
                }
                UnixStream::connect(&path)
            });
            together.wait();
            let socket = SocketFile::listen(&path, 0o600).unwrap();
            looking.join().unwrap().unwrap_or_else(|error| panic!("round {round}: {error}"));
            drop(socket);
        });
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "something is left");
}

#[test]
fn what_was_left_between_the_two_names_goes_with_the_next_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for dead in
        ["socket~abcdefgh", "socket~22223333", "socket~short", "socket~abcdefg8", "other~abcdefgh"]
    {
        drop(UnixListener::bind(path(dead)).unwrap());
    }
    let _living = UnixListener::bind(path("socket~zzzzzzzz")).unwrap();
    std::fs::write(path("socket~aaaaaaaa"), "precious").unwrap();
    let socket = SocketFile::listen(&path("socket"), 0o600).unwrap();
    let mut names: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    let stay = [
        "other~abcdefgh",
        "socket",
        "socket~aaaaaaaa",
        "socket~abcdefg8",
        "socket~short",
        "socket~zzzzzzzz",
    ];
    assert_eq!(names, stay);
    drop(socket);
}

#[test]
fn every_path_that_fits_a_socket_can_be_listened_on() {
    let directory = tempfile::tempdir().unwrap();
    let long = directory.path().as_os_str().len() + 1;
    for name in [1, 2, 3, 9, 10, 11, 30] {
        // Directories in between, so that path and name have the length that is wanted.
        let between = directory.path().join("d".repeat(107 - long - 1 - name));
        std::fs::create_dir(&between).unwrap();
        for letter in ["~", "-", "x"] {
            let path = between.join(letter.repeat(name));
            assert_eq!(path.as_os_str().len(), 107);
            for _ in 0..3 {
                let socket = SocketFile::listen(&path, 0o600).unwrap();
                UnixStream::connect(&path).unwrap();
                assert_eq!(std::fs::read_dir(&between).unwrap().count(), 1, "{name}");
                drop(socket);
                drop(UnixListener::bind(&path).unwrap());
            }
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::remove_dir(&between).unwrap();
    }
    let like_a_directory =
        SocketFile::listen(&directory.path().join("socket/"), 0o600).unwrap_err();
    assert!(matches!(like_a_directory, SocketError::System { .. }), "{like_a_directory:?}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn only_our_own_socket_is_removed() {
    let fixture = fixture();
    let path = fixture.server.path().to_owned();
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    fixture.server.stop();
    assert!(path.exists(), "somebody else's socket was removed");
    drop(other);
}

#[test]
fn stopping_ends_idle_and_watching_clients_at_once() {
    let fixture = fixture();
    let mut idle = fixture.connect();
    idle.works();
    let mut watching = fixture.connect();
    watching.call("watch", json!({}));
    let started = Instant::now();
    assert_eq!(fixture.server.stop(), 0);
    assert!(started.elapsed() < Duration::from_millis(700), "{:?}", started.elapsed());
    assert!(idle.receive().is_none());
    assert!(watching.receive().is_none());
}

#[test]
fn stopping_lets_an_answer_out_but_does_not_wait_for_ever() {
    let fixture =
        fixture_with(Limits { stop_patience: Duration::from_millis(500), ..Limits::default() });
    let mut client = fixture.connect();
    client.send(
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"upgrade\",\"params\":{\"name\":\"slow\"}}\n",
    );
    let mut stuck = fixture.connect();
    stuck.send(
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"upgrade\",\"params\":{\"name\":\"stuck\"}}\n",
    );
    eventually("both upgrades", || fixture.mock.upgrades.lock().unwrap().len() == 2);
    let started = Instant::now();
    assert_eq!(fixture.server.stop(), 1, "one operation does not come back");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert_eq!(client.receive().expect("the answer")["result"]["slow"], true);
    assert!(stuck.receive().is_none());
}

#[test]
fn stopping_does_not_wait_for_a_client_that_does_not_read() {
    let fixture =
        fixture_with(Limits { stop_patience: Duration::from_millis(200), ..Limits::default() });
    fixture.mock.flood.store(true, Ordering::SeqCst);
    let mut deaf = fixture.connect();
    deaf.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"watch\"}\n");
    thread::sleep(Duration::from_millis(200));
    let started = Instant::now();
    assert_eq!(fixture.server.stop(), 0);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn hotswapctl_prints_for_people() {
    let fixture = fixture();
    for (args, expected) in [
        (
            &["upgrade", "next"][..],
            "generation 2: ramdisk 1.0.0 -> next 2.0.0 by handover, pause 12 us\n  \
             in us: drain 3, quiesce 1, activate 2\n",
        ),
        (&["status"], "state       serving\ngeneration  1\ndomain      ramdisk 1.0.0\n"),
        (&["history"], "started generation=1\ncommitted generation=2\n"),
        (&["shutdown"], "the daemon is shutting down\n"),
    ] {
        let output = fixture.ctl(args);
        assert_eq!(
            (output.status.code(), text(&output.stdout).as_str()),
            (Some(0), expected),
            "{output:?}"
        );
        assert!(output.stderr.is_empty(), "{output:?}");
    }
    eventually("the shutdown", || fixture.mock.shutdowns.load(Ordering::SeqCst) == 1);
}

#[test]
fn hotswapctl_prints_json_on_one_line() {
    let fixture = fixture();
    for args in [&["--json", "history"][..], &["history", "--json"]] {
        let output = fixture.ctl(args);
        let stdout = text(&output.stdout);
        assert_eq!((output.status.code(), stdout.lines().count()), (Some(0), 1), "{output:?}");
        assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap(), fixture.mock.history());
    }
    let output = fixture.ctl(&["--json", "upgrade", "refused"]);
    assert_eq!(output.status.code(), Some(1));
    let sentence =
        "error: queue 0 has 3 requests in flight; ask for a longer drain (drain_timeout)\n";
    assert_eq!(text(&output.stderr), sentence);
    let error = json!({"code": "drain_timeout", "data": {"in_flight": 3, "queue": 0},
                       "message": "queue 0 has 3 requests in flight; ask for a longer drain"});
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), json!({"error": error}));
    let output = fixture.ctl(&["rollback"]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""));
    assert_eq!(text(&output.stderr), "error: there is no standby (no_standby)\n");
}

#[test]
fn hotswapctl_sends_what_it_was_told() {
    let fixture = fixture();
    let args = [
        "upgrade",
        "./sub/x.so",
        "--param",
        "size=1M",
        "--param",
        "serial=a=b",
        "--mode",
        "handover",
    ];
    fixture.ctl(&[&args[..], &["--drain-timeout-ms", "7", "--no-queue"]].concat());
    let asked = fixture.mock.upgrades.lock().unwrap().pop_front().unwrap();
    let here = fixture.directory.path().canonicalize().unwrap();
    assert_eq!(
        PathBuf::from(&asked.name),
        here.join("sub/x.so"),
        "relative to the client's directory"
    );
    assert_eq!(asked.params.iter().collect::<Vec<_>>(), [("serial", "a=b"), ("size", "1M")]);
    assert_eq!((asked.mode, asked.when_busy), (UpgradeMode::Handover, WhenBusy::Refuse));
    assert_eq!(asked.drain_timeout, Duration::from_millis(7));
    fixture.ctl(&["upgrade", "name"]);
    let asked = fixture.mock.upgrades.lock().unwrap().pop_front().unwrap();
    assert_eq!(
        (asked.name.as_str(), asked.mode, asked.when_busy),
        ("name", UpgradeMode::Auto, WhenBusy::Queue)
    );
    fixture.ctl(&["rollback", "--drain-timeout-ms", "9", "--starved-timeout-ms", "8"]);
    let asked = fixture.mock.rollbacks.lock().unwrap().pop_front().unwrap();
    assert_eq!(
        (asked.drain_timeout, asked.starved_timeout),
        (Duration::from_millis(9), Duration::from_millis(8))
    );
}

#[test]
fn hotswapctl_ends_with_2_for_a_bad_command_line() {
    let fixture = fixture();
    for args in [
        &[][..],
        &["no-such-command"],
        &["upgrade"],
        &["upgrade", ""],
        &["upgrade", "a", "b"],
        &["upgrade", "a", "--mode", "fast"],
        &["upgrade", "a", "--param", "no-equals-sign"],
        &["upgrade", "a", "--param", "x=1", "--param", "x=2"],
        &["upgrade", "a", "--drain-timeout-ms", "soon"],
        &["upgrade", "a", "--drain-timeout-ms", "600001"],
        &["status", "--no-such-flag"],
        &["status", "stray"],
    ] {
        let output = fixture.ctl(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(!output.stderr.is_empty(), "{args:?} is refused without a word");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_hotswapctl")).arg("status").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(fixture.mock.upgrades.lock().unwrap().is_empty());
}

#[test]
fn hotswapctl_says_who_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let run = || {
        let output = Command::new(env!("CARGO_BIN_EXE_hotswapctl"))
            .arg("--control-path")
            .arg(&path)
            .arg("status")
            .output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        text(&output.stderr)
    };
    let nobody = format!("error: no daemon listens on {}; ", path.display());
    assert!(run().starts_with(&nobody), "no socket");
    let listener = UnixListener::bind(&path).unwrap();
    for (answer, expected) in [
        (&b""[..], "(disconnected)"),
        (b"HTTP/1.1 400 Bad Request\r\n", "(bad_reply)"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":9,\"result\":1}\n", "(bad_reply)"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"res", "(disconnected)"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"error\":{\"code\":-5}}\n", "(json_rpc -5)"),
    ] {
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut client = listener.accept().unwrap().0;
                assert!(client.read(&mut [0; 4096]).unwrap() > 0);
                client.write_all(answer).unwrap();
            });
            let sentence = run();
            assert!(sentence.contains(expected), "{expected}: {sentence}");
        });
    }
    drop(listener);
    assert!(run().starts_with(&nobody), "a socket that nobody listens on");
}

#[test]
fn hotswapctl_watches_until_the_daemon_ends() {
    let fixture = fixture();
    let mut child = fixture
        .ctl_command(&["watch"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // It begins at an unknown moment, so things happen until it sees one.
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                fixture.mock.happen(json!({"event": "tick", "code": 1}));
                thread::sleep(Duration::from_millis(5));
            }
        });
        let line = lines.next().unwrap().unwrap();
        done.store(true, Ordering::SeqCst);
        assert!(line.starts_with('#') && line.ends_with(" tick code=1"), "{line}");
    });
    fixture.server.stop();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("(disconnected)"), "{output:?}");
}

#[test]
fn hotswapctl_survives_a_reader_that_leaves() {
    let fixture = fixture();
    fixture.mock.flood.store(true, Ordering::SeqCst);
    let mut child = fixture
        .ctl_command(&["--json", "watch"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&first).unwrap()["sequence"], 1);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
    // A full disk is a failure, though.
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = fixture.ctl_command(&["status"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("(output_failed)"), "{output:?}");
}

#[test]
fn a_name_is_removed_once_and_only_if_it_is_ours() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let first = SocketFile::listen(&path, 0o600).unwrap();
    let name = Arc::clone(first.name());
    drop(first);
    assert!(!path.exists());
    // The first one's inode number may well be the second one's now.
    let second = SocketFile::listen(&path, 0o600).unwrap();
    name.remove();
    assert!(path.exists(), "somebody who is gone has removed another's name");
    let name = Arc::clone(second.name());
    name.remove();
    assert!(!path.exists(), "it can be removed under its owner");
    let third = SocketFile::listen(&path, 0o600).unwrap();
    drop(second);
    assert!(path.exists(), "an owner without a name has removed another's");
    drop(third);
    assert!(!path.exists());
}
