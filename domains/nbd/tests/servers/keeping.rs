//! What the keeper of connections sees to, while servers do not greet, do not let go, or go down
//! without end.

use crate::common::scripted::{Answer, CAN_FLUSH, FLAGS, MULTI_CONN, READ, SIZE, Scripted, WRITE};
use domain_api::Status;
use domain_conformance::{Bench, Job, TestStorage};
use domain_nbd::NbdDisk;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Waits until something has come true.
fn wait_for(what: &str, is_true: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_true() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn requests_wait_longer_than_the_timeout_for_a_connection_that_is_let_go_of() {
    let is_free = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(AtomicBool::new(false));
    let (held, saw) = (Arc::clone(&is_free), Arc::clone(&seen));
    let server =
        Scripted::new(FLAGS | CAN_FLUSH, move |connection, kind| match (connection, kind) {
            (0, WRITE) => {
                saw.store(true, Ordering::SeqCst);
                Answer::Held(Arc::clone(&held))
            }
            _ => Answer::Good,
        });
    let storage = TestStorage::new();
    let params = server.params(&["timeout=1", "settle=0"]);
    let bench = Bench::activated::<NbdDisk>(&storage, &params).unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut lane = bench.lane(1).unwrap();
            lane.one(Job::write(0, vec![1; 4096])).unwrap().status
        });
        wait_for("the write is held", || seen.load(Ordering::SeqCst));
        *server.size.lock().unwrap() = 2 * SIZE;
        let resizer = scope.spawn(|| bench.instance.resize(2 * SIZE));
        let reader = scope.spawn(|| {
            let mut lane = bench.lane(0).unwrap();
            let begun = Instant::now();
            let mut all = Vec::new();
            // The connection is given up at some time of this, to ask for the size.
            while begun.elapsed() < Duration::from_millis(500) {
                all.push(lane.one(Job::read(8192, 4096)).unwrap().status);
            }
            all
        });
        std::thread::sleep(Duration::from_millis(2500));
        is_free.store(true, Ordering::SeqCst);
        let all = reader.join().unwrap();
        assert!(all.iter().all(|status| *status == Status::Ok), "{all:?}");
        assert_eq!(writer.join().unwrap(), Status::Ok);
        resizer.join().unwrap().unwrap();
    });
    assert_eq!(bench.instance.info().unwrap().capacity, 2 * SIZE);
    bench.retire().unwrap();
}

/// A disk whose second connection is not greeted, and one that is asked for all the time.
fn with_a_vain_connection(
    more: &[&str],
    answer: impl Fn(usize, u16) -> Answer + Send + Sync + 'static,
    then: impl FnOnce(&Scripted, &Bench),
) {
    let server = Scripted::new(FLAGS | CAN_FLUSH | MULTI_CONN, answer);
    server.greets.store(1, Ordering::SeqCst);
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(more)).unwrap();
    let mut lane = bench.lane(0).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.connections() < 2 {
        // More than one connection takes.
        lane.run((0..128).map(|_| Job::read(0, 4096)).collect()).unwrap();
        assert!(Instant::now() < deadline, "no further connection is tried");
    }
    drop(lane);
    then(&server, &bench);
    bench.retire().unwrap();
}

