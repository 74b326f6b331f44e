//! The daemon's answers for people.
//!
//! Everything here takes any JSON whatever: a member that is missing or of another type is left out
//! or shown as it is, because the daemon may be of another version, and an answer that came must
//! never be lost on the way to the screen. What modules and files are called comes from outside, so
//! control characters never reach the terminal.
//!
//! Deliberately absent: colours, and any number that the daemon did not send.

use std::fmt::Write;

use serde_json::{Map, Value};

/// The phases of an upgrade in their order.
const PHASES: [&str; 8] =
    ["verify", "load", "prepare", "drain", "quiesce", "activate", "grace", "retire"];
/// The phases of an exchange of the daemon in their order.
const DAEMON_PHASES: [&str; 4] = ["start", "prepare", "stop", "replay"];
/// Members of `status` that are shown first, in this order; the others follow by name.
const STATUS_FIRST: [&str; 10] = [
    "state",
    "generation",
    "domain",
    "standby",
    "connected",
    "capacity",
    "features",
    "supervisor",
    "server",
    "upgrades",
];
/// What a queue's columns are, in this order; others follow by name.
const QUEUE_FIRST: [&str; 6] =
    ["index", "in_flight", "oldest_age_us", "requests", "errors", "parks"];

/// An upgrade's or a rollback's reply: what happened, and below it how long each phase took.
pub fn upgrade(reply: &Value) -> String {
    let mut text = with_times(sentence(reply), &reply["phases_us"], &PHASES);
    if let Some(canary) = reply.get("canary") {
        let _ = write!(text, "\n  canary: {}", shown(canary));
    }
    text
}

/// The reply to `upgrade-daemon`: what was replaced by what, and below it how long it took.
pub fn upgrade_daemon(reply: &Value) -> String {
    let mut text = match reply.get("what") {
        Some(what) => shown(what),
        None => "done".to_owned(),
    };
    if let (Some(from), Some(to)) = (reply.get("from"), reply.get("to")) {
        let _ = write!(text, ": {} -> {}", domain(from), domain(to));
    }
    if let Some(pause) = reply["phases_us"].get("pause") {
        text += &format!(", pause {} us", number(pause));
    }
    with_times(text, &reply["phases_us"], &DAEMON_PHASES)
}

/// How long each phase of a change took, as far as it is known.
pub fn phases(change: &Value) -> Option<String> {
    let text = with_times(String::new(), &change["phases_us"], &PHASES);
    (!text.is_empty()).then(|| text.trim_start_matches('\n').to_owned())
}

/// `text`, and below it how long each of `names` took, as far as it is known.
fn with_times(mut text: String, phases: &Value, names: &[&str]) -> String {
    let times: Vec<String> = names
        .iter()
        .filter_map(|phase| Some(format!("{phase} {}", number(phases.get(*phase)?))))
        .collect();
    if !times.is_empty() {
        let _ = write!(text, "\n  in us: {}", times.join(", "));
    }
    text
}

/// `generation 2: ramdisk 1.0.0 -> ramdisk 2.0.0 by handover, pause 12 us`, as far as it is known.
fn sentence(reply: &Value) -> String {
    let mut text = match reply.get("generation") {
        Some(generation) => format!("generation {}: ", number(generation)),
        None => String::new(),
    };
    match (reply.get("from").map(domain), reply.get("to").map(domain)) {
        (Some(from), Some(to)) => text += &format!("{from} -> {to}"),
        (None, Some(to)) => text += &to,
        (Some(from), None) => text += &format!("from {from}"),
        (None, None) => text += "done",
    }
    if let Some(mode) = reply.get("mode") {
        text += &format!(" by {}", shown(mode));
    }
    if let Some(pause) = reply["phases_us"].get("pause") {
        text += &format!(", pause {} us", number(pause));
    }
    text
}

/// The reply to `check`: what would happen, and below it how long it took to know.
pub fn check(reply: &Value) -> String {
    let mut text = "would be accepted".to_owned();
    if let (Some(from), Some(to)) = (reply.get("from"), reply.get("to")) {
        let _ = write!(text, ": {} -> {}", domain(from), domain(to));
    }
    if let Some(mode) = reply.get("mode") {
        text += &format!(" by {}", shown(mode));
    }
    if reply.get("can_roll_back") == Some(&Value::Bool(false)) {
        text += "; a rollback would not be possible";
    }
    if let Some(left) = reply.get("left") {
        let _ = write!(text, "\n  not ended: {}", shown(left));
    }
    with_times(text, &reply["phases_us"], &["verify", "load", "prepare", "retire"])
}

