//! A server confines itself, before any code of a module runs in it: what it does not need it
//! cannot do any more, whatever a module, or a guest by way of one, wants.
//!
//! By file: `grants` (what a command line gives it), `paths` (Landlock: files, ports, signals),
//! `calls` (seccomp: system calls), `trap` (what is said of those that are refused).
//!
//! The supervisor is not confined: it starts programs, and opens what nobody else can. What a
//! server gets from it are descriptors, which need no right to a path.
//!
//! Invariant: it is entered by the only thread, so that there is none that it does not hold for.
//!
//! Deliberately absent: a way out.

mod calls;
mod grants;
mod paths;
mod trap;

pub use calls::serve_queue;
pub use grants::of as grants;

use channel::Sandbox;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use serde::Serialize;
use std::io;
use std::os::fd::BorrowedFd;

/// How a server is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Mode {
    /// What it does not need is refused
    On,
    /// It is not
    #[default]
    Off,
    /// System calls that would be refused are written into the kernel's log, and nothing is refused
    Log,
}

/// What holds, as `status` says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Enforced {
    mode: &'static str,
    /// The level of Landlock whose rules hold; none if the kernel has none.
    landlock: Option<i32>,
    /// `enforced`, or `logged`; none if there is no filter.
    seccomp: Option<&'static str>,
    no_new_privs: bool,
    /// Whether it may have any.
    capabilities: bool,
    /// How many system calls were refused to this server.
    refused: u64,
}

impl Enforced {
    /// A process that is not confined.
    pub const NOTHING: Self = Self {
        mode: "off",
        landlock: None,
        seccomp: None,
        no_new_privs: false,
        capabilities: true,
        refused: 0,
    };

    /// Whether the process has done as it was told.
    #[must_use]
    pub fn is_any(&self) -> bool {
        *self != Self::NOTHING
    }

    /// As it is now.
    #[must_use]
    pub fn now(&self) -> Self {
        Self { refused: trap::count(), ..self.clone() }
    }
}

/// Confines this process, of which the caller is the only thread, to `sandbox` and to the files
/// that it was given.
///
/// # Errors
/// In a sentence: it is not confined, or only in part.
pub fn enter(sandbox: &Sandbox, given: &[BorrowedFd<'_>]) -> Result<Enforced, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        format!("the server cannot confine itself ({what}: {error}); --sandbox=off goes without")
    };
    if !sandbox.enforces {
        calls::restrict(sandbox, true).map_err(|error| failed("seccomp", &error))?;
        let (seccomp, no_new_privs) = (Some("logged"), true);
        return Ok(Enforced { mode: "log", seccomp, no_new_privs, ..Enforced::NOTHING });
    }
    set_no_new_privs(true).map_err(|error| failed("no new privileges", &error))?;
    let level = paths::restrict(sandbox, given).map_err(|error| failed("Landlock", &error))?;
    drop_capabilities().map_err(|error| failed("capabilities", &error))?;
    let looks_at_sockets = level >= Some(paths::SOCKETS_LEVEL);
    let reaches_sockets = sandbox.connects_to_paths() || sandbox.rings == Some(true);
    if level < Some(paths::SIGNALS_LEVEL) || !looks_at_sockets && reaches_sockets {
        log::warn!(
            "this kernel has {}, so less is refused than could be{} (status: sandbox)",
            level.map_or("no Landlock".to_owned(), |level| format!("Landlock of level {level}")),
            if reaches_sockets { ": it can connect to each socket of its user" } else { "" }
        );
    }
    let refusals = trap::install().map_err(|error| failed("SIGSYS", &error))?;
    let confined = calls::restrict(sandbox, looks_at_sockets);
    confined.map_err(|error| failed("seccomp", &error))?;
    refusals.say().map_err(|error| failed("a thread", &error))?;
    Ok(Enforced {
        mode: "on",
        landlock: level,
        seccomp: Some("enforced"),
        no_new_privs: true,
        capabilities: false,
        refused: 0,
    })
}

fn drop_capabilities() -> io::Result<()> {
    for capability in CapabilitySet::all().iter() {
        // Not without CAP_SETPCAP, nor of those that the kernel does not know; without privileges
        // that an exec could bring, the set means nothing.
        let _ = remove_capability_from_bounding_set(capability);
    }
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    Ok(set_capabilities(None, none)?)
}
