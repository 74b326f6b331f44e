use super::*;
use crate::record::report::Phases;
use domain_abi::Params;
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

fn device() -> Arc<DomainProxy> {
    DomainProxy::start(Box::new(Loader), "empty", Params::default(), 1).expect("it starts")
}

fn another(device: &DomainProxy) -> LoadedDomain {
    let live = device.record();
    let phases = &mut Phases::default();
    let next = device.preparer.prepare("empty", Params::default(), Some(&live), || Ok(()), phases);
    next.expect("it is prepared")
}

#[test]
fn what_serves_is_said_once_and_everything_follows_from_it() {
    let device = device();
    let first = device.live().expect("it serves");
    assert_eq!((device.status().state, device.is_dying()), (State::Serving, false));
    // It has died, and nothing has said so yet.
    first.instance.mark_dead();
    assert!(device.is_dying() && device.live_has_died());
    assert_eq!(device.status().state, State::Serving);
    assert!(device.begin_dying(&first, "a test"));
    assert!(!device.begin_dying(&first, "a test"), "it dies once");
    assert_eq!(device.status().state, State::Upgrading);
    assert!(device.live().is_some_and(|live| live.id == first.id) && !device.is_faulted());
    assert_eq!(device.take_dead().id, first.id);
    assert!(device.live().is_none() && !device.live_has_died() && device.is_dying());
    device.set_faulted("why");
    device.end_dying(first.id);
    let status = device.status();
    assert_eq!((status.state, status.fault.as_deref()), (State::Faulted, Some("why")));
    assert!(device.is_faulted() && !device.is_dying());
    // An upgrade brings it back.
    let next = another(&device);
    next.instance.set_generation(2);
    device.set_live(&next);
    let status = device.status();
    assert_eq!((status.state, status.fault, status.generation), (State::Serving, None, 2));
    // What a replaced domain left is a fault, too, although another one serves.
    device.set_unfenced("it writes".to_owned());
    assert_eq!(device.status().state, State::Faulted);
    assert!(!device.is_faulted(), "requests are served");
}

#[test]
fn a_domain_that_dies_before_it_is_said_to_be_live_is_taken_over() {
    let device = device();
    let next = another(&device);
    next.instance.mark_dead();
    assert!(device.begin_dying(&next, "a test"));
    assert_eq!(device.status().state, State::Serving, "another one serves");
    device.set_live(&next);
    assert_eq!(device.status().state, State::Upgrading);
    assert!(device.live_has_died());
}

#[test]
fn a_domain_is_used_by_queues_and_calls_and_what_is_left_in_it() {
    let device = device();
    let domain = another(&device);
    assert!(!domain.is_used());
    let call = domain.enter();
    assert!(domain.is_used() && domain.is_awaited() && domain.attached() == 0);
    drop(call);
    assert!(!domain.is_used());
    let attachment = domain.attach(0).expect("it is free");
    assert!(domain.attach(0).is_err(), "it is attached already");
    assert_eq!((domain.attached(), domain.is_used()), (1, true), "the first one still is");
    drop(attachment);
    assert_eq!((domain.attached(), domain.is_used()), (0, false));
    domain.attach(0).expect("it is free again").abandon();
    assert_eq!((domain.attached(), domain.abandoned()), (1, 1));
    assert!(domain.is_used() && !domain.is_awaited(), "it is left for good");
    assert!(domain.attach(0).is_err() && domain.is_abandoned(0));
}
