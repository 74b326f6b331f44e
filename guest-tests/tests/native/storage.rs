//! What hosts do to disks: storage that fails once, that asks for other blocks than the guest has,
//! that changes under a disk that is served, that takes no writes or no discards, and that is to be
//! free when the daemon is gone.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::client::{Client, Options, Queue, Request, Status, features};
use guest_tests::daemon::{Daemon, disk_directory, run_daemon};
use guest_tests::loopback::{LoopDevice, Mounted, host};
use guest_tests::modules::fragile;
use guest_tests::power::Disk;
use serde_json::Value;

/// Longest time that a request may take.
const LIMIT: Duration = Duration::from_secs(30);
/// A disk that others write to takes more than the usual 500 ms for a request now and then.
const BUSY_DISK: &str = "10000";
const BLOCK: usize = 4096;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn serve(path: &Path, params: &[&str]) -> Daemon {
    serve_with("file", path, params)
}

fn serve_with(domain: &str, path: &Path, params: &[&str]) -> Daemon {
    let path = format!("path={}", path.display());
    let mut args = vec!["--queues", "2", "--domain", domain, "--param", &path];
    params.iter().for_each(|param| args.extend(["--param", param]));
    Daemon::start(&args)
}

fn connect(daemon: &Daemon, options: &Options) -> Client {
    Client::connect(daemon.socket(), options)
        .unwrap_or_else(|error| panic!("{error}\n{}", daemon.log()))
}

fn status(queue: &mut Queue, request: Request<'_>) -> Status {
    queue.execute(request, LIMIT).expect("an answer").0
}

fn write(queue: &mut Queue, offset: u64, data: &[u8]) {
    assert_eq!(status(queue, Request::Write { offset, data }), Status::Ok, "a write at {offset}");
}

fn read(queue: &mut Queue, offset: u64, len: usize) -> Vec<u8> {
    let (status, data) = queue.execute(Request::Read { offset, len }, LIMIT).expect("an answer");
    assert_eq!(status, Status::Ok, "a read at {offset}");
    data
}

/// A disk whose write-back can be made to fail, unless there is no FUSE.
fn failing_disk() -> Option<Disk> {
    Disk::mount_cached(1 << 20)
        .inspect_err(|error| eprintln!("skipped: cannot mount a FUSE file: {error}"))
        .ok()
}

fn is_marked(daemon: &Daemon) -> bool {
    let status = daemon.status();
    match &status["storage_failure"] {
        Value::Null => false,
        Value::String(why) => {
            assert!(why.contains("writing data back has failed"), "{why}");
            true
        }
        other => panic!("{other}: {status}"),
    }
}

/// Brings it about that written data is lost, and that the guest is told so, once.
fn lose(disk: &Disk, queue: &mut Queue) {
    write(queue, 0, &[1; BLOCK]);
    disk.set_full(true);
    assert_eq!(status(queue, Request::Flush), Status::IoError, "it cannot be written back");
    disk.set_full(false);
}

