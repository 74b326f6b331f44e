//! Both ways of doing I/O, io_uring and the workers themselves: each keeps the contract, and they
//! can follow one another.

mod common;

use common::{Raw, dirty_pages, image_in, params, real_dir, without_io_uring};
use domain_abi::op;
use domain_api::{Level, QueueIndex};
use domain_conformance::{Bench, Job, Options, TestStorage, run};
use domain_file::FileDisk;
use domain_host::CompletionBuffer;
use std::path::Path;
use std::time::{Duration, Instant};

fn keeps_the_contract(dir: &Path, more: &[&str]) {
    let image = image_in(dir, 2 << 20);
    if more.contains(&"aio=io_uring") && !io_uring_works(image.path()) {
        return;
    }
    let params = params(image.path(), more);
    run::<FileDisk>(&Options {
        resizes: true,
        refused: vec![("aio".into(), "threads".into())],
        ..Options::new(params)
    });
}

fn io_uring_works(path: &Path) -> bool {
    let works =
        Bench::prepare::<FileDisk>(&TestStorage::new(), &params(path, &["aio=io_uring"])).is_ok();
    if !works {
        eprintln!("skipped: no io_uring here");
    }
    works
}

#[test]
fn the_ring_keeps_the_contract() {
    keeps_the_contract(&real_dir(), &["aio=io_uring"]);
}

#[test]
fn the_ring_keeps_the_contract_with_direct_io() {
    keeps_the_contract(&real_dir(), &["aio=io_uring", "direct=true"]);
}

#[test]
fn the_ring_keeps_the_contract_in_memory() {
    keeps_the_contract(Path::new("/dev/shm"), &["aio=io_uring"]);
}

#[test]
fn the_workers_keep_the_contract() {
    keeps_the_contract(&real_dir(), &["aio=sync"]);
}

#[test]
fn the_workers_keep_the_contract_with_direct_io() {
    keeps_the_contract(&real_dir(), &["aio=sync", "direct=true"]);
}

#[test]
fn the_workers_keep_the_contract_in_memory() {
    keeps_the_contract(Path::new("/dev/shm"), &["aio=sync"]);
}

#[test]
fn a_flush_leaves_nothing_dirty() {
    let image = image_in(&real_dir(), 4 << 20);
    for aio in ["aio=io_uring", "aio=sync"] {
        if aio == "aio=io_uring" && !io_uring_works(image.path()) {
            continue;
        }
        let bench =
            Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), &[aio]))
                .unwrap();
        let mut lane = bench.lane(0).unwrap();
        let mut write = |cut: &[usize]| {
            lane.one(Job::write(0, vec![3; 1 << 20]).in_pieces(cut)).unwrap().ok().unwrap();
        };
        write(&[4096]);
        let Some(dirty) = dirty_pages(image.as_file()) else {
            eprintln!("skipped: this kernel does not tell what is dirty");
            return;
        };
        // Write-back starts after seconds: what was written is not on the disk yet, unless
        // something sees to it.
        assert!(dirty >= 128, "{aio}: only {dirty} pages are dirty after a write");
        lane.one(Job::flush()).unwrap().ok().unwrap();
        assert_eq!(dirty_pages(image.as_file()), Some(0), "{aio}: dirty after a flush");
        bench.instance.set_write_cache(false).unwrap();
        for job in [
            Job::write(8192, vec![4; 1 << 20]).in_pieces(&[100_000]),
            Job::write(4096, vec![5; 4096]),
            Job::write_zeroes(0, 1 << 20, false),
        ] {
            lane.one(job).unwrap().ok().unwrap();
            assert_eq!(dirty_pages(image.as_file()), Some(0), "{aio}: dirty without a write cache");
        }
    }
}

#[test]
fn writes_in_flight_when_the_cache_is_turned_off_are_durable_too() {
    let image = image_in(&real_dir(), 8 << 20);
    let bench =
        Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), &[])).unwrap();
    let cached = std::sync::atomic::AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(30));
            bench.instance.set_write_cache(false).unwrap();
            cached.store(false, std::sync::atomic::Ordering::SeqCst);
        });
        let mut lane = bench.lane(0).unwrap();
        for round in 0..u64::MAX {
            let was_cached = cached.load(std::sync::atomic::Ordering::SeqCst);
            let jobs =
                (0..32).map(|i| Job::write((i * 2 + round % 2) * 4096, vec![round as u8; 4096]));
            lane.run(jobs.collect()).unwrap().into_iter().for_each(|done| drop(done.ok().unwrap()));
            if !was_cached {
                break;
            }
        }
    });
    assert!(dirty_pages(image.as_file()).is_none_or(|dirty| dirty == 0));
}

