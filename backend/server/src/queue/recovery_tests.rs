//! Workers that find marks of a process that was killed: a worker is forgotten in the middle, and
//! another one goes on with the same guest, the same region, and a domain of its own.

use super::tests::{Bench, IO_ERROR, OK};
use crate::inflight::{Inflight, Quarantined};
use crate::phase::Phase;
use crate::testing::{self, Guest, Kind, NONE, Puppets, SIZE};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vhost_user_backend::VringT;
use virtqueue::inflight::Region;

/// A region of one queue, and its file.
struct Memory {
    file: File,
    region: Arc<Region>,
}

impl Memory {
    fn new(size: u16) -> Self {
        let file = tempfile::tempfile().expect("a file");
        let bytes = Region::bytes(1, size);
        file.set_len(bytes).expect("a length");
        let mapped = file.try_clone().expect("a descriptor");
        let region = Arc::new(Region::map(mapped, 0, bytes, 1, size).expect("a region"));
        Self { file, region }
    }

    fn inflight(&self) -> Inflight {
        let region = Arc::clone(&self.region);
        Inflight { region, cautious: false, leaves: false, quarantine: Vec::new() }
    }

    fn word(&self, at: u64) -> u16 {
        let mut word = [0; 2];
        self.file.read_exact_at(&mut word, at).expect("the region");
        u16::from_ne_bytes(word)
    }

    fn version(&self) -> u16 {
        self.word(8)
    }

    fn used_idx(&self) -> u16 {
        self.word(14)
    }

    /// The heads that are marked, in the order of their counters.
    fn marked(&self) -> Vec<u16> {
        let mut marked = Vec::new();
        for head in 0..SIZE {
            let mut entry = [0; 16];
            self.file.read_exact_at(&mut entry, 16 + 16 * u64::from(head)).expect("the region");
            if entry[0] != 0 {
                marked.push((u64::from_ne_bytes(entry[8..].try_into().expect("8 bytes")), head));
            }
        }
        marked.sort_unstable();
        marked.into_iter().map(|(_, head)| head).collect()
    }
}

/// A queue that is served with a region.
fn served_with(memory: &Memory, script: &[&str]) -> Bench {
    let bench = Bench::new(script);
    bench.inflight.set(Some(memory.inflight()));
    bench
}

/// What comes after `killed`, with the frontend's part done as QEMU does it, and then some.
fn successor(killed: Bench, inflight: Inflight, script: &[&str]) -> Bench {
    let Bench { guest, puppets, worker, .. } = killed;
    // Nothing of them is ever run again.
    std::mem::forget((puppets, worker));
    let bench = Bench::of(guest, Puppets::start(1, script), Duration::ZERO);
    let used_idx = bench.vring.queue_used_idx().expect("a ring");
    bench.vring.set_queue_next_used(used_idx);
    // QEMU says the used index; it is not heeded.
    bench.vring.set_queue_next_avail(used_idx.wrapping_add(7));
    bench.inflight.set(Some(inflight));
    bench
}

/// The heads of what a domain got, in order.
fn got(bench: &Bench) -> Vec<u16> {
    let head = |line: &String| line.rsplit(':').next().and_then(|head| head.parse().ok());
    bench.got("a").iter().map(|line| head(line).expect("a head")).collect()
}

/// The heads of the elements of the used ring that are new.
fn used(bench: &mut Bench) -> Vec<u16> {
    bench.guest.used().into_iter().map(|used| used.0).collect()
}

fn offer(guest: &mut Guest, numbers: &[u16]) {
    for &n in numbers {
        let head = guest.request(n, Kind::Read(512));
        guest.offer(head);
    }
}

