//! The engine, driven with a backend that is neither a file nor io_uring.

mod memory;

use domain_api::{Level, Params, Status};
use domain_conformance::{Bench, Done, Job, Options, TestStorage, run};
use memory::{MemoryDisk, SYNCS, WITNESS_SYNCS};
use std::sync::Arc;

fn params(pairs: &[&str]) -> Params {
    Params::from_pairs(pairs).expect("written here")
}

fn bench(pairs: &[&str]) -> (Arc<TestStorage>, Bench) {
    let storage = TestStorage::new();
    let bench = Bench::activated::<MemoryDisk>(&storage, &params(pairs)).unwrap();
    (storage, bench)
}

#[test]
fn a_backend_that_is_no_file_keeps_the_contract() {
    for pairs in [
        &["size=1M"][..],
        &["size=1M", "opens=at_once"],
        &["size=1M", "opens=never"],
        &["size=1M", "block=4096"],
        &["size=1M", "block=4096", "opens=never"],
    ] {
        eprintln!("{pairs:?}");
        run::<MemoryDisk>(&Options::new(params(pairs)));
    }
}

/// Has four queues write two sectors each to every block, at the same time, and looks.
fn write_parts_of_blocks(pairs: &[&str]) {
    let (_storage, bench) = bench(pairs);
    let sector = |queue: u32, n: u64| vec![(u64::from(queue) * 2 + n) as u8 + 1; 512];
    std::thread::scope(|scope| {
        let bench = &bench;
        for queue in 0..4 {
            scope.spawn(move || {
                let mut lane = bench.lane(queue).unwrap();
                for block in 0..64 {
                    let at = |n: u64| block * 4096 + u64::from(queue) * 1024 + n * 512;
                    let jobs = (0..2).map(|n| Job::write(at(n), sector(queue, n))).collect();
                    lane.run(jobs).unwrap().into_iter().for_each(|done| drop(done.ok().unwrap()));
                }
            });
        }
    });
    let mut lane = bench.lane(0).unwrap();
    for block in 0..64 {
        let found = lane.one(Job::read(block * 4096, 4096)).unwrap().ok().unwrap();
        let expected: Vec<u8> =
            (0..4).flat_map(|queue| [sector(queue, 0), sector(queue, 1)].concat()).collect();
        assert!(found == expected, "{pairs:?}: block {block} lacks what was written");
    }
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn parts_of_one_block_that_change_at_the_same_time_are_all_kept() {
    write_parts_of_blocks(&["size=1M", "block=4096"]);
}

#[test]
fn what_was_begun_before_the_blocks_grew_is_kept_too() {
    for grows in (10..400).step_by(15) {
        write_parts_of_blocks(&["size=1M", &format!("grows={grows}")]);
    }
}

#[test]
fn flushes_that_wait_share_a_sync_and_the_witness_is_asked_once() {
    let (storage, bench) = bench(&["size=1M"]);
    std::thread::scope(|scope| {
        for queue in 0..4 {
            let bench = &bench;
            scope.spawn(move || {
                let mut lane = bench.lane(queue).unwrap();
                let done = lane.run((0..20).map(|_| Job::flush()).collect()).unwrap();
                assert!(done.iter().all(|done| done.status == Status::Ok));
            });
        }
    });
    bench.retire().unwrap();
    assert_eq!(storage.counter(WITNESS_SYNCS), 1);
    // The first goes at once, and the others share the next.
    let syncs = storage.counter(SYNCS);
    assert!((4..=12).contains(&syncs), "{syncs} syncs for 80 flushes");
}

#[test]
fn what_is_given_up_ends_with_an_error_and_the_queue_goes_on() {
    let (_storage, bench) = bench(&["size=1M"]);
    let mut lane = bench.lane(0).unwrap();
    let mut failed = 0;
    for _ in 0..200 {
        let done = std::thread::scope(|scope| {
            scope.spawn(|| bench.instance.cancel().unwrap());
            let jobs = (0..60).map(|n| Job::read(n * 512, 512));
            lane.run(jobs.chain([Job::flush(), Job::flush()]).collect()).unwrap()
        });
        failed += done.iter().filter(|done| done.status == Status::IoError).count();
    }
    assert!(failed > 0, "no cancellation ever met a request");
    // One that has met none yet is heeded before the next request, which it does not mean.
    assert_eq!(lane.one(Job::flush()).unwrap().status, Status::Ok);
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn errors_reach_the_guest_each_and_the_log_once() {
    let (_storage, bench) = bench(&["size=1M", "bad=512K"]);
    let mut lane = bench.lane(0).unwrap();
    let jobs = (0..2048).map(|n| Job::read(n * 512, 512)).collect();
    let done: Vec<Done> = lane.run(jobs).unwrap();
    let (well, badly) = done.split_at(1024);
    assert!(well.iter().all(|done| done.status == Status::Ok));
    assert!(badly.iter().all(|done| done.status == Status::IoError));
    let lines = bench.host.lines();
    let warnings: Vec<_> = lines.iter().filter(|(level, _)| *level == Level::Warn).collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].1.contains("read failed: a bad block"), "{warnings:?}");
    drop(lane);
    bench.retire().unwrap();
}