#[test]
fn a_flush_after_one_that_failed_fails_whatever_has_changed_since() {
    for params in [&[][..], &["aio=sync"]] {
        let Some(disk) = failing_disk() else { return };
        let mut daemon = serve(disk.path(), params);
        daemon.call(&["upgrade", "file"]);
        let mut client = connect(&daemon, &Options { queues: 2, ..Options::default() });
        assert!(!is_marked(&daemon));
        write(client.queue(0), 8192, &[7; BLOCK]);
        assert_eq!(status(client.queue(0), Request::Flush), Status::Ok);
        lose(&disk, client.queue(0));
        let check = |client: &mut Client, after: &str| {
            for queue in 0..2 {
                // As well as the storage is now.
                write(client.queue(queue), 4096, &[2; BLOCK]);
                assert_eq!(
                    status(client.queue(queue), Request::Flush),
                    Status::IoError,
                    "after {after}"
                );
                assert_eq!(read(client.queue(queue), 4096, 4096), [2; BLOCK], "reads go on");
            }
            assert!(is_marked(&daemon), "after {after}");
        };
        check(&mut client, "the first");
        let changes = [
            &["rollback"][..],
            &["upgrade", "file"],
            &["upgrade", "file", "--mode", "handover"],
            &["rollback"],
        ];
        for change in changes {
            daemon.call(change);
            check(&mut client, &change.join(" "));
        }
        drop(client);
        let mut client = connect(&daemon, &Options { queues: 2, ..Options::default() });
        check(&mut client, "another frontend");
        drop(client);
        assert_eq!(daemon.stop().0, 1, "data may be lost, and that is no success");
        assert!(daemon.log().contains("writing data back has failed"), "{}", daemon.log());
        // The operator opens it anew.
        daemon.start_again();
        let mut client = connect(&daemon, &Options::default());
        write(client.queue(0), 0, &[3; BLOCK]);
        assert_eq!(status(client.queue(0), Request::Flush), Status::Ok);
        assert!(!is_marked(&daemon));
        drop(client);
        assert_eq!(daemon.terminate(), 0);
    }
}

#[test]
fn without_a_write_cache_a_failed_write_is_not_forgotten() {
    for params in [&[][..], &["aio=sync"]] {
        let Some(disk) = failing_disk() else { return };
        let daemon = serve(disk.path(), params);
        let features = features::USUAL & !features::FLUSH;
        let mut client = connect(&daemon, &Options { features, ..Options::default() });
        let queue = client.queue(0);
        write(queue, 0, &[1; BLOCK]);
        disk.set_full(true);
        assert_eq!(status(queue, Request::Write { offset: 0, data: &[2; BLOCK] }), Status::IoError);
        disk.set_full(false);
        for _ in 0..3 {
            let again = Request::Write { offset: 4096, data: &[3; BLOCK] };
            assert_eq!(status(queue, again), Status::IoError, "nothing can be promised any more");
        }
        drop(client);
        assert!(is_marked(&daemon));
        assert_eq!(daemon.terminate(), 1);
    }
}

/// Two flushes owe the same data, and Linux tells one of them that it is lost.
#[test]
fn flushes_at_the_same_time_fail_together() {
    for (params, queues) in [(&[][..], 2), (&["aio=sync"], 2), (&[], 1)] {
        for round in 0..20 {
            let Some(disk) = failing_disk() else { return };
            let daemon = serve(disk.path(), params);
            let mut client = connect(&daemon, &Options { queues, ..Options::default() });
            // Each queue has flushed before, so that nothing is done for the first time.
            for queue in 0..queues {
                assert_eq!(status(client.queue(queue), Request::Flush), Status::Ok);
            }
            write(client.queue(0), 0, &[1; BLOCK]);
            disk.set_full(true);
            for context in 0..2 {
                client
                    .queue(context % queues)
                    .submit(Request::Flush, context as u64)
                    .expect("room");
            }
            for queue in 0..queues {
                client.queue(queue).kick().expect("a kick");
            }
            let deadline = Instant::now() + LIMIT;
            let mut answers = Vec::new();
            while answers.len() < 2 {
                assert!(Instant::now() < deadline, "a flush is not answered");
                for queue in 0..queues {
                    let queue = client.queue(queue);
                    queue.wait(Duration::from_millis(1)).expect("a wait");
                    queue.reap(|done| answers.push(done.status));
                }
            }
            assert_eq!(answers, [Status::IoError; 2], "{params:?}, {queues} queues, round {round}");
        }
    }
}

