//! The daemon: vhost-user sessions, queue workers, the control socket.
//!
//! The way of a request: `session` (a frontend connects, rings start) -> `queue` (kick to call) ->
//! the crate `virtqueue` (what the guest wrote) -> the proxy and its domain. The way of an upgrade:
//! the crate `control` (`hotswapctl`, the socket) -> `device` (what a command does) -> the proxy.
//!
//! Invariants: only this crate knows vhost-user; one device per process, one session at a time;
//! nothing that a frontend, a guest or an operator sends ends the process.
//!
//! Deliberately absent: how an upgrade works (`proxy`), what a request means (`virtio-blk`), what a
//! module is (`loader`).

pub mod args;
pub mod cpus;
pub mod device;
mod group;
pub mod inflight;
pub mod limiter;
pub mod log_limit;
pub mod logging;
mod phase;
mod queue;
pub mod raw_fd;
pub mod sandbox;
pub mod second;
pub mod session;
pub mod shutdown;
pub mod signals;
pub mod startup;
pub mod supervised;
pub mod supervision;
mod sync;
#[cfg(test)]
mod testing;
pub mod watching;
