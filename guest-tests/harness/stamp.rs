//! Blocks that say what they are, and a load that checks every block it reads.
//!
//! Every 4 KiB block carries its own number, the sequence number of the write that put it there,
//! the name of the writer and a hash over all of it. A read is compared with a [`Ledger`] of what
//! each block may hold, so lost, repeated, late, torn and misplaced writes all show, and show
//! apart.
//!
//! Each queue's `Verifier` owns a range of blocks and never has two requests in flight on one
//! block, so at every read there is exactly one right answer. Only after a write that failed, or
//! that was abandoned in flight, there are two, the old content and the new; the ledger then keeps
//! both. Where the process that copied an abandoned write was killed, a block may also hold a part
//! of each ([`Ledger::may_be_torn`]): neither processors nor virtio promise more.

mod load;
mod report;
mod verifier;

pub use load::{Load, LoadOptions, assert_intact, damage, run_load};
pub use report::{Histogram, LoadReport};

/// Size of a stamped block in bytes.
pub const BLOCK: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"a stamp\0");
/// Words before the filling: magic, block, sequence, writer, hash.
const HEAD: usize = 5;
const HASH: usize = 4;

/// What a block says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the block, in units of [`BLOCK`].
    pub block: u64,
    /// Number of the write, rising within one writer.
    pub sequence: u64,
    /// Who wrote it.
    pub writer: u64,
}

impl Stamp {
    /// Fills a block with this stamp.
    pub fn write(&self, out: &mut [u8]) {
        assert_eq!(out.len(), BLOCK);
        let key = mix(self.block ^ mix(self.sequence ^ mix(self.writer)));
        for (index, word) in out.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(
                &key.wrapping_add((index as u64).wrapping_mul(GOLDEN)).to_le_bytes(),
            );
        }
        for (index, word) in
            [MAGIC, self.block, self.sequence, self.writer, 0].into_iter().enumerate()
        {
            out[index * 8..index * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        let sum = hash(out);
        out[HASH * 8..HEAD * 8].copy_from_slice(&sum.to_le_bytes());
    }

    /// Reads the stamp of a block, or says what the block is instead.
    pub fn read(bytes: &[u8]) -> Result<Stamp, &'static str> {
        assert_eq!(bytes.len(), BLOCK);
        let word = |index: usize| {
            u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().expect("8 bytes"))
        };
        if word(0) != MAGIC {
            return Err(if bytes.iter().all(|&b| b == 0) { "zeros" } else { "no stamp" });
        }
        if hash(bytes) != word(HASH) {
            return Err("a damaged stamp");
        }
        Ok(Stamp { block: word(1), sequence: word(2), writer: word(3) })
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (x ^ (x >> 29)).wrapping_mul(GOLDEN)
}

/// A hash over the whole block but its hash word; four lanes, so that it costs less than the copy.
fn hash(block: &[u8]) -> u64 {
    let mut lanes = [1u64, 2, 3, 4];
    for (index, group) in block.chunks_exact(32).enumerate() {
        for (lane, (at, word)) in lanes.iter_mut().zip(group.chunks_exact(8).enumerate()) {
            let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
            let word = if index * 4 + at == HASH { 0 } else { word };
            *lane = (*lane ^ word).wrapping_mul(GOLDEN).rotate_left(29);
        }
    }
    lanes.into_iter().fold(0, |sum, lane| mix(sum ^ lane))
}

/// One thing that a block may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zeros,
    Write(u64),
    /// Bytes of the other things that are possible, some of each.
    Torn,
    /// The bytes of this hash, which were found in a torn block.
    Found(u64),
}

/// What the blocks of one queue may hold; it can be carried from one client to the next.
#[derive(Clone, Debug)]
pub struct Ledger {
    writer: u64,
    first: u64,
    sequence: u64,
    /// Per block all that is possible; empty means anything, as after a discard.
    blocks: Vec<Vec<Content>>,
}

