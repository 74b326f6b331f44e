//! The table of requests on chains in real memory.

use super::*;
use crate::taking::{Share, Taken};
use crate::view::RingView;
use std::sync::Weak;
use virtio_blk::{Blocks, features};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

const SIZE: u16 = 32;
const TABLE: DescriptorTable = DescriptorTable { addr: 0x1000, size: SIZE };
const STATUS: u64 = 0x5000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// The status byte before there is one.
const NONE: u8 = 0xee;

/// What a domain finds in the list of a request: where each segment is, and its length.
fn list(request: &RawRequest) -> Vec<(*mut u8, usize)> {
    let (first, len) = request.segments();
    // SAFETY: the tests look at requests only that are in flight, whose lists the table keeps.
    let segments = unsafe { std::slice::from_raw_parts(first, len) };
    segments.iter().map(|segment| (segment.base(), segment.len())).collect()
}

/// Guest memory with requests in it, and the table that takes them.
struct Fixture {
    memory: GuestMemoryAtomic<GuestMemory>,
    table: RequestTable,
    limits: Limits,
    used: Vec<Used>,
}

fn map() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).expect("memory")
}

impl Fixture {
    fn new() -> Self {
        let memory = GuestMemoryAtomic::new(map());
        let limits = Limits {
            capacity: (1 << 20).into(),
            blocks: Blocks::of(512),
            features: features::FLUSH,
            read_only: false,
            serial: [0; 20],
        };
        let mut table = RequestTable::new(SIZE, 16);
        table.replace_snapshot(Snapshot::take(&memory, 1));
        Self { memory, table, limits, used: Vec::new() }
    }

    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.memory().write_obj(value, GuestAddress(at)).expect("guest memory");
    }

    fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = TABLE.addr + 16 * u64::from(index);
        self.write(at, addr);
        self.write(at + 8, len);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    /// Writes down a request of type `code`, a read if it is 0, with descriptors from `head` on.
    fn chain(&self, head: u16, code: u32) -> u16 {
        let header = 0x4000 + 16 * u64::from(head);
        self.write(header, code);
        self.write(header + 8, 0u64);
        self.write(STATUS + u64::from(head), NONE);
        let behind = if code == 0 { head + 1 } else { head + 2 };
        self.descriptor(head, header, 16, NEXT, behind);
        self.descriptor(head + 1, 0x8000, 512, NEXT | WRITE, head + 2);
        self.descriptor(head + 2, STATUS + u64::from(head), 1, WRITE, 0);
        head
    }

    /// Takes one chain, in a batch of its own.
    fn take(&mut self, head: u16) -> Chain {
        let mut parser = self.table.parser(TABLE).expect("a snapshot");
        parser.next(head, &self.limits)
    }

    /// Takes a read, which is for the domain.
    fn read(&mut self, head: u16) -> (usize, RawRequest) {
        self.chain(head, 0);
        match self.take(head) {
            Chain::Request(index, request) => (usize::from(index), request),
            other => panic!("no request but {other:?}"),
        }
    }

    fn status(&self, head: u16) -> u8 {
        let at = GuestAddress(STATUS + u64::from(head));
        self.memory.memory().read_obj(at).expect("guest memory")
    }

    /// The map that is the current one, to see whether it stays.
    fn watch(&self) -> Weak<GuestMemory> {
        Arc::downgrade(&self.memory.memory().into_inner())
    }

    /// Replaces the map by another.
    fn replace(&mut self, version: u64) {
        self.memory.lock().expect("no panic").replace(map());
        self.table.replace_snapshot(Snapshot::take(&self.memory, version));
    }
}

#[test]
fn a_request_ends_once() {
    let mut fixture = Fixture::new();
    let (index, request) = fixture.read(3);
    assert_eq!((request.len(), fixture.table.in_use()), (512, 1));
    assert_eq!(fixture.table.end(index, 0, 512), Some(Used { head: 3, len: 513 }));
    assert_eq!((fixture.status(3), fixture.table.in_use()), (0, 0));
    assert_eq!(fixture.table.end(index, 1, 0), None);
    fixture.table.discard(index);
    assert_eq!((fixture.status(3), fixture.table.in_use()), (0, 0), "nothing is free twice");
    fixture.read(3);
    assert_eq!((fixture.status(3), fixture.table.in_use()), (NONE, 1), "its head is free again");
}

