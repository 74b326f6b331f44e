//! Counters of requests, in memory that outlives the process which counts.
//!
//! Each queue has a line of its own, which its worker alone writes, with plain stores: nothing is
//! shared between workers, and nothing is a read-modify-write. The memory is a memfd of the process
//! that shows the counters; the next process that serves goes on counting where this one has
//! stopped, so none of them ever goes back.

use crate::buckets::{BUCKETS, bucket};
use memmap2::MmapOptions;
use rustix::fs::{SealFlags, fcntl_get_seals};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// Of the layout. A process that does not know it does not count.
pub const LAYOUT: u32 = 1;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Operation {
    /// Data out of the disk.
    Read = 0,
    /// Data into it.
    Write = 1,
    /// All that was written is durable.
    Flush = 2,
    /// Data that is not needed any more.
    Discard = 3,
    /// Zeros.
    WriteZeroes = 4,
    /// The serial number.
    GetId = 5,
    /// What the device does not know.
    Other = 6,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Discard,
        Self::WriteZeroes,
        Self::GetId,
        Self::Other,
    ];

    /// Its name in labels and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
            Self::GetId => "get_id",
            Self::Other => "other",
        }
    }
}

/// Words of an operation before its buckets.
const OPERATION_HEAD: usize = 4;
/// Words of an operation.
pub(crate) const OPERATION_WORDS: usize = 208;
/// Words of a queue before its operations.
pub(crate) const LINE_HEAD: usize = 16;
/// Words of a queue: whole pages.
pub(crate) const LINE_WORDS: usize = 1536;

/// Where words are in an operation.
pub(crate) const SUM_NS: usize = 0;
pub(crate) const BYTES: usize = 1;
pub(crate) const ERRORS: usize = 2;
pub(crate) const FIRST_BUCKET: usize = OPERATION_HEAD;
/// Where they are in a queue.
pub(crate) const IN_FLIGHT: usize = 0;

const _: () = assert!(OPERATION_HEAD + BUCKETS <= OPERATION_WORDS);
const _: () = assert!(LINE_HEAD + Operation::ALL.len() * OPERATION_WORDS <= LINE_WORDS);

/// Bytes of the counters of so many queues.
#[must_use]
pub const fn bytes(queues: u16) -> u64 {
    queues as u64 * (LINE_WORDS * size_of::<u64>()) as u64
}

/// The counters of one operation.
#[derive(Debug)]
#[repr(C)]
struct OfOperation([AtomicU64; OPERATION_WORDS]);

/// The counters of one queue. One thread at a time writes them.
#[derive(Debug)]
#[repr(C)]
pub struct Line {
    head: [AtomicU64; LINE_HEAD],
    operations: [OfOperation; Operation::ALL.len()],
    rest: [AtomicU64; LINE_WORDS - LINE_HEAD - Operation::ALL.len() * OPERATION_WORDS],
}

const _: () = assert!(size_of::<Line>() == LINE_WORDS * size_of::<u64>());

/// Adds to a counter that only the calling thread writes.
#[inline(always)]
fn add(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl Line {
    /// So many requests were answered, with so many bytes together, each after so long.
    #[inline]
    pub fn answered(&self, operation: Operation, requests: u64, bytes: u64, ns: u64) {
        let OfOperation(words) = &self.operations[operation as usize];
        add(&words[FIRST_BUCKET + bucket(ns)], requests);
        add(&words[SUM_NS], requests.wrapping_mul(ns));
        add(&words[BYTES], bytes);
    }

    /// A request ends with an error.
    pub fn failed(&self, operation: Operation) {
        add(&self.operations[operation as usize].0[ERRORS], 1);
    }

    /// So many requests are in flight.
    #[inline]
    pub fn set_in_flight(&self, requests: u64) {
        self.head[IN_FLIGHT].store(requests, Ordering::Relaxed);
    }
}

/// The counters of all queues, mapped until the process ends.
#[derive(Debug, Clone, Copy)]
pub struct Counters(&'static [Line]);

impl Counters {
    /// Maps the counters of `queues` queues.
    ///
    /// # Errors
    /// The file is too short, or may become shorter, or cannot be mapped.
    pub fn map(file: &File, queues: u16) -> io::Result<Self> {
        let needed = bytes(queues);
        if !fcntl_get_seals(file)?.contains(SealFlags::SHRINK) || file.metadata()?.len() < needed {
            let message = "the memory for counters is too short, or not sealed";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let map = MmapOptions::new().len(needed as usize).map_raw(file)?;
        let lines = map.as_mut_ptr().cast_const().cast::<Line>();
        // It is mapped as long as the workers of any session may count there.
        std::mem::forget(map);
        // SAFETY: the mapping is `needed` bytes, all of them inside of the file, which cannot
        // become shorter (it is sealed), and it is never taken away. It begins with a page, so it
        // is aligned for `Line`, which is made of `AtomicU64`s alone: any bytes are some, and other
        // processes may change them. It is writable and shared, as `map_raw` maps.
        Ok(Self(unsafe { std::slice::from_raw_parts(lines, usize::from(queues)) }))
    }

    /// Those of a queue.
    #[must_use]
    pub fn line(&self, queue: usize) -> Option<&'static Line> {
        self.0.get(queue)
    }
}
