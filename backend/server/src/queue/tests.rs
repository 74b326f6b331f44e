//! A worker on a memory map and puppets, without a socket: what a guest's driver sees of it.

use super::{BatchInputs, QueueWorker};
use crate::inflight::SharedInflight;
use crate::phase::{Phase, PhaseCell};
use crate::testing::{
    self, END, Guest, Kind, NEXT, NONE, PATIENCE, Puppets, SIZE, Silent, WRITE, copy,
};
use proxy::State;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vhost_user_backend::{VringMutex, VringT};
use virtio_blk::{Limits, features};
use virtqueue::GuestMemory;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};

pub(super) const OK: u8 = 0;
pub(super) const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A guest, its device, and the worker between them.
pub(super) struct Bench {
    pub(super) guest: Guest,
    pub(super) puppets: Puppets,
    pub(super) vring: VringMutex<super::inputs::Memory>,
    pub(super) phase: Arc<PhaseCell>,
    pub(super) worker: QueueWorker,
    pub(super) limits: Limits,
    pub(super) memory_version: AtomicU64,
    pub(super) inflight: SharedInflight,
    pub(super) limiter: crate::limiter::Limiter,
}

impl Bench {
    pub(super) fn new(script: &[&str]) -> Self {
        Self::with(Puppets::start(1, script), false, Duration::ZERO)
    }

    pub(super) fn with(puppets: Puppets, has_event_idx: bool, poll: Duration) -> Self {
        Self::of(Guest::new(has_event_idx), puppets, poll)
    }

    /// Of a guest that may have been running before.
    pub(super) fn of(guest: Guest, puppets: Puppets, poll: Duration) -> Self {
        let vring = VringMutex::new(guest.memory.clone(), SIZE).expect("a ring");
        guest.start(&vring);
        let phase = Arc::<PhaseCell>::default();
        let slots = usize::from(SIZE);
        let device = puppets.proxy.worker(0, slots, Box::new(Silent)).expect("a free slot");
        let worker = QueueWorker::new(device, 0, SIZE, poll, Arc::clone(&phase));
        let limits = Limits::new(&puppets.proxy.domain().info, features::FLUSH);
        let (memory_version, inflight) = (AtomicU64::new(1), SharedInflight::default());
        let limiter = crate::limiter::Limiter::default();
        Self { guest, puppets, vring, phase, worker, limits, memory_version, inflight, limiter }
    }

    /// Serves until the worker would sleep; `between` is called before each batch, and says whether
    /// nothing more is to be taken.
    pub(super) fn serve_with(&mut self, between: impl Fn(&Guest) -> bool) {
        let vring = self.vring.clone();
        self.serve_between(&vring, between);
    }

    /// As [`serve_with`](Self::serve_with), on another face of the ring.
    pub(super) fn serve_between(
        &mut self,
        vring: &impl VringT<GuestMemoryAtomic<GuestMemory>>,
        between: impl Fn(&Guest) -> bool,
    ) {
        let Self { guest, worker, limits, memory_version, inflight, limiter, .. } = self;
        worker.serve(vring, || BatchInputs {
            stop_popping: between(guest),
            limits,
            memory_version: memory_version.load(Ordering::Acquire),
            newest_version: memory_version,
            memory: &guest.memory,
            inflight,
            limiter,
        });
    }

    pub(super) fn serve(&mut self) {
        self.serve_with(|_| false);
    }

    /// Serves again and again until `done`.
    #[track_caller]
    pub(super) fn serve_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.serve();
            if done(self) {
                return;
            }
            assert!(Instant::now() < deadline, "{what}: {:?}", self.puppets.proxy.status());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub(super) fn release(&self) {
        self.puppets.stage.release.store(true, Ordering::Release);
    }

    /// Which slots the domain `label` got, in order.
    pub(super) fn got(&self, label: &str) -> Vec<String> {
        self.puppets.stage.lines(label, "got")
    }
}

