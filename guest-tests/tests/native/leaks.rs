//! Ten thousand upgrades leave nothing behind: no mapping, no descriptor, no thread, no memory.
//!
//! Each loads, uses and unloads a module, under a client that does a little I/O all the time. The
//! warm-up is longer than the history, which is kept for the last 1024 changes, so that what is
//! bounded has reached its bound before it is measured. The measure is what the kernel says of the
//! process, from outside.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::{Control, Daemon, Held, Process, binary, disk_directory};
use guest_tests::modules::copies;
use serde_json::{Value, json};

/// More than the entries that the history keeps, each of them an event too.
const WARM_UP: u64 = 1100;
/// How much private memory may have come in all the upgrades that follow.
const SLACK_KIB: u64 = 1024;
/// How much address space may have come: the C library keeps the stacks of threads that have ended,
/// 2 MiB each, as many as there were at a time. What is lost at each change is a page at least.
const STACKS_KIB: u64 = 3 * 2052;
/// How many mappings may have come: those stacks are two each, and the allocator may merge or split
/// its own. What is lost at each change is one at least, a module five.
const MAPPINGS: usize = 3 * 2 + 4;
/// After so long a change has left nothing to other threads any more.
const A_MOMENT: Duration = Duration::from_millis(200);

/// What the kernel keeps for the daemon.
#[derive(Debug, Clone, Copy)]
struct Footprint {
    mappings: usize,
    held: Held,
    private_kib: u64,
    rss_kib: u64,
    /// Address space: neighbouring mappings are one line of `maps`, and what was never touched is
    /// no memory.
    size_kib: u64,
}

/// To ask a daemon which process serves takes a thread of it, so that is done once, before.
fn footprint(server: Process) -> Footprint {
    let proc = |file: &str| format!("/proc/{}/{file}", server.pid);
    Footprint {
        mappings: fs::read_to_string(proc("maps")).expect("the daemon lives").lines().count(),
        held: server.held(),
        private_kib: server.memory_kib("smaps_rollup", "Private_Dirty:"),
        rss_kib: server.rss_kib(),
        size_kib: server.memory_kib("status", "VmSize:"),
    }
}

/// A daemon whose threads share one heap: how many the C library makes, of 64 MiB of address space
/// each, depends on how many threads happen to allocate at a time.
fn start(args: &[&str]) -> Daemon {
    let mut command = Command::new(binary("vhost-hotswap"));
    command.env("MALLOC_ARENA_MAX", "1");
    Daemon::start_command(command, args)
}

/// Does a little I/O on both queues until `work` is done.
fn lightly_loaded(daemon: &Daemon, work: impl FnOnce() + Send) {
    let options = Options { queues: 2, ..Options::default() };
    let mut client = Client::connect(daemon.socket(), &options).expect("connected");
    let data = vec![0x5a; 4096];
    thread::scope(|scope| {
        let work = scope.spawn(work);
        let mut round = 0;
        while !work.is_finished() {
            round += 1;
            let request = Request::Write { offset: round % 64 * 4096, data: &data };
            let answer = client.queue(round as usize % 2).execute(request, PATIENCE);
            assert_eq!(answer.expect("an answer").0, Status::Ok);
            thread::sleep(Duration::from_micros(500));
        }
        work.join().expect("no panic");
    });
}

/// Has `change` made `warm_up` times and then `count` times, and compares before with after.
fn assert_nothing_stays(
    daemon: &Daemon,
    count: u64,
    mut change: impl FnMut(&mut Control, u64) + Send,
) {
    let server = daemon.server();
    lightly_loaded(daemon, || {
        let mut control = daemon.rpc();
        (0..WARM_UP).for_each(|round| change(&mut control, round));
        // What a change leaves to other threads, it leaves to them for a moment only.
        thread::sleep(A_MOMENT);
        let before = footprint(server);
        let started = Instant::now();
        (0..count).for_each(|round| change(&mut control, round));
        let took = started.elapsed();
        thread::sleep(A_MOMENT);
        server.gives_back(before.held);
        let after = footprint(server);
        println!(
            "{count} in {took:.1?}, {:.0} us each: {before:?} -> {after:?}",
            took.as_micros() as f64 / count as f64
        );
        assert!(
            after.mappings <= before.mappings + MAPPINGS,
            "mappings leak: {before:?} -> {after:?}"
        );
        assert!(
            after.private_kib <= before.private_kib + SLACK_KIB,
            "memory leaks: {before:?} -> {after:?}"
        );
        assert!(
            after.rss_kib <= before.rss_kib + SLACK_KIB,
            "memory leaks: {before:?} -> {after:?}"
        );
        assert!(
            after.size_kib <= before.size_kib + SLACK_KIB + STACKS_KIB,
            "address space leaks: {before:?} -> {after:?}"
        );
    });
    let status = daemon.status();
    assert_eq!(
        (&status["state"], &status["resident_modules"]),
        (&json!("serving"), &json!([])),
        "{status}"
    );
    assert_eq!(status["upgrades"]["refused"], 0, "{status}");
    assert_eq!(status["generation"], 1 + WARM_UP + count, "{status}");
}

