//! Descriptors that scripts choose from, and a check that none is left open.

use rustix::fs::{MemfdFlags, OFlags, ftruncate, memfd_create};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// A memfd of so many bytes.
#[must_use]
pub fn memfd(len: u64) -> OwnedFd {
    let memfd = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memfd, len).expect("a length");
    memfd
}

/// Things that a peer may send: memory of several sizes, and what is no memory.
#[must_use]
pub fn descriptors() -> Vec<OwnedFd> {
    let mut all: Vec<OwnedFd> = [0, 100, 4096, 8192, 65536].map(memfd).into();
    all.push(File::open("/dev/null").expect("it is there").into());
    all.push(File::open("/").expect("it is there").into());
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    all.push(rustix::event::eventfd(0, flags).expect("an eventfd"));
    all.push(std::io::pipe().expect("a pipe").0.into());
    let path = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, 0.into());
    all.push(path.expect("it is there"));
    all
}

/// The lowest number that is free.
#[must_use]
pub fn lowest_free() -> RawFd {
    let null = File::open("/dev/null").expect("it is there");
    null.as_raw_fd()
}
