//! What a driver may write into its rings, and what becomes of everything else.

mod chains;
#[path = "../common/mod.rs"]
mod common;
mod fuzz;
mod requests;
mod usual;
