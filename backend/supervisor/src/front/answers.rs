//! What the front says itself, and what it adds to what the server says.

use std::time::{SystemTime, UNIX_EPOCH};

use control::Code;
use control::rpc::{Action, Call, RpcError, reply};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::facts::{Facts, Phase};

/// A line of the front's own that begins a watch; its answer is for the front.
pub(super) const WATCH: &[u8] = br#"{"jsonrpc":"2.0","id":"front","method":"watch"}"#;
/// One that asks for the state.
pub(super) const STATUS: &[u8] = br#"{"jsonrpc":"2.0","id":"front","method":"status"}"#;

/// What the front has to know of a request that it passes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// Its answer gets members; it can be answered without a server.
    Status,
    /// It can be asked again.
    History,
    /// It is to go on with each server.
    Watch,
    /// It ends the supervisor as well.
    Shutdown,
    /// It brings a device back that was given up. It is not asked twice either.
    Upgrade,
    /// Anything else. It is not asked twice: it may have been carried out.
    Other,
}

impl Kind {
    /// Whether it is about what has happened, or will.
    pub(super) const fn is_told(self) -> bool {
        matches!(self, Self::History | Self::Watch)
    }

    pub(super) const fn of(call: &Call) -> Self {
        let Ok(method) = &call.method else { return Self::Other };
        match method.action {
            Action::Status => Self::Status,
            Action::History => Self::History,
            Action::Watch => Self::Watch,
            Action::Shutdown => Self::Shutdown,
            Action::Upgrade(_) => Self::Upgrade,
            _ => Self::Other,
        }
    }
}

pub(super) fn server_died() -> RpcError {
    RpcError::new(
        Code::ServerDied,
        "the server process ended while it had this request, which may have been carried out; \
         `status` tells",
    )
}

pub(super) fn no_server() -> RpcError {
    RpcError::new(
        Code::NoServer,
        "there is no server process to carry this out, and it was not begun; `status` and the log \
         tell why",
    )
}

pub(super) fn exchange_runs() -> RpcError {
    RpcError::new(
        Code::ExchangeRuns,
        "the server is being exchanged, and this was not begun; try again",
    )
}

/// A line that answers the request `id`.
pub(super) fn line(id: &Value, answer: Result<Value, RpcError>) -> Vec<u8> {
    reply(id.clone(), answer).to_string().into_bytes()
}

/// A line of the server as the answer to the request `id`.
pub(super) fn as_answer_to(line: &[u8], id: Option<Value>) -> Vec<u8> {
    let mut members: Map<String, Value> = serde_json::from_slice(line).unwrap_or_default();
    members.insert("id".to_owned(), id.unwrap_or_default());
    Value::Object(members).to_string().into_bytes()
}

/// Adds to a state of the device what the supervisor knows.
fn add(members: &mut Map<String, Value>, facts: &Facts) {
    // Plain structures of strings and numbers.
    members.insert("supervisor".into(), json!(facts.supervisor));
    members.insert("server".into(), json!(facts.server));
}

/// What the server said of the device, and what the supervisor knows. What is no such state stays
/// as it is.
pub(super) fn status(mut state: Value, facts: Option<&Facts>) -> Value {
    if let (Some(members), Some(facts)) = (state.as_object_mut(), facts) {
        add(members, facts);
    }
    state
}

/// The device's state as the supervisor knows it; `last` is what the server said last.
pub(super) fn own_status(last: Option<&Value>, facts: Option<&Facts>) -> Value {
    let mut members = last.and_then(Value::as_object).cloned().unwrap_or_default();
    let phase = facts.map_or(Phase::Recovering, |facts| facts.phase);
    let state = match phase {
        // The loop says that a server serves a little before, or after, the front is told.
        Phase::Serving | Phase::Recovering => "recovering",
        Phase::Upgrading => "upgrading",
        Phase::Faulted => "faulted",
    };
    members.insert("state".into(), state.into());
    if let Some(facts) = facts {
        if let Some(why) = &facts.why {
            members.insert("fault".into(), why.as_str().into());
        }
        add(&mut members, facts);
    }
    Value::Object(members)
}

