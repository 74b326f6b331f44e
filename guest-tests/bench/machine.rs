//! What the numbers were taken on, for those who read them elsewhere.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::cpu;
use guest_tests::daemon::binary;
use guest_tests::peer::PEER;

/// A look at the machine at the beginning, to be compared with its end.
pub(super) struct Machine {
    began: std::time::Instant,
    stolen_before: f64,
    load_before: String,
}

impl Machine {
    pub(super) fn look() -> Machine {
        Machine {
            began: std::time::Instant::now(),
            stolen_before: cpu::stolen_seconds(),
            load_before: load(),
        }
    }

    /// Everything, as it is now.
    pub(super) fn json(&self) -> Value {
        json!({
            "cpu": cpu_model(),
            "cpus": cpus(),
            "memory_mib": memory_kib("MemTotal:") / 1024,
            "kernel": read("/proc/sys/kernel/osrelease"),
            "clocksource": read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            "vhost_hotswap": version(&binary("vhost-hotswap").to_string_lossy()),
            "peer": version(PEER),
            "commit": commit(),
            "load_before": self.load_before,
            "load_after": load(),
            "seconds": self.began.elapsed().as_secs_f64(),
            "stolen_share": self.stolen_share(),
        })
    }

    /// The share of the machine's time that the hypervisor kept.
    fn stolen_share(&self) -> f64 {
        (cpu::stolen_seconds() - self.stolen_before)
            / (self.began.elapsed().as_secs_f64() * cpus() as f64)
    }

    /// A few lines.
    pub(super) fn print(&self) {
        println!(
            "{} x {}, Linux {}, {}, load before: {}",
            cpus(),
            cpu_model(),
            read("/proc/sys/kernel/osrelease"),
            version(PEER),
            self.load_before,
        );
    }

    /// What is to be known about the time in between.
    pub(super) fn print_end(&self) {
        println!(
            "\nafter {:.0} s: load {}, {:.1} % of the CPUs' time was stolen by the hypervisor",
            self.began.elapsed().as_secs_f64(),
            load(),
            100.0 * self.stolen_share()
        );
    }
}

/// A field of `/proc/meminfo`.
pub(super) fn memory_kib(field: &str) -> u64 {
    let meminfo = read("/proc/meminfo");
    let line = meminfo.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("");
    line.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn cpu_model() -> String {
    let cpuinfo = read("/proc/cpuinfo");
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, name)| name).to_owned()
}

fn load() -> String {
    read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn commit() -> String {
    first_line(Command::new("git").args([
        "-C",
        env!("CARGO_MANIFEST_DIR"),
        "describe",
        "--always",
        "--dirty",
    ]))
}

fn version(program: &str) -> String {
    first_line(Command::new(program).arg("--version"))
}

fn first_line(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}
