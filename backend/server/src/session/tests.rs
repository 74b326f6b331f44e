//! A session's queues in process: threads that serve puppets, and threads that wait for them.

use super::config::SessionConfig;
use super::context::Context;
use super::drain::Outcome;
use super::frontend::{Backend, Frontend};
use super::queue_control::QueueControl;
use super::rings::Vring;
use super::state::{NotDrained, Session};
use crate::inflight::SharedInflight;
use crate::phase::Phase;
use crate::testing::{self, Guest, Kind, PATIENCE, Puppets, SIZE, Silent, until};
use proxy::State;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};
use vhost::vhost_user::Listener;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringT};
use virtio_blk::features;
use virtio_queue::QueueT;
use virtqueue::GuestMemory;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

mod again;

/// Of one queue.
fn config(poll: Duration) -> SessionConfig {
    let (worker_cpus, inflight) = (Vec::new(), SharedInflight::default());
    SessionConfig {
        queues: 1,
        counters: None,
        queue_size: SIZE,
        poll,
        worker_cpus,
        inflight,
        limiter: Arc::default(),
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(30)
}

fn in_time() -> Instant {
    Instant::now() + PATIENCE
}

/// A session of one queue, without a frontend.
struct Bench {
    guest: Guest,
    puppets: Puppets,
    backend: Backend,
    vring: Vring,
    /// The queue's thread is to end.
    is_over: AtomicBool,
}

impl Bench {
    fn new(script: &[&str]) -> Self {
        Self::with(Puppets::start(1, script), Duration::ZERO)
    }

    fn with(puppets: Puppets, poll: Duration) -> Self {
        let guest = Guest::new(false);
        let session = Session::new(&puppets.proxy, &config(poll), guest.memory.clone());
        let backend = Backend(Arc::new(Frontend::new(session.expect("a session"))));
        // No frontend says that the ring runs.
        let context = &backend.0.session.context;
        context.claim.ring_starts(0, || unreachable!("nothing else uses the disk"));
        assert!(context.claim.is_ours());
        let vring = Vring::new(guest.memory.clone(), SIZE).expect("a ring");
        Self { guest, puppets, backend, vring, is_over: AtomicBool::new(false) }
    }

    fn session(&self) -> &Session {
        &self.backend.0.session
    }

    fn context(&self) -> &Context {
        &self.session().context
    }

    fn control(&self) -> &QueueControl {
        &self.session().queues[0]
    }

    /// The queue's thread, which does what the library's would do, until `is_over`.
    fn thread<'s>(&'s self, scope: &'s Scope<'s, '_>) -> ScopedJoinHandle<'s, ()> {
        let wake_id = self.backend.0.wake_id() as u16;
        let event = move |id| {
            let vrings = std::slice::from_ref(&self.vring);
            let events = vmm_sys_util::epoll::EventSet::IN;
            self.backend.handle_event(id, events, vrings, 0).expect("no event fails");
        };
        scope.spawn(move || {
            event(0);
            while !self.is_over.load(Ordering::Acquire) {
                if self.control().woken() {
                    event(wake_id);
                } else {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        })
    }

    /// Runs `test` beside the queue's thread.
    fn run(&self, test: impl FnOnce()) {
        std::thread::scope(|scope| {
            let thread = self.thread(scope);
            // A test that fails must not wait for ever.
            let failed = catch_unwind(AssertUnwindSafe(test));
            self.is_over.store(true, Ordering::Release);
            self.release();
            thread.join().expect("the queue's thread does not panic");
            failed.unwrap_or_else(|panic| resume_unwind(panic));
        });
    }

    fn release(&self) {
        self.puppets.stage.release.store(true, Ordering::Release);
    }

    /// Has reads in flight.
    fn submit(&mut self, numbers: std::ops::Range<u16>) {
        self.guest.start(&self.vring);
        self.guest.reads(numbers);
    }

    fn in_flight(&self) -> u64 {
        self.puppets.proxy.status().queues[0].in_flight
    }
}

#[test]
fn a_queue_with_nothing_in_flight_is_drained_at_once_and_goes_on() {
    let mut bench = Bench::new(&[]);
    bench.submit(0..2);
    bench.run(|| {
        assert_eq!(bench.control().drain_queue(), Outcome::Clean);
        assert_eq!(bench.session().drain_queue(0), Ok(()));
        bench.control().wake();
        until("answers", || bench.guest.used_idx() == 2);
        assert_eq!(bench.control().wait_drained(in_time()), Outcome::Clean);
    });
}

#[test]
fn a_worker_that_polls_does_not_hold_up_the_end() {
    let mut bench = Bench::with(Puppets::start(1, &[]), PATIENCE);
    bench.submit(0..1);
    bench.run(|| {
        until("an answer", || bench.guest.used_idx() == 1);
        let started = Instant::now();
        bench.session().drain();
        bench.session().close();
        assert!(started.elapsed() < PATIENCE / 2 && !bench.context().phase.is_at(Phase::GaveUp));
    });
}

#[test]
fn what_is_in_flight_is_waited_for() {
    let mut bench = Bench::new(&["hold=true"]);
    bench.submit(0..2);
    bench.run(|| {
        until("requests", || bench.in_flight() == 2);
        let started = Instant::now();
        assert_eq!(bench.control().wait_drained(soon()), Outcome::TimedOut);
        assert!(started.elapsed() >= Duration::from_millis(20));
        bench.release();
        assert_eq!(bench.control().drain_queue(), Outcome::Clean);
        assert_eq!(bench.guest.used_idx(), 2, "they were answered before");
    });
}

#[test]
fn requests_that_can_never_be_answered_are_told_of() {
    // The end of a domain that panics is no fence: what it had may be written to for ever.
    let puppets = Puppets::with_standby(1, &["hold=true", "break=reap,drop"]);
    let mut bench = Bench::with(puppets, Duration::ZERO);
    bench.submit(0..3);
    bench.run(|| {
        until("requests", || bench.in_flight() == 3);
        bench.release();
        let drained = || bench.control().wait_drained(soon()) != Outcome::TimedOut;
        until("the verdict", drained);
        assert_eq!(bench.control().drain_queue(), Outcome::Unanswerable(3));
        let expected = Err(NotDrained::Unanswerable { queue: 0, requests: 3 });
        assert_eq!(bench.session().drain_queue(0), expected);
        assert!(bench.backend.stop_vring(0).is_err(), "the frontend is told");
        bench.session().close();
    });
    assert_eq!(bench.guest.used_idx(), 0);
    let left = bench.puppets.proxy.stop();
    assert!(left.iter().any(|what| what.contains("can never be answered")), "{left:?}");
}

#[test]
fn a_session_that_drains_takes_nothing_more() {
    let mut bench = Bench::new(&["hold=true"]);
    bench.submit(0..2);
    bench.run(|| {
        until("requests", || bench.in_flight() == 2);
        let (context, control) = (bench.context(), bench.control());
        context.phase.advance_to(Phase::Draining);
        bench.guest.put(2, bench.guest.request(2, Kind::Read(512)));
        control.wake();
        assert_eq!(control.wait_drained(soon()), Outcome::TimedOut);
        bench.release();
        assert_eq!(control.wait_drained(in_time()), Outcome::Clean);
        assert_eq!((bench.guest.used_idx(), bench.vring.queue_next_avail()), (2, 2));
        bench.session().close();
        assert!(!context.phase.is_at(Phase::GaveUp), "there was no need");
    });
    assert_eq!(bench.puppets.proxy.stop(), Vec::<String>::new());
}

#[test]
fn a_drain_in_vain_leaves_the_requests_and_says_so() {
    let mut bench = Bench::new(&["hold=true"]);
    bench.submit(0..2);
    bench.run(|| {
        until("requests", || bench.in_flight() == 2);
        bench.context().phase.advance_to(Phase::GaveUp);
        let started = Instant::now();
        bench.session().close();
        assert!(started.elapsed() < Duration::from_secs(5), "there is no patience left");
        assert_eq!(bench.puppets.stage.lines("a", "cancel").len(), 1, "the domain was asked");
        assert_eq!(bench.control().wait_drained(in_time()), Outcome::Clean, "the worker has left");
    });
    assert_eq!(bench.guest.used_idx(), 0, "nothing is published any more");
    let left = bench.puppets.proxy.stop();
    assert!(left.iter().any(|what| what.contains("in flight when the session ended")), "{left:?}");
}

#[test]
fn a_ring_that_cannot_be_stopped_in_time_is_an_error() {
    let mut bench = Bench::new(&["hold=true"]);
    bench.submit(0..1);
    bench.run(|| {
        until("requests", || bench.in_flight() == 1);
        bench.context().phase.advance_to(Phase::GaveUp);
        let error = bench.backend.stop_vring(0).expect_err("it is in flight");
        assert!(error.to_string().contains("was not drained in time"), "{error}");
        bench.release();
        bench.session().close();
    });
}

#[test]
fn a_thread_that_ends_is_not_waited_for() {
    let mut bench = Bench::new(&["hold=true"]);
    bench.submit(0..1);
    bench.run(|| until("requests", || bench.in_flight() == 1));
    assert_eq!(bench.control().drain_queue(), Outcome::Clean);
    assert_eq!(bench.in_flight(), 0, "the worker left with its thread");
    bench.session().close();
    let other = bench.puppets.proxy.worker(0, 4, Box::new(Silent));
    assert!(other.is_some(), "its place is free");
}

#[test]
fn a_queue_of_a_session_that_ends_gets_no_worker() {
    let mut bench = Bench::new(&[]);
    bench.context().phase.advance_to(Phase::Draining);
    bench.submit(0..1);
    bench.run(|| assert_eq!(bench.control().drain_queue(), Outcome::Clean));
    assert_eq!((bench.guest.used_idx(), bench.vring.queue_next_avail()), (0, 0));
    assert_eq!(bench.puppets.stage.lines("a", "attach"), Vec::<String>::new());
}

#[test]
fn a_domain_that_dies_under_a_session_is_replaced_or_the_device_is_faulted() {
    for (puppets, state, status) in [
        (Puppets::with_standby(1, &["die_at=2"]), State::Serving, 0),
        (Puppets::start(1, &["die_at=2"]), State::Faulted, 1),
    ] {
        let mut bench = Bench::with(puppets, Duration::ZERO);
        bench.submit(0..3);
        bench.run(|| {
            until("answers", || {
                bench.control().wake();
                bench.guest.used_idx() == 3
            });
            until("the state", || bench.puppets.proxy.status().state == state);
        });
        assert_eq!((bench.guest.status(0), bench.guest.status(2)), (0, status));
    }
}

#[test]
fn domains_are_told_of_memory_that_comes_and_goes() {
    let bench = Bench::new(&[]);
    let told = || bench.puppets.stage.lines("a", "memory").len();
    let share = |map: GuestMemory| {
        bench.backend.update_memory(GuestMemoryAtomic::new(map)).expect("an update");
    };
    assert!(!bench.context().memory.was_shared());
    let (map, other) = (testing::map(), testing::map());
    share(map.clone());
    assert_eq!((told(), bench.context().memory.version()), (1, 2));
    share(map.clone());
    assert_eq!((told(), bench.context().memory.version()), (1, 3), "the same regions");
    share(other);
    assert_eq!(told(), 3, "one has gone, and one has come");
    bench.run(|| bench.session().close());
    assert_eq!(told(), 4);
    assert!(bench.context().memory.was_shared());
}

#[test]
fn the_configuration_space_is_read_and_a_bad_read_is_refused() {
    let bench = Bench::new(&[]);
    let capacity = bench.backend.get_config(0, 8);
    assert_eq!(capacity, (2048u64).to_le_bytes(), "1 MiB in sectors");
    assert!(!bench.context().connection.is_refused());
    assert!(bench.backend.get_config(4000, 8).is_empty());
    assert!(bench.context().connection.is_refused());
    assert!(bench.backend.set_config(4000, &[0]).is_err(), "there is no other way to say no");
}

#[test]
fn requests_are_held_against_the_capacity_that_the_frontend_was_told() {
    let bench = Bench::new(&[]);
    let sectors = || u64::from_le_bytes(bench.backend.get_config(0, 8).try_into().unwrap());
    let offer = &bench.context().offer;
    // A worker that serves keeps what it has found at its first batch.
    let limits = offer.limits();
    assert_eq!((sectors(), limits.capacity.get()), (2048, 1 << 20));
    bench.puppets.proxy.resize(4 << 20, proxy::Options::default()).unwrap();
    bench.backend.set_config(0, &[]).unwrap();
    assert_eq!(limits.capacity.get(), 1 << 20, "the frontend was not told");
    assert_eq!((sectors(), limits.capacity.get()), (8192, 4 << 20));
    bench.backend.acked_features(features::FLUSH);
    assert_eq!((sectors(), offer.limits().capacity.get()), (8192, 4 << 20));
}

#[test]
fn requests_are_held_against_the_features_that_were_acknowledged() {
    let bench = Bench::new(&[]);
    assert_ne!(bench.backend.features() & features::FLUSH, 0);
    assert_eq!(bench.context().offer.limits().features, 0);
    bench.backend.acked_features(features::FLUSH);
    assert_eq!(bench.context().offer.limits().features, features::FLUSH);
    bench.run(|| bench.backend.reset_device());
}

#[test]
fn a_ring_of_a_size_that_cannot_be_is_refused() {
    let bench = Bench::new(&[]);
    bench.run(|| {
        assert_eq!(bench.control().drain_queue(), Outcome::Clean, "it listens from here on");
        bench.vring.set_queue_size(SIZE);
        assert!(!bench.context().connection.is_refused());
        bench.vring.set_queue_size(2 * SIZE);
        assert!(bench.context().connection.is_refused());
        let refused = bench.vring.set_queue_info(0x1000, 0x2000, 0x3000);
        assert!(refused.is_err());
        bench.vring.set_queue_ready(true);
        assert!(!bench.vring.get_ref().get_queue().ready(), "it does not start");
    });
}

#[test]
fn a_reset_that_is_not_drained_in_time_ends_the_session() {
    // After a swap the domain that keeps a request does not serve any more, so it can be left.
    let mut bench = Bench::new(&["hold=true", "swap=true"]);
    bench.submit(0..1);
    bench.run(|| {
        until("a request", || bench.in_flight() == 1);
        bench.puppets.upgrade("b", &["swap=true"]).expect("a swap");
        bench.control().wake();
        bench.backend.reset_device();
        assert!(bench.context().phase.is_at(Phase::GaveUp), "a new ring would get its answer");
        bench.release();
        assert_eq!(bench.control().wait_drained(in_time()), Outcome::Clean);
        assert_eq!(bench.guest.used_idx(), 0, "nothing is published any more");
    });
}

/// A frontend's message, and the first byte of its answer.
fn ask(frontend: &mut UnixStream, request: u32, body: &[u64], file: Option<&File>) -> u8 {
    tell(frontend, request, body, file);
    let mut answer = [0; 64];
    let len = frontend.read(&mut answer).expect("an answer");
    assert!(len >= 12 && answer[4] & 4 != 0, "{:?}", &answer[..len]);
    answer[12]
}

fn tell(frontend: &UnixStream, request: u32, body: &[u64], file: Option<&File>) {
    // Version 1, and an answer is wanted.
    let header = [request, 9, 8 * body.len() as u32].map(u32::to_ne_bytes).concat();
    let bytes = [header, body.iter().flat_map(|word| word.to_ne_bytes()).collect()].concat();
    let sent = match file {
        Some(file) => frontend.send_with_fd(&bytes[..], file.as_raw_fd()),
        None => frontend.send_with_fds(&[&bytes[..]], &[]),
    };
    assert_eq!(sent.expect("it is sent"), bytes.len());
}

#[test]
fn another_bitmap_is_acknowledged_when_no_worker_marks_in_the_one_before() {
    const PROTOCOL: u64 = 1 << 30;
    const LOG_ALL: u64 = 1 << 26;
    /// LOG_SHMFD and REPLY_ACK.
    const FOR_THE_LOG: u64 = 1 << 1 | 1 << 3;
    const GET_FEATURES: u32 = 1;
    const SET_FEATURES: u32 = 2;
    const SET_OWNER: u32 = 3;
    const SET_LOG_BASE: u32 = 6;
    const SET_PROTOCOL_FEATURES: u32 = 16;

    let bench = Bench::new(&[]);
    bench.guest.start(&bench.vring);
    bench.control().has_ring(&bench.vring);
    bench.context().phase.log().bind(&bench.guest.memory.memory());
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut frontend = UnixStream::connect(&path).expect("connected");
    let memory = bench.guest.memory.clone();
    let mut daemon = VhostUserDaemon::new("log".to_owned(), bench.backend.clone(), memory).unwrap();
    daemon.start(&mut Listener::from(listener)).unwrap();

    frontend.set_read_timeout(Some(PATIENCE)).unwrap();
    tell(&frontend, SET_OWNER, &[], None);
    ask(&mut frontend, GET_FEATURES, &[], None);
    tell(&frontend, SET_FEATURES, &[PROTOCOL], None);
    assert_eq!(ask(&mut frontend, SET_PROTOCOL_FEATURES, &[FOR_THE_LOG], None), 0);
    let log = tempfile::tempfile().expect("a file");
    log.set_len(4096).expect("a length");
    let bitmap: [u64; 2] = [4096, 0];
    ask(&mut frontend, SET_LOG_BASE, &bitmap, Some(&log));
    assert_eq!(ask(&mut frontend, SET_FEATURES, &[PROTOCOL | LOG_ALL], None), 0);
    // As a worker does that is marking.
    let held = bench.vring.get_mut();
    tell(&frontend, SET_LOG_BASE, &bitmap, Some(&log));
    frontend.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut byte = [0];
    frontend.read(&mut byte).expect_err("it is not acknowledged");
    drop(held);
    frontend.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(frontend.read(&mut byte).expect("it is acknowledged"), 1);
    drop(frontend);
    let _ = daemon.wait();
}
