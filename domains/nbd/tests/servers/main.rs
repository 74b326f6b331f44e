//! Servers, such as there are and such as there should not be.

#[path = "../common/mod.rs"]
mod common;
mod failing;
mod hostile;
mod keeping;
mod real;
mod unflushed;
