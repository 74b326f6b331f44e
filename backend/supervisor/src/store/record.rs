//! What says, in the store, what its other entries are: a record of the vault, in a sealed memfd of
//! its own. A new one is stored beside the one before, which is removed then: so at every instant
//! one that is whole is there.

use super::name::Name;
use crate::descriptor::Descriptor;
use crate::vault::Vault;
use channel::Kept;
use rustix::fs::{SealFlags, fcntl_add_seals, fstat};
use rustix::io::{Errno, pread};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Of the record. Members can come without another one, as in
/// `backend/decisions/0055-the-supervisor-is-exchanged-in-place.md`.
pub const VERSION: u32 = 1;
/// The longest record that is read.
const LONGEST: u64 = 16 << 20;

/// Which file something is, and how long it was when it was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    device: u64,
    inode: u64,
    len: u64,
}

impl Identity {
    /// That of a descriptor.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let stat = fstat(file)?;
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        Ok(Self { device: stat.st_dev, inode: stat.st_ino, len })
    }

    /// Whether both are the same file.
    #[must_use]
    pub const fn is_same_file(&self, other: &Self) -> bool {
        self.device == other.device && self.inode == other.inode
    }
}

/// An object of the vault, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// The name of the entry.
    pub name: String,
    /// What it is.
    #[serde(flatten)]
    pub file: Identity,
}

/// What a disk was started as, by the command line.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StartedAs {
    /// The domain.
    pub domain: String,
    /// Its parameters.
    pub params: BTreeMap<String, String>,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Numbers of sessions up to this one are used up.
    pub sessions: u64,
    /// The command line's disk.
    #[serde(default)]
    pub started_as: StartedAs,
    /// The vault's list.
    pub list: channel::Vault,
    /// Rings stay stopped until an upgrade has brought a live module.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub awaits_upgrade: bool,
    /// What it refers to.
    pub objects: BTreeMap<Kept, Object>,
}

/// What a record begins with, whatever its version.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope {
    version: u32,
    /// Which program has written it.
    program: String,
    record: Value,
}

/// Why there is no going on with what is in the store.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// Another program could.
    Version(String),
    /// It could not be looked at, for want of something that may be there later.
    NotNow(String),
    /// Something is not there, or not what it was.
    Lost(String),
}

fn lost(why: impl Into<String>) -> Fault {
    Fault::Lost(why.into())
}

/// An entry of the store, taken back.
#[derive(Debug, Clone)]
pub struct Entry {
    pub(super) name: Name,
    pub(super) file: Identity,
    pub(super) descriptor: Descriptor,
}

impl Record {
    /// Writes it down.
    ///
    /// # Errors
    /// There is no memory.
    pub fn write(&self) -> io::Result<OwnedFd> {
        let program = env!("CARGO_PKG_VERSION").to_owned();
        let envelope = Envelope { version: VERSION, program, record: serde_json::to_value(self)? };
        let memfd = channel::memfd("hotswap-record")?;
        let file = File::from(memfd);
        file.write_all_at(&serde_json::to_vec(&envelope)?, 0)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        Ok(file.into())
    }

    fn read(file: &Descriptor, len: u64) -> Result<Self, Fault> {
        if len > LONGEST {
            return Err(lost(format!("the record has {len} bytes")));
        }
        let mut text = vec![0; len as usize];
        let mut there = 0;
        while there < text.len() {
            match pread(file, &mut text[there..], there as u64) {
                Ok(0) => return Err(lost(format!("the record ends after {there} bytes"))),
                Ok(read) => there += read,
                Err(Errno::INTR) => {}
                Err(error @ (Errno::NOMEM | Errno::AGAIN | Errno::IO)) => {
                    return Err(Fault::NotNow(format!("its record cannot be read: {error}")));
                }
                Err(error) => return Err(lost(format!("the record cannot be read: {error}"))),
            }
        }
        let no_record = |error| lost(format!("the record is not understood: {error}"));
        let Envelope { version, program, record } =
            serde_json::from_slice(&text).map_err(no_record)?;
        if version != VERSION {
            return Err(Fault::Version(format!(
                "its record is of version {version} (of program {program}), and this program's is \
                 {VERSION}"
            )));
        }
        serde_json::from_value(record).map_err(no_record)
    }

    /// The record in an entry of the store, and the vault that it and the other entries are.
    ///
    /// # Errors
    /// Why they are none.
    pub fn restore(entry: &Entry, entries: &[Entry]) -> Result<(Self, Vault), Fault> {
        let record = Self::read(&entry.descriptor, entry.file.len)?;
        let mut objects = BTreeMap::new();
        for (kept, object) in &record.objects {
            let named = || entries.iter().filter(|entry| entry.name.to_string() == object.name);
            let Some(found) = named().find(|entry| entry.file.is_same_file(&object.file)) else {
                let name = &object.name;
                return Err(lost(match named().count() {
                    0 => format!("`{name}` is not there any more"),
                    _ => format!("`{name}` is another file than was stored"),
                }));
            };
            if found.file.len < object.file.len {
                let (name, now, before) = (&object.name, found.file.len, object.file.len);
                return Err(lost(format!("`{name}` has {now} bytes, and had {before}")));
            }
            objects.insert(*kept, found.descriptor.clone());
        }
        let vault = Vault::restored(record.list.clone(), objects, record.awaits_upgrade);
        let vault = vault.map_err(lost)?;
        Ok((record, vault))
    }
}
