//! The control socket from both ends: what clients say, and what they are answered.

mod clients;
#[path = "../common/mod.rs"]
mod common;
mod hotswapctl;
mod requests;
mod socket;