#[test]
fn flushes_that_wait_for_one_share_the_next() {
    const FLUSHES: usize = 24;
    let disk = match Disk::mount(1 << 20) {
        Ok(disk) => disk,
        Err(error) => return eprintln!("skipped: cannot mount a FUSE file: {error}"),
    };
    let daemon = serve(disk.path(), &[]);
    let mut client = connect(&daemon, &Options::default());
    let queue = client.queue(0);
    assert_eq!(status(queue, Request::Flush), Status::Ok);
    let before = disk.syncs();
    (0..FLUSHES).for_each(|context| queue.submit(Request::Flush, context as u64).expect("room"));
    queue.kick().expect("a kick");
    let (deadline, mut answered) = (Instant::now() + LIMIT, 0);
    while answered < FLUSHES {
        assert!(Instant::now() < deadline, "a flush is not answered");
        queue.wait(Duration::from_millis(10)).expect("a wait");
        answered += queue.reap(|done| assert_eq!(done.status, Status::Ok));
    }
    // The first goes by itself, and the others together, if all came while it was under way.
    let syncs = disk.syncs() - before;
    assert!((1..FLUSHES as u64 / 2).contains(&syncs), "{syncs} syncs for {FLUSHES} flushes");
    drop(client);
    assert_eq!(daemon.terminate(), 0);
}

/// What follows a domain that has died with the kernel's answer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Successor {
    /// A standby that has served before, and flushed.
    Standby,
    /// A standby that has not flushed.
    IdleStandby,
    /// None, so that there are errors until an upgrade, with these parameters.
    Upgrade(&'static [&'static str]),
}

/// The kernel has told an instance that data is lost, and that has died before it could tell
/// its host.
#[test]
fn what_a_dead_domain_was_told_is_not_lost_with_it() {
    let successors = [
        Successor::Standby,
        Successor::IdleStandby,
        Successor::Upgrade(&[]),
        Successor::Upgrade(&["--param", "direct=true"]),
    ];
    for (panics, successor) in ["panics=reap", "panics=submit"]
        .into_iter()
        .flat_map(|panics| successors.map(|next| (panics, next)))
    {
        let Some(disk) = failing_disk() else { return };
        // It dies at the second call: the first is the write.
        let dies = [panics, "calls=1"];
        let has_standby = !matches!(successor, Successor::Upgrade(_));
        let daemon = if has_standby {
            serve(disk.path(), &[])
        } else {
            serve_with(&fragile(), disk.path(), &dies)
        };
        let mut client = connect(&daemon, &Options::default());
        let queue = client.queue(0);
        if successor == Successor::Standby {
            assert_eq!(status(queue, Request::Flush), Status::Ok);
        }
        if has_standby {
            daemon.call(&["upgrade", &fragile(), "--param", dies[0], "--param", dies[1]]);
        }
        write(queue, 0, &[1; BLOCK]);
        disk.set_full(true);
        queue.submit(Request::Flush, 1).expect("room");
        queue.kick().expect("a kick");
        let deadline = Instant::now() + LIMIT;
        while daemon.status()["upgrades"]["takeovers"] != u64::from(has_standby)
            || !has_standby && daemon.status()["state"] != "faulted"
        {
            assert!(Instant::now() < deadline, "{}", daemon.status());
            thread::sleep(Duration::from_millis(5));
        }
        disk.set_full(false);
        let mut answers = Vec::new();
        while answers.is_empty() {
            assert!(Instant::now() < deadline, "the flush is not answered");
            queue.wait(Duration::from_millis(10)).expect("a wait");
            queue.reap(|done| answers.push(done.status));
        }
        assert_eq!(answers, [Status::IoError], "{panics}, {successor:?}");
        if let Successor::Upgrade(params) = successor {
            daemon.call(&[&["upgrade", "file"], params].concat());
        }
        assert_eq!(status(queue, Request::Flush), Status::IoError, "{panics}, {successor:?}");
        assert!(is_marked(&daemon));
        drop(client);
        assert_eq!(daemon.terminate(), 1);
    }
}

#[test]
fn data_that_is_lost_at_the_end_is_no_success() {
    let Some(disk) = failing_disk() else { return };
    let mut daemon = serve(disk.path(), &[]);
    let mut client = connect(&daemon, &Options::default());
    write(client.queue(0), 0, &[1; BLOCK]);
    drop(client);
    disk.set_full(true);
    assert_eq!(daemon.stop().0, 1, "{}", daemon.log());
    assert!(daemon.log().contains("may have lost data"), "{}", daemon.log());
}