impl Ledger {
    /// A range of blocks that has never been written and reads as zeros.
    pub fn fresh(writer: u64, first: u64, count: u64) -> Ledger {
        let blocks = (0..count).map(|_| vec![Content::Zeros]).collect();
        Ledger { writer, first, sequence: 0, blocks }
    }

    /// A range of blocks that may hold anything.
    pub fn unknown(writer: u64, first: u64, count: u64) -> Ledger {
        let blocks = (0..count).map(|_| Vec::new()).collect();
        Ledger { writer, first, sequence: 0, blocks }
    }

    /// Enters that a block holds one certain thing.
    fn set(&mut self, index: usize, content: Content) {
        self.blocks[index].clear();
        self.blocks[index].push(content);
    }

    /// Each block's bytes, behind where it begins; none where there is more than one possibility.
    pub fn contents(&self) -> impl Iterator<Item = (u64, Option<Vec<u8>>)> {
        self.blocks.iter().enumerate().map(|(index, possible)| {
            let (block, mut bytes) = (self.first + index as u64, vec![0; BLOCK]);
            let is_known = match possible[..] {
                [Content::Zeros] => true,
                [Content::Write(sequence)] => {
                    Stamp { block, sequence, writer: self.writer }.write(&mut bytes);
                    true
                }
                _ => false,
            };
            (block * BLOCK as u64, is_known.then_some(bytes))
        })
    }

    /// Enters that all processes that had these blocks in hand were killed: a block with a write
    /// that was not answered may hold a part of it.
    ///
    /// Only for disks in memory, which a server writes by copying.
    pub fn may_be_torn(&mut self) {
        for possible in self.blocks.iter_mut().filter(|possible| possible.len() > 1) {
            possible.push(Content::Torn);
        }
    }

    /// Whether each byte is that byte of something which the block may hold.
    fn is_torn(&self, index: usize, bytes: &[u8]) -> bool {
        let block = self.first + index as u64;
        let mut explained = vec![false; bytes.len()];
        for content in &self.blocks[index] {
            let mut whole = vec![0; BLOCK];
            match *content {
                Content::Zeros => {}
                Content::Write(sequence) => {
                    Stamp { block, sequence, writer: self.writer }.write(&mut whole);
                }
                Content::Torn | Content::Found(_) => continue,
            }
            for (known, (a, b)) in explained.iter_mut().zip(whole.iter().zip(bytes)) {
                *known |= a == b;
            }
        }
        self.blocks[index].contains(&Content::Torn) && !explained.contains(&false)
    }

