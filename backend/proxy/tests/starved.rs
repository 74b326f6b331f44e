//! A worker that is not given a CPU is not a domain that hangs.
//!
//! The workers here are as unimportant as can be, on a CPU that others keep busy: each is given it
//! for a moment once a second or more rarely. So what is late here is late for the machine's sake,
//! and a request that a domain keeps is late for the domain's.

mod common;

use common::{Device, Hand, PATIENCE};
use proxy::{Mode, Options, Refusal, Report, State};
use rustix::process::setpriority_process;
use rustix::thread::{CpuSet, gettid, sched_getaffinity, sched_setaffinity};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const MS: Duration = Duration::from_millis(1);

/// Keeps the calling thread on the first CPU that it may use.
fn stay_on_one_cpu() {
    let allowed = sched_getaffinity(None).expect("a set");
    let first = (0..CpuSet::MAX_CPU).find(|&cpu| allowed.is_set(cpu)).expect("one at least");
    let mut only = CpuSet::new();
    only.set(first);
    sched_setaffinity(None, &only).expect("it is allowed");
}

/// Sets its flag when it goes.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `scene` beside a worker of queue 0 that does `first`, and then goes round, hardly ever: the
/// more `others` there are, the more rarely.
fn beside_a_starved_worker<R>(
    device: &Device,
    others: usize,
    first: impl Fn(&mut Hand) + Sync,
    round: impl Fn(&mut Hand) + Sync,
    scene: impl FnOnce() -> R,
) -> R {
    beside_starved_workers(device, 1, others, first, round, scene)
}

/// The same, with a worker on each of the first `queues`.
fn beside_starved_workers<R>(
    device: &Device,
    queues: usize,
    others: usize,
    first: impl Fn(&mut Hand) + Sync,
    round: impl Fn(&mut Hand) + Sync,
    scene: impl FnOnce() -> R,
) -> R {
    // One at a time: those of another test would keep this one's CPU busy, too.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (end, begun) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (end, begun, first, round) = (&end, &begun, &first, &round);
    let over = || end.load(Ordering::Relaxed);
    // Also when the test fails.
    let ends = End(end);
    std::thread::scope(|scope| {
        for queue in 0..queues {
            scope.spawn(move || {
                let mut hand = device.worker(queue);
                first(&mut hand);
                stay_on_one_cpu();
                setpriority_process(Some(gettid()), 19).expect("less is always allowed");
                round(&mut hand);
                begun.fetch_add(1, Ordering::Relaxed);
                while !over() {
                    round(&mut hand);
                }
            });
        }
        device.until("no worker", || begun.load(Ordering::Relaxed) == queues);
        for _ in 0..others {
            scope.spawn(|| {
                stay_on_one_cpu();
                while !over() {
                    std::hint::spin_loop();
                }
            });
        }
        // Once they all run: from then on a round takes its time.
        std::thread::sleep(200 * MS);
        // Moved, so that it goes before the threads are joined.
        let _ends = ends;
        scene()
    })
}

/// A worker between two batches, with a pause, so that it does not stay at its round for long.
fn goes_round(hand: &mut Hand) {
    hand.step();
    std::hint::spin_loop();
}

fn upgrade(device: &Device, drain: Duration, starved: Duration) -> Result<Report, Refusal> {
    let options = Options {
        mode: Mode::Handover,
        drain_timeout: drain,
        starved_timeout: starved,
        ..Options::default()
    };
    device.upgrade_with("plain", "b", &[], options)
}

#[test]
fn a_worker_that_is_not_given_a_cpu_is_given_time() {
    for _ in 0..3 {
        let device = Device::start(1, &[]);
        let result = beside_a_starved_worker(
            &device,
            4,
            |_| {},
            goes_round,
            || upgrade(&device, 5 * MS, PATIENCE * 6),
        );
        assert_eq!(result.expect("nothing hangs").generation, 2);
    }
}