/// What the device file and the image say after requests of single sectors, next to each other, on
/// two queues.
fn sectors_survive(daemon: &Daemon, image: &Path, direct: bool) {
    sectors_survive_meanwhile(daemon, image, direct, |round| {
        let change: &[&str] = if round % 2 == 0 { &["upgrade", "file"] } else { &["rollback"] };
        daemon.call(&[change, &["--drain-timeout-ms", BUSY_DISK]].concat());
    });
}

/// The same while `change` is called, once a round.
fn sectors_survive_meanwhile(daemon: &Daemon, image: &Path, direct: bool, change: impl Fn(usize)) {
    const SECTORS: usize = 512;
    let options =
        Options { queues: 2, queue_size: 128, slot_bytes: 16 << 10, ..Options::default() };
    let mut queues = connect(daemon, &options).into_queues();
    let value = |sector: usize, round: usize| (sector * 7 + round * 31 + 1) as u8;
    for round in 0..3 {
        thread::scope(|scope| {
            for (index, queue) in queues.iter_mut().enumerate() {
                scope.spawn(move || {
                    // Every other sector is the other queue's, so each block of the storage is both
                    // queues'.
                    let mut left: Vec<usize> =
                        (0..SECTORS).filter(|sector| sector % 2 == index).collect();
                    let deadline = Instant::now() + LIMIT;
                    while !left.is_empty() || queue.in_flight() > 0 {
                        while let Some(&sector) = left.last() {
                            let data = [value(sector, round); 512];
                            let write = Request::Write { offset: sector as u64 * 512, data: &data };
                            if queue.in_flight() >= 16
                                || queue.submit(write, sector as u64).is_err()
                            {
                                break;
                            }
                            left.pop();
                        }
                        queue.kick().expect("a kick");
                        queue.wait(Duration::from_millis(10)).expect("a wait");
                        queue.reap(|done| {
                            assert_eq!(done.status, Status::Ok, "sector {}", done.context)
                        });
                        assert!(Instant::now() < deadline, "requests are not answered");
                    }
                });
            }
            change(round);
        });
        for queue in &mut queues {
            assert_eq!(status(queue, Request::Flush), Status::Ok);
        }
        let expected = |sector: usize| [value(sector, round); 512];
        for sector in (0..SECTORS).step_by(5) {
            assert_eq!(
                read(&mut queues[0], sector as u64 * 512, 512),
                expected(sector),
                "sector {sector}"
            );
        }
        let on_disk = fs::read(image).expect("the image");
        for sector in 0..SECTORS {
            let there = &on_disk[sector * 512..][..512];
            assert!(
                *there == expected(sector),
                "round {round}: sector {sector} is lost in {}",
                image.display()
            );
        }
    }
    // Pieces with an edge at either end, and more than one block between.
    let queue = &mut queues[0];
    for (offset, len) in
        [(512, 4096), (3584, 1024), (512, 12288), (4096, 8704), (1536, 512), (3584, 9728)]
    {
        let before = read(queue, 0, 16384);
        let data: Vec<u8> = (0..len).map(|at| (at / 512 + offset) as u8).collect();
        write(queue, offset as u64, &data);
        let mut expected = before;
        expected[offset..offset + len].copy_from_slice(&data);
        assert!(read(queue, 0, 16384) == expected, "a write of {len} bytes at {offset}");
        for unmap in [true, false] {
            let zeroes = Request::WriteZeroes { offset: offset as u64, len: len as u64, unmap };
            assert_eq!(status(queue, zeroes), Status::Ok);
            expected[offset..offset + len].fill(0);
            assert!(
                read(queue, 0, 16384) == expected,
                "zeros of {len} bytes at {offset}, unmap {unmap}"
            );
            write(queue, offset as u64, &data);
            expected[offset..offset + len].copy_from_slice(&data);
        }
    }
    let counters = &daemon.status()["counters"];
    assert!(
        !direct || counters["read_modify_writes"].as_u64() > Some(SECTORS as u64),
        "{counters}"
    );
}

