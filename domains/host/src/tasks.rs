//! Threads and timers that the host runs for one instance, and joins before its module is unmapped.
//!
//! A thread that a module makes with its own `std` cannot be found again; one that comes from here
//! can be waited for, and blamed by name.

use domain_abi::DomainError;
use domain_abi::TaskEntry;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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

/// One instance's threads and timers.
#[derive(Default)]
pub(crate) struct Tasks {
    threads: Mutex<Vec<JoinHandle<()>>>,
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
        let spawned = std::thread::Builder::new()
            .name(name.chars().filter(|&c| c != '\0').collect())
            .spawn(move || {
                let task = lock(&theirs).take();
                if let Some(task) = task {
                    task.run();
                }
            });
        match spawned {
            Ok(thread) => {
                lock(&self.threads).push(thread);
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
            match std::thread::Builder::new()
                .name("domain-timer".to_owned())
                .spawn(move || serve(&shared))
            {
                Ok(thread) => lock(&self.threads).push(thread),
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
    /// The name of a thread that is still running after `timeout`.
    pub(crate) fn join(&self, timeout: Duration) -> Result<(), String> {
        let deadline = Instant::now() + timeout;
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
            while !thread.is_finished() {
                if Instant::now() >= deadline {
                    let blame = format!("thread `{}`", thread.thread().name().unwrap_or("?"));
                    // Whoever asks again must find it again.
                    lock(&self.threads).push(thread);
                    return Err(blame);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = thread.join();
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