    /// Compares `bytes` with what a block may hold and says what is wrong; `index` counts from the
    /// first block.
    ///
    /// A block that was read is no longer in doubt: it must not change back.
    fn check(&mut self, index: usize, bytes: &[u8]) -> Result<(), String> {
        let block = self.first + index as u64;
        let (found, text) = match Stamp::read(bytes) {
            Ok(s) if s.block == block && s.writer == self.writer => {
                (Some(Content::Write(s.sequence)), format!("{s:?}"))
            }
            Ok(stamp) => (None, format!("{stamp:?}")),
            Err("zeros") => (Some(Content::Zeros), "zeros".to_owned()),
            Err(what) => (None, what.to_owned()),
        };
        let possible = &self.blocks[index];
        if possible.is_empty() {
            return Ok(());
        }
        let bytes_found = Content::Found(hash(bytes));
        let settled = match found {
            Some(found) if possible.contains(&found) => found,
            _ if possible.contains(&bytes_found) || self.is_torn(index, bytes) => bytes_found,
            _ => {
                return Err(format!(
                    "block {block} should hold {possible:?} of writer {}, but holds {text}",
                    self.writer
                ));
            }
        };
        self.set(index, settled);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamped(block: u64, sequence: u64, writer: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        Stamp { block, sequence, writer }.write(&mut bytes);
        bytes
    }

    #[test]
    fn a_stamp_is_read_back_and_any_flipped_bit_is_seen() {
        let mut bytes = stamped(7, 8, 9);
        assert_eq!(Stamp::read(&bytes), Ok(Stamp { block: 7, sequence: 8, writer: 9 }));
        for byte in 0..BLOCK {
            bytes[byte] ^= 1 << (byte % 8);
            assert!(Stamp::read(&bytes).is_err(), "a flipped bit in byte {byte} was not seen");
            bytes[byte] ^= 1 << (byte % 8);
        }
        let torn = [&stamped(7, 8, 9)[..2048], &stamped(7, 9, 9)[2048..]].concat();
        assert_eq!(Stamp::read(&torn), Err("a damaged stamp"));
        assert_eq!(Stamp::read(&[0; BLOCK]), Err("zeros"));
        assert_eq!(Stamp::read(&[0xee; BLOCK]), Err("no stamp"));
    }

    #[test]
    fn lost_old_misplaced_and_foreign_writes_are_told_from_the_right_one() {
        let mut ledger = Ledger::fresh(1, 100, 4);
        assert!(ledger.check(2, &[0; BLOCK]).is_ok());
        ledger.set(2, Content::Write(5));
        assert!(ledger.check(2, &stamped(102, 5, 1)).is_ok());
        for (what, bytes) in [
            ("lost", vec![0; BLOCK]),
            ("old", stamped(102, 4, 1)),
            ("misplaced", stamped(101, 5, 1)),
            ("foreign", stamped(102, 5, 2)),
            ("unread", vec![0xee; BLOCK]),
        ] {
            assert!(ledger.check(2, &bytes).is_err(), "a {what} write was taken for the right one");
        }
    }

    #[test]
    fn a_write_in_doubt_is_settled_by_the_first_read() {
        let mut ledger = Ledger::fresh(1, 0, 1);
        ledger.blocks[0].push(Content::Write(3));
        assert!(ledger.clone().check(0, &[0; BLOCK]).is_ok());
        assert!(ledger.check(0, &stamped(0, 3, 1)).is_ok());
        assert!(ledger.check(0, &[0; BLOCK]).is_err());
    }

    #[test]
    fn a_block_may_be_torn_only_where_a_write_was_killed() {
        let torn = |old: u64, new: u64, at: usize| {
            [&stamped(0, new, 1)[..at], &stamped(0, old, 1)[at..]].concat()
        };
        let mut ledger = Ledger::fresh(1, 0, 1);
        ledger.set(0, Content::Write(3));
        ledger.may_be_torn();
        assert!(ledger.check(0, &torn(3, 4, 64)).is_err(), "no write was in flight");
        ledger.blocks[0].push(Content::Write(4));
        assert!(ledger.check(0, &torn(3, 4, 64)).is_err(), "nothing was killed");
        ledger.may_be_torn();
        assert!(ledger.clone().check(0, &stamped(0, 3, 1)).is_ok());
        assert!(ledger.clone().check(0, &stamped(0, 4, 1)).is_ok());
        for foreign in [torn(3, 5, 64), torn(2, 4, 64), vec![0; BLOCK]] {
            assert!(ledger.check(0, &foreign).is_err(), "bytes of neither write");
        }
        assert!(ledger.check(0, &torn(3, 4, 64)).is_ok());
        // What was read does not change any more, until it is written.
        assert!(ledger.check(0, &torn(3, 4, 64)).is_ok());
        assert!(ledger.check(0, &torn(3, 4, 72)).is_err());
        assert!(ledger.check(0, &stamped(0, 4, 1)).is_err());
        ledger.set(0, Content::Write(5));
        assert!(ledger.check(0, &stamped(0, 5, 1)).is_ok());
    }

    #[test]
    fn the_histogram_bounds_what_it_has_counted() {
        let mut histogram = Histogram::default();
        (1..=1000).for_each(|us| histogram.record(std::time::Duration::from_micros(us)));
        for (share, us) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0)] {
            let found = histogram.quantile(share).as_nanos() as f64 / 1000.0;
            assert!(
                found >= us && found <= us * 1.07,
                "quantile {share} of 1..1000 us is {found} us"
            );
        }
        assert_eq!(histogram.quantile(1.0), std::time::Duration::from_millis(1));
    }
}
