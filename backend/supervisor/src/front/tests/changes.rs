//! Servers that die, stop and come, and programs that are exchanged.

use super::*;

#[test]
fn what_a_dead_server_had_is_settled() {
    let mut stage = Stage::serving();
    let mut upgrade = stage.client_says(&[UPGRADE, HISTORY]);
    let mut server = stage.server();
    let mut status = stage.client_says(&[STATUS]);
    let mut watch = stage.client_says(&[WATCH]);
    let mut history = stage.client_says(&[HISTORY]);
    let servers = vec![stage.server(), stage.server(), stage.server()];
    assert_eq!(server.line().as_deref(), Some(UPGRADE));
    stage.die([vec![server], servers].into_iter().flatten().collect());
    assert_eq!(code(&upgrade.value()), "server_died");
    let state = &status.value()["result"];
    assert_eq!((&state["state"], &state["generation"]), (&json!("recovering"), &json!(7)));
    assert_eq!(watch.value()["result"], json!({"watching": true}));
    assert!(history.line().is_none() && upgrade.line().is_none());
    // The next one is asked what can be asked again, and nothing else.
    stage.bring_up();
    stage.turn();
    let mut asked: Vec<String> = Vec::new();
    while stage.wishes.iter().any(|wish| matches!(wish, Wish::Client(_))) {
        let mut server = stage.server();
        asked.extend(server.line());
        assert!(server.line().is_none());
        if asked.last().is_some_and(|line| line == HISTORY) {
            server.say(r#"{"jsonrpc":"2.0","id":2,"result":[]}"#);
            stage.turn();
        }
    }
    asked.sort();
    assert_eq!(asked, [FRONTS_WATCH, HISTORY, HISTORY]);
    assert_eq!(history.value()["result"], json!([]));
    assert_eq!(upgrade.value()["result"], json!([]));
}

#[test]
fn a_request_waits_for_a_server_and_not_for_ever() {
    let mut stage = Stage::new(Limits::default());
    let mut client = stage.client_says(&[UPGRADE]);
    assert!(client.line().is_none());
    stage.bring_up();
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(UPGRADE));
    stage.die(vec![server]);
    assert_eq!(code(&client.value()), "server_died");
    stage.front.shared.patience = Duration::from_millis(30);
    client.say(UPGRADE);
    stage.turn();
    assert!(client.line().is_none());
    let due = stage.front.deadline().unwrap();
    assert!(due <= Instant::now() + Duration::from_millis(30));
    stage.turn_for(Duration::from_millis(60));
    assert_eq!(code(&client.value()), "no_server");
    assert_eq!(stage.front.deadline(), None);
}

#[test]
fn a_watch_goes_on_over_a_death() {
    let event = |name: &str, number: u64| {
        json!({"jsonrpc": "2.0", "method": "event", "params": {"event": name, "sequence": number}})
            .to_string()
    };
    let told = |client: &mut End| {
        let params = client.value()["params"].take();
        (params["event"].as_str().unwrap().to_owned(), params["sequence"].as_u64().unwrap())
    };
    let mut stage = Stage::serving();
    let mut client = stage.client_says(&[WATCH]);
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(WATCH));
    server.say(r#"{"jsonrpc":"2.0","id":3,"result":{"watching":true}}"#);
    server.say(&event("started", 40));
    stage.turn();
    assert_eq!(client.value()["result"], json!({"watching": true}));
    assert_eq!(told(&mut client), ("started".into(), 40));
    // Its last words are heard.
    server.say(&event("faulted", 41));
    stage.die(vec![server]);
    stage.front.event("server_died", json!({"status": "signal 11"}));
    assert_eq!(told(&mut client), ("faulted".into(), 41));
    let died = client.value()["params"].take();
    assert_eq!((&died["event"], &died["sequence"]), (&json!("server_died"), &json!(42)));
    assert_eq!(died["status"], "signal 11");
    assert!(died["time_ms"].is_u64());
    // Another server counts from one, and the client does not see it.
    stage.bring_up();
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(FRONTS_WATCH));
    server.say(r#"{"jsonrpc":"2.0","id":"front","result":{"watching":true}}"#);
    server.say(&event("connected", 1));
    stage.turn();
    assert_eq!(told(&mut client), ("connected".into(), 43));
    // What it has missed is a gap, as with one server.
    server.say(&event("started", 3));
    stage.turn();
    assert_eq!(told(&mut client), ("started".into(), 45));
    // It is served beside.
    client.say(HISTORY);
    stage.turn();
    assert_eq!(server.line().as_deref(), Some(HISTORY));
    // One that has not asked for it hears nothing.
    let mut other = stage.client();
    stage.front.event("exchanged", Value::Null);
    assert_eq!(told(&mut client), ("exchanged".into(), 46));
    assert!(other.line().is_none());
}

