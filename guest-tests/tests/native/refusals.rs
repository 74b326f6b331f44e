//! Everything that must be refused: bad modules, bad command lines, bad JSON.
//!
//! Every refusal has a sentence and a stable code, changes nothing, and disturbs no request: a
//! verified load runs through all of it, and the generation is at the end what it was at the start.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_tests::daemon::{Control, Daemon, module, module_with_wrong_abi, run_ctl, run_daemon};
use guest_tests::stamp::{Load, LoadOptions, run_load};
use serde_json::{Value, json};

fn ramdisk() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"])
}

/// Runs `trials` under a verified load and checks that nothing has come of them.
fn without_consequences(daemon: &Daemon, trials: impl FnOnce()) {
    let before = daemon.status();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    load.wait_for(100);
    trials();
    load.wait_for(100);
    load.stop().assert_clean();
    let after = daemon.status();
    for key in ["generation", "state", "domain", "standby", "capacity", "resident_modules"] {
        assert_eq!(before[key], after[key], "`{key}` has changed");
    }
    let committed = |status: &Value| status["upgrades"]["committed"].clone();
    assert_eq!(committed(&before), committed(&after));
    daemon.call(&["upgrade", "ramdisk_v2"]);
    run_load(
        daemon.socket(),
        &LoadOptions::new(2, 16).on_unknown_content(),
        Duration::from_millis(200),
    )
    .assert_clean();
}

/// Some shared object that is no domain and is on every Linux: the C library's mathematics, or its
/// like.
fn foreign_library() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").expect("our own mappings");
    let libraries = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    let mut libraries = libraries.filter(|path| path.contains(".so") && !path.contains("ld-"));
    PathBuf::from(libraries.next().expect("this test is linked dynamically"))
}

/// Writes bad modules into `directory`: what is wrong, and where it is.
fn bad_modules(directory: &Path) -> Vec<(String, PathBuf)> {
    let good = fs::read(module("ramdisk")).expect("the ramdisk module");
    let mut all: Vec<(String, PathBuf)> = Vec::new();
    let mut add = |name: &str, bytes: &[u8]| {
        let path = directory.join(format!("lib{}.so", name.replace(' ', "_")));
        fs::write(&path, bytes).expect("a bad module");
        all.push((name.to_owned(), path));
    };
    add("an empty file", b"");
    add("a text", b"#!/bin/sh\necho I am no module\n");
    for length in [1, 16, 63, 64, 100, 4096, good.len() / 2, good.len() - 1] {
        add(&format!("cut at {length}"), &good[..length]);
    }
    let mut random: u64 = 88_172_645_463_325_252;
    let noise = std::iter::repeat_with(|| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as u8
    });
    let mut noisy = good[..16].to_vec();
    noisy.extend(noise.take(20_000));
    add("noise behind an ELF ident", &noisy);
    let patched = |at: usize, bytes: &[u8]| {
        let mut copy = good.clone();
        copy[at..at + bytes.len()].copy_from_slice(bytes);
        copy
    };
    // Offsets in Elf64_Ehdr: e_ident[4] class, [5] byte order, 16 e_type, 18 e_machine, 32 e_phoff,
    // 40 e_shoff.
    add("a 32 bit module", &patched(4, &[1]));
    add("a big-endian module", &patched(5, &[2]));
    add("an executable", &patched(16, &2_u16.to_le_bytes()));
    add("a module for another machine", &patched(18, &0x28_u16.to_le_bytes()));
    add("segments behind the end", &patched(32, &u64::MAX.to_le_bytes()));
    add("sections behind the end", &patched(40, &(u64::MAX - 4096).to_le_bytes()));
    all.push(("a module of a future ABI".into(), module_with_wrong_abi(directory)));
    all.push(("a library that is no domain".into(), foreign_library()));
    all.push(("a missing file".into(), directory.join("libnothing.so")));
    all.push(("a directory".into(), directory.to_owned()));
    let endless = PathBuf::from("/dev/zero");
    all.push(("a file without end".into(), endless));
    all
}

#[test]
fn bad_modules_are_refused_before_anything_is_paused() {
    let daemon = ramdisk();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let modules = bad_modules(directory.path());
    without_consequences(&daemon, || {
        for (what, path) in &modules {
            let name = path.to_str().expect("UTF-8");
            let sentence = daemon.refuse(&["upgrade", name]);
            assert!(sentence.len() > 10, "{what}: `{sentence}` says nothing");
            let error = daemon.rpc().request("upgrade", json!({"name": name})).expect_err(what);
            assert!(!error.name().is_empty(), "{what}: no stable code in {error:?}");
            println!("{what}: {} ({sentence})", error.name());
        }
        let unknown = daemon.refuse(&["upgrade", "no_such_domain"]);
        assert!(unknown.contains("no_such_domain"), "the sentence does not name it: {unknown}");
    });
}

