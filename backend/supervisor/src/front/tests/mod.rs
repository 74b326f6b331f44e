//! The front between clients and servers that are made up.

use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;

use control::messages::Part;
use rustix::event::{PollFd, Timespec, poll};
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::reexec::{Written, read};
use crate::slots::Packing;
use crate::store::StoreFacts;

mod changes;

const UPGRADE: &str = r#"{"jsonrpc":"2.0","id":1,"method":"upgrade","params":{"name":"a"}}"#;
const STATUS: &str = r#"{ "jsonrpc":"2.0", "id":"s", "method":"status" }"#;
const HISTORY: &str = r#"{"jsonrpc":"2.0","id":2,"method":"history"}"#;
const WATCH: &str = r#"{"jsonrpc":"2.0","id":3,"method":"watch"}"#;
const DAEMON: &str =
    r#"{"jsonrpc":"2.0","id":4,"method":"upgrade_daemon","params":{"only":"server"}}"#;
const FRONTS_WATCH: &str = r#"{"jsonrpc":"2.0","id":"front","method":"watch"}"#;

/// One end of a stream of lines, of a client or of a server.
struct End {
    stream: UnixStream,
    bytes: Vec<u8>,
}

impl End {
    fn new(stream: UnixStream) -> Self {
        stream.set_nonblocking(true).unwrap();
        Self { stream, bytes: Vec::new() }
    }

    fn say(&mut self, line: &str) {
        self.stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// The next line. None: there is none now. `end`: the stream has ended.
    fn line(&mut self) -> Option<String> {
        let mut chunk = [0; 1 << 16];
        loop {
            if let Some(at) = self.bytes.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=at).collect();
                return Some(String::from_utf8(line[..at].to_vec()).unwrap());
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Some("end".to_owned()),
                Ok(read) => self.bytes.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(_) => return Some("end".to_owned()),
            }
        }
    }

    fn value(&mut self) -> Value {
        serde_json::from_str(&self.line().expect("a line")).unwrap()
    }
}

/// A front, and everything around it.
struct Stage {
    front: Front,
    path: PathBuf,
    _directory: TempDir,
    wishes: Vec<Wish>,
}

fn facts(phase: Phase) -> Facts {
    Facts {
        phase,
        why: None,
        supervisor: SupervisorFacts {
            pid: 1,
            version: "1".into(),
            since: 0,
            store: StoreFacts::default(),
        },
        server: ServerFacts {
            pid: Some(2),
            version: "1".into(),
            since: 0,
            deaths: 0,
            recoveries: 0,
            quarantined: 0,
            stuck: Vec::new(),
        },
    }
}

impl Stage {
    fn new(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let mut front = Front::new(SocketFile::listen(&path, 0o600).unwrap(), limits).unwrap();
        front.tell(facts(Phase::Serving));
        Self { front, path, _directory: directory, wishes: Vec::new() }
    }

    /// One with a server that has told its state.
    fn serving() -> Self {
        let mut stage = Self::new(Limits::default());
        stage.bring_up();
        stage
    }

    fn bring_up(&mut self) {
        self.front.server_up();
        let mut observed = self.server();
        assert!(observed.line().unwrap().contains("status"));
        observed
            .say(r#"{"jsonrpc":"2.0","id":"front","result":{"state":"serving","generation":7}}"#);
        self.turn();
        assert_eq!(observed.line().as_deref(), Some("end"));
    }

    /// The loop, until there is nothing to do.
    fn turn(&mut self) {
        for _ in 0..200 {
            let (ready, _) = self.look(Duration::ZERO);
            self.wishes.extend(self.front.wishes());
            let is_due = self.front.deadline().is_some_and(|due| due <= Instant::now());
            if !ready && !is_due {
                return;
            }
        }
        panic!("the loop finds no rest");
    }

    /// One turn of the loop.
    fn look(&mut self, wait: Duration) -> (bool, usize) {
        let polled = self.front.polled();
        let mut fds: Vec<_> =
            polled.iter().map(|it| PollFd::from_borrowed_fd(it.fd, it.interest)).collect();
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::try_from(wait.as_nanos()).unwrap() };
        poll(&mut fds, Some(&wait)).unwrap();
        let ready = fds.iter().zip(&polled).filter(|(fd, _)| !fd.revents().is_empty());
        let ready: Vec<_> = ready.map(|(fd, it)| (it.token, fd.revents())).collect();
        for &(token, what) in &ready {
            self.front.ready(token, what);
        }
        self.front.tick();
        (!ready.is_empty(), ready.len())
    }

