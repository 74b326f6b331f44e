//! The end of a device, and a session's beginning while something else is under way.

use crate::common::{Device, well};
use domain_abi::Capabilities;
use proxy::{Options, State};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

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
        assert!(
            device.stage.lines("a", "quiesce").is_empty() && !end.is_finished(),
            "it was to wait"
        );
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
        assert!(
            left.len() == 1 && left[0].contains("last flush") && left[0].contains(said),
            "{left:?}"
        );
    }
}

/// How the live domain comes to die, and what happens before the end begins.
type Death = (&'static [&'static str], fn(&Device));

/// The live domain dies just before the end, in its middle, and just after what it was asked last.
const DEATHS: &[Death] = &[
    // Found dead: in calls that are no worker's, and in those of a worker that leaves.
    (&["break=cache"], |device| device.proxy.set_write_cache(true)),
    (&["break=memory"], |device| device.proxy.memory_changed(0x1000, 0x1000, true)),
    (&["break=detach"], |device| drop(device.worker(0))),
    (&["break=cancel", "hold=true"], |device| {
        let mut hand = device.worker(0);
        hand.submit([0]);
        hand.worker.cancel();
        hand.until(device, "no takeover", |hand| hand.worker.awaited() == 0);
    }),
    // In a request, which runs again.
    (&["break=submit"], |device| {
        let mut hand = device.worker(0);
        hand.submit([0]);
        hand.until(device, "no answer", |hand| hand.ended.len() == 1);
    }),
    // In the end itself, at each of its steps.
    (&["break=attach"], |_| {}),
    (&["break=submit"], |_| {}),
    (&["break=reap", "hold=true"], |device| device.stage.release.store(true, Ordering::Release)),
    (&["break=detach"], |_| {}),
    (&["break=quiesce"], |_| {}),
];

#[test]
fn the_end_of_a_domain_that_dies_goes_through_its_standby() {
    // A death that is noticed by another thread comes sooner or later than the end.
    for (script, die) in (0..50).flat_map(|_| DEATHS) {
        let device = Device::start(2, &[]);
        device.upgrade("plain", "b", script).expect("committed");
        die(&device);
        assert_eq!(
            device.proxy.stop(),
            Vec::<String>::new(),
            "{script:?}: {:?}",
            device.stage.log()
        );
        let asked = device.stage.log();
        let of_a = |what: &str| asked.iter().rposition(|line| line == &format!("a {what}"));
        let (flushed, quiesced) = (of_a("got 0:0"), of_a("quiesce"));
        // Its first quiesce was for the upgrade.
        assert_eq!(device.stage.lines("a", "quiesce").len(), 2, "{script:?}: {asked:?}");
        assert!(flushed.is_some() && flushed < quiesced, "{script:?}: {asked:?}");
        let status = device.proxy.status();
        assert_eq!(
            (status.state, status.generation),
            (State::Serving, 3),
            "{script:?}: {status:?}"
        );
        assert_eq!(status.resident, Vec::<String>::new(), "{script:?}");
    }
}

#[test]
fn the_end_of_a_domain_that_dies_without_a_standby_is_said() {
    for (script, die) in (0..20).flat_map(|_| DEATHS) {
        let device = Device::start(2, script);
        die(&device);
        let left = device.proxy.stop();
        assert!(left.len() == 1, "{script:?}: {left:?}");
        assert!(left[0].contains("nobody was there to flush"), "{script:?}: {left:?}");
    }
}

#[test]
fn a_standby_that_dies_in_the_last_flush_too_is_said_and_ends() {
    for step in ["break=submit", "break=quiesce", "break=attach", "break=detach"] {
        let device = Device::start(1, &[]);
        device.upgrade("plain", "b", &["die_at=1"]).expect("committed");
        device.upgrade("plain", "c", &[step]).expect("committed");
        let left = device.proxy.stop();
        assert!(
            left.len() == 1 && left[0].contains("nobody was there to flush"),
            "{step}: {left:?}"
        );
        assert!(left[0].contains("last flush"), "{step}: {left:?}");
    }
}

#[test]
fn a_dead_domain_that_cannot_be_ended_is_said_although_there_is_a_standby() {
    // It may still write: no other may serve, and it is not known what is on the disk.
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["break=submit,drop"]).expect("committed");
    let left = device.proxy.stop();
    assert!(left.len() == 1 && left[0].contains("nobody was there to flush"), "{left:?}");
    assert_eq!(device.stage.lines("a", "got"), [] as [&str; 0]);
}

#[test]
fn a_death_that_needs_no_flush_leaves_nothing() {
    let device = Device::start(1, &["caps=0", "break=cache"]);
    device.proxy.set_write_cache(true);
    assert_eq!(device.proxy.stop(), Vec::<String>::new());
}