#[test]
fn time_without_a_cpu_has_a_bound_and_a_name() {
    let device = Device::start(1, &[]);
    let refusal = beside_a_starved_worker(
        &device,
        4,
        |_| {},
        goes_round,
        || {
            // A round may come at once, by chance.
            let refused = || upgrade(&device, 5 * MS, 20 * MS).err();
            let deadline = Instant::now() + PATIENCE;
            std::iter::from_fn(|| (Instant::now() < deadline).then(refused)).flatten().next()
        },
    );
    let refusal = refusal.expect("it is refused once");
    assert_eq!(refusal.code.as_str(), "starved", "{refusal}");
    assert!(refusal.message.contains("queue 0 waited for a CPU for"), "{refusal}");
    let [starved] = refusal.starved[..] else { panic!("{refusal:?}") };
    assert_eq!(starved.queue, 0);
    assert!(starved.waited >= 10 * MS && starved.waited <= starved.of, "{starved:?}");
    assert!(refusal.stuck.is_empty(), "{refusal:?}");
    assert_eq!(device.proxy.status().state, State::Serving);
    assert!(device.proxy.status().queues[0].cpu_wait.is_zero(), "the worker has left");
}

#[test]
fn a_starved_worker_with_requests_is_named_with_them() {
    let device = Device::start(2, &["hold=true"]);
    let ask = |hand: &mut Hand| assert_eq!(hand.submit([3, 1]), 2);
    let refused = || {
        let deadline = Instant::now() + PATIENCE;
        // It may have had its time, by chance.
        let refused = || upgrade(&device, 100 * MS, 100 * MS).expect_err("they are kept");
        let all = std::iter::from_fn(|| (Instant::now() < deadline).then(refused));
        let refusal = all.into_iter().find(|refusal| refusal.code.as_str() == "starved");
        device.stage.release.store(true, Ordering::Release);
        refusal
    };
    let refusal = beside_a_starved_worker(&device, 48, ask, goes_round, refused);
    let refusal = refusal.expect("it is starved once");
    let [stuck] = &refusal.stuck[..] else { panic!("{refusal:?}") };
    assert_eq!((stuck.index, stuck.in_flight), (0, 2), "{refusal:?}");
}

#[test]
fn workers_that_are_all_starved_are_given_time_together() {
    let device = Device::start(2, &[]);
    beside_starved_workers(
        &device,
        2,
        4,
        |_| {},
        goes_round,
        || {
            for round in 0..5 {
                let report = upgrade(&device, 50 * MS, PATIENCE);
                assert_eq!(report.expect("nothing hangs").generation, round + 2);
            }
        },
    );
}

/// Asks again and again on queue 1 while `scene` runs; how long it has waited at most.
fn beside_a_worker_that_asks<R>(device: &Device, scene: impl FnOnce() -> R) -> (R, Duration) {
    let (end, begun) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let ends = End(&end);
        let asks = scope.spawn(|| {
            let mut hand = device.worker(1);
            let mut longest = Duration::ZERO;
            while !end.load(Ordering::Relaxed) {
                let asked = Instant::now();
                while hand.submit([0]) == 0 || hand.ended.is_empty() {
                    hand.step();
                }
                hand.step();
                hand.take_ended();
                longest = longest.max(asked.elapsed());
                begun.store(true, Ordering::Relaxed);
                std::thread::sleep(MS);
            }
            longest
        });
        device.until("no answer", || begun.load(Ordering::Relaxed));
        let result = scene();
        drop(ends);
        (result, asks.join().expect("no panic"))
    })
}

#[test]
fn a_worker_with_a_cpu_does_not_wait_for_one_without() {
    let (drain, bound) = (100 * MS, 4000 * MS);
    let mut starved = 0;
    // It may come in time, by chance.
    let deadline = Instant::now() + PATIENCE * 6;
    while Instant::now() < deadline {
        let device = Device::start(2, &[]);
        let ((result, took), longest) = beside_a_starved_worker(
            &device,
            48,
            |_| {},
            goes_round,
            || {
                beside_a_worker_that_asks(&device, || {
                    let began = Instant::now();
                    (upgrade(&device, drain, bound), began.elapsed())
                })
            },
        );
        // It may be late itself, by chance.
        let most = (1000 * MS).max(took / 2);
        assert!(longest < most, "{longest:?} of {took:?}: {result:?}");
        if let Err(refusal) = result {
            assert_eq!(refusal.code.as_str(), "starved", "{refusal}");
            assert_eq!(refusal.starved[0].queue, 0, "{refusal:?}");
            // But for the last time that the gate is open.
            assert!(took > bound - 1000 * MS, "{took:?}: {refusal}");
        }
        starved += usize::from(took > 1500 * MS);
        if starved == 2 {
            return;
        }
    }
    panic!("the worker is not starved");
}

