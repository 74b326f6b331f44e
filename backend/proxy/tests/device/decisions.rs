//! What an upgrade decides before a queue is paused: swap or handover, or no, with a code; and what
//! it leaves behind.

use crate::common::{Device, well};
use domain_abi::Capabilities;
use proxy::{Mode, Options, Protocol, State, WhenBusy};

#[test]
fn swap_or_handover_follows_from_both_domains_and_the_mode() {
    // live swaps, next swaps, same cache -> what `auto` and `swap` do; `handover` is always
    // possible.
    for (live, next, cache, possible) in [
        (true, true, "cache=0", true),
        (true, true, "cache=1", false),
        (true, false, "cache=0", false),
        (false, true, "cache=0", false),
        (false, false, "cache=0", false),
        (false, false, "cache=1", false),
    ] {
        let swap = |yes| if yes { "swap=true" } else { "swap=false" };
        for mode in [Mode::Auto, Mode::Swap, Mode::Handover] {
            let device = Device::start(1, &[swap(live)]);
            let options = Options { mode, ..Options::default() };
            let result = device.upgrade_with("plain", "b", &[swap(next), cache], options);
            let case = format!("{live} {next} {cache} {mode:?}: {result:?}");
            match (mode, possible) {
                (Mode::Auto | Mode::Swap, true) => {
                    assert_eq!(result.expect(&case).protocol, Protocol::Swap, "{case}")
                }
                (Mode::Swap, false) => {
                    assert_eq!(result.expect_err(&case).code.as_str(), "swap_not_possible")
                }
                (Mode::Auto | Mode::Handover, _) => {
                    assert_eq!(result.expect(&case).protocol, Protocol::Handover, "{case}");
                }
            }
        }
    }
}

#[test]
fn every_refusal_has_its_code_and_leaves_the_device_as_it_was() {
    let device = Device::start(1, &["serial=S1", "swap=true"]);
    device.proxy.require(Capabilities::FLUSH);
    let mut hand = device.worker(0);
    let cases: &[(&str, &[&str], &str)] = &[
        ("nothing", &[], "module_not_found"),
        ("other", &[], "schema_not_accepted"),
        ("narrow", &[], "schema_not_accepted"),
        ("plain", &["colour=blue"], "bad_parameter"),
        ("plain", &["size=2M"], "device_differs"),
        ("plain", &["serial=S2"], "device_differs"),
        ("plain", &["block=4096"], "device_differs"),
        ("plain", &["physical=4096"], "device_differs"),
        ("plain", &["block=1000"], "prepare_failed"),
        ("plain", &["caps=0"], "feature_missing"),
        ("plain", &["caps=3"], "device_differs"),
        ("plain", &["backing=7"], "different_backing"),
        ("plain", &["backing=7", "swap=true"], "different_backing"),
        ("plain", &["kind=other"], "different_backing"),
        ("plain", &["fail=prepare"], "prepare_failed"),
        ("plain", &["break=prepare"], "prepare_panicked"),
        ("plain", &["fail=activate"], "activate_failed"),
        ("plain", &["break=activate"], "activate_panicked"),
        ("plain", &["fail=activate", "swap=true"], "activate_failed"),
        ("plain", &["break=activate", "swap=true"], "activate_panicked"),
        ("plain", &["size=0"], "prepare_failed"),
        ("plain", &["size=1000"], "prepare_failed"),
    ];
    for (number, (module, script, code)) in cases.iter().enumerate() {
        hand.lie_down();
        let ran_before = device.stage.lines("b", "").len();
        let refusal = device.upgrade(module, "b", script).expect_err(code);
        if ["module_not_found", "schema_not_accepted", "bad_parameter"].contains(code) {
            let ran = device.stage.lines("b", "").len();
            assert_eq!(
                ran, ran_before,
                "{module} {script:?}: it is known without running anything of it"
            );
        }
        assert_eq!(refusal.code.as_str(), *code, "{module} {script:?}: {refusal}");
        assert!(refusal.message.len() > 20, "{refusal}");
        let status = device.proxy.status();
        assert_eq!((status.generation, status.state), (1, State::Serving), "{module} {script:?}");
        assert_eq!((status.counts.refused, status.standby), (number as u64 + 1, None));
        assert_eq!(status.resident, Vec::<String>::new());
        let (made, gone) =
            (device.stage.lines("b", "prepare").len(), device.stage.lines("b", "dropped").len());
        assert_eq!(made, gone, "{module} {script:?} is still there");
        hand.step();
        hand.submit([0]);
        assert_eq!(hand.take_ended(), well([0]), "after {module} {script:?}");
    }
    assert_eq!(device.rollback().expect_err("no standby").code.as_str(), "no_standby");
}

