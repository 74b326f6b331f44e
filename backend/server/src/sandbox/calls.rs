//! seccomp: which system calls a confined process can do.
//!
//! The list is made of traces, see `backend/decisions/0073-system-calls-from-traces.md`. There are
//! two lists: what is let through in any thread, and what is not in those that serve queues, where
//! requests are, and most of a domain's code.
//!
//! What is refused ends with EPERM, and is said (`trap`), but for what makes a process: that ends
//! with EPERM without a word, because the C library does it with all signals blocked, where SIGSYS
//! would be the end. `clone3` ends with ENOSYS: what it is to make is not in its arguments, and the
//! C library asks with `clone` then, where it is.

use channel::Sandbox;
use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
};
use std::cell::Cell;
use std::collections::BTreeMap;
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
    libc::SYS_fcntl,
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
    libc::SYS_ioctl,
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
    // Sockets that there are.
    libc::SYS_socketpair,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
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
    libc::SYS_sched_setaffinity,
    libc::SYS_setpriority,
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
    // To itself; Landlock refuses others.
    libc::SYS_kill,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getrandom,
    libc::SYS_prlimit64,
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

/// Where there is a file to serve: what it is asked for is not in a system call's arguments.
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

/// What the C library, Rust and the filters themselves set.
const PRCTL: [libc::c_int; 5] = [
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_SET_VMA,
    libc::PR_SET_TIMERSLACK,
];

fn condition(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, length, operator, value)?])
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What all threads may do. No call is in it twice, once with conditions and once without.
fn allowed(sandbox: &Sandbox) -> Result<Rules, BackendError> {
    let any = ALLOWED.iter().chain(ALLOWED_HERE).copied();
    let uring = URING.into_iter().filter(|_| !sandbox.files.is_empty());
    let connect = [libc::SYS_connect].into_iter().filter(|_| sandbox.connects);
    let mut rules: Rules = any.chain(uring).chain(connect).map(|call| (call, Vec::new())).collect();
    if sandbox.enforces {
        // Refused by a filter of their own: the stricter of two refusals would hold.
        let processes = PROCESSES.iter().map(|call| (*call, Vec::new()));
        rules.extend(processes.chain([(libc::SYS_clone, Vec::new())]));
    } else {
        rules.insert(libc::SYS_clone, vec![clone_of(libc::CLONE_THREAD as u64)?]);
    }
    let set = PRCTL.into_iter().map(|option| equal(0, option as u64));
    rules.insert(libc::SYS_prctl, set.collect::<Result<_, _>>()?);
    let filter = libc::SECCOMP_SET_MODE_FILTER;
    rules.insert(libc::SYS_seccomp, vec![equal(0, u64::from(filter))?]);
    if sandbox.connects {
        let mut families = vec![libc::AF_UNIX];
        if !sandbox.ports.is_empty() {
            families.extend([libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]);
        }
        let families = families.into_iter().map(|family| equal(0, family as u64));
        rules.insert(libc::SYS_socket, families.collect::<Result<_, _>>()?);
    }
    Ok(rules)
}

/// A `clone` whose flag for threads is `flag`: a thread's, or none, which makes a process.
fn clone_of(flag: u64) -> Result<SeccompRule, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64);
    condition(0, SeccompCmpArgLen::Qword, operator, flag)
}

/// What makes a process.
fn processes() -> Result<Rules, BackendError> {
    let mut rules: Rules = PROCESSES.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_clone, vec![clone_of(0)?]);
    Ok(rules)
}

/// Of an argument that is an `int`: its upper half is not looked at by the kernel, either.
fn equal(argument: u8, value: u64) -> Result<SeccompRule, BackendError> {
    condition(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

/// What threads that serve queues may not do, nor those that they start, as for a takeover: bring
/// new code in, and send signals.
fn of_workers() -> Result<Rules, BackendError> {
    let mut rules = Rules::from([(libc::SYS_kill, Vec::new())]);
    let exec = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let operator = SeccompCmpOp::MaskedEq(exec);
        rules.insert(call, vec![condition(2, SeccompCmpArgLen::Dword, operator, exec)?]);
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

/// What threads that serve queues put on.
static OF_WORKERS: OnceLock<BpfProgram> = OnceLock::new();

/// Restricts the calling thread, and those that it starts. What is not allowed is refused, or only
/// written into the kernel's log.
pub(super) fn restrict(sandbox: &Sandbox) -> Result<(), seccompiler::Error> {
    let refuse = || if sandbox.enforces { SeccompAction::Trap } else { SeccompAction::Log };
    let allowed = compiled(allowed(sandbox)?, refuse(), SeccompAction::Allow)?;
    let of_workers = compiled(of_workers()?, SeccompAction::Allow, refuse())?;
    if sandbox.enforces {
        let clone3 = Rules::from([(libc::SYS_clone3, Vec::new())]);
        let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
        apply_filter(&compiled(clone3, SeccompAction::Allow, unknown)?)?;
        let refused = SeccompAction::Errno(libc::EPERM as u32);
        apply_filter(&compiled(processes()?, SeccompAction::Allow, refused)?)?;
    }
    apply_filter(&allowed)?;
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
mod tests {
    use super::*;

    #[test]
    fn no_call_is_listed_twice() {
        let sandbox = Sandbox { connects: true, ..Sandbox::default() };
        let conditional = [libc::SYS_clone, libc::SYS_prctl, libc::SYS_seccomp, libc::SYS_socket];
        let all = ALLOWED.iter().chain(ALLOWED_HERE).chain(&URING).chain(&[libc::SYS_connect]);
        let mut all: Vec<_> = all.chain(&conditional).copied().collect();
        let len = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), len, "a call is listed twice");
        let with_a_file = Sandbox { files: vec!["/x".into()], ..sandbox };
        assert_eq!(allowed(&with_a_file).unwrap().len(), len);
    }

    #[test]
    fn what_makes_a_process_or_reaches_out_is_on_no_list() {
        let rules = allowed(&Sandbox::default()).unwrap();
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_ptrace,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
            libc::SYS_unshare,
        ] {
            assert!(!rules.contains_key(&call), "{call}");
        }
        assert_eq!(rules[&libc::SYS_clone].len(), 1, "it has a condition");
        // What is refused by a filter of its own is just what the other leaves to it.
        let enforcing = allowed(&Sandbox { enforces: true, ..Sandbox::default() }).unwrap();
        let left: Vec<_> = enforcing.keys().filter(|call| !rules.contains_key(call)).collect();
        let refused = processes().unwrap();
        assert!(left.iter().all(|call| refused[call].is_empty()), "{left:?}");
        assert_eq!((left.len() + 1, refused[&libc::SYS_clone].len()), (refused.len(), 1));
        assert!(compiled(rules, SeccompAction::Trap, SeccompAction::Allow).unwrap().len() > 100);
    }
}