#[test]
fn a_request_that_the_domain_keeps_has_its_deadline_on_a_busy_machine_too() {
    let device = Device::start(1, &["hold=true"]);
    let ask = |hand: &mut Hand| assert_eq!(hand.submit([0]), 1);
    let sleeps = |hand: &mut Hand| {
        hand.step();
        hand.worker.sleep();
        std::thread::sleep(2000 * MS);
    };
    let (refusal, took) = beside_a_starved_worker(&device, 4, ask, sleeps, || {
        let began = Instant::now();
        let refusal = upgrade(&device, 300 * MS, PATIENCE * 6).expect_err("a request is in flight");
        device.stage.release.store(true, Ordering::Release);
        (refusal, began.elapsed())
    });
    assert_eq!(refusal.code.as_str(), "drain_timeout", "{refusal}");
    assert_eq!(refusal.stuck.len(), 1);
    assert!(refusal.message.contains("requests are missing: queue 0 has 1"), "{refusal}");
    assert!(took >= 300 * MS && took < 2000 * MS, "{took:?}");
}

#[test]
fn a_domain_that_does_not_come_back_from_a_call_has_its_deadline_too() {
    let device = Device::start(1, &["hang_at=1"]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut hand = device.worker(0);
            hand.submit([0]);
            while device.proxy.status().generation < 2 {
                hand.step();
                std::thread::sleep(MS);
            }
        });
        device.until("it does not hang", || device.proxy.status().queues[0].in_flight == 1);
        let refusal = upgrade(&device, 100 * MS, PATIENCE * 6).expect_err("it hangs");
        assert_eq!((refusal.code.as_str(), refusal.stuck.len()), ("drain_timeout", 1), "{refusal}");
        assert!(refusal.message.contains("requests are missing"), "{refusal}");
        assert!(says_of_the_cpu(&refusal), "{refusal}");
        device.stage.release.store(true, Ordering::Release);
        upgrade(&device, PATIENCE, PATIENCE).expect("it has come back");
    });
}

/// It may have waited for a moment, by chance, and then it says that.
fn says_of_the_cpu(refusal: &Refusal) -> bool {
    let none = refusal.message.contains("(no CPU was missing: the worker of queue 0");
    none != refusal.message.contains("(and starved: the worker of queue 0")
}

#[test]
fn a_worker_that_does_not_come_without_a_request_is_said_to_be_that() {
    let device = Device::start(1, &[]);
    let (began, end) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let ends = End(&end);
        scope.spawn(|| {
            let mut hand = device.worker(0);
            hand.step();
            began.store(true, Ordering::Relaxed);
            while !end.load(Ordering::Relaxed) {
                std::thread::sleep(MS);
            }
            hand.worker.sleep();
        });
        device.until("no worker", || began.load(Ordering::Relaxed));
        let refusal = upgrade(&device, 100 * MS, PATIENCE * 6).expect_err("it does not come");
        drop(ends);
        assert_eq!((refusal.code.as_str(), refusal.stuck.len()), ("drain_timeout", 0), "{refusal}");
        assert!(refusal.message.contains("no request is missing, but a worker"), "{refusal}");
        assert!(says_of_the_cpu(&refusal), "{refusal}");
    });
}

#[test]
fn an_upgrade_waits_for_a_starved_worker_to_let_go_of_the_one_before() {
    let device = Device::start(1, &["swap=true"]);
    let options = Options { starved_timeout: PATIENCE * 6, ..Options::default() };
    beside_a_starved_worker(
        &device,
        // It takes longer than the upgrade before waits for it.
        48,
        |_| {},
        goes_round,
        || {
            for (round, label) in ["b", "c", "d"].into_iter().enumerate() {
                let report = device.upgrade_with("plain", label, &["swap=true"], options);
                assert_eq!(report.expect("nothing hangs").generation, round as u64 + 2);
            }
        },
    );
}

#[test]
fn an_upgrade_that_waits_for_a_starved_worker_ends_with_the_daemon() {
    let device = Device::start(1, &[]);
    let took = beside_a_starved_worker(
        &device,
        48,
        |_| {},
        goes_round,
        || {
            std::thread::scope(|scope| {
                let upgrade = scope.spawn(|| upgrade(&device, 5 * MS, PATIENCE * 6));
                std::thread::sleep(50 * MS);
                device.proxy.begin_stop();
                let began = Instant::now();
                // It may have been done just before.
                if let Err(refusal) = upgrade.join().expect("no panic") {
                    assert!(["starved", "stopping"].contains(&refusal.code.as_str()), "{refusal}");
                }
                began.elapsed()
            })
        },
    );
    assert!(took < 1000 * MS, "{took:?}");
}
