//! Both versions of the disk in memory keep the contract, and its storage passes between them.

use domain_api::{BlockDomain, Params};
use domain_conformance::{Bench, Job, Options, TestStorage, run};
use domain_ramdisk::{GiveBack, Keep, Ramdisk};
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::os::unix::fs::MetadataExt;

const MEBI: u64 = 1 << 20;

fn params(pairs: &[&str]) -> Params {
    Params::from_pairs(pairs).expect("written here")
}

fn resident_bytes(storage: &TestStorage) -> u64 {
    let region = storage.region("disk").expect("there after activate");
    // SAFETY: the region, which is alive here, owns the descriptor; `ManuallyDrop` leaves it open.
    let file = ManuallyDrop::new(unsafe { File::from_raw_fd(region.fd()) });
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn both_versions_keep_the_contract() {
    let params = params(&["size=2M", "serial=ram"]);
    let options = Options { resizes: true, ..Options::new(params) };
    run::<Ramdisk<Keep>>(&options);
    run::<Ramdisk<GiveBack>>(&options);
}

#[test]
fn a_disk_of_another_size_is_refused_with_both_sizes() {
    let storage = TestStorage::new();
    let bench = Bench::activated::<Ramdisk>(&storage, &params(&["size=1M"])).unwrap();
    let error = Bench::prepare::<Ramdisk>(&storage, &params(&["size=2M"])).unwrap_err().to_string();
    assert!(error.contains("1048576") && error.contains("2097152"), "{error}");
    let next = Bench::prepare::<Ramdisk>(&storage, &params(&["size=1024K"])).unwrap();
    next.retire().unwrap();
    bench.retire().unwrap();
}

#[test]
fn preparing_takes_no_memory() {
    let storage = TestStorage::new();
    let bench = Bench::prepare::<Ramdisk>(&storage, &params(&["size=1T"])).unwrap();
    assert!(storage.region("disk").is_none());
    bench.retire().unwrap();
    let bench = Bench::activated::<Ramdisk>(&storage, &params(&["size=1M"])).unwrap();
    assert_eq!(resident_bytes(&storage), 0);
    bench.retire().unwrap();
}

#[test]
fn memory_goes_back_to_the_host_in_version_2_only() {
    reclaims::<Ramdisk<Keep>>(false);
    reclaims::<Ramdisk<GiveBack>>(true);
}

fn reclaims<D: BlockDomain>(gives_back: bool) {
    let storage = TestStorage::new();
    let bench = Bench::activated::<D>(&storage, &params(&["size=4M"])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    let all = vec![0x77u8; 4 * MEBI as usize];
    let mut expect = |job: Job, given_back: u64| {
        lane.one(Job::write(0, all.clone())).unwrap().ok().unwrap();
        assert_eq!(resident_bytes(&storage), 4 * MEBI);
        let zeroed = format!("{job:?}");
        lane.one(job).unwrap().ok().unwrap();
        let expected = if gives_back { 4 * MEBI - given_back } else { 4 * MEBI };
        assert_eq!(resident_bytes(&storage), expected, "{zeroed}");
        lane.one(Job::read(0, 4 * MEBI)).unwrap().ok().unwrap()
    };
    expect(Job::discard(0, 4 * MEBI), 4 * MEBI);
    // The page at either end is not whole.
    let after = expect(Job::write_zeroes(512, MEBI, true), MEBI - 4096);
    assert!(after[512..][..MEBI as usize].iter().all(|&b| b == 0));
    assert!(after[..512].iter().chain(&after[512 + MEBI as usize..]).all(|&b| b == 0x77));
    expect(Job::discard(512, MEBI), MEBI - 4096);
    expect(Job::write_zeroes(0, MEBI, false), 0);
    expect(Job::write_zeroes(512, 1024, true), 0);
    drop(lane);
    bench.retire().unwrap();
}

/// Runs `From` and then `To` on one storage, with holes and data in it, and back.
fn takes_over<From: BlockDomain, To: BlockDomain>() {
    let storage = TestStorage::new();
    let params = params(&["size=1M", "serial=x"]);
    let old = Bench::activated::<From>(&storage, &params).unwrap();
    let mut expected = vec![0x31u8; MEBI as usize];
    expected[512..512 + 65536].fill(0);
    let mut lane = old.lane(0).unwrap();
    lane.one(Job::write(0, vec![0x31; MEBI as usize])).unwrap().ok().unwrap();
    lane.one(Job::write_zeroes(512, 65536, true)).unwrap().ok().unwrap();
    drop(lane);

    let new = Bench::prepare::<To>(&storage, &params).unwrap();
    assert_eq!(new.instance.info().unwrap(), old.instance.info().unwrap());
    old.instance.quiesce().unwrap();
    new.activate().unwrap();
    let mut lane = new.lane(0).unwrap();
    assert!(lane.one(Job::read(0, MEBI)).unwrap().ok().unwrap() == expected);
    lane.one(Job::write_zeroes(MEBI / 2, 65536, true)).unwrap().ok().unwrap();
    lane.one(Job::write(1024, vec![0x32; 4096])).unwrap().ok().unwrap();
    expected[(MEBI / 2) as usize..][..65536].fill(0);
    expected[1024..][..4096].fill(0x32);
    drop(lane);

    new.instance.quiesce().unwrap();
    old.activate().unwrap();
    let mut lane = old.lane(0).unwrap();
    assert!(lane.one(Job::read(0, MEBI)).unwrap().ok().unwrap() == expected);
    drop(lane);
    new.retire().unwrap();
    old.retire().unwrap();
}

#[test]
fn each_version_takes_over_from_the_other() {
    takes_over::<Ramdisk<Keep>, Ramdisk<GiveBack>>();
    takes_over::<Ramdisk<GiveBack>, Ramdisk<Keep>>();
}