#[test]
fn each_kind_of_request_gets_its_status_and_its_element() {
    let mut bench = Bench::new(&[]);
    let kinds = [Kind::Read(512), Kind::Write(1024), Kind::Flush, Kind::Unknown, Kind::Read(100)];
    for (n, kind) in (0..).zip(kinds) {
        let head = bench.guest.request(n, kind);
        bench.guest.offer(head);
    }
    bench.serve();
    // The puppet writes nothing, so a read has written no data and no status from the front.
    let mut used = bench.guest.used();
    used.sort_unstable();
    assert_eq!(used.iter().map(|used| used.0).collect::<Vec<_>>(), [0, 3, 6, 9, 12]);
    assert_eq!([used[1].1, used[2].1, used[3].1], [1, 1, 1]);
    let status: Vec<_> = (0..6).map(|n| bench.guest.status(n)).collect();
    assert_eq!(status, [OK, OK, OK, UNSUPPORTED, IO_ERROR, NONE]);
    let queue = &bench.puppets.proxy.status().queues[0];
    assert_eq!((queue.requests, queue.errors, queue.in_flight), (5, 2, 0));
    assert_eq!(bench.got("a").len(), 3, "two of them are no business of the domain's");
}

#[test]
fn more_than_a_batch_is_answered_in_one_go() {
    let mut bench = Bench::new(&[]);
    let heads: Vec<u16> = (0..SIZE - 1).collect();
    heads.iter().for_each(|&head| bench.guest.flush_with(head, SIZE - 1));
    heads.iter().for_each(|&head| bench.guest.offer(head));
    bench.serve();
    let used: Vec<_> = bench.guest.used().into_iter().map(|used| used.0).collect();
    assert_eq!((used, bench.vring.queue_next_avail()), (heads, SIZE - 1));
}

#[test]
fn what_the_domain_does_not_take_goes_back_to_the_ring_in_order() {
    let mut bench = Bench::new(&["take=3"]);
    for n in 0..8 {
        let kind = if n == 4 { Kind::Unknown } else { Kind::Read(512) };
        let head = bench.guest.request(n, kind);
        bench.guest.offer(head);
    }
    bench.serve();
    let heads: Vec<_> = bench.guest.used().into_iter().map(|used| used.0).collect();
    // The fifth is not for the domain, and is answered when its batch ends.
    assert_eq!(heads, [0, 3, 6, 9, 15, 18, 12, 21]);
    assert_eq!(bench.got("a").len(), 7);
    assert_eq!(bench.worker.awaited(), 0);
}

#[test]
fn a_domain_that_is_full_is_offered_nothing_until_something_has_ended() {
    let mut bench = Bench::new(&["take=2", "hold=true"]);
    bench.guest.reads(0..5);
    bench.serve();
    assert_eq!((bench.got("a").len(), bench.worker.awaited()), (2, 2));
    assert_eq!(bench.vring.queue_next_avail(), 2, "the others are in the ring");
    bench.serve();
    assert_eq!(bench.got("a").len(), 2);
    bench.release();
    bench.serve_until("answers", |bench| bench.guest.used_idx() == 5);
    let heads: Vec<_> = bench.guest.used().into_iter().map(|used| used.0).collect();
    assert_eq!(heads, [0, 3, 6, 9, 12]);
}

#[test]
fn a_domain_that_takes_nothing_does_not_leave_the_guest_waiting() {
    let mut bench = Bench::new(&["take=0"]);
    bench.guest.reads(0..2);
    bench.serve();
    assert_eq!(bench.guest.used().len(), 2);
    assert_eq!([0, 1].map(|n| bench.guest.status(n)), [IO_ERROR; 2]);
}

#[test]
fn kicks_are_refused_while_the_worker_looks_by_itself() {
    let mut bench = Bench::new(&[]);
    bench.guest.reads(0..2);
    let seen = RefCell::new(Vec::new());
    bench.serve_with(|guest| {
        seen.borrow_mut().push((guest.used_idx(), guest.kicks_are_refused()));
        false
    });
    assert_eq!(seen.into_inner(), [(0, false), (2, true)]);
    assert!(!bench.guest.kicks_are_refused(), "it is asleep now");
}

#[test]
fn without_event_indices_the_guest_is_called_unless_it_says_no() {
    let mut bench = Bench::new(&[]);
    bench.guest.reads(0..2);
    bench.serve();
    assert_eq!(bench.guest.calls(), 1, "once for both");
    bench.guest.refuse_calls(true);
    bench.guest.reads(2..4);
    bench.serve();
    assert_eq!((bench.guest.calls(), bench.guest.used_idx()), (0, 4));
}