/// The reply to `limit`: what holds now.
pub fn limit(reply: &Value) -> String {
    match &reply["limits"] {
        Value::Null => "no limits".to_owned(),
        limits => shown(limits),
    }
}

/// The reply to `resize`: how large the disk is now, and was.
pub fn resize(reply: &Value) -> String {
    let (before, now) = (&reply["capacity_before"], &reply["capacity"]);
    match (before, now) {
        (_, Value::Null) => "done".to_owned(),
        (Value::Null, now) => format!("capacity {} bytes", number(now)),
        (before, now) if before == now => format!("capacity {} bytes, as before", number(now)),
        (before, now) => format!("capacity {} -> {} bytes", number(before), number(now)),
    }
}

/// The state of the device: a column of names, a column of values, a table of queues.
pub fn status(status: &Value) -> String {
    let Some(members) = status.as_object() else { return shown(status) };
    let mut rows: Vec<(&str, String)> = Vec::new();
    for (key, value) in ordered(members, &STATUS_FIRST) {
        match (key, value) {
            ("queues", Value::Array(_)) => {}
            ("domain" | "standby", Value::Object(of)) => {
                rows.push((key, domain(value)));
                rows.extend(
                    ["sha256", "path", "params"]
                        .iter()
                        .filter_map(|key| Some((*key, of.get(*key)?)))
                        .map(|(key, value)| match key {
                            "sha256" => ("  sha256", shown(value)),
                            "path" => ("  path", shown(value)),
                            _ => ("  params", shown(value)),
                        }),
                );
            }
            ("capacity", Value::Number(_)) => rows.push((key, format!("{} bytes", number(value)))),
            _ => rows.push((key, shown(value))),
        }
    }
    let width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    let mut lines: Vec<String> = rows
        .iter()
        .map(|(key, value)| format!("{:width$}  {value}", clean(key)).trim_end().to_owned())
        .collect();
    if let Some(Value::Array(queues)) = members.get("queues") {
        lines.extend(table(queues));
    }
    lines.join("\n")
}

/// One line per queue under a line of names, numbers to the right.
fn table(queues: &[Value]) -> Vec<String> {
    let mut columns: Vec<&str> = Vec::new();
    for members in queues.iter().filter_map(Value::as_object) {
        for (key, _) in ordered(members, &QUEUE_FIRST) {
            if !columns.contains(&key) {
                columns.push(key);
            }
        }
    }
    let heads =
        columns.iter().map(|key| clean(if *key == "index" { "queue" } else { key })).collect();
    let mut rows: Vec<Vec<String>> = vec![heads];
    rows.extend(queues.iter().map(|queue| {
        columns.iter().map(|key| queue.get(*key).map_or("-".into(), shown)).collect()
    }));
    let widths: Vec<usize> = (0..columns.len())
        .map(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0))
        .collect();
    rows.iter()
        .map(|row| {
            row.iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{cell:>width$}"))
                .collect::<Vec<_>>()
                .join("  ")
        })
        .collect()
}

/// One line per entry, oldest first; nothing for an empty history.
pub fn history(history: &Value) -> String {
    let entries = match history {
        Value::Array(entries) => Some(entries),
        Value::Object(members) => members.values().find_map(Value::as_array),
        _ => None,
    };
    match entries {
        Some(entries) => entries.iter().map(event).collect::<Vec<_>>().join("\n"),
        None => shown(history),
    }
}

