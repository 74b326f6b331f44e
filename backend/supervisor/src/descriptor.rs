//! Descriptors that several things hold: the journal, a message under way, the vault.
//!
//! As a part of a state that is written down, a descriptor is its number at that time; who writes
//! it is told what the numbers mean ([`Descriptor::written`]), and who reads it back says so
//! ([`Descriptor::named`]).

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

thread_local! {
    /// What the numbers of a state that is being read mean.
    static NAMES: RefCell<BTreeMap<RawFd, Descriptor>> = const { RefCell::new(BTreeMap::new()) };
    /// What all numbers mean, if that is one and the same.
    static ANY: RefCell<Option<Descriptor>> = const { RefCell::new(None) };
    /// What a state that is being written refers to.
    static WRITTEN: RefCell<BTreeMap<RawFd, Descriptor>> = const { RefCell::new(BTreeMap::new()) };
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

    /// Reads a state with `read`, in which all numbers are `any`: only to see whether it can be
    /// read.
    pub fn stand_in<T>(any: Self, read: impl FnOnce() -> T) -> T {
        ANY.set(Some(any));
        let result = read();
        ANY.set(None);
        result
    }

    /// Writes a state with `write`; what the numbers in it mean.
    pub fn written<T>(write: impl FnOnce() -> T) -> (T, BTreeMap<RawFd, Self>) {
        WRITTEN.with_borrow_mut(BTreeMap::clear);
        let result = write();
        (result, WRITTEN.take())
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
        WRITTEN.with_borrow_mut(|written| written.insert(self.as_raw_fd(), self.clone()));
        serializer.serialize_i32(self.as_raw_fd())
    }
}

impl<'de> Deserialize<'de> for Descriptor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = RawFd::deserialize(deserializer)?;
        let any = || ANY.with_borrow(Clone::clone);
        NAMES.with_borrow(|names| names.get(&number).cloned()).or_else(any).ok_or_else(|| {
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
        let (again, names) = Descriptor::written(|| serde_json::to_string(&file).unwrap());
        assert_eq!((again, names.len()), (written.clone(), 1));
        assert_eq!(Descriptor::named(names, read).unwrap(), file);
        assert_eq!(Descriptor::stand_in(file.clone(), read).unwrap(), file);
        let names = BTreeMap::from([(file.as_raw_fd(), file.clone())]);
        assert_eq!(Descriptor::named(names, read).unwrap(), file);
        assert!(read().is_err());
    }
}
