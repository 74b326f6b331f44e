//! End-to-end tests: the shipped binaries, driven from outside, as a guest and an operator would.
//!
//! The crate links none of the product. It starts `vhost-hotswap`, talks to it over its two sockets
//! and believes only what comes back, so a fault that both sides share cannot hide here.
//!
//! `HOTSWAP_BIN_DIR` says where the binaries and modules are, if not in the release directory;
//! `HOTSWAP_SEED` repeats the random numbers of a load; `HOTSWAP_QEMU_ROOT` is the root directory
//! of another Debian, whose QEMU and kernel the guests then run with.
//!
//! - [`ceph`]: a Ceph of one node.
//! - [`daemon`]: starts and ends the daemon, runs `hotswapctl`, speaks JSON-RPC by hand.
//! - [`client`]: a vhost-user-blk driver in user space, for full speed and for exact timing.
//! - [`debian`]: whose QEMU and kernel: the system's, or those of another Debian in a directory.
//! - [`guest`]: a real Linux guest in QEMU, with [`initramfs`] for what it boots.
//! - [`loopback`]: loop devices and file systems of the host.
//! - [`manager`]: a service manager that keeps descriptors.
//! - [`modules`]: modules that only tests have.
//! - [`nbd`]: NBD servers.
//! - [`operator`]: upgrades a daemon and keeps books, to hold `status` against.
//! - [`peer`]: the backend that is compared with.
//! - [`power`]: a disk that forgets what was not synced when its power is cut.
//! - [`signer`]: signs modules.
//! - [`stamp`]: blocks that say what they are, and the load that checks every one of them.

pub mod ceph;
pub mod client;
pub mod daemon;
pub mod debian;
pub mod guest;
pub mod initramfs;
pub mod loopback;
pub mod manager;
pub mod modules;
pub mod nbd;
pub mod operator;
pub mod peer;
pub mod power;
pub mod signer;
pub mod stamp;

/// How long a test waits for what has to come: longer than a host takes that has far more to do
/// than it can.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_mins(1);
