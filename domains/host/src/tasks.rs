//! Threads and timers that the host runs for one instance, and joins before its module is unmapped.
//!
//! A thread that a module makes with its own `std` cannot be found again; one that comes from here
//! can be waited for, and blamed by name.

use crate::patience::{Patience, ThreadId};
use domain_abi::DomainError;
use domain_abi::TaskEntry;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How much longer threads are waited for that are given no CPU.
const STARVED_BOUND: Duration = Duration::from_secs(5);

/// A closure of the module's: called once, to run or to be freed.
pub(crate) struct Task {
    entry: TaskEntry,
    arg: *mut c_void,
    disarmed: bool,
}

// SAFETY: the author's side demands `Send` of what is behind `arg` (Host::spawn, Host::after).
unsafe impl Send for Task {}

impl Task {
    /// # Safety
    /// `entry(arg, ..)` may be called once, from any thread, as long as the module is mapped.
    pub(crate) const unsafe fn new(entry: TaskEntry, arg: *mut c_void) -> Self {
        Self { entry, arg, disarmed: false }
    }

    fn run(mut self) {
        self.disarmed = true;
        // SAFETY: the only call (`new`'s contract; `drop` is disarmed).
        unsafe { (self.entry)(self.arg, 1) };
    }

    /// Leaves the closure to its module, which frees it itself because it was told that we failed.
    fn give_back(mut self) {
        self.disarmed = true;
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if !self.disarmed {
            // SAFETY: the only call (`new`'s contract).
            unsafe { (self.entry)(self.arg, 0) };
        }
    }
}

#[derive(Default)]
struct Timers {
    /// By due time; the number makes keys unique and keeps the order of arming.
    due: BTreeMap<(Instant, u64), Task>,
    armed: u64,
    ending: bool,
}

/// A thread that runs code of the module.
struct TaskThread {
    handle: JoinHandle<()>,
    id: Arc<ThreadId>,
}

impl TaskThread {
    fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let id = Arc::<ThreadId>::default();
        let theirs = Arc::clone(&id);
        let handle = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            theirs.set();
            body();
        })?;
        Ok(Self { handle, id })
    }
}

