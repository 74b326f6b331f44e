//! The supervisor: what holds the frontend's connection, the control socket and the vault, so that
//! the server beside it can die or be exchanged.

#![forbid(unsafe_code)]

pub mod deaths;
pub mod descriptor;
mod effect;
mod fields;
pub mod front;
pub mod journal;
pub mod notify;
pub mod pages;
pub mod process;
pub mod reexec;
pub mod region;
pub mod relay;
pub mod request;
pub mod said;
pub mod session;
pub mod slots;
pub mod store;
pub mod supervisor;
pub mod vault;
pub mod wire;
