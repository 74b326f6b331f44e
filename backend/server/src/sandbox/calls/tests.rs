//! The lists, and what the filters that are made of them say to a call.

use super::*;
use rustix::io::Errno;
use rustix::process::{Pid, Resource, getrlimit, prlimit};
use rustix::thread::set_no_new_privs;

fn tcp() -> Sandbox {
    let (connects, ports) = (true, vec![1]);
    Sandbox { enforces: true, connects, ports, by_address: true, ..Sandbox::default() }
}

fn unix() -> Sandbox {
    let sockets = vec!["/run/nbd/socket".into()];
    Sandbox { enforces: true, connects: true, sockets, ..Sandbox::default() }
}

fn file(rings: Option<bool>) -> Sandbox {
    Sandbox { enforces: true, files: vec!["/x".into()], rings, ..Sandbox::default() }
}

/// Each with what it has the most.
fn all() -> [Sandbox; 6] {
    let names = Sandbox { by_address: false, ..tcp() };
    let log = Sandbox { enforces: false, ..names.clone() };
    [Sandbox { enforces: true, ..Sandbox::default() }, file(None), unix(), tcp(), names, log]
}

#[test]
fn no_call_is_listed_twice() {
    for sandbox in all() {
        let mut with_conditions = Rules::new();
        rules::add(&mut with_conditions, &sandbox).unwrap();
        let conditional = with_conditions.into_keys().chain([libc::SYS_clone]);
        let all = ALLOWED.iter().chain(ALLOWED_HERE).chain(&URING).copied();
        let mut all: Vec<_> = all.chain(conditional).collect();
        let len = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), len, "a call is listed twice");
    }
}

#[test]
fn what_makes_a_process_or_reaches_out_is_on_no_list() {
    let rules = allowed(&Sandbox::default(), false).unwrap();
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
        libc::SYS_setpriority,
        libc::SYS_sendmmsg,
    ] {
        assert!(!rules.contains_key(&call), "{call}");
    }
    for call in [libc::SYS_clone, libc::SYS_prlimit64, libc::SYS_ioctl, libc::SYS_socketpair] {
        assert!(!rules[&call].is_empty(), "{call}: it has a condition");
    }
    assert!(compiled(rules, SeccompAction::Trap, SeccompAction::Allow).unwrap().len() > 100);
}

/// What is refused by a filter of its own is just what the other leaves to it.
#[test]
fn what_is_refused_quietly_is_left_to_a_filter_of_its_own() {
    for sandbox in all().into_iter().filter(|sandbox| sandbox.enforces) {
        let logged = Sandbox { enforces: false, ..sandbox.clone() };
        let (enforced, logged) = (allowed(&sandbox, false), allowed(&logged, false));
        let (enforced, mut logged) = (enforced.unwrap(), logged.unwrap());
        for (call, rules) in refused_quietly(&sandbox, false).unwrap() {
            logged.entry(call).or_default().extend(rules);
        }
        assert_eq!(enforced, logged);
    }
}

#[test]
fn rings_are_for_who_asks_or_where_landlock_looks_at_sockets() {
    let has = |rings, looks| has_rings(&file(rings), looks);
    assert_eq!(
        [has(None, false), has(Some(true), false), has(Some(false), true)],
        [false, true, false]
    );
    assert!(has(None, true) && !has_rings(&Sandbox::default(), true));
}

