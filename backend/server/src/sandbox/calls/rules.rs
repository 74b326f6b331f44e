//! Calls that are let through with some arguments only.
//!
//! A rule holds if all of its conditions do, and a call is let through if one of its rules holds.

use channel::Sandbox;
use libc::{c_int, c_ulong};
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::{BackendError, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::Rules;

type Condition = Result<SeccompCondition, BackendError>;

/// Of an argument that is an `int`: its upper half is not looked at by the kernel, either.
fn is(argument: u8, value: u64) -> Condition {
    SeccompCondition::new(argument, Dword, SeccompCmpOp::Eq, value)
}

fn is_not(argument: u8, value: u64) -> Condition {
    SeccompCondition::new(argument, Dword, SeccompCmpOp::Ne, value)
}

/// Of these bits, the argument has just those of `value`.
fn has(argument: u8, bits: u64, value: u64) -> Condition {
    SeccompCondition::new(argument, Dword, SeccompCmpOp::MaskedEq(bits), value)
}

fn rule<const N: usize>(conditions: [Condition; N]) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.into_iter().collect::<Result<_, _>>()?)
}

/// What the C library, Rust and the filters themselves set.
const PRCTL: [c_int; 5] = [
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_SET_VMA,
    libc::PR_SET_TIMERSLACK,
];

/// What is asked of any descriptor, and of a terminal: to type into one is another.
const IOCTLS: [c_ulong; 7] = [
    libc::FIONBIO,
    libc::FIONREAD,
    libc::FIOCLEX,
    libc::FIONCLEX,
    libc::TCGETS,
    libc::TCGETS2,
    libc::TIOCGWINSZ,
];
/// A number of an ioctl has whose it is there (asm-generic/ioctl.h).
const OF: u64 = 0xff00;
/// Block devices' (linux/fs.h).
const BLOCK: u64 = 0x12 << 8;

/// Descriptors that send signals, to any process of the user.
const SIGNALLING: [c_int; 3] = [libc::F_SETOWN, F_SETSIG, F_SETOWN_EX];
/// asm-generic/fcntl.h
const F_SETSIG: c_int = 10;
/// asm-generic/fcntl.h
const F_SETOWN_EX: c_int = 15;

/// A socket's type without its flags.
const TYPE: u64 = 0xf;

/// Adds them.
pub(super) fn add(rules: &mut Rules, sandbox: &Sandbox) -> Result<(), BackendError> {
    let set = PRCTL.into_iter().map(|option| rule([is(0, option as u64)]));
    rules.insert(libc::SYS_prctl, set.collect::<Result<_, _>>()?);
    let filter = u64::from(libc::SECCOMP_SET_MODE_FILTER);
    rules.insert(libc::SYS_seccomp, vec![rule([is(0, filter)])?]);
    let ioctls = IOCTLS.into_iter().map(|request| rule([is(1, request)]));
    let ioctls = ioctls.chain([rule([has(1, OF, BLOCK)])]);
    rules.insert(libc::SYS_ioctl, ioctls.collect::<Result<_, _>>()?);
    let signals = SIGNALLING.map(|command| is_not(1, command as u64));
    rules.insert(libc::SYS_fcntl, vec![rule(signals)?]);
    of_processes(rules)?;
    of_sockets(rules, sandbox)
}

/// What could be done to other processes, with no more right than the same user.
fn of_processes(rules: &mut Rules) -> Result<(), BackendError> {
    // As this process is called in the PID namespace that it is in.
    let own = u64::from(std::process::id());
    for call in [libc::SYS_prlimit64, libc::SYS_sched_setaffinity] {
        rules.insert(call, vec![rule([is(0, 0)])?]);
    }
    rules.insert(libc::SYS_tgkill, vec![rule([is(0, own)])?]);
    // Whether another one is there may be asked.
    rules.insert(libc::SYS_kill, vec![rule([is(0, own)])?, rule([is(1, 0)])?]);
    Ok(())
}

/// The channel's pair; and what is connected.
fn of_sockets(rules: &mut Rules, sandbox: &Sandbox) -> Result<(), BackendError> {
    let kind = |argument, kind: c_int| has(argument, TYPE, kind as u64);
    // A datagram of one that is of a pair could be sent to any other.
    let pair = [is(0, libc::AF_UNIX as u64), kind(1, libc::SOCK_SEQPACKET)];
    rules.insert(libc::SYS_socketpair, vec![rule(pair)?]);
    let mut sending = vec![(libc::SYS_sendto, 3), (libc::SYS_sendmsg, 2)];
    if sandbox.looks_names_up() {
        // The questions for both kinds of addresses go out together.
        sending.push((libc::SYS_sendmmsg, 3));
    }
    for (call, flags) in sending {
        // It connects as well, and Landlock does not look there.
        let fast_open = has(flags, libc::MSG_FASTOPEN as u64, 0);
        let rules_of_it = if sandbox.ports.is_empty() { vec![] } else { vec![rule([fast_open])?] };
        rules.insert(call, rules_of_it);
    }
    if !sandbox.connects {
        return Ok(());
    }
    rules.insert(libc::SYS_connect, Vec::new());
    let mut sockets = Vec::new();
    let mut allow = |family: c_int, of: c_int, protocols: &[c_int]| {
        for protocol in protocols {
            let protocol = is(2, *protocol as u64);
            sockets.push(rule([is(0, family as u64), kind(1, of), protocol])?);
        }
        Ok::<_, BackendError>(())
    };
    if sandbox.connects_to_paths() {
        allow(libc::AF_UNIX, libc::SOCK_STREAM, &[0])?;
    }
    for family in [libc::AF_INET, libc::AF_INET6] {
        // Of other streams Landlock does not look at the port.
        if !sandbox.ports.is_empty() {
            allow(family, libc::SOCK_STREAM, &[0, libc::IPPROTO_TCP])?;
        }
        if sandbox.looks_names_up() {
            allow(family, libc::SOCK_DGRAM, &[0, libc::IPPROTO_UDP])?;
        }
    }
    rules.insert(libc::SYS_socket, sockets);
    Ok(())
}

/// What the C library tries when it looks a name up, and does without: asking its cache, and which
/// networks there are.
pub(super) fn of_names(sandbox: &Sandbox) -> Result<Vec<SeccompRule>, BackendError> {
    let unix = (!sandbox.connects_to_paths()).then_some(libc::AF_UNIX);
    let families = [libc::AF_NETLINK].into_iter().chain(unix);
    families.map(|family| rule([is(0, family as u64)])).collect()
}

/// A `clone` whose flag for threads is `flag`: a thread's, or none, which makes a process.
pub(super) fn clone_of(flag: u64) -> Result<SeccompRule, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64);
    rule([SeccompCondition::new(0, Qword, operator, flag)])
}

/// Memory that is executed, of `mmap` and `mprotect`.
pub(super) fn executes() -> Result<SeccompRule, BackendError> {
    rule([has(2, libc::PROT_EXEC as u64, libc::PROT_EXEC as u64)])
}
