//! What each signal does to the daemon.
//!
//! Most signals end a process that has said nothing about them. Some of those come although an
//! end is not wanted: a write beyond `RLIMIT_FSIZE` (which a guest can make), a timer of the parent
//! process (timers survive `exec`), a descriptor with `O_ASYNC`, a log line to a terminal. None
//! of them may take a disk away from its guest, so all are ignored unless [`meaning`] gives a
//! reason for something else. To ignore is better than to handle: no system call is interrupted.
//!
//! What was inherited is dealt with, too. A mask is cleared: it comes from a parent that waits for
//! its own signals, and a daemon that has SIGTERM blocked could not be ended. That a signal is
//! ignored is respected where a user says so by it (`nohup`), see [`Meaning::EndUnlessIgnored`].
//!
//! Deliberately absent: what an end is (`shutdown.rs`).

use signal_hook::consts as signals;
use std::ffi::{c_int, c_long, c_ulong};
use std::io;

/// The last signal of Linux.
const LAST: c_int = 64;

/// What a signal does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// The daemon ends in its order.
    End,
    /// The same, unless the parent process had it ignored.
    EndUnlessIgnored,
    /// Nothing. A write or whatever raised it fails with an error instead.
    Ignored,
    /// What the kernel does with it, or what the parent process has made of it.
    Default,
}

/// The table of all signals, 1 to 64.
pub const fn meaning(signal: c_int) -> Meaning {
    match signal {
        // Service managers and people send them. A shell without job control starts what ends in
        // `&` with SIGINT ignored; SIGINT is heeded even so, because a script may send it.
        signals::SIGTERM | signals::SIGINT => Meaning::End,
        // The terminal is gone; `nohup` says that this is no reason.
        signals::SIGHUP => Meaning::EndUnlessIgnored,
        // The soft limit of CPU time: SIGKILL comes at the hard one, and an end in order before it
        // is all that can be saved.
        signals::SIGXCPU => Meaning::EndUnlessIgnored,

        // Asked for by an operator who wants a core dump, and is there for a daemon that hangs.
        signals::SIGQUIT => Meaning::Default,
        // The process is broken: its memory or its code is not what it should be. To go on would
        // put the guest's data at risk, and the core dump has to show where it happened. The
        // kernel kills a process that ignores these when they are raised by an instruction.
        signals::SIGSEGV | signals::SIGBUS | signals::SIGILL | signals::SIGFPE => Meaning::Default,
        // `abort` must not come back; a debugger's breakpoint; a call that seccomp forbids.
        signals::SIGABRT | signals::SIGTRAP | signals::SIGSYS => Meaning::Default,

        // These cannot be changed.
        signals::SIGKILL | signals::SIGSTOP => Meaning::Default,
        // By default nothing, or going on. There are no children.
        signals::SIGCHLD | signals::SIGCONT | signals::SIGURG | signals::SIGWINCH => {
            Meaning::Default
        }

        // A descriptor that cannot be written: the peer is gone, or the limit of a file's size has
        // been reached. The call fails, and its caller knows what to do.
        signals::SIGPIPE | signals::SIGXFSZ => Meaning::Ignored,
        // A disk that stands still is as bad for its guest as one that is gone. The terminal stops
        // its background processes when they write to it, which a log does. SIGSTOP is left for
        // an operator who means it.
        signals::SIGTSTP | signals::SIGTTIN | signals::SIGTTOU => Meaning::Ignored,
        // Timers, notices of descriptors and of power, and what has no meaning but a program's own
        // (SIGUSR1, SIGUSR2, the real-time signals). The daemon uses none of them.
        _ => Meaning::Ignored,
    }
}

/// Has all signals ignored that mean nothing. To be called before anything else.
///
/// What has a handler keeps it: the C library takes some real-time signals for itself.
pub fn ignore_strays() {
    for signal in 1..=LAST {
        if meaning(signal) == Meaning::Ignored
            && handler(signal).is_ok_and(|handler| handler == libc::SIG_DFL)
        {
            // It fails where something below us (valgrind) keeps the signal for itself.
            let _ = ignore(signal);
        }
    }
}