/// One line for an event or an entry of the history: when, what, and what else is known about it.
pub fn event(event: &Value) -> String {
    let Some(members) = event.as_object() else { return shown(event) };
    let mut told = vec!["sequence", "time_ms", "error", "pause_ns"];
    let sequence = members.get("sequence").map(|value| format!("#{}", number(value)));
    let mut words: Vec<String> =
        sequence.into_iter().chain(members.get("time_ms").map(time)).collect();
    for key in ["event", "change", "target", "outcome"] {
        if let Some(value) = members.get(key) {
            told.push(key);
            words.push(shown(value));
        }
    }
    if members.contains_key("to") || members.contains_key("from") {
        told.extend(["generation", "from", "to", "mode"]);
        let timed = event["phases_us"].get("pause").is_some();
        told.extend(timed.then_some("phases_us"));
        words.push(sentence(event));
    }
    if let Some(error) = members.get("error") {
        words.push(match (&error["message"], &error["code"]) {
            (Value::String(message), Value::String(code)) => {
                format!("{} ({})", clean(message), clean(code))
            }
            _ => shown(error),
        });
    }
    for (key, value) in ordered(members, &["generation", "state"]) {
        if !told.contains(&key) {
            words.push(format!("{}={}", clean(key), shown(value)));
        }
    }
    words.join(" ")
}

/// Milliseconds since 1970 as a time of day in UTC.
fn time(value: &Value) -> String {
    let time = value.as_i64().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.map_or_else(|| shown(value), |time| format!("{time:.3}"))
}

/// A domain's name and version.
pub fn domain(value: &Value) -> String {
    match (value.get("name"), value.get("version")) {
        (Some(name), Some(version)) => format!("{} {}", shown(name), shown(version)),
        (Some(name), None) => shown(name),
        (None, _) => shown(value),
    }
}

/// The members named in `first`, then the others.
fn ordered<'a>(members: &'a Map<String, Value>, first: &[&str]) -> Vec<(&'a str, &'a Value)> {
    let place = |key: &str| first.iter().position(|name| *name == key).unwrap_or(first.len());
    let mut all: Vec<_> = members.iter().map(|(key, value)| (key.as_str(), value)).collect();
    all.sort_by_key(|(key, _)| place(key));
    all
}

/// Any value in a line, without JSON's marks where it can be read without them.
pub fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => clean(text),
        Value::Number(_) => number(value),
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(", "),
        Value::Object(of) if of.contains_key("name") => domain(value),
        Value::Object(members) => {
            let members: Vec<_> = members
                .iter()
                .map(|(key, value)| format!("{}={}", clean(key), shown(value)))
                .collect();
            members.join(" ")
        }
    }
}

/// A number; a fraction with one digit, which is all that a microsecond needs.
fn number(value: &Value) -> String {
    match value {
        Value::Number(number) if number.is_f64() => {
            let text = format!("{:.1}", number.as_f64().unwrap_or_default());
            text.strip_suffix(".0").unwrap_or(&text).to_owned()
        }
        Value::Number(number) => number.to_string(),
        other => shown(other),
    }
}

