//! What numbers in the tables mean.

/// Request kinds, in [`RawRequest::op`](crate::RawRequest::op).
pub mod op {
    /// Read `len` bytes at `offset` into the segments.
    pub const READ: u32 = 0;
    /// Write the segments' `len` bytes at `offset`.
    pub const WRITE: u32 = 1;
    /// Make every write that completed before this request durable.
    pub const FLUSH: u32 = 2;
    /// The bytes `offset..offset + len` are no longer needed; they may read back as anything.
    pub const DISCARD: u32 = 3;
    /// The bytes `offset..offset + len` read back as zeros afterwards.
    pub const WRITE_ZEROES: u32 = 4;
}

/// Flag in `RawRequest::flags`: a `WRITE_ZEROES` that may give the space back.
pub const REQUEST_MAY_UNMAP: u32 = 1;

/// Completion statuses, in [`RawCompletion::status`](crate::RawCompletion::status).
pub mod status {
    /// Done.
    pub const OK: u32 = 0;
    /// The data could not be read, written or made durable.
    pub const IO_ERROR: u32 = 1;
    /// The domain does not offer this request.
    pub const UNSUPPORTED: u32 = 2;
}
