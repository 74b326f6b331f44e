//! The disk in a file keeps the contract, on a real file system and on one that lacks half of
//! `fallocate`, cached and direct.

mod common;

use common::{image_in, params, real_dir};
use domain_api::{Capabilities, Level, Status};
use domain_conformance::{Bench, Job, Options, TestStorage, run};
use domain_file::FileDisk;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

fn keeps_the_contract(dir: &Path, more: &[&str]) {
    let image = image_in(dir, 2 << 20);
    let params = params(image.path(), more);
    run::<FileDisk>(&Options {
        refused: vec![("path".into(), String::new())],
        resizes: !more.contains(&"readonly=true"),
        ..Options::new(params)
    });
}

#[test]
fn keeps_the_contract_on_a_real_file_system() {
    keeps_the_contract(&real_dir(), &["serial=file"]);
}

#[test]
fn keeps_the_contract_without_zero_range() {
    keeps_the_contract(Path::new("/dev/shm"), &[]);
}

#[test]
fn keeps_the_contract_read_only() {
    keeps_the_contract(&real_dir(), &["readonly=true"]);
}

#[test]
fn keeps_the_contract_with_direct_io() {
    keeps_the_contract(&real_dir(), &["direct=true"]);
}

#[test]
fn what_one_way_wrote_the_other_reads() {
    let image = image_in(&real_dir(), 1 << 20);
    let disk = |more: &[&str]| {
        Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), more))
            .expect("it opens")
    };
    let (cached, direct) = (disk(&[]), disk(&["direct=true"]));
    assert_eq!(cached.instance.info().unwrap().backing_cache, 0);
    assert_eq!(direct.instance.info().unwrap().backing_cache, 1);
    let (mut one, mut two) = (cached.lane(0).unwrap(), direct.lane(0).unwrap());
    for (at, cut) in [(0u64, &[1 << 20][..]), (65536, &[513, 4095]), (131_072, &[4096])] {
        let data: Vec<u8> = (0..65536u32).map(|i| (i * 7 + at as u32) as u8).collect();
        one.one(Job::write(at, data.clone()).in_pieces(cut)).unwrap().ok().unwrap();
        assert!(two.one(Job::read(at, 65536).in_pieces(cut)).unwrap().ok().unwrap() == data);
        let data: Vec<u8> = data.iter().rev().copied().collect();
        two.one(Job::write(at, data.clone()).in_pieces(cut)).unwrap().ok().unwrap();
        assert!(one.one(Job::read(at, 65536).in_pieces(cut)).unwrap().ok().unwrap() == data);
    }
    // Longer than a bounce buffer, and different everywhere.
    let long: Vec<u8> = (0..(700u32 << 10) / 4).flat_map(u32::to_le_bytes).collect();
    let len = long.len() as u64;
    two.one(Job::write(4096, long.clone()).in_pieces(&[777])).unwrap().ok().unwrap();
    assert!(one.one(Job::read(4096, len)).unwrap().ok().unwrap() == long);
    assert!(two.one(Job::read(4096, len).in_pieces(&[12345])).unwrap().ok().unwrap() == long);
}

#[test]
fn space_goes_back_and_zeros_keep_it() {
    let image = image_in(&real_dir(), 1 << 20);
    let bench =
        Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), &[])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    let file = image.as_file();
    let mut blocks_after = |job: Job| {
        lane.one(Job::write(0, vec![0x5a; 1 << 20])).unwrap().ok().unwrap();
        lane.one(Job::flush()).unwrap().ok().unwrap();
        lane.one(job).unwrap().ok().unwrap();
        lane.one(Job::flush()).unwrap().ok().unwrap();
        file.metadata().unwrap().blocks() * 512
    };
    assert_eq!(blocks_after(Job::write_zeroes(0, 1 << 20, false)), 1 << 20);
    assert_eq!(blocks_after(Job::write_zeroes(0, 1 << 20, true)), 0);
    assert_eq!(blocks_after(Job::discard(0, 1 << 20)), 0);
}

#[test]
fn the_write_cache_can_be_turned_off() {
    let image = image_in(&real_dir(), 1 << 20);
    for more in [&[][..], &["direct=true"]] {
        let bench =
            Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), more)).unwrap();
        assert!(bench.instance.info().unwrap().capabilities.contains(Capabilities::WRITE_CACHE));
        bench.instance.set_write_cache(false).unwrap();
        let mut lane = bench.lane(0).unwrap();
        for cut in [&[8192][..], &[100, 1]] {
            lane.one(Job::write(4096, vec![9; 8192]).in_pieces(cut)).unwrap().ok().unwrap();
        }
        lane.one(Job::write_zeroes(4096, 4096, true)).unwrap().ok().unwrap();
        let mut back = [1u8; 8192];
        image.as_file().read_exact_at(&mut back, 4096).unwrap();
        assert!(back[..4096].iter().all(|&b| b == 0) && back[4096..].iter().all(|&b| b == 9));
        drop(lane);
        bench.retire().unwrap();
    }
}

#[test]
fn an_image_that_was_cut_short_gives_io_errors_and_one_line() {
    let image = image_in(&real_dir(), 1 << 20);
    let bench =
        Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), &[])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    image.as_file().set_len(4096).unwrap();
    for _ in 0..5 {
        assert_eq!(lane.one(Job::read(8192, 512)).unwrap().status, Status::IoError);
    }
    assert_eq!(lane.one(Job::read(0, 4096)).unwrap().status, Status::Ok);
    let lines = bench.host.lines();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].0 == Level::Warn && lines[0].1.contains("cut short"), "{lines:?}");
}

#[test]
fn a_full_file_system_gives_io_errors_and_one_line() {
    // A mount namespace of this thread's own: it and the file system vanish with the thread.
    let dir = tempfile::tempdir().unwrap();
    let mounted =
        std::thread::scope(|scope| scope.spawn(|| on_a_full_disk(dir.path())).join().unwrap());
    if !mounted {
        eprintln!("skipped: not allowed to mount a small file system");
    }
}

fn on_a_full_disk(dir: &Path) -> bool {
    if !common::mount_tmpfs(dir, c"size=1m") {
        return false;
    }
    let image = image_in(dir, 8 << 20);
    let bench =
        Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), &[])).unwrap();
    let mut lane = bench.lane(0).unwrap();
    lane.one(Job::write(0, vec![1; 512 << 10])).unwrap().ok().unwrap();
    for _ in 0..5 {
        let status = lane.one(Job::write(1 << 20, vec![1; 2 << 20])).unwrap().status;
        assert_eq!(status, Status::IoError);
    }
    let lines = bench.host.lines();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].0 == Level::Warn && lines[0].1.contains("make room"), "{lines:?}");
    // What fitted is there, and there is room again once something is discarded.
    assert_eq!(lane.one(Job::read(0, 512 << 10)).unwrap().ok().unwrap(), vec![1; 512 << 10]);
    lane.one(Job::discard(0, 8 << 20)).unwrap().ok().unwrap();
    lane.one(Job::write(1 << 20, vec![1; 512 << 10])).unwrap().ok().unwrap();
    true
}