#[test]
fn an_unreadable_module_is_refused() {
    if rustix::process::geteuid().is_root() {
        println!("skipped: root can read everything");
        return;
    }
    let daemon = ramdisk();
    let path = daemon.directory().join("libsecret.so");
    fs::copy(module("ramdisk"), &path).expect("a copy");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).expect("no permissions");
    let sentence = daemon.refuse(&["upgrade", path.to_str().expect("UTF-8")]);
    assert!(sentence.to_lowercase().contains("permission"), "{sentence}");
}

#[test]
fn a_domain_that_cannot_take_over_is_refused() {
    let daemon = ramdisk();
    without_consequences(&daemon, || {
        let upgrade =
            |name: &str, params: Value| ("upgrade", json!({"name": name, "params": params}));
        for ((method, params), code) in [
            (upgrade("faulty", json!({"fault": "prepare:fail"})), "prepare_failed"),
            (upgrade("faulty", json!({"fault": "prepare:panic"})), "prepare_panicked"),
            (upgrade("empty", json!({})), "schema_not_accepted"),
            (upgrade("ramdisk", json!({"size": "32M"})), "prepare_failed"),
            (("upgrade", json!({"name": "ramdisk_v2", "mode": "swap"})), "swap_not_possible"),
            (upgrade("ramdisk", json!({"colour": "blue"})), "bad_parameter"),
            (upgrade("ramdisk", json!({"size": "plenty"})), "prepare_failed"),
            (("rollback", json!({})), "no_standby"),
        ] {
            let error = daemon.rpc().request(method, params.clone()).expect_err(code);
            assert_eq!(error.name(), code, "{method} {params}: {error:?}");
        }
    });
}

#[test]
fn bad_command_lines_of_the_daemon_end_with_status_2() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("vhost.sock");
    let socket = socket.to_str().expect("UTF-8");
    for args in [
        &[][..],
        &["--no-such-flag"],
        &["--socket-path"],
        &["--socket-path", socket, "--queues", "0"],
        &["--socket-path", socket, "--queues", "many"],
        &["--socket-path", socket, "--queues", "100000"],
        &["--socket-path", socket, "--queue-size", "100"],
        &["--socket-path", socket, "--queue-size", "0"],
        &["--socket-path", socket, "--queue-size", "65536"],
        &["--socket-path", socket, "--param", "no-equals-sign"],
        &["--socket-path", socket, "--fd", "3"],
        &["--socket-path", socket, "--poll-us", "-1"],
        &["--socket-path", socket, "--worker-cpus", "1-"],
        &["--socket-path", socket, "stray"],
    ] {
        let output = run_daemon(args);
        assert_eq!(output.status, 2, "{args:?}: {output:?}");
        assert!(!output.stderr.trim().is_empty(), "{args:?} is refused without a word");
    }
    for args in [
        &["--domain", "no_such_domain"][..],
        &["--param", "size=1Q"],
        &["--param", "size=0"],
        &["--param", "size=1000"],
        &["--param", "size=99999999999999999999"],
        &["--param", "colour=blue"],
        &["--blk-file", "/nonexistent/disk.img"],
        &["--blk-file", "/"],
        &["--domain", "faulty", "--param", "fault=nonsense"],
        &["--control-path", "/nonexistent/directory/control"],
        &["--worker-cpus", "0,1023"],
    ] {
        let output = run_daemon(&[&["--socket-path", socket], args].concat());
        assert!([1, 2].contains(&output.status), "{args:?}: {output:?}");
        assert!(!output.stderr.trim().is_empty(), "{args:?} is refused without a word");
        assert!(!output.stderr.contains("panicked"), "{args:?}: {output:?}");
        assert!(!Path::new(socket).exists(), "{args:?} has left its socket");
    }
    let capabilities = run_daemon(&["--print-capabilities"]);
    assert_eq!(capabilities.status, 0, "{capabilities:?}");
    let capabilities: Value = serde_json::from_str(&capabilities.stdout).expect("JSON");
    assert_eq!(
        capabilities["type"], "block",
        "as the vhost-user backend conventions say: {capabilities}"
    );
}

