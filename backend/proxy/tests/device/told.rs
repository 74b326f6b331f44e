//! A domain that dies in a call that is no request: told of the write cache, or of guest memory.

use crate::common::{Device, PATIENCE};
use domain_abi::RawRequest;
use proxy::{Gate, Mode, Notifier, Options};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const MS: Duration = Duration::from_millis(1);

/// Counts how often a worker is notified.
struct Count(Arc<AtomicUsize>);

impl Notifier for Count {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// An instance that was replaced has a request of a worker that sleeps, and dies in `act`: the
/// worker has to be woken, and the request answered.
fn the_replaced_one_dies(breaks: &str, act: impl FnOnce(&Device) + Send) {
    let device = Device::start(1, &["swap=true"]);
    device.upgrade("plain", "b", &["swap=true", "hold=true", breaks]).unwrap();
    let notified = Arc::new(AtomicUsize::new(0));
    let mut worker = device.proxy.worker(0, 16, Box::new(Count(Arc::clone(&notified)))).unwrap();
    let mut request = RawRequest::flush();
    worker.tags().name(&mut request, 0);
    assert_eq!(worker.submit(&mut [request], |ended| panic!("{ended:?}")), 1);
    std::thread::scope(|scope| {
        let back = scope.spawn(|| device.rollback());
        // Attaches to the one that is back, and keeps what the other owes.
        while !back.is_finished() {
            let _ = worker.gate() == Gate::Open;
            worker.reap(|ended| panic!("{ended:?}"));
            std::thread::sleep(MS);
        }
        back.join().unwrap().unwrap();
    });
    while !worker.sleep() {
        let _ = worker.gate();
        worker.reap(|ended| panic!("{ended:?}"));
    }
    let mut seen = notified.load(Ordering::SeqCst);
    std::thread::scope(|scope| {
        // It may wait until the worker has left the dead one.
        scope.spawn(|| act(&device));
        let (deadline, mut answered) = (Instant::now() + PATIENCE, false);
        while !answered {
            assert!(
                Instant::now() < deadline,
                "{breaks}: not answered; the log: {:?}",
                device.stage.log()
            );
            let now = notified.load(Ordering::SeqCst);
            if std::mem::replace(&mut seen, now) != now {
                loop {
                    let _ = worker.gate();
                    worker.reap(|_| answered = true);
                    if worker.sleep() {
                        break;
                    }
                }
            }
            std::thread::sleep(MS);
        }
    });
    drop(worker);
    assert_eq!(device.proxy.stop(), [""; 0]);
}

#[test]
fn a_replaced_domain_that_dies_of_the_write_cache_is_taken_notice_of() {
    the_replaced_one_dies("break=cache1", |device| device.proxy.set_write_cache(false));
}

#[test]
fn a_replaced_domain_that_dies_of_guest_memory_is_taken_notice_of() {
    the_replaced_one_dies("break=memory", |device| {
        device.proxy.memory_changed(0x1000, 0x1000, true)
    });
}

/// A device with a request that its domain keeps, while `act` is called; then it is answered.
fn with_a_kept_request(act: impl FnOnce(&Device)) {
    let device = Device::start(1, &["hold=true"]);
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut hand = device.worker(0);
            hand.submit([0]);
            while !end.load(Ordering::Relaxed) {
                hand.step();
                std::thread::sleep(MS);
            }
            device.stage.release.store(true, Ordering::Release);
            hand.until(&device, "an answer", |hand| hand.worker.awaited() == 0);
        });
        device.until("in flight", || device.proxy.status().queues[0].in_flight == 1);
        act(&device);
        end.store(true, Ordering::Relaxed);
    });
    assert_eq!(device.proxy.stop(), [""; 0]);
}

#[test]
fn turning_the_write_cache_off_does_not_wait_for_a_change_that_drains() {
    with_a_kept_request(|device| {
        let options = Options {
            mode: Mode::Handover,
            drain_timeout: Duration::from_secs(5),
            starved_timeout: Duration::ZERO,
            ..Options::default()
        };
        std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| device.upgrade_with("plain", "b", &[], options));
            device.until("a change", || device.proxy.status().state == proxy::State::Upgrading);
            std::thread::sleep(50 * MS);
            device.proxy.set_write_cache(false);
            assert!(!upgrade.is_finished(), "it waited for the change");
            upgrade.join().unwrap().unwrap_err();
        });
    });
}

#[test]
fn a_kept_request_is_never_called_starvation() {
    with_a_kept_request(|device| {
        let options = Options {
            mode: Mode::Handover,
            drain_timeout: 100 * MS,
            starved_timeout: Duration::ZERO,
            ..Options::default()
        };
        let refusal = device.upgrade_with("plain", "b", &[], options).unwrap_err();
        assert!(
            refusal.code.as_str() == "drain_timeout" || !refusal.starved.is_empty(),
            "{refusal}"
        );
    });
}
