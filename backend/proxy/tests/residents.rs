//! What stays when it should go: it is reported as long as it is there, and holds up what it must and nothing else.

mod common;

use common::{Device, Hand, well};
use proxy::{Protocol, State};
use std::sync::atomic::{AtomicBool, Ordering};

fn label(device: &Device) -> Option<String> {
    device.proxy.domain().params.get("label").map(str::to_owned)
}

/// Upgrades to a successor that swaps, on a thread of its own, while `hand` goes on.
fn swap(device: &Device, hand: &mut Hand, name: &str) -> Result<proxy::Report, proxy::Refusal> {
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| device.upgrade("plain", name, &["swap=true"]));
        hand.until(device, "the upgrade hangs", |_| upgrade.is_finished());
        upgrade.join().expect("no panic")
    })
}

#[test]
fn an_old_instance_holds_the_next_upgrade_up_until_its_requests_have_ended() {
    let device = Device::start(1, &["swap=true", "hold=true"]);
    let mut hand = device.worker(0);
    hand.submit([4, 1, 3]);
    let report = swap(&device, &mut hand, "b").expect("committed");
    assert_eq!((report.generation, report.protocol), (2, Protocol::Swap));
    let status = device.proxy.status();
    assert_eq!((status.state, status.resident.len()), (State::Serving, 1), "{status:?}");
    assert!(status.resident[0].contains("in flight"), "{status:?}");
    assert!(status.standby.is_none(), "what is in use is no standby yet");
    for _ in 0..2 {
        assert_eq!(swap(&device, &mut hand, "c").expect_err("`a` is in use").code, "previous_in_use");
    }
    assert_eq!(hand.submit([7]), 1, "the successor serves meanwhile");
    assert_eq!(hand.take_ended(), well([7]));
    device.stage.release.store(true, Ordering::Release);
    hand.until(&device, "the old requests never end", |hand| hand.ended.len() == 3);
    assert_eq!(hand.take_ended(), well([1, 3, 4]));
    // Without any command.
    hand.until(&device, "still resident", |_| device.proxy.status().resident.is_empty());
    assert_eq!(device.proxy.status().standby.expect("it is the standby now").params.get("label"), Some("a"));
    assert_eq!(swap(&device, &mut hand, "c").expect("nothing is in the way").generation, 3);
    assert_eq!(device.stage.lines("a", "dropped").len(), 1);
}

#[test]
fn a_worker_that_hangs_in_the_old_instance_holds_the_next_upgrade_up_until_it_comes_back() {
    let device = Device::start(2, &["swap=true", "hang_at=2"]);
    let (mut hand, mut other) = (device.worker(0), device.worker(1));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (device, done) = (&device, &done);
        scope.spawn(move || {
            hand.submit([5]);
            // Does not come back.
            hand.submit([6]);
            hand.until(device, "not told to end", |_| done.load(Ordering::Acquire));
            assert_eq!(hand.take_ended(), well([5, 6]));
        });
        device.until("not inside", || device.stage.lines("a", "got").len() == 2);
        swap(device, &mut other, "b").expect("a swap waits for nobody");
        assert_eq!(label(device).as_deref(), Some("b"));
        assert_eq!(device.proxy.status().resident.len(), 1);
        assert_eq!(swap(device, &mut other, "c").expect_err("inside").code, "previous_in_use");
        device.stage.release.store(true, Ordering::Release);
        other.until(device, "still resident", |_| device.proxy.status().resident.is_empty());
        assert_eq!(swap(device, &mut other, "c").expect("nobody is inside").generation, 3);
        done.store(true, Ordering::Release);
    });
}

#[test]
fn a_module_with_a_thread_that_does_not_end_is_reported_until_it_ends() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["thread=true"]).expect("committed");
    device.upgrade("plain", "c", &[]).expect("committed");
    assert!(device.proxy.status().resident.is_empty(), "the standby is needed");
    device.upgrade("plain", "d", &[]).expect("a thread that stays is no reason to refuse");
    for _ in 0..3 {
        let resident = device.proxy.status().resident;
        assert!(resident.len() == 1 && resident[0].contains("thread `puppet`"), "{resident:?}");
    }
    device.upgrade("plain", "e", &[]).expect("nor later");
    device.stage.end.store(true, Ordering::Release);
    device.until("still reported", || device.proxy.status().resident.is_empty());
    assert!(device.proxy.stop().is_empty(), "nothing is left behind");
}
