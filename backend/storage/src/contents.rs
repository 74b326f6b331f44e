//! What a storage holds at a moment, so that another process can go on with it.
//!
//! Nothing is copied: what is held here is shared with the storage. An object has the same number
//! in all contents that it is part of, so what was passed on once need not be again.

use domain_host::HostRegion;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

/// An object at a key.
#[derive(Debug)]
pub struct Numbered<T> {
    /// The key.
    pub key: String,
    /// Its number; another object never has it.
    pub number: u64,
    /// The object.
    pub object: Arc<T>,
}

/// All of it.
#[derive(Debug, Default)]
pub struct Contents {
    /// The schema number, 0 while it is empty.
    pub schema: u32,
    /// Memory.
    pub regions: Vec<Numbered<HostRegion>>,
    /// Bytes.
    pub bytes: Vec<Numbered<Vec<u8>>>,
    /// Files.
    pub files: Vec<Numbered<File>>,
    /// Why something that was written may be lost.
    pub failure: Option<String>,
    /// What instances have counted.
    pub counters: BTreeMap<String, u64>,
}

/// What another storage held, as it is put into this one.
#[derive(Debug, Default)]
pub struct Filling {
    /// As in [`Contents`].
    pub schema: u32,
    /// By key.
    pub regions: BTreeMap<String, HostRegion>,
    /// By key.
    pub bytes: BTreeMap<String, Vec<u8>>,
    /// By key.
    pub files: BTreeMap<String, File>,
    /// As in [`Contents`].
    pub failure: Option<String>,
    /// As in [`Contents`].
    pub counters: BTreeMap<String, u64>,
}