#[test]
fn a_server_that_is_about_to_be_stopped_gets_nothing_new() {
    let mut stage = Stage::serving();
    let mut first = stage.client_says(&[UPGRADE]);
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(UPGRADE));
    stage.front.hold();
    stage.front.tell(facts(Phase::Upgrading));
    let mut second = stage.client_says(&[UPGRADE]);
    let mut status = stage.client_says(&[STATUS]);
    assert_eq!(status.value()["result"]["state"], "upgrading");
    server.say(r#"{"jsonrpc":"2.0","id":1,"result":"of the old"}"#);
    stage.turn();
    assert_eq!(first.value()["result"], "of the old");
    assert!(stage.wishes.is_empty() && second.line().is_none());
    // It has resumed: the same streams serve.
    first.say(HISTORY);
    stage.turn();
    assert!(server.line().is_none());
    stage.front.server_up();
    stage.turn();
    assert_eq!(server.line().as_deref(), Some(HISTORY));
    let asked = [stage.server().line().unwrap(), stage.server().line().unwrap()];
    assert!(asked.contains(&UPGRADE.to_owned()), "{asked:?}");
}

/// An exchange may wait longer for requests in flight than a client waits for an answer.
#[test]
fn a_request_that_comes_amid_an_exchange_is_told_of_that() {
    let mut stage = Stage::serving();
    stage.front.hold();
    stage.front.shared.patience = Duration::from_millis(30);
    let mut client = stage.client_says(&[UPGRADE]);
    stage.turn_for(Duration::from_millis(60));
    stage.turn();
    assert_eq!(code(&client.value()), "exchange_runs");
    assert!(stage.wishes.is_empty(), "it was not begun");
}

#[test]
fn a_stream_that_the_server_closes_is_made_anew() {
    let mut stage = Stage::serving();
    let mut client = stage.client_says(&[HISTORY]);
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(HISTORY));
    server.say(r#"{"jsonrpc":"2.0","id":2,"result":1}"#);
    server.say(r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"idle"}}"#);
    drop(server);
    stage.turn();
    assert_eq!(client.value()["result"], 1);
    client.say(HISTORY);
    // Not at once: it may be about to be found dead.
    stage.turn_for(Duration::from_millis(20));
    assert!(client.line().is_none() && stage.wishes.is_empty());
    stage.turn_for(Duration::from_millis(200));
    assert_eq!(stage.server().line().as_deref(), Some(HISTORY));
}

#[test]
fn the_end_is_wished_for_if_no_server_can_hear_of_it() {
    let mut stage = Stage::new(Limits::default());
    let shutdown = r#"{"jsonrpc":"2.0","id":5,"method":"shutdown"}"#;
    let mut client = stage.client_says(&[shutdown]);
    assert_eq!(client.value()["result"], json!({"shutting_down": true}));
    assert!(matches!(stage.wishes.pop(), Some(Wish::Shutdown)));
    // One that dies of it, or before it, is the same.
    stage.bring_up();
    client.say(shutdown);
    stage.turn();
    let mut server = stage.server();
    assert_eq!(server.line().as_deref(), Some(shutdown));
    stage.die(vec![server]);
    assert_eq!(client.value()["result"], json!({"shutting_down": true}));
    assert!(matches!(stage.wishes.pop(), Some(Wish::Shutdown)));
}

