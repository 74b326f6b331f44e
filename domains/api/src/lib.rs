//! The contract between the host and a domain.
//!
//! A *domain* is a replaceable implementation of a block device, loaded from a shared object. This
//! crate is the only thing that host and domain share, and it has three faces:
//!
//! * for authors: [`BlockDomain`], a safe trait, and [`export_domain!`](crate::export_domain),
//!   which puts a type that implements it behind the C ABI;
//! * for the host: [`host::ModuleLoader`] and [`host::Instance`], safe calls through that ABI, and
//!   [`host::HostServices`], what the host offers to an instance;
//! * between the two: [`abi`], C structures with a version and a size in each table, so that a
//!   newer side can add at the end, and [`descriptor`], fixed bytes that describe a module without
//!   running it.
//!
//! Invariants: only plain data crosses ([`abi`]); no panic crosses (each entry point catches what
//! unwinds and turns it into a status); no drop function or trait object made on one side is ever
//! run by the other.
//!
//! Deliberately absent: virtio, vhost, guest addresses, epoll, upgrades. A domain sees byte
//! offsets, buffers and storage, and it is told when to let go of them.

pub mod abi;
mod author;
mod buffer;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod descriptor;
mod export;
pub mod file_io;
pub mod host;
mod params;
mod storage;
#[cfg(feature = "uring")]
pub mod uring;

pub use author::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Host, Level, Op,
    QueueContext, QueueIndex, Request, RequestId, Status, Swap,
};
pub use buffer::Buffer;
pub use export::Exported;
pub use params::{Params, ParamsError, parse_size};
pub use storage::{Region, Storage};

#[doc(hidden)]
pub use export::shim;

/// The examples in the guide for authors, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Guide;
