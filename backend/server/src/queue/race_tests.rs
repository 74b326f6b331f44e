//! What a driver does between two steps of a worker that is about to sleep.
//!
//! The worker asks whether the ring is on, once after it has said that it sleeps, and then turns
//! notifications on: a ring that does something when it is asked lets a test be quicker than that.

use super::inputs::BatchInputs;
use super::tests::Bench;
use crate::testing::{self, AVAIL, END, Guest, Kind, NEXT, Puppets, SIZE, WRITE};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use virtqueue::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

/// The descriptor flag of a table.
const INDIRECT: u16 = 4;

type Memory = GuestMemoryAtomic<GuestMemory>;

/// A ring that calls `asked` each time that it is asked how it is.
struct Interposed<F> {
    ring: VringMutex<Memory>,
    asked: F,
}

impl<'a, F: 'a> VringStateGuard<'a, Memory> for Interposed<F> {
    type G = <VringMutex<Memory> as VringStateGuard<'a, Memory>>::G;
}

impl<'a, F: 'a> VringStateMutGuard<'a, Memory> for Interposed<F> {
    type G = <VringMutex<Memory> as VringStateMutGuard<'a, Memory>>::G;
}

impl<F: Fn() + 'static> VringT<Memory> for Interposed<F> {
    fn new(_: Memory, _: u16) -> Result<Self, Error> {
        Err(Error::QueueNotReady)
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        (self.asked)();
        self.ring.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.ring.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.ring.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.ring.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.ring.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.ring.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.ring.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.ring.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), Error> {
        self.ring.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.ring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.ring.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.ring.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.ring.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.ring.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.ring.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.ring.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.ring.set_kick(file);
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.ring.read_kick()
    }

    fn set_call(&self, file: Option<File>) {
        self.ring.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.ring.set_err(file);
    }
}

/// Sets `avail.idx` in memory, as the driver does.
fn set_avail_idx(memory: &Memory, idx: u16) {
    memory.memory().write_obj(idx, GuestAddress(AVAIL + 2)).expect("guest memory");
}

#[test]
fn what_comes_before_kicks_are_turned_on_needs_none() {
    for has_event_idx in [false, true] {
        let mut bench = Bench::with(Puppets::start(1, &[]), has_event_idx, Duration::ZERO);
        bench.guest.reads(0..1);
        let second = bench.guest.request(1, Kind::Read(512));
        bench.guest.put(1, second);
        bench.guest.set_avail_idx(1);
        // The first was served when the worker asks; the driver has not been asked for kicks yet.
        let memory = bench.guest.memory.clone();
        let asked = move || set_avail_idx(&memory, 2);
        let ring = Interposed { ring: bench.vring.clone(), asked };
        bench.serve_between(&ring, |_| false);
        assert_eq!(bench.guest.used().len(), 2, "event indices: {has_event_idx}");
    }
}

#[test]
fn a_driver_that_announces_what_does_not_come_keeps_no_worker_running() {
    let mut bench = Bench::new(&[]);
    bench.guest.reads(0..1);
    let memory = bench.guest.memory.clone();
    let times = Cell::new(0);
    let asked = move || {
        times.set(times.get() + 1);
        set_avail_idx(&memory, 2);
        assert!(times.get() < 1000, "it runs in circles");
    };
    let ring = Interposed { ring: bench.vring.clone(), asked };
    // By the time that the worker looks there is nothing.
    let memory = bench.guest.memory.clone();
    bench.serve_between(&ring, |_| {
        set_avail_idx(&memory, 1);
        false
    });
    assert_eq!(bench.guest.used().len(), 1);
    assert_eq!(bench.puppets.proxy.status().queues[0].malformed, 1, "the ring makes no sense");
}

/// A bench whose domain has died with `count` requests that can never be answered; another serves,
/// and the ring is set up again.
fn with_lost(count: u16, submit: impl Fn(&mut Bench)) -> Bench {
    let puppets = Puppets::with_standby(1, &["hold=true", "break=reap,drop"]);
    let mut bench = Bench::with(puppets, false, Duration::ZERO);
    submit(&mut bench);
    bench.serve_until("requests", |bench| bench.worker.awaited() == usize::from(count));
    bench.release();
    bench.serve_until("a verdict", |bench| bench.worker.unanswerable() == usize::from(count));
    bench.puppets.upgrade("c", &[]).expect("an upgrade");
    bench.vring.set_queue_ready(false);
    bench.serve();
    bench.vring.set_queue_ready(true);
    bench.serve();
    bench
}

#[test]
fn the_head_of_a_lost_request_that_comes_while_the_worker_lies_down_is_served() {
    let mut bench = with_lost(2, |bench| bench.guest.reads(0..2));
    let head = bench.guest.request(0, Kind::Read(512));
    bench.guest.put(2, head);
    bench.guest.set_avail_idx(2);
    let memory = bench.guest.memory.clone();
    let asked = move || set_avail_idx(&memory, 3);
    let ring = Interposed { ring: bench.vring.clone(), asked };
    bench.serve_between(&ring, |_| false);
    bench.serve();
    let malformed = bench.puppets.proxy.status().queues[0].malformed;
    assert_eq!((bench.guest.used_idx(), malformed), (1, 0));
}

