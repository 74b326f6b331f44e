//! The host that the package is on: its packages, its units, its files.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::daemon::Control;
use serde_json::{Value, json};

/// How long anything may take to come about.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a command has printed, on both, and whether it worked.
pub fn try_sh(script: &str) -> (bool, String) {
    let output = Command::new("sh").args(["-c", &format!("exec 2>&1; {script}")]).output();
    let output = output.expect("there is a shell");
    (output.status.success(), String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What a command that works has printed.
pub fn sh(script: &str) -> String {
    let (works, said) = try_sh(script);
    assert!(works, "{script}:\n{said}");
    said
}

/// Waits until `done` is so.
pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}\n{}", journal());
        thread::sleep(Duration::from_millis(20));
    }
}

fn journal() -> String {
    try_sh("journalctl --no-pager -n 40 -u 'vhost-hotswap@*'").1
}

/// One disk.
#[derive(Debug, Clone, Copy)]
pub struct Disk(pub &'static str);

impl Disk {
    /// Its unit.
    pub fn unit(self) -> String {
        format!("vhost-hotswap@{}.service", self.0)
    }

    /// Where QEMU connects.
    pub fn socket(self) -> String {
        format!("/run/vhost-hotswap/{}.sock", self.0)
    }

    /// A property of its unit.
    pub fn property(self, name: &str) -> String {
        sh(&format!("systemctl show -P {name} {}", self.unit()))
    }

    /// How many descriptors systemd keeps for it.
    pub fn stored(self) -> u64 {
        self.property("NFileDescriptorStore").parse().expect("a number")
    }

    /// What the daemon says of itself; null while it does not answer.
    pub fn status(self) -> Value {
        let control = format!("/run/vhost-hotswap/{}/control", self.0);
        let answer = Control::connect(Path::new(&control))
            .ok()
            .and_then(|mut control| control.request("status", json!({})).ok());
        answer.unwrap_or_default()
    }

    /// Waits until it serves, and its store is settled; the status then.
    pub fn serving(self) -> Value {
        let is_settled = |status: &Value| {
            let store = &status["supervisor"]["store"]["state"];
            status["state"] == "serving" && store != "storing"
        };
        wait_until(&format!("{} does not serve", self.0), || is_settled(&self.status()));
        self.status()
    }

    /// The process that does not change.
    pub fn main_pid(self) -> u64 {
        self.property("MainPID").parse().expect("a number")
    }

    /// What its processes run.
    pub fn programs(self) -> Vec<String> {
        let status = self.status();
        let pid = |part: &str| status[part]["pid"].as_u64().expect("a process");
        let exe = |pid| fs::read_link(format!("/proc/{pid}/exe")).expect("it runs");
        ["supervisor", "server"].map(|part| exe(pid(part)).display().to_string()).to_vec()
    }
}