/// A text without what a terminal would obey.
pub fn clean(text: &str) -> String {
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_upgrade_is_told_in_two_lines() {
        let reply = json!({
            "generation": 2, "mode": "handover",
            "from": {"name": "ramdisk", "version": "1.0.0", "sha256": "aa"},
            "to": {"name": "ramdisk", "version": "2.0.0", "sha256": "bb"},
            "phases_us": {"drain": 3, "quiesce": 1.04, "activate": 2.25, "pause": 12, "retire": 0.0},
        });
        let text = "generation 2: ramdisk 1.0.0 -> ramdisk 2.0.0 by handover, pause 12 us\n  \
                    in us: drain 3, quiesce 1, activate 2.2, retire 0";
        assert_eq!(upgrade(&reply), text);
    }

    #[test]
    fn an_exchange_of_the_daemon_is_told_in_two_lines() {
        let reply = json!({
            "what": ["supervisor", "server"],
            "from": {"name": "vhost-hotswap", "version": "0.1.0"},
            "to": {"name": "vhost-hotswap", "version": "0.2.0"},
            "phases_us": {"start": 3000, "prepare": 41, "stop": 12, "replay": 900.25, "pause": 950},
        });
        let text = "supervisor, server: vhost-hotswap 0.1.0 -> vhost-hotswap 0.2.0, pause 950 us\n  \
                    in us: start 3000, prepare 41, stop 12, replay 900.2";
        assert_eq!(upgrade_daemon(&reply), text);
        assert_eq!(upgrade_daemon(&json!({})), "done");
        assert_eq!(upgrade_daemon(&json!({"what": ["server"]})), "server");
    }

    #[test]
    fn a_new_size_is_told_beside_the_old_one() {
        let reply = json!({"generation": 1, "capacity_before": 512, "capacity": 1024});
        assert_eq!(resize(&reply), "capacity 512 -> 1024 bytes");
        let reply = json!({"generation": 1, "capacity_before": 1024, "capacity": 1024});
        assert_eq!(resize(&reply), "capacity 1024 bytes, as before");
        assert_eq!(resize(&json!({"capacity": 7})), "capacity 7 bytes");
    }

    #[test]
    fn a_check_says_what_would_happen() {
        let reply = json!({
            "accepted": true, "mode": "swap", "can_roll_back": true,
            "from": {"name": "a", "version": "1"}, "to": {"name": "a", "version": "2"},
            "phases_us": {"verify": 1, "load": 2, "prepare": 3, "drain": 0, "retire": 4},
        });
        let text = "would be accepted: a 1 -> a 2 by swap\n  in us: verify 1, load 2, prepare 3, \
                    retire 4";
        assert_eq!(check(&reply), text);
        let reply = json!({"can_roll_back": false, "left": "a thread"});
        let text = "would be accepted; a rollback would not be possible\n  not ended: a thread";
        assert_eq!(check(&reply), text);
        assert_eq!(limit(&json!({"limits": null})), "no limits");
        assert_eq!(limit(&json!({"limits": {"iops": 7, "bandwidth": null}})), "bandwidth=- iops=7");
    }

    #[test]
    fn an_entry_says_when_and_what_and_why() {
        let refused = json!({
            "sequence": 4, "event": "ended", "change": "upgrade", "outcome": "refused", "time_ms": 1_795_393_819_672_i64,
            "error": {"code": "busy", "message": "another one runs"},
        });
        assert_eq!(
            event(&refused),
            "#4 2026-11-23T00:30:19.672Z ended upgrade refused another one runs (busy)"
        );
        assert_eq!(event(&json!({"time_ms": i64::MAX, "event": "x"})), "9223372036854775807 x");
    }

    #[test]
    fn whatever_comes_is_shown() {
        let odd = [
            json!(null),
            json!([]),
            json!({}),
            json!("x"),
            json!([1, {"from": 1}]),
            json!({"queues": [1, {}]}),
        ];
        for value in odd {
            upgrade(&value);
            upgrade_daemon(&value);
            resize(&value);
            check(&value);
            limit(&value);
            status(&value);
            history(&value);
            event(&value);
        }
        assert_eq!(upgrade(&json!({})), "done");
        assert_eq!(upgrade(&json!({"to": {"name": "a"}})), "a");
        assert_eq!(status(&json!({"news": {"a": 1}})), "news  a=1");
        assert_eq!(history(&json!({"entries": [{"at": 1}, {"at": 2}]})), "at=1\nat=2");
    }

    #[test]
    fn a_status_is_aligned() {
        let reply = json!({
            "generation": 3, "state": "serving", "standby": null, "connected": true, "capacity": 1024,
            "domain": {"name": "ramdisk", "version": "1.0.0", "sha256": "ab", "params": {"size": "1M"}},
            "queues": [{"index": 0, "in_flight": 12, "errors": 0}, {"index": 1, "in_flight": 3}],
        });
        let lines = [
            "state       serving",
            "generation  3",
            "domain      ramdisk 1.0.0",
            "  sha256    ab",
            "  params    size=1M",
            "standby     -",
            "connected   yes",
            "capacity    1024 bytes",
            "queue  in_flight  errors",
            "    0         12       0",
            "    1          3       -",
        ];
        assert_eq!(status(&reply), lines.join("\n"));
    }

    #[test]
    fn an_event_is_one_line() {
        let told = event(
            &json!({"sequence": 7, "event": "refused", "code": "busy", "message": "later\nplease"}),
        );
        assert_eq!(told, "#7 refused code=busy message=later\\nplease");
        let told = event(
            &json!({"at": "12:00", "generation": 2, "from": {"name": "a"}, "to": {"name": "b"}}),
        );
        assert_eq!(told, "generation 2: a -> b at=12:00");
    }

    #[test]
    fn a_terminal_is_not_commanded() {
        assert_eq!(shown(&json!("\u{1b}[2J\u{9b}ä")), "\\u{1b}[2J\\u{9b}ä");
    }
}