#[test]
fn a_request_that_is_discarded_tells_the_guest_nothing() {
    let mut fixture = Fixture::new();
    let (index, _) = fixture.read(3);
    fixture.table.discard(index);
    assert_eq!((fixture.status(3), fixture.table.in_use()), (NONE, 0));
    assert_eq!(fixture.table.end(index, 0, 512), None);
}

#[test]
fn the_lists_of_requests_in_flight_stay_as_they_are() {
    let mut fixture = Fixture::new();
    let taken: Vec<_> = (0..8).map(|n| fixture.read(3 * n)).collect();
    let lists = |requests: &[(usize, RawRequest)]| -> Vec<_> {
        requests.iter().map(|(_, request)| list(request)).collect()
    };
    let before = lists(&taken);
    assert!(before.iter().all(|list| list.len() == 1 && list[0].1 == 512));
    // One ends, and its entry is used for something with no data.
    fixture.table.end(taken[5].0, 0, 512);
    fixture.chain(15, 4);
    assert!(matches!(fixture.take(15), Chain::Request(15, _)));
    let (rest, now) = ([&taken[..5], &taken[6..]].concat(), lists(&taken[..5]));
    assert_eq!((now, rest.len()), (before[..5].to_vec(), 7));
    assert_eq!(lists(&taken[6..]), before[6..]);
}

#[test]
fn a_head_that_is_in_flight_is_not_taken_again() {
    let mut fixture = Fixture::new();
    let (head, request) = fixture.read(3);
    let before = list(&request);
    // Now it would be a chain of another length, or none at all.
    fixture.descriptor(4, 0x8000, 1024, NEXT | WRITE, 5);
    assert!(matches!(fixture.take(3), Chain::InUse(3)));
    fixture.descriptor(3, 0x4000, 16, NEXT, 3);
    assert!(matches!(fixture.take(3), Chain::InUse(3)));
    assert_eq!((list(&request), fixture.table.in_use()), (before, 1));
    fixture.table.end(head, 0, 512);
    assert!(matches!(fixture.take(3), Chain::Malformed { head: 3, .. }));
}

#[test]
fn a_head_that_is_answered_here_is_not_taken_again_before_it_is_given_back() {
    // One that is answered, one that cannot be; the domain takes the request before them, or not.
    for (code, accepted) in [(77, 1), (77, 0), (0, 1), (0, 0)] {
        let mut fixture = Fixture::new();
        fixture.chain(0, 0);
        fixture.chain(3, code);
        if code == 0 {
            fixture.descriptor(3, 0x4000, 16, NEXT, 3);
        }
        let limits = &fixture.limits;
        let mut parser = fixture.table.parser(TABLE).expect("a snapshot");
        assert!(matches!(parser.next(0, limits), Chain::Request(0, _)));
        let chain = parser.next(3, limits);
        assert!(matches!(chain, Chain::Answer(None) | Chain::Malformed { .. }), "{chain:?}");
        assert!(matches!(parser.next(3, limits), Chain::InUse(3)));
        assert!(fixture.table.is_immediate(3) && !fixture.table.is_immediate(0));
        fixture.table.end_batch(accepted, 1, &mut fixture.used);
        assert!(!fixture.table.is_immediate(3));
        fixture.read(3);
    }
    // A batch that was never ended.
    let mut fixture = Fixture::new();
    fixture.chain(3, 77);
    assert!(matches!(fixture.take(3), Chain::Answer(None)));
    fixture.read(3);
}

#[test]
fn a_head_outside_of_the_table_is_that_of_no_request() {
    let mut fixture = Fixture::new();
    for head in [SIZE, SIZE + 1, u16::MAX] {
        let chain = fixture.take(head);
        assert!(matches!(chain, Chain::Malformed { head: h, .. } if h == head), "{chain:?}");
    }
    assert!(fixture.table.entries.is_empty());
    fixture.read(SIZE - 3);
    // A ring that is longer than it may be.
    let long = DescriptorTable { size: 2 * SIZE, ..TABLE };
    let mut parser = fixture.table.parser(long).expect("a snapshot");
    let chain = parser.next(SIZE, &fixture.limits);
    assert!(matches!(chain, Chain::Malformed { .. }), "{chain:?}");
}