#[test]
fn bad_command_lines_of_hotswapctl_end_with_status_2_and_a_missing_daemon_with_1() {
    let daemon = ramdisk();
    let control = daemon.control().to_str().expect("UTF-8").to_owned();
    for args in [
        &[][..],
        &["no-such-command"],
        &["upgrade"],
        &["upgrade", "a", "b"],
        &["upgrade", "ramdisk", "--mode", "fast"],
        &["upgrade", "ramdisk", "--param", "no-equals-sign"],
        &["upgrade", "ramdisk", "--drain-timeout-ms", "soon"],
        &["status", "--no-such-flag"],
    ] {
        let output = daemon.ctl(args);
        assert_eq!(output.status, 2, "{args:?}: {output:?}");
        assert!(!output.stderr.trim().is_empty(), "{args:?} is refused without a word");
    }
    assert_eq!(run_ctl(&["status"]).status, 2, "without a control path");
    let output = run_ctl(&["--control-path", "/nonexistent/control", "status"]);
    assert_eq!(output.status, 1, "{output:?}");
    assert!(output.stderr.contains("/nonexistent/control"), "{output:?}");
    assert_eq!(run_ctl(&["--control-path", &control, "status"]).status, 0);
    assert_eq!(daemon.status()["generation"], 1);
}

/// Sends one line and returns the numeric code of the error that comes back.
fn code_of(daemon: &Daemon, line: &[u8]) -> (i64, Value) {
    let mut control = daemon.rpc();
    control.send_raw(&[line, b"\n"].concat()).expect("sent");
    let shown = String::from_utf8_lossy(&line[..line.len().min(100)]).into_owned();
    let reply = control.receive().unwrap_or_else(|e| panic!("{shown}: {e}"));
    let reply = reply.unwrap_or_else(|| panic!("{shown}: the daemon hung up"));
    assert_eq!(reply["jsonrpc"], "2.0", "{shown}: {reply}");
    assert!(
        reply["error"]["message"].as_str().is_some_and(|text| !text.is_empty()),
        "{shown}: {reply}"
    );
    let code =
        reply["error"]["code"].as_i64().unwrap_or_else(|| panic!("{shown}: no code in {reply}"));
    // The connection is still good.
    assert!(control.request("status", json!({})).is_ok(), "{shown}: the connection is spoilt");
    (code, reply)
}

const PARSE_ERROR: i64 = -32700;
const INVALID_REQUEST: i64 = -32600;
const METHOD_NOT_FOUND: i64 = -32601;
const INVALID_PARAMS: i64 = -32602;

#[test]
fn bad_requests_get_the_codes_of_json_rpc() {
    let daemon = ramdisk();
    let deep = [vec![b'['; 10_000], vec![b']'; 10_000]].concat();
    let call = |method: &str, params: Value| {
        json!({"jsonrpc": "2.0", "id": 7, "method": method, "params": params})
            .to_string()
            .into_bytes()
    };
    without_consequences(&daemon, || {
        for (line, expected) in [
            (b"{".to_vec(), &[PARSE_ERROR][..]),
            (b"hello".to_vec(), &[PARSE_ERROR]),
            (
                b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": \"status\"} x".to_vec(),
                &[PARSE_ERROR],
            ),
            (b"\xff\xfe{}".to_vec(), &[PARSE_ERROR]),
            (
                b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": \"st\0tus\"}".to_vec(),
                &[PARSE_ERROR],
            ),
            (deep, &[PARSE_ERROR]),
            (b"{}".to_vec(), &[INVALID_REQUEST]),
            (b"17".to_vec(), &[INVALID_REQUEST]),
            (b"null".to_vec(), &[INVALID_REQUEST]),
            (b"[]".to_vec(), &[INVALID_REQUEST]),
            (
                b"[{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": \"status\"}]".to_vec(),
                &[INVALID_REQUEST],
            ),
            (
                b"{\"jsonrpc\": \"1.0\", \"id\": 1, \"method\": \"status\"}".to_vec(),
                &[INVALID_REQUEST],
            ),
            (b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": 17}".to_vec(), &[INVALID_REQUEST]),
            (
                b"{\"jsonrpc\": \"2.0\", \"id\": {}, \"method\": \"status\"}".to_vec(),
                &[INVALID_REQUEST],
            ),
            (b"{\"jsonrpc\": \"2.0\", \"id\": 1}".to_vec(), &[INVALID_REQUEST]),
            (call("reboot", json!({})), &[METHOD_NOT_FOUND]),
            (call("", json!({})), &[METHOD_NOT_FOUND]),
            (call("upgrade", json!({})), &[INVALID_PARAMS]),
            (call("upgrade", json!("ramdisk")), &[INVALID_PARAMS, INVALID_REQUEST]),
            (call("upgrade", json!({"name": 17})), &[INVALID_PARAMS]),
            (call("upgrade", json!({"name": "ramdisk", "mode": "fast"})), &[INVALID_PARAMS]),
            (call("upgrade", json!({"name": "ramdisk", "params": ["size=1M"]})), &[INVALID_PARAMS]),
            (call("upgrade", json!({"name": "ramdisk", "params": {"size": 5}})), &[INVALID_PARAMS]),
            (
                call("upgrade", json!({"name": "ramdisk", "drain_timeout_ms": -1})),
                &[INVALID_PARAMS],
            ),
            (
                call("upgrade", json!({"name": "ramdisk", "drain_timeout_ms": "1"})),
                &[INVALID_PARAMS],
            ),
            (call("upgrade", json!({"name": "ramdisk", "colour": "blue"})), &[INVALID_PARAMS]),
        ] {
            let (code, reply) = code_of(&daemon, &line);
            assert!(expected.contains(&code), "{expected:?} expected, not {reply}");
        }
    });
}