    /// The loop, for some time.
    fn turn_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.look(Duration::from_millis(1));
            self.wishes.extend(self.front.wishes());
        }
    }

    fn client(&mut self) -> End {
        let client = End::new(UnixStream::connect(&self.path).unwrap());
        self.turn();
        client
    }

    /// A client that has said `lines`.
    fn client_says(&mut self, lines: &[&str]) -> End {
        let mut client = self.client();
        lines.iter().for_each(|line| client.say(line));
        self.turn();
        client
    }

    /// The stream that the server has been given.
    fn server(&mut self) -> End {
        self.wishes.extend(self.front.wishes());
        let is_stream = |wish: &Wish| matches!(wish, Wish::Client(_));
        let at = self.wishes.iter().position(is_stream).expect("a stream for the server");
        let Wish::Client(stream) = self.wishes.remove(at) else { unreachable!() };
        End::new(stream.into())
    }

    /// The server dies with its streams.
    fn die(&mut self, servers: Vec<End>) {
        drop(servers);
        self.front.tell(facts(Phase::Recovering));
        self.front.server_gone();
        self.turn();
    }

    /// The program is exchanged.
    fn reexec(&mut self) {
        let mut packing = Packing::default();
        let packed = self.front.pack(&mut packing);
        let socket = Written::write(&packed, packing).unwrap().send().unwrap();
        let (packed, mut unpacking) = read::<PackedFront>(socket).unwrap();
        let limits = self.front.shared.limits;
        let next = Front::unpack(packed, limits, &mut unpacking).unwrap();
        // As a program ends that is exchanged: without a word.
        std::mem::forget(std::mem::replace(&mut self.front, next));
    }
}

fn code(answer: &Value) -> &str {
    answer["error"]["data"]["code"].as_str().unwrap_or("no error")
}

#[test]
fn requests_and_answers_go_through_byte_for_byte() {
    let mut stage = Stage::serving();
    let odd = r#"{"params": {"name": "a"},   "method":"upgrade", "id": 1e0, "jsonrpc": "2.0" }"#;
    let odd = odd.replace("1e0", "\"\\u0061\"");
    let unknown = r#"{"jsonrpc":"2.0","id":9,"method":"of a later release","params":{"x":[1]}}"#;
    let mut client = stage.client_says(&[&odd]);
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(odd.as_str()));
    let answer = r#"{"result" : [ ],"id":"a", "jsonrpc":"2.0"}"#;
    server.say(answer);
    stage.turn();
    assert_eq!(client.line().as_deref(), Some(answer));
    client.say(unknown);
    stage.turn();
    assert_eq!(server.line().as_deref(), Some(unknown));
}

#[test]
fn a_status_gets_the_processes() {
    let mut stage = Stage::serving();
    let mut client = stage.client_says(&[STATUS]);
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(STATUS));
    server.say(r#"{"jsonrpc":"2.0","id":"s","result":{"state":"faulted","generation":3}}"#);
    stage.turn();
    let answer = client.value();
    assert_eq!(answer["id"], "s");
    let state = &answer["result"];
    assert_eq!((&state["state"], &state["generation"]), (&json!("faulted"), &json!(3)));
    assert_eq!((&state["supervisor"]["pid"], &state["server"]["pid"]), (&json!(1), &json!(2)));
}

#[test]
fn answers_have_the_order_of_the_requests_whoever_answers() {
    let mut stage = Stage::serving();
    let mut client = stage.client_says(&[UPGRADE, DAEMON, "nonsense", HISTORY]);
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(UPGRADE));
    assert!(stage.wishes.is_empty() && server.line().is_none() && client.line().is_none());
    server.say(r#"{"jsonrpc":"2.0","id":1,"result":1}"#);
    stage.turn();
    // The state may be another one now.
    let mut observed = stage.server();
    assert!(observed.line().unwrap().contains("status"));
    drop(observed);
    assert_eq!(client.value()["result"], 1);
    assert!(server.line().is_none() && client.line().is_none());
    let Some(Wish::UpgradeDaemon(ticket, request)) = stage.wishes.pop() else { panic!("no wish") };
    assert_eq!(request, UpgradeDaemonRequest { path: None, only: Some(Part::Server) });
    stage.front.answer(ticket, Ok(json!({"what": ["server"]})));
    stage.turn();
    assert_eq!(client.value(), json!({"jsonrpc": "2.0", "id": 4, "result": {"what": ["server"]}}));
    assert_eq!(code(&client.value()), "parse_error");
    assert_eq!(server.line().as_deref(), Some(HISTORY));
}