#[test]
fn a_ring_whose_heads_are_all_those_of_lost_requests_is_served_when_it_is_set_up_again() {
    // One descriptor each, of a table with two.
    let flush = |bench: &Bench, head: u16| {
        let (header, table) = (0x7000 + 16 * u64::from(head), 0x6000 + 64 * u64::from(head));
        bench.guest.write(header, 4u32);
        for (at, addr, len, flags) in
            [(table, header, 16u32, NEXT), (table + 16, 0x5000 + u64::from(head), 1, WRITE)]
        {
            bench.guest.write(at, addr);
            bench.guest.write(at + 8, len);
            bench.guest.write(at + 12, flags);
            bench.guest.write(at + 14, 1u16);
        }
        bench.guest.descriptor(head, table, 32, INDIRECT, 0);
    };
    let mut bench = with_lost(SIZE, |bench| {
        for head in 0..SIZE {
            flush(bench, head);
            bench.guest.offer(head);
        }
    });
    bench.guest.offer(0);
    bench.serve_until("an answer", |bench| bench.guest.used_idx() == 1);
}

#[test]
fn what_a_dead_domain_left_runs_again_without_a_wait_between_batches() {
    const ALL: u16 = 20;
    let puppets = Puppets::start(1, &["hold=true"]);
    puppets.upgrade("b", &["hold=true", "die_at=20"]).expect("an upgrade");
    let mut bench = Bench::with(puppets, false, Duration::ZERO);
    for head in 0..ALL {
        bench.guest.flush_with(head, SIZE - 1);
        bench.guest.offer(head);
    }
    bench.serve_until("requests", |bench| bench.got("b").len() == usize::from(ALL));
    bench.serve_until("a takeover", |bench| match bench.got("a").len() {
        0 => false,
        got => {
            assert_eq!(got, usize::from(ALL), "none of them has ended");
            true
        }
    });
    bench.release();
    bench.serve_until("answers", |bench| bench.guest.used_idx() == ALL);
}

/// Serves while the memory map becomes another between the look at its version and the look at the
/// ring. The ring is the same in both; `driver` goes on in the new one.
fn serve_over_a_change(bench: &mut Bench, new: GuestMemory, driver: impl Fn(&mut Guest)) {
    let is_done = Cell::new(false);
    let guest = RefCell::new(&mut bench.guest);
    let memory = guest.borrow().memory.clone();
    let new = Cell::new(Some(new));
    let (version, limits, inflight) = (&bench.memory_version, &bench.limits, &bench.inflight);
    let limiter = &bench.limiter;
    bench.worker.serve(&bench.vring, || {
        let seen = version.load(Ordering::Acquire);
        if !is_done.replace(true) {
            memory.lock().expect("no panic").replace(new.take().expect("once"));
            version.store(2, Ordering::Release);
            driver(&mut guest.borrow_mut());
        }
        BatchInputs {
            stop_popping: false,
            limits,
            memory_version: seen,
            newest_version: version,
            memory: &memory,
            inflight,
            limiter,
        }
    });
}

#[test]
fn a_ring_in_memory_that_was_just_added_is_served() {
    let mut bench = Bench::new(&[]);
    let elsewhere = GuestMemory::from_ranges(&[(GuestAddress(END), 0x1000)]).expect("memory");
    bench.guest.memory.lock().expect("no panic").replace(elsewhere);
    bench.vring.set_queue_ready(false);
    // The worker has the map without it.
    bench.serve();
    let vring = bench.vring.clone();
    serve_over_a_change(&mut bench, testing::map(), |guest| {
        guest.reads(0..1);
        vring.set_queue_ready(true);
    });
    let malformed = bench.puppets.proxy.status().queues[0].malformed;
    assert_eq!((bench.guest.status(0), bench.guest.used_idx(), malformed), (0, 1, 0));
}

#[test]
fn memory_that_was_just_removed_is_not_touched() {
    let mut bench = Bench::new(&[]);
    bench.guest.reads(0..1);
    bench.serve();
    let old = bench.guest.memory.memory().into_inner();
    // The data of the second request is behind the end of what is left, of which the beginning is
    // the same.
    let mut rest = vec![0; 0x9000];
    old.read_slice(&mut rest, GuestAddress(0)).expect("guest memory");
    let left = GuestMemory::from_ranges(&[(GuestAddress(0), rest.len())]).expect("memory");
    left.write_slice(&rest, GuestAddress(0)).expect("guest memory");
    let gone = GuestAddress(0x9000);
    old.write_obj(0x1234_5678_u32, gone).expect("guest memory");
    serve_over_a_change(&mut bench, left, |guest| {
        guest.reads(1..2);
        // It is the same ring in both.
        let mut now = vec![0; 0x9000];
        guest.memory.memory().read_slice(&mut now, GuestAddress(0)).expect("guest memory");
        old.write_slice(&now, GuestAddress(0)).expect("guest memory");
    });
    assert_eq!((bench.guest.status(1), bench.guest.used_idx()), (1, 2), "an I/O error");
    assert_eq!(old.read_obj::<u32>(gone).expect("guest memory"), 0x1234_5678);
}
