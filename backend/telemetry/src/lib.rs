//! What is told of a device to those who watch it: counters of requests, the page that Prometheus
//! reads, and what has happened so far.
//!
//! By file: `buckets` (of latencies), `counters` (in memory that outlives the process that counts),
//! `counts` (the same, read), `tally` (changes, and how long their phases took), `page` (all of it
//! as text), `address` (where the page is), `http` (a client that asks for it), `book` (what has
//! happened, kept over restarts), `writer` (the file of that).
//!
//! Deliberately absent: who asks, and when. Nothing here waits, but the thread of `writer`.

pub mod address;
pub mod book;
pub mod buckets;
pub mod counters;
pub mod counts;
pub mod http;
pub mod page;
pub mod tally;
mod writer;

pub use address::Address;
pub use book::Book;
pub use counters::{Counters, Line, Operation};
