//! The live domain breaks in the middle of its own replacement: behind a shut gate, and while its
//! predecessor is still in use.
//!
//! If a test hangs here, a guest would.

use crate::common::{Device, Hand, PATIENCE, well};
use domain_abi::{Capabilities, Status};
use proxy::{Mode, Notifier, Options, State};
use std::sync::atomic::{AtomicUsize, Ordering};

fn label(device: &Device) -> Option<String> {
    device.proxy.domain().params.get("label").map(str::to_owned)
}

#[track_caller]
fn assert_taken_over(device: &Device, generation: u64, by: &str) {
    device.until("not counted", || device.proxy.status().counts.takeovers == 1);
    device.until("still upgrading", || device.proxy.status().state != State::Upgrading);
    let status = device.proxy.status();
    assert_eq!((status.state, status.generation), (State::Serving, generation), "{status:?}");
    assert_eq!(label(device).as_deref(), Some(by));
    assert!(status.resident.is_empty(), "{status:?}");
    assert!(
        status.queues.iter().all(|queue| (queue.errors, queue.in_flight) == (0, 0)),
        "{status:?}"
    );
}

#[test]
fn a_death_on_both_queues_behind_a_shut_gate_comes_before_the_upgrade_and_ends_no_request() {
    for _ in 0..20 {
        let device = Device::start(2, &[]);
        device.upgrade("plain", "b", &["hold=true", "break=reap"]).expect("committed");
        let (held, shut, done) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for queue in 0..2 {
                let (device, held, shut, done) = (&device, &held, &shut, &done);
                let both = |count: &AtomicUsize| count.load(Ordering::Acquire) == 2;
                scope.spawn(move || {
                    let mut hand = device.worker(queue);
                    hand.submit([2, 0]);
                    held.fetch_add(1, Ordering::AcqRel);
                    hand.until_shut(device);
                    shut.fetch_add(1, Ordering::AcqRel);
                    hand.until(device, "the other one finds the gate open", |_| both(shut));
                    // Each of the two breaks it now, at its next look.
                    device.stage.release.store(true, Ordering::Release);
                    hand.until(device, "no replay", |hand| hand.ended.len() == 2);
                    assert_eq!(hand.take_ended(), well([0, 2]));
                    done.fetch_add(1, Ordering::AcqRel);
                    hand.until(device, "the other one hangs", |_| both(done));
                });
            }
            device.until("nothing in flight", || held.load(Ordering::Acquire) == 2);
            let options =
                Options { mode: Mode::Handover, drain_timeout: PATIENCE, ..Options::default() };
            let report =
                device.upgrade_with("plain", "c", &[], options).expect("after the takeover");
            assert_eq!((report.generation, report.from.params.get("label")), (4, Some("a")));
        });
        assert_taken_over(&device, 4, "c");
        assert_eq!(
            device.stage.lines("c", "prepare").len(),
            1,
            "it is tried again, not made again"
        );
        let history = device.proxy.history();
        let told: Vec<_> = history.iter().map(|entry| entry.change.name()).collect();
        assert_eq!(told, ["upgrade", "takeover", "upgrade"]);
    }
}

#[test]
fn an_upgrade_goes_on_after_the_takeover_that_it_finds() {
    // It comes before the takeover has begun, while it has the lock, and to a device that has no
    // standby.
    for (standby, held) in [(true, false), (true, true), (false, false), (false, true)] {
        for _ in 0..20 {
            let script = ["break=cache", if held { "wait=drop" } else { "wait=nothing" }];
            let device = Device::start(1, if standby { &[] } else { &script });
            if standby {
                device.upgrade("plain", "b", &script).expect("committed");
            }
            device.proxy.set_write_cache(true);
            std::thread::scope(|scope| {
                let upgrade = scope.spawn(|| device.upgrade("plain", "c", &[]));
                if held {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                    assert!(!upgrade.is_finished(), "it was to wait");
                    device.stage.go.store(true, Ordering::Release);
                }
                let report = upgrade.join().expect("no panic").expect("after the takeover");
                assert_eq!(
                    report.generation,
                    if standby { 4 } else { 2 },
                    "{:?}",
                    device.stage.log()
                );
            });
            let status = device.proxy.status();
            assert_eq!((status.state, label(&device).as_deref()), (State::Serving, Some("c")));
            assert_eq!(status.counts.refused, 0);
            assert_eq!(status.standby.is_some(), standby, "the one that took over");
        }
    }
}

