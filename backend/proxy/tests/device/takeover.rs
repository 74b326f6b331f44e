//! The live domain breaks, at every step at which it can: what was unanswered runs again, in order,
//! once; what was answered does not.
//!
//! If a test hangs here, a guest would.

use crate::common::{Device, Hand, Silent, well};
use domain_abi::Status;
use proxy::{State, Worker};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A device whose live domain is `b`, with `script`, and whose standby is `a`.
fn with_standby(queues: usize, script: &[&str]) -> Device {
    let device = Device::start(queues, &[]);
    device.upgrade("plain", "b", script).expect("no worker is disturbed");
    device
}

fn takeovers(device: &Device) -> u64 {
    device.proxy.status().counts.takeovers
}

/// The books are closed a moment after the requests were answered.
#[track_caller]
fn assert_serving(device: &Device, generation: u64) {
    device.until("still upgrading", || device.proxy.status().state != State::Upgrading);
    let status = device.proxy.status();
    assert_eq!((status.state, status.generation), (State::Serving, generation), "{status:?}");
}

#[test]
fn what_was_unanswered_runs_again_in_order_and_before_anything_new() {
    let device = with_standby(1, &["hold=true", "die_at=6"]);
    let mut hand = device.worker(0);
    // Slots out of order, in two batches; the sixth request kills the domain.
    assert_eq!(hand.submit([5, 3, 9]), 3);
    assert_eq!(hand.submit([1, 7, 2]), 3);
    assert_eq!(hand.submit([4]), 0, "what is new has to wait for what is old");
    hand.until(&device, "no replay", |hand| hand.ended.len() == 6);
    assert_eq!(hand.submit([4]), 1);
    assert_eq!(device.stage.lines("a", "got"), ["0:5", "0:3", "0:9", "0:1", "0:7", "0:2", "0:4"]);
    assert_eq!(hand.take_ended(), well([1, 2, 3, 4, 5, 7, 9]));
    assert_serving(&device, 3);
    assert_eq!(device.proxy.status().queues[0].replayed, 6);
    assert_eq!(device.proxy.status().queues[0].requests, 7);
}

#[test]
fn a_deep_queue_runs_again_in_batches() {
    const ALL: usize = 50;
    let device = Device::start(1, &["hold=true"]);
    device.upgrade("plain", "b", &["hold=true", "die_at=50"]).expect("no worker is disturbed");
    let worker = device.proxy.worker(0, ALL, Box::new(Silent)).expect("a free slot");
    let mut hand = Hand { worker, ended: Vec::new() };
    assert_eq!(hand.submit(0..ALL), ALL);
    let got = || device.stage.lines("a", "got").len();
    let mut before = 0;
    hand.until(&device, "no replay", |hand| {
        let now = got();
        // Each step is one call.
        assert!(now - before <= 16, "{before}, {now}");
        assert_eq!(hand.worker.replays_more(), now > 0 && now < ALL, "{now}");
        before = now;
        now == ALL
    });
    device.stage.release.store(true, Ordering::Release);
    hand.until(&device, "no answers", |hand| hand.ended.len() == ALL);
    assert_eq!(hand.take_ended(), well(0..ALL));
}

#[test]
fn what_had_ended_before_the_panic_counts_and_does_not_run_again() {
    let device = with_standby(1, &["die_at=4"]);
    let mut hand = device.worker(0);
    hand.submit([0, 1, 2, 3, 4]);
    assert_eq!(hand.ended, well([0, 1, 2]), "these had reached the host's memory");
    hand.until(&device, "no replay", |hand| hand.ended.len() == 5);
    assert_eq!(device.stage.lines("a", "got"), ["0:3", "0:4"]);
    assert_eq!(hand.take_ended(), well(0..5));
    assert_eq!(device.proxy.status().queues[0].requests, 5);
}

#[test]
fn a_panic_in_reap_leaves_what_was_in_flight_to_the_standby() {
    let device = with_standby(1, &["hold=true", "break=reap"]);
    let mut hand = device.worker(0);
    hand.submit([2, 0, 1]);
    hand.step();
    assert_eq!((hand.ended.len(), hand.worker.owing()), (0, 3));
    device.stage.release.store(true, Ordering::Release);
    hand.until(&device, "no replay", |hand| hand.ended.len() == 3);
    assert_eq!(device.stage.lines("a", "got"), ["0:2", "0:0", "0:1"]);
    assert_serving(&device, 3);
}

