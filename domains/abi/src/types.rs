//! Plain values that both sides name: what a device announces, how a request ended, which queue.

use crate::{ParamsError, status};

/// Why a domain cannot do what it was asked: a sentence for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DomainError(String);

impl DomainError {
    /// Wraps a sentence.
    #[must_use]
    pub fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }
}

impl From<ParamsError> for DomainError {
    fn from(error: ParamsError) -> Self {
        Self(error.to_string())
    }
}

/// Number of a virtqueue, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueIndex(pub u32);

/// How a request ended, as far as the guest may know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = status::OK,
    /// Not done; the data may be lost.
    IoError = status::IO_ERROR,
    /// This device does not do that.
    Unsupported = status::UNSUPPORTED,
}

/// Whose the data behind a disk is, when its rings are about to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Claim {
    /// There is nothing to claim: no other program can get at it, or it was not asked for.
    Nothing = 0,
    /// No other program uses it while it is claimed.
    Ours = 1,
    /// Another program uses it now.
    Taken = 2,
}

impl Claim {
    /// The one with this number.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0 => Some(Self::Nothing),
            1 => Some(Self::Ours),
            2 => Some(Self::Taken),
            _ => None,
        }
    }
}

/// What a device can do and is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Cannot be written.
    pub const READ_ONLY: Self = Self(1);
    /// Has a volatile cache, and `Flush` to empty it.
    pub const FLUSH: Self = Self(1 << 1);
    /// Takes `Discard`.
    pub const DISCARD: Self = Self(1 << 2);
    /// Takes `WriteZeroes`.
    pub const WRITE_ZEROES: Self = Self(1 << 3);
    /// Its write cache can be turned off (`BlockDomain::set_write_cache`).
    pub const WRITE_CACHE: Self = Self(1 << 4);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in here.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Whether an instance may serve beside another one on the same backing, so that an upgrade pauses
/// no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Swap {
    /// It holds state of its own: it needs a handover.
    #[default]
    No,
    /// It does no read-modify-write, works on a dup of the storage's descriptor, and a write
    /// completed by either instance is seen by reads and covered by flushes of both.
    SameBacking,
}

/// What a device announces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Bytes, a multiple of `block_size`.
    pub capacity: u64,
    /// Logical block size in bytes: 512 or another power of two.
    pub block_size: u32,
    /// Physical block size in bytes, at least `block_size`.
    pub physical_block_size: u32,
    /// Preferred size of an I/O in bytes, or 0.
    pub optimal_io_size: u32,
    /// Granularity of `Discard` in bytes, or 0.
    pub discard_granularity: u32,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Whether it may serve beside another.
    pub swap: Swap,
    /// Kind of thing that holds the data, at most 15 bytes, e.g. `file`.
    pub backing_kind: String,
    /// Device and inode of what holds the data, 0 where there is none.
    pub backing_id: (u64, u64),
    /// How the backing is cached; instances swap only where this is equal.
    pub backing_cache: u64,
    /// Serial number, at most 20 bytes.
    pub serial: String,
}

/// What an image of the host's is, as of the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImageInfo {
    /// Bytes that it has now.
    pub capacity: u64,
    /// It cannot be written.
    pub read_only: bool,
    /// Preferred size of an I/O in bytes, or 0.
    pub optimal_io_size: u32,
    /// Granularity of `Discard` in bytes, or 0.
    pub discard_granularity: u32,
    /// Two numbers that say which image it is, whatever it is called.
    pub id: (u64, u64),
}

/// Urgency of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Level {
    /// Something is lost or will not work.
    Error = 1,
    /// Something is not as it should be.
    Warn = 2,
    /// Something that an operator wants to know.
    Info = 3,
    /// Something that an author wants to know.
    Debug = 4,
}
