//! What waits for a server that takes it slowly does not pile up. A program of its own, because it
//! looks at the memory of the whole process.

mod common;

use common::scripted::{Answer, CAN_FLUSH, FLAGS, Scripted};
use domain_api::Status;
use domain_conformance::{Bench, Job, TestStorage};
use domain_nbd::NbdDisk;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

#[test]
fn a_long_copy_to_a_slow_server_takes_little_memory() {
    const LEN: usize = 256 << 10;
    const COUNT: usize = 2048;
    let most = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&most);
    // It reads one request after the other, with a pause, so that its socket is always full.
    let server = Scripted::new(FLAGS | CAN_FLUSH, move |_, _| {
        seen.fetch_max(resident(), Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
        Answer::Good
    });
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&[])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    let before = resident();
    // Zeros that nobody has touched are in no memory.
    let jobs = (0..COUNT).map(|_| Job::write(0, vec![0; LEN])).collect();
    let all = lane.run(jobs).unwrap();
    assert!(all.iter().all(|done| done.status == Status::Ok));
    let most = most.load(Ordering::Relaxed).saturating_sub(before);
    println!("{} MiB at most for {} MiB", most >> 20, (COUNT * LEN) >> 20);
    // 160 of them are on their way, each in the guest's memory.
    assert!(most < 256 << 20, "{} MiB", most >> 20);
    drop(lane);
    bench.retire().unwrap();
}
