//! What domains that keep their data behind descriptors have in common.
//!
//! - [`file_io`]: opening images and devices, their alignment and locks, reads and writes straight
//!   from and to guest memory.
//! - [`uring`]: the same without a thread per request.
//! - [`socket`]: being woken when a socket is ready; [`tcp`]: whether the other end is there.
//! - [`engine`]: what lies between the host's batches and such storage: what is in flight, what has
//!   to wait for what, and what cannot be done as it is.
//!
//! Deliberately absent: which file, which policy, what a request means; that is the domain's.

mod aligned;
pub mod engine;
pub mod file_io;
pub mod socket;
pub mod tcp;
pub mod uring;

pub use aligned::Aligned;
