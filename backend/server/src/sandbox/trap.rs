//! What seccomp refuses is said.
//!
//! A thread that has SIGSYS blocked is ended by the kernel, and the process with it.
//!
//! A system call that is not let through raises SIGSYS in its thread. The handler has the call end
//! with EPERM, and counts it; a thread writes the log, because a handler can do neither that nor
//! much else. A SIGSYS of another origin, as from `kill`, ends the process.

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::ffi::c_int;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::{fs, io};

/// Numbers from here on are counted as one.
const MOST: usize = 512;

/// How often each call was refused and it was not said. Counters by themselves: Relaxed.
static REFUSED: [AtomicU32; MOST] = [const { AtomicU32::new(0) }; MOST];
static ALL: AtomicU64 = AtomicU64::new(0);
/// The thread that was refused something last.
static LAST: AtomicI32 = AtomicI32::new(0);
/// Where the thread that writes the log is woken.
static WAKE: AtomicI32 = AtomicI32::new(-1);

/// Where a `siginfo_t` of SIGSYS has the call's number: behind the three numbers of each signal, a
/// gap, and an address.
const NUMBER: usize = 24;

/// What such a signal has as its code; others can send one, too, with another code: only the kernel
/// sends codes above 0 to another process (asm-generic/siginfo.h, `rt_sigqueueinfo(2)`).
const SYS_SECCOMP: c_int = 1;

/// Calls that are worth a name.
const NAMES: [(libc::c_long, &str); 22] = [
    (libc::SYS_socket, "socket"),
    (libc::SYS_connect, "connect"),
    (libc::SYS_bind, "bind"),
    (libc::SYS_listen, "listen"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_mprotect, "mprotect"),
    (libc::SYS_ptrace, "ptrace"),
    (libc::SYS_prctl, "prctl"),
    (libc::SYS_kill, "kill"),
    (libc::SYS_io_uring_setup, "io_uring_setup"),
    (libc::SYS_mount, "mount"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_fcntl, "fcntl"),
    (libc::SYS_socketpair, "socketpair"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_sendmmsg, "sendmmsg"),
    (libc::SYS_tgkill, "tgkill"),
    (libc::SYS_prlimit64, "prlimit64"),
    (libc::SYS_sched_setaffinity, "sched_setaffinity"),
];

extern "C" fn refuse(_: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a whole `siginfo_t`, whose first members
    // are those of any signal.
    if unsafe { (*info).si_code } != SYS_SECCOMP {
        end_as_unhandled();
        return;
    }
    // SAFETY: the kernel gives a handler with SA_SIGINFO a whole `siginfo_t`, which is longer than
    // that, and aligned as a number is; for SIGSYS the number stands there (asm-generic/siginfo.h).
    let number = unsafe { info.cast::<u8>().add(NUMBER).cast::<c_int>().read() };
    // SAFETY: the third argument of such a handler is the interrupted thread's `ucontext_t`, which
    // nothing else looks at while the handler runs.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    end_with_eperm(context);
    let at = usize::try_from(number).unwrap_or(MOST).min(MOST - 1);
    REFUSED[at].fetch_add(1, Ordering::Relaxed);
    ALL.fetch_add(1, Ordering::Relaxed);
    // SAFETY: calls that a handler may do, with a buffer of 8 bytes that lives. `errno` is this
    // thread's, and is put back, so that the code that was interrupted does not see it change.
    unsafe {
        let errno = *libc::__errno_location();
        LAST.store(libc::gettid(), Ordering::Relaxed);
        let one = 1_u64;
        // It is full only if the other thread is to be woken anyway.
        let _ = libc::write(WAKE.load(Ordering::Relaxed), (&raw const one).cast(), 8);
        *libc::__errno_location() = errno;
    }
}

/// The signal is none of seccomp's: the process ends by it as if there were no handler, and
/// whatever was interrupted does not go on.
fn end_as_unhandled() {
    // SAFETY: calls that a handler may do, without pointers. The signal is blocked while its
    // handler runs, so it comes when that returns, and before what was interrupted goes on.
    unsafe {
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
        libc::raise(libc::SIGSYS);
    }
}

/// Has the call that was not carried out return that it is not permitted.
fn end_with_eperm(context: &mut libc::ucontext_t) {
    let result = -i64::from(libc::EPERM);
    #[cfg(target_arch = "x86_64")]
    {
        context.uc_mcontext.gregs[libc::REG_RAX as usize] = result;
    }
    #[cfg(target_arch = "aarch64")]
    {
        context.uc_mcontext.regs[0] = result as u64;
    }
}

/// What was refused and was not said.
#[derive(Debug)]
pub(super) struct Refusals(OwnedFd);

/// Has what is refused end so in this process, from now on.
pub(super) fn install() -> io::Result<Refusals> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    WAKE.store(wake.as_raw_fd(), Ordering::Relaxed);
    // SAFETY: all zeros is an empty mask, no flags, and the default handler.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = refuse as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: the structure is filled in. The handler is sound at any moment: it allocates nothing,
    // locks nothing, and touches nothing of the thread that it interrupts but the result of a call
    // that was not carried out; if the signal has another origin, not even that.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(Refusals(wake))
}

/// How many calls were refused.
pub(super) fn count() -> u64 {
    ALL.load(Ordering::Relaxed)
}

impl Refusals {
    /// Nothing is said of them.
    #[cfg(test)]
    pub(super) fn forget(self) {
        std::mem::forget(self);
    }

    /// Has a thread write them into the log.
    pub(super) fn say(self) -> io::Result<()> {
        let say = move || {
            loop {
                let _ = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None);
                let _ = rustix::io::read(&self.0, &mut [0; 8]);
                let thread = LAST.load(Ordering::Relaxed);
                for (number, refused) in REFUSED.iter().enumerate() {
                    let times = refused.swap(0, Ordering::Relaxed);
                    if times > 0 {
                        log::warn!("{}", sentence(number, times, thread));
                    }
                }
                // A domain that tries again and again is said once a second.
                std::thread::sleep(std::time::Duration::from_secs(1));
            }
        };
        std::thread::Builder::new().name("refusals".to_owned()).spawn(say).map(drop)
    }
}

fn sentence(number: usize, times: u32, thread: i32) -> String {
    let named = NAMES.iter().find(|(call, _)| usize::try_from(*call) == Ok(number));
    let name = named.map_or_else(|| number.to_string(), |(_, name)| format!("`{name}`"));
    let thread = fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
    let thread =
        thread.map_or_else(|_| "one that has ended".to_owned(), |name| name.trim().to_owned());
    format!("the sandbox has refused system call {name} ({times} times, last to thread {thread})")
}
