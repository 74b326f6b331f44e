//! Upgrades on a machine that gives the daemon's workers hardly any CPU.
//!
//! The workers are made as unimportant as can be, and kept on a CPU that others keep busy: each is
//! given it for a moment now and then. Nothing hangs, so no upgrade is refused, even with a short
//! drain timeout.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use guest_tests::daemon::Daemon;
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::{Pid, setpriority_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::json;

/// The first CPU that we may use.
fn one_cpu() -> CpuSet {
    let allowed = sched_getaffinity(None).expect("a set");
    let first = (0..CpuSet::MAX_CPU).find(|&cpu| allowed.is_set(cpu)).expect("one at least");
    let mut only = CpuSet::new();
    only.set(first);
    only
}

/// The threads of the daemon that serve its queues.
fn workers(daemon: &Daemon) -> Vec<Pid> {
    let tasks =
        fs::read_dir(format!("/proc/{}/task", daemon.server_pid())).expect("the daemon lives");
    let tasks = tasks.map(|task| task.expect("an entry").path());
    let is_worker = |task: &std::path::PathBuf| {
        fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("vring_worker"))
    };
    let id =
        |task: std::path::PathBuf| task.file_name()?.to_str()?.parse().ok().and_then(Pid::from_raw);
    tasks.filter(is_worker).filter_map(id).collect()
}

#[test]
fn workers_without_a_cpu_cost_an_upgrade_time_and_not_its_success() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"]);
    let mut control = daemon.rpc();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 8));
    load.wait_for(1000);
    let end = AtomicBool::new(false);
    let refused: Vec<_> = thread::scope(|scope| {
        let found = workers(&daemon);
        assert_eq!(found.len(), 2, "one for each queue");
        for worker in found {
            sched_setaffinity(Some(worker), &one_cpu()).expect("it is ours");
            setpriority_process(Some(worker), 19).expect("less is always allowed");
        }
        for _ in 0..4 {
            scope.spawn(|| {
                sched_setaffinity(None, &one_cpu()).expect("it is allowed");
                while !end.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        thread::sleep(Duration::from_millis(200));
        let upgrade = |round: usize| {
            let name = if round.is_multiple_of(2) { "ramdisk_v2" } else { "ramdisk" };
            let params =
                json!({"name": name, "drain_timeout_ms": 20, "starved_timeout_ms": 60_000});
            control.request("upgrade", params)
        };
        let refused = (0..20).map(upgrade).filter_map(Result::err).collect();
        end.store(true, Ordering::Relaxed);
        refused
    });
    assert!(refused.is_empty(), "{} of 20: {:?}", refused.len(), refused[0]);
    let waits = daemon.status()["queues"][0]["cpu_wait_us"].as_u64().expect("a number");
    assert!(waits > 20_000, "it has waited, and that is said: {waits}");
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
}
