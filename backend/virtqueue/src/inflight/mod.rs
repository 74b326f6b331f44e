//! In-flight tracking: which requests a queue has in flight stands in memory that outlives the
//! process, so that the next one runs again what was not answered, and nothing else.
//!
//! The layout and the steps are those of the vhost-user specification, "Inflight I/O tracking",
//! "Queue region" for split virtqueues. The used index of the ring is the one truth: a request has
//! been answered if, and only if, the index has passed its element. A mark says that a request has
//! been taken and not answered, but for the batch that was being published: `last_batch_head` and
//! `next` name its requests, and `used_idx` says whether its marks were cleared. So after any
//! store at all
//!
//! > requests in flight = marks, without the last (used index of the ring - `used_idx`) of the list
//!
//! and the next chain to be taken is at the ring's used index + the number of requests in flight,
//! because chains are marked in the order of the available ring.
//!
//! ```text
//!   taken      counter, mark            of each chain, in the order of the ring; then the domain
//!   given back mark off                 from the last chain to the first
//!   published  next, last_batch_head    of each request
//!              elements, used index     of the ring: from here on the guest has its answers
//!              marks off                of each request
//!              used_idx                 of the region
//! ```
//!
//! **Ordering.** What must be survived is a process that is killed between any two of its
//! instructions, not a loss of power. One thread stores to a queue's part of the region, and it is
//! read when that process has ended. A killed thread has executed the stores before some
//! instruction in the program's order, and none behind it; when its end can be seen, they have left
//! its CPU. So no fence of the CPU is needed. The compiler must keep the order: each store that an
//! earlier one has to precede is a release, which on x86-64 is a plain store, and behind the ring's
//! used index there is a fence of the compiler.
//!
//! What is in the region may be anything: it comes from another process, which may have been
//! another program. Every number is held against its bounds, a list is followed for as many entries
//! as a ring has, and what contradicts itself or the ring is not believed.
//!
//! By file: `layout` (where each number is), `region` (the memory), `tracker` (one queue's marks),
//! `recovery` (what the next process makes of them); `explorer` kills the writer at each of its
//! stores, in every run of a small ring.

#[cfg(test)]
mod explorer;
mod layout;
mod recovery;
mod region;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod trace;
mod tracker;

pub use recovery::{Contradiction, Marked, Recovery, Ring};
pub use region::{Region, RegionError};
pub use tracker::Tracker;
