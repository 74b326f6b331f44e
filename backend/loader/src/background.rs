//! Work that has time: done on a thread that gives way to everybody else.
//!
//! Why: an upgrade is asked for while requests are being served, and on a machine without a CPU to spare the scheduler would take one from a queue's
//! worker, or from the guest, for a whole time slice. With a low weight the work is done in their gaps. A thread of its own, because a process without
//! privileges cannot take a lower weight back, and what comes after (the gate is shut) must not be done with it.
//!
//! Not the lowest weight, nor the idle policy: on a machine whose CPUs are all kept busy, by workers that poll for instance, an upgrade took up to 1.9 s with nice 19.
//!
//! Deliberately absent: anything that takes a lock which a worker could want, or runs a module's code. A thread of a domain would inherit the weight.

use rustix::process::setpriority_process;
use rustix::thread::sched_yield;
use std::thread;

/// A tenth of the usual weight (sched(7)): what is left of a CPU that others want all of, so that even there it ends in some 10 ms.
const NICE: i32 = 10;

/// Runs `work` and waits for it. A machine that has no thread left gets it done here.
pub(crate) fn run<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    // Spawning consumes what it cannot run, so that the work stays out here until the thread has come.
    let mut work = Some(work);
    let mut result = None;
    thread::scope(|scope| {
        let (work, result) = (&mut work, &mut result);
        // No thread: the work is still there afterwards.
        let _ = thread::Builder::new().name("verify".to_owned()).spawn_scoped(scope, move || {
            // On Linux this is about the calling thread alone. If it is refused, the work is no worse than before.
            let _ = setpriority_process(None, NICE);
            // The new weight counts from the next choice of the scheduler.
            sched_yield();
            *result = work.take().map(|work| work());
        });
    });
    result.unwrap_or_else(|| (work.expect("no thread has taken it"))())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::getpriority_process;

    #[test]
    fn only_the_work_has_the_low_weight() {
        let before = getpriority_process(None).unwrap();
        assert_eq!(run(|| getpriority_process(None).unwrap()), NICE);
        assert_eq!(getpriority_process(None).unwrap(), before);
    }

    #[test]
    fn a_panic_is_handed_on() {
        let caught = std::panic::catch_unwind(|| run(|| panic!("of the work")));
        assert!(caught.is_err());
    }
}