#[test]
fn half_lines_huge_lines_and_silence_disturb_nobody() {
    let daemon = ramdisk();
    without_consequences(&daemon, || {
        let mut half = daemon.rpc();
        half.send_raw(b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": \"upg").expect("sent");
        drop(half);

        let mut huge = daemon.rpc();
        // The daemon may refuse in the middle of it; it must not collect all of it for ever.
        let _ = huge.send_raw(&vec![b'x'; 10 << 20]);
        let _ = huge.send_raw(b"\n");
        if let Ok(Some(reply)) = huge.receive() {
            let code = reply["error"]["code"].as_i64().expect("an error");
            assert!([PARSE_ERROR, INVALID_REQUEST].contains(&code), "{reply}");
        }
        assert!(daemon.rss_kib() < 200 << 10, "{} KiB are resident", daemon.rss_kib());

        let mut empty = daemon.rpc();
        empty.send_raw(b"\n\n\r\n").expect("sent");
        // Empty lines are errors or nothing; the call behind them is answered either way.
        empty
            .send_raw(b"{\"jsonrpc\": \"2.0\", \"id\": 99, \"method\": \"status\"}\n")
            .expect("sent");
        while empty.receive().expect("a line").expect("no hang-up")["id"] != 99 {}

        let silent: Vec<Control> = (0..20).map(|_| daemon.rpc()).collect();
        assert_eq!(daemon.status()["generation"], 1);
        drop(silent);

        let mut unread =
            std::os::unix::net::UnixStream::connect(daemon.control()).expect("connected");
        for _ in 0..100 {
            use std::io::Write;
            unread
                .write_all(b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": \"status\"}\n")
                .expect("sent");
        }
        drop(unread);
        assert_eq!(daemon.status()["generation"], 1);
    });
}

#[test]
fn a_notification_is_not_answered_and_ids_come_back_as_they_were() {
    let daemon = ramdisk();
    let mut control = daemon.rpc();
    control.send_raw(b"{\"jsonrpc\": \"2.0\", \"method\": \"status\"}\n").expect("sent");
    for id in [json!("a string"), json!(0), json!(-5), json!(null)] {
        let line = json!({"jsonrpc": "2.0", "id": id, "method": "status"});
        control.send_raw(format!("{line}\n").as_bytes()).expect("sent");
        let reply = control.receive().expect("a line").expect("no hang-up");
        assert_eq!(reply["id"], id, "{reply}");
    }
    // Several calls in one packet are answered one by one, in their order.
    let three: String = (1..=3)
        .map(|id| format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"status\"}}\n"))
        .collect();
    control.send_raw(three.as_bytes()).expect("sent");
    for id in 1..=3 {
        assert_eq!(control.receive().expect("a line").expect("no hang-up")["id"], id);
    }
}

#[test]
fn a_second_daemon_does_not_take_the_socket_of_a_living_one() {
    let daemon = ramdisk();
    let output = run_daemon(&["--socket-path", daemon.socket().to_str().expect("UTF-8")]);
    assert_eq!(output.status, 1, "{output:?}");
    run_load(daemon.socket(), &LoadOptions::new(1, 4), Duration::from_millis(200)).assert_clean();
}

#[test]
fn the_vhost_user_socket_is_no_control_socket() {
    let daemon = ramdisk();
    let mut stream = std::os::unix::net::UnixStream::connect(daemon.socket()).expect("connected");
    std::io::Write::write_all(
        &mut stream,
        b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"shutdown\"}\n",
    )
    .expect("sent");
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    let _ = stream.read(&mut [0; 100]);
    drop(stream);
    assert_eq!(daemon.status()["state"], "serving");
}