#[test]
fn sectors_of_512_bytes_survive_on_a_device_of_larger_ones() {
    let directory = disk_directory();
    for params in [&["direct=true"][..], &["direct=true", "aio=sync"], &[]] {
        let Some(device) = LoopDevice::new(directory.path(), 4 << 20, 4096, &[]) else { return };
        let daemon = serve(device.path(), params);
        sectors_survive(&daemon, device.path(), params.contains(&"direct=true"));
        assert_eq!(daemon.terminate(), 0);
    }
}

/// Writes, from two queues at the same time, that overlap: what only one of them writes must be
/// there afterwards.
#[test]
fn a_large_write_beside_one_of_a_sector_is_written_whole() {
    let directory = disk_directory();
    let Some(device) = LoopDevice::new(directory.path(), 4 << 20, 4096, &[]) else { return };
    for params in [&["direct=true"][..], &["direct=true", "aio=sync"]] {
        let daemon = serve(device.path(), params);
        let mut client = connect(&daemon, &Options { queues: 2, ..Options::default() });
        for round in 0..500u32 {
            let (small, large) =
                ([(round % 100) as u8 + 1; 512], [(round % 100) as u8 + 101; 4096]);
            client.queue(0).submit(Request::Write { offset: 0, data: &small }, 1).expect("room");
            client.queue(1).submit(Request::Write { offset: 0, data: &large }, 2).expect("room");
            client.queue(0).kick().expect("a kick");
            client.queue(1).kick().expect("a kick");
            let (deadline, mut answered) = (Instant::now() + LIMIT, 0);
            while answered < 2 {
                assert!(Instant::now() < deadline, "a write is not answered");
                for queue in 0..2 {
                    let queue = client.queue(queue);
                    queue.wait(Duration::from_millis(1)).expect("a wait");
                    answered += queue.reap(|done| assert_eq!(done.status, Status::Ok));
                }
            }
            let found = read(client.queue(0), 0, 4096);
            assert!(
                found[512..] == large[512..],
                "{params:?}: sectors that only one wrote are lost, round {round}"
            );
        }
        drop(client);
        assert_eq!(daemon.terminate(), 0);
    }
}

/// A device that takes 512 bytes when the disk begins, and 4096 later.
#[test]
fn storage_that_begins_to_ask_for_larger_blocks_loses_nothing() {
    let directory = disk_directory();
    for params in [&["direct=true"][..], &["direct=true", "aio=sync"]] {
        for first in ["write", "zeroes", "read"] {
            let Some(device) = LoopDevice::new(directory.path(), 4 << 20, 512, &[]) else { return };
            let daemon = serve(device.path(), params);
            let mut client = connect(&daemon, &Options { queues: 2, ..Options::default() });
            daemon.call(&["upgrade", "file", "--drain-timeout-ms", BUSY_DISK]);
            write(client.queue(1), 0, &[1; 4096]);
            assert_eq!(status(client.queue(1), Request::Flush), Status::Ok);
            host("losetup", &["--sector-size", "4096", text(device.path())])
                .expect("other sectors");
            // The first that the live instance hears of it.
            let queue = client.queue(0);
            match first {
                "write" => write(queue, 512, &[2; 512]),
                "read" => assert_eq!(read(queue, 512, 512), [1; 512]),
                _ => {
                    let zeroes = Request::WriteZeroes { offset: 512, len: 512, unmap: false };
                    assert_eq!(status(queue, zeroes), Status::Ok, "{params:?}");
                    assert_eq!(read(queue, 0, 1536), [[1; 512], [0; 512], [1; 512]].concat());
                }
            }
            write(client.queue(1), 1024, &[3; 512]);
            // It was prepared, and so was its standby, when they could have served side by side.
            let reply = daemon.call(&["rollback"]);
            assert_eq!(reply["mode"], "handover", "{reply}");
            drop(client);
            sectors_survive(&daemon, device.path(), true);
            assert_eq!(daemon.terminate(), 0);
        }
    }
}

