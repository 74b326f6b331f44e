//! Each target over its corpus, and some seconds of what is made of it.

use fuzz::TARGETS;
use fuzz::random::{Until, corpus, run};
use std::sync::Mutex;
use std::time::Duration;

/// One at a time: targets look at which descriptors there are.
static ALONE: Mutex<()> = Mutex::new(());

/// In a thread of its own, so that what it has open for ever is closed before the next one begins.
fn bounded(name: &'static str) {
    let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let ran = std::thread::spawn(move || {
        let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
        assert!(corpus(target).len() >= 3, "hardly any script is kept of {name}");
        // So many at least, however busy the machine is.
        let runs = run(target, 0x0bad_d15c, Until::Runs(500));
        let more = run(target, 0x0dec_0ded, Until::Time(Duration::from_secs(3)));
        println!("{name}: {} scripts", runs + more);
    });
    let ran = ran.join();
    drop(alone);
    if let Err(fault) = ran {
        std::panic::resume_unwind(fault);
    }
}

#[test]
fn whatever_a_frontend_says() {
    bounded("frontend_side");
}

#[test]
fn whatever_a_server_says() {
    bounded("server_side");
}

#[test]
fn whatever_a_supervisor_sends() {
    bounded("channel_server");
}

#[test]
fn whatever_a_server_sends() {
    bounded("channel_supervisor");
}

#[test]
fn whatever_a_region_holds() {
    bounded("inflight_recovery");
}

#[test]
fn whatever_an_nbd_server_says() {
    bounded("nbd_server");
}
