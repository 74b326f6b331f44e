//! Domains that leave something behind: found, reported, and never unmapped under running code.
//!
//! The module `stubborn` is a ramdisk of a careless author, built here. It is upgraded to and away from under a load that checks every block; when it is
//! retired, `status` must name it and why, its code must still be mapped, and the device must go on.

use std::path::PathBuf;
use std::process::Command;

use guest_tests::daemon::{Daemon, binary};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use serde_json::{Value, json};

/// Builds the module, in a target directory of its own.
fn stubborn() -> String {
    let bin = binary("vhost-hotswap");
    let target = bin
        .parent()
        .and_then(|release| release.parent())
        .expect("TARGET/release/vhost-hotswap")
        .join("modules/stubborn");
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("modules/stubborn/Cargo.toml");
    let built = Command::new(env!("CARGO"))
        .args(["rustc", "--quiet", "--release", "--lib", "--features", "module", "--crate-type", "cdylib"])
        .arg("--manifest-path")
        .arg(manifest)
        .arg("--target-dir")
        .arg(&target)
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo runs");
    assert!(built.success(), "the module was not built");
    target.join("release/libdomain_stubborn.so").to_str().expect("a path in UTF-8").to_owned()
}

/// What is still mapped of modules called so.
fn mappings(daemon: &Daemon, name: &str) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", daemon.pid())).expect("the daemon lives");
    maps.lines().filter(|line| line.contains("hotswap-module") && line.contains(name)).count()
}

fn comes_and_goes(module: &str, keeps: &str) -> (Value, usize) {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "2"]);
    let mut control = daemon.rpc();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    let mut upgrade = |name: &str, params: Value| {
        load.wait_for(200);
        control
            .request("upgrade", json!({"name": name, "params": params}))
            .unwrap_or_else(|error| panic!("{keeps}: {error:?}"))
    };
    upgrade(module, json!({"keeps": keeps}));
    upgrade("ramdisk", json!({}));
    assert!(mappings(&daemon, "stubborn") > 0, "{keeps}: the standby stays loaded");
    // The one that retires it.
    upgrade("ramdisk_v2", json!({}));
    let resident = daemon.status()["resident_modules"].clone();
    let mapped = mappings(&daemon, "stubborn");
    upgrade("ramdisk", json!({}));
    load.wait_for(200);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.status()["state"], "serving");
    (resident, mapped)
}

#[test]
fn what_is_left_behind_is_reported_and_stays_mapped() {
    let module = stubborn();
    for (keeps, why) in [("tls", "still"), ("thread", "still"), ("host-thread", "thread `stubborn`")] {
        let (resident, mapped) = comes_and_goes(&module, keeps);
        let text = resident.to_string();
        assert!(text.contains("stubborn") && text.contains(why), "{keeps}: {resident}");
        assert!(mapped > 0, "{keeps}: unmapped under code that can still run");
    }
}

#[test]
fn a_timer_that_is_not_due_keeps_nothing() {
    let (resident, mapped) = comes_and_goes(&stubborn(), "timer");
    assert_eq!((resident, mapped), (json!([]), 0));
}