#[test]
fn two_queues_that_panic_at_once_make_one_takeover() {
    for _ in 0..50 {
        let device = with_standby(2, &["break=submit"]);
        let (mut one, mut two) = (device.worker(0), device.worker(1));
        let done = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for hand in [&mut one, &mut two] {
                let (device, done) = (&device, &done);
                scope.spawn(move || {
                    hand.submit([0, 1]);
                    hand.until(device, "no replay", |hand| hand.ended.len() == 2);
                    done.fetch_add(1, Ordering::Relaxed);
                    // The one that is done first must not keep the other one waiting: a worker that
                    // does not come by is inside.
                    hand.until(device, "the other one hangs", |_| {
                        done.load(Ordering::Relaxed) == 2
                    });
                });
            }
        });
        assert_eq!((one.take_ended(), two.take_ended()), (well([0, 1]), well([0, 1])));
        assert_serving(&device, 3);
        assert_eq!(takeovers(&device), 1);
    }
}

#[test]
fn a_panic_while_a_queue_is_attached_is_a_death_like_any_other() {
    let device = with_standby(2, &["break=attach1"]);
    let mut one = device.worker(0);
    assert_eq!(one.submit([0]), 1);
    let mut two = device.worker(1);
    two.submit([0]);
    two.until(&device, "no service", |two| {
        two.ended.len() == 1 && takeovers(&device) == 1 || {
            one.step();
            false
        }
    });
    assert_eq!((one.take_ended(), two.take_ended()), (well([0]), well([0])));
    assert_serving(&device, 3);
}

#[test]
fn an_upgrade_that_is_prepared_slowly_is_still_under_way_when_a_takeover_has_ended() {
    let device = with_standby(1, &["die_at=1"]);
    let mut hand = device.worker(0);
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| device.upgrade("plain", "c", &["wait=prepare"]));
        device.until("not begun", || device.proxy.status().state == State::Upgrading);
        hand.submit([0]);
        hand.until(&device, "no takeover", |hand| hand.ended.len() == 1 && takeovers(&device) == 1);
        assert!(!upgrade.is_finished());
        let status = device.proxy.status();
        assert_eq!((status.generation, status.state), (3, State::Upgrading), "{status:?}");
        device.stage.go.store(true, Ordering::Release);
        hand.until(&device, "the upgrade hangs", |_| upgrade.is_finished());
        assert_eq!(upgrade.join().expect("no panic").expect("committed").generation, 4);
    });
    assert_serving(&device, 4);
}

/// Steps until another domain serves, and sees it serve.
#[track_caller]
fn assert_taken_over(device: &Device, hand: &mut Hand) {
    // As workers do: they look whether the gate is open before they submit.
    hand.step();
    hand.submit([0]);
    hand.until(device, "no takeover", |hand| hand.ended.len() == 1);
    assert_eq!(hand.take_ended(), well([0]));
    assert_eq!(device.stage.lines("a", "got").last().map(String::as_str), Some("0:0"));
    device.until("not counted", || takeovers(device) == 1);
    assert_serving(device, 3);
}

#[test]
fn a_panic_about_guest_memory_is_a_death_too() {
    let device = with_standby(1, &["break=memory"]);
    let mut hand = device.worker(0);
    device.proxy.memory_changed(0x1000, 0x1000, true);
    assert_taken_over(&device, &mut hand);
}

#[test]
fn a_domain_that_died_since_the_gate_was_passed_is_not_given_anything() {
    for standby in [true, false] {
        let device = if standby {
            with_standby(1, &["break=cache"])
        } else {
            Device::start(1, &["break=cache"])
        };
        let mut hand = device.worker(0);
        assert!(hand.step());
        device.proxy.set_write_cache(true);
        let (dead, next) = if standby { ("b", "a") } else { ("a", "none") };
        assert_eq!(hand.submit([3]), 1, "taken, by what comes");
        hand.until(&device, "no answer", |hand| hand.ended.len() == 1);
        assert_eq!(device.stage.lines(dead, "got"), [] as [&str; 0]);
        let expected = if standby { vec!["0:3"] } else { vec![] };
        assert_eq!(device.stage.lines(next, "got"), expected);
        let status = if standby { Status::Ok } else { Status::IoError };
        assert_eq!(hand.take_ended(), [(3, status)]);
    }
}

#[test]
fn a_panic_about_the_write_cache_is_a_death_too() {
    let device = with_standby(1, &["break=cache"]);
    let mut hand = device.worker(0);
    device.proxy.set_write_cache(true);
    assert_taken_over(&device, &mut hand);
}

#[test]
fn the_write_cache_is_off_when_the_live_domain_has_turned_it_off() {
    // It dies in being told, or has died just before.
    for broken in ["cache", "memory"] {
        for _ in 0..50 {
            let device = with_standby(1, &[&format!("break={broken}")]);
            if broken == "memory" {
                device.proxy.memory_changed(0x1000, 0x1000, true);
            }
            device.proxy.set_write_cache(false);
            let log = device.stage.log();
            let last = |line: &str| log.iter().rposition(|other| other == line);
            // Until then the dead one may have completed what is not durable.
            assert!(last("b dropped").is_some() && last("b dropped") < last("a cache"), "{log:?}");
            assert_serving(&device, 3);
        }
    }
}

