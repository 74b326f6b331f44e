//! Writes that were answered and not flushed when another server came: they are counted once,
//! whichever instance has made them, and only if another server may have come.

use crate::common::{Server, TcpServer};
use domain_api::{Params, Status};
use domain_conformance::{Bench, Job, TestStorage};
use domain_nbd::NbdDisk;
use std::sync::Arc;

const COUNTER: &str = "nbd_unflushed";

fn run(bench: &Bench, jobs: &[fn() -> Job]) {
    let mut lane = bench.lane(0).unwrap();
    for job in jobs {
        assert_eq!(lane.one(job()).unwrap().status, Status::Ok);
    }
}

fn write() -> Job {
    Job::write(0, vec![1; 4096])
}

fn read() -> Job {
    Job::read(0, 4096)
}

/// A disk that has been written to, and not flushed.
fn written(params: &Params) -> (Arc<TestStorage>, Bench) {
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, params).unwrap();
    run(&bench, &[write]);
    (storage, bench)
}

/// Hands the disk on to a new instance.
fn successor(bench: &Bench, storage: &Arc<TestStorage>, params: &Params) -> Bench {
    let next = Bench::prepare::<NbdDisk>(storage, params).unwrap();
    bench.instance.quiesce().unwrap();
    next.activate().unwrap();
    next
}

#[test]
fn that_unflushed_writes_may_have_gone_with_a_server_is_counted_once() {
    let mut server = Server::nbdkit(&["memory", "1M"]);
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&["settle=0"])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    let mut run = |job| assert_eq!(lane.one(job).unwrap().status, Status::Ok);
    for (is_flushed, counted) in [(true, 0), (false, 1), (true, 1)] {
        run(Job::write(0, vec![1; 4096]));
        if is_flushed {
            run(Job::flush());
        }
        server.kill();
        server.start();
        // It is not looked for before it is missed.
        run(Job::read(0, 4096));
        run(Job::flush());
        assert_eq!(storage.counter(COUNTER), counted);
    }
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn what_a_predecessor_has_not_flushed_counts() {
    let mut server = Server::nbdkit(&["memory", "1M"]);
    let params = server.params(&["settle=0"]);
    let (storage, first) = written(&params);
    let second = successor(&first, &storage, &params);
    server.kill();
    server.start();
    run(&second, &[read]);
    assert_eq!(storage.counter(COUNTER), 1);
    first.retire().unwrap();
    second.retire().unwrap();
}

#[test]
fn what_a_predecessor_that_died_may_not_have_flushed_counts() {
    let mut server = Server::nbdkit(&["memory", "1M"]);
    let params = server.params(&["settle=0"]);
    let (storage, first) = written(&params);
    // It has handed nothing on.
    first.retire().unwrap();
    let second = Bench::activated::<NbdDisk>(&storage, &params).unwrap();
    run(&second, &[read]);
    assert_eq!(storage.counter(COUNTER), 0, "the same server");
    server.kill();
    server.start();
    run(&second, &[read]);
    assert_eq!(storage.counter(COUNTER), 1);
    second.retire().unwrap();
}

#[test]
fn what_a_successor_has_flushed_does_not_count_after_the_way_back() {
    let mut server = Server::nbdkit(&["memory", "1M"]);
    let params = server.params(&["settle=0"]);
    let (storage, first) = written(&params);
    let second = successor(&first, &storage, &params);
    run(&second, &[Job::flush]);
    second.instance.quiesce().unwrap();
    first.host.own_storage();
    first.instance.resume().unwrap();
    second.retire().unwrap();
    server.kill();
    server.start();
    run(&first, &[read]);
    assert_eq!(storage.counter(COUNTER), 0);
    first.retire().unwrap();
}

#[test]
fn a_connection_that_was_taken_along_is_no_other_server_and_the_next_one_may_be() {
    let mut server = TcpServer::start();
    let params = server.params(&["settle=0"]);
    let (storage, first) = written(&params);
    first.instance.quiesce().unwrap();
    first.instance.resume().unwrap();
    run(&first, &[read]);
    assert_eq!(storage.counter(COUNTER), 0);
    let second = successor(&first, &storage, &params);
    run(&second, &[read]);
    assert_eq!(storage.counter(COUNTER), 0);
    server.exchange();
    run(&second, &[read]);
    assert_eq!(storage.counter(COUNTER), 1);
    first.retire().unwrap();
    second.retire().unwrap();
}

#[test]
fn a_connection_that_was_ended_after_a_death_is_no_other_server_if_it_stood() {
    for exchanged in [false, true] {
        let mut server = TcpServer::start();
        let params = server.params(&["settle=0"]);
        let (storage, first) = written(&params);
        // It has handed nothing on.
        first.retire().unwrap();
        if exchanged {
            server.exchange();
        }
        let second = Bench::activated::<NbdDisk>(&storage, &params).unwrap();
        run(&second, &[read]);
        assert_eq!(storage.counter(COUNTER), exchanged.into());
        if !exchanged {
            server.exchange();
            run(&second, &[read]);
            assert_eq!(storage.counter(COUNTER), 1);
        }
        second.retire().unwrap();
    }
}