#[track_caller]
fn ok(reply: Result<Value, guest_tests::daemon::RpcError>, mode: &str) {
    let reply = reply.unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(reply["mode"], mode, "{reply}");
}

#[test]
fn five_thousand_handovers_leave_nothing() {
    let daemon = start(&["--domain", "ramdisk", "--queues", "2"]);
    assert_nothing_stays(&daemon, 5000, |control, round| {
        let name = if round % 2 == 0 { "ramdisk_v2" } else { "ramdisk" };
        ok(control.request("upgrade", json!({ "name": name })), "handover");
    });
}

#[test]
fn four_thousand_swaps_leave_nothing() {
    let daemon = start(&["--domain", "empty", "--queues", "2"]);
    assert_nothing_stays(&daemon, 4000, |control, _| {
        ok(control.request("upgrade", json!({"name": "empty", "mode": "swap"})), "swap");
    });
}

/// More than the loader keeps of those that were unloaded, so that each is a new one when its turn
/// comes.
const NEW_ONES: usize = 12;

#[test]
fn a_thousand_swaps_of_a_file_to_new_modules_leave_nothing() {
    let directory = disk_directory();
    let modules = copies("file", NEW_ONES, directory.path()).expect("copies of the module");
    let image = directory.path().join("image");
    fs::write(&image, vec![1; 1 << 20]).expect("an image");
    // Past the page cache each instance has a ring for each queue.
    let image = image.to_str().expect("UTF-8");
    let daemon = start(&["--blk-file", image, "--param", "direct=true", "--queues", "2"]);
    assert_nothing_stays(&daemon, 1000, |control, round| {
        let path = &modules[round as usize % NEW_ONES];
        // A disk that others write to takes more than the usual 500 ms for a request now and then.
        let params = json!({"name": path, "drain_timeout_ms": 10_000});
        ok(control.request("upgrade", params), "swap");
    });
}

#[test]
fn a_thousand_rollbacks_leave_nothing() {
    let daemon = start(&["--domain", "ramdisk", "--queues", "2"]);
    let mut first = true;
    assert_nothing_stays(&daemon, 1000, |control, _| {
        if std::mem::take(&mut first) {
            return ok(control.request("upgrade", json!({"name": "ramdisk_v2"})), "handover");
        }
        ok(control.request("rollback", json!({})), "handover");
    });
}

#[test]
fn a_thousand_refusals_and_panics_leave_nothing() {
    let daemon = start(&["--domain", "ramdisk", "--queues", "2"]);
    let server = daemon.server();
    lightly_loaded(&daemon, || {
        let mut control = daemon.rpc();
        let mut refusals = |count: u64| {
            for round in 0..count {
                let faults = ["prepare:fail", "prepare:panic", "activate:fail", "activate:panic"];
                let params =
                    json!({"name": "faulty", "params": {"fault": faults[round as usize % 4]}});
                control.request("upgrade", params).expect_err("faulty");
            }
        };
        refusals(WARM_UP);
        thread::sleep(A_MOMENT);
        let before = footprint(server);
        refusals(1000);
        thread::sleep(A_MOMENT);
        server.gives_back(before.held);
        let after = footprint(server);
        println!("{before:?} -> {after:?}");
        assert!(
            after.mappings <= before.mappings + MAPPINGS,
            "mappings leak: {before:?} -> {after:?}"
        );
        assert!(
            after.private_kib <= before.private_kib + SLACK_KIB,
            "memory leaks: {before:?} -> {after:?}"
        );
    });
}