#[test]
fn with_event_indices_the_guest_is_called_when_its_index_is_passed() {
    let mut bench = Bench::with(Puppets::start(1, &[]), true, Duration::ZERO);
    bench.guest.call_at(2);
    bench.guest.reads(0..2);
    bench.serve();
    assert_eq!((bench.guest.calls(), bench.guest.used_idx()), (0, 2));
    assert_eq!(bench.guest.kick_at(), 2, "a kick is due for the next chain");
    bench.guest.reads(2..5);
    bench.serve();
    assert_eq!((bench.guest.calls(), bench.guest.used_idx()), (1, 5));
    assert_eq!(bench.guest.kick_at(), 5);
    assert!(!bench.guest.kicks_are_refused(), "the flag is not for this driver");
}

#[test]
fn a_worker_that_polls_needs_no_kick() {
    let mut bench = Bench::with(Puppets::start(1, &[]), false, PATIENCE);
    bench.guest.reads(0..1);
    let heads: Vec<_> = (1..5).map(|n| bench.guest.request(n, Kind::Read(512))).collect();
    // With nothing to do it asks for its inputs over and over; each time a chain is there then.
    bench.serve_with(|guest| {
        let answered = guest.used_idx();
        if let Some(head) = heads.get(usize::from(answered).wrapping_sub(1)) {
            assert!(guest.kicks_are_refused());
            guest.put(answered, *head);
        }
        answered == 5
    });
    assert_eq!(bench.guest.used_idx(), 5);
}

#[test]
fn hostile_chains_are_given_back_and_disturb_no_other() {
    let mut bench = Bench::new(&[]);
    let guest = &mut bench.guest;
    // A loop, a table that is left, a buffer outside, no room for a status.
    guest.descriptor(27, 0x4000, 16, NEXT, 28);
    guest.descriptor(28, 0x4000, 16, NEXT, 28);
    let outside = guest.request_at(1, Kind::Read(512), END);
    guest.descriptor(29, 0x4000, 16, NEXT, SIZE);
    guest.descriptor(26, 0x4000, 16, WRITE, 0);
    for head in [27, outside, 29, 26, SIZE + 5] {
        guest.offer(head);
    }
    guest.reads(0..1);
    bench.serve();
    let used = bench.guest.used();
    assert!(used.iter().filter(|used| used.1 == 0).count() >= 3, "{used:?}");
    assert_eq!(used.len(), 6, "each comes back: {used:?}");
    assert_eq!((bench.guest.status(0), bench.guest.status(1)), (OK, IO_ERROR));
    let queue = &bench.puppets.proxy.status().queues[0];
    assert!(queue.malformed >= 3, "{queue:?}");
    bench.guest.reads(2..4);
    bench.serve();
    assert_eq!([2, 3].map(|n| bench.guest.status(n)), [OK; 2]);
}

#[test]
fn an_index_that_makes_no_sense_breaks_the_ring_until_it_is_set_up_again() {
    let mut bench = Bench::new(&[]);
    bench.guest.reads(0..1);
    bench.serve();
    bench.guest.set_avail_idx(1 + SIZE + 1);
    bench.serve();
    bench.guest.set_avail_idx(2);
    bench.guest.reads(1..2);
    bench.serve();
    assert_eq!((bench.guest.used_idx(), bench.guest.status(1)), (1, NONE), "it is left alone");
    assert_eq!(bench.puppets.proxy.status().queues[0].malformed, 1);
    bench.vring.set_queue_ready(false);
    bench.serve();
    bench.vring.set_queue_ready(true);
    bench.serve();
    assert_eq!((bench.guest.used_idx(), bench.guest.status(1)), (2, OK));
}

#[test]
fn a_chain_that_is_offered_while_it_is_in_flight_breaks_the_ring() {
    for is_one_batch in [false, true] {
        let mut bench = Bench::new(&["hold=true"]);
        bench.guest.reads(0..2);
        if !is_one_batch {
            bench.serve();
        }
        bench.guest.offer(0);
        bench.guest.reads(2..3);
        bench.serve();
        assert_eq!(bench.got("a").len(), 2, "what came before it is served, and nothing else");
        assert_eq!(bench.puppets.proxy.status().queues[0].malformed, 1);
        bench.release();
        bench.serve();
        let heads: Vec<_> = bench.guest.used().into_iter().map(|used| used.0).collect();
        assert_eq!((heads, bench.guest.status(2)), (vec![0, 3], NONE), "each is answered once");
        bench.vring.set_queue_ready(false);
        bench.serve();
        bench.vring.set_queue_ready(true);
        bench.serve();
        assert_eq!((bench.got("a").len(), bench.worker.awaited()), (4, 0));
    }
}

