//! What goes over the ring: feature bits, requests, answers, and their bytes.

use std::io;

/// Feature bits, named as in the virtio specification (sections 5.2.3 and 6).
pub mod features {
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// The device has a cache that FLUSH empties.
    pub const FLUSH: u64 = 1 << 9;
    /// The driver can turn the cache on and off.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// More than one request queue.
    pub const MQ: u64 = 1 << 12;
    /// DISCARD requests.
    pub const DISCARD: u64 = 1 << 13;
    /// WRITE_ZEROES requests.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Descriptors that point to tables of descriptors. This driver accepts the bit and makes none.
    pub const INDIRECT: u64 = 1 << 28;
    /// Notifications by index instead of by flag.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device is not a legacy one.
    pub const VERSION_1: u64 = 1 << 32;
    /// Every request type, several queues, notification by flag.
    pub const WITHOUT_EVENT_IDX: u64 = VERSION_1 | FLUSH | MQ | DISCARD | WRITE_ZEROES;
    /// What a current Linux guest negotiates.
    pub const USUAL: u64 = WITHOUT_EVENT_IDX | EVENT_IDX | INDIRECT;
}

/// What to ask of the device. Offsets and lengths are in bytes, multiples of 512.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Read `len` bytes.
    Read {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: usize,
    },
    /// Write `data`.
    Write {
        /// Where on the disk.
        offset: u64,
        /// What; it is copied before `submit` returns.
        data: &'a [u8],
    },
    /// Make completed writes durable.
    Flush,
    /// The content of a range is no longer needed.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make a range read as zeros.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// The device may give the space back.
        unmap: bool,
    },
    /// Ask for the serial number (GET_ID), 20 bytes.
    Identify,
}

/// The device's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed.
    IoError,
    /// The device does not know the request.
    Unsupported,
    /// The request came back without a status, or with one that the specification does not have.
    Garbage(u8),
}

/// `struct virtio_blk_req`'s first 16 bytes (virtio 1.2, section 5.2.6).
pub(super) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// `struct virtio_blk_discard_write_zeroes` (virtio 1.2, section 5.2.6).
pub(super) fn range(offset: u64, len: u64, unmap: bool) -> io::Result<[u8; 16]> {
    let sectors = u32::try_from(sector(len)?).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector(offset)?.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&u32::from(unmap).to_le_bytes());
    Ok(bytes)
}

pub(super) fn sector(bytes: u64) -> io::Result<u64> {
    if bytes.is_multiple_of(512) {
        Ok(bytes / 512)
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}
