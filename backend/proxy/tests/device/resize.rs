//! A disk that becomes larger under its guest: what follows, what is refused, and what is left by a
//! domain that dies meanwhile.

use crate::common::{Device, PATIENCE, well};
use proxy::{Code, Options, Outcome, Refusal, Resized, State, WhenBusy};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const SMALL: u64 = 64 << 10;
const LARGE: u64 = 1 << 20;

/// A device of `SMALL` bytes, and how often what the guest sees has changed.
fn device(script: &[&str]) -> (Device, Arc<AtomicU64>) {
    let device = Device::start(1, &[&["size=64K"], script].concat());
    let told = Arc::<AtomicU64>::default();
    let (count, asks) = (Arc::clone(&told), Arc::clone(&device.proxy));
    device.proxy.on_config_change(move || {
        // No lock is held, and what is told is there.
        assert_eq!(asks.status().domain.info.capacity, asks.capacity());
        count.fetch_add(1, Ordering::SeqCst);
    });
    (device, told)
}

fn resize(device: &Device, capacity: u64) -> Result<Resized, Refusal> {
    device.proxy.resize(capacity, Options::default())
}

#[track_caller]
fn has(device: &Device, capacity: u64) {
    let status = device.proxy.status();
    assert_eq!(
        (device.proxy.capacity(), status.domain.info.capacity, status.state),
        (capacity, capacity, State::Serving)
    );
}

#[test]
fn a_new_size_stays_through_upgrades_and_rollbacks() {
    let (device, told) = device(&[]);
    device.upgrade("plain", "b", &[]).unwrap();
    let (before, last) = (SMALL, device.proxy.last_event());
    let expected = Resized { generation: 2, before, capacity: LARGE };
    assert_eq!(resize(&device, LARGE), Ok(expected));
    has(&device, LARGE);
    assert_eq!(told.load(Ordering::SeqCst), 1);
    let status = device.proxy.status();
    let sizes = [&status.domain, status.standby.as_ref().unwrap()]
        .map(|domain| (domain.params.get("size").unwrap().to_owned(), domain.info.capacity));
    assert_eq!(sizes, [(LARGE.to_string(), LARGE), (LARGE.to_string(), LARGE)]);
    let entry = device.proxy.history().pop().unwrap();
    assert_eq!((entry.change.name(), entry.result), ("resize", Ok(Outcome::Resized(expected))));
    assert_eq!((status.counts.committed, status.counts.refused), (1, 0), "these are upgrades");
    let (_, event) = device.proxy.next_event(last, PATIENCE).unwrap();
    assert!(format!("{event:?}").contains(&format!("target: \"{LARGE}\"")), "{event:?}");

    // The standby was prepared when it was smaller; a new one inherits what it is now.
    device.rollback().unwrap();
    has(&device, LARGE);
    device.upgrade("plain", "c", &[]).unwrap();
    has(&device, LARGE);
    assert_eq!(resize(&device, 2 * LARGE).unwrap().generation, 4);
    device.rollback().unwrap();
    has(&device, 2 * LARGE);
    assert_eq!(told.load(Ordering::SeqCst), 2, "no upgrade changes what the guest sees");
    assert_eq!(device.proxy.stop(), [""; 0]);
}

#[test]
fn what_is_refused_changes_nothing() {
    let (device, told) = device(&["fail=resize"]);
    let refused = |capacity| resize(&device, capacity).unwrap_err();
    let smaller = refused(SMALL - 512);
    assert_eq!(smaller.code, Code::ResizeShrinks);
    assert!(smaller.message.contains(&SMALL.to_string()), "{smaller}");
    let odd = refused(LARGE + 1);
    assert!(odd.code == Code::ResizeFailed && odd.message.contains("512"), "{odd}");
    assert_eq!(device.stage.lines("a", "resize").len(), 0, "the domain was asked");
    let failed = refused(LARGE);
    assert_eq!(failed.code, Code::ResizeFailed);
    assert!(failed.message.contains("fail=resize"), "{failed}");
    has(&device, SMALL);
    let as_it_is = Resized { generation: 1, before: SMALL, capacity: SMALL };
    assert_eq!(resize(&device, SMALL), Ok(as_it_is));
    assert_eq!(device.stage.lines("a", "resize").len(), 1, "there was nothing to do");
    assert_eq!(told.load(Ordering::SeqCst), 0);
    // Nor may a successor be larger because of it.
    let refusal = device.upgrade("plain", "b", &["size=1M"]).unwrap_err();
    assert_eq!(refusal.code, Code::DeviceDiffers);
}