#[test]
fn what_is_set_aside_stays_and_frees_its_head() {
    let mut fixture = Fixture::new();
    let map = fixture.watch();
    let (_, request) = fixture.read(3);
    let before = list(&request);
    fixture.table.set_aside(3);
    fixture.table.set_aside(4);
    assert_eq!(fixture.table.in_use(), 0);
    let (head, next) = fixture.read(3);
    assert_ne!(request.segments().0, next.segments().0, "a list of its own");
    fixture.table.end(head, 0, 512);
    assert_eq!(list(&request), before);
    fixture.replace(2);
    assert!(map.upgrade().is_some(), "it may be written to for ever");
    drop(fixture);
    assert_eq!(list(&request), before);
}

#[test]
fn what_is_not_for_the_domain_is_answered_up_to_the_first_that_was_not_taken() {
    // Requests and others: o r o r r o. The domain takes so many of the three.
    for (accepted, answered, returned) in [(0, 1, 5), (1, 2, 3), (2, 2, 2), (3, 3, 0)] {
        let mut fixture = Fixture::new();
        let codes = [77, 0, 77, 0, 0, 77];
        let heads = [0, 3, 6, 9, 12, 15];
        for (head, code) in heads.into_iter().zip(codes) {
            fixture.chain(head, code);
        }
        let mut parser = fixture.table.parser(TABLE).expect("a snapshot");
        let mut requests = Vec::new();
        for head in heads {
            match parser.next(head, &fixture.limits) {
                Chain::Request(index, _) => requests.push(index),
                Chain::Answer(outside) => assert_eq!(outside, None),
                other => panic!("{other:?}"),
            }
        }
        let end = fixture.table.end_batch(accepted, requests.len(), &mut fixture.used);
        let expected =
            BatchEnd { answered: answered as u64, errors: answered as u64, malformed: 0, returned };
        assert_eq!(end, expected, "{accepted} were taken");
        let told: Vec<_> = fixture.used.iter().map(|used| used.head).collect();
        assert_eq!(told, [0, 6, 15][..answered], "{accepted} were taken");
        for (head, is_told) in [0, 6, 15].into_iter().zip((0..3).map(|n| n < answered)) {
            assert_eq!(fixture.status(head) == 2, is_told, "{head}, {accepted} were taken");
        }
    }
}

#[test]
fn a_chain_that_cannot_be_answered_comes_back_with_nothing_written() {
    let mut fixture = Fixture::new();
    // A loop, and a read into memory that is not shared.
    fixture.descriptor(0, 0x4000, 16, NEXT, 1);
    fixture.descriptor(1, 0x4000, 16, NEXT, 1);
    fixture.chain(3, 0);
    fixture.descriptor(4, 0x80_0000, 512, NEXT | WRITE, 5);
    let mut parser = fixture.table.parser(TABLE).expect("a snapshot");
    let malformed = parser.next(0, &fixture.limits);
    assert!(matches!(malformed, Chain::Malformed { head: 0, outside: None, .. }), "{malformed:?}");
    let outside = parser.next(3, &fixture.limits);
    assert!(matches!(outside, Chain::Answer(Some(0x80_0000))), "{outside:?}");
    let end = fixture.table.end_batch(0, 0, &mut fixture.used);
    assert_eq!(end, BatchEnd { answered: 1, errors: 1, malformed: 1, returned: 0 });
    assert_eq!(fixture.used[0], Used { head: 0, len: 0 });
    assert_eq!((fixture.used[1].head, fixture.status(3)), (3, 1));
    assert_eq!(fixture.table.in_use(), 0);
}

