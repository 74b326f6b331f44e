//! Which CPU runs what, and for how long it did.
//!
//! A child inherits the affinity of the thread that starts it, so that pinning a server means to
//! start it while pinned oneself. That treats both sides alike, whichever process it is.

use std::fs;
use std::io;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where the two ends of a ring run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Places {
    /// The client's thread.
    pub client: Option<usize>,
    /// The server with all its threads.
    pub server: Option<usize>,
}

impl Places {
    /// A CPU for each; none if there are not two.
    pub(super) fn apart() -> Places {
        let Ok(allowed) = sched_getaffinity(None) else { return Places::default() };
        let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu));
        match (cpus.next(), cpus.next()) {
            (client, Some(server)) => Places { client, server: Some(server) },
            _ => Places::default(),
        }
    }

    /// In words.
    pub(super) fn describe(self) -> String {
        match self {
            Places { client: Some(client), server: Some(server) } => {
                format!(
                    "client on CPU {client}, server (in `upgrade`: its workers) on CPU {server}"
                )
            }
            _ => "not pinned".to_owned(),
        }
    }
}

/// Does something with this thread on one CPU; threads and processes that start meanwhile stay
/// there.
pub(super) fn pinned<T>(cpu: Option<usize>, act: impl FnOnce() -> T) -> T {
    let before = sched_getaffinity(None);
    let moved = cpu.is_some_and(|cpu| {
        let mut only = CpuSet::new();
        only.set(cpu);
        sched_setaffinity(None, &only).is_ok()
    });
    let result = act();
    if let (true, Ok(before)) = (moved, before) {
        // The CPUs were allowed a moment ago.
        let _ = sched_setaffinity(None, &before);
    }
    result
}

/// What the daemon's workers are called, as `/proc` shows.
const WORKER: &str = "vring_worker";

/// Puts the workers of a daemon that has served a client's first requests on one CPU, and leaves
/// its other threads alone.
///
/// Wherever the scheduler puts client and worker decides what waking each other costs, several
/// times over, and anything else that runs makes it decide anew. Upgrades would be blamed, or
/// praised, for that.
pub(super) fn pin_workers(pid: u32, cpu: Option<usize>) -> io::Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut only = CpuSet::new();
    only.set(cpu);
    let mut pinned = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let id = task.file_name().to_str().and_then(|id| Pid::from_raw(id.parse().ok()?));
        if let (WORKER, Some(id)) = (name.trim(), id) {
            sched_setaffinity(Some(id), &only)?;
            pinned += 1;
        }
    }
    if pinned > 0 {
        Ok(())
    } else {
        Err(io::Error::other(format!("no thread of the daemon is a {WORKER}")))
    }
}

/// CPU seconds that a process has used, user and system, ended threads included; in steps of a
/// clock tick.
pub(super) fn process_seconds(pid: u32) -> f64 {
    seconds_of(&format!("/proc/{pid}/stat"))
}

/// CPU seconds that the calling thread has used.
pub(super) fn thread_seconds() -> f64 {
    seconds_of("/proc/thread-self/stat")
}

fn seconds_of(path: &str) -> f64 {
    let stat = fs::read_to_string(path).unwrap_or_default();
    // The name, in parentheses, may hold anything; `utime` and `stime` are the 12th and 13th field
    // after it.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|word| word.parse::<u64>().ok())
        .sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Seconds that the hypervisor kept from this machine's CPUs, since boot.
pub(super) fn stolen_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks =
        stat.lines().next().and_then(|line| line.split_whitespace().nth(8)?.parse::<u64>().ok());
    ticks.unwrap_or(0) as f64 / rustix::param::clock_ticks_per_second() as f64
}