/// The signals that end the daemon.
pub fn ending() -> impl Iterator<Item = c_int> {
    (1..=LAST).filter(|&signal| match meaning(signal) {
        Meaning::End => true,
        Meaning::EndUnlessIgnored => handler(signal).is_ok_and(|handler| handler != libc::SIG_IGN),
        Meaning::Ignored | Meaning::Default => false,
    })
}

/// Has the signals that end the daemon ignored as well: another process ends it.
///
/// # Errors
/// What the kernel says.
pub fn ignore_ending() -> io::Result<()> {
    ending().try_for_each(ignore)
}

/// Holds the signals that end the daemon back from the calling thread: they wait, also for another
/// program in this process, until [`unblock`].
pub fn block_ending() {
    for signal in ending() {
        if let Err(error) = vmm_sys_util::signal::block_signal(signal) {
            log::debug!("signal {signal} is not held back: {error:?}");
        }
    }
}

/// Lets all signals through to the calling thread, and to those that it starts from now on.
///
/// To be called when what ends the daemon is handled: something may have been waiting since before
/// we were started.
pub fn unblock() {
    for signal in 1..=LAST {
        // It fails for those that the C library keeps for itself, and unblocks.
        let _ = vmm_sys_util::signal::unblock_signal(signal);
    }
}

/// `struct sigaction` as the kernel has it. Where there is no `restorer` the mask stands in its
/// place, and the kernel looks no further; all but `handler` is zero here.
#[derive(Default)]
#[repr(C)]
struct KernelAction {
    handler: libc::sighandler_t,
    flags: c_ulong,
    restorer: usize,
    mask: u64,
}

/// The address of a signal's handler, [`libc::SIG_DFL`] or [`libc::SIG_IGN`].
fn handler(signal: c_int) -> io::Result<libc::sighandler_t> {
    let mut old = KernelAction::default();
    change(signal, None, &mut old).map(|()| old.handler)
}

fn ignore(signal: c_int) -> io::Result<()> {
    let new = KernelAction { handler: libc::SIG_IGN, ..KernelAction::default() };
    change(signal, Some(&new), &mut KernelAction::default())
}

/// The bare system call, because the C library's refuses the signals that it keeps for itself.
/// `new` must not have a handler that is called.
fn change(signal: c_int, new: Option<&KernelAction>, old: &mut KernelAction) -> io::Result<()> {
    let new = new.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the kernel reads `new` and writes `old`, both of which are valid for at least the
    // size of its structure, and the length is that of its signal set. `new` is null or has
    // SIG_IGN, so no code of ours becomes a handler.
    let result: c_long = unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            new,
            std::ptr::from_mut(old),
            size_of::<u64>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_that_kills_has_been_thought_about() {
        let with = |what| (1..=LAST).filter(|&signal| meaning(signal) == what).collect::<Vec<_>>();
        assert_eq!(with(Meaning::End), [2, 15]);
        assert_eq!(with(Meaning::EndUnlessIgnored), [1, 24]);
        assert_eq!(with(Meaning::Default), [3, 4, 5, 6, 7, 8, 9, 11, 17, 18, 19, 23, 28, 31]);
        assert_eq!(with(Meaning::Ignored).len(), 64 - 2 - 2 - 14);
    }

    #[test]
    fn strays_are_ignored_in_the_kernel() {
        ignore_strays();
        for signal in (1..=LAST).filter(|&signal| meaning(signal) == Meaning::Ignored) {
            // 33 is the C library's from the first thread on.
            let is_ignored = handler(signal).unwrap() == libc::SIG_IGN;
            assert!(is_ignored || signal == 33, "{signal}");
        }
        for signal in [signals::SIGTERM, signals::SIGABRT, signals::SIGCHLD] {
            assert_ne!(handler(signal).unwrap(), libc::SIG_IGN, "{signal}");
        }
    }
}
