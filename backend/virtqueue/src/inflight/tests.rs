//! The layout, what is refused, and regions of any bytes at all.

use super::layout::queue_bytes;
use super::{Contradiction, Marked, Recovery, Region, RegionError, Ring, Tracker};
use crate::view::Used;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const RING: Ring = Ring { size: 8, used_idx: 100, avail_idx: 104 };

fn file(bytes: u64) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(bytes).expect("a length");
    file
}

/// A region of two queues of 8 entries, with these bytes for the second.
fn region(part: &[u8]) -> (File, Arc<Region>) {
    let bytes = Region::bytes(2, 8);
    let file = file(bytes);
    file.write_all_at(part, queue_bytes(8) as u64).expect("the region");
    let mapped = file.try_clone().expect("a descriptor");
    (file, Arc::new(Region::map(mapped, 0, bytes, 2, 8).expect("a region")))
}

/// A part of 8 entries.
struct Bytes([u8; 16 + 8 * 16]);

impl Bytes {
    fn new(version: u16, last_batch_head: u16, used_idx: u16) -> Self {
        let mut bytes = [0; 144];
        for (word, at) in [(version, 8), (8, 10), (last_batch_head, 12), (used_idx, 14)] {
            bytes[at..at + 2].copy_from_slice(&u16::to_ne_bytes(word));
        }
        Self(bytes)
    }

    fn entry(mut self, head: usize, is_marked: bool, next: u16, counter: u64) -> Self {
        let entry = &mut self.0[16 + 16 * head..][..16];
        entry[0] = is_marked.into();
        entry[6..8].copy_from_slice(&next.to_ne_bytes());
        entry[8..].copy_from_slice(&counter.to_ne_bytes());
        self
    }

    fn marked(self, head: usize, counter: u64) -> Self {
        self.entry(head, true, 0, counter)
    }

    fn start(&self, ring: Ring) -> Result<Recovery, RegionError> {
        Tracker::start(&region(&self.0).1, 1, ring).map(|(_, recovery)| recovery)
    }
}

fn heads(recovery: &Recovery) -> Vec<u16> {
    recovery.resubmit.iter().map(|marked| marked.head).collect()
}

/// What is done before a batch is published.
fn chain(tracker: &mut Tracker, used: &[Used]) {
    let last = tracker.last_batch_head();
    let last = used.iter().fold(last, |last, element| tracker.chain(element.head, last));
    tracker.chained(last);
}

#[test]
fn every_number_is_where_the_specification_puts_it() {
    // vhost-user, "Inflight I/O tracking": `QueueRegionSplit` and `DescStateSplit`.
    assert_eq!([2112, 4160].map(|bytes| bytes as u64), [128, 256].map(|n| Region::bytes(1, n)));
    assert_eq!(Region::bytes(2, 128), 4224);
    let (file, region) = region(&[]);
    let (mut tracker, recovery) = Tracker::start(&region, 1, RING).expect("it fits");
    assert_eq!(recovery, Recovery::default(), "it is fresh");
    tracker.mark([5, 2]);
    let used = [Used { head: 2, len: 1 }, Used { head: 5, len: 1 }];
    chain(&mut tracker, &used[..1]);
    let mut bytes = vec![0; queue_bytes(8)];
    let mut read = || {
        file.read_exact_at(&mut bytes, queue_bytes(8) as u64).expect("the region");
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let header = [8, 10, 12, 14].map(word);
        let entry = |head: usize| {
            let at = 16 + 16 * head;
            let counter = u64::from_ne_bytes(bytes[at + 8..at + 16].try_into().expect("8 bytes"));
            (bytes[at], word(at + 6), counter)
        };
        (header, entry(2), entry(5))
    };
    assert_eq!(read(), ([1, 8, 2, 100], (1, 0, 2), (1, 0, 1)));
    tracker.published(&used[..1], 101);
    chain(&mut tracker, &used[1..]);
    tracker.published(&used[1..], 102);
    assert_eq!(read(), ([1, 8, 5, 102], (0, 0, 2), (0, 2, 1)));
    let mut first = vec![0; queue_bytes(8)];
    file.read_exact_at(&mut first, 0).expect("the region");
    assert!(first.iter().all(|&byte| byte == 0), "the other queue's part is another");
}