#[test]
fn notifications_are_passed_on_and_nothing_is_awaited() {
    let mut stage = Stage::serving();
    let silent = r#"{"jsonrpc":"2.0","method":"rollback"}"#;
    let daemon = r#"{"jsonrpc":"2.0","method":"upgrade_daemon"}"#;
    let mut client = stage.client_says(&[silent, daemon, HISTORY]);
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(silent));
    assert_eq!(server.line().as_deref(), Some(HISTORY));
    let Some(Wish::UpgradeDaemon(ticket, _)) = stage.wishes.pop() else { panic!("no wish") };
    stage.front.answer(ticket, Ok(json!({})));
    stage.turn();
    assert!(client.line().is_none());
}

#[test]
fn bad_lines_are_answered_without_the_server() {
    let mut stage = Stage::serving();
    let long = "x".repeat((64 << 10) + 1);
    let foreign = DAEMON.replace(r#""only":"server""#, r#""device":"1""#);
    let odd = DAEMON.replace("server", "both");
    let mut client = stage.client_says(&[&long, "", &foreign, &odd]);
    client.stream.write_all(b"half").unwrap();
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    stage.turn();
    let codes: Vec<_> = (0..3).map(|_| code(&client.value()).to_owned()).collect();
    assert_eq!(codes, ["invalid_request", "parse_error", "unknown_device"]);
    // It is the server's method, too, which says what is wrong with it.
    let mut server = stage.server();
    assert_eq!(server.line(), Some(odd));
    server.say(r#"{"jsonrpc":"2.0","id":4,"error":{}}"#);
    stage.turn();
    assert!(client.line().unwrap().contains("error"));
    assert_eq!(code(&client.value()), "parse_error");
    assert_eq!(client.line().as_deref(), Some("end"));
}

#[test]
fn a_client_that_leaves_is_let_go_and_what_it_asked_is_done() {
    let mut stage = Stage::serving();
    let client = stage.client_says(&[UPGRADE, r#"{"jsonrpc":"2.0","method":"rollback"}"#]);
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(UPGRADE));
    drop(client);
    stage.turn();
    assert_eq!(stage.front.clients.len(), 1);
    server.say(r#"{"jsonrpc":"2.0","id":1,"result":1}"#);
    stage.turn();
    assert_eq!(stage.front.clients.len(), 0);
    assert_eq!(server.line().as_deref(), Some("end"));
    // One that watches and has ended its side only still listens.
    let mut client = stage.client_says(&[WATCH]);
    stage.wishes.clear();
    stage.die(Vec::new());
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    stage.turn();
    stage.front.event("x", Value::Null);
    assert!(client.line().unwrap().contains("watching"));
    assert!(client.line().unwrap().contains("\"x\""));
    drop(client);
    stage.turn();
    assert_eq!(stage.front.clients.len(), 0);
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_holds_up_no_other() {
    let limits = Limits { write_timeout: Duration::from_millis(50), ..Limits::default() };
    let mut stage = Stage::new(limits);
    stage.bring_up();
    let _deaf = stage.client_says(&[HISTORY]);
    let mut server = stage.server();
    server.stream.set_nonblocking(false).unwrap();
    let long = format!(r#"{{"jsonrpc":"2.0","id":2,"result":"{}"}}"#, "x".repeat(4 << 20));
    let writer =
        std::thread::spawn(move || server.stream.write_all(format!("{long}\n").as_bytes()));
    let mut other = stage.client_says(&[HISTORY]);
    let mut server = stage.server();
    stage.turn_for(Duration::from_millis(20));
    server.say(r#"{"jsonrpc":"2.0","id":2,"result":1}"#);
    stage.turn_for(Duration::from_millis(10));
    assert_eq!(other.value()["result"], 1);
    stage.turn_for(Duration::from_millis(400));
    writer.join().unwrap().unwrap();
    stage.turn_for(Duration::from_millis(200));
    assert_eq!(stage.front.clients.len(), 1);
}

#[test]
fn a_client_that_floods_leaves_the_others_their_turn() {
    let mut stage = Stage::new(Limits::default());
    let mut client = stage.client();
    client.stream.write_all("x\n".repeat(1000).as_bytes()).unwrap();
    let (_, ready) = stage.look(Duration::from_millis(100));
    assert_eq!(ready, 1);
    assert!(stage.front.deadline().is_some_and(|due| due <= Instant::now()));
    let mut answers = 0;
    while answers < 1000 {
        stage.turn();
        let heard: Vec<_> = std::iter::from_fn(|| client.line()).collect();
        assert!(!heard.is_empty() && heard.iter().all(|line| line.contains("parse_error")));
        answers += heard.len();
    }
    assert_eq!((answers, stage.front.deadline()), (1000, None));
}

#[test]
fn places_are_bounded_and_idle_clients_make_room() {
    let limits = Limits { connections: 2, idle: Duration::from_secs(3600), ..Limits::default() };
    let mut stage = Stage::new(limits);
    let mut watching = stage.client_says(&[WATCH]);
    // Half a line does not keep its place.
    let mut idle = stage.client();
    idle.stream.write_all(b"{\"json").unwrap();
    stage.turn();
    let mut third = stage.client();
    assert_eq!(code(&third.value()), "too_many_connections");
    stage.front.shared.limits.idle = Duration::ZERO;
    let mut fourth = stage.client_says(&[STATUS]);
    assert_eq!(fourth.value()["result"]["state"], "recovering");
    assert_eq!(code(&idle.value()), "too_many_connections");
    assert_eq!(idle.line().as_deref(), Some("end"));
    assert!(watching.line().unwrap().contains("watching"));
    assert!(watching.line().is_none());
}

/// A script that gives up asking does not keep others out: what it has asked is carried out.
#[test]
fn a_client_that_has_gone_before_its_answer_makes_room() {
    let limits = Limits { connections: 1, ..Limits::default() };
    let mut stage = Stage::new(limits);
    stage.bring_up();
    let client = stage.client_says(&[UPGRADE]);
    let mut server = stage.server();
    let mut second = stage.client();
    assert_eq!(code(&second.value()), "too_many_connections");
    drop(client);
    stage.turn();
    let mut third = stage.client_says(&[HISTORY]);
    assert_eq!(stage.server().line().as_deref(), Some(HISTORY));
    assert!(third.line().is_none());
    assert_eq!(server.line().as_deref(), Some(UPGRADE));
    // What nobody has begun is not begun for one that has gone.
    let mut stage = Stage::new(limits);
    let client = stage.client_says(&[UPGRADE]);
    drop(client);
    stage.turn();
    let mut second = stage.client_says(&[STATUS]);
    assert_eq!(second.value()["result"]["state"], "recovering");
    stage.front.server_up();
    let mut observed = stage.server();
    assert!(observed.line().unwrap().contains("status"));
    stage.turn();
    assert!(!stage.wishes.iter().any(|wish| matches!(wish, Wish::Client(_))));
}

/// It has read nothing, so it has begun nothing.
#[test]
fn a_server_without_a_place_for_a_stream_is_asked_again() {
    let mut stage = Stage::serving();
    let mut client = stage.client_says(&[UPGRADE]);
    let mut server = stage.server();
    server.say(r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"none"}}"#);
    drop(server);
    stage.turn_for(Duration::from_millis(300));
    assert!(client.line().is_none());
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(UPGRADE));
    server.say(r#"{"jsonrpc":"2.0","id":1,"result":1}"#);
    stage.turn();
    assert_eq!(client.value()["result"], 1);
    // Not for ever.
    stage.front.shared.patience = Duration::ZERO;
    client.say(UPGRADE);
    stage.turn();
    assert_eq!(server.line().as_deref(), Some(UPGRADE));
    server.say(
        r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"no","data":{"code":"x"}}}"#,
    );
    stage.turn();
    let answer = client.value();
    assert_eq!((&answer["id"], code(&answer)), (&json!(1), "x"));
}
