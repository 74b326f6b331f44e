//! The supervisor: what holds the frontend's connection, the control socket and the vault, so that
//! the server beside it can die or be exchanged.

#![forbid(unsafe_code)]

pub mod front;
pub mod reexec;