#[test]
fn what_was_in_flight_runs_again_in_order_and_before_anything_new() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[4, 1, 3]);
    bench.serve();
    assert_eq!((memory.version(), memory.marked()), (1, vec![12, 3, 9]));
    offer(&mut bench.guest, &[0]);
    let mut bench = successor(bench, memory.inflight(), &[]);
    bench.serve();
    assert_eq!((got(&bench), used(&mut bench)), (vec![12, 3, 9, 0], vec![12, 3, 9, 0]));
    assert_eq!((memory.used_idx(), memory.marked(), bench.worker.awaited()), (4, vec![], 0));
    assert_eq!([0, 1, 3, 4].map(|n| bench.guest.status(n)), [OK; 4]);
    assert_eq!(bench.inflight.counts().found, 3);
    // It goes on.
    offer(&mut bench.guest, &[5, 6]);
    bench.serve();
    assert_eq!((used(&mut bench), bench.vring.queue_next_avail()), (vec![15, 18], 6));
}

#[test]
fn a_domain_sees_nothing_of_a_batch_that_is_not_marked() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hang_at=1"]);
    offer(&mut bench.guest, &[0]);
    let at_once = bench.guest.request(1, Kind::Unknown);
    bench.guest.offer(at_once);
    offer(&mut bench.guest, &[2]);
    let stage = Arc::clone(&bench.puppets.stage);
    let marked = std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            testing::until("a request", || stage.lines("a", "got").len() == 1);
            let marked = memory.marked();
            stage.release.store(true, Ordering::Release);
            marked
        });
        bench.serve();
        looks.join().expect("no panic")
    });
    assert_eq!(marked, [0, 3, 6], "in the order of the ring");
    assert_eq!((memory.marked(), memory.used_idx()), (vec![], 3));
}

#[test]
fn what_was_answered_out_of_order_does_not_run_again() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0, 1]);
    let at_once = bench.guest.request(2, Kind::Unknown);
    bench.guest.offer(at_once);
    offer(&mut bench.guest, &[3]);
    bench.serve();
    assert_eq!((bench.guest.used_idx(), memory.marked()), (1, vec![0, 3, 9]));
    let mut bench = successor(bench, memory.inflight(), &["hold=true"]);
    bench.serve();
    assert_eq!((got(&bench), bench.vring.queue_next_avail()), (vec![0, 3, 9], 4));
    // And if that one is killed as well.
    let mut bench = successor(bench, memory.inflight(), &[]);
    bench.serve();
    assert_eq!((got(&bench), used(&mut bench)), (vec![0, 3, 9], vec![6, 0, 3, 9]));
}

#[test]
fn what_goes_back_to_the_ring_is_taken_from_the_ring() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true", "take=2"]);
    offer(&mut bench.guest, &[0, 1, 2]);
    let at_once = bench.guest.request(3, Kind::Unknown);
    bench.guest.offer(at_once);
    offer(&mut bench.guest, &[4]);
    bench.serve();
    assert_eq!((memory.marked(), bench.vring.queue_next_avail()), (vec![0, 3], 2));
    let mut bench = successor(bench, memory.inflight(), &["take=1"]);
    bench.serve();
    // The fourth is not for the domain, and is answered when its batch ends.
    assert_eq!((got(&bench), used(&mut bench)), (vec![0, 3, 6, 12], vec![0, 3, 6, 9, 12]));
}

#[test]
fn a_domain_that_takes_less_gets_the_rest_of_what_runs_again_later() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0, 1, 2, 3, 4]);
    bench.serve();
    offer(&mut bench.guest, &[5]);
    let mut bench = successor(bench, memory.inflight(), &["hold=true", "take=2"]);
    bench.serve();
    assert_eq!((got(&bench), bench.worker.awaited()), (vec![0, 3], 5));
    assert_eq!(memory.marked(), [0, 3, 6, 9, 12], "they are in flight all the same");
    bench.release();
    bench.serve_until("answers", |bench| bench.guest.used_idx() == 6);
    assert_eq!(got(&bench), [0, 3, 6, 9, 12, 15]);
}

