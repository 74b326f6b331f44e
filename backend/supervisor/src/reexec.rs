//! The supervisor's program is exchanged in place: its state is packed, and the new program, in the
//! same process, unpacks it and goes on.
//!
//! A part of the supervisor that has something to keep makes a plain structure of it with `serde`,
//! in which descriptors stand as [`Slot`]s: [`Packing::put`] makes them, [`Unpacking::take`] gives
//! the descriptors back. Descriptors keep their close-on-exec flag: they travel in a socket, not
//! by number.

use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

/// Stands for a descriptor in a packed state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(usize);

/// The descriptors of a state that is being packed.
#[derive(Debug, Default)]
pub struct Packing<'a> {
    descriptors: Vec<BorrowedFd<'a>>,
}

impl<'a> Packing<'a> {
    /// The descriptor is to be kept.
    pub fn put(&mut self, descriptor: BorrowedFd<'a>) -> Slot {
        self.descriptors.push(descriptor);
        Slot(self.descriptors.len() - 1)
    }

    /// A duplicate of each, in the order of their slots.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn duplicates(&self) -> std::io::Result<Vec<OwnedFd>> {
        self.descriptors.iter().map(|descriptor| descriptor.try_clone_to_owned()).collect()
    }
}

/// The descriptors of a state that is being unpacked.
#[derive(Debug, Default)]
pub struct Unpacking {
    descriptors: Vec<Option<OwnedFd>>,
}

impl From<Vec<OwnedFd>> for Unpacking {
    fn from(descriptors: Vec<OwnedFd>) -> Self {
        Self { descriptors: descriptors.into_iter().map(Some).collect() }
    }
}

/// A packed state refers to a descriptor that it does not have, or has given away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state has no descriptor {0}, or refers to it twice")]
pub struct Missing(usize);

impl Unpacking {
    /// The descriptor that `slot` stands for; each is given once.
    ///
    /// # Errors
    /// It is not there.
    pub fn take(&mut self, slot: Slot) -> Result<OwnedFd, Missing> {
        self.descriptors.get_mut(slot.0).and_then(Option::take).ok_or(Missing(slot.0))
    }
}
