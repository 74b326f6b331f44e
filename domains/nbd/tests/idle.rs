//! What cannot go on yet takes no CPU. A program of its own, because it looks at the time of the
//! whole process.

mod common;

use common::scripted::{Answer, CAN_FLUSH, FLAGS, READ, Scripted};
use domain_conformance::{Bench, Job, TestStorage};
use domain_nbd::NbdDisk;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What this process has run for, in hundredths of a second.
fn ran() -> u64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields = text.rsplit(')').next().unwrap().split_ascii_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_flush_that_no_connection_has_room_for_waits_without_taking_a_cpu() {
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
        // The server's threads look now and then whether they may answer.
        let of = |time: Duration| {
            let before = ran();
            std::thread::sleep(time);
            ran() - before
        };
        let took = of(Duration::from_secs(3));
        is_free.store(true, Ordering::SeqCst);
        reader.join().unwrap();
        flusher.join().unwrap().unwrap();
        assert!(took < 50, "{took} hundredths of 300");
    });
    bench.retire().unwrap();
}
