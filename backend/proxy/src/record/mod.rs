//! What is said about the device and its changes.

pub(crate) mod canary;
pub(crate) mod code;
pub(crate) mod events;
pub(crate) mod history;
pub(crate) mod report;
pub(crate) mod residents;
pub(crate) mod serialize;
pub(crate) mod status;
pub(crate) mod wire;