/// One instance's threads and timers.
#[derive(Default)]
pub(crate) struct Tasks {
    threads: Mutex<Vec<TaskThread>>,
    timers: Arc<(Mutex<Timers>, Condvar)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tasks {
    pub(crate) fn spawn(&self, name: &str, task: Task) -> Result<(), DomainError> {
        // The slot is shared with the thread, so that a task comes back to us if there is no
        // thread.
        let slot = Arc::new(Mutex::new(Some(task)));
        let theirs = Arc::clone(&slot);
        let printable: String = name.chars().filter(|&c| c != '\0').collect();
        let spawned = TaskThread::spawn(&printable, move || {
            let task = lock(&theirs).take();
            if let Some(task) = task {
                task.run();
            }
        });
        match spawned {
            Ok(thread) => {
                self.keep(thread);
                Ok(())
            }
            Err(error) => {
                if let Some(task) = lock(&slot).take() {
                    task.give_back();
                }
                Err(DomainError::new(format!("cannot start thread `{name}`: {error}")))
            }
        }
    }

    /// Keeps a thread until it is joined, and joins those that have ended: each has its stack until
    /// then, and an instance may begin new ones for each session.
    fn keep(&self, thread: TaskThread) {
        let mut threads = lock(&self.threads);
        let ended = threads.extract_if(.., |thread| thread.handle.is_finished());
        // What one panicked with was said when it did.
        ended.for_each(|thread| drop(thread.handle.join()));
        threads.push(thread);
    }

    pub(crate) fn after(&self, delay: Duration, task: Task) -> Result<(), DomainError> {
        let now = Instant::now();
        let due = now.checked_add(delay).unwrap_or(now + Duration::from_secs(1 << 32));
        let mut timers = lock(&self.timers.0);
        if timers.ending {
            task.give_back();
            return Err(DomainError::new("the instance is ending, no timer can be armed"));
        }
        if timers.armed == 0 {
            let shared = Arc::clone(&self.timers);
            match TaskThread::spawn("domain-timer", move || serve(&shared)) {
                Ok(thread) => self.keep(thread),
                Err(error) => {
                    task.give_back();
                    return Err(DomainError::new(format!(
                        "cannot start the timer thread: {error}"
                    )));
                }
            }
        }
        timers.armed += 1;
        let number = timers.armed;
        timers.due.insert((due, number), task);
        drop(timers);
        self.timers.1.notify_one();
        Ok(())
    }

    /// Waits until no task runs; timers that are not due yet are freed unrun.
    ///
    /// # Errors
    /// The name of a thread that is still running after `timeout`, in which it was not kept from
    /// running.
    pub(crate) fn join(&self, timeout: Duration) -> Result<(), String> {
        self.join_within(Patience::new(timeout, STARVED_BOUND))
    }

    fn join_within(&self, mut patience: Patience) -> Result<(), String> {
        let unrun = {
            let mut timers = lock(&self.timers.0);
            timers.ending = true;
            std::mem::take(&mut timers.due)
        };
        self.timers.1.notify_one();
        // Frees the closures, in module code: must be over before the module is unmapped.
        drop(unrun);
        // One at a time, without the lock: a task may start another one while we wait.
        while let Some(thread) = { lock(&self.threads).pop() } {
            while !thread.handle.is_finished() {
                if patience.is_over(&thread.id) {
                    let name = thread.handle.thread().name().unwrap_or("?");
                    let blame = format!("thread `{name}`");
                    // The next look must find it again.
                    lock(&self.threads).push(thread);
                    return Err(blame);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = thread.handle.join();
        }
        Ok(())
    }
}

fn serve(shared: &(Mutex<Timers>, Condvar)) {
    let (timers, changed) = shared;
    let mut guard = lock(timers);
    while !guard.ending {
        let now = Instant::now();
        guard = match guard.due.first_key_value().map(|((due, _), _)| *due) {
            None => changed.wait(guard).unwrap_or_else(PoisonError::into_inner),
            Some(due) if due > now => {
                changed.wait_timeout(guard, due - now).unwrap_or_else(PoisonError::into_inner).0
            }
            Some(_) => {
                let task = guard.due.pop_first().map(|(_, task)| task);
                drop(guard);
                if let Some(task) = task {
                    task.run();
                }
                lock(timers)
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    const MS: Duration = Duration::from_millis(1);

    /// Tasks with one thread that does `body`.
    fn with_thread(body: impl FnOnce() + Send + 'static) -> Tasks {
        let tasks = Tasks::default();
        lock(&tasks.threads).push(TaskThread::spawn("test", body).unwrap());
        tasks
    }

    /// Keeps the calling thread, and those that it starts, on the CPU that it is on.
    fn stay_here() {
        // SAFETY: a structure of integers, and a call that reads it.
        let code = unsafe {
            let mut here: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(libc::sched_getcpu().cast_unsigned() as usize, &mut here);
            libc::sched_setaffinity(0, size_of_val(&here), &raw const here)
        };
        assert_eq!(code, 0);
    }

    #[test]
    fn a_thread_that_sleeps_is_late_and_found_again() {
        let end = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&end);
        let tasks = with_thread(move || {
            while !theirs.load(Ordering::Relaxed) {
                std::thread::sleep(MS);
            }
        });
        let began = Instant::now();
        assert_eq!(tasks.join(200 * MS), Err("thread `test`".to_owned()));
        assert!(began.elapsed() < 4000 * MS, "{:?}", began.elapsed());
        end.store(true, Ordering::Relaxed);
        assert_eq!(tasks.join(5000 * MS), Ok(()));
    }

    #[test]
    fn threads_that_have_ended_are_not_kept() {
        let tasks = Tasks::default();
        for _ in 0..20 {
            tasks.keep(TaskThread::spawn("test", || {}).unwrap());
            while !lock(&tasks.threads).iter().all(|thread| thread.handle.is_finished()) {
                std::thread::sleep(MS);
            }
        }
        assert_eq!(lock(&tasks.threads).len(), 1);
        assert_eq!(tasks.join(5000 * MS), Ok(()));
    }

    /// CPU time of the calling thread.
    fn ran() -> Duration {
        // SAFETY: a structure of integers, and a call that fills it in.
        let used = unsafe {
            let mut used: libc::timespec = std::mem::zeroed();
            libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut used);
            used
        };
        Duration::new(used.tv_sec.unsigned_abs(), used.tv_nsec as u32)
    }

    #[test]
    fn a_thread_that_is_given_no_cpu_is_waited_for_longer() {
        stay_here();
        let spins = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&spins);
        let tasks = with_thread(move || {
            // SAFETY: a structure of integers, and a call that reads it.
            let code = unsafe {
                let about: libc::sched_param = std::mem::zeroed();
                libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const about)
            };
            assert_eq!(code, 0);
            while !theirs.load(Ordering::Relaxed) {
                std::thread::sleep(MS);
            }
            let began = ran();
            while ran() - began < 5 * MS {}
        });
        let end = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&end);
        // On the same CPU, which it does not give away.
        let other = std::thread::spawn(move || {
            spins.store(true, Ordering::Relaxed);
            while !theirs.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let joined = tasks.join_within(Patience::new(400 * MS, 600_000 * MS));
        end.store(true, Ordering::Relaxed);
        other.join().unwrap();
        assert_eq!(joined, Ok(()));
    }
}