/// An event of the supervisor's.
pub(super) fn event(name: &str, members: Value) -> Value {
    let mut event = match members {
        Value::Object(members) => members,
        Value::Null => Map::new(),
        other => Map::from_iter([("detail".to_owned(), other)]),
    };
    event.insert("time_ms".into(), time_ms());
    event.insert("event".into(), name.into());
    Value::Object(event)
}

/// Milliseconds since 1970.
pub(super) fn time_ms() -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX).into()
}

/// What the server has said.
#[derive(Debug, PartialEq)]
pub(super) enum Said {
    /// The parameters of an event, and its number.
    Event(Map<String, Value>, u64),
    /// An answer to the request with that id; what it says if it is no error.
    Answer(Option<Value>, Value),
}

/// Reads a line of the server.
pub(super) fn read(line: &[u8]) -> Option<Said> {
    let Ok(Value::Object(mut members)) = serde_json::from_slice(line) else { return None };
    if members.get("method").and_then(Value::as_str) == Some("event") {
        let Some(Value::Object(mut event)) = members.remove("params") else { return None };
        let number = event.remove("sequence")?.as_u64()?;
        return Some(Said::Event(event, number));
    }
    let id = members.remove("id")?;
    Some(Said::Answer(members.remove("result"), id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::{ServerFacts, SupervisorFacts};
    use crate::store::StoreFacts;

    fn facts(phase: Phase) -> Facts {
        Facts {
            phase,
            why: (phase != Phase::Serving).then(|| "it has died".to_owned()),
            supervisor: SupervisorFacts {
                pid: 1,
                version: "0.1.0".into(),
                since: 5,
                store: StoreFacts { entries: 4, lost: Some("x".into()), ..StoreFacts::default() },
            },
            server: ServerFacts {
                pid: Some(2),
                version: "0.2.0".into(),
                since: 6,
                deaths: 3,
                recoveries: 2,
                quarantined: 1,
                stuck: vec![3],
            },
        }
    }

    #[test]
    fn a_state_gets_the_processes_and_keeps_the_rest() {
        let told =
            status(json!({"state": "serving", "generation": 4}), Some(&facts(Phase::Serving)));
        let server = json!({
            "pid": 2, "version": "0.2.0", "since": 6, "deaths": 3, "recoveries": 2, "quarantined": 1,
            "stuck": [3],
        });
        let expected = json!({
            "state": "serving", "generation": 4, "server": server,
            "supervisor": {
                "pid": 1, "version": "0.1.0", "since": 5,
                "store": {
                    "state": "none", "entries": 4, "limit": null, "why": null, "lost": "x",
                },
            },
        });
        assert_eq!(told, expected);
        assert_eq!(status(json!("odd"), Some(&facts(Phase::Serving))), json!("odd"));
    }

    #[test]
    fn without_a_server_the_last_state_is_told_as_what_it_is_now() {
        let last = json!({"state": "serving", "generation": 4, "fault": null});
        let why = json!("it has died");
        for (phase, state, fault) in [
            (Phase::Serving, "recovering", &Value::Null),
            (Phase::Recovering, "recovering", &why),
            (Phase::Upgrading, "upgrading", &why),
            (Phase::Faulted, "faulted", &why),
        ] {
            let told = own_status(Some(&last), Some(&facts(phase)));
            assert_eq!((&told["state"], &told["generation"]), (&state.into(), &4.into()));
            assert_eq!(&told["fault"], fault);
            assert_eq!(told["server"]["deaths"], 3);
        }
        assert_eq!(own_status(None, None), json!({"state": "recovering"}));
    }

    #[test]
    fn what_a_server_says_is_told_apart() {
        let event = br#"{"jsonrpc":"2.0","method":"event","params":{"event":"x","sequence":7}}"#;
        let members = Map::from_iter([("event".to_owned(), json!("x"))]);
        assert_eq!(read(event), Some(Said::Event(members, 7)));
        let answer = br#"{"jsonrpc":"2.0","id":null,"result":{"a":1}}"#;
        assert_eq!(read(answer), Some(Said::Answer(Some(json!({"a": 1})), Value::Null)));
        let error = br#"{"jsonrpc":"2.0","id":1,"error":{}}"#;
        assert_eq!(read(error), Some(Said::Answer(None, json!(1))));
        for odd in [&b"x"[..], b"[]", b"{}", br#"{"method":"event","params":{}}"#] {
            assert_eq!(read(odd), None);
        }
    }
}