#[test]
fn a_cautious_queue_runs_one_at_a_time_and_nothing_new() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[2, 0, 1]);
    bench.serve();
    offer(&mut bench.guest, &[3, 4]);
    let inflight = Inflight { cautious: true, ..memory.inflight() };
    let mut bench = successor(bench, inflight, &["hold=true"]);
    bench.serve();
    bench.serve();
    assert_eq!((got(&bench), bench.worker.awaited()), (vec![6], 3));
    bench.release();
    bench.serve_until("answers", |bench| bench.guest.used_idx() == 5);
    assert_eq!((got(&bench), used(&mut bench)), (vec![6, 0, 3, 9, 12], vec![6, 0, 3, 9, 12]));
}

#[test]
fn a_request_in_quarantine_is_answered_with_an_error_and_is_known_by_its_number() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0, 1, 2]);
    bench.serve();
    let quarantine = vec![
        Quarantined { queue: 0, head: 3, counter: 2 },
        Quarantined { queue: 0, head: 6, counter: 2 },
        Quarantined { queue: 1, head: 0, counter: 1 },
    ];
    let inflight = Inflight { quarantine, ..memory.inflight() };
    let mut bench = successor(bench, inflight, &[]);
    bench.serve();
    assert_eq!((got(&bench), used(&mut bench)), (vec![0, 6], vec![0, 3, 6]));
    assert_eq!([0, 1, 2].map(|n| bench.guest.status(n)), [OK, IO_ERROR, OK]);
    let counts = bench.inflight.counts();
    assert_eq!((counts.found, counts.quarantined), (3, 1));
    let queue = &bench.puppets.proxy.status().queues[0];
    assert_eq!((queue.requests, queue.errors), (3, 1));
    assert!(memory.marked().is_empty());
}

#[test]
fn a_ring_that_was_stopped_goes_on_behind_its_answers_or_where_the_frontend_says() {
    for is_forgotten in [false, true] {
        let memory = Memory::new(SIZE);
        let mut bench = served_with(&memory, &["hold=true"]);
        offer(&mut bench.guest, &[0]);
        bench.serve();
        bench.vring.set_queue_ready(false);
        bench.serve();
        assert_eq!((memory.version(), memory.marked()), (1, vec![0]), "it is in flight still");
        bench.vring.set_queue_ready(true);
        bench.serve();
        assert_eq!(got(&bench), [0], "and not from an earlier process");
        bench.vring.set_queue_ready(false);
        bench.release();
        bench.serve_until("its end", |bench| bench.guest.used_idx() == 1);
        assert_eq!((memory.version(), memory.marked()), (1, vec![]));
        if is_forgotten {
            // As it is done by what keeps the region, when the frontend was told.
            memory.file.write_all_at(&[0; 16], 0).expect("the region");
        }
        offer(&mut bench.guest, &[1, 2]);
        bench.vring.set_queue_next_avail(2);
        bench.vring.set_queue_ready(true);
        bench.serve();
        let expected = if is_forgotten { vec![0, 6] } else { vec![0, 3, 6] };
        assert_eq!((got(&bench), memory.version()), (expected, 1));
    }
}

#[test]
fn a_driver_that_begins_anew_begins_with_nothing() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &[]);
    bench.guest.reads(0..7);
    bench.serve();
    assert_eq!(memory.used_idx(), 7);
    let mut fresh = Bench::new(&[]);
    fresh.inflight.set(Some(memory.inflight()));
    fresh.guest.reads(2..5);
    fresh.serve();
    assert_eq!((got(&fresh), memory.used_idx()), (vec![6, 9, 12], 3));
}

#[test]
fn a_session_that_gives_up_leaves_its_marks() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0, 1]);
    bench.serve();
    bench.phase.advance_to(Phase::Detached);
    bench.release();
    bench.serve_with(|_| true);
    assert_eq!((bench.worker.awaited(), memory.marked()), (0, vec![0, 3]), "not published");
    let mut bench = successor(bench, memory.inflight(), &["hold=true", "take=1"]);
    bench.serve();
    assert_eq!(bench.worker.awaited(), 2);
    bench.phase.advance_to(Phase::Detached);
    assert_eq!(bench.worker.awaited(), 1, "the other is left to whatever comes");
    bench.worker.abandon();
    bench.serve_with(|_| true);
    assert_eq!((got(&bench), memory.marked()), (vec![0], vec![0, 3]));
    let mut bench = successor(bench, memory.inflight(), &[]);
    bench.serve();
    assert_eq!((got(&bench), used(&mut bench)), (vec![0, 3], vec![0, 3]));
}

