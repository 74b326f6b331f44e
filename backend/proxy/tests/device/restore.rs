//! A device that goes on with what a process has left that died during a trial.

use crate::common::Device;
use domain_abi::{Capabilities, Status};
use domain_host::{Identity, LoadError, ModuleLoader, VerifiedModule};
use proxy::{
    CanaryState, Code, DomainProxy, KeptModule, Options, Refusal, Restoring, Saved, State, WhenBusy,
};
use puppet::PuppetLoader;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use storage::Filling;

const BOTH: u64 = Capabilities::FLUSH.0 | Capabilities::DISCARD.0;

/// Finds a kept puppet by its path.
struct Shelf;

impl ModuleLoader for Shelf {
    fn verify(&self, name: &str) -> Result<Box<dyn VerifiedModule>, LoadError> {
        PuppetLoader.verify(name)
    }

    fn verify_kept(
        &self,
        _: OwnedFd,
        origin: &Identity,
    ) -> Result<Box<dyn VerifiedModule>, LoadError> {
        self.verify(&origin.path)
    }
}

fn module(device: &Device, number: u64, label: &str, script: &[&str]) -> KeptModule {
    KeptModule {
        number,
        image: Arc::new(tempfile::tempfile().expect("a file").into()),
        name: "plain".to_owned(),
        version: "1.0.0".to_owned(),
        path: "plain".to_owned(),
        sha256: label.to_owned(),
        signature: None,
        params: device.stage.params(label, script),
    }
}

/// What a server has left that died with its generation 2, the puppet `b`, on trial.
fn left(device: &Device, standby: &[&str], canary: &[&str]) -> Saved {
    Saved {
        generation: 2,
        live: Some(module(device, 2, "b", canary)),
        standby: Some(module(device, 1, "a", standby)),
        fault: None,
        told: device.proxy.domain(),
        storage: Filling { schema: 1, ..Filling::default() },
        required: Capabilities(BOTH),
        canary: Some(2),
    }
}

type Restored = Result<(Arc<DomainProxy>, Option<KeptModule>), Refusal>;

fn restore(saved: Saved) -> Restored {
    Restoring::prepare(Box::new(Shelf), None, saved, 1, true)?.activate()
}

fn has_both() -> String {
    format!("caps={BOTH}")
}

#[test]
fn the_standby_of_one_that_was_on_trial_goes_on() {
    let device = Device::start(1, &[]);
    let (proxy, standby) = restore(left(&device, &[&has_both()], &[&has_both()])).expect("it fits");
    let status = proxy.status();
    assert_eq!((status.state, status.generation), (State::Serving, 3));
    assert_eq!(status.domain.params.get("label"), Some("a"));
    let canary = proxy.canary().expect("a verdict");
    assert_eq!((canary.state, canary.generation), (CanaryState::TakenBack, Some(2)));
    assert!(standby.is_none(), "the canary stands by");
    assert_eq!(proxy.stop(), [""; 0]);
}

/// A device that goes on with what was left, and what is to be its standby, which does as `standby`
/// says when its stage lets it. The live domain dies of its first request.
fn about_to_die(standby: &[&str]) -> (Device, KeptModule) {
    let device = Device::start(1, &[]);
    let standby = [&["wait=prepare"], standby].concat();
    let saved = Saved { canary: None, ..left(&device, &standby, &["die_at=1"]) };
    let saved = Saved { required: Capabilities::FLUSH, ..saved };
    let (proxy, standby) = restore(saved).expect("it fits");
    (Device { proxy, stage: device.stage }, standby.expect("it is to be loaded"))
}

/// Has the live domain die while its standby is being loaded, which does as `standby` says. Its
/// request ends with `status`.
fn die_before_the_standby(standby: &[&str], status: Status) -> Device {
    let (device, standby) = about_to_die(standby);
    let (begun, has_begun) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let loads = scope.spawn(|| device.proxy.take_standby(&standby, || drop(begun)));
        has_begun.recv().expect_err("nothing is sent");
        let mut hand = device.worker(0);
        hand.submit([0]);
        let began = std::time::Instant::now();
        hand.until(&device, "time stands still", |_| began.elapsed().as_millis() > 300);
        assert_eq!((device.proxy.status().state, hand.ended.len()), (State::Upgrading, 0));
        device.stage.go.store(true, Ordering::Release);
        hand.until(&device, "no answer", |hand| hand.ended.len() == 1);
        assert_eq!(hand.take_ended(), [(0, status)]);
        hand.lie_down();
        let _ = loads.join().expect("no panic");
    });
    device
}

/// Lets what waits go on, also when a test has failed.
struct LetGo<'a>(&'a Device);

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        self.0.stage.go.store(true, Ordering::Release);
    }
}

/// Runs `scene` while a standby is being loaded that waits until it is let go, after it; and what
/// became of that.
fn beside_one_that_is_loaded(scene: impl FnOnce(&Device)) -> (Device, Result<(), Refusal>) {
    let (device, standby) = about_to_die(&[]);
    let (begun, has_begun) = std::sync::mpsc::channel::<()>();
    let loaded = std::thread::scope(|scope| {
        let go = LetGo(&device);
        let loads = scope.spawn(|| device.proxy.take_standby(&standby, || drop(begun)));
        has_begun.recv().expect_err("nothing is sent");
        scene(&device);
        drop(go);
        loads.join().expect("no panic")
    });
    (device, loaded)
}

