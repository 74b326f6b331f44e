//! What stays when it should go: it is reported as long as it is there, and holds up what it must
//! and nothing else.

use crate::common::{Device, Hand, well};
use domain_abi::Status;
use proxy::{Options, Protocol, State};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
        assert_eq!(
            swap(&device, &mut hand, "c").expect_err("`a` is in use").code.as_str(),
            "previous_in_use"
        );
    }
    assert_eq!(hand.submit([7]), 1, "the successor serves meanwhile");
    assert_eq!(hand.take_ended(), well([7]));
    device.stage.release.store(true, Ordering::Release);
    hand.until(&device, "the old requests never end", |hand| hand.ended.len() == 3);
    assert_eq!(hand.take_ended(), well([1, 3, 4]));
    // Without any command.
    hand.until(&device, "still resident", |_| device.proxy.status().resident.is_empty());
    assert_eq!(
        device.proxy.status().standby.expect("it is the standby now").params.get("label"),
        Some("a")
    );
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
        swap(device, &mut other, "b").expect("a swap waits for no worker");
        assert_eq!(label(device).as_deref(), Some("b"));
        assert_eq!(device.proxy.status().resident.len(), 1);
        assert_eq!(
            swap(device, &mut other, "c").expect_err("inside").code.as_str(),
            "previous_in_use"
        );
        device.stage.release.store(true, Ordering::Release);
        other.until(device, "still resident", |_| device.proxy.status().resident.is_empty());
        assert_eq!(swap(device, &mut other, "c").expect("no worker is inside").generation, 3);
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

/// What is in flight on `hand` is not answered, and not run again, however often it is looked for.
#[track_caller]
fn assert_unanswered(device: &Device, hand: &mut Hand, count: usize) {
    for _ in 0..20 {
        hand.step();
    }
    assert_eq!((hand.ended.len(), hand.worker.in_flight(), hand.worker.owing()), (0, count, 0));
    assert_eq!(device.proxy.status().queues[0].in_flight, count as u64);
    assert_eq!(device.proxy.status().queues[0].replayed, 0);
}

/// Waits until `device` is faulted because a domain died and cannot be ended, for the reason `why`:
/// the two requests that it had stay unanswered.
#[track_caller]
fn assert_not_ended(device: &Device, hand: &mut Hand, why: &str) {
    hand.until(device, "not found dead", |_| device.proxy.status().state == State::Faulted);
    let status = device.proxy.status();
    let fault = status.fault.as_deref().unwrap_or_default();
    assert!(fault.contains("stay unanswered") && fault.contains(why), "{status:?}");
    assert_unanswered(device, hand, 2);
}

/// A device whose first instance was replaced with two requests in flight, and dies of them; what
/// else it does is in `breaks` and `more`.
fn with_a_dead_predecessor(breaks: &str, more: &str) -> (Device, Hand) {
    let device = Device::start(1, &["swap=true", "hold=true", breaks, more]);
    let mut hand = device.worker(0);
    hand.submit([4, 1]);
    swap(&device, &mut hand, "b").expect("committed");
    device.stage.release.store(true, Ordering::Release);
    (device, hand)
}

/// A device whose live domain dies of the second of two requests, with `more` in its script, and
/// whose standby `a` could serve.
fn with_a_dead_live_domain(more: &str) -> (Device, Hand) {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["hold=true", "die_at=2", more]).expect("committed");
    let mut hand = device.worker(0);
    hand.submit([4]);
    hand.submit([1]);
    (device, hand)
}

#[test]
fn a_replaced_instance_that_dies_and_cannot_be_ended_leaves_its_requests_unanswered() {
    let (device, mut hand) = with_a_dead_predecessor("break=reap", "thread=true");
    assert_not_ended(&device, &mut hand, "thread `puppet`");
    let status = device.proxy.status();
    assert!(
        status.resident.len() == 1 && status.resident[0].contains("thread `puppet`"),
        "{status:?}"
    );
    assert!(status.standby.is_none() && status.generation == 2, "{status:?}");
    // The successor serves; the two slots are not used again, and what they had is not run again.
    assert_eq!(hand.submit([7]), 1);
    assert_eq!(hand.take_ended(), well([7]));
    assert_eq!(device.stage.lines("b", "got"), ["0:7"]);
    swap(&device, &mut hand, "c").expect("what cannot be ended is no reason to refuse");
    assert_unanswered(&device, &mut hand, 2);
    // Nor when the thread ends at last: it is not known what it has written until then.
    device.stage.end.store(true, Ordering::Release);
    hand.until(&device, "still reported", |_| device.proxy.status().resident.is_empty());
    assert_unanswered(&device, &mut hand, 2);
    assert_eq!(device.proxy.status().queues[0].errors, 0);
    assert_eq!(device.stage.lines("c", "got"), [""; 0]);
}

