//! Memory that goes from one process to the other.

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;

/// A memfd that can be sealed, and that no program can be executed from: where `vm.memfd_noexec` is
/// 2 there are no others, and Linux 6.3 to 6.5 refuses what does not say so.
///
/// # Errors
/// There is no memory, or no descriptor.
pub fn memfd(name: &str) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 does not know the flag.
        Err(Errno::INVAL) => Ok(memfd_create(name, flags)?),
        other => Ok(other?),
    }
}
