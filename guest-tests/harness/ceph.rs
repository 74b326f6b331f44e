//! A real Ceph of one node, which `scripts/try-ceph` has started: its images, its OSD taken away
//! and given back, its commands.

mod stand_in;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub use self::stand_in::StandIn;
use crate::PATIENCE;
use crate::daemon::Daemon;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The cluster.
pub struct Ceph {
    folder: PathBuf,
}

impl Ceph {
    /// The one that `HOTSWAP_CEPH` names.
    pub fn given() -> Ceph {
        let folder = std::env::var_os("HOTSWAP_CEPH")
            .expect("HOTSWAP_CEPH is not set: run this with scripts/try-ceph");
        Ceph { folder: folder.into() }
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its configuration.
    pub fn conf(&self) -> PathBuf {
        self.folder.join("ceph.conf")
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(line).env("CEPH_CONF", self.conf()).stdin(Stdio::null());
        command
    }

    /// Runs a line of a shell, as the cluster's administrator; what it prints.
    #[track_caller]
    pub fn run(&self, line: &str) -> String {
        let output = self.command(line).output().expect("a shell");
        assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// The same, of one that may fail; whether it has not.
    pub fn succeeds(&self, line: &str) -> bool {
        self.command(line).output().expect("a shell").status.success()
    }

    /// A new image of this many megabytes in the pool `rbd`; removes one of this name first.
    pub fn image(&self, name: &str, megabytes: u64) -> Image<'_> {
        self.remove(name);
        self.run(&format!("rbd create rbd/{name} --size {megabytes}M"));
        Image { ceph: self, name: name.to_owned() }
    }

    fn remove(&self, name: &str) {
        // One whose user was killed is watched for half a minute.
        let deadline = Instant::now() + PATIENCE;
        while self.succeeds(&format!("rbd info rbd/{name}")) {
            let line =
                format!("rbd snap purge --no-progress rbd/{name}; rbd rm --no-progress rbd/{name}");
            if self.succeeds(&line) {
                return;
            }
            assert!(Instant::now() < deadline, "image {name} cannot be removed");
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    fn pid(&self, daemon: &str) -> Pid {
        let pid = std::fs::read_to_string(self.folder.join(format!("{daemon}.pid")));
        let pid = pid.ok().and_then(|pid| pid.trim().parse().ok()).and_then(Pid::from_raw);
        pid.unwrap_or_else(|| panic!("{daemon} does not run"))
    }

    /// Kills a daemon of the cluster (`osd.0`, `mon.a`), and waits for its end.
    pub fn kill(&self, daemon: &str) {
        let pid = self.pid(daemon);
        kill_process(pid, Signal::KILL).expect("it lives");
        let deadline = Instant::now() + PATIENCE;
        while rustix::process::test_kill_process(pid).is_ok() {
            assert!(Instant::now() < deadline, "{daemon} does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts it again.
    pub fn start(&self, daemon: &str) {
        let (kind, id) = daemon.split_once('.').expect("a name");
        self.run(&format!("ceph-{kind} -i {id} >/dev/null 2>&1"));
    }

    /// The parameters that make a daemon serve an image.
    pub fn params(&self, image: &str) -> Vec<String> {
        let conf = format!("conf={}", self.conf().display());
        let image = format!("image={image}");
        ["--domain", "rbd", "--param", &image, "--param", &conf, "--param", "id=vm"]
            .map(str::to_owned)
            .to_vec()
    }
}

/// An image; it is removed with the value, if nothing uses it.
pub struct Image<'ceph> {
    ceph: &'ceph Ceph,
    name: String,
}

impl Image<'_> {
    /// Its name, with its pool's.
    pub fn name(&self) -> String {
        format!("rbd/{}", self.name)
    }

    /// The parameters that make a daemon serve it.
    pub fn params(&self) -> Vec<String> {
        self.ceph.params(&self.name())
    }
}

impl Drop for Image<'_> {
    fn drop(&mut self) {
        self.ceph.succeeds(&format!("rbd snap purge --no-progress rbd/{}", self.name));
        self.ceph.succeeds(&format!("rbd rm --no-progress rbd/{}", self.name));
    }
}

/// Waits until `done` says so of the status, for as long as `limit`; returns that status.
#[track_caller]
pub fn wait_until(daemon: &Daemon, limit: Duration, done: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + limit;
    loop {
        let status = daemon.status();
        if done(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{status}\n{}", daemon.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}
