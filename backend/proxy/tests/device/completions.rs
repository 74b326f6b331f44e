//! What a domain says in the call that submits requests: in their order and all well, which is the
//! short way, and everything else.

use crate::common::{Device, well};
use domain_abi::Status;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[test]
fn answers_in_order_are_booked_as_any_other() {
    let device = Device::start(1, &[]);
    let mut hand = device.worker(0);
    for _ in 0..3 {
        assert_eq!(hand.submit([4, 1, 9]), 3);
        assert_eq!(hand.worker.in_flight(), 0);
        assert_eq!(hand.take_ended(), well([1, 4, 9]));
    }
    let queue = &device.proxy.status().queues[0];
    assert_eq!((queue.requests, queue.errors, queue.in_flight), (9, 0, 0));
}

#[test]
fn an_error_among_them_is_told_of_the_request_that_it_is_of() {
    let device = Device::start(1, &["bad_at=3"]);
    let mut hand = device.worker(0);
    assert_eq!(hand.submit([4, 1, 9, 7]), 4);
    assert_eq!(
        hand.take_ended(),
        [(1, Status::Ok), (4, Status::Ok), (7, Status::Ok), (9, Status::IoError)]
    );
    let queue = &device.proxy.status().queues[0];
    assert_eq!((queue.requests, queue.errors, queue.in_flight), (4, 1, 0));
    assert_eq!(hand.submit([9]), 1, "its slot is free again");
    assert_eq!(hand.take_ended(), well([9]));
}

#[test]
fn answers_out_of_order_are_found_in_the_table() {
    let device = Device::start(1, &["backwards=true"]);
    let mut hand = device.worker(0);
    assert_eq!(hand.submit([4, 1, 9, 7]), 4);
    assert_eq!(hand.ended, well([7, 9, 1, 4]), "as they came");
    let queue = &device.proxy.status().queues[0];
    assert_eq!((queue.requests, queue.errors, queue.in_flight), (4, 0, 0));
}

#[test]
fn as_many_answers_as_requests_are_not_the_answers_to_them() {
    let device = Device::start(2, &["cross=submit"]);
    let (mut one, mut two) = (device.worker(0), device.worker(1));
    assert_eq!(one.submit([5]), 1);
    assert_eq!(
        two.submit([5]),
        1,
        "and with it comes an answer, to the first queue's request in the same slot"
    );
    assert_eq!((one.ended.len(), two.ended.len()), (0, 0));
    assert_eq!((one.worker.owing(), two.worker.owing()), (1, 1));
    device.until("both are in flight", || {
        device.proxy.status().queues.iter().all(|queue| queue.in_flight == 1 && queue.requests == 0)
    });
}

#[test]
fn the_age_is_that_of_the_oldest_whatever_comes_after_it() {
    let device = Device::start(1, &["hold=true"]);
    let mut hand = device.worker(0);
    hand.submit([0]);
    std::thread::sleep(Duration::from_millis(60));
    for slot in 1..16 {
        hand.submit([slot]);
    }
    let age = device.proxy.status().queues[0].oldest_age;
    // The clock is coarse.
    assert!(age >= Duration::from_millis(40), "{age:?}");
    device.stage.release.store(true, Ordering::Release);
    hand.step();
    assert_eq!(hand.worker.in_flight(), 0);
    hand.submit([3]);
    let age = device.proxy.status().queues[0].oldest_age;
    assert!(age < Duration::from_millis(40), "after a break it begins again: {age:?}");
}

#[test]
fn what_runs_a_third_time_keeps_its_place() {
    // `b` dies of the sixth request; `a` takes two of them and holds them, until it is replaced;
    // `c` takes two more, and dies later.
    let device = Device::start(1, &["swap=true", "hold=true", "take=2"]);
    device
        .upgrade("plain", "b", &["swap=true", "hold=true", "die_at=6"])
        .expect("no worker is disturbed");
    let mut hand = device.worker(0);
    assert_eq!(hand.submit([5, 3, 9, 1, 7, 2]), 6);
    hand.until(&device, "no takeover", |_| device.stage.lines("a", "got") == ["0:5", "0:3"]);
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| {
            let script = ["swap=true", "hold=true", "take=2", "break=reap"];
            device.upgrade("plain", "c", &script)
        });
        device.until("no upgrade", || device.proxy.status().generation == 4);
        hand.until(&device, "c takes nothing", |_| {
            device.stage.lines("c", "got") == ["0:9", "0:1"]
        });
        device.stage.release.store(true, Ordering::Release);
        hand.until(&device, "no replay", |hand| hand.ended.len() == 6);
        let _ = upgrade.join().expect("it does not panic");
    });
    assert_eq!(device.stage.lines("a", "got"), ["0:5", "0:3", "0:9", "0:1", "0:7", "0:2"]);
}
