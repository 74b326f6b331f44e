//! The end of a device, and a session's beginning while something else is under way.

mod common;

use common::Device;
use domain_api::Capabilities;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What the puppet `a` did, without being set up.
fn deeds(device: &Device) -> Vec<String> {
    let all = device.stage.lines("a", "");
    all.into_iter().filter(|line| !["prepare", "activate"].contains(&&**line)).collect()
}

#[test]
fn the_end_flushes_before_the_domain_writes_down_what_it_has() {
    let device = Device::start(2, &[]);
    assert_eq!(device.proxy.stop(), Vec::<String>::new());
    assert_eq!(deeds(&device), ["attach", "attach0", "got 0:0", "detach", "quiesce"]);
}

#[test]
fn the_end_waits_for_its_flush() {
    let device = Device::start(1, &["hold=true"]);
    std::thread::scope(|scope| {
        let end = scope.spawn(|| device.proxy.stop());
        device.until("no flush", || !device.stage.lines("a", "got").is_empty());
        std::thread::sleep(Duration::from_millis(50));
        assert!(device.stage.lines("a", "quiesce").is_empty() && !end.is_finished(), "it was to wait");
        device.stage.release.store(true, Ordering::Release);
        assert_eq!(end.join().expect("no panic"), Vec::<String>::new());
    });
}

#[test]
fn a_flush_that_fails_at_the_end_is_said() {
    for (script, said) in [
        (["bad_at=1"], "an I/O error"),
        (["break=submit"], "request 1"),
        (["break=attach"], "break=attach"),
        (["take=0"], "did not take it"),
    ] {
        let device = Device::start(1, &script);
        let left = device.proxy.stop();
        assert!(left.len() == 1 && left[0].contains("last flush") && left[0].contains(said), "{left:?}");
    }
}

#[test]
fn nothing_is_flushed_where_nothing_can_have_been_written() {
    for caps in [0, Capabilities::FLUSH.0 | Capabilities::READ_ONLY.0] {
        let device = Device::start(1, &[&format!("caps={caps}")]);
        assert_eq!(device.proxy.stop(), Vec::<String>::new());
        assert_eq!(deeds(&device), ["quiesce"]);
    }
}

#[test]
fn a_session_that_begins_in_an_upgrade_is_told_of_what_comes_out_of_it() {
    let more = format!("caps={}", Capabilities::FLUSH.0 | Capabilities::DISCARD.0);
    let device = Device::start(1, &[&more]);
    let offer = |patience| device.proxy.offer(patience, |info| info.capabilities);
    std::thread::scope(|scope| {
        // Nobody is connected, so it may lack what the live one has.
        let upgrade = scope.spawn(|| device.upgrade("plain", "b", &["wait=activate"]));
        device.until("not begun", || !device.stage.lines("b", "waits").is_empty());
        assert!(offer(Duration::from_millis(20)).is_none(), "nobody knows yet what there is to be offered");
        let session = scope.spawn(|| offer(common::PATIENCE));
        std::thread::sleep(Duration::from_millis(20));
        device.stage.go.store(true, Ordering::Release);
        upgrade.join().expect("no panic").expect("committed");
        let offered = session.join().expect("no panic").expect("there is a device");
        assert_eq!(offered.capabilities, Capabilities::FLUSH);
    });
    // From now on it counts.
    assert_eq!(device.upgrade("plain", "c", &["caps=0"]).expect_err("no way").code, "feature_missing");
}
