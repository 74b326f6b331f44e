//! The status byte: how a request ended, as the guest is told.
//!
//! A type of its own, so that neither a domain's number nor a host error can end up in guest memory
//! by accident.

use domain_abi::status;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

/// Values of the `status` byte of `struct virtio_blk_req` (5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum WireStatus {
    /// `VIRTIO_BLK_S_OK`: done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// `VIRTIO_BLK_S_IOERR`: an error of the device, or of the driver.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// `VIRTIO_BLK_S_UNSUPP`: this device does not know such a request.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

impl WireStatus {
    /// What the guest is told about a domain's completion. A number that the contract does not know
    /// is an I/O error: the domain has not said that the request succeeded.
    #[must_use]
    pub const fn from_completion(completion_status: u32) -> Self {
        match completion_status {
            status::OK => Self::Ok,
            status::UNSUPPORTED => Self::Unsupported,
            _ => Self::IoError,
        }
    }

    /// The byte.
    #[must_use]
    pub const fn as_byte(self) -> u8 {
        self as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_ones_of_the_specification() {
        assert_eq!(WireStatus::Ok.as_byte(), 0);
        assert_eq!(WireStatus::IoError.as_byte(), 1);
        assert_eq!(WireStatus::Unsupported.as_byte(), 2);
    }

    #[test]
    fn an_unknown_completion_is_no_success() {
        assert_eq!(WireStatus::from_completion(status::OK), WireStatus::Ok);
        assert_eq!(WireStatus::from_completion(status::IO_ERROR), WireStatus::IoError);
        assert_eq!(WireStatus::from_completion(status::UNSUPPORTED), WireStatus::Unsupported);
        assert_eq!(WireStatus::from_completion(3), WireStatus::IoError);
        assert_eq!(WireStatus::from_completion(u32::MAX), WireStatus::IoError);
    }
}
