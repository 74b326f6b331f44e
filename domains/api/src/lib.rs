//! What the author of a domain uses, and nothing of the host.
//!
//! A *domain* is a replaceable implementation of a block device, loaded from a shared object. An
//! author implements [`BlockDomain`], a safe trait, and [`export_domain!`](crate::export_domain)
//! puts the type behind the C ABI (`domain-abi`). Helpers for domains that keep data in files are
//! in `domain-io`; `domain-conformance` checks a domain.
//!
//! Deliberately absent: virtio, vhost, guest addresses, epoll, upgrades. A domain sees byte
//! offsets, buffers and storage, and it is told when to let go of them.

mod author;
mod buffer;
mod export;
mod host;
mod image;
mod request;
mod storage;

pub use author::{BlockDomain, QueueContext};
pub use buffer::Buffer;
pub use domain_abi::{
    Capabilities, Claim, DeviceInfo, DomainError, ImageInfo, Level, Params, ParamsError,
    QueueIndex, Status, Swap, parse_size,
};
pub use export::Exported;
pub use host::Host;
pub use image::{Image, ImageWork, Lane};
pub use request::{Batch, Completions, Op, Request, RequestId};
pub use storage::{Region, Storage};

#[doc(hidden)]
pub use domain_abi as abi;
#[doc(hidden)]
pub use export::shim;

/// The examples in the guide for authors, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Guide;