#[test]
fn a_region_must_be_all_in_its_file_and_have_room() {
    let map = |len, offset, size, queues| Region::map(file(len), offset, size, queues, 128);
    assert!(map(8192, 4096, 2112, 1).is_ok());
    assert!(map(8192, 0, 8192, 1).is_ok(), "larger than it need be");
    assert!(matches!(map(8192, 512, 2112, 1), Err(RegionError::Misaligned(512))));
    let behind = map(8192, 8192, 2112, 1);
    assert!(matches!(behind, Err(RegionError::BehindTheEnd { end: 10304, len: 8192 })));
    assert!(matches!(map(2111, 0, 2112, 1), Err(RegionError::BehindTheEnd { .. })));
    let huge = map(8192, 4096, u64::MAX, 1);
    assert!(matches!(huge, Err(RegionError::BehindTheEnd { end: u64::MAX, .. })));
    let small = map(8192, 0, 4223, 2);
    assert!(matches!(small, Err(RegionError::TooSmall { size: 4223, needed: 4224 })));
    assert!(matches!(map(8192, 0, 0, 0), Err(RegionError::TooSmall { .. })));
    let no_file = File::open("/dev/null").expect("it is there");
    assert!(Region::map(no_file, 0, 2112, 1, 128).is_err());
}

#[test]
fn a_region_must_fit_the_ring() {
    let (_, region) = region(&[]);
    let start = |queue, size| Tracker::start(&region, queue, Ring { size, ..RING }).map(|_| ());
    let none = start(2, 8);
    assert!(matches!(none, Err(RegionError::NoSuchQueue { queue: 2, queues: 2 })));
    let larger = start(0, 16);
    assert!(matches!(larger, Err(RegionError::RingIsLarger { size: 16, desc_num: 8 })));
    assert!(start(0, 0).is_err() && start(0, 7).is_err());
    assert!(start(0, 4).is_ok() && start(1, 8).is_ok());
    let other = |bytes: Bytes| matches!(bytes.start(RING), Err(RegionError::OtherLayout { .. }));
    assert!(other(Bytes::new(2, 0, 100)) && other(Bytes::new(0xffff, 0, 100)));
    let mut more = Bytes::new(1, 0, 100);
    more.0[10] = 9;
    assert!(other(more));
}

#[test]
fn what_is_marked_runs_again_by_counter() {
    let bytes = Bytes::new(1, 0, 100).marked(1, 9).marked(6, 7).marked(2, 8).marked(0, 8);
    let recovery = bytes.start(RING).expect("it fits");
    let first = Marked { counter: 7, head: 6 };
    assert_eq!((heads(&recovery), recovery.resubmit[0]), (vec![6, 0, 2, 1], first));
    assert_eq!((recovery.next_avail, recovery.contradiction), (Some(104), None));
    // Counters that would overflow do no harm.
    let bytes = Bytes::new(1, 0, 65534).marked(3, u64::MAX).marked(4, 0);
    let ring = Ring { used_idx: 65534, avail_idx: 5, ..RING };
    let recovery = bytes.start(ring).expect("it fits");
    assert_eq!((heads(&recovery), recovery.next_avail), (vec![4, 3], Some(0)));
}

#[test]
fn a_batch_that_was_published_is_cleared() {
    let bytes = Bytes::new(1, 3, 98).entry(3, true, 5, 1).entry(5, true, 7, 2).marked(7, 3);
    let recovery = bytes.start(RING).expect("it fits");
    assert_eq!((heads(&recovery), recovery.next_avail), (vec![7], Some(101)));
    assert_eq!(recovery.contradiction, None);
}

#[test]
fn a_list_that_is_none_clears_nothing() {
    // Two of them, and the list runs in a circle; leaves the ring; is longer than the ring.
    for (used_idx, next) in [(98, 3), (98, 8), (98, 0xffff), (91, 2), (101, 2)] {
        let bytes = Bytes::new(1, 3, used_idx).entry(3, true, next, 1).marked(2, 2);
        let recovery = bytes.start(RING).expect("it fits");
        let published = 100u16.wrapping_sub(used_idx);
        assert_eq!(recovery.contradiction, Some(Contradiction::List { published }));
        assert_eq!((heads(&recovery), recovery.next_avail), (vec![3, 2], Some(102)));
        let recovery = Bytes::new(1, 3, used_idx).entry(3, false, next, 1).start(RING);
        let expected = Recovery { next_avail: Some(100), ..Recovery::default() };
        assert_eq!(recovery.expect("it fits"), expected, "nothing is in flight, it says");
    }
}