#[test]
fn the_write_cache_is_turned_off_by_what_brings_the_device_back() {
    let device = Device::start(1, &["break=cache"]);
    device.proxy.set_write_cache(false);
    device.until("not faulted", || device.proxy.status().state == State::Faulted);
    device.upgrade("plain", "b", &[]).expect("back again");
    let log = device.stage.log();
    let last = |line: &str| log.iter().rposition(|other| other == line);
    assert!(last("b activate") < last("b cache"), "{log:?}");
}

#[test]
fn a_successor_that_cannot_turn_the_write_cache_off_does_not_take_over() {
    let device = Device::start(1, &["break=cache2"]);
    device.upgrade("plain", "b", &["break=cache1"]).expect("committed");
    device.proxy.set_write_cache(false);
    device.until("not noticed", || device.proxy.status().state == State::Faulted);
    let left = device.proxy.stop();
    assert!(left.len() == 1 && left[0].contains("nobody was there to flush"), "{left:?}");
}

#[test]
fn a_write_cache_that_a_takeover_does_not_turn_off_in_time_is_not_lost_in_silence() {
    let device = with_standby(1, &["break=cache", "wait=drop"]);
    device.proxy.set_write_cache(false);
    device.stage.go.store(true, Ordering::Release);
    assert_serving(&device, 3);
    let left = device.proxy.stop();
    assert!(left.len() == 1 && left[0].contains("the write cache was turned off"), "{left:?}");
}

#[test]
fn a_panic_without_a_session_is_noticed_by_the_next_worker() {
    let device = with_standby(1, &["break=detach"]);
    drop(device.worker(0));
    let mut hand = device.worker(0);
    assert_taken_over(&device, &mut hand);
}

#[test]
fn a_panic_without_a_session_does_not_stop_upgrades() {
    let device = with_standby(1, &["break=detach"]);
    drop(device.worker(0));
    device.until("no upgrade gets through", || device.upgrade("plain", "c", &[]).is_ok());
    assert_eq!(device.proxy.status().state, State::Serving);
}

#[test]
fn a_panic_in_cancel_is_a_death_too() {
    let device = with_standby(1, &["hold=true", "break=cancel"]);
    let mut hand = device.worker(0);
    hand.submit([0]);
    hand.worker.cancel();
    hand.until(&device, "no takeover", |hand| hand.ended.len() == 1);
    assert_eq!(hand.take_ended(), well([0]));
    assert_serving(&device, 3);
}

#[test]
fn an_old_instance_that_dies_while_its_successor_serves_leaves_its_requests_to_that_one() {
    let device = Device::start(1, &["swap=true", "hold=true", "break=reap"]);
    let mut hand = device.worker(0);
    hand.submit([4, 1, 3]);
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| device.upgrade("plain", "b", &["swap=true"]));
        hand.until(&device, "no swap", |_| device.proxy.status().generation == 2);
        hand.until(&device, "not served by the new one", |hand| {
            hand.worker.owing() == 3 && !device.stage.lines("b", "attach").is_empty()
        });
        assert_eq!(hand.submit([7]), 1, "the successor serves beside the old one");
        device.stage.release.store(true, Ordering::Release);
        hand.until(&device, "no replay", |hand| hand.ended.len() == 4);
        let report = upgrade.join().expect("no panic").expect("committed");
        assert_eq!((report.generation, report.protocol.name()), (2, "swap"));
    });
    assert_eq!(device.stage.lines("b", "got"), ["0:7", "0:4", "0:1", "0:3"]);
    assert_eq!(hand.take_ended(), well([1, 3, 4, 7]));
    let status = device.proxy.status();
    assert_eq!(
        (status.state, status.standby),
        (State::Serving, None),
        "a dead instance is no standby"
    );
}

#[test]
fn a_standby_that_cannot_be_activated_is_errors_and_not_silence() {
    let device = Device::start(1, &[]);
    // The rollback target breaks when it is activated a second time only: it has to be live first,
    // so it is `b`, upgraded away from by `c`.
    device.upgrade("plain", "b", &["break=cache"]).expect("committed");
    device.upgrade("plain", "c", &["die_at=2"]).expect("committed");
    // The standby breaks unseen; the live one lives.
    device.proxy.set_write_cache(true);
    let mut hand = device.worker(0);
    hand.submit([0]);
    assert_eq!(hand.take_ended(), well([0]));
    hand.submit([1, 2]);
    hand.until(&device, "silence", |hand| hand.ended.len() == 2);
    assert_eq!(hand.take_ended(), [(1, Status::IoError), (2, Status::IoError)]);
    // It is shown a moment after requests have failed.
    let status = || device.proxy.status();
    device.until("still its standby", || {
        let status = status();
        (status.state, status.standby.is_none()) == (State::Faulted, true)
    });
    hand.submit([3]);
    assert_eq!(hand.take_ended(), [(3, Status::IoError)], "faulted is errors");
    hand.lie_down();
    device.upgrade("plain", "d", &[]).expect("an upgrade brings the device back");
    hand.step();
    hand.submit([4]);
    assert_eq!(hand.take_ended(), well([4]));
    assert_serving(&device, 4);
}