#[test]
fn a_domain_that_dies_of_it_leaves_one_capacity_or_the_other() {
    for (dies, left, changes) in [("late", SMALL, 0), ("early", LARGE, 1)] {
        let (device, told) = device(&[]);
        let how = format!("resize={dies}");
        device.upgrade("plain", "b", &["break=resize", &how]).unwrap();
        let mut hand = device.worker(0);
        std::thread::scope(|scope| {
            let resized = scope.spawn(|| resize(&device, LARGE));
            hand.until(&device, "an answer", |_| resized.is_finished());
            let refusal = resized.join().unwrap().unwrap_err();
            assert_eq!(refusal.code, Code::ResizePanicked);
            assert!(refusal.message.contains("break=resize"), "{refusal}");
        });
        let is_over = || device.proxy.status().counts.takeovers == 1;
        hand.until(&device, "a takeover", |_| is_over());
        has(&device, left);
        device.until("news", || told.load(Ordering::SeqCst) == changes);
        hand.submit([0, 1]);
        hand.until(&device, "answers", |hand| hand.worker.awaited() == 0);
        assert_eq!(hand.take_ended(), well(0..2), "{dies}");
        hand.lie_down();
        if left == SMALL {
            // What was tried is no reason to take another size for the disk's.
            let refusal = device.upgrade("plain", "c", &["size=1M"]).unwrap_err();
            assert_eq!(refusal.code, Code::DeviceDiffers);
        }
        resize(&device, 2 * LARGE).unwrap();
        has(&device, 2 * LARGE);
    }
}

#[test]
fn a_standby_that_does_not_follow_is_not_gone_back_to() {
    let (device, _) = device(&["resize=never"]);
    device.upgrade("plain", "b", &[]).unwrap();
    resize(&device, LARGE).unwrap();
    assert_eq!(device.proxy.status().standby.unwrap().info.capacity, SMALL);
    assert_eq!(device.rollback().unwrap_err().code, Code::DeviceDiffers);
    has(&device, LARGE);
}

#[test]
fn it_waits_for_a_change_or_is_refused() {
    let (device, _) = device(&[]);
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| device.upgrade("plain", "b", &["wait=prepare"]));
        device.until("a change", || device.proxy.status().state == State::Upgrading);
        let at_once = Options { when_busy: WhenBusy::Refuse, ..Options::default() };
        assert_eq!(device.proxy.resize(LARGE, at_once).unwrap_err().code, Code::Busy);
        let resized = scope.spawn(|| resize(&device, LARGE));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!resized.is_finished() && device.proxy.capacity() == SMALL, "in between");
        device.stage.go.store(true, Ordering::Release);
        upgrade.join().unwrap().unwrap();
        assert_eq!(resized.join().unwrap().unwrap().generation, 2);
    });
    has(&device, LARGE);
}

#[test]
fn a_device_that_nothing_serves_is_not_resized() {
    let (device, _) = device(&["break=resize"]);
    assert_eq!(resize(&device, LARGE).unwrap_err().code, Code::ResizePanicked);
    device.until("a fault", || device.proxy.status().state == State::Faulted);
    let refusal = resize(&device, LARGE).unwrap_err();
    assert!(refusal.code == Code::ResizeFailed && refusal.message.contains("upgrade"), "{refusal}");
    device.upgrade("plain", "b", &[]).unwrap();
    resize(&device, LARGE).unwrap();
    has(&device, LARGE);
}
