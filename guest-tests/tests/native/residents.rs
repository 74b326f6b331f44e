//! Domains that leave something behind: found, reported, and never unmapped under running code.
//!
//! The module `pinned_module` is a ramdisk of a careless author, built here. It is upgraded to and
//! away from under a load that checks every block; when it is retired, `status` must name it and
//! why, its code must still be mapped, and the device must go on. When what kept it has ended, it
//! must be gone from both.

use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::daemon::Daemon;
use guest_tests::modules::pinned_module;
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use serde_json::{Value, json};

/// What is still mapped of modules called so.
fn mappings(daemon: &Daemon, name: &str) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", daemon.server_pid()))
        .expect("the daemon lives");
    maps.lines().filter(|line| line.contains("hotswap-module") && line.contains(name)).count()
}

fn ramdisk() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--queues", "2"])
}

/// Upgrades to the module and away from it, until it is retired; what `status` says of it then, and
/// what is mapped of it.
fn comes_and_goes(daemon: &Daemon, module: &str, params: Value) -> (Value, usize) {
    let keeps = params.to_string();
    let mut control = daemon.rpc();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    let mut upgrade = |name: &str, params: Value| {
        load.wait_for(200);
        control
            .request("upgrade", json!({"name": name, "params": params}))
            .unwrap_or_else(|error| panic!("{keeps}: {error:?}"))
    };
    upgrade(module, params);
    upgrade("ramdisk", json!({}));
    assert!(mappings(daemon, "pinned_module") > 0, "{keeps}: the standby stays loaded");
    // The one that retires it.
    upgrade("ramdisk_v2", json!({}));
    let resident = daemon.status()["resident_modules"].clone();
    let mapped = mappings(daemon, "pinned_module");
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
    let module = pinned_module();
    for (keeps, why) in
        [("tls", "still"), ("thread", "still"), ("host-thread", "thread `pinned_module`")]
    {
        let (resident, mapped) = comes_and_goes(&ramdisk(), &module, json!({"keeps": keeps}));
        let text = resident.to_string();
        assert!(text.contains("pinned_module") && text.contains(why), "{keeps}: {resident}");
        assert!(mapped > 0, "{keeps}: unmapped under code that can still run");
    }
}

#[test]
fn a_timer_that_is_not_due_keeps_nothing() {
    let (resident, mapped) =
        comes_and_goes(&ramdisk(), &pinned_module(), json!({"keeps": "timer"}));
    assert_eq!((resident, mapped), (json!([]), 0));
}

#[test]
fn what_has_ended_since_is_reported_no_longer() {
    let module = pinned_module();
    // The thread-local ends with the session's threads; a thread of the host's is waited for 5 s
    // when the module is retired, and ends after that.
    for params in [
        json!({"keeps": "tls"}),
        json!({"keeps": "thread", "seconds": "3"}),
        json!({"keeps": "host-thread", "seconds": "8"}),
    ] {
        let daemon = ramdisk();
        let (resident, mapped) = comes_and_goes(&daemon, &module, params.clone());
        assert!(
            resident.to_string().contains("pinned_module") && mapped > 0,
            "{params}: {resident}"
        );
        let mut control = daemon.rpc();
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The linker notices that a thread has ended when it unmaps something else.
            control.request("upgrade", json!({"name": "ramdisk"})).expect("committed");
            let before = mappings(&daemon, "pinned_module");
            let status = daemon.status();
            let mapped = mappings(&daemon, "pinned_module");
            // It may have gone between the looks.
            if (before > 0) == (mapped > 0) {
                assert_eq!(
                    mapped > 0,
                    status["resident_modules"] != json!([]),
                    "{params}: {mapped} mappings, {status}"
                );
            }
            if before == 0 {
                break;
            }
            assert!(Instant::now() < deadline, "{params}: {status}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}
