//! The null disk keeps the contract.

use domain_api::{Params, Status};
use domain_conformance::{Bench, Job, Options, TestStorage, run};
use domain_empty::Empty;

fn params(pairs: &[&str]) -> Params {
    Params::from_pairs(pairs).expect("written here")
}

#[test]
fn keeps_the_contract() {
    let params = params(&["size=1M", "serial=null"]);
    run::<Empty>(&Options { data: false, resizes: true, ..Options::new(params) });
}

#[test]
fn is_64_mebibytes_unless_told_otherwise() {
    let storage = TestStorage::new();
    let bench = Bench::activated::<Empty>(&storage, &Params::default()).unwrap();
    assert_eq!(bench.instance.info().unwrap().capacity, 64 << 20);
    bench.retire().unwrap();
}

#[test]
fn forgets_what_is_written() {
    let storage = TestStorage::new();
    let bench = Bench::activated::<Empty>(&storage, &params(&["size=8K"])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(lane.one(Job::write(512, vec![7; 1024])).unwrap().status, Status::Ok);
    assert_eq!(lane.one(Job::read(0, 8192).in_pieces(&[33, 95])).unwrap().data, vec![0; 8192]);
    drop(lane);
    bench.retire().unwrap();
}
