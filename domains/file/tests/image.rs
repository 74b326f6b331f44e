//! Which files are taken, what is said about those that are not, and which file a successor goes on
//! with.

mod common;

use common::{image_in, params, real_dir};
use domain_api::{Claim, Level, Params};
use domain_conformance::{Bench, Job, TestStorage};
use domain_file::FileDisk;
use domain_io::file_io::{ImageLock, OpenMode, lock_image, open_mode, unlock_image};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

fn refusal(path: &Path, more: &[&str]) -> String {
    Bench::prepare::<FileDisk>(&TestStorage::new(), &params(path, more)).unwrap_err().to_string()
}

#[test]
fn images_that_cannot_be_a_disk_are_refused_with_advice() {
    let dir = tempfile::tempdir_in(real_dir()).unwrap();
    let make = |name: &str, len: u64| {
        let path = dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        path
    };
    let said = refusal(&make("odd", 1000), &[]);
    assert!(said.contains("1000 bytes") && said.contains("truncate -s 1024"), "{said}");
    let said = refusal(&make("empty", 0), &[]);
    assert!(said.contains("empty") && said.contains("truncate"), "{said}");
    let said = refusal(dir.path(), &[]);
    assert!(said.contains("is a directory"), "{said}");
    let said = refusal(&dir.path().join("missing"), &[]);
    assert!(said.contains("there is no") && said.contains("truncate"), "{said}");
    let said = refusal(Path::new("/dev/null"), &[]);
    assert!(said.contains("must name a raw image file"), "{said}");
    let said = refusal(Path::new(""), &[]);
    assert!(said.contains("`path` is missing"), "{said}");
    let said = Bench::prepare::<FileDisk>(&TestStorage::new(), &Params::default())
        .unwrap_err()
        .to_string();
    assert!(said.contains("`path` is missing"), "{said}");
}

#[test]
fn a_running_program_cannot_be_written_but_read() {
    // Each user, root too, gets "text file busy".
    let program = std::env::current_exe().unwrap();
    let said = refusal(&program, &[]);
    assert!(said.contains("for writing"), "{said}");
    if program.metadata().unwrap().len().is_multiple_of(512) {
        Bench::prepare::<FileDisk>(&TestStorage::new(), &params(&program, &["readonly=true"]))
            .unwrap();
    }
}

#[test]
fn direct_io_on_an_odd_size_is_refused_with_both_ways_out() {
    let image = image_in(&real_dir(), (1 << 20) + 512);
    match Bench::prepare::<FileDisk>(&TestStorage::new(), &params(image.path(), &["direct=true"])) {
        Ok(bench) => assert_eq!(bench.instance.info().unwrap().block_size, 512),
        Err(error) => {
            let said = error.to_string();
            assert!(said.contains("truncate -s") && said.contains("direct=true"), "{said}");
        }
    }
}

#[test]
fn it_is_identified_by_device_and_inode() {
    let image = image_in(&real_dir(), 1 << 20);
    let bench =
        Bench::prepare::<FileDisk>(&TestStorage::new(), &params(image.path(), &[])).unwrap();
    let about = image.as_file().metadata().unwrap();
    assert_eq!(bench.instance.info().unwrap().backing_id, (about.dev(), about.ino()));
}

/// An instance that has written `1`s to the first block, on `storage`.
fn first(storage: &std::sync::Arc<TestStorage>, params: &Params) -> Bench {
    let bench = Bench::activated::<FileDisk>(storage, params).unwrap();
    bench.lane(0).unwrap().one(Job::write(0, vec![1; 4096])).unwrap().ok().unwrap();
    bench
}

fn reads_ones(bench: &Bench) -> bool {
    bench.lane(0).unwrap().one(Job::read(0, 4096)).unwrap().ok().unwrap() == vec![1; 4096]
}

#[test]
fn a_successor_goes_on_with_the_open_file_whatever_became_of_its_name() {
    let dir = tempfile::tempdir_in(real_dir()).unwrap();
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let (storage, params) = (TestStorage::new(), params(&path, &[]));
    let old = first(&storage, &params);
    // Replaced by another file, then gone.
    std::fs::rename(&path, dir.path().join("moved")).unwrap();
    std::fs::File::create(&path).unwrap().set_len(2 << 20).unwrap();
    for gone in [false, true] {
        if gone {
            std::fs::remove_file(&path).unwrap();
        }
        for more in [&[][..], &[("direct", "true")], &[("readonly", "true")]] {
            let mut wanted = params.clone();
            more.iter().for_each(|(key, value)| drop(wanted.set(*key, *value)));
            let next = Bench::prepare::<FileDisk>(&storage, &wanted).unwrap();
            assert_eq!(
                next.instance.info().unwrap().backing_id,
                old.instance.info().unwrap().backing_id
            );
            assert!(reads_ones(&next), "{wanted:?}");
            let lines = next.host.lines();
            assert!(
                lines.iter().any(|(level, line)| *level == Level::Warn && line.contains("open")),
                "{lines:?}"
            );
        }
    }
}

