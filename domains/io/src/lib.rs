//! What domains that keep their data in files have in common.
//!
//! - [`file_io`]: opening images and devices, their alignment and locks, reads and writes straight
//!   from and to guest memory.
//! - [`uring`]: the same without a thread per request.
//!
//! Deliberately absent: which file, which policy, what a request means; that is the domain's.

pub mod file_io;
pub mod uring;
