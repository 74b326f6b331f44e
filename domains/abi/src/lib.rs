//! What crosses between host and module, and nothing else.
//!
//! Three things: the C tables, plain structures and functions with a version and a size in each
//! ([`HostVtable`], [`ModuleVtable`]); the [`descriptor`], fixed bytes that describe a module
//! without running it; and plain values that both sides name ([`DeviceInfo`], [`Params`]).
//!
//! Invariants: only plain data crosses; no panic crosses (each entry point catches what unwinds and
//! turns it into a status); no drop function or trait object made on one side is ever run by the
//! other.
//!
//! Deliberately absent: the trait that an author implements (`domain-api`), safe calls into a
//! module (`domain-host`), virtio, guest addresses, upgrades.

pub mod descriptor;
mod image;
mod params;
mod segment;
mod tables;
mod types;
mod words;

pub use image::{ImageVtable, RawImage, RawImageEnd, RawImageInfo};
pub use params::{Params, ParamsError, parse_size};
pub use segment::RawSegment;
pub use tables::*;
pub use types::{
    Capabilities, Claim, DeviceInfo, DomainError, ImageInfo, Level, QueueIndex, Status, Swap,
};
pub use words::*;
