//! Which CPU a worker runs on, if the operator says so: `--worker-cpus`.
//!
//! A worker that polls beside a virtual CPU takes it away from the guest; on a machine with CPUs to
//! spare, giving each its own keeps them apart. Without the option the scheduler decides.
//!
//! Deliberately absent: memory nodes, and the control thread, which no guest waits for.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// CPUs are numbered from 0; Linux knows of no machine with more.
const CPUS_MAX: usize = 1024;

/// A list of CPUs, as `--worker-cpus` has it.
#[derive(Debug, Clone)]
pub(crate) struct Cpus(pub(crate) Vec<usize>);

/// Reads such a list.
pub(crate) fn worker_cpus(text: &str) -> Result<Cpus, String> {
    let number = |text: &str| match text.parse::<usize>() {
        Ok(number) if number < CPUS_MAX => Ok(number),
        _ => Err(format!("`{text}` is no number of a CPU; write a list like 2,4-7")),
    };
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("`{part}` ends before it begins"));
        }
        cpus.extend(first..=last);
    }
    Ok(Cpus(cpus))
}

/// Whether this process may use all of `cpus`.
///
/// # Errors
/// A sentence that names one that it may not, and those that it may.
pub fn check(cpus: &[usize]) -> Result<(), String> {
    if cpus.is_empty() {
        // The question itself fails where there are more CPUs than the set has room for.
        return Ok(());
    }
    let allowed = sched_getaffinity(None)
        .map_err(|error| format!("cannot tell which CPUs there are: {error}"))?;
    let Some(wrong) = cpus.iter().find(|&&cpu| cpu >= CpuSet::MAX_CPU || !allowed.is_set(cpu))
    else {
        return Ok(());
    };
    let usable: Vec<_> = (0..CpuSet::MAX_CPU)
        .filter(|&cpu| allowed.is_set(cpu))
        .map(|cpu| cpu.to_string())
        .collect();
    Err(format!(
        "--worker-cpus: CPU {wrong} is not there, or not for this process; it may use {}",
        usable.join(",")
    ))
}

/// Keeps the calling thread, the worker of `queue`, on its CPU of the list.
pub(crate) fn keep(queue: usize, cpus: &[usize]) {
    let Some(&cpu) = cpus.get(queue % cpus.len().max(1)) else { return };
    let mut only = CpuSet::new();
    only.set(cpu);
    // It was there when the daemon started; a CPU that has been taken away since is no reason not
    // to serve.
    if let Err(error) = sched_setaffinity(None, &only) {
        log::warn!("queue {queue}: its worker is not kept on CPU {cpu}: {error}");
    }
}
