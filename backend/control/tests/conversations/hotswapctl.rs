//! `hotswapctl`, as it is run, against operations that are made up.

use crate::common::*;
use control::Operations;
use control::messages::{UpgradeMode, WhenBusy};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

#[test]
fn a_size_is_sent_in_bytes() {
    let fixture = fixture();
    for (text, size) in [("1M", 1 << 20), ("4096", 4096), ("2T", 2 << 40)] {
        let output = fixture.ctl(&["resize", text]);
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(said, format!("capacity 1024 -> {size} bytes\n"));
        let asked = fixture.mock.resizes.lock().unwrap().pop_front().unwrap();
        assert_eq!((asked.size, asked.when_busy), (size, WhenBusy::Queue));
    }
    let output = fixture.ctl(&["resize", "--no-queue", "512"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said, "error: 512 bytes are fewer (resize_shrinks)\n");
    let asked = fixture.mock.resizes.lock().unwrap().pop_front().unwrap();
    assert_eq!(asked.when_busy, WhenBusy::Refuse);
    for bad in [&["resize"][..], &["resize", "0"], &["resize", "1.5G"], &["resize", "1M", "2M"]] {
        assert_eq!(fixture.ctl(bad).status.code(), Some(2), "{bad:?}");
    }
    assert!(fixture.mock.resizes.lock().unwrap().is_empty());
}

#[test]
fn a_check_and_a_limit_are_asked_for_and_answered() {
    let fixture = fixture();
    for (args, status, said) in [
        (&["check", "next"][..], 0, "would be accepted\n"),
        (&["limit"], 0, "iops=- off=no\n"),
        (&["limit", "--iops", "7", "--off"], 0, "iops=7 off=yes\n"),
        (&["check", "refused"], 1, ""),
        (&["check"], 2, ""),
        (&["check", "a", "--drain-timeout-ms", "1"], 2, ""),
        (&["limit", "--iops", "1M"], 2, ""),
        (&["limit", "--bandwidth", "much"], 2, ""),
    ] {
        let output = fixture.ctl(args);
        let told = (output.status.code(), text(&output.stdout));
        assert_eq!(told, (Some(status), said.to_owned()), "{args:?}: {output:?}");
    }
    let refused = text(&fixture.ctl(&["check", "refused", "--mode", "swap"]).stderr);
    assert_eq!(refused, "error: these cannot serve side by side (swap_not_possible)\n");
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
    let no_daemon = format!("error: no daemon listens on {}; ", path.display());
    assert!(run().starts_with(&no_daemon), "no socket");
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
    assert!(run().starts_with(&no_daemon), "a socket that refuses connections");
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