#[test]
fn more_requests_than_a_ring_holds_are_taken_bit_by_bit() {
    const REQUESTS: usize = 3000;
    let image = image_in(&real_dir(), 16 << 20);
    let storage = TestStorage::new();
    let params = params(image.path(), &["direct=true"]);
    let bench = Bench::activated::<FileDisk>(&storage, &params).unwrap();
    let mut handle = bench.instance.attach(QueueIndex(0)).unwrap();
    // Into blocks that the file system has yet to find room for: none of them ends in the call that
    // submits it.
    let mut raw = Raw::new(op::WRITE, REQUESTS, 4096, 16 << 20);
    let mut completions = CompletionBuffer::new(REQUESTS);
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut taken, mut ended, mut partly) = (0, vec![0u32; REQUESTS], false);
    while ended.contains(&0) {
        let seen = bench.host.notifications(QueueIndex(0));
        let before = taken;
        if taken < REQUESTS {
            let accepted = handle.submit(&raw.requests()[taken..], &mut completions).unwrap();
            partly |= accepted < REQUESTS - taken;
            taken += accepted;
            completions.completed().iter().for_each(|done| ended[done.tag as usize] += 1);
        }
        handle.reap(&mut completions).unwrap();
        completions.completed().iter().for_each(|done| ended[done.tag as usize] += 1);
        let moved = taken > before || !completions.completed().is_empty();
        let owed = ended[..taken].contains(&0);
        assert!(moved || owed, "it takes nothing while nothing is in flight");
        if !moved {
            assert!(bench.host.wait_notified(QueueIndex(0), seen, deadline), "nothing more ends");
        }
    }
    assert!(ended.iter().all(|&times| times == 1), "a request ended twice");
    assert!(partly || !io_uring_works(image.path()), "all were taken at once");
    drop(handle);
    bench.retire().unwrap();
}

#[test]
fn an_old_instance_ends_what_it_has_while_its_successor_serves() {
    for (old, new) in [("aio=auto", "aio=auto"), ("aio=auto", "aio=sync"), ("aio=sync", "aio=auto")]
    {
        let image = image_in(&real_dir(), 2 << 20);
        let storage = TestStorage::new();
        let prepare = |aio| {
            Bench::prepare::<FileDisk>(&storage, &params(image.path(), &[aio, "direct=true"]))
                .unwrap()
        };
        let (old, new) = (prepare(old), prepare(new));
        old.activate().unwrap();
        let mut first = old.instance.attach(QueueIndex(0)).unwrap();
        let mut raw = Raw::reads(128, 4096, 2 << 20);
        let mut completions = CompletionBuffer::new(128);
        let mut ended = 0;
        assert_eq!(first.submit(raw.requests(), &mut completions).unwrap(), 128);
        ended += completions.completed().len();
        // The worker attaches to the new one, on the same queue and thread, and serves, before it
        // has let go of the old one.
        new.activate().unwrap();
        let mut lane = new.lane(0).unwrap();
        lane.one(Job::write(0, vec![8; 4096])).unwrap().ok().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while ended < 128 {
            let seen = old.host.notifications(QueueIndex(0));
            first.reap(&mut completions).unwrap();
            ended += completions.completed().len();
            assert!(
                !completions.completed().is_empty()
                    || old.host.wait_notified(QueueIndex(0), seen, deadline)
            );
        }
        drop(first);
        old.retire().unwrap();
        assert_eq!(lane.one(Job::read(0, 4096)).unwrap().ok().unwrap(), vec![8; 4096]);
        drop(lane);
        new.retire().unwrap();
    }
}

#[test]
fn an_instance_that_ends_with_requests_in_flight_leaves_none_behind() {
    // What a worker does that abandons a dead instance: it drops the handle, whatever is in flight.
    let image = image_in(&real_dir(), 2 << 20);
    for _ in 0..20 {
        let storage = TestStorage::new();
        let params = params(image.path(), &["direct=true"]);
        let bench = Bench::activated::<FileDisk>(&storage, &params).unwrap();
        let mut handle = bench.instance.attach(QueueIndex(0)).unwrap();
        let mut raw = Raw::reads(64, 4096, 2 << 20);
        let mut completions = CompletionBuffer::new(64);
        handle.submit(raw.requests(), &mut completions).unwrap();
        drop(handle);
        bench.retire().unwrap();
        raw.mark();
        std::thread::sleep(Duration::from_millis(1));
        assert!(
            raw.is_marked(),
            "the kernel wrote to a request's memory after its instance had ended"
        );
    }
}