#[test]
fn a_batch_that_is_not_ended_leaves_nothing_to_the_next() {
    let mut fixture = Fixture::new();
    fixture.chain(0, 77);
    fixture.take(0);
    fixture.chain(3, 77);
    fixture.take(3);
    let end = fixture.table.end_batch(0, 0, &mut fixture.used);
    assert_eq!((end.answered, fixture.status(0), fixture.status(3)), (1, NONE, 2));
    fixture.take(0);
    fixture.replace(2);
    let end = fixture.table.end_batch(0, 0, &mut fixture.used);
    assert_eq!(end, BatchEnd::default(), "its memory may be gone");
}

#[test]
fn a_map_goes_with_its_last_request() {
    let mut fixture = Fixture::new();
    let first = fixture.watch();
    let (index, _) = fixture.read(0);
    fixture.table.end(index, 0, 512);
    fixture.replace(2);
    assert!(first.upgrade().is_none(), "nothing of it is in flight");
    let second = fixture.watch();
    fixture.read(0);
    fixture.replace(3);
    assert!(second.upgrade().is_some(), "its request may be written to for ever");
    let third = fixture.watch();
    fixture.replace(4);
    assert!(third.upgrade().is_none(), "of this one nothing was ever in flight");
}

#[test]
fn a_map_stays_for_each_request_whatever_has_become_of_those_before() {
    let mut fixture = Fixture::new();
    let (stranded, _) = fixture.read(0);
    fixture.replace(2);
    // The one that was left ends all the same, and its entry is used again.
    fixture.table.end(stranded, 0, 512);
    let second = fixture.watch();
    fixture.read(3);
    fixture.replace(3);
    assert!(second.upgrade().is_some());
}

#[test]
fn a_table_that_is_dropped_keeps_the_memory_of_what_is_in_flight() {
    for is_in_flight in [true, false] {
        let mut fixture = Fixture::new();
        let (index, request) = fixture.read(0);
        if !is_in_flight {
            fixture.table.end(index, 0, 512);
        }
        let map = fixture.watch();
        drop(fixture);
        assert_eq!(map.upgrade().is_some(), is_in_flight);
        if is_in_flight {
            assert_eq!(list(&request)[0].1, 512, "its list is there, too");
        }
    }
}

#[test]
fn a_long_list_of_a_chain_that_is_no_request_is_given_up() {
    let mut fixture = Fixture::new();
    let segments = Vec::with_capacity(1000);
    fixture.table.entries.push(Entry { segments, ..Entry::default() });
    fixture.chain(0, 77);
    fixture.take(0);
    assert!(fixture.table.entries[0].segments.capacity() <= 2 * SEG_MAX as usize);
}

#[test]
fn without_a_snapshot_nothing_is_taken() {
    assert!(RequestTable::new(4, 16).parser(TABLE).is_none());
}

/// Heads of requests, in the order of a batch.
fn heads(batch: &[RawRequest]) -> Vec<u64> {
    batch.iter().map(|request| request.tag).collect()
}