/// The same under requests that were begun before.
#[test]
fn storage_that_begins_to_ask_for_larger_blocks_under_load_loses_nothing() {
    let directory = disk_directory();
    for params in [&["direct=true"][..], &["direct=true", "aio=sync"]] {
        for _ in 0..5 {
            let Some(device) = LoopDevice::new(directory.path(), 4 << 20, 512, &[]) else { return };
            let daemon = serve(device.path(), params);
            sectors_survive_meanwhile(&daemon, device.path(), true, |round| {
                if round == 0 {
                    host("losetup", &["--sector-size", "4096", text(device.path())])
                        .expect("other sectors");
                }
            });
            assert_eq!(daemon.terminate(), 0);
        }
    }
}

#[test]
fn whoever_wants_blocks_of_4096_bytes_is_told_so() {
    let directory = disk_directory();
    let image = directory.path().join("disk.img");
    File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
    let daemon = serve(&image, &["block_size=4096"]);
    daemon.call(&["upgrade", "file"]);
    let said = daemon.refuse(&["upgrade", "file", "--param", "block_size=512"]);
    assert!(said.contains("leave it as it was"), "{said}");
    assert_eq!(daemon.terminate(), 0);
    let socket = directory.path().join("socket");
    let args =
        ["--socket-path", text(&socket), "--blk-file", text(&image), "--param", "block_size=1024"];
    let output = run_daemon(&args);
    assert!(output.status == 1 && output.stderr.contains("512 or 4096"), "{output:?}");
}

/// `upgrade`, `rollback`, a takeover, and all that the guest is told, after something was done to
/// the image.
fn goes_on(daemon: &Daemon, client: &mut Client, after: &str) {
    let capacity = client.capacity();
    let before = daemon.status()["upgrades"]["takeovers"].as_u64().expect("a number");
    let fragile = fragile();
    // It dies at the first request, and its standby answers that.
    let dies = ["upgrade", &fragile, "--param", "panics=submit", "--param", "calls=0"];
    let changes = [
        &["upgrade", "file"][..],
        &["rollback"],
        &["upgrade", "file", "--mode", "handover"],
        &dies,
    ];
    for change in changes {
        daemon.call(&[change, &["--drain-timeout-ms", BUSY_DISK]].concat());
        let queue = client.queue(0);
        write(queue, 512, &[5; 512]);
        assert_eq!(read(queue, 512, 512), [5; 512], "after {after}");
        assert_eq!(status(queue, Request::Flush), Status::Ok, "after {after}");
    }
    assert_eq!(daemon.status()["upgrades"]["takeovers"], before + 1, "after {after}");
    assert_eq!(client.read_capacity().expect("the configuration"), capacity, "after {after}");
    assert_eq!(daemon.status()["capacity"], capacity, "after {after}");
}

#[test]
fn an_image_that_was_reflinked_or_has_grown_is_upgraded_as_before() {
    let directory = disk_directory();
    for params in [&["direct=true"][..], &["direct=true", "aio=sync"], &[]] {
        let Some(mounted) = Mounted::new(directory.path(), "xfs", 400 << 20) else { return };
        let image = mounted.path().join("disk.img");
        File::create(&image)
            .and_then(|mut file| file.write_all(&vec![1; 4 << 20]))
            .expect("an image");
        let daemon = serve(&image, params);
        let mut client = connect(&daemon, &Options::default());
        goes_on(&daemon, &mut client, "nothing");
        let copy = mounted.path().join("copy.img");
        host("cp", &["--reflink=always", text(&image), text(&copy)]).expect("a reflink");
        // The live instance goes on as well, without any change, and past the page cache from the
        // next flush on.
        let changed = |daemon: &Daemon| daemon.status()["counters"]["read_modify_writes"].as_u64();
        assert_eq!(changed(&daemon), None, "nothing asks for it yet");
        write(client.queue(0), 1536, &[6; 512]);
        assert_eq!(status(client.queue(0), Request::Flush), Status::Ok);
        write(client.queue(0), 1536, &[6; 512]);
        assert_eq!(changed(&daemon), params.contains(&"direct=true").then_some(1), "{params:?}");
        goes_on(&daemon, &mut client, "a reflink");
        File::options()
            .write(true)
            .open(&image)
            .and_then(|file| file.set_len(8 << 20))
            .expect("it grows");
        goes_on(&daemon, &mut client, "growing");
        host("mount", &["-o", "remount,largeio,nodiscard", text(mounted.path())]);
        goes_on(&daemon, &mut client, "a remount");
        drop(client);
        sectors_survive(&daemon, &image, params.contains(&"direct=true"));
        assert_eq!(daemon.terminate(), 0);
        let copied = fs::read(copy).expect("the copy");
        assert_eq!(copied[1536..2048], [1; 512], "the copy is of before");
    }
}

