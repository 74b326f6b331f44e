//! Fuzzing of what other processes say: a frontend, a server, a supervisor, an NBD server, and what
//! a process has left in an in-flight region.
//!
//! Each target is a module with one function, `one_input`, that takes any bytes at all as a script
//! ([`input`]), carries it out, and panics where an invariant does not hold. cargo-fuzz calls it
//! (`fuzz_targets`, by `scripts/fuzz`), and so does the stable toolchain: `tests/bounded.rs` for
//! some seconds, and the binary `stable` for as long as one likes.

pub mod channel_server;
pub mod channel_supervisor;
pub mod frontend_side;
pub mod inflight_recovery;
pub mod input;
pub mod nbd_server;
pub mod packets;
pub mod pool;
pub mod random;
pub mod said;
pub mod server_side;
#[path = "../../server/src/supervised/told.rs"]
#[allow(dead_code, unreachable_pub)]
mod told;
#[path = "../../server/src/supervised/vault.rs"]
#[allow(dead_code, unreachable_pub)]
mod vault;

/// What the vault's file takes from its crate.
mod sync {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: that of its module, its corpus and its binary.
    pub name: &'static str,
    /// Carries a script out.
    pub one_input: fn(&[u8]),
}

/// All targets.
pub const TARGETS: [Target; 6] = [
    Target { name: "frontend_side", one_input: frontend_side::one_input },
    Target { name: "server_side", one_input: server_side::one_input },
    Target { name: "channel_server", one_input: channel_server::one_input },
    Target { name: "channel_supervisor", one_input: channel_supervisor::one_input },
    Target { name: "inflight_recovery", one_input: inflight_recovery::one_input },
    Target { name: "nbd_server", one_input: nbd_server::one_input },
];