#[test]
fn a_live_domain_that_dies_and_cannot_be_ended_leaves_its_requests_unanswered() {
    let (device, mut hand) = with_a_dead_live_domain("thread=true");
    assert_not_ended(&device, &mut hand, "thread `puppet`");
    assert_eq!(
        device.stage.lines("a", "got"),
        [""; 0],
        "a standby must not run beside what cannot be ended"
    );
    // What the dead one never had is told the truth.
    hand.submit([7]);
    assert_eq!(hand.take_ended(), [(7, Status::IoError)]);
    hand.lie_down();
    device.upgrade("plain", "c", &[]).expect("an upgrade brings the device back");
    hand.step();
    assert_unanswered(&device, &mut hand, 2);
    hand.submit([8]);
    assert_eq!(hand.take_ended(), well([8]));
    assert_eq!(device.stage.lines("c", "got"), ["0:8"]);
}

#[test]
fn an_end_that_breaks_off_is_no_end() {
    // What breaks off may be the wait for the kernel, which still has the requests.
    let (device, mut hand) = with_a_dead_live_domain("break=drop");
    assert_not_ended(&device, &mut hand, "broke off");
    assert_eq!(
        device.stage.lines("a", "got"),
        [""; 0],
        "a standby must not run beside what was not ended"
    );
    let (device, mut hand) = with_a_dead_predecessor("break=reap,drop", "thread=false");
    assert_not_ended(&device, &mut hand, "broke off");
    assert_eq!(hand.submit([7]), 1, "the successor serves");
    assert_eq!(hand.take_ended(), well([7]));
}

#[test]
fn a_refused_module_with_a_thread_that_does_not_end_is_reported_too() {
    let device = Device::start(1, &[]);
    for (count, fault) in [(1, "fail=prepare"), (2, "fail=activate")] {
        device.upgrade("plain", "b", &[fault, "thread=true"]).expect_err(fault);
        let status = device.proxy.status();
        assert_eq!(
            (status.state, status.resident.len()),
            (State::Serving, count),
            "{fault}: {status:?}"
        );
    }
    device.stage.end.store(true, Ordering::Release);
    device.until("still reported", || device.proxy.status().resident.is_empty());
}

#[test]
fn a_standby_that_is_told_something_is_waited_for_before_it_ends() {
    let device = Device::start(1, &["wait=cache"]);
    device.upgrade("plain", "b", &[]).expect("committed");
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| device.upgrade("plain", "c", &["wait=activate"]));
        device.until("not begun", || !device.stage.lines("c", "waits").is_empty());
        scope.spawn(|| device.proxy.set_write_cache(false));
        device.until("not told", || !device.stage.lines("a", "cache").is_empty());
        device.stage.go.store(true, Ordering::Release);
        device.until("not published", || device.proxy.status().generation == 3);
        // Longer than what only looks at an instance takes.
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!upgrade.is_finished(), "`a` is still in use");
        device.stage.release.store(true, Ordering::Release);
        upgrade.join().expect("no panic").expect("committed");
    });
    assert_eq!(device.stage.lines("a", "dropped").len(), 1);
    assert_eq!(device.proxy.status().resident, Vec::<String>::new());
}

#[test]
fn a_standby_that_is_told_something_for_too_long_ends_when_that_is_over() {
    let device = Device::start(1, &["wait=cache"]);
    device.upgrade("plain", "b", &[]).expect("committed");
    let second = Duration::from_secs(1);
    let options = Options { drain_timeout: second, starved_timeout: second, ..Options::default() };
    std::thread::scope(|scope| {
        let upgrade =
            scope.spawn(|| device.upgrade_with("plain", "c", &["wait=activate"], options));
        device.until("not begun", || !device.stage.lines("c", "waits").is_empty());
        scope.spawn(|| device.proxy.set_write_cache(false));
        device.until("not told", || !device.stage.lines("a", "cache").is_empty());
        device.stage.go.store(true, Ordering::Release);
        upgrade.join().expect("no panic").expect("committed");
        let resident = device.proxy.status().resident;
        assert!(resident.len() == 1 && resident[0].contains("in use"), "{resident:?}");
        device.stage.release.store(true, Ordering::Release);
    });
    device.until("still reported", || device.proxy.status().resident.is_empty());
    assert_eq!(device.stage.lines("a", "dropped").len(), 1);
}

#[test]
fn what_is_let_go_of_is_not_waited_for_any_longer() {
    // As long as it takes at best: the machine may be busy.
    let mut shortest = Duration::MAX;
    for _ in 0..10 {
        let device = Device::start(1, &["swap=true", "hold=true"]);
        let mut hand = device.worker(0);
        hand.submit([0]);
        std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| device.upgrade("plain", "b", &["swap=true"]));
            let attached = |_: &Hand| !device.stage.lines("b", "attach0").is_empty();
            hand.until(&device, "no swap", attached);
            // Until it waits for the request.
            std::thread::sleep(Duration::from_millis(10));
            let released = std::time::Instant::now();
            device.stage.release.store(true, Ordering::Release);
            hand.until(&device, "the upgrade hangs", |_| upgrade.is_finished());
            shortest = shortest.min(released.elapsed());
            upgrade.join().expect("no panic").expect("committed");
        });
    }
    assert!(shortest < Duration::from_millis(20), "{shortest:?}");
}