#[test]
fn the_chain_of_a_request_that_never_ends_can_be_offered_again() {
    // The end of a domain that panics is no fence: what it had may be written to for ever.
    let puppets = Puppets::with_standby(1, &["hold=true", "break=reap,drop"]);
    let mut bench = Bench::with(puppets, false, Duration::ZERO);
    bench.guest.reads(0..2);
    bench.serve();
    bench.release();
    bench.serve_until("a verdict", |bench| bench.worker.unanswerable() == 2);
    assert_eq!((bench.worker.awaited(), bench.guest.used_idx()), (0, 0));
    // As after a reset of the guest.
    bench.guest.reads(0..1);
    bench.puppets.upgrade("c", &[]).expect("an upgrade");
    bench.serve_until("an answer", |bench| bench.guest.used_idx() == 1);
    assert_eq!((bench.guest.status(0), bench.guest.status(1)), (OK, NONE));
    assert_eq!((bench.worker.unanswerable(), bench.worker.detach()), (2, 2));
}

#[test]
fn a_ring_outside_of_memory_is_left_alone() {
    let mut bench = Bench::new(&[]);
    bench.vring.set_queue_info(0x1000, 0x2000, END).expect("addresses");
    bench.guest.reads(0..1);
    bench.serve();
    assert_eq!(bench.guest.status(0), NONE);
    assert_eq!(bench.puppets.proxy.status().queues[0].malformed, 1);
}

#[test]
fn a_ring_that_is_off_is_not_touched() {
    let mut bench = Bench::new(&[]);
    bench.guest.reads(0..1);
    bench.vring.set_enabled(false);
    bench.serve();
    assert_eq!((bench.guest.used_idx(), bench.worker.has_taken()), (0, false));
    bench.vring.set_enabled(true);
    bench.serve();
    assert_eq!((bench.guest.used_idx(), bench.worker.has_taken()), (1, true));
}

#[test]
fn a_stop_takes_nothing_more_and_answers_what_is_in_flight() {
    let mut bench = Bench::new(&["hold=true"]);
    bench.guest.reads(0..3);
    bench.serve();
    bench.guest.reads(3..5);
    bench.serve_with(|_| true);
    assert_eq!((bench.worker.awaited(), bench.guest.used_idx()), (3, 0));
    bench.release();
    bench.serve_with(|_| true);
    assert_eq!((bench.worker.awaited(), bench.guest.used_idx()), (0, 3));
    assert_eq!(bench.vring.queue_next_avail(), 3, "the others are in the ring");
    assert_eq!(bench.worker.detach(), 0);
}

#[test]
fn what_ends_after_the_frontend_has_gone_is_not_published() {
    let mut bench = Bench::new(&["hold=true"]);
    bench.guest.reads(0..2);
    bench.serve();
    bench.phase.advance_to(Phase::Detached);
    bench.release();
    bench.serve_with(|_| true);
    assert_eq!((bench.worker.awaited(), bench.guest.used_idx(), bench.guest.calls()), (0, 0, 0));
}

#[test]
fn a_domain_that_panics_under_requests_is_taken_over_from() {
    let puppets = Puppets::with_standby(1, &["hold=true", "die_at=3"]);
    let mut bench = Bench::with(puppets, false, Duration::ZERO);
    bench.guest.reads(0..5);
    bench.serve_until("answers", |bench| bench.guest.used_idx() == 5);
    let heads: Vec<_> = bench.guest.used().into_iter().map(|used| used.0).collect();
    assert_eq!(heads, [0, 3, 6, 9, 12], "in order, each once");
    assert_eq!([0, 1, 2, 3, 4].map(|n| bench.guest.status(n)), [OK; 5]);
    assert_eq!(bench.got("b").len(), 3);
    assert_eq!(bench.got("a").len(), 5, "none of them was answered before");
}