impl Fixture {
    /// A ring that offers these heads.
    fn ring(&self, heads: &[u16]) -> RingView {
        let mut queue = Queue::new(SIZE).expect("a queue");
        queue.set_desc_table_address(Some(TABLE.addr as u32), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        for (at, head) in (0..).zip(heads) {
            self.write(0x2004 + 2 * at, *head);
        }
        RingView::new(self.table.snapshot().expect("a snapshot"), &queue).expect("a ring")
    }

    /// Takes usual chains of a ring, from a position on.
    fn usual(&mut self, view: &RingView, share: Share, batch: &mut Vec<RawRequest>) -> Taken {
        let mut parser = self.table.parser(TABLE).expect("a snapshot");
        let name = |request: &mut RawRequest, head| request.tag = head as u64;
        parser.take_usual(view, share, &self.limits, name, batch)
    }
}

const ALL: Share = Share { first: 0, chains: 8, bytes: u64::MAX };

/// A fixture whose table knows the guest's region, and has entries.
fn with_entries() -> Fixture {
    let mut fixture = Fixture::new();
    let (index, _) = fixture.read(SIZE - 3);
    fixture.table.end(index, 0, 512);
    fixture
}

#[test]
fn usual_chains_are_taken_in_one_go() {
    let mut fixture = with_entries();
    for head in [0, 3, 6] {
        fixture.chain(head, 0);
    }
    let (view, mut batch) = (fixture.ring(&[3, 0, 6]), Vec::new());
    let share = Share { chains: 3, ..ALL };
    assert_eq!(fixture.usual(&view, share, &mut batch), Taken { chains: 3, bytes: 3 * 512 });
    assert_eq!((heads(&batch), fixture.table.in_use()), (vec![3, 0, 6], 3));
    for request in &batch {
        assert_eq!((request.op(), request.len(), list(request).len()), (op::READ, 512, 1));
        let ended = fixture.table.end(request.tag as usize, 0, 512);
        assert_eq!(ended, Some(Used { head: request.tag as u16, len: 513 }));
        assert_eq!(fixture.status(request.tag as u16), 0);
    }
    assert_eq!(fixture.table.in_use(), 0);
    // From anywhere, across the end of the ring.
    let (share, mut batch) = (Share { first: 65535, chains: 2, ..ALL }, Vec::new());
    fixture.write(0x2004 + 2 * u64::from(SIZE - 1), 6u16);
    assert_eq!(fixture.usual(&view, share, &mut batch).chains, 2);
    assert_eq!(heads(&batch), [6, 3]);
}

#[test]
fn a_share_is_not_exceeded() {
    let mut fixture = with_entries();
    for head in [0, 3, 6] {
        fixture.chain(head, 0);
    }
    let (view, mut batch) = (fixture.ring(&[0, 3, 6]), Vec::new());
    assert_eq!(fixture.usual(&view, Share { chains: 0, ..ALL }, &mut batch), Taken::default());
    let taken = fixture.usual(&view, Share { bytes: 513, ..ALL }, &mut batch);
    assert_eq!(taken, Taken { chains: 2, bytes: 1024 }, "the one that exceeds it is the last");
    assert_eq!(heads(&batch), [0, 3]);
}

#[test]
fn what_is_not_usual_ends_what_is_taken_in_one_go() {
    for (what, damage) in [
        ("a flush", &(|f: &mut Fixture| _ = f.chain(3, 4)) as &dyn Fn(&mut Fixture)),
        ("a loop", &|f| f.descriptor(4, 0x8000, 512, NEXT | WRITE, 4)),
        ("a head that is none", &|f| f.write(0x2006, SIZE)),
        ("a head that is in use", &|f| _ = f.read(3)),
        ("a head that was just taken", &|f| f.write(0x2006, 0u16)),
    ] {
        let mut fixture = with_entries();
        for head in [0, 3, 6] {
            fixture.chain(head, 0);
        }
        let (view, mut batch) = (fixture.ring(&[0, 3, 6]), Vec::new());
        damage(&mut fixture);
        let before = fixture.table.in_use();
        let taken = fixture.usual(&view, ALL, &mut batch);
        assert_eq!((taken.chains, heads(&batch)), (1, vec![0]), "{what}");
        assert_eq!(fixture.table.in_use(), before + 1, "{what}");
    }
}

#[test]
fn what_is_answered_between_usual_chains_has_those_before_it() {
    let mut fixture = with_entries();
    for (head, code) in [(0, 0), (3, 77), (6, 0)] {
        fixture.chain(head, code);
    }
    let (view, mut batch) = (fixture.ring(&[0, 3, 6]), Vec::new());
    let name = |request: &mut RawRequest, head| request.tag = head as u64;
    let mut parser = fixture.table.parser(TABLE).expect("a snapshot");
    let first = parser.take_usual(&view, ALL, &fixture.limits, name, &mut batch);
    assert!(matches!(parser.next(3, &fixture.limits), Chain::Answer(None)));
    let share = Share { first: 2, chains: 1, ..ALL };
    let second = parser.take_usual(&view, share, &fixture.limits, name, &mut batch);
    assert_eq!((first.chains, second.chains, heads(&batch)), (1, 1, vec![0, 6]));
    assert_eq!(fixture.table.immediate(1).collect::<Vec<_>>(), [3]);
    let end = fixture.table.end_batch(1, 2, &mut fixture.used);
    assert_eq!((end.answered, end.returned), (1, 1));
}