/// What a filter says to a call: runs it, as far as its instructions are used here
/// (linux/bpf_common.h).
fn answer(filter: &BpfProgram, call: c_long, arguments: &[u64]) -> u32 {
    const ARCHITECTURE: u32 = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };
    let mut data = vec![call as u32, ARCHITECTURE, 0, 0];
    for argument in arguments.iter().copied().chain([0; 6]).take(6) {
        data.extend([argument as u32, (argument >> 32) as u32]);
    }
    let (mut at, mut value) = (0, 0_u32);
    loop {
        let one = &filter[at];
        at += 1;
        let jumps = |is_so| usize::from(if is_so { one.jt } else { one.jf });
        match one.code {
            0x20 => value = data[one.k as usize / 4],
            0x54 => value &= one.k,
            0x05 => at += one.k as usize,
            0x15 => at += jumps(value == one.k),
            0x25 => at += jumps(value > one.k),
            0x35 => at += jumps(value >= one.k),
            0x06 => return one.k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

const ALLOWS: u32 = libc::SECCOMP_RET_ALLOW;
const TRAPS: u32 = libc::SECCOMP_RET_TRAP;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

/// What all filters together say: the strictest of them holds.
fn decide(sandbox: &Sandbox, call: c_long, arguments: &[u64]) -> u32 {
    let (filters, _) = filters(sandbox, false).unwrap();
    let answers = filters.iter().map(|filter| answer(filter, call, arguments));
    answers.min().expect("there is a filter")
}

fn assert_says(sandbox: &Sandbox, expected: u32, calls: &[(c_long, &[u64])]) {
    for (call, arguments) in calls {
        let said = decide(sandbox, *call, arguments);
        assert_eq!(said, expected, "{call} {arguments:#x?} of {sandbox:?}");
    }
}

fn enforcing() -> impl Iterator<Item = Sandbox> {
    all().into_iter().filter(|sandbox| sandbox.enforces)
}

/// The same user suffices for all of this.
#[test]
fn other_processes_are_left_alone() {
    let own = u64::from(std::process::id());
    let (other, all_of_them) = (own + 1, u64::MAX);
    for sandbox in enforcing() {
        assert_says(
            &sandbox,
            ALLOWS,
            &[
                (libc::SYS_prlimit64, &[0, 0, 1, 1]),
                (libc::SYS_sched_setaffinity, &[0]),
                (libc::SYS_tgkill, &[own, own, 6]),
                (libc::SYS_kill, &[own, 9]),
                // Whether it is there.
                (libc::SYS_kill, &[other, 0]),
            ],
        );
        assert_says(
            &sandbox,
            TRAPS,
            &[
                (libc::SYS_prlimit64, &[other, 0, 1]),
                (libc::SYS_prlimit64, &[own, 0, 1]),
                (libc::SYS_sched_setaffinity, &[other]),
                (libc::SYS_setpriority, &[2, 0, 19]),
                (libc::SYS_tgkill, &[other, other, 9]),
                (libc::SYS_kill, &[other, 9]),
                (libc::SYS_kill, &[0, 9]),
                (libc::SYS_kill, &[all_of_them, 9]),
                (libc::SYS_fcntl, &[3, libc::F_SETOWN as u64, other]),
                (libc::SYS_fcntl, &[3, 15, 1]),
                (libc::SYS_fcntl, &[3, 10, 9]),
            ],
        );
    }
    let (_, of_workers) = filters(&tcp(), false).unwrap();
    for of_any in [&[own, 9], &[other, 0]] {
        assert_eq!(answer(&of_workers, libc::SYS_kill, of_any), TRAPS);
    }
}

/// And the kernel hears it so.
#[test]
fn a_limit_of_another_process_is_not_set() {
    super::super::trap::install().unwrap().forget();
    let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let other = Some(Pid::from_child(&child));
    let limit = getrlimit(Resource::Core);
    let set = move |pid| prlimit(pid, Resource::Core, limit).map(drop);
    assert_eq!(set(other), Ok(()));
    let (filters, _) = filters(&tcp(), false).unwrap();
    let thread = std::thread::spawn(move || {
        set_no_new_privs(true).unwrap();
        filters.iter().try_for_each(|filter| apply_filter(filter)).unwrap();
        (set(other), set(None))
    });
    assert_eq!(thread.join().unwrap(), (Err(Errno::PERM), Ok(())));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_terminal_is_not_typed_into() {
    const BLKDISCARD: u64 = 0x1277;
    const BLKGETSIZE64: u64 = 0x8008_1272;
    const TIOCLINUX: u64 = 0x541c;
    const KDSKBENT: u64 = 0x4b47;
    for sandbox in enforcing() {
        let asks = |request| decide(&sandbox, libc::SYS_ioctl, &[2, request]);
        for request in [libc::TCGETS, libc::FIONBIO, BLKDISCARD, BLKGETSIZE64] {
            assert_eq!(asks(request), ALLOWS, "{request:#x}");
        }
        // The kernel does not look at the upper half.
        let above = 1 << 32 | libc::TIOCSTI;
        for request in [libc::TIOCSTI, above, TIOCLINUX, libc::TIOCSCTTY, libc::TCSETS, KDSKBENT] {
            assert_eq!(asks(request), TRAPS, "{request:#x}");
        }
    }
}

const UNIX: u64 = libc::AF_UNIX as u64;
const STREAM: u64 = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
const DATAGRAM: u64 = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64;
const INET: [u64; 2] = [libc::AF_INET as u64, libc::AF_INET6 as u64];

#[test]
fn a_pair_sends_to_itself_only() {
    const PACKETS: u64 = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
    for sandbox in enforcing() {
        assert_says(&sandbox, ALLOWS, &[(libc::SYS_socketpair, &[UNIX, PACKETS])]);
        assert_says(
            &sandbox,
            TRAPS,
            &[
                (libc::SYS_socketpair, &[UNIX, DATAGRAM]),
                (libc::SYS_socketpair, &[UNIX, STREAM]),
                (libc::SYS_socketpair, &[UNIX, libc::SOCK_RAW as u64]),
            ],
        );
    }
}

#[test]
fn sockets_are_of_the_kind_that_a_uri_names() {
    let names = Sandbox { by_address: false, ..tcp() };
    let socket =
        |sandbox: &Sandbox, arguments: &[u64]| decide(sandbox, libc::SYS_socket, arguments);
    for sandbox in [&file(Some(true)), &file(None)] {
        assert_eq!(socket(sandbox, &[UNIX, STREAM]), TRAPS);
        assert_eq!(decide(sandbox, libc::SYS_connect, &[]), TRAPS);
    }
    assert_eq!(socket(&unix(), &[UNIX, STREAM]), ALLOWS);
    assert_eq!(socket(&unix(), &[UNIX, DATAGRAM]), TRAPS);
    for family in INET {
        assert_eq!(socket(&unix(), &[family, STREAM]), TRAPS);
        for sandbox in [&tcp(), &names] {
            assert_eq!(socket(sandbox, &[family, STREAM]), ALLOWS);
            assert_eq!(socket(sandbox, &[family, STREAM, libc::IPPROTO_TCP as u64]), ALLOWS);
            assert_eq!(socket(sandbox, &[family, STREAM, libc::IPPROTO_MPTCP as u64]), TRAPS);
            assert_eq!(socket(sandbox, &[family, libc::SOCK_RAW as u64, 1]), TRAPS);
        }
        assert_eq!(socket(&tcp(), &[family, DATAGRAM]), TRAPS, "there is no name");
        assert_eq!(socket(&names, &[family, DATAGRAM]), ALLOWS);
    }
    assert_eq!(socket(&tcp(), &[UNIX, STREAM]), TRAPS);
    assert_eq!(socket(&tcp(), &[libc::AF_NETLINK as u64, libc::SOCK_RAW as u64]), TRAPS);
    // What the C library does without is not worth a word.
    assert_eq!(socket(&names, &[UNIX, STREAM]), EPERM);
    assert_eq!(socket(&names, &[libc::AF_NETLINK as u64, libc::SOCK_RAW as u64]), EPERM);
}

/// The C library asks for both kinds of addresses at once.
#[test]
fn names_are_looked_up_where_there_are_some() {
    let names = Sandbox { by_address: false, ..tcp() };
    let asks = |sandbox: &Sandbox, flags| decide(sandbox, libc::SYS_sendmmsg, &[3, 0, 2, flags]);
    assert_eq!(asks(&names, libc::MSG_NOSIGNAL as u64), ALLOWS);
    for sandbox in [&tcp(), &unix(), &file(Some(true)), &file(None)] {
        assert_eq!(asks(sandbox, 0), TRAPS);
    }
}

/// What is sent connects as well, with a flag that Landlock does not know.
#[test]
fn what_is_sent_does_not_connect() {
    let (plain, fast) = (libc::MSG_NOSIGNAL as u64, libc::MSG_FASTOPEN as u64);
    for sandbox in [tcp(), Sandbox { by_address: false, ..tcp() }] {
        assert_says(
            &sandbox,
            ALLOWS,
            &[(libc::SYS_sendto, &[3, 0, 0, plain]), (libc::SYS_sendmsg, &[3, 0, plain])],
        );
        assert_says(
            &sandbox,
            TRAPS,
            &[
                (libc::SYS_sendto, &[3, 0, 0, plain | fast]),
                (libc::SYS_sendmsg, &[3, 0, fast]),
                (libc::SYS_sendmmsg, &[3, 0, 1, fast]),
            ],
        );
    }
}

#[test]
fn a_ring_that_is_not_asked_for_is_refused_quietly() {
    let setup = |sandbox: &Sandbox| decide(sandbox, libc::SYS_io_uring_setup, &[2, 0]);
    assert_eq!(
        [None, Some(true), Some(false)].map(|rings| setup(&file(rings))),
        [EPERM, ALLOWS, TRAPS]
    );
    assert_eq!([tcp(), unix()].map(|sandbox| setup(&sandbox)), [EPERM; 2]);
    assert_eq!(setup(&Sandbox { enforces: true, ..Sandbox::default() }), TRAPS);
}
