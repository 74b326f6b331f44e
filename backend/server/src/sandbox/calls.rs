//! seccomp: which system calls a confined process can do.
//!
//! The list is made of traces, see `backend/decisions/0073-system-calls-from-traces.md`, and of
//! what else leads out, see `backend/decisions/0075-what-the-sandbox-leaves-open.md`. There are two
//! lists: what is let through in any thread, some of it with some arguments only (`rules`), and
//! what is not in those that serve queues, where requests are, and most of a domain's code.
//!
//! What is refused ends with EPERM, and is said (`trap`), but for what libraries try and do
//! without, and what makes a process: that ends with EPERM without a word, because the C library
//! does it with all signals blocked, where SIGSYS would be the end. `clone3` ends with ENOSYS: what
//! it is to make is not in its arguments, and the C library asks with `clone` then, where it is.

mod rules;

use channel::Sandbox;
use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompFilter, SeccompRule, apply_filter,
};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::OnceLock;

/// With any arguments, in all threads.
const ALLOWED: &[c_long] = &[
    // Files and descriptors. Which files, is Landlock's part.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_dup,
    libc::SYS_flock,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_fgetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_memfd_create,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_pipe2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_pidfd_open,
    // Sockets that there are; what they send has conditions.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_membarrier,
    // Threads, time, signals.
    libc::SYS_clone3,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpriority,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getrandom,
    libc::SYS_uname,
    libc::SYS_sysinfo,
];

/// The same, of this processor alone.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_arch_prctl,
    libc::SYS_time,
    libc::SYS_getrlimit,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[c_long] = &[];

/// What a ring is asked for is not in a system call's arguments.
const URING: [c_long; 3] =
    [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// What makes a process, or another one of this.
const PROCESSES: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Whether files are served with io_uring. A ring connects and sends as well, and neither seccomp
/// nor Landlock's older levels look there: so it is for who asks for it, and where sockets with a
/// path are looked at.
fn has_rings(sandbox: &Sandbox, looks_at_sockets: bool) -> bool {
    !sandbox.files.is_empty() && sandbox.rings.unwrap_or(looks_at_sockets)
}

/// What all threads may do. No call is in it twice, once with conditions and once without.
fn allowed(sandbox: &Sandbox, has_rings: bool) -> Result<Rules, BackendError> {
    let any = ALLOWED.iter().chain(ALLOWED_HERE).copied();
    let uring = URING.into_iter().filter(|_| has_rings);
    let mut rules: Rules = any.chain(uring).map(|call| (call, Vec::new())).collect();
    rules::add(&mut rules, sandbox)?;
    rules.insert(libc::SYS_clone, vec![rules::clone_of(libc::CLONE_THREAD as u64)?]);
    if sandbox.enforces {
        // Refused by a filter of their own: the stricter of two refusals would hold.
        for (call, conditions) in refused_quietly(sandbox, has_rings)? {
            match rules.entry(call) {
                Entry::Vacant(entry) => drop(entry.insert(Vec::new())),
                // Clones and sockets of some kinds.
                Entry::Occupied(mut entry) => entry.get_mut().extend(conditions),
            }
        }
    }
    Ok(rules)
}

/// What is refused without a word, because libraries try it: making a process, with all signals
/// blocked; rings, where they may be had or not; and what looking up a name can do without.
fn refused_quietly(sandbox: &Sandbox, has_rings: bool) -> Result<Rules, BackendError> {
    let mut rules: Rules = PROCESSES.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_clone, vec![rules::clone_of(0)?]);
    let tries_rings = !sandbox.files.is_empty() && sandbox.rings.is_none() || sandbox.connects;
    if tries_rings && !has_rings {
        rules.extend(URING.map(|call| (call, Vec::new())));
    }
    if sandbox.looks_names_up() {
        rules.insert(libc::SYS_socket, rules::of_names(sandbox)?);
    }
    Ok(rules)
}

/// What threads that serve queues may not do, nor those that they start, as for a takeover: bring
/// new code in, and send signals to the process or ask for others.
fn of_workers() -> Result<Rules, BackendError> {
    let mut rules = Rules::from([(libc::SYS_kill, Vec::new())]);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rules::executes()?]);
    }
    Ok(rules)
}

fn compiled(
    rules: Rules,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let processor = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, otherwise, matching, processor)?.try_into()
}

/// The filters of all threads, in their order, and that of those that serve queues.
fn filters(
    sandbox: &Sandbox,
    looks_at_sockets: bool,
) -> Result<(Vec<BpfProgram>, BpfProgram), BackendError> {
    let has_rings = has_rings(sandbox, looks_at_sockets);
    let refuse = || if sandbox.enforces { SeccompAction::Trap } else { SeccompAction::Log };
    let mut of_all = Vec::new();
    if sandbox.enforces {
        let clone3 = Rules::from([(libc::SYS_clone3, Vec::new())]);
        let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
        of_all.push(compiled(clone3, SeccompAction::Allow, unknown)?);
        let refused = SeccompAction::Errno(libc::EPERM as u32);
        let quietly = refused_quietly(sandbox, has_rings)?;
        of_all.push(compiled(quietly, SeccompAction::Allow, refused)?);
    }
    of_all.push(compiled(allowed(sandbox, has_rings)?, refuse(), SeccompAction::Allow)?);
    Ok((of_all, compiled(of_workers()?, SeccompAction::Allow, refuse())?))
}

/// What threads that serve queues put on.
static OF_WORKERS: OnceLock<BpfProgram> = OnceLock::new();

/// Restricts the calling thread, and those that it starts. What is not allowed is refused, or only
/// written into the kernel's log. `looks_at_sockets`: whether Landlock refuses to connect to
/// sockets with a path.
pub(super) fn restrict(
    sandbox: &Sandbox,
    looks_at_sockets: bool,
) -> Result<(), seccompiler::Error> {
    let (of_all, of_workers) = filters(sandbox, looks_at_sockets)?;
    of_all.iter().try_for_each(|filter| apply_filter(filter))?;
    let _ = OF_WORKERS.set(of_workers);
    Ok(())
}

/// Restricts the calling thread, which serves a queue, further; if the process is confined.
pub fn serve_queue() {
    thread_local!(static IS_DONE: Cell<bool> = const { Cell::new(false) });
    let Some(filter) = OF_WORKERS.get().filter(|_| !IS_DONE.replace(true)) else { return };
    if let Err(error) = apply_filter(filter) {
        log::error!("a queue's thread is not confined further than the others: {error}");
    }
}

#[cfg(test)]
mod tests;
