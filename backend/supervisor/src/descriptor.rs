//! Descriptors that several things hold: the journal, a message under way, the vault.
//!
//! As a part of a state that is written down, a descriptor is its number, which a program that is
//! executed in place finds again. Reading a state back needs to be told what the numbers are now:
//! [`Descriptor::named`].

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

thread_local! {
    /// What the numbers of a state that is being read mean.
    static NAMES: RefCell<BTreeMap<RawFd, Descriptor>> = const { RefCell::new(BTreeMap::new()) };
}

/// An open descriptor. It is closed when the last clone goes.
#[derive(Debug, Clone)]
pub struct Descriptor(Arc<OwnedFd>);

impl Descriptor {
    /// Reads a state with `read`, in which the numbers are those of `names`.
    pub fn named<T>(names: BTreeMap<RawFd, Self>, read: impl FnOnce() -> T) -> T {
        NAMES.with_borrow_mut(|known| *known = names);
        let result = read();
        NAMES.with_borrow_mut(BTreeMap::clear);
        result
    }
}

impl From<OwnedFd> for Descriptor {
    fn from(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The same one, not only one that leads to the same.
impl PartialEq for Descriptor {
    fn eq(&self, other: &Self) -> bool {
        self.as_raw_fd() == other.as_raw_fd()
    }
}

impl Eq for Descriptor {}

impl Serialize for Descriptor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i32(self.as_raw_fd())
    }
}

impl<'de> Deserialize<'de> for Descriptor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = RawFd::deserialize(deserializer)?;
        NAMES.with_borrow(|names| names.get(&number).cloned()).ok_or_else(|| {
            serde::de::Error::custom(format!("descriptor {number} did not come with the state"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_found_again_by_its_number_and_only_while_it_is_named() {
        let file = Descriptor::from(OwnedFd::from(tempfile::tempfile().unwrap()));
        let written = serde_json::to_string(&file).unwrap();
        assert_eq!(written, file.as_raw_fd().to_string());
        let read = || serde_json::from_str::<Descriptor>(&written);
        let names = BTreeMap::from([(file.as_raw_fd(), file.clone())]);
        assert_eq!(Descriptor::named(names, read).unwrap(), file);
        assert!(read().is_err());
    }
}
