//! An in-flight region of any bytes, and a ring with any indices.
//!
//! What has to hold: what is recovered is what a plain reading of the specification gives; each
//! head comes at most once, is one of the ring's, and its mark is there; no more is in flight than
//! the driver waits for; recovery that is done again gives the same; no other queue's part is
//! touched; what is marked then comes next time, behind what was there. The supervisor, which
//! reads from outside, finds the same oldest request.

use crate::input::Input;
use crate::pool::memfd;
use crate::random::Random;
use channel::InflightRegion;
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use supervisor::descriptor::Descriptor;
use virtqueue::inflight::{Contradiction, Recovery, Region, Ring, Tracker};

/// The queue whose part is looked at, of three.
const QUEUE: usize = 1;
const QUEUES: u16 = 3;
const HEADER: usize = 16;
const ENTRY: usize = 16;
/// Sizes of the region's queues.
const SIZES: [u16; 4] = [4, 8, 32, 64];

thread_local! {
    static FILES: RefCell<Vec<File>> = RefCell::new(
        SIZES.iter().map(|&size| File::from(memfd(Region::bytes(QUEUES, size)))).collect(),
    );
}

/// Carries a script out.
pub fn one_input(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let at = input.below(SIZES.len());
    let desc_num = SIZES[at];
    FILES.with_borrow(|files| one_region(&mut input, desc_num, &files[at]));
}

/// A queue's part, as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part(Vec<u8>);

impl Part {
    fn word(&self, at: usize) -> u16 {
        u16::from_ne_bytes([self.0[at], self.0[at + 1]])
    }

    fn put(&mut self, at: usize, word: u16) {
        self.0[at..at + 2].copy_from_slice(&word.to_ne_bytes());
    }

    const fn entry(head: u16) -> usize {
        HEADER + head as usize * ENTRY
    }

    fn is_marked(&self, head: u16) -> bool {
        self.0[Self::entry(head)] != 0
    }

    fn next(&self, head: u16) -> u16 {
        self.word(Self::entry(head) + 6)
    }

    fn counter(&self, head: u16) -> u64 {
        let at = Self::entry(head) + 8;
        u64::from_ne_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }

    /// Any bytes; most often such that they get past the first check.
    fn read(input: &mut Input<'_>, desc_num: u16, ring: Ring) -> Self {
        let len = Region::bytes(1, desc_num) as usize;
        let mut part = Self(vec![0; len]);
        let is_good = !input.one_in(8);
        if is_good {
            part.put(8, u16::from(!input.one_in(16)));
            part.put(10, desc_num);
            part.put(12, input.u8().into());
            part.put(14, ring.used_idx.wrapping_sub((input.u8() % 16).into()));
            if input.one_in(2) {
                // A list that is one, in some order.
                let mut random = Random(input.u64());
                let mut order: Vec<u16> = (0..desc_num).collect();
                for at in 1..order.len() {
                    order.swap(at, random.next() as usize % (at + 1));
                }
                order.windows(2).for_each(|pair| part.put(Self::entry(pair[0]) + 6, pair[1]));
                part.put(12, order[0]);
            }
            for _ in 0..input.u8() % 24 {
                let head = u16::from(input.u8()) % desc_num;
                let at = Self::entry(head);
                part.0[at] = input.pick(&[1, 1, 1, 0, 255]);
                part.0[at + 8] = input.u8();
                if input.one_in(8) {
                    part.0[at + 8..at + 16].fill(255);
                }
            }
        }
        let from = if is_good { len - input.below(64).min(len) } else { 0 };
        let bytes = input.bytes(len - from);
        part.0[from..from + bytes.len()].copy_from_slice(bytes);
        part
    }

    /// What was in flight, oldest first, by a plain reading of the specification.
    fn in_flight(&self, ring: Ring) -> Vec<(u64, u16)> {
        let mut marked: Vec<u16> = (0..ring.size).filter(|&head| self.is_marked(head)).collect();
        let published = ring.used_idx.wrapping_sub(self.word(14));
        let mut list = Vec::new();
        let mut head = self.word(12);
        for _ in 0..published.min(ring.size) {
            if head >= ring.size || list.contains(&head) {
                break;
            }
            list.push(head);
            head = self.next(head);
        }
        if list.len() == usize::from(published) {
            marked.retain(|head| !list.contains(head));
        }
        let outstanding = ring.avail_idx.wrapping_sub(ring.used_idx);
        if marked.len() > usize::from(outstanding) {
            marked.clear();
        }
        let mut marked: Vec<_> =
            marked.into_iter().map(|head| (self.counter(head), head)).collect();
        marked.sort_unstable();
        marked
    }
}

fn pairs(recovery: &Recovery) -> Vec<(u64, u16)> {
    recovery.resubmit.iter().map(|marked| (marked.counter, marked.head)).collect()
}

