//! Descriptors that each belong to one part of a state, which is packed for another program.
//!
//! In the state they stand as [`Slot`]s: [`Packing::put`] makes them, [`Unpacking::take`] gives the
//! descriptors back.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

/// Stands for a descriptor in a packed state: its number when the state was packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(RawFd);

/// The descriptors of a state that is being packed.
#[derive(Debug, Default)]
pub struct Packing<'a> {
    descriptors: Vec<BorrowedFd<'a>>,
}

impl<'a> Packing<'a> {
    /// The descriptors that are kept.
    pub(crate) fn into_descriptors(self) -> Vec<BorrowedFd<'a>> {
        self.descriptors
    }

    /// The descriptor is to be kept.
    pub fn put(&mut self, descriptor: BorrowedFd<'a>) -> Slot {
        self.descriptors.push(descriptor);
        Slot(descriptor.as_raw_fd())
    }
}

/// The descriptors of a state that is being unpacked.
#[derive(Debug, Default)]
pub struct Unpacking {
    descriptors: BTreeMap<RawFd, OwnedFd>,
}

/// A packed state refers to a descriptor that it does not have, or has given away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state has no descriptor {0}, or refers to it twice")]
pub struct Missing(RawFd);

impl Unpacking {
    /// The descriptor that `slot` stands for; each is given once.
    ///
    /// # Errors
    /// It is not there.
    pub fn take(&mut self, slot: Slot) -> Result<OwnedFd, Missing> {
        self.descriptors.remove(&slot.0).ok_or(Missing(slot.0))
    }
}

impl From<BTreeMap<RawFd, OwnedFd>> for Unpacking {
    fn from(descriptors: BTreeMap<RawFd, OwnedFd>) -> Self {
        Self { descriptors }
    }
}
