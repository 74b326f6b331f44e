//! The storage: what outlives instances, and who owns it.
//!
//! - [`SharedHeap`] (`heap.rs`): objects that have an owner, change it, and can be reclaimed.
//! - [`Storage`] (`transaction.rs`): the regions, bytes and files of a device on that heap, moved
//!   to a successor in a transaction that is committed or rolled back.
//! - [`Contents`] (`contents.rs`): all of it at a moment, for another process to go on with.
//!
//! Deliberately absent: what the bytes mean, and when they move. The schema number says which
//! domains know the first; the proxy knows the second.

#![forbid(unsafe_code)]

mod contents;
mod heap;
mod transaction;

pub use contents::{Contents, Filling, Numbered};
/// What regions are made of.
pub use domain_host::HostRegion;
pub use heap::{DomainId, HeapError, RRef, RRefVec, Reclaimed, SharedHeap};
pub use transaction::Storage;
