//! What is refused, and held back, while a generation is on trial, so that there is a way back.

use crate::common::{Device, PATIENCE};
use domain_abi::Capabilities;
use proxy::{CanaryReport, CanaryState, Code, Options, Refusal, Report, State, Trial};
use std::time::Duration;

const FEW: Capabilities = Capabilities::FLUSH;
const BOTH: Capabilities = Capabilities::FLUSH.with(Capabilities::DISCARD);

fn caps(of: Capabilities) -> String {
    format!("caps={}", of.0)
}

type Tried = Result<(Report, CanaryReport), Refusal>;

/// Does this while `b` is on trial, and returns what comes of the trial.
fn during(device: &Device, script: &[&str], act: impl FnOnce()) -> Tried {
    let trial = Trial { time: Duration::from_secs(60), max_errors: 0, max_latency_ratio: 1000.0 };
    std::thread::scope(|scope| {
        let params = device.stage.params("b", script);
        let tried = scope
            .spawn(|| device.proxy.upgrade_on_trial("plain", params, Options::default(), trial));
        let is_running =
            || device.proxy.canary().is_some_and(|canary| canary.state == CanaryState::Running);
        device.until("it does not serve", is_running);
        act();
        tried.join().expect("no panic")
    })
}

#[track_caller]
fn is_taken_back(tried: Tried) {
    let (_, canary) = tried.expect("it was upgraded to");
    assert_eq!(canary.state, CanaryState::TakenBack, "{canary:?}");
}

#[test]
fn a_guest_is_not_offered_what_only_the_one_on_trial_has() {
    let device = Device::start(1, &[&caps(FEW)]);
    let offered = || {
        let info = device.proxy.offer(PATIENCE, |info| info.capabilities).expect("an offer");
        info.capabilities
    };
    assert_eq!(offered(), FEW);
    is_taken_back(during(&device, &[&caps(BOTH)], || {
        assert_eq!(offered(), FEW, "there would be no way back");
        device.rollback().expect("a way back");
    }));
    device.upgrade("plain", "b", &[&caps(BOTH)]).unwrap();
    assert_eq!(offered(), BOTH, "nothing is on trial");
    assert_eq!(device.rollback().unwrap_err().code, Code::FeatureMissing);
}

#[test]
fn one_that_dies_where_nothing_can_take_over_is_not_said_to_be_replaced() {
    // Both are told of the write cache; what takes over is told once more.
    let device = Device::start(1, &["break=cache2"]);
    let tried = during(&device, &["break=cache1"], || device.proxy.set_write_cache(false));
    let (_, canary) = tried.expect("it was upgraded to");
    let status = device.proxy.status();
    assert_eq!((canary.state, status.state), (CanaryState::Faulted, State::Faulted));
    let why = canary.why.expect("why");
    assert!(why.contains("did not take over"), "{why}");
}

#[test]
fn a_check_says_what_the_upgrade_would() {
    let device = Device::start(1, &[]);
    let check = || {
        let params = device.stage.params("c", &[]);
        device.proxy.check("plain", params, Options::default()).map(|checked| checked.protocol)
    };
    is_taken_back(during(&device, &[], || {
        let upgrade = device.upgrade("plain", "c", &[]).unwrap_err();
        assert_eq!((upgrade.code, check()), (Code::CanaryRuns, Err(upgrade)));
        device.rollback().expect("a way back");
    }));
    check().expect("nothing is on trial");
}

#[test]
fn the_disk_keeps_its_size() {
    let device = Device::start(1, &["size=64K", "resize=never"]);
    is_taken_back(during(&device, &[], || {
        let refusal = device.proxy.resize(1 << 20, Options::default()).unwrap_err();
        assert_eq!(refusal.code, Code::CanaryRuns);
        assert_eq!(device.proxy.capacity(), 64 << 10);
        device.rollback().expect("a way back");
    }));
    device.upgrade("plain", "c", &[]).unwrap();
    device.proxy.resize(1 << 20, Options::default()).expect("nothing is on trial");
}