#[test]
fn a_connection_that_is_lost_is_made_anew_while_another_is_not_greeted() {
    let closes = Arc::new(AtomicBool::new(false));
    let is_to_close = Arc::clone(&closes);
    let answer = move |connection, _: u16| {
        if connection == 0 && is_to_close.load(Ordering::SeqCst) {
            Answer::Close
        } else {
            Answer::Good
        }
    };
    with_a_vain_connection(&["settle=0"], answer, |server, bench| {
        server.greets.store(usize::MAX, Ordering::SeqCst);
        closes.store(true, Ordering::SeqCst);
        let mut lane = bench.lane(0).unwrap();
        let begun = Instant::now();
        assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::Ok);
        // The handshake in vain goes on for 10 s otherwise.
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_timeout_is_seen_while_a_server_does_not_greet() {
    let server = Scripted::new(FLAGS | CAN_FLUSH, |_, kind| match kind {
        READ => Answer::Close,
        _ => Answer::Good,
    });
    // It accepts, and says nothing.
    server.greets.store(1, Ordering::SeqCst);
    let storage = TestStorage::new();
    let params = server.params(&["timeout=1"]);
    let bench = Bench::activated::<NbdDisk>(&storage, &params).unwrap();
    let mut lane = bench.lane(0).unwrap();
    let begun = Instant::now();
    assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::IoError);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn the_write_cache_is_turned_off_while_a_further_connection_is_not_greeted() {
    with_a_vain_connection(
        &[],
        |_, _| Answer::Good,
        |_, bench| {
            bench.instance.set_write_cache(false).unwrap();
            let lines = bench.host.lines();
            assert!(!lines.iter().any(|(_, line)| line.contains("has not answered")), "{lines:?}");
        },
    );
}

#[test]
fn a_connection_that_ends_in_the_middle_of_nothing_is_made_anew_before_it_is_needed() {
    let server = Scripted::new(FLAGS | CAN_FLUSH, |connection, kind| match (connection, kind) {
        // The beginning of what nobody has asked for.
        (0, READ) => Answer::GoodAnd(&[0x67, 0x44, 0x66]),
        _ => Answer::Good,
    });
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&[])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::Ok);
    wait_for("it is made anew", || server.connections() > 1);
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn a_server_that_goes_down_without_end_is_asked_ever_more_rarely() {
    const ESHUTDOWN: u32 = 108;
    // The pauses before the last five are 100 ms, 200 ms, 400 ms, and so on.
    const IN_VAIN: usize = 7;
    const PAUSES: Duration = Duration::from_millis(100 * 0b11111);
    let server = Scripted::new(FLAGS | CAN_FLUSH, |connection, _| {
        if connection < IN_VAIN { Answer::Error(ESHUTDOWN) } else { Answer::Good }
    });
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&[])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    let begun = Instant::now();
    assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::Ok);
    assert!(begun.elapsed() >= PAUSES, "{:?}", begun.elapsed());
    assert_eq!(server.connections(), IN_VAIN + 1);
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn the_timeout_holds_behind_a_connection_that_goes_down_and_does_not_end() {
    const ESHUTDOWN: u32 = 108;
    let is_free = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(AtomicBool::new(false));
    let (held, saw) = (Arc::clone(&is_free), Arc::clone(&seen));
    let server =
        Scripted::new(FLAGS | CAN_FLUSH, move |connection, kind| match (connection, kind) {
            (0, READ) => {
                saw.store(true, Ordering::SeqCst);
                Answer::Held(Arc::clone(&held))
            }
            (0, _) => Answer::Error(ESHUTDOWN),
            _ => Answer::Good,
        });
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(&["timeout=3"])).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut lane = bench.lane(1).unwrap();
            lane.one(Job::read(0, 4096)).unwrap().status
        });
        wait_for("the read is held", || seen.load(Ordering::SeqCst));
        let mut lane = bench.lane(0).unwrap();
        let ends = lane.one(Job::write(0, vec![1; 4096])).map(|done| done.status);
        let lines = bench.host.lines();
        is_free.store(true, Ordering::SeqCst);
        assert_eq!(ends.unwrap(), Status::IoError);
        let says = |line: &str| line.contains("(the server is going down)");
        let said = lines.iter().filter(|(_, line)| says(line)).count();
        assert_eq!(said, 1, "{lines:?}");
        // What it had taken before is its to answer.
        assert_eq!(reader.join().unwrap(), Status::Ok);
        // Until there is another one, requests go on to fail.
        let is_there = |line: &str| line.contains(" again after ");
        wait_for("it is made anew", || bench.host.lines().iter().any(|(_, line)| is_there(line)));
        assert_eq!(lane.one(Job::write(0, vec![1; 4096])).unwrap().status, Status::Ok);
    });
    bench.retire().unwrap();
}