/// Nobody has asked for it, and what it waits for may never come.
#[test]
fn one_that_is_never_there_holds_up_no_request_and_no_upgrade_for_ever() {
    let (device, late) = beside_one_that_is_loaded(|device| {
        let mut hand = device.worker(0);
        hand.submit([0]);
        let began = std::time::Instant::now();
        hand.until(device, "time stands still", |_| began.elapsed().as_secs() > 5);
        hand.until(device, "no answer", |hand| hand.ended.len() == 1);
        assert_eq!(hand.take_ended(), [(0, Status::IoError)]);
        hand.lie_down();
        device.until("no verdict", || device.proxy.status().state == State::Faulted);
        std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| device.upgrade("plain", "c", &[]));
            device.until("the upgrade waits", || device.proxy.status().state == State::Serving);
            upgrade.join().expect("no panic").expect("committed");
        });
    });
    assert_eq!(late.expect_err("it is of no use any more").code, Code::NoStandby);
    let status = device.proxy.status();
    assert_eq!(status.domain.params.get("label"), Some("c"));
    assert!(status.standby.is_none(), "the one before is faulted");
}

/// The live domain is well, so no takeover gives it up first.
#[test]
fn one_that_takes_for_ever_holds_up_no_upgrade_and_is_not_kept_beside_another() {
    let (device, loaded) = beside_one_that_is_loaded(|device| {
        let at_once = Options { when_busy: WhenBusy::Refuse, ..Options::default() };
        let refused = device.upgrade_with("plain", "c", &[], at_once);
        assert_eq!(refused.expect_err("it may be there in a moment").code, Code::Busy);
        device.upgrade("plain", "c", &[]).expect("committed");
    });
    loaded.expect("it is loaded, and not needed");
    let status = device.proxy.status();
    assert_eq!(status.domain.params.get("label"), Some("c"));
    let standby = status.standby.expect("the one before");
    assert_eq!(standby.params.get("label"), Some("b"));
    assert_eq!(device.proxy.stop(), [""; 0]);
}

#[test]
fn a_standby_that_is_being_loaded_takes_over_when_it_is_there() {
    let device = die_before_the_standby(&[], Status::Ok);
    device.until("no end", || device.proxy.status().state == State::Serving);
    let status = device.proxy.status();
    assert_eq!((status.generation, status.counts.takeovers), (3, 1));
    assert_eq!(status.domain.params.get("label"), Some("a"));
    assert!(status.standby.is_none(), "it serves");
    assert_eq!(device.proxy.stop(), [""; 0]);
}

#[test]
fn one_that_cannot_be_loaded_is_waited_for_no_longer() {
    let device = die_before_the_standby(&["fail=prepare"], Status::IoError);
    device.until("no verdict", || device.proxy.status().state == State::Faulted);
    let left = device.proxy.stop();
    assert!(left.len() == 1 && left[0].contains("there is no standby"), "{left:?}");
}

#[test]
fn where_the_standby_cannot_go_on_the_one_on_trial_does() {
    let few = format!("caps={}", Capabilities::FLUSH.0);
    let (fails, breaks) = ("fail=activate".to_owned(), "break=activate".to_owned());
    for (standby, code) in [
        (vec![few], Code::FeatureMissing),
        (vec![has_both(), "size=2M".to_owned()], Code::DeviceDiffers),
        (vec![has_both(), "fail=prepare".to_owned()], Code::PrepareFailed),
        (vec![has_both(), "break=prepare".to_owned()], Code::PreparePanicked),
        (vec![has_both(), fails], Code::ActivateFailed),
        (vec![has_both(), breaks], Code::ActivatePanicked),
    ] {
        let device = Device::start(1, &[]);
        let script: Vec<&str> = standby.iter().map(String::as_str).collect();
        let saved = left(&device, &script, &[&has_both()]);
        let (proxy, standby) = restore(saved).unwrap_or_else(|refusal| panic!("{refusal}"));
        let status = proxy.status();
        assert_eq!((status.state, status.generation), (State::Serving, 2), "{code}");
        assert_eq!(status.domain.params.get("label"), Some("b"), "{code}");
        let canary = proxy.canary().expect("a verdict");
        assert_eq!((canary.state, canary.generation), (CanaryState::Stuck, Some(2)), "{code}");
        let why = canary.why.expect("why");
        assert!(why.contains("server") && why.contains(code.as_str()), "{code}: {why}");
        assert_eq!(standby.map(|module| module.number), Some(1), "{code}");
        // It is a device as any other.
        let device = Device { proxy, stage: device.stage };
        let mut hand = device.worker(0);
        hand.submit([0]);
        hand.until(&device, "no answer", |hand| hand.ended.len() == 1);
        hand.lie_down();
        drop(hand);
        device.upgrade("plain", "c", &[&has_both()]).expect("it can be replaced");
        assert_eq!(device.proxy.stop(), [""; 0], "{code}");
    }
}

#[test]
fn where_neither_can_go_on_the_refusal_is_that_of_the_one_on_trial() {
    let device = Device::start(1, &[]);
    let saved = left(&device, &["fail=activate"], &[&has_both(), "fail=prepare"]);
    assert_eq!(restore(saved).err().map(|refusal| refusal.code), Some(Code::PrepareFailed));
    let saved = left(&device, &["fail=prepare"], &[&has_both(), "fail=activate"]);
    assert_eq!(restore(saved).err().map(|refusal| refusal.code), Some(Code::ActivateFailed));
}

#[test]
fn a_spare_server_goes_by_what_it_is_told_last() {
    let device = Device::start(1, &[]);
    let mut restoring = Restoring::prepare(
        Box::new(Shelf),
        None,
        left(&device, &[&has_both(), "fail=prepare"], &[&has_both()]),
        1,
        false,
    )
    .expect("the canary is prepared");
    restoring.update(left(&device, &[&has_both()], &[&has_both()])).expect("the standby fits now");
    let (proxy, _) = restoring.activate().expect("it fits");
    assert_eq!(proxy.status().generation, 3);
    assert_eq!(proxy.canary().map(|canary| canary.state), Some(CanaryState::TakenBack));
}