#[test]
fn a_dead_domain_that_was_left_with_requests_is_not_waited_for() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["hold=true", "break=cache"]).expect("committed");
    let mut hand = device.worker(0);
    hand.submit([0]);
    // The session ends, and the request does not.
    drop(hand);
    let began = std::time::Instant::now();
    device.proxy.set_write_cache(true);
    device.until("not found dead", || device.proxy.status().state == State::Faulted);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let status = device.proxy.status();
    let fault = status.fault.as_deref().unwrap_or_default();
    assert!(fault.contains("stay unanswered"), "{status:?}");
    assert_eq!(device.stage.lines("a", "got"), [""; 0], "`b` may still write to it");
}

#[test]
fn an_end_that_hangs_holds_up_neither_a_look_nor_the_end_of_the_device() {
    let device = Device::start(1, &["wait=cache,drop"]);
    device.upgrade("plain", "b", &[]).expect("committed");
    let second = Duration::from_secs(1);
    let options = Options { drain_timeout: second, starved_timeout: second, ..Options::default() };
    std::thread::scope(|scope| {
        let upgrade =
            scope.spawn(|| device.upgrade_with("plain", "c", &["wait=activate"], options));
        device.until("not begun", || !device.stage.lines("c", "waits").is_empty());
        let told = scope.spawn(|| device.proxy.set_write_cache(false));
        device.until("not told", || !device.stage.lines("a", "cache").is_empty());
        device.stage.go.store(true, Ordering::Release);
        upgrade.join().expect("no panic").expect("committed");
        device.stage.go.store(false, Ordering::Release);
        device.stage.release.store(true, Ordering::Release);
        told.join().expect("no panic");
    });
    // Nothing uses `a` any more, and it does not come back from its end.
    let began = std::time::Instant::now();
    for _ in 0..10 {
        let resident = device.proxy.status().resident;
        assert!(resident.len() == 1 && resident[0].contains("in use"), "{resident:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    let left = device.proxy.stop();
    assert!(left.len() == 1 && left[0].contains("in use"), "{left:?}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    device.stage.go.store(true, Ordering::Release);
    // Without a look.
    device.until("not ended", || !device.stage.lines("a", "dropped").is_empty());
    device.until("still reported", || device.proxy.status().resident.is_empty());
    assert_eq!(device.stage.lines("a", "dropped").len(), 1);
}

#[test]
fn a_dead_standby_that_is_rolled_back_to_is_ended_and_reported_as_long_as_it_stays() {
    let device = Device::start(1, &["break=cache1", "thread=true"]);
    device.upgrade("plain", "b", &[]).expect("committed");
    // `a` dies of it.
    device.proxy.set_write_cache(true);
    device.rollback().expect_err("it is dead");
    assert_eq!(device.stage.lines("a", "dropped").len(), 1);
    let status = device.proxy.status();
    assert!(status.standby.is_none(), "{status:?}");
    assert!(
        status.resident.len() == 1 && status.resident[0].contains("thread `puppet`"),
        "{status:?}"
    );
    device.stage.end.store(true, Ordering::Release);
    device.until("still reported", || device.proxy.status().resident.is_empty());
}

/// What CPU time this thread has had.
fn cpu_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("this kernel counts");
    let ran = text.split_whitespace().next().and_then(|ran| ran.parse().ok());
    Duration::from_nanos(ran.expect("a number of nanoseconds"))
}

#[test]
fn a_worker_that_does_not_pass_is_waited_for_asleep_and_the_takeover_gets_its_turn() {
    let device = Device::start(1, &["swap=true", "die_at=1"]);
    let mut hand = device.worker(0);
    hand.submit([0]);
    hand.until(&device, "no verdict", |hand| !hand.ended.is_empty());
    // From now on it does not come by, and is attached to nothing.
    std::thread::scope(|scope| {
        let upgrade = |label| {
            let drain_timeout = Duration::from_millis(100);
            let options = Options { drain_timeout, ..Options::default() };
            device.upgrade_with("plain", label, &["swap=true"], options)
        };
        for label in ["b", "c"] {
            let report = scope.spawn(move || upgrade(label)).join().expect("no panic");
            report.expect("committed");
        }
        assert!(device.stage.lines("b", "attach").is_empty());
        let status = device.proxy.status();
        assert!(status.standby.is_none() && status.resident.len() == 1, "{status:?}");
        let spent = scope.spawn(move || {
            let before = cpu_time();
            let refusal = upgrade("d").expect_err("in use");
            assert_eq!(refusal.code.as_str(), "previous_in_use");
            cpu_time() - before
        });
        let spent = spent.join().expect("no panic");
        assert!(spent < Duration::from_millis(20), "{spent:?} of 100 ms");
        // What looks after `b` holds the lock for moments only.
        let mut offered = 0;
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_millis(500) {
            let patience = Duration::from_micros(100);
            offered +=
                usize::from(device.proxy.offer(patience, |info| info.capabilities).is_some());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(offered > 50, "{offered}");
    });
    hand.until(&device, "still resident", |_| device.proxy.status().resident.is_empty());
    assert!(device.proxy.status().standby.is_some());
}