#[test]
fn a_successor_that_does_not_fit_what_took_over_is_refused_as_such() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["break=cache1", "wait=drop"]).expect("committed");
    std::thread::scope(|scope| {
        // Prepared while `b` lives; a guest comes before it is its turn.
        let upgrade = scope.spawn(|| device.upgrade("plain", "c", &["caps=0", "wait=prepare"]));
        device.until("not begun", || device.proxy.status().state == State::Upgrading);
        device.proxy.set_write_cache(true);
        device.proxy.require(Capabilities::FLUSH);
        device.stage.go.store(true, Ordering::Release);
        let refusal = upgrade.join().expect("no panic").expect_err("the guest needs more");
        assert_eq!(refusal.code.as_str(), "feature_missing");
    });
    assert_taken_over(&device, 3, "a");
    assert_eq!(device.stage.lines("c", "dropped").len(), 1);
}

#[test]
fn a_takeover_that_does_not_end_is_waited_for_as_long_as_was_said() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["break=cache", "wait=drop"]).expect("committed");
    device.proxy.set_write_cache(true);
    let patience = std::time::Duration::from_millis(100);
    let options =
        Options { drain_timeout: patience, starved_timeout: patience, ..Options::default() };
    let began = std::time::Instant::now();
    let refusal =
        device.upgrade_with("plain", "c", &[], options).expect_err("a takeover is under way");
    assert_eq!(refusal.code.as_str(), "preempted");
    assert!(began.elapsed() >= 2 * patience && refusal.message.contains("200 ms"), "{refusal}");
    assert_eq!(device.proxy.rollback(options).expect_err("the same").code.as_str(), "preempted");
    device.stage.go.store(true, Ordering::Release);
    assert_taken_over(&device, 3, "a");
    // What it would have gone back to serves by now.
    assert_eq!(device.rollback().expect_err("it is used up").code.as_str(), "no_standby");
}

#[test]
fn an_upgrade_that_waits_for_a_takeover_gives_up_when_the_daemon_ends() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["break=cache", "wait=drop"]).expect("committed");
    device.proxy.set_write_cache(true);
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| device.upgrade("plain", "c", &[]));
        std::thread::sleep(std::time::Duration::from_millis(20));
        device.proxy.begin_stop();
        let refusal = upgrade.join().expect("no panic").expect_err("no change is begun any more");
        assert_eq!(refusal.code.as_str(), "stopping");
        device.stage.go.store(true, Ordering::Release);
    });
    assert_eq!(device.proxy.stop(), Vec::<String>::new());
}

/// Two queues with requests on `a`, which was swapped away from; `b` serves, `a` is waited for.
fn in_grace(
    first: &[&str],
    script: &[&str],
    scene: impl FnOnce(&Device, &mut Hand, &mut Hand),
) -> Device {
    let device = Device::start(2, &[&["swap=true", "hold=true"], first].concat());
    let (mut one, mut two) = (device.worker(0), device.worker(1));
    one.submit([0, 1]);
    two.submit([0, 1]);
    std::thread::scope(|scope| {
        let upgrade =
            scope.spawn(|| device.upgrade("plain", "b", &[&["swap=true"], script].concat()));
        for hand in [&mut one, &mut two] {
            hand.until(&device, "no swap", |_| device.proxy.status().generation == 2);
        }
        let attached = |_: &Hand| device.stage.lines("b", "attach").len() == 4;
        let deadline = std::time::Instant::now() + PATIENCE;
        while !attached(&one) {
            assert!(std::time::Instant::now() < deadline, "{:?}", device.stage.log());
            one.step();
            two.step();
        }
        assert!(!upgrade.is_finished(), "the predecessor is still in use");
        scene(&device, &mut one, &mut two);
        assert_eq!(
            upgrade.join().expect("no panic").expect("committed before it died").generation,
            2
        );
    });
    device
}

#[test]
fn the_predecessor_comes_back_if_its_successor_dies_while_it_is_still_in_use() {
    let device = in_grace(&[], &["break=submit"], |device, one, two| {
        // On both queues at once.
        assert_eq!((one.submit([5]), two.submit([6])), (1, 1));
        let started = std::time::Instant::now();
        while device.stage.lines("a", "got").len() < 6 {
            assert!(started.elapsed() < PATIENCE, "not run again: {:?}", device.stage.log());
            one.step();
            two.step();
        }
        // The grace period is not waited for: it was `a` that it was for, and `a` is back.
        assert!(started.elapsed() < std::time::Duration::from_secs(1), "{:?}", started.elapsed());
        assert_eq!((one.ended.len(), two.ended.len()), (0, 0));
        device.stage.release.store(true, Ordering::Release);
        one.until(device, "no answers", |one| one.ended.len() == 3);
        two.until(device, "no answers", |two| two.ended.len() == 3);
        assert_eq!((one.take_ended(), two.take_ended()), (well([0, 1, 5]), well([0, 1, 6])));
    });
    assert_taken_over(&device, 3, "a");
    // Everything is as it should be: it can be upgraded, and rolled back to.
    assert_eq!(device.upgrade("plain", "c", &["swap=true"]).expect("committed").generation, 4);
    assert_eq!(device.rollback().expect("`a` is the standby").generation, 5);
    assert_eq!(label(&device).as_deref(), Some("a"));
}

