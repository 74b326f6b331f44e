//! A device of puppets, and what becomes of it: one program for all tests that may run side by
//! side. `starved.rs` has one of its own, because it keeps a CPU busy on purpose.

#[path = "../common/mod.rs"]
mod common;

mod claim;
mod completions;
mod decisions;
mod keeping;
mod midway;
mod residents;
mod resize;
mod restore;
mod stop;
mod takeover;
mod told;
mod trial;
