//! What servers are like: over TCP, with large blocks, with one connection only, read-only, with a
//! size that is no multiple of a block, and with one that grows.

use crate::common::{Server, TcpServer};
use domain_api::{Capabilities, Status};
use domain_conformance::{Bench, Job, Options, TestStorage, run};
use domain_nbd::NbdDisk;

/// An image of so many bytes in the server's folder, which its command calls `FOLDER/image`.
fn of_image(command: &[&str], bytes: u64) -> Server {
    let mut server = Server::prepared(command);
    std::fs::File::create(server.folder().join("image")).unwrap().set_len(bytes).unwrap();
    server.start();
    server
}

const NBDKIT_FILE: &[&str] = &["nbdkit", "-f", "--unix", "SOCKET", "file", "FOLDER/image"];

fn capacity_of(server: &Server, more: &[&str]) -> u64 {
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params(more)).unwrap();
    let capacity = bench.instance.info().unwrap().capacity;
    bench.retire().unwrap();
    capacity
}

#[test]
fn keeps_the_contract_over_tcp() {
    let server = TcpServer::start();
    run::<NbdDisk>(&Options::new(server.params(&[])));
}

#[test]
fn keeps_the_contract_with_a_server_of_one_connection() {
    let server =
        Server::nbdkit(&["--filter=multi-conn", "memory", "2M", "multi-conn-mode=disable"]);
    run::<NbdDisk>(&Options::new(server.params(&[])));
}

#[test]
fn keeps_the_contract_with_blocks_of_4096() {
    let server = Server::nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "2M",
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=32M",
        "blocksize-error-policy=error",
    ]);
    let options = Options::new(server.params(&[]));
    let bench = Bench::activated::<NbdDisk>(&TestStorage::new(), &options.params).unwrap();
    assert_eq!(bench.instance.info().unwrap().block_size, 4096);
    let mut lane = bench.lane(0).unwrap();
    // As a disk that has no smaller ones.
    assert_eq!(lane.one(Job::read(512, 512)).unwrap().status, Status::IoError);
    drop(lane);
    bench.retire().unwrap();
    run::<NbdDisk>(&options);
}

#[test]
fn a_server_that_takes_little_at_a_time_gets_pieces() {
    let server = Server::nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "2M",
        "blocksize-minimum=1",
        "blocksize-preferred=4096",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    ]);
    let bench = Bench::activated::<NbdDisk>(&TestStorage::new(), &server.params(&[])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|at: u32| (at ^ at >> 9) as u8).collect();
    lane.one(Job::write(512, data.clone()).in_pieces(&[777, 4096])).unwrap().ok().unwrap();
    let read = lane.one(Job::read(512, 1 << 20).in_pieces(&[12345])).unwrap().ok().unwrap();
    assert!(read == data);
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn what_is_behind_the_last_sector_is_left_out_and_a_read_only_export_is_read() {
    let server = of_image(&[NBDKIT_FILE, &["-r"]].concat(), (1 << 20) + 100);
    assert_eq!(capacity_of(&server, &[]), 1 << 20);
    let bench = Bench::activated::<NbdDisk>(&TestStorage::new(), &server.params(&[])).unwrap();
    let info = bench.instance.info().unwrap();
    assert!(info.capabilities.contains(Capabilities::READ_ONLY));
    assert!(!info.capabilities.contains(Capabilities::DISCARD));
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(lane.one(Job::read((1 << 20) - 512, 512)).unwrap().status, Status::Ok);
    assert_eq!(lane.one(Job::write(0, vec![1; 512])).unwrap().status, Status::IoError);
    drop(lane);
    bench.retire().unwrap();
}

#[test]
fn a_disk_grows_when_a_new_connection_is_told_of_more() {
    for more in [&[][..], &["connections=1"]] {
        let server = of_image(NBDKIT_FILE, 1 << 20);
        let storage = TestStorage::new();
        let bench = Bench::activated::<NbdDisk>(&storage, &server.params(more)).unwrap();
        let mut lane = bench.lane(0).unwrap();
        lane.one(Job::write(0, vec![1; 4096])).unwrap().ok().unwrap();
        let said = bench.instance.resize(2 << 20).unwrap_err().to_string();
        assert!(said.contains("1048576 bytes"), "{said}");
        let image = std::fs::File::options().write(true).open(server.folder().join("image"));
        image.unwrap().set_len(2 << 20).unwrap();
        bench.instance.resize(2 << 20).unwrap();
        assert_eq!(bench.instance.info().unwrap().capacity, 2 << 20);
        lane.one(Job::write((2 << 20) - 4096, vec![2; 4096])).unwrap().ok().unwrap();
        assert_eq!(lane.one(Job::read(0, 4096)).unwrap().ok().unwrap(), vec![1; 4096]);
        drop(lane);
        bench.retire().unwrap();
        // What was announced is in storage.
        let bench = Bench::activated::<NbdDisk>(&storage, &server.params(more)).unwrap();
        assert_eq!(bench.instance.info().unwrap().capacity, 2 << 20);
        bench.retire().unwrap();
    }
}

#[test]
fn another_export_is_no_successor_and_the_same_is() {
    let (one, two) = (Server::nbdkit(&["memory", "1M"]), Server::nbdkit(&["memory", "1M"]));
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &one.params(&[])).unwrap();
    let said = Bench::prepare::<NbdDisk>(&storage, &two.params(&[])).unwrap_err().to_string();
    assert!(said.contains("does not move a disk"), "{said}");
    let said = Bench::prepare::<NbdDisk>(&storage, &one.params(&["readonly=true"])).unwrap_err();
    assert!(said.to_string().contains("`readonly`"), "{said}");
    Bench::prepare::<NbdDisk>(&storage, &one.params(&[])).unwrap();
    bench.retire().unwrap();
}