#[test]
fn marks_of_another_ring_are_left_out() {
    let bytes = Bytes::new(1, 0, 100).marked(1, 1).marked(2, 2).marked(3, 3);
    let recovery = bytes.start(Ring { avail_idx: 102, ..RING }).expect("it fits");
    let contradiction = Some(Contradiction::Marks { marked: 3, outstanding: 2 });
    assert_eq!(recovery, Recovery { contradiction, ..Recovery::default() });
    // Heads that a smaller ring does not have.
    let recovery = bytes.start(Ring { size: 2, avail_idx: 102, ..RING }).expect("it fits");
    assert_eq!((heads(&recovery), recovery.next_avail), (vec![1], Some(101)));
}

/// Numbers that look random, the same ones in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

#[test]
fn a_region_may_hold_anything() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (file, region) = region(&[]);
    let (mut fresh, mut found, mut contradictory) = (0, 0, 0);
    for _ in 0..20_000 {
        // Random bytes, and of the numbers that have limits some that are near them.
        let mut part: Vec<u8> = (0..144).map(|_| numbers.next() as u8).collect();
        let is_near = numbers.below(4) > 0;
        if is_near {
            part[8..12].copy_from_slice(&[numbers.below(2) as u8, 0, 8, 0]);
            part[12..14].copy_from_slice(&[numbers.below(9) as u8, 0]);
            part[14..16].copy_from_slice(&(100 - numbers.below(10) as u16).to_ne_bytes());
            for entry in part[16..].chunks_exact_mut(16) {
                entry[0] = numbers.below(2) as u8;
                entry[6..8].copy_from_slice(&[numbers.below(9) as u8, 0]);
            }
        }
        file.write_all_at(&part, queue_bytes(8) as u64).expect("the region");
        let avail_idx = if is_near { 100 + numbers.below(9) } else { numbers.next() } as u16;
        let size = 1 << numbers.below(4);
        let ring = Ring { size, avail_idx, used_idx: 100 };
        let Ok((mut tracker, recovery)) = Tracker::start(&region, 1, ring) else {
            assert!(!is_near);
            continue;
        };
        let heads = heads(&recovery);
        let mut sorted = heads.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), heads.len(), "each once: {recovery:?}");
        assert!(heads.iter().all(|&head| head < size), "{recovery:?}");
        assert!(heads.len() <= usize::from(avail_idx.wrapping_sub(100)), "{recovery:?}");
        assert!(recovery.next_avail.is_none_or(|next| next == 100 + heads.len() as u16));
        fresh += usize::from(recovery.next_avail.is_none());
        found += usize::from(!heads.is_empty());
        contradictory += usize::from(recovery.contradiction.is_some());
        // What a hostile driver makes a worker do.
        let (any, other) = (numbers.next() as u16, numbers.below(u64::from(size)) as u16);
        tracker.mark_any(any);
        tracker.mark([other]);
        tracker.unmark(any);
        let used = [any, other, other].map(|head| Used { head, len: 0 });
        if any >= size {
            tracker.mark_any(any);
        }
        if tracker.has_unmarked() {
            tracker.chain_marked(&used, 100);
        } else {
            chain(&mut tracker, &used);
        }
        tracker.published(&used, 103);
        // And the next process.
        let ring = Ring { used_idx: 103, avail_idx: avail_idx.wrapping_add(3), ..ring };
        let (_, again) = Tracker::start(&region, 1, ring).expect("it was written here");
        assert_eq!(again.contradiction, None);
        assert!(again.resubmit.len() <= heads.len());
    }
    let mut first = vec![0; queue_bytes(8)];
    file.read_exact_at(&mut first, 0).expect("the region");
    assert!(first.iter().all(|&byte| byte == 0), "no other part was touched");
    assert!(fresh > 1000 && found > 1000 && contradictory > 1000, "{fresh} {found}");
}
