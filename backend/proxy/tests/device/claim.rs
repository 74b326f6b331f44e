//! Whose the data is: claimed for sessions, given back after them, and never twice.

use crate::common::{Device, PATIENCE};
use proxy::{ClaimState, Claimed, Code, Options};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

const CLAIMS: &[&str] = &["claim=true"];

/// How often the puppet `label` has done each.
fn counts(device: &Device, label: &str) -> (usize, usize) {
    let count = |what| device.stage.lines(label, what).len();
    (count("claim"), count("release"))
}

#[test]
fn what_is_claimed_for_a_session_is_given_back_after_the_last() {
    let device = Device::start(1, CLAIMS);
    let proxy = &device.proxy;
    assert_eq!(counts(&device, "a"), (0, 1), "what was claimed to start with is given back");
    assert_eq!(proxy.claim_state(), ClaimState::Free);
    for _ in 0..2 {
        proxy.want_claim();
        assert_eq!(proxy.claim(false), Claimed::Yes);
    }
    assert!(proxy.has_claimed() && proxy.claim_state() == ClaimState::Claimed);
    proxy.give_back();
    proxy.release_claim();
    assert_eq!(counts(&device, "a").1, 1, "one wants it still");
    device.upgrade("plain", "b", CLAIMS).unwrap();
    assert_eq!(counts(&device, "b"), (0, 0), "it is the storage's, and stays claimed");
    proxy.give_back();
    proxy.release_claim();
    proxy.release_claim();
    assert_eq!(counts(&device, "b"), (0, 1), "once is enough");
    assert!(!proxy.has_claimed());
}

#[test]
fn another_programs_claim_is_waited_for() {
    let device = Device::start(1, CLAIMS);
    let proxy = &device.proxy;
    device.stage.taken.store(true, Ordering::Release);
    proxy.want_claim();
    assert_eq!((proxy.claim(true), proxy.claim_state()), (Claimed::Taken, ClaimState::Waiting));
    let refused = proxy.resize(2 << 20, Options::default()).unwrap_err();
    assert_eq!(refused.code, Code::ResizeFailed);
    device.stage.taken.store(false, Ordering::Release);
    assert_eq!((proxy.claim(true), proxy.claim_state()), (Claimed::Yes, ClaimState::Claimed));
    proxy.resize(2 << 20, Options::default()).unwrap();
    assert!(proxy.has_claimed(), "it was claimed before");
    proxy.give_back();
    proxy.release_claim();
    proxy.resize(3 << 20, Options::default()).unwrap();
    assert_eq!((proxy.has_claimed(), proxy.claim_state()), (false, ClaimState::Free));
}

#[test]
fn what_may_be_written_to_is_kept() {
    let device = Device::start(1, CLAIMS);
    device.proxy.want_claim();
    assert_eq!(device.proxy.claim(false), Claimed::Yes);
    device.proxy.keep_claim();
    device.proxy.give_back();
    device.proxy.release_claim();
    assert_eq!(counts(&device, "a"), (1, 1));
}

#[test]
fn what_is_not_durable_is_not_given_back() {
    let device = Device::start(1, &["claim=true", "fail=release"]);
    device.proxy.want_claim();
    assert_eq!(device.proxy.claim(false), Claimed::Yes);
    device.proxy.give_back();
    device.proxy.release_claim();
    assert!(device.proxy.has_claimed());
}

/// Nobody else comes back to it.
#[test]
fn what_cannot_be_given_back_is_given_back_later_unless_it_is_wanted_again() {
    let device = Device::start(1, &["claim=true", "fail=release"]);
    let proxy = &device.proxy;
    proxy.want_claim();
    assert_eq!(proxy.claim(false), Claimed::Yes);
    proxy.give_back();
    proxy.release_claim();
    let tries = || counts(&device, "a").1;
    let first = tries();
    device.until("it is not tried again", || tries() > first + 1);
    proxy.want_claim();
    assert_eq!(proxy.claim(true), Claimed::Yes);
    let last = tries();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(tries() <= last, "a session wants it");
    proxy.give_back();
    // As one does that can.
    device.upgrade("plain", "b", CLAIMS).unwrap();
    proxy.release_claim();
    device.until("it is not given back", || !proxy.has_claimed());
}

#[test]
fn a_device_without_a_domain_is_claimed_for_the_next() {
    let device = Device::start(1, &["claim=true", "break=claim"]);
    let proxy = &device.proxy;
    proxy.want_claim();
    assert_eq!(proxy.claim(false), Claimed::NotNow(None), "it has died of it");
    device.until("it is faulted", || proxy.status().fault.is_some());
    // There is nothing that could write.
    assert_eq!(proxy.claim(true), Claimed::Yes);
    device.stage.taken.store(true, Ordering::Release);
    let refused = device.upgrade("plain", "b", CLAIMS).unwrap_err();
    assert_eq!(refused.code, Code::ActivateFailed, "{refused}");
    device.stage.taken.store(false, Ordering::Release);
    device.upgrade("plain", "c", CLAIMS).unwrap();
    assert_eq!(counts(&device, "c"), (1, 0));
    assert!(proxy.has_claimed());
}

#[test]
fn the_claim_goes_with_the_device() {
    let device = Device::start(1, CLAIMS);
    let proxy = &device.proxy;
    proxy.want_claim();
    assert_eq!(proxy.claim(false), Claimed::Yes);
    let (resume, resumed) = mpsc::channel();
    let (stopped, has_stopped) = mpsc::channel();
    let leaving = std::thread::spawn({
        let proxy = Arc::clone(proxy);
        let stopped = move || {
            stopped.send(()).unwrap();
            Ok(())
        };
        let stopped = Arc::new(stopped);
        move || proxy.hand_off(Options::default(), stopped, resumed)
    });
    has_stopped.recv_timeout(PATIENCE).unwrap();
    proxy.give_back();
    proxy.release_claim();
    proxy.want_claim();
    assert_eq!(proxy.claim(true), Claimed::NotNow(None));
    proxy.give_back();
    assert_eq!(counts(&device, "a"), (1, 1), "the other process may have it");
    resume.send(()).unwrap();
    leaving.join().unwrap().unwrap();
    assert_eq!(counts(&device, "a"), (1, 2), "it has come back, and no session wants it");
}