#[test]
fn a_standby_that_dies_in_the_replay_of_one_queue_leaves_no_other_queue_in_silence() {
    let device = Device::start(2, &[]);
    device.upgrade("plain", "b", &["die_at=1"]).expect("committed");
    device.upgrade("plain", "c", &["hold=true", "die_at=3"]).expect("committed");
    let (mut one, mut two) = (device.worker(0), device.worker(1));
    one.submit([0]);
    two.submit([0]);
    // `c` dies with a request of each queue. Queue 1 has left it, and sleeps through all that
    // follows.
    one.submit([1]);
    two.step();
    two.lie_down();
    one.until(&device, "no errors", |one| one.ended.len() == 2);
    assert_eq!(one.take_ended(), [(0, Status::IoError), (1, Status::IoError)]);
    device.until("not faulted", || device.proxy.status().state == State::Faulted);
    two.until(&device, "silence on queue 1", |two| two.ended.len() == 1);
    assert_eq!(two.take_ended(), [(0, Status::IoError)]);
}

#[test]
fn completions_in_the_wrong_queue_or_of_another_generation_are_dropped() {
    let device = Device::start(2, &["cross=true"]);
    let (mut one, mut two) = (device.worker(0), device.worker(1));
    one.submit([3]);
    two.submit([3]);
    for _ in 0..3 {
        one.step();
        two.step();
    }
    assert_eq!(
        (one.ended.len(), two.ended.len()),
        (0, 0),
        "an answer to another queue's request was taken"
    );
    assert_eq!((one.worker.owing(), two.worker.owing()), (1, 1));
}

#[test]
fn what_a_domain_does_not_take_is_the_callers_again() {
    let device = Device::start(1, &["take=2"]);
    let mut hand = device.worker(0);
    assert_eq!(hand.submit([0, 1, 2, 3, 4]), 2);
    assert_eq!(hand.take_ended(), well([0, 1]));
    assert_eq!(hand.submit([2, 3, 4]), 2);
    assert_eq!(hand.submit([4]), 1);
    assert_eq!(hand.take_ended(), well([2, 3, 4]));
    assert_eq!(hand.worker.in_flight(), 0);
}

#[test]
fn a_standby_that_takes_little_at_a_time_replays_all_of_it() {
    let device = Device::start(1, &["take=1"]);
    device.upgrade("plain", "b", &["hold=true", "die_at=5"]).expect("committed");
    let mut hand = device.worker(0);
    hand.submit([4, 3, 2, 1, 0]);
    hand.until(&device, "no replay", |hand| hand.ended.len() == 5);
    assert_eq!(device.stage.lines("a", "got"), ["0:4", "0:3", "0:2", "0:1", "0:0"]);
    assert_eq!(hand.take_ended(), well(0..5));
}

#[test]
fn a_standby_that_takes_nothing_is_errors_and_not_silence() {
    let device = Device::start(1, &["take=0"]);
    device.upgrade("plain", "b", &["hold=true", "die_at=2"]).expect("committed");
    let mut hand = device.worker(0);
    hand.submit([0, 1]);
    hand.until(&device, "silence", |hand| hand.ended.len() == 2);
    assert_eq!(hand.take_ended(), [(0, Status::IoError), (1, Status::IoError)]);
    assert_serving(&device, 3);
}

#[test]
fn a_queue_that_was_left_with_a_request_in_flight_does_not_end_the_device() {
    let device = Device::start(2, &["hold=true"]);
    let mut lost = device.worker(0);
    lost.submit([0]);
    // The session ends, and the request does not.
    drop(lost);
    let mut next: Hand = device.worker(0);
    let mut other = device.worker(1);
    device.stage.release.store(true, Ordering::Release);
    next.submit([0]);
    other.submit([0]);
    other.until(&device, "the other queue is dead", |other| other.ended.len() == 1);
    assert_eq!(other.take_ended(), well([0]));
    assert_serving(&device, 1);
    drop(other);
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| device.upgrade("plain", "b", &[]));
        next.until(&device, "no service after an upgrade", |next| next.ended.len() == 1);
        upgrade.join().expect("no panic").expect("committed");
    });
    assert_eq!(next.take_ended(), well([0]));
    assert!(
        !device.proxy.status().resident.is_empty(),
        "the old instance is still in use, and that is said"
    );
}

const _: fn() = || {
    fn moves_between_threads<T: Send>() {}
    moves_between_threads::<Worker>();
};