fn one_region(input: &mut Input<'_>, desc_num: u16, file: &File) {
    let size = input.pick(&[desc_num, desc_num, desc_num, desc_num / 2, desc_num * 2, 0, 3]);
    let used_idx = input.u16();
    let avail_idx = used_idx.wrapping_add(match input.below(4) {
        0 => input.u16(),
        1 => size,
        _ => input.u8().into(),
    });
    let ring = Ring { size, used_idx, avail_idx };
    let before = Part::read(input, desc_num, ring);
    let len = before.0.len();
    let mut all = vec![0x5a; len * usize::from(QUEUES)];
    all[QUEUE * len..][..len].copy_from_slice(&before.0);
    file.write_all_at(&all, 0).expect("it has room");
    let read = || {
        let mut now = vec![0; all.len()];
        file.read_exact_at(&mut now, 0).expect("it is there");
        let others = |at: usize| now[at * len..][..len].iter().all(|&byte| byte == 0x5a);
        assert!(others(0) && others(2), "another queue's part was written to");
        Part(now[QUEUE * len..][..len].to_vec())
    };

    let bytes = Region::bytes(QUEUES, desc_num);
    let mapped = file.try_clone().expect("a descriptor");
    let region = Arc::new(Region::map(mapped, 0, bytes, QUEUES, desc_num).expect("a region"));
    // What the supervisor finds without knowing the ring.
    let memfd = Descriptor::from(std::os::fd::OwnedFd::from(file.try_clone().expect("one")));
    let (queues, queue_size) = (QUEUES, desc_num);
    let place = InflightRegion { offset: 0, len: bytes, queues, queue_size, leaves: false };
    let outside = supervisor::region::Region::given(place, memfd).expect("a region");

    let Ok((tracker, recovery)) = Tracker::start(&region, QUEUE, ring) else {
        let version = (before.word(8), before.word(10));
        let is_other = version.0 != 0 && version != (1, desc_num);
        assert!(is_other || size > desc_num || !size.is_power_of_two(), "it fits: {ring:?}");
        assert_eq!(read(), before, "what is refused was written to");
        drop(outside.oldest());
        return;
    };
    drop(tracker);
    let found = pairs(&recovery);
    check(&before, ring, &recovery);

    let after = read();
    assert_eq!((after.word(8), after.word(10), after.word(14)), (1, desc_num, used_idx));
    let marked: Vec<u16> = (0..desc_num).filter(|&head| after.is_marked(head)).collect();
    let mut heads: Vec<u16> = found.iter().map(|&(_, head)| head).collect();
    heads.sort_unstable();
    assert_eq!(marked, heads, "marks that were not recovered, or the other way round");
    let oldest = outside.oldest().into_iter().find(|oldest| usize::from(oldest.queue) == QUEUE);
    let oldest = oldest.map(|oldest| (oldest.counter, oldest.head));
    assert_eq!(oldest, found.first().copied(), "the supervisor finds another one");

    let (mut tracker, again) = Tracker::start(&region, QUEUE, ring).expect("as before");
    assert_eq!((pairs(&again), again.contradiction), (found.clone(), None), "done again");
    assert_eq!(read(), after, "done again, it has changed something");
    if found.last().is_some_and(|&(counter, _)| counter == u64::MAX) {
        // Counters do not go on from there.
        return;
    }
    let Some(new) = (0..size).find(|head| !heads.contains(head)) else { return };
    tracker.mark([new]);
    drop(tracker);
    let more = Ring { avail_idx: used_idx.wrapping_add(found.len() as u16 + 1), ..ring };
    let (mut tracker, recovery) = Tracker::start(&region, QUEUE, more).expect("as before");
    let (last, first) = recovery.resubmit.split_last().expect("it is marked");
    assert_eq!((last.head, first.len()), (new, found.len()), "what is marked does not come last");
    tracker.unmark(new);
    assert_eq!(pairs(&Tracker::start(&region, QUEUE, ring).expect("as before").1), found);
}

fn check(before: &Part, ring: Ring, recovery: &Recovery) {
    let found = pairs(recovery);
    if before.word(8) == 0 {
        assert_eq!(*recovery, Recovery::default(), "a fresh region");
        return;
    }
    assert_eq!(found, before.in_flight(ring), "{ring:?}");
    let outstanding = usize::from(ring.avail_idx.wrapping_sub(ring.used_idx));
    assert!(found.len() <= outstanding.min(ring.size.into()));
    for (at, &(_, head)) in found.iter().enumerate() {
        assert!(head < ring.size && found[..at].iter().all(|&(_, other)| other != head));
    }
    let is_other_ring = matches!(recovery.contradiction, Some(Contradiction::Marks { .. }));
    let next = ring.used_idx.wrapping_add(found.len() as u16);
    assert_eq!(recovery.next_avail, (!is_other_ring).then_some(next));
}
