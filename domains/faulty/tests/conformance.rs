//! Without a fault it is a disk that keeps the contract; with one it breaks as asked, once, and
//! nothing else does.

use domain_api::{Params, Status};
use domain_conformance::{Bench, Job, Options, TestStorage, run};
use domain_faulty::Faulty;
use domain_host::CallError;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LATE: Duration = Duration::from_secs(3);

fn params(fault: &str) -> Params {
    let mut params = Params::from_pairs(["size=1M"]).expect("written here");
    if !fault.is_empty() {
        params.set("fault", fault);
    }
    params
}

fn broken(fault: &str) -> (Arc<TestStorage>, Bench) {
    let storage = TestStorage::new();
    let bench =
        Bench::activated::<Faulty>(&storage, &params(fault)).expect("the fault comes later");
    (storage, bench)
}

fn late<R>(act: impl FnOnce() -> R) -> R {
    let started = Instant::now();
    let result = act();
    assert!(started.elapsed() >= LATE, "after {:?}", started.elapsed());
    result
}

#[test]
fn without_a_fault_it_keeps_the_contract() {
    let refused = ["", "request", "request:explode", "boot:fail", "request:fail:0"];
    run::<Faulty>(&Options {
        refused: refused.iter().map(|value| ("fault".to_owned(), (*value).to_owned())).collect(),
        panics: Some(params("request:panic:100")),
        resizes: true,
        ..Options::new(params(""))
    });
}

#[test]
fn prepare_breaks() {
    let storage = TestStorage::new();
    let prepare = |fault| Bench::prepare::<Faulty>(&storage, &params(fault));
    assert!(matches!(prepare("prepare:fail"), Err(CallError::Failed(_))));
    assert!(matches!(prepare("prepare:panic"), Err(CallError::Panicked(_))));
    late(|| prepare("prepare:stall")).unwrap();
    late(|| prepare("prepare:hang")).unwrap();
}

#[test]
fn quiesce_breaks_once_and_the_instance_goes_on() {
    let (_storage, bench) = broken("quiesce:fail");
    assert!(matches!(bench.instance.quiesce(), Err(CallError::Failed(_))));
    assert_eq!(bench.lane(0).unwrap().one(Job::read(0, 512)).unwrap().status, Status::Ok);
    bench.instance.quiesce().unwrap();
    let (_storage, bench) = broken("quiesce:panic:2");
    bench.instance.quiesce().unwrap();
    bench.instance.resume().unwrap();
    assert!(matches!(bench.instance.quiesce(), Err(CallError::Panicked(_))));
    // No request was touched: it may go on.
    bench.instance.resume().unwrap();
    assert_eq!(bench.lane(0).unwrap().one(Job::read(0, 512)).unwrap().status, Status::Ok);
    bench.retire().unwrap();
    let (_storage, bench) = broken("quiesce:stall");
    late(|| bench.instance.quiesce()).unwrap();
}

#[test]
fn activate_breaks() {
    let storage = TestStorage::new();
    let activate = |fault| Bench::prepare::<Faulty>(&storage, &params(fault)).unwrap().activate();
    assert!(matches!(activate("activate:fail"), Err(CallError::Failed(_))));
    assert!(matches!(activate("activate:panic"), Err(CallError::Panicked(_))));
    late(|| activate("activate:hang")).unwrap();
}

#[test]
fn the_named_request_fails_and_no_other() {
    let (_storage, bench) = broken("request:fail:3");
    let mut lane = bench.lane(0).unwrap();
    let ends = lane.run(vec![Job::read(0, 512); 6]).unwrap();
    let failed: Vec<_> = ends.iter().map(|done| done.status == Status::IoError).collect();
    assert_eq!(failed, [false, false, true, false, false, false]);
}

#[test]
fn what_was_written_before_a_panic_is_there_for_the_next() {
    let (storage, bench) = broken("request:panic:2");
    let mut lane = bench.lane(0).unwrap();
    lane.one(Job::write(512, vec![7; 512])).unwrap().ok().unwrap();
    let violation = lane.one(Job::read(0, 512)).unwrap_err().to_string();
    assert!(violation.contains("fault=request:panic"), "{violation}");
    drop(lane);
    let next = Bench::activated::<Faulty>(&storage, &params("")).unwrap();
    assert_eq!(next.lane(0).unwrap().one(Job::read(512, 512)).unwrap().data, vec![7; 512]);
}

#[test]
fn a_stalled_request_stays_in_flight_and_the_worker_goes_on() {
    let (_storage, bench) = broken("request:stall:2");
    let (mut lane, mut other) = (bench.lane(0).unwrap(), bench.lane(1).unwrap());
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let jobs =
                vec![Job::write(0, vec![1; 512]), Job::write(512, vec![2; 512]), Job::read(0, 512)];
            let ends = late(|| lane.run(jobs)).unwrap();
            assert!(ends.iter().all(|done| done.status == Status::Ok));
        });
        // The other queue is not held up.
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(other.one(Job::read(0, 512)).unwrap().status, Status::Ok);
        assert!(started.elapsed() < LATE);
    });
    assert_eq!(other.one(Job::read(512, 512)).unwrap().data, vec![2; 512]);
}

#[test]
fn cancel_ends_what_is_stalled() {
    let (_storage, bench) = broken("request:stall");
    let mut lane = bench.lane(5).unwrap();
    let instance = &bench.instance;
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            instance.cancel().unwrap();
        });
        assert_eq!(lane.one(Job::read(0, 512)).unwrap().status, Status::IoError);
    });
    assert!(started.elapsed() < LATE);
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn a_hanging_request_holds_up_its_thread() {
    let (_storage, bench) = broken("request:hang");
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(late(|| lane.one(Job::read(0, 512))).unwrap().status, Status::Ok);
}
