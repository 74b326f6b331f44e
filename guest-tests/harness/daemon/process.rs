//! A process of a daemon's, looked at from outside.

use crate::PATIENCE;
use std::fs::{self, DirEntry};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A process of a daemon's, looked at from outside.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    /// Its id.
    pub pid: u32,
}

/// What the kernel keeps for a process, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Open file descriptors.
    pub fds: usize,
    /// Threads, without the kernel's for io_uring, which come and go as it likes.
    pub threads: usize,
}

impl Process {
    /// Whether it has not ended: the kernel waits for its I/O before that.
    pub fn runs(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("the process lives");
    }

    /// Number of open file descriptors.
    pub fn open_fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("the process lives").count()
    }

    /// What it holds now.
    ///
    /// To ask a daemon which process serves takes a connection and a thread of it, which are there
    /// for a moment after the answer: ask before, once.
    pub fn held(&self) -> Held {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).expect("the process lives");
        Held { fds: self.open_fds(), threads: tasks.filter_map(ours).count() }
    }

    /// Waits until no more is held than `before`, and returns what is.
    ///
    /// # Panics
    ///
    /// Panics when that does not come about within 10 s: something leaks.
    pub fn gives_back(&self, before: Held) -> Held {
        let started = Instant::now();
        loop {
            let now = self.held();
            if now.fds <= before.fds && now.threads <= before.threads {
                return now;
            }
            let waited = started.elapsed();
            assert!(waited < PATIENCE, "it leaks: {before:?} -> {now:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Resident memory in KiB.
    pub fn rss_kib(&self) -> u64 {
        self.memory_kib("status", "VmRSS:")
    }

    /// A line of a file in `/proc` that gives an amount of memory, in KiB.
    pub fn memory_kib(&self, file: &str, field: &str) -> u64 {
        let text =
            fs::read_to_string(format!("/proc/{}/{file}", self.pid)).expect("the process lives");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(field))
            .expect("the kernel has this line");
        line.trim().trim_end_matches("kB").trim().parse().expect("a number")
    }
}

/// A thread that is the process's own, and has not ended while it was looked at.
fn ours(task: io::Result<DirEntry>) -> Option<()> {
    let name = fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
    (!name.starts_with("iou-")).then_some(())
}