#[test]
fn a_domain_that_panics_with_no_other_there_ends_in_errors() {
    let mut bench = Bench::new(&["break=submit"]);
    bench.guest.reads(0..2);
    bench.serve_until("answers", |bench| bench.guest.used_idx() == 2);
    assert_eq!([0, 1].map(|n| bench.guest.status(n)), [IO_ERROR; 2]);
    let state = || bench.puppets.proxy.status().state;
    testing::until("a fault", || state() == State::Faulted);
}

#[test]
fn an_upgrade_under_requests_is_seen_by_no_driver() {
    let mut bench = Bench::new(&[]);
    bench.guest.reads(0..2);
    bench.serve();
    bench.puppets.upgrade("b", &[]).expect("the worker is asleep");
    bench.guest.reads(2..5);
    bench.serve();
    assert_eq!((bench.got("a").len(), bench.got("b").len()), (2, 3));
    assert_eq!(bench.guest.used().len(), 5);
}

#[test]
fn a_new_memory_map_waits_for_what_is_in_flight_in_the_old_one() {
    let mut bench = Bench::new(&["hold=true"]);
    bench.guest.reads(0..1);
    bench.serve();
    let old = Arc::downgrade(&bench.guest.memory.memory().into_inner());
    let before = bench.guest.memory.memory().into_inner();
    // The same bytes, mapped elsewhere.
    let after = testing::map();
    copy(&before, &after);
    drop(before);
    bench.guest.memory.lock().expect("no panic").replace(after);
    bench.memory_version.store(2, Ordering::Release);
    bench.guest.reads(1..2);
    bench.serve();
    assert!(old.upgrade().is_some(), "something in flight points to it");
    assert_eq!((bench.got("a").len(), bench.guest.used_idx()), (1, 0));
    bench.release();
    bench.serve_until("the second", |bench| bench.got("a").len() == 2);
    assert!(old.upgrade().is_none());
    bench.serve_until("its answer", |bench| bench.worker.awaited() == 0);
    assert_eq!(bench.guest.status(1), OK);
}

#[test]
fn memory_that_is_replaced_just_before_a_request_holds_for_it() {
    for has_served in [true, false] {
        let mut bench = Bench::new(&[]);
        bench.guest.reads(0..u16::from(has_served));
        bench.serve();
        let old = bench.guest.memory.memory().into_inner();
        let is_done = Cell::new(false);
        let Bench { guest, worker, vring, limits, memory_version, inflight, limiter, .. } =
            &mut bench;
        worker.serve(vring, || {
            let seen = memory_version.load(Ordering::Acquire);
            if !is_done.replace(true) {
                // Between the look at the version and the look at the ring.
                let new = testing::map();
                copy(&old, &new);
                guest.memory.lock().expect("no panic").replace(new);
                memory_version.store(2, Ordering::Release);
                let head = guest.request(1, Kind::Read(512));
                guest.put(u16::from(has_served), head);
                // It is the same ring in both.
                copy(&guest.memory.memory().into_inner(), &old);
            }
            BatchInputs {
                stop_popping: false,
                limits,
                memory_version: seen,
                newest_version: memory_version,
                memory: &guest.memory,
                inflight,
                limiter,
            }
        });
        assert_eq!((guest.status(1), guest.used_idx()), (OK, 1 + u16::from(has_served)));
    }
}

#[test]
fn a_worker_that_leaves_with_requests_in_flight_leaves_their_memory_mapped() {
    for (script, stays) in [(&["hold=true"][..], true), (&[], false)] {
        let mut bench = Bench::new(script);
        bench.guest.reads(0..2);
        bench.serve();
        bench.phase.advance_to(Phase::Detached);
        bench.worker.abandon();
        let map = Arc::downgrade(&bench.guest.memory.memory().into_inner());
        let Bench { guest, worker, vring, .. } = bench;
        assert_eq!(worker.detach(), 0, "they might have ended");
        drop((guest, vring));
        assert_eq!(map.upgrade().is_some(), stays, "{script:?}");
    }
}

#[test]
fn a_ring_is_blank_until_its_driver_has_written_to_it() {
    let mut bench = Bench::new(&[]);
    assert!(!bench.worker.is_blank(&bench.vring), "it has not been looked at");
    bench.serve();
    assert!(bench.worker.is_blank(&bench.vring));
    bench.guest.reads(0..1);
    assert!(!bench.worker.is_blank(&bench.vring));
}
