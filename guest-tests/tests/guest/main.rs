//! A Linux guest under QEMU, and what it sees of an upgrade. One test at a time: see
//! `guest-tests/harness/guest.rs`.

mod configuration;
mod filesystem;
mod fio;
mod images;
mod migration;
mod recovery;
mod refusals;
mod reset;
mod sectors;
mod soak;
mod write_cache;
