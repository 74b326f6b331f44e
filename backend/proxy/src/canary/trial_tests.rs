use super::*;
use crate::canary::latency::{CLASSES, Probe};
use domain_abi::RawRequest;
use domain_conformance::StaticModule;
use domain_empty::Empty;
use domain_host::{LoadError, ModuleLoader, VerifiedModule};

/// Finds `empty`, whatever it is asked for.
struct Loader;

impl ModuleLoader for Loader {
    fn verify(&self, _: &str) -> Result<Box<dyn VerifiedModule>, LoadError> {
        Ok(StaticModule::verified::<Empty>())
    }
}

const MS: Duration = Duration::from_millis(1);

/// The verdict on a generation after requests of a millisecond, of whose requests a few hundred
/// take thirty, as soon as something is measured, or when nothing is any more.
fn verdict(time: Duration, compared: Duration, is_slow_early: bool) -> Verdict {
    let loader = Box::new(Loader);
    let device = DomainProxy::start(loader, "empty", Params::default(), 1).expect("it starts");
    let trial = Trial { time, max_errors: 0, max_latency_ratio: 2.0 };
    device.canary.begin(trial).expect("there is none");
    let before = vec![Histogram::of(vec![1_000_000; 2_000]); CLASSES];
    std::thread::scope(|scope| {
        let watched = scope.spawn(|| device.watch(1, trial, &before, compared));
        let gauge = &device.canary.gauge;
        let wait_until = |is_on| {
            while gauge.is_on() != is_on {
                assert!(!watched.is_finished(), "it has ended");
                std::thread::sleep(MS);
            }
        };
        wait_until(true);
        if !is_slow_early {
            wait_until(false);
        }
        let mut probe = Probe::default();
        (0..400).for_each(|slot| probe.took(&[RawRequest::flush()], 1, |_| slot));
        std::thread::sleep(30 * MS);
        probe.answered(gauge, 0..400);
        watched.join().expect("no panic")
    })
}

#[test]
fn latency_is_compared_for_a_time_only_and_the_trial_goes_on() {
    let verdicts = [
        verdict(500 * MS, 10_000 * MS, true),
        verdict(1_000 * MS, 500 * MS, true),
        verdict(1_000 * MS, 50 * MS, false),
    ];
    let [Verdict::TakeBack(all), Verdict::TakeBack(early), Verdict::Keep] = &verdicts else {
        panic!("{verdicts:?}");
    };
    assert!(all.contains("times as slow") && early.contains("times as slow"), "{verdicts:?}");
}