#[test]
fn a_stop_waits_for_what_runs_again() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0, 1, 2]);
    bench.serve();
    let inflight = Inflight { cautious: true, ..memory.inflight() };
    let mut bench = successor(bench, inflight, &["hold=true"]);
    bench.serve();
    bench.vring.set_queue_ready(false);
    bench.release();
    bench.serve_with(|_| true);
    assert_eq!((bench.worker.awaited(), used(&mut bench)), (0, vec![0, 3, 6]));
    bench.serve();
    assert_eq!(bench.vring.queue_next_avail(), 3);
}

#[test]
fn a_ring_that_is_left_to_another_process_runs_no_more_of_what_an_earlier_one_had() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0, 1, 2]);
    bench.serve();
    let inflight = Inflight { cautious: true, leaves: true, ..memory.inflight() };
    let mut bench = successor(bench, inflight, &["hold=true"]);
    bench.serve();
    assert_eq!(got(&bench), [0]);
    // As a stop of the ring does amid a migration.
    bench.vring.set_queue_ready(false);
    bench.phase.hush(0);
    bench.inflight.renew();
    bench.release();
    bench.serve_with(|_| true);
    bench.serve();
    assert_eq!((got(&bench), bench.worker.awaited()), (vec![0], 0));
    assert_eq!((used(&mut bench), memory.marked()), (vec![], vec![0, 3, 6]));
    // The migration has failed: it goes on here.
    bench.vring.set_queue_ready(true);
    bench.serve_until("answers", |bench| bench.guest.used_idx() == 3);
    assert_eq!((got(&bench), used(&mut bench)), (vec![0, 0, 3, 6], vec![0, 3, 6]));
}

#[test]
fn a_head_that_comes_twice_in_a_batch_is_marked_once_and_breaks_the_ring() {
    for second in [Kind::Unknown, Kind::Read(512)] {
        let memory = Memory::new(SIZE);
        let mut bench = served_with(&memory, &[]);
        let head = bench.guest.request(1, Kind::Unknown);
        bench.guest.offer(head);
        bench.guest.offer(head);
        bench.serve();
        assert_eq!((used(&mut bench), memory.used_idx(), memory.marked()), (vec![3], 1, vec![]));
        assert_eq!(bench.puppets.proxy.status().queues[0].malformed, 1);
        // It is no more than that while the ring is as it is.
        bench.guest.request(1, second);
        bench.guest.offer(head);
        bench.serve();
        assert_eq!((used(&mut bench), got(&bench)), (vec![], vec![]));
    }
}

#[test]
fn a_ring_that_is_given_another_size_is_marked_by_it() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    bench.vring.set_queue_size(SIZE / 2);
    offer(&mut bench.guest, &[0]);
    bench.serve();
    // As the session does for a ring that is off and has been on.
    bench.vring.set_enabled(false);
    bench.vring.set_queue_size(SIZE);
    bench.inflight.renew();
    bench.vring.set_enabled(true);
    offer(&mut bench.guest, &[7]);
    bench.serve();
    assert_eq!((got(&bench), memory.marked()), (vec![0], vec![0]), "the first is awaited");
    bench.release();
    bench.serve_until("answers", |bench| bench.guest.used_idx() == 2);
    assert_eq!((used(&mut bench), memory.marked(), memory.used_idx()), (vec![0, 21], vec![], 2));
}

