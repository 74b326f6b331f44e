//! What a server costs that has nothing to do: a client is connected, its rings are empty.

use std::io;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cpu;
use crate::drive::{Driver, Load, Mix, Wait};
use crate::server::Recipe;

/// Watches the daemon, and the peer beside it, at the same time: neither should do anything.
pub(super) fn run(seconds: f64) -> io::Result<Value> {
    println!("CPU time in {seconds} s with an idle client:");
    let recipes = [
        ("daemon", Recipe::Ours(["--domain", "ramdisk"].map(str::to_owned).to_vec())),
        (
            "peer",
            Recipe::Peer { blockdev: "driver=null-co,size=67108864".to_owned(), iothread: false },
        ),
    ];
    let load = Load { depth: 1, wait: Wait::Sleeping, bytes: 4096, mix: Mix::Read };
    let mut watched = Vec::new();
    for (label, recipe) in recipes {
        let server = recipe.start(None)?;
        let mut driver = Driver::connect(server.socket(), load)?;
        driver.warm_up(None)?;
        watched.push((label, server, driver));
    }
    thread::sleep(Duration::from_millis(500));
    let before: Vec<(f64, u64)> = watched.iter().map(|(_, server, _)| look(server.pid())).collect();
    thread::sleep(Duration::from_secs_f64(seconds));
    let mut rows = Vec::new();
    for ((label, server, _), (cpu_before, wakes_before)) in watched.iter().zip(before) {
        let (cpu, wakes) = look(server.pid());
        let (used, wakes) = (cpu - cpu_before, wakes - wakes_before);
        println!("  {label:<8} {:.2} s of CPU, {wakes} wake-ups", used);
        rows.push(
            json!({ "label": label, "seconds": seconds, "cpu_seconds": used, "wake_ups": wakes }),
        );
    }
    println!();
    Ok(Value::Array(rows))
}

/// CPU seconds, and how often any thread has gone to sleep, which shows what is too short for the
/// clock.
fn look(pid: u32) -> (f64, u64) {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let sleeps = tasks.filter_map(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        line.trim().parse::<u64>().ok()
    });
    (cpu::process_seconds(pid), sleeps.sum())
}