#[test]
fn another_file_is_refused_and_a_new_name_of_the_same_is_not() {
    let dir = tempfile::tempdir_in(real_dir()).unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["disk", "other"] {
        std::fs::File::create(path(name)).unwrap().set_len(1 << 20).unwrap();
    }
    std::fs::hard_link(path("disk"), path("link")).unwrap();
    let storage = TestStorage::new();
    let old = first(&storage, &params(&path("disk"), &[]));
    let error = |name: &str| {
        Bench::prepare::<FileDisk>(&storage, &params(&path(name), &[])).unwrap_err().to_string()
    };
    assert!(error("other").contains("does not move a disk"), "{}", error("other"));
    assert!(error("nowhere").contains("leave `path` out"), "{}", error("nowhere"));
    let next = Bench::prepare::<FileDisk>(&storage, &params(&path("link"), &[])).unwrap();
    next.activate().unwrap();
    assert!(reads_ones(&next));
    // From now on that is its name.
    std::fs::remove_file(path("link")).unwrap();
    Bench::prepare::<FileDisk>(&storage, &params(&path("link"), &[])).unwrap();
    drop(old);
}

#[test]
fn flags_of_the_predecessor_do_not_change() {
    let image = image_in(&real_dir(), 1 << 20);
    let storage = TestStorage::new();
    let old = first(&storage, &params(image.path(), &[]));
    let cached = OpenMode { write: true, direct: false };
    let direct = OpenMode { write: true, direct: true };
    assert_eq!(open_mode(&storage.file("image").unwrap()).unwrap(), cached);
    let next =
        Bench::prepare::<FileDisk>(&storage, &params(image.path(), &["direct=true"])).unwrap();
    assert_eq!(open_mode(&storage.file("image").unwrap()).unwrap(), cached);
    old.instance.quiesce().unwrap();
    next.activate().unwrap();
    assert_eq!(open_mode(&storage.file("image").unwrap()).unwrap(), direct);
    assert!(reads_ones(&next));
    next.instance.quiesce().unwrap();
    old.activate().unwrap();
    assert_eq!(open_mode(&storage.file("image").unwrap()).unwrap(), cached);
    assert!(reads_ones(&old));
    next.retire().unwrap();
    old.retire().unwrap();
}

#[test]
fn an_image_is_one_disks_as_long_as_an_instance_serves_it() {
    let image = image_in(&real_dir(), 1 << 20);
    let params = |more: &[&str]| params(image.path(), &[&["locking=true"], more].concat());
    let locked = || {
        let said =
            Bench::prepare::<FileDisk>(&TestStorage::new(), &params(&[])).unwrap_err().to_string();
        assert!(said.contains("another program uses"), "{said}");
    };
    let storage = TestStorage::new();
    let old = Bench::activated::<FileDisk>(&storage, &params(&[])).unwrap();
    locked();
    // Its successors are the same disk, however they open it.
    let direct = Bench::prepare::<FileDisk>(&storage, &params(&["direct=true"])).unwrap();
    old.instance.quiesce().unwrap();
    direct.activate().unwrap();
    old.retire().unwrap();
    locked();
    let cached = Bench::prepare::<FileDisk>(&storage, &params(&[])).unwrap();
    direct.instance.quiesce().unwrap();
    cached.activate().unwrap();
    direct.retire().unwrap();
    locked();
    cached.retire().unwrap();
    locked();
    drop(storage);
    let storage = TestStorage::new();
    let reader = Bench::activated::<FileDisk>(&storage, &params(&["readonly=true"])).unwrap();
    Bench::prepare::<FileDisk>(&TestStorage::new(), &params(&["readonly=true"]))
        .expect("many may read");
    locked();
    drop(reader);
}

#[test]
fn a_successor_locks_what_its_predecessor_did_not() {
    let image = image_in(&real_dir(), 1 << 20);
    let storage = TestStorage::new();
    let old = first(&storage, &params(image.path(), &[]));
    let locking = params(image.path(), &["locking=true"]);
    let next = Bench::prepare::<FileDisk>(&storage, &locking).unwrap();
    next.activate().unwrap();
    assert!(Bench::prepare::<FileDisk>(&TestStorage::new(), &locking).is_err());
    assert!(reads_ones(&next) && reads_ones(&old));
}

