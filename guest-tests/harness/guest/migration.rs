//! A guest that goes on in another QEMU, by live migration over a socket of this host.
//!
//! All that is known of the guest stays: jobs that were started in it go on, and answer through the
//! new QEMU.

use std::io;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use super::options::GuestOptions;
use super::qmp::Qmp;
use super::start::{self, Launch};
use super::{Console, Guest, Result};

/// How long the guest may stand still, at most. The machine may be busy.
const DOWNTIME_MS: u64 = 5000;

/// A QEMU that waits for a guest to come. It is killed when this is dropped.
pub struct Destination {
    /// Taken when the guest has come.
    waiting: Option<Waiting>,
    uri: String,
}

pub(super) struct Waiting {
    pub(super) qemu: Child,
    pub(super) agent: UnixStream,
    pub(super) qmp: Qmp,
    pub(super) directory: TempDir,
}

impl Destination {
    /// Kills it.
    pub fn kill(&mut self) {
        if let Some(Waiting { mut qemu, .. }) = self.waiting.take() {
            // Both fail only if it is gone already.
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Guest {
    /// Starts a QEMU that this guest can be migrated to. It is to be the same machine, with disks
    /// that may be served by other daemons.
    pub fn destination(&self, options: &GuestOptions) -> Result<Destination> {
        let failed = |error: io::Error| self.console.error(format!("no destination: {error}"));
        let directory = tempfile::tempdir().map_err(failed)?;
        let uri = format!("unix:{}", directory.path().join("migration.sock").display());
        let mut options = options.clone();
        options.extra_args.extend(["-incoming".to_owned(), uri.clone()]);
        let waiting = self.waiting(&options, directory)?;
        Ok(Destination { waiting: Some(waiting), uri })
    }

    /// Starts a QEMU that waits, with its files there.
    pub(super) fn waiting(&self, options: &GuestOptions, directory: TempDir) -> Result<Waiting> {
        let launch = Launch { directory: directory.path(), boot_files: &self.boot_files };
        let (qemu, agent, qmp) = start::start(&launch, |launch| start::spawn(options, launch))
            .map_err(|error| {
                let what = format!("the destination did not start: {error}");
                Console::of(&launch).error(what)
            })?;
        Ok(Waiting { qemu, agent, qmp, directory })
    }

    /// Begins to migrate, at so many MiB per second at most.
    pub fn begin_migration(&self, destination: &Destination, mib_per_second: u64) -> Result<()> {
        let bandwidth = mib_per_second << 20;
        let parameters = json!({ "max-bandwidth": bandwidth, "downtime-limit": DOWNTIME_MS });
        self.qmp_with("migrate-set-parameters", parameters)?;
        self.qmp_with("migrate", json!({ "uri": destination.uri })).map(drop)
    }

    /// What has become of the migration: `active`, `completed`, `failed` and so on.
    pub fn migration(&self) -> Result<String> {
        let status = self.qmp("query-migrate")?["status"].clone();
        Ok(status.as_str().unwrap_or("none").to_owned())
    }

    /// Waits until the migration is where `done` says; what it is then.
    pub fn wait_for_migration(
        &self,
        within: Duration,
        done: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + within;
        loop {
            let status = self.migration()?;
            if done(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                let what = format!("the migration is `{status}` for {within:?}");
                return Err(self.console.error(what));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the migration's end, and goes on in the other QEMU. The one that had the guest is
    /// ended. Says how long the guest stood still, as QEMU has it.
    pub fn go_over(&self, mut destination: Destination, within: Duration) -> Result<Duration> {
        let ended = |status: &str| ["completed", "failed", "cancelled"].contains(&status);
        let status = self.wait_for_migration(within, ended)?;
        if status != "completed" {
            return Err(self.console.error(format!("the migration is `{status}`")));
        }
        let downtime = self.qmp("query-migrate")?["downtime"].as_u64().unwrap_or(0);
        let Some(waiting) = destination.waiting.take() else {
            return Err(self.console.error("the destination has been killed".to_owned()));
        };
        self.goes_on_in(waiting, within)?;
        Ok(Duration::from_millis(downtime))
    }

    /// What has come into another QEMU is this guest from now on.
    pub(super) fn goes_on_in(&self, waiting: Waiting, within: Duration) -> Result<()> {
        let Waiting { qemu, agent, mut qmp, directory } = waiting;
        let deadline = Instant::now() + within;
        let failed = |error: io::Error| self.console.error(format!("the destination: {error}"));
        let mut paths = self.console.paths.lock().unwrap_or_else(PoisonError::into_inner);
        paths.push(directory.path().join("console.log"));
        drop(paths);
        self.agent.follow(agent).map_err(failed)?;
        while qmp.execute("query-status", json!(null)).map_err(failed)?["running"] != true {
            if Instant::now() > deadline {
                return Err(self.console.error("the destination does not run".to_owned()));
            }
            thread::sleep(Duration::from_millis(5));
        }
        *self.qmp.lock().unwrap_or_else(PoisonError::into_inner) = qmp;
        let mut now = self.qemu.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::replace(&mut *now, qemu);
        drop(now);
        self.directories.lock().unwrap_or_else(PoisonError::into_inner).push(directory);
        // It is gone, or stands still.
        let _ = before.kill();
        let _ = before.wait();
        Ok(())
    }
}
