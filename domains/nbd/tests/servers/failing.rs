//! Servers that fail to make data durable, and those that offer no way to ask for it.

use crate::common::Server;
use crate::common::scripted::{Answer, CAN_FLUSH, FLAGS, FLUSH, READ, Scripted};
use domain_api::Status;
use domain_conformance::{Bench, Job, TestStorage};
use domain_nbd::NbdDisk;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ESHUTDOWN: u32 = 108;

/// A server whose first flush is answered like this, and all others well. Counts the flushes.
fn first_flush(answer: fn() -> Answer) -> (Scripted, Arc<AtomicUsize>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let server = Scripted::new(FLAGS | CAN_FLUSH, move |_, kind| match kind {
        FLUSH if count.fetch_add(1, Ordering::SeqCst) == 0 => answer(),
        _ => Answer::Good,
    });
    (server, seen)
}

#[test]
fn a_flush_that_failed_is_not_followed_by_one_that_goes_well() {
    const FAILS: [fn() -> Answer; 3] =
        [|| Answer::Error(EIO), || Answer::Error(EINVAL), || Answer::Error(ENOSPC)];
    for fails in FAILS {
        let (server, _) = first_flush(fails);
        let storage = TestStorage::new();
        let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&[])).unwrap();
        let mut lane = bench.lane(0).unwrap();
        assert_eq!(lane.one(Job::write(0, vec![1; 4096])).unwrap().status, Status::Ok);
        for _ in 0..3 {
            assert_eq!(lane.one(Job::flush()).unwrap().status, Status::IoError);
        }
        assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::Ok);
        drop(lane);
        bench.retire().unwrap();
        // Nor by one of a successor.
        assert!(storage.failure().is_some());
    }
}

#[test]
fn a_flush_of_our_own_that_failed_is_not_forgotten() {
    let (server, _) = first_flush(|| Answer::Error(EIO));
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&[])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(lane.one(Job::write(0, vec![1; 4096])).unwrap().status, Status::Ok);
    bench.instance.set_write_cache(false).unwrap();
    assert!(storage.failure().is_some(), "its answer is not awaited, or not looked at");
    assert_eq!(lane.one(Job::flush()).unwrap().status, Status::IoError);
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn what_was_written_is_durable_when_the_write_cache_has_been_turned_off() {
    // The first flush itself goes well, or the next one has to.
    const FIRST: [fn() -> Answer; 3] =
        [|| Answer::Good, || Answer::Close, || Answer::Error(ESHUTDOWN)];
    for (first, flushes) in FIRST.into_iter().zip([1, 2, 2]) {
        let (server, flushed) = first_flush(first);
        let storage = TestStorage::new();
        let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&[])).unwrap();
        let mut lane = bench.lane(0).unwrap();
        assert_eq!(lane.one(Job::write(0, vec![1; 4096])).unwrap().status, Status::Ok);
        bench.instance.set_write_cache(false).unwrap();
        assert_eq!(flushed.load(Ordering::SeqCst), flushes, "no flush was answered well");
        assert_eq!(storage.failure(), None);
        drop(lane);
        bench.retire().unwrap();
    }
}

#[test]
fn a_server_that_does_not_answer_the_flush_does_not_hold_up_the_frontend() {
    let is_free = Arc::new(AtomicBool::new(false));
    let held = Arc::clone(&is_free);
    let server = Scripted::new(FLAGS | CAN_FLUSH, move |_, kind| match kind {
        FLUSH => Answer::Held(Arc::clone(&held)),
        _ => Answer::Good,
    });
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&[])).unwrap();
    bench.instance.set_write_cache(false).unwrap();
    let lines = bench.host.lines();
    assert!(lines.iter().any(|(_, line)| line.contains("has not answered the flush")), "{lines:?}");
    // It serves meanwhile, and is asked for a flush again when that is answered.
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::Ok);
    is_free.store(true, Ordering::SeqCst);
    bench.instance.set_write_cache(false).unwrap();
    assert_eq!(bench.host.lines().len(), lines.len(), "{:?}", bench.host.lines());
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn a_request_that_connections_die_of_is_sent_after_a_flush_was_cut_off() {
    let server =
        Scripted::new(FLAGS | CAN_FLUSH, move |connection, kind| match (connection, kind) {
            (0, FLUSH) => Answer::Held(Arc::default()),
            (1..4, READ) => Answer::Close,
            _ => Answer::Good,
        });
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&[])).unwrap();
    bench.instance.set_write_cache(false).unwrap();
    bench.instance.quiesce().unwrap();
    bench.instance.resume().unwrap();
    // It is sent alone at last: when nothing else is in flight.
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::Ok);
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn a_server_that_announces_no_flush_is_asked_for_none() {
    let server = Server::nbdkit(&[
        "eval",
        "get_size=echo 1048576",
        "can_write=exit 0",
        "pread=head -c $3 /dev/zero",
        "pwrite=cat > /dev/null",
    ]);
    let storage = TestStorage::new();
    let params = server.params(&["no_flush=true"]);
    let bench = Bench::activated::<NbdDisk>(&storage, &params).unwrap();
    // As a driver has it that was offered no write cache.
    bench.instance.set_write_cache(false).unwrap();
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(lane.one(Job::write(0, vec![1; 4096])).unwrap().status, Status::Ok);
    assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::Ok);
    drop(lane);
    bench.retire().unwrap();
    assert_eq!(storage.failure(), None);
}
