//! What cannot go on yet takes no CPU. A program of its own, because it looks for the keeper's
//! thread among those of the whole process.

mod common;

use common::scripted::{Answer, CAN_FLUSH, FLAGS, FLUSH, READ, Scripted};
use domain_conformance::{Bench, Job, TestStorage};
use domain_nbd::NbdDisk;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// There is one keeper at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// The keeper's thread.
fn keeper() -> PathBuf {
    let threads =
        std::fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap().path());
    let mut keepers = threads.filter(|thread| {
        std::fs::read_to_string(thread.join("comm")).is_ok_and(|it| it == "nbd\n")
    });
    let keeper = keepers.next().expect("there is one");
    assert_eq!(keepers.next(), None);
    keeper
}

/// What a thread has run for, in hundredths of a second.
fn ran(thread: &Path) -> u64 {
    let text = std::fs::read_to_string(thread.join("stat")).unwrap();
    let fields = text.rsplit(')').next().unwrap().split_ascii_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

/// Asserts that the keeper rests: while this thread runs for a second, however long that takes, it
/// runs for a quarter of that at most. One that does not rest gets as much.
fn assert_rests() {
    let (keeper, this) = (keeper(), Path::new("/proc/thread-self"));
    let (before, begun) = (ran(&keeper), ran(this));
    while ran(this) - begun < 100 {
        std::hint::spin_loop();
    }
    let took = ran(&keeper) - before;
    assert!(took < 25, "{took} hundredths of 100");
}

#[test]
fn a_flush_that_no_connection_has_room_for_waits_without_taking_a_cpu() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (is_free, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (held, count) = (Arc::clone(&is_free), Arc::clone(&seen));
    let server = Scripted::new(FLAGS | CAN_FLUSH, move |_, kind| {
        if kind == READ && !held.load(Ordering::SeqCst) {
            count.fetch_add(1, Ordering::SeqCst);
            return Answer::Held(Arc::clone(&held));
        }
        Answer::Good
    });
    let bench = Bench::activated::<NbdDisk>(&TestStorage::new(), &server.params(&[])).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut lane = bench.lane(0).unwrap();
            lane.run((0..128).map(|_| Job::read(0, 4096)).collect()).unwrap();
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        // As many as a connection takes.
        while seen.load(Ordering::SeqCst) < 64 {
            assert!(Instant::now() < deadline, "{seen:?} are held");
            std::thread::sleep(Duration::from_millis(5));
        }
        let flusher = scope.spawn(|| bench.instance.set_write_cache(false));
        std::thread::sleep(Duration::from_millis(200));
        let rests = std::panic::catch_unwind(assert_rests);
        is_free.store(true, Ordering::SeqCst);
        reader.join().unwrap();
        flusher.join().unwrap().unwrap();
        rests.unwrap();
    });
    bench.retire().unwrap();
}

#[test]
fn a_disk_that_was_handed_on_with_a_flush_in_flight_takes_no_cpu() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let server = Scripted::new(FLAGS | CAN_FLUSH, move |_, kind| {
        if kind == FLUSH && count.fetch_add(1, Ordering::SeqCst) == 0 {
            return Answer::Held(Arc::default());
        }
        Answer::Good
    });
    let bench = Bench::activated::<NbdDisk>(&TestStorage::new(), &server.params(&[])).unwrap();
    bench.instance.set_write_cache(false).unwrap();
    assert_eq!(seen.load(Ordering::SeqCst), 1);
    bench.instance.quiesce().unwrap();
    assert_rests();
    // The flush is still due.
    bench.instance.resume().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while seen.load(Ordering::SeqCst) < 2 {
        assert!(Instant::now() < deadline, "it is not sent again");
        std::thread::sleep(Duration::from_millis(5));
    }
    bench.retire().unwrap();
}