#[test]
fn a_cancelled_queue_goes_on() {
    let image = image_in(&real_dir(), 1 << 20);
    let params = params(image.path(), &["direct=true"]);
    let bench = Bench::activated::<FileDisk>(&TestStorage::new(), &params).unwrap();
    let mut lane = bench.lane(3).unwrap();
    let seen = bench.host.notifications(QueueIndex(3));
    bench.instance.cancel().unwrap();
    assert!(bench.host.notifications(QueueIndex(3)) > seen, "its worker was not told");
    for round in 0..20 {
        bench.instance.cancel().unwrap();
        lane.one(Job::write(round * 4096, vec![2; 4096])).unwrap().ok().unwrap();
        lane.one(Job::flush()).unwrap().ok().unwrap();
    }
    assert!(bench.host.lines().is_empty(), "{:?}", bench.host.lines());
}

#[test]
fn queues_come_and_go_without_leaving_descriptors() {
    let image = image_in(&real_dir(), 1 << 20);
    let bench =
        Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), &[])).unwrap();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let round = || bench.lane(0).unwrap().one(Job::flush()).unwrap().ok().unwrap();
    round();
    let before = open();
    (0..100).for_each(|_| drop(round()));
    // Tests run at the same time, and have some open.
    assert!(open() < before + 60, "{before} descriptors became {}", open());
}

#[test]
fn a_queue_that_is_served_at_preparing_gets_a_ring_made_then() {
    let image = image_in(&real_dir(), 1 << 20);
    if !io_uring_works(image.path()) {
        return;
    }
    // The test host says that queue 0 is served.
    let params = params(image.path(), &["direct=true"]);
    let bench = Bench::activated::<FileDisk>(&TestStorage::new(), &params).unwrap();
    let attached_without = without_io_uring(|| {
        for (queue, lines) in [(0, 0), (1, 1)] {
            let mut lane = bench.lane(queue).unwrap();
            lane.one(Job::write(0, vec![6; 4096])).unwrap().ok().unwrap();
            let said = bench.host.lines();
            assert_eq!(said.len(), lines, "{said:?}");
        }
    });
    if !attached_without {
        eprintln!("skipped: not allowed to install a filter");
    }
}

#[test]
fn without_direct_io_a_queue_makes_its_ring_when_a_request_needs_it() {
    let image = image_in(&real_dir(), 1 << 20);
    let bench =
        Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), &[])).unwrap();
    let attached_without = without_io_uring(|| {
        let mut lane = bench.lane(0).unwrap();
        lane.one(Job::write(0, vec![6; 4096])).unwrap().ok().unwrap();
        assert!(bench.host.lines().is_empty(), "writing to the page cache needs none");
        // And where there is none, what needs it is done nevertheless, and so is all that follows.
        for _ in 0..2 {
            lane.one(Job::flush()).unwrap().ok().unwrap();
            assert_eq!(lane.one(Job::read(0, 4096)).unwrap().ok().unwrap(), vec![6; 4096]);
            assert_eq!(bench.host.lines().len(), 1, "{:?}", bench.host.lines());
        }
        assert!(dirty_pages(image.as_file()).is_none_or(|dirty| dirty == 0), "flushed");
    });
    if !attached_without {
        eprintln!("skipped: not allowed to install a filter");
    }
}

#[test]
fn where_io_uring_is_forbidden_the_workers_serve_and_one_line_says_so() {
    let image = image_in(&real_dir(), 1 << 20);
    let path = image.path();
    let served = without_io_uring(|| {
        let bench = Bench::activated::<FileDisk>(&TestStorage::new(), &params(path, &[])).unwrap();
        for queue in 0..3 {
            let mut lane = bench.lane(queue).unwrap();
            lane.one(Job::write(0, vec![6; 4096])).unwrap().ok().unwrap();
            assert_eq!(lane.one(Job::read(0, 4096)).unwrap().ok().unwrap(), vec![6; 4096]);
            lane.one(Job::flush()).unwrap().ok().unwrap();
        }
        let lines = bench.host.lines();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].0 == Level::Info && lines[0].1.contains("io_uring"), "{lines:?}");
        bench.retire().unwrap();
        let refused =
            Bench::prepare::<FileDisk>(&TestStorage::new(), &params(path, &["aio=io_uring"]));
        let said = refused.unwrap_err().to_string();
        assert!(
            said.contains("io_uring_disabled") && said.contains("leave aio=io_uring out"),
            "{said}"
        );
        let bench =
            Bench::prepare::<FileDisk>(&TestStorage::new(), &params(path, &["aio=sync"])).unwrap();
        assert!(bench.host.lines().is_empty());
    });
    if !served {
        eprintln!("skipped: not allowed to install a filter");
    }
}
