//! A check says what an upgrade would, and leaves nothing behind.

use std::fs;

use guest_tests::daemon::{Daemon, module, module_with_wrong_abi};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use serde_json::json;

fn ramdisk() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--param", "serial=one"])
}

/// How many mappings the server has of modules.
fn mapped(daemon: &Daemon) -> usize {
    let maps = fs::read_to_string(format!("/proc/{}/maps", daemon.server_pid())).expect("it lives");
    maps.lines().filter(|line| line.contains("hotswap") || line.contains("libdomain")).count()
}

#[test]
fn it_says_what_would_happen_and_leaves_nothing() {
    let daemon = ramdisk();
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 16));
    load.wait_for(100);
    let server = daemon.server();
    // Whatever a first time leaves of its own.
    daemon.call(&["check", "ramdisk_v2"]);
    let (before, held, maps) = (daemon.status(), server.held(), mapped(&daemon));
    for _ in 0..20 {
        let told = daemon.call(&["check", "ramdisk_v2"]);
        assert_eq!(
            (&told["accepted"], &told["mode"], &told["can_roll_back"], &told["to"]["version"]),
            (&json!(true), &json!("handover"), &json!(true), &json!("2.0.0"))
        );
        assert_eq!((&told["phases_us"]["pause"], &told["left"]), (&json!(0), &json!(null)));
    }
    let after = daemon.status();
    for key in ["generation", "state", "domain", "standby", "upgrades", "resident_modules"] {
        assert_eq!(before[key], after[key], "`{key}` has changed by a check");
    }
    assert_eq!(daemon.call(&["history"]), json!([]), "a check is no change");
    server.gives_back(held);
    assert_eq!(mapped(&daemon), maps, "a module is still mapped");
    let upgraded = daemon.call(&["upgrade", "ramdisk_v2"]);
    assert_eq!(upgraded["mode"], "handover");
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn a_refusal_is_that_of_the_upgrade() {
    let daemon = ramdisk();
    let directory = tempfile::tempdir().expect("a directory");
    let wrong_abi = module_with_wrong_abi(directory.path());
    let half = directory.path().join("libdomain_half.so");
    let whole = fs::read(module("ramdisk")).expect("a module");
    fs::write(&half, &whole[..whole.len() / 2]).expect("a file");
    let path = |path: &std::path::Path| path.to_str().expect("UTF-8").to_owned();
    for (args, code) in [
        (vec!["nothing_of_this_name".to_owned()], "module_not_found"),
        (vec![path(&wrong_abi)], "module_wrong_abi"),
        (vec![path(&half)], "module_malformed"),
        (vec!["empty".into()], "schema_not_accepted"),
        (vec!["ramdisk".into(), "--param".into(), "colour=red".into()], "bad_parameter"),
        (vec!["ramdisk".into(), "--param".into(), "size=1M".into()], "prepare_failed"),
        (vec!["ramdisk".into(), "--param".into(), "serial=two".into()], "device_differs"),
        (vec!["ramdisk".into(), "--mode".into(), "swap".into()], "swap_not_possible"),
        (vec!["faulty".into(), "--param".into(), "fault=prepare:fail".into()], "prepare_failed"),
        (vec!["faulty".into(), "--param".into(), "fault=prepare:panic".into()], "prepare_panicked"),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let check = daemon.refuse(&[&["check"], &args[..]].concat());
        let upgrade = daemon.refuse(&[&["upgrade"], &args[..]].concat());
        assert_eq!(check, upgrade);
        assert!(check.contains(&format!("({code})")), "{check}");
    }
    let now = daemon.status();
    assert_eq!((&now["generation"], &now["upgrades"]["refused"]), (&json!(1), &json!(10)));
}