#[test]
fn the_predecessor_dies_too_and_its_requests_are_errors_and_not_silence() {
    let device = in_grace(&["break=cancel"], &["break=submit"], |device, one, two| {
        one.submit([5]);
        device.until("no takeover", || {
            one.step();
            two.step();
            device.proxy.status().counts.takeovers == 1
        });
        // There is no domain behind `a`.
        one.worker.cancel();
        device.until("not faulted", || {
            one.step();
            two.step();
            device.proxy.status().state == State::Faulted
        });
        one.until(device, "silence", |one| one.ended.len() == 3);
        two.until(device, "silence", |two| two.ended.len() == 2);
    });
    assert_eq!(device.proxy.status().resident, Vec::<String>::new());
}

#[test]
fn a_predecessor_that_cannot_serve_any_more_still_answers_what_it_has() {
    let device = in_grace(&[], &["break=submit", "caps=6"], |device, one, two| {
        // A guest was offered what only `b` has.
        device.proxy.require(Capabilities::FLUSH.with(Capabilities::DISCARD));
        one.submit([5]);
        one.until(device, "silence", |one| {
            two.step();
            one.ended.len() == 1
        });
        assert_eq!(one.take_ended(), [(5, Status::IoError)]);
        device.until("the books are open", || device.proxy.status().state == State::Faulted);
        assert_eq!(device.proxy.status().resident.len(), 1, "`a` is still in use");
        device.stage.release.store(true, Ordering::Release);
        for hand in [one, two] {
            hand.until(device, "no answers", |hand| hand.ended.len() == 2);
            assert_eq!(hand.take_ended(), well([0, 1]));
            hand.lie_down();
        }
    });
    device.until("still in use", || device.proxy.status().resident.is_empty());
    assert_eq!(device.proxy.status().standby.expect("it lives").params.get("label"), Some("a"));
    assert_eq!(device.upgrade("plain", "c", &["caps=6"]).expect("back again").generation, 3);
}

/// Does not come back from waking a worker between a successor's activation and its takeover.
#[derive(Default)]
struct UntilDead {
    stage: std::sync::Arc<crate::common::Stage>,
    taken_over: std::sync::Arc<AtomicUsize>,
}

impl Notifier for UntilDead {
    fn notify(&self) {
        if std::thread::current().name() == Some("takeover") {
            // The first thing that it does is to wake the workers.
            self.taken_over.store(1, Ordering::Release);
        }
        let began = std::time::Instant::now();
        while !self.stage.lines("b", "activate").is_empty()
            && self.taken_over.load(Ordering::Acquire) == 0
            && began.elapsed() < PATIENCE
        {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

#[test]
fn a_death_before_a_successor_is_said_to_be_live_does_not_wait_for_its_predecessor() {
    let device = Device::start(2, &[]);
    let mut asleep = device.worker(1);
    asleep.lie_down();
    let over = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (device, over) = (&device, &over);
        scope.spawn(move || {
            let told =
                UntilDead { stage: std::sync::Arc::clone(&device.stage), ..UntilDead::default() };
            let mut hand = device.worker_told(0, told);
            hand.until(device, "not told to end", |_| over.load(Ordering::Acquire) == 1);
        });
        device.until("no worker", || device.stage.lines("a", "attach0").len() == 1);
        let began = std::time::Instant::now();
        let options = Options { mode: Mode::Handover, ..Options::default() };
        let report = device.upgrade_with("plain", "b", &["break=attach0"], options);
        assert_eq!(report.expect("committed before it died").generation, 2);
        // `a` is in use: the other worker sleeps, and has not let go of it.
        assert!(began.elapsed() < std::time::Duration::from_secs(1), "{:?}", began.elapsed());
        device.until("no takeover", || {
            asleep.step();
            device.proxy.status().counts.takeovers == 1
        });
        over.store(1, Ordering::Release);
    });
    assert_taken_over(&device, 3, "a");
}