#[test]
fn an_exchanged_program_goes_on_in_the_middle_of_everything() {
    let mut stage = Stage::serving();
    let mut half = stage.client();
    half.stream.write_all(&HISTORY.as_bytes()[..20]).unwrap();
    let mut watch = stage.client_says(&[WATCH]);
    let mut watched = stage.server();
    watched.say(r#"{"jsonrpc":"2.0","id":3,"result":{"watching":true}}"#);
    let mut asking = stage.client_says(&[DAEMON, HISTORY]);
    let Some(Wish::UpgradeDaemon(ticket, _)) = stage.wishes.pop() else { panic!("no wish") };
    let mut out = stage.client_says(&[UPGRADE]);
    let mut server = stage.server();
    stage.reexec();
    stage.turn();
    let next = stage.front.shared.ticket();
    assert!(next > ticket);
    half.stream.write_all(&HISTORY.as_bytes()[20..]).unwrap();
    half.say("");
    stage.turn();
    assert_eq!(stage.server().line().as_deref(), Some(HISTORY));
    stage.front.event("exchanged", Value::Null);
    assert!(watch.line().unwrap().contains("watching"));
    assert!(watch.line().unwrap().contains("exchanged"));
    assert!(asking.line().is_none());
    stage.front.answer(ticket, Ok(json!("done")));
    stage.turn();
    assert_eq!(asking.value()["result"], "done");
    assert_eq!(stage.server().line().as_deref(), Some(HISTORY));
    assert_eq!(server.line().as_deref(), Some(UPGRADE));
    server.say(r#"{"jsonrpc":"2.0","id":1,"result":1}"#);
    stage.turn();
    assert_eq!(out.value()["result"], 1);
    // It has its name still.
    let path = stage.path.clone();
    drop(stage.front);
    assert!(!path.exists());
}

/// A module runs there, and a daemon that is exchanged for a program of its own is the module's.
#[test]
fn a_server_of_the_daemon_may_not_command() {
    let own = vec![std::process::id()];
    let mut stage = Stage::serving();
    let assert_refused = |mut client: End| {
        assert_eq!(code(&client.value()), "permission_denied");
        assert_eq!(client.line().as_deref(), Some("end"));
    };
    stage.front.servers_are(own.clone(), false);
    assert_refused(stage.client());
    // Nor one that ends before it is accepted.
    let connects = |stage: &Stage| End::new(UnixStream::connect(&stage.path).unwrap());
    let waiting = connects(&stage);
    stage.front.servers_are(Vec::new(), true);
    stage.turn();
    assert_refused(waiting);
    // Then its number may be another's.
    let mut other = stage.client();
    assert_eq!(other.line(), None);
    // Nor while the program is exchanged.
    stage.front.servers_are(own, false);
    let waiting = connects(&stage);
    stage.reexec();
    stage.front.servers_are(Vec::new(), true);
    stage.turn();
    assert_refused(waiting);
}

/// What waits while none can be accepted may be a server's that has ended.
#[test]
fn a_server_that_has_ended_is_not_forgotten_while_accepting_rests() {
    let mut stage = Stage::serving();
    stage.front.servers_are(vec![std::process::id()], false);
    stage.front.accept_again = Some(Instant::now() + Duration::from_secs(3600));
    let mut waiting = End::new(UnixStream::connect(&stage.path).unwrap());
    stage.front.servers_are(Vec::new(), false);
    stage.front.accept_again = None;
    stage.turn();
    assert_eq!(code(&waiting.value()), "permission_denied");
}