#[test]
fn a_region_is_replaced_when_what_is_in_flight_has_ended() {
    let (memory, other) = (Memory::new(SIZE), Memory::new(SIZE));
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0]);
    bench.serve();
    bench.inflight.set(Some(other.inflight()));
    offer(&mut bench.guest, &[1, 2]);
    bench.serve();
    assert_eq!((got(&bench), memory.marked(), other.version()), (vec![0], vec![0], 0));
    bench.release();
    bench.serve_until("answers", |bench| bench.guest.used_idx() == 3);
    assert_eq!((memory.marked(), memory.used_idx()), (vec![], 1));
    assert_eq!((other.version(), other.used_idx()), (1, 3));
    bench.inflight.set(None);
    offer(&mut bench.guest, &[3]);
    bench.serve();
    assert_eq!((bench.guest.used_idx(), other.used_idx()), (4, 3));
}

#[test]
fn a_region_that_is_too_small_for_the_ring_is_refused() {
    let memory = Memory::new(SIZE / 2);
    memory.file.write_all_at(&[1], 0).expect("the region");
    let mut bench = served_with(&memory, &[]);
    offer(&mut bench.guest, &[0]);
    bench.serve();
    assert_eq!((bench.guest.used_idx(), bench.guest.status(0)), (0, NONE));
    assert_eq!(memory.word(0), 0, "it is waited for");
    let fitting = Memory::new(SIZE);
    bench.inflight.set(Some(fitting.inflight()));
    bench.vring.set_queue_ready(false);
    bench.serve();
    bench.vring.set_queue_ready(true);
    bench.serve();
    assert_eq!((bench.guest.used_idx(), bench.guest.status(0)), (1, OK));
}

#[test]
fn marks_that_the_driver_knows_nothing_of_are_left_out() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0, 1, 2]);
    bench.serve();
    // The driver has begun anew, and has offered less than was in flight.
    let mut fresh = Bench::new(&[]);
    fresh.inflight.set(Some(memory.inflight()));
    offer(&mut fresh.guest, &[5]);
    fresh.serve();
    assert_eq!((got(&fresh), used(&mut fresh), memory.marked()), (vec![15], vec![15], vec![]));
}

#[test]
fn a_chain_that_is_no_chain_any_more_is_given_back() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0, 1]);
    bench.serve();
    // A loop.
    bench.guest.descriptor(0, 0x4000, 16, 1, 0);
    let mut bench = successor(bench, memory.inflight(), &[]);
    bench.serve();
    let mut used = used(&mut bench);
    used.sort_unstable();
    assert_eq!((got(&bench), used, memory.marked()), (vec![3], vec![0, 3], vec![]));
}

#[test]
fn a_head_that_there_is_not_is_given_back_and_disturbs_no_mark() {
    let memory = Memory::new(SIZE);
    let mut bench = served_with(&memory, &["hold=true"]);
    offer(&mut bench.guest, &[0]);
    bench.guest.offer(SIZE + 1);
    offer(&mut bench.guest, &[1]);
    bench.serve();
    assert_eq!((used(&mut bench), memory.marked()), (vec![SIZE + 1], vec![0, 3]));
    assert_eq!(memory.used_idx(), 1);
    let mut bench = successor(bench, memory.inflight(), &[]);
    bench.serve();
    assert_eq!((got(&bench), bench.guest.used_idx()), (vec![0, 3], 3));
}

#[test]
fn a_worker_that_gives_up_has_nothing_in_flight() {
    let memory = channel::memfd("counters").unwrap();
    let memory = telemetry::counts::make(memory, 1).unwrap();
    let in_flight = || telemetry::counts::read(&memory, 1).unwrap()[0].in_flight;
    let counters = telemetry::Counters::map(&memory, 1).unwrap();
    let mut bench = Bench::new(&["hold=true"]);
    bench.worker = bench.worker.counting(counters.line(0));
    bench.guest.reads(0..2);
    bench.serve();
    assert_eq!(in_flight(), 2);
    bench.phase.advance_to(Phase::Detached);
    bench.worker.abandon();
    assert_eq!(in_flight(), 0);
}
