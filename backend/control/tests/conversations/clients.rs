//! Many clients, silent, deaf, flooded and foreign ones, and the end of all of them.

use crate::common::*;
use control::Limits;
use serde_json::json;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// Longer than a busy machine takes for what happens at once.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn of_a_hundred_connections_32_are_served_and_the_others_told() {
    // None of them is idle for so long that it gives its place up.
    let fixture = fixture_with(Limits { idle: PATIENCE, ..Limits::default() });
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
    // A client that watches is not idle, and one that was idle for less time stays.
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
fn a_client_that_does_not_read_is_cut_off_and_disturbs_no_other() {
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
fn other_users_are_refused_even_if_they_get_in() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can be another user");
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
fn stopping_ends_idle_and_watching_clients_at_once() {
    let fixture = fixture_with(Limits { stop_patience: PATIENCE, ..Limits::default() });
    let mut idle = fixture.connect();
    idle.works();
    let mut watching = fixture.connect();
    watching.call("watch", json!({}));
    let started = Instant::now();
    assert_eq!(fixture.server.stop(), 0);
    assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
    assert!(idle.receive().is_none());
    assert!(watching.receive().is_none());
}

#[test]
fn stopping_lets_an_answer_out_but_does_not_wait_for_ever() {
    // Long beside what the slow one takes, short beside what the stuck one does.
    let fixture =
        fixture_with(Limits { stop_patience: Duration::from_secs(3), ..Limits::default() });
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
    assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
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
    assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
}
