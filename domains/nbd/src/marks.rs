//! Which changes were sent and not answered, in memory that outlives the process.
//!
//! A change that was sent may still be carried out by the server after its connection has broken,
//! also after newer ones were. So each is marked before it is sent, and its mark is cleared when it
//! is answered, in a region of the storage: valid at every instant, and there for an instance that
//! goes on where another one died.
//!
//! ```text
//!   a mark per request and connection | marks of broken connections | process, start of the server
//!   | a number of each connection
//! ```
//!
//! A mark is one number, written in one piece: the first sector, and how many. 0 is none, and all
//! ones are the whole disk.

use domain_api::{DomainError, Host, Region};
use std::ops::Range;

/// Most connections.
pub(crate) const LINKS: usize = 16;
/// Most requests that wait for an answer on one.
pub(crate) const DEPTH: usize = 64;
/// Marks of connections that broke.
const OLD: usize = 1024;

const KEY: &str = "changes";
const SECTOR: u64 = 512;
const LEN_BITS: u32 = 24;
const AT_OLD: u64 = (LINKS * DEPTH * 8) as u64;
const AT_SERVER: u64 = AT_OLD + (OLD * 8) as u64;
const AT_NONCES: u64 = AT_SERVER + 16;
const LEN: u64 = AT_NONCES + (LINKS * 8) as u64;

/// The largest disk whose offsets can be marked.
pub(crate) const LARGEST: u64 = 1 << (64 - LEN_BITS + 9);

/// A range of the disk as one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark(u64);

impl Mark {
    /// Of the whole disk.
    const ALL: Self = Self(u64::MAX);

    /// Of `len` bytes at `offset`: less than 8 GiB below [`LARGEST`].
    pub(crate) const fn new(offset: u64, len: u64) -> Self {
        Self((offset / SECTOR) << LEN_BITS | len.div_ceil(SECTOR))
    }

    /// The bytes.
    pub(crate) const fn range(self) -> Range<u64> {
        if self.0 == Self::ALL.0 {
            return 0..LARGEST;
        }
        let start = (self.0 >> LEN_BITS) * SECTOR;
        start..start + (self.0 & ((1 << LEN_BITS) - 1)) * SECTOR
    }
}

/// The region.
#[derive(Debug)]
pub(crate) struct Marks(Region);

impl Marks {
    /// Opens or makes it. The storage is ours.
    pub(crate) fn open(host: Host) -> Result<Self, DomainError> {
        host.storage().region(KEY, LEN).map(Self)
    }

    fn put(&self, at: u64, number: u64) {
        self.0.copy_from_slice(at, &number.to_ne_bytes());
    }

    fn get(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.copy_to_slice(at, &mut bytes);
        u64::from_ne_bytes(bytes)
    }

    /// Marks what `index` of connection `link` changes.
    #[inline]
    pub(crate) fn set(&self, link: usize, index: usize, mark: Mark) {
        self.put(((link * DEPTH + index) * 8) as u64, mark.0);
    }

    /// It was answered.
    #[inline]
    pub(crate) fn clear(&self, link: usize, index: usize) {
        self.put(((link * DEPTH + index) * 8) as u64, 0);
    }

    /// Whether a connection has any.
    pub(crate) fn has_any(&self, link: usize) -> bool {
        (0..DEPTH).any(|index| self.get(((link * DEPTH + index) * 8) as u64) != 0)
    }

    /// Notes the number that the names of a connection's requests begin with.
    pub(crate) fn set_nonce(&self, link: usize, nonce: u32) {
        self.put(AT_NONCES + (link * 8) as u64, nonce.into());
    }

    pub(crate) fn nonce(&self, link: usize) -> u32 {
        self.get(AT_NONCES + (link * 8) as u64) as u32
    }

    /// Keeps these as the marks of broken connections.
    pub(crate) fn set_old(&self, old: &[Range<u64>]) {
        let marks = marks_of(old);
        for index in 0..OLD {
            let number = marks.get(index).map_or(0, |mark| mark.0);
            if self.get(AT_OLD + (index * 8) as u64) != number {
                self.put(AT_OLD + (index * 8) as u64, number);
            }
        }
    }

    /// What a predecessor that died has left: of its connections, and of those before. The marks
    /// stay.
    pub(crate) fn left(&self) -> (Vec<Mark>, Vec<Mark>) {
        let of = |from: u64, count: usize| {
            (0..count as u64)
                .map(|n| self.get(from + n * 8))
                .filter(|n| *n != 0)
                .map(Mark)
                .collect()
        };
        (of(0, LINKS * DEPTH), of(AT_OLD, OLD))
    }

    /// No connection has anything.
    pub(crate) fn clear_links(&self) {
        for index in 0..LINKS * DEPTH {
            self.clear(0, index);
        }
    }

    /// Notes the server's process.
    pub(crate) fn set_server(&self, (process, start): (u64, u64)) {
        self.put(AT_SERVER, process);
        self.put(AT_SERVER + 8, start);
    }

    /// The server's process; zeros if it is not known.
    pub(crate) fn server(&self) -> (u64, u64) {
        (self.get(AT_SERVER), self.get(AT_SERVER + 8))
    }
}

/// A mark for each range; if there is no room for all, the last one is of the whole disk.
fn marks_of(old: &[Range<u64>]) -> Vec<Mark> {
    let each = if old.len() > OLD { &old[..OLD - 1] } else { old };
    let mut marks: Vec<Mark> =
        each.iter().map(|range| Mark::new(range.start, range.end - range.start)).collect();
    if each.len() < old.len() {
        marks.push(Mark::ALL);
    }
    marks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_mark_of_its_own_is_marked_all_the_same() {
        let old = |count: u64| -> Vec<Range<u64>> {
            (0..count).map(|n| n << 33..(n << 33) + 4096).collect()
        };
        for count in [0, 1, OLD as u64 - 1, OLD as u64, OLD as u64 + 1, 3 * OLD as u64] {
            let (old, marks) = (old(count), marks_of(&old(count)));
            assert!(marks.len() <= OLD);
            for range in &old {
                let covers = |mark: &Mark| {
                    mark.range().start <= range.start && range.end <= mark.range().end
                };
                assert!(marks.iter().any(covers), "{range:?} of {count}");
            }
        }
        // With room for each there is one for each.
        assert!(!marks_of(&old(OLD as u64)).contains(&Mark::ALL));
    }

    #[test]
    fn a_mark_says_which_range_it_is() {
        for (offset, len) in
            [(0, 512), (512, (4 << 30) - 512), (LARGEST - 512, 512), (3 << 40, 4096)]
        {
            assert_eq!(Mark::new(offset, len).range(), offset..offset + len);
            assert_ne!(Mark::new(offset, len).0, 0);
        }
    }
}