#[test]
fn an_error_in_the_last_flush_is_said_although_a_standby_takes_over_afterwards() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["bad_at=1", "break=quiesce"]).expect("committed");
    let left = device.proxy.stop();
    assert!(left.len() == 1 && left[0].contains("an I/O error"), "{left:?}");
    assert_eq!(device.stage.lines("a", "got"), ["0:0"]);
}

#[test]
fn a_takeover_that_does_not_end_is_not_waited_for_for_ever() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["break=cache", "wait=drop"]).expect("committed");
    device.proxy.set_write_cache(true);
    let began = std::time::Instant::now();
    let left = device.proxy.stop();
    assert!(began.elapsed() < Duration::from_secs(15), "the process would be ended without a word");
    assert!(left.len() == 1 && left[0].contains("has not ended in time"), "{left:?}");
    device.stage.go.store(true, Ordering::Release);
}

#[test]
fn a_takeover_that_begins_in_the_end_of_an_upgrade_is_waited_for() {
    for _ in 0..20 {
        let device = Device::start(1, &[]);
        device.upgrade("plain", "b", &["break=resume"]).expect("committed");
        std::thread::scope(|scope| {
            // It is held in the exchange, fails, and the live one breaks in resuming.
            let upgrade =
                scope.spawn(|| device.upgrade("plain", "c", &["wait=activate", "fail=activate"]));
            device.until("not begun", || !device.stage.lines("c", "waits").is_empty());
            let end = scope.spawn(|| device.proxy.stop());
            device.until("no end", || device.proxy.is_stopping());
            device.stage.go.store(true, Ordering::Release);
            assert_eq!(
                end.join().expect("no panic"),
                Vec::<String>::new(),
                "{:?}",
                device.stage.log()
            );
            upgrade.join().expect("no panic").expect_err("it was to fail");
        });
        assert_eq!(device.stage.lines("a", "got"), ["0:0"]);
    }
}

#[test]
fn a_session_that_begins_before_a_takeover_is_told_of_what_comes_out_of_it() {
    for _ in 0..50 {
        let device = Device::start(1, &[]);
        device.upgrade("plain", "b", &["caps=6", "break=cache"]).expect("committed");
        device.proxy.set_write_cache(true);
        let offered = device.proxy.offer(crate::common::PATIENCE, |info| info.capabilities);
        let offered = offered.expect("there is a device").capabilities;
        assert_eq!(offered, Capabilities::FLUSH, "the standby has no more than that");
        // Had the guest been offered what the dead one had, none could have taken over.
        let mut hand = device.worker(0);
        hand.step();
        hand.submit([0]);
        hand.until(&device, "no answer", |hand| hand.ended.len() == 1);
        assert_eq!(hand.take_ended(), well([0]));
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
        // No guest is connected, so it may lack what the live one has.
        let upgrade = scope.spawn(|| device.upgrade("plain", "b", &["wait=activate"]));
        device.until("not begun", || !device.stage.lines("b", "waits").is_empty());
        assert!(
            offer(Duration::from_millis(20)).is_none(),
            "it is not known yet what there is to be offered"
        );
        let session = scope.spawn(|| offer(crate::common::PATIENCE));
        std::thread::sleep(Duration::from_millis(20));
        device.stage.go.store(true, Ordering::Release);
        upgrade.join().expect("no panic").expect("committed");
        let offered = session.join().expect("no panic").expect("there is a device");
        assert_eq!(offered.capabilities, Capabilities::FLUSH);
    });
    // From now on it counts.
    assert_eq!(
        device.upgrade("plain", "c", &["caps=0"]).expect_err("no way").code.as_str(),
        "feature_missing"
    );
}

#[test]
fn the_end_does_not_wait_for_a_drain() {
    let device = Device::start(1, &["hold=true"]);
    std::thread::scope(|scope| {
        let (told, ends) = std::sync::mpsc::channel::<()>();
        let device = &device;
        scope.spawn(move || {
            let mut hand = device.worker(0);
            hand.submit([0]);
            hand.until(device, "not told to end", |_| ends.try_recv().is_err_and(is_over));
            hand.until(device, "no answer", |hand| hand.ended.len() == 1);
        });
        device.until("nothing in flight", || device.proxy.status().queues[0].in_flight == 1);
        let options = Options { drain_timeout: 3 * crate::common::PATIENCE, ..Options::default() };
        let upgrade = scope.spawn(move || device.upgrade_with("plain", "b", &[], options));
        device.until("not shut", || device.proxy.status().state == State::Upgrading);
        std::thread::sleep(Duration::from_millis(150));
        device.proxy.begin_stop();
        let began = Instant::now();
        let refusal = upgrade.join().expect("no panic").expect_err("no change ends any more");
        assert_eq!(refusal.code.as_str(), "stopping", "{refusal}");
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        device.stage.release.store(true, Ordering::Release);
        drop(told);
    });
    assert_eq!(device.proxy.stop(), Vec::<String>::new());
}

fn is_over(error: std::sync::mpsc::TryRecvError) -> bool {
    error == std::sync::mpsc::TryRecvError::Disconnected
}
