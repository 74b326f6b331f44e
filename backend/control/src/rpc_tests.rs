use super::*;
use crate::messages::{UpgradeMode, WhenBusy};
use domain_abi::Params;
use std::time::Duration;

fn method(line: &str) -> Method {
    parse(line.as_bytes()).unwrap().method.unwrap()
}

#[test]
fn each_method_is_read_with_and_without_a_device() {
    for (method, action) in [
        ("status", Action::Status),
        ("history", Action::History),
        ("watch", Action::Watch),
        ("shutdown", Action::Shutdown),
    ] {
        let line = |rest: &str| format!(r#"{{"jsonrpc":"2.0","method":"{method}"{rest}}}"#);
        let read = method_of(&line(""));
        assert_eq!(read, Ok(Method { device: None, action }), "{method}");
        let read = method_of(&line(r#","params":{"device":"0"}"#)).unwrap();
        assert_eq!(read.device.as_deref(), Some("0"), "{method}");
        for bad in [r#"{"device":null}"#, r#"{"device":0}"#, r#"{"devise":"0"}"#, r#"["0"]"#] {
            let refused = method_of(&line(&format!(r#","params":{bad}"#))).unwrap_err();
            assert_eq!(refused.code, "invalid_params", "{method} {bad}");
        }
    }
    let upgrade = r#"{"jsonrpc":"2.0","method":"upgrade","params":{"name":"a","device":"b"}}"#;
    assert_eq!(method(upgrade).device.as_deref(), Some("b"));
    let daemon = r#"{"jsonrpc":"2.0","method":"upgrade_daemon","params":{"device":"b"}}"#;
    assert_eq!(method(daemon).device.as_deref(), Some("b"));
    let rollback = r#"{"jsonrpc":"2.0","method":"rollback","params":{"device":"b"}}"#;
    assert_eq!(method(rollback).device.as_deref(), Some("b"));
    let resize = r#"{"jsonrpc":"2.0","method":"resize","params":{"size":512,"device":"b"}}"#;
    let request = ResizeRequest { size: 512, when_busy: WhenBusy::Queue };
    let expected = Method { device: Some("b".into()), action: Action::Resize(request) };
    assert_eq!(method(resize), expected);
    let check = r#"{"jsonrpc":"2.0","method":"check","params":{"name":"a","device":"b"}}"#;
    let checked = method(check);
    assert!(matches!(&checked.action, Action::Check(request) if request.name == "a"));
    assert_eq!(checked.device.as_deref(), Some("b"));
    let limit =
        r#"{"jsonrpc":"2.0","method":"limit","params":{"iops":5,"bandwidth":0,"device":"b"}}"#;
    let request = LimitRequest { iops: Some(5), bandwidth: Some(0), ..LimitRequest::default() };
    let expected = Method { device: Some("b".into()), action: Action::Limit(request) };
    assert_eq!(method(limit), expected);
    for bad in
        [r#"{"iops":-1}"#, r#"{"iops":"1"}"#, r#"{"iops":null}"#, r#"{"off":1}"#, r#"{"rate":1}"#]
    {
        let line = format!(r#"{{"jsonrpc":"2.0","method":"limit","params":{bad}}}"#);
        assert_eq!(method_of(&line).unwrap_err().code, "invalid_params", "{bad}");
    }
    for bad in ["{}", r#"{"size":0}"#, r#"{"size":-1}"#, r#"{"size":"1M"}"#, r#"{"size":null}"#] {
        let line = format!(r#"{{"jsonrpc":"2.0","method":"resize","params":{bad}}}"#);
        assert_eq!(method_of(&line).unwrap_err().code, "invalid_params", "{bad}");
    }
}

fn method_of(line: &str) -> Result<Method, RpcError> {
    parse(line.as_bytes()).unwrap().method
}

#[test]
fn an_upgrade_with_everything() {
    let line = r#"{"jsonrpc":"2.0","id":1,"method":"upgrade","params":{"name":"./x.so","params":{"size":"1M"},
        "mode":"handover","drain_timeout_ms":0,"starved_timeout_ms":3,"when_busy":"refuse"}}"#;
    let expected = UpgradeRequest {
        name: "./x.so".into(),
        params: Params::from_pairs(["size=1M"]).unwrap(),
        mode: UpgradeMode::Handover,
        drain_timeout: Duration::ZERO,
        starved_timeout: Duration::from_millis(3),
        when_busy: WhenBusy::Refuse,
        canary: None,
    };
    assert_eq!(method(line), Method { device: None, action: Action::Upgrade(expected) });
}

#[test]
fn defaults() {
    let upgrade = method(r#"{"jsonrpc":"2.0","method":"upgrade","params":{"name":"a"}}"#);
    let Action::Upgrade(upgrade) = upgrade.action else {
        panic!("not an upgrade");
    };
    assert_eq!((upgrade.mode, upgrade.when_busy), (UpgradeMode::Auto, WhenBusy::Queue));
    assert_eq!(upgrade.drain_timeout, Duration::from_millis(500));
    assert_eq!(upgrade.starved_timeout, Duration::from_secs(10));
    let (drain_timeout, starved_timeout) = (upgrade.drain_timeout, upgrade.starved_timeout);
    let rollback = RollbackRequest { drain_timeout, starved_timeout, when_busy: WhenBusy::Queue };
    assert_eq!(
        method(r#"{"jsonrpc":"2.0","method":"rollback"}"#).action,
        Action::Rollback(rollback)
    );
}

#[test]
fn strict_reading_gives_what_serde_json_gives() {
    let text =
        r#"{"a":[1,-2,3.5,null,true,"\u00e9\n"],"b":{"c":{}},"d":18446744073709551615,"e":1e300}"#;
    assert_eq!(
        parse_strictly(text.as_bytes()).unwrap(),
        serde_json::from_str::<Value>(text).unwrap()
    );
}

#[test]
fn the_code_of_an_error_cannot_be_overwritten_by_its_data() {
    let error = OperationError {
        code: "busy",
        message: "x".into(),
        data: Some(json!({"code": 1, "queue": 2})),
    };
    assert_eq!(
        reply(1.into(), Err(error.into()))["error"]["data"],
        json!({"code": "busy", "queue": 2})
    );
    let error = OperationError { code: "busy", message: "x".into(), data: Some(json!([1])) };
    assert_eq!(
        reply(1.into(), Err(error.into()))["error"]["data"],
        json!({"code": "busy", "detail": [1]})
    );
}