#[test]
fn a_device_that_has_grown_is_upgraded_as_before() {
    let directory = disk_directory();
    for params in [&["direct=true"][..], &[]] {
        let Some(device) = LoopDevice::new(directory.path(), 4 << 20, 512, &[]) else { return };
        let daemon = serve(device.path(), params);
        let mut client = connect(&daemon, &Options::default());
        File::options()
            .write(true)
            .open(device.file())
            .and_then(|file| file.set_len(8 << 20))
            .expect("growth");
        host("losetup", &["--set-capacity", text(device.path())]).expect("a new size");
        goes_on(&daemon, &mut client, "growing");
        drop(client);
        assert_eq!(daemon.terminate(), 0);
    }
}

#[test]
fn an_image_that_was_cut_short_is_said_to_be() {
    let directory = disk_directory();
    let image = directory.path().join("disk.img");
    File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
    let daemon = serve(&image, &[]);
    File::options().write(true).open(&image).and_then(|file| file.set_len(1 << 19)).expect("a cut");
    let said = daemon.refuse(&["upgrade", "file"]);
    assert!(said.contains("truncate -s 1048576"), "{said}");
    assert_eq!(daemon.status()["generation"], 1);
}

/// The last block of an image need not be whole where the storage's blocks are larger than the
/// guest's.
#[test]
fn the_end_of_an_image_is_written_and_stays_where_it_is() {
    let directory = disk_directory();
    for params in [&["direct=true"][..], &["direct=true", "aio=sync"], &[]] {
        let Some(mounted) = Mounted::new(directory.path(), "xfs", 400 << 20) else { return };
        let image = mounted.path().join("disk.img");
        let len = (1 << 20) + 1024;
        File::create(&image).and_then(|mut file| file.write_all(&vec![1; len])).expect("an image");
        host("cp", &["--reflink=always", text(&image), text(&mounted.path().join("copy.img"))])
            .expect("a reflink");
        let daemon = serve(&image, params);
        let mut client = connect(&daemon, &Options::default());
        let queue = client.queue(0);
        let last = len as u64 - 512;
        write(queue, last, &[2; 512]);
        write(queue, last - 1024, &[3; 1024]);
        assert_eq!(read(queue, last - 1024, 1536), [[3; 1024].as_slice(), &[2; 512]].concat());
        assert_eq!(status(queue, Request::Flush), Status::Ok);
        drop(client);
        assert_eq!(daemon.terminate(), 0);
        let bytes = fs::read(&image).expect("the image");
        assert_eq!(bytes.len(), len, "{params:?}");
        assert_eq!(bytes[len - 1536..], [[3; 1024].as_slice(), &[2; 512]].concat());
    }
}