#[test]
fn a_domain_that_cannot_quiesce_goes_on_and_one_that_cannot_resume_either_is_taken_over() {
    for fault in ["fail=quiesce", "break=quiesce"] {
        let device = Device::start(1, &[fault]);
        let refusal = device.upgrade("plain", "b", &[]).expect_err(fault);
        assert!(
            ["quiesce_failed", "quiesce_panicked"].contains(&refusal.code.as_str()),
            "{refusal:?}"
        );
        assert_eq!(device.stage.lines("a", "resume").len(), 1);
        assert_eq!(device.proxy.status().state, State::Serving);
        let mut hand = device.worker(0);
        hand.submit([0]);
        assert_eq!(hand.take_ended(), well([0]));
    }
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["fail=quiesce", "break=resume"]).expect("committed");
    assert_eq!(
        device.upgrade("plain", "c", &[]).expect_err("no way").code.as_str(),
        "quiesce_failed"
    );
    device.until("no takeover", || device.proxy.status().counts.takeovers == 1);
    assert_eq!(device.proxy.domain().params.get("label"), Some("a"));
}

#[test]
fn a_second_upgrade_is_refused_or_waits_as_asked() {
    let device = Device::start(1, &[]);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| device.upgrade("plain", "b", &["wait=prepare"]));
        device.until("not begun", || device.proxy.status().state == State::Upgrading);
        let refuse = Options { when_busy: WhenBusy::Refuse, ..Options::default() };
        assert_eq!(
            device
                .upgrade_with("plain", "c", &[], refuse)
                .expect_err("one is under way")
                .code
                .as_str(),
            "busy"
        );
        assert_eq!(
            device.proxy.rollback(refuse).expect_err("one is under way").code.as_str(),
            "busy"
        );
        let second = scope.spawn(|| device.upgrade("plain", "d", &[]));
        // The first one is held until the second one has come, so that it is this one that waits,
        // and not the first that has ended.
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(!second.is_finished(), "it was to wait");
        device.stage.go.store(true, std::sync::atomic::Ordering::Release);
        assert_eq!(first.join().expect("no panic").expect("committed").generation, 2);
        assert_eq!(second.join().expect("no panic").expect("committed").generation, 3);
    });
    assert!(device.stage.lines("c", "").is_empty(), "a refused one never ran");
}

#[test]
fn the_standby_is_the_one_before_and_comes_back_without_being_prepared_again() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &[]).expect("committed");
    device.upgrade("plain", "c", &[]).expect("committed");
    assert_eq!(device.stage.lines("a", "dropped").len(), 1, "only one standby is kept");
    let label = |device: &Device| device.proxy.domain().params.get("label").map(str::to_owned);
    for generation in 4..8 {
        let report = device.rollback().expect("there is a standby");
        assert_eq!(report.generation, generation);
        assert_eq!(label(&device).as_deref(), Some(if generation % 2 == 0 { "b" } else { "c" }));
    }
    assert_eq!(device.stage.lines("b", "prepare").len(), 1);
    let status = device.proxy.status();
    assert_eq!((status.counts.committed, status.counts.rolled_back), (2, 4));
}

#[test]
fn a_rollback_that_is_refused_keeps_the_standby() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["caps=6"]).expect("it has more than is needed");
    // A guest has come and was offered what only `b` has.
    device.proxy.require(Capabilities::FLUSH.with(Capabilities::DISCARD));
    assert_eq!(
        device.rollback().expect_err("`a` lacks something").code.as_str(),
        "feature_missing"
    );
    assert!(device.proxy.status().standby.is_some());
    device.proxy.require(Capabilities::FLUSH);
    assert_eq!(device.rollback().expect("now it does").generation, 3);
}

