//! What a client can say, right or wrong, and what it is answered.

use crate::common::*;
use control::messages::{RollbackRequest, UpgradeMode, WhenBusy};
use serde_json::json;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::Duration;

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
fn a_request_for_another_device_is_refused_and_not_carried_out() {
    let fixture = fixture();
    let mut client = fixture.connect();
    for (method, mut params) in [
        ("status", json!({})),
        ("history", json!({})),
        ("watch", json!({})),
        ("shutdown", json!({})),
        ("upgrade", json!({"name": "next"})),
        ("rollback", json!({})),
    ] {
        params["device"] = json!("vdb");
        let refused = client.call(method, params);
        assert_error(&refused, -32000, "unknown_device", "there is no device `vdb`");
    }
    let long = client.call("status", json!({"device": "x\n".repeat(1000)}));
    assert_error(&long, -32000, "unknown_device", "\\n");
    assert!(long.to_string().len() < 1000, "{long}");
    assert_eq!(fixture.mock.statuses.load(Ordering::SeqCst), 0, "a status was asked for");
    assert_eq!(fixture.mock.shutdowns.load(Ordering::SeqCst), 0, "it was shut down");
    assert!(fixture.mock.upgrades.lock().unwrap().is_empty(), "an upgrade was executed");
    assert!(fixture.mock.rollbacks.lock().unwrap().is_empty(), "a rollback was executed");
    fixture.mock.happen(json!({"event": "not watched"}));
    client.works();
    // The one that there is can be named, and still is the one if it is not.
    let reply = client.call("upgrade", json!({"name": "next", "device": "0"}));
    assert_eq!(reply["result"]["to"]["name"], "next", "{reply}");
    client.call("shutdown", json!({"device": "0"}));
    eventually("the shutdown", || fixture.mock.shutdowns.load(Ordering::SeqCst) == 1);
}