#[test]
fn a_device_that_takes_no_writes_is_served_read_only_or_not_at_all() {
    let directory = disk_directory();
    let Some(device) = LoopDevice::new(directory.path(), 1 << 20, 512, &["--read-only"]) else {
        return;
    };
    let socket = directory.path().join("socket");
    let output = run_daemon(&["--socket-path", text(&socket), "--blk-file", text(device.path())]);
    assert_eq!(output.status, 1, "{output:?}");
    assert!(
        output.stderr.contains("read-only device") && output.stderr.contains("readonly=true"),
        "{output:?}"
    );
    let daemon = serve(device.path(), &["readonly=true"]);
    let mut client = connect(&daemon, &Options::default());
    assert_eq!(read(client.queue(0), 0, 512), [0; 512]);
    drop(client);
    assert_eq!(daemon.terminate(), 0);
    // One that became read-only since: upgrades are refused with the same sentence.
    let Some(device) = LoopDevice::new(directory.path(), 1 << 20, 512, &[]) else { return };
    let daemon = serve(device.path(), &[]);
    host("blockdev", &["--setro", text(device.path())]).expect("it can be set");
    let output = daemon.ctl(&["upgrade", "file"]);
    // It outlives the device's file otherwise.
    host("blockdev", &["--setrw", text(device.path())]).expect("it can be set");
    assert!(output.status == 1 && output.stderr.contains("read-only device"), "{output:?}");
    assert_eq!(daemon.status()["state"], "serving");
}

/// Bytes that the file behind a device takes up.
fn allocated(device: &LoopDevice) -> u64 {
    host("sync", &["--file-system", text(device.file())]);
    fs::metadata(device.file()).expect("the file").blocks() * 512
}

#[test]
fn a_discard_that_was_answered_well_was_carried_out() {
    const LEN: u64 = 8 << 20;
    let directory = disk_directory();
    for sector in [512, 4096] {
        for params in [&[][..], &["aio=sync"], &["direct=true"]] {
            let Some(device) = LoopDevice::new(directory.path(), LEN, sector, &[]) else { return };
            let daemon = serve(device.path(), params);
            let mut client = connect(&daemon, &Options::default());
            let queue = client.queue(0);
            for offset in (0..LEN).step_by(64 << 10) {
                write(queue, offset, &vec![1; 64 << 10]);
            }
            assert_eq!(status(queue, Request::Flush), Status::Ok);
            let full = allocated(&device);
            assert!(full >= LEN, "{full}");
            // Begins and ends inside of a block.
            let discard = Request::Discard { offset: 512, len: 4 << 20 };
            assert_eq!(status(queue, discard), Status::Ok, "{params:?}");
            let left = allocated(&device);
            assert!(
                left <= full - (4 << 20) + 8192,
                "{sector}, {params:?}: {left} of {full} bytes are left"
            );
            // What is too little to be given back stays, and so do its neighbours.
            assert_eq!(status(queue, Request::Discard { offset: 6 << 20, len: 512 }), Status::Ok);
            assert_eq!(read(queue, (6 << 20) + 512, 512), [1; 512]);
            assert_eq!(read(queue, 0, 512), [1; 512]);
            drop(client);
            assert_eq!(daemon.terminate(), 0);
        }
    }
}

#[test]
fn an_image_is_let_go_of_when_the_daemon_has_ended() {
    let directory = disk_directory();
    for params in [&["direct=true"][..], &[]] {
        for _ in 0..5 {
            let Some(mounted) = Mounted::new(directory.path(), "ext4", 64 << 20) else { return };
            let image = mounted.path().join("disk.img");
            File::create(&image)
                .and_then(|mut file| file.write_all(&vec![1; 4 << 20]))
                .expect("an image");
            let daemon = serve(&image, params);
            let mut client = connect(&daemon, &Options { queues: 2, ..Options::default() });
            for queue in 0..2 {
                write(client.queue(queue), 0, &[5; 4096]);
                assert_eq!(status(client.queue(queue), Request::Flush), Status::Ok);
                daemon.call(&["upgrade", "file"]);
                write(client.queue(queue), 0, &[5; 4096]);
                assert_eq!(status(client.queue(queue), Request::Flush), Status::Ok);
            }
            drop(client);
            assert_eq!(daemon.terminate(), 0);
            assert!(mounted.unmount(), "its file system is busy");
        }
    }
}