/// The first bytes of images of other formats.
fn heads() -> Vec<(&'static str, Vec<u8>)> {
    let vdi = [&[b'<'; 64][..], b"\x7f\x10\xda\xbe"].concat();
    vec![
        ("qcow2", b"QFI\xfb\0\0\0\x03".to_vec()),
        ("qcow2", b"QFI\xfb\0\0\0\x02".to_vec()),
        ("qcow", b"QFI\xfb\0\0\0\x01".to_vec()),
        ("vmdk", b"KDMV\x01\0\0\0".to_vec()),
        ("vhdx", b"vhdxfile".to_vec()),
        ("qed", b"QED\0".to_vec()),
        ("vdi", vdi),
    ]
}

#[test]
fn an_image_of_another_format_is_refused_with_what_serves_it() {
    for (format, head) in heads() {
        let image = image_in(&real_dir(), 1 << 20);
        image.as_file().write_all_at(&head, 0).unwrap();
        for more in [&[][..], &["direct=true"], &["readonly=true"]] {
            let said = refusal(image.path(), more);
            assert!(said.contains(&format!("is a {format} image")), "{said}");
            assert!(said.contains("qemu-nbd") && said.contains("format=raw"), "{said}");
        }
        Bench::prepare::<FileDisk>(&TestStorage::new(), &params(image.path(), &["format=raw"]))
            .unwrap();
        let said = refusal(image.path(), &["format=qcow2"]);
        assert!(said.contains("must be raw"), "{said}");
    }
}

#[test]
fn a_guest_that_writes_such_a_header_keeps_its_disk() {
    for (format, head) in heads() {
        let image = image_in(&real_dir(), 1 << 20);
        let serve = || {
            Bench::activated::<FileDisk>(&TestStorage::new(), &params(image.path(), &[])).unwrap()
        };
        let bench = serve();
        let mut lane = bench.lane(0).unwrap();
        let mut data = head.clone();
        data.resize(4096, 0);
        lane.one(Job::write(0, data.clone())).unwrap().ok().unwrap();
        drop(lane);
        bench.retire().unwrap();
        // Another start.
        let bench = serve();
        let mut lane = bench.lane(0).unwrap();
        assert_eq!(lane.one(Job::read(0, 4096)).unwrap().ok().unwrap(), data, "{format}");
        drop(lane);
        bench.retire().unwrap();
    }
}

/// Else it would be served without its lock, or another file that has its name.
#[test]
fn that_there_is_no_descriptor_does_not_mean_that_storage_has_none() {
    let image = image_in(&real_dir(), 1 << 20);
    let storage = TestStorage::new();
    let old = first(&storage, &params(image.path(), &["locking=true", "direct=true"]));
    assert!(matches!(old.instance.claim(), Ok(Claim::Ours)));
    storage.run_out_of_descriptors(true);
    let says = |result: Result<(), String>| {
        let said = result.expect_err("there is none");
        assert!(said.contains("no descriptor"), "{said}");
    };
    says(old.instance.claim().map(drop).map_err(|error| error.to_string()));
    says(old.instance.release().map_err(|error| error.to_string()));
    let next = Bench::prepare::<FileDisk>(&storage, &params(image.path(), &[]));
    says(next.map(drop).map_err(|error| error.to_string()));
    storage.run_out_of_descriptors(false);
    assert!(matches!(old.instance.claim(), Ok(Claim::Ours)));
    old.instance.release().unwrap();
}

/// As a module does that knows nothing of this one.
#[test]
fn a_lock_that_was_given_up_behind_its_back_is_taken_again() {
    let image = image_in(&real_dir(), 1 << 20);
    let storage = TestStorage::new();
    let disk = first(&storage, &params(image.path(), &["locking=true"]));
    let claims = || disk.instance.claim().unwrap();
    assert_eq!((claims(), claims()), (Claim::Ours, Claim::Ours));
    unlock_image(&storage.file("claim").unwrap(), true);
    let other = std::fs::File::options().read(true).write(true).open(image.path()).unwrap();
    assert!(matches!(lock_image(&other, true), ImageLock::Ours));
    assert_eq!(claims(), Claim::Taken);
    unlock_image(&other, true);
    assert_eq!(claims(), Claim::Ours);
    assert!(matches!(lock_image(&other, true), ImageLock::Taken));
}
