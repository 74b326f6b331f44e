//! Servers that fail to make data durable, and those that offer no way to ask for it.

use crate::common::Server;
use domain_api::Status;
use domain_conformance::{Bench, Job, TestStorage};
use domain_nbd::NbdDisk;

#[test]
fn a_server_that_announces_no_flush_is_asked_for_none() {
    let server = Server::nbdkit(&[
        "eval",
        "get_size=echo 1048576",
        "can_write=exit 0",
        "pread=head -c $3 /dev/zero",
        "pwrite=cat > /dev/null",
    ]);
    let storage = TestStorage::new();
    let params = server.params(&["no_flush=true"]);
    let bench = Bench::activated::<NbdDisk>(&storage, &params).unwrap();
    // As a driver has it that was offered no write cache.
    bench.instance.set_write_cache(false).unwrap();
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(lane.one(Job::write(0, vec![1; 4096])).unwrap().status, Status::Ok);
    assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::Ok);
    drop(lane);
    bench.retire().unwrap();
    assert_eq!(storage.failure(), None);
}