#[test]
fn a_standby_that_lacks_what_the_guest_has_does_not_take_over() {
    let device = Device::start(1, &[]);
    device.upgrade("plain", "b", &["caps=6", "die_at=1"]).expect("committed");
    device.proxy.require(Capabilities::FLUSH.with(Capabilities::DISCARD));
    let mut hand = device.worker(0);
    hand.submit([0]);
    hand.until(&device, "silence", |hand| hand.ended.len() == 1);
    device.until("not faulted", || device.proxy.status().state == State::Faulted);
}

#[test]
fn a_standby_that_does_not_know_the_layout_of_today_does_not_come_back() {
    let device = Device::start(1, &[]);
    device.upgrade("wide", "b", &["die_at=1"]).expect("it takes schema 1, and leaves schema 2");
    let refusal = device.rollback().expect_err("`a` takes schema 1 only");
    assert_eq!(refusal.code.as_str(), "schema_not_accepted");
    assert_eq!(
        (device.proxy.status().generation, device.proxy.status().state),
        (2, State::Serving)
    );
    // Nor when the live domain dies.
    let mut hand = device.worker(0);
    hand.submit([0]);
    hand.until(&device, "silence", |hand| hand.ended.len() == 1);
    device.until("not faulted", || device.proxy.status().state == State::Faulted);
    assert_eq!(device.stage.lines("a", "activate").len(), 1);
}

#[test]
fn a_failed_upgrade_leaves_the_schema_as_it_was() {
    for (fault, swap) in [("fail=activate", "swap=false"), ("break=activate", "swap=true")] {
        let device = Device::start(1, &[swap]);
        device.upgrade("wide", "b", &[fault, swap]).expect_err(fault);
        device.upgrade("plain", "c", &[swap]).expect("the storage is of schema 1 still");
    }
}

#[test]
fn a_failed_upgrade_leaves_the_storage_as_it_was() {
    let faults = ["fail=activate", "break=activate"];
    for (fault, swap) in
        faults.into_iter().flat_map(|fault| [(fault, "swap=false"), (fault, "swap=true")])
    {
        // The first one leaves nothing there, the second one something.
        for (first, found) in
            [("make=4096", "4096 Some(\"a\") Some(false)"), ("cache=0", "0 None None")]
        {
            let device = Device::start(1, &[swap, first]);
            let other = if first == "cache=0" { "make=8192" } else { "make=4096" };
            device.upgrade("plain", "b", &[fault, swap, other]).expect_err(fault);
            // A region that `b` had left would have the wrong length for this one.
            device
                .upgrade("plain", "c", &[swap, "make=4096"])
                .expect("nothing of `b` is in the way");
            assert_eq!(device.stage.lines("c", "found"), [found], "{fault} {swap} {first}");
            // And what is committed stays, for a rollback too.
            device.rollback().expect("there is a standby");
            device.upgrade("plain", "d", &[swap, "make=4096"]).expect("committed");
            let note = if first == "cache=0" { "c" } else { "a" };
            let left = format!("4096 Some({note:?}) Some({})", note != "a");
            assert_eq!(device.stage.lines("d", "found"), [left], "{fault} {swap} {first}");
        }
    }
}

#[test]
fn a_failed_rescue_leaves_the_storage_as_it_was() {
    let device = Device::start(1, &["make=4096", "die_at=1"]);
    let mut hand = device.worker(0);
    hand.submit([0]);
    hand.until(&device, "silence", |hand| hand.ended.len() == 1);
    device.until("not faulted", || device.proxy.status().state == State::Faulted);
    hand.lie_down();
    device.upgrade("plain", "b", &["make=4096", "fail=activate"]).expect_err("no");
    device.upgrade("plain", "c", &["make=4096"]).expect("back again");
    assert_eq!(device.stage.lines("c", "found"), ["4096 Some(\"a\") Some(false)"]);
}
