//! The table of failures, row by row, with the frontend or the operator going away in the middle of
//! each phase.
//!
//! | row | covered by |
//! |---|---|
//! | unreadable, truncated, foreign, wrong ABI or class | `refusals` |
//! | a wrong schema | `refusals`, `backend/proxy/tests/device/decisions.rs` |
//! | prepare fails or panics | `failures::a_failing_upgrade_leaves_the_device_as_it_was` |
//! | drain deadline passes | `failures::a_stalled_request_ends_the_upgrade_and_not_the_io` |
//! | quiesce or activate fails or panics | `failures`, `backend/proxy/tests/device/decisions.rs` |
//! | quiesce or activate hangs | here: `a_hang_inside_the_bracket_is_said_and_ends` |
//! | the live domain panics | `takeover`, `backend/proxy/tests/device/takeover.rs` |
//! | it panics behind a shut gate, or in a grace period | `backend/proxy/tests/device/midway.rs` |
//! | it cannot be fenced off | `backend/proxy/tests/device/residents.rs` |
//! | a grace period does not end | `backend/proxy/tests/device/residents.rs` |
//! | an instance is left with a request | `backend/proxy/tests/device/takeover.rs` |
//! | a second upgrade | `failures::upgrades_at_the_same_time_never_interleave` |
//! | a second upgrade that is refused as `busy` | here |
//! | no guest | `sessions::an_upgrade_without_any_client` |
//! | the frontend acts midway | here: `the_frontend_acts_in_the_middle_of_each_phase` |
//! | SIGTERM midway | here: `sigterm_in_the_middle_of_each_phase` |
//! | an upgrade from inside a read section | `backend/srcu/tests/api.rs` |

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::features;
use guest_tests::client::raw::{FREE, GUEST_BASE, MEMORY_BYTES, PLUGGED_BASE, RawSession, WRITE};
use guest_tests::daemon::Daemon;
use guest_tests::modules::pinned_module;
use guest_tests::stamp::{LoadOptions, run_load};
use serde_json::{Value, json};
use vhost::vhost_user::VhostUserFrontend;

const SECOND: Duration = Duration::from_secs(1);

/// How an upgrade is brought to stand still for 3 s in each of its phases: what serves, and what it
/// is upgraded to.
const PHASES: &[(&str, Option<&str>, &str)] = &[
    ("prepare", None, "prepare:hang"),
    ("drain", Some("request:stall"), ""),
    ("quiesce", Some("quiesce:stall"), ""),
    ("activate", None, "activate:stall"),
    // Replied to after 2 s, and over after 3.
    ("grace", Some("keeps=request"), "keeps=nothing"),
];

/// What the frontend may do at any time.
const ACTIONS: &[&str] =
    &["disconnect", "stop ring", "reset", "new memory", "add memory", "remove memory"];

fn target(fault: &str) -> Value {
    match fault.split_once('=') {
        Some((key, value)) => json!({"name": pinned_module(), "params": {key: value}}),
        None if fault.is_empty() => json!({"name": "ramdisk", "drain_timeout_ms": 10_000}),
        None => json!({"name": "faulty", "params": {"fault": fault}, "drain_timeout_ms": 10_000}),
    }
}

/// A daemon with its domain, and a session with one ring, memory that was plugged in, and, for
/// `drain` and `grace`, one request in flight, which reads into that.
fn set_up(first: Option<&str>) -> (Daemon, RawSession) {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "2"]);
    if let Some(fault) = first {
        daemon.rpc().request("upgrade", target(fault)).expect("it serves");
    }
    let mut raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
    raw.plug(0).expect("room for one more region");
    if matches!(first, Some("request:stall" | "keeps=request")) {
        read_into(&mut raw, 0, PLUGGED_BASE);
        // Offered is not yet taken, and what is still in the ring holds no upgrade up.
        eventually("the request is in flight", || daemon.status()["queues"][0]["in_flight"] == 1);
    }
    (daemon, raw)
}

/// Waits for what has to come about, however busy the machine is.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "it never came about that {what}");
        thread::sleep(SECOND / 100);
    }
}

/// Offers a read of one sector.
fn read_one(raw: &mut RawSession) {
    read_into(raw, 0, GUEST_BASE + FREE + 0x2000);
}

/// Offers a read of the first sector into guest memory at `to`, as the chain from `head` on.
fn read_into(raw: &mut RawSession, head: u16, to: u64) {
    raw.put(FREE, &[0; 16]).expect("memory");
    let at = GUEST_BASE + FREE;
    raw.chain(head, &[(at, 16, 0), (to, 512, WRITE), (at + 0x1000, 1, WRITE)]).expect("memory");
    raw.offer(head).expect("a kick");
}

/// Does one of the `ACTIONS`.
fn act(action: &str, mut raw: RawSession) -> Option<RawSession> {
    let result = match action {
        "disconnect" => return None,
        "stop ring" => raw.stop_ring().map(drop),
        "reset" => raw.frontend.reset_device().map_err(std::io::Error::other),
        "new memory" => raw.share_memory(),
        "add memory" => raw.plug(MEMORY_BYTES),
        "remove memory" => raw.unplug(0),
        _ => unreachable!("{action}"),
    };
    result.unwrap_or_else(|error| panic!("{action}: {error}"));
    Some(raw)
}

#[test]
fn the_frontend_acts_in_the_middle_of_each_phase() {
    let cases: Vec<_> = PHASES
        .iter()
        .flat_map(|phase| ACTIONS.iter().map(move |&action| (phase, action)))
        .collect();
    // Each stands still for 3 s, and hardly needs a CPU meanwhile.
    thread::scope(|scope| {
        for &(&(phase, first, fault), action) in &cases {
            scope.spawn(move || frontend_case(phase, first, fault, action));
        }
    });
}

fn frontend_case(phase: &str, first: Option<&str>, fault: &str, action: &str) {
    let what = format!("{action} in {phase}");
    // What stands still for 3 s may be over on a busy host before this thread looks.
    let was_seen = (0..10).any(|_| acts_amid_upgrade(phase, first, fault, action));
    assert!(was_seen, "{what}: the upgrade was to stand still");
}

/// Returns whether the upgrade was seen to be under way.
fn acts_amid_upgrade(phase: &str, first: Option<&str>, fault: &str, action: &str) -> bool {
    let what = format!("{action} in {phase}");
    let (daemon, raw) = set_up(first);
    let generation = 2 + u64::from(first.is_some());
    let was_seen = thread::scope(|scope| {
        let daemon = &daemon;
        let upgrade = scope.spawn(move || daemon.rpc().request("upgrade", target(fault)));
        // Seen under way, and then some: all cases run at once, on whatever CPUs there are.
        let mut is_under_way = false;
        eventually("an upgrade is under way", || {
            is_under_way = daemon.status()["state"] == "upgrading";
            is_under_way || upgrade.is_finished()
        });
        if !is_under_way {
            upgrade.join().expect("no panic").unwrap_or_else(|e| panic!("{what}: {e:?}"));
            return false;
        }
        thread::sleep(SECOND / 2);
        let raw = act(action, raw);
        let reply = upgrade.join().expect("no panic").unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert_eq!(reply["generation"], generation, "{what}: {reply}");
        if let Some(raw) = raw.filter(|_| action.ends_with("memory")) {
            the_session_goes_on(raw, action, matches!(phase, "drain" | "grace"), &what);
        }
        true
    });
    if !was_seen {
        return false;
    }
    good_client_works(&daemon, &what);
    let status = daemon.status();
    assert_eq!(
        (&status["generation"], &status["state"]),
        (&json!(generation), &json!("serving")),
        "{what}"
    );
    eventually(&format!("nothing is resident after {what}"), || {
        daemon.status()["resident_modules"] == json!([])
    });
    // The request for memory that had gone is an error, and the only one.
    let errors = u64::from(action == "remove memory");
    let sum = |field: &str| -> u64 {
        let queues = status["queues"].as_array().expect("queues");
        queues.iter().map(|queue| queue[field].as_u64().expect("a number")).sum()
    };
    assert_eq!((sum("errors"), sum("in_flight")), (errors, 0), "{what}: {status}");
    // As many descriptors and threads as before the next session that comes and goes.
    let server = daemon.server();
    thread::sleep(SECOND / 5);
    let before = server.held();
    good_client_works(&daemon, &what);
    server.gives_back(before);
    true
}

/// The memory has changed, and each request is answered from the memory that there was when it was
/// taken.
fn the_session_goes_on(mut raw: RawSession, action: &str, owed: bool, what: &str) {
    let mut expected = if owed { vec![0] } else { vec![] };
    // Into memory that was there all the time, and into what has come.
    read_into(&mut raw, 8, GUEST_BASE + FREE + 0x2000);
    expected.push(8);
    if action == "add memory" {
        raw.put_plugged(0x1000, &[0xee; 512]).expect("memory");
        read_into(&mut raw, 16, PLUGGED_BASE + MEMORY_BYTES + 0x1000);
        expected.push(16);
    }
    let mut answered: Vec<u32> = expected
        .iter()
        .map(|_| {
            let (head, len) =
                raw.used(PATIENCE).expect("memory").unwrap_or_else(|| panic!("{what}: silence"));
            assert_eq!(len, 513, "{what}: request {head}");
            head
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, expected, "{what}");
    if action == "add memory" {
        assert_eq!(
            raw.get_plugged(0x1000, 512).expect("memory"),
            [0; 512],
            "{what}: not read into"
        );
    }
    if action == "remove memory" {
        // A request for memory that has gone fails; it must not harm those behind it.
        read_into(&mut raw, 24, PLUGGED_BASE);
        read_into(&mut raw, 32, GUEST_BASE + FREE + 0x2000);
        let mut heads = std::iter::from_fn(|| raw.used(10 * SECOND).expect("memory"));
        assert!(heads.any(|(head, len)| (head, len) == (32, 513)), "{what}: silence");
    }
}

fn good_client_works(daemon: &Daemon, what: &str) {
    println!("{what}: a new client");
    run_load(daemon.socket(), &LoadOptions::new(2, 8).on_unknown_content(), SECOND / 5)
        .assert_clean();
}

#[test]
fn sigterm_in_the_middle_of_each_phase() {
    thread::scope(|scope| {
        for &(phase, first, fault) in PHASES {
            scope.spawn(move || sigterm_case(phase, first, fault));
        }
    });
}

fn sigterm_case(phase: &str, first: Option<&str>, fault: &str) {
    let (mut daemon, raw) = set_up(first);
    let mut rpc = daemon.rpc();
    let call = format!(
        "{}\n",
        json!({"jsonrpc": "2.0", "id": 1, "method": "upgrade", "params": target(fault)})
    );
    rpc.send_raw(call.as_bytes()).expect("sent");
    eventually("an upgrade is under way", || daemon.status()["state"] == "upgrading");
    thread::sleep(SECOND / 2);
    let (code, took) = daemon.stop();
    let left = daemon.log().contains("left behind");
    println!("{phase}: ended after {took:.1?} with {code}, left something: {left}");
    assert!(
        !daemon.socket().exists() && !daemon.control().exists(),
        "{phase}: the sockets are left"
    );
    assert_eq!(code == 0, !left, "{phase}: exit {code}");
    assert!(
        code == 0 || phase != "grace",
        "{phase}: all that was in use has ended: {}",
        daemon.log()
    );
    assert!(
        took < 5 * SECOND,
        "{phase}: nothing here takes longer than 3 s, but this took {took:?}"
    );
    drop(raw);
}

#[test]
fn a_hang_inside_the_bracket_is_said_and_ends() {
    for (first, fault) in [(Some("quiesce:hang"), ""), (None, "activate:hang")] {
        let (daemon, mut raw) = set_up(first);
        thread::scope(|scope| {
            let daemon = &daemon;
            let upgrade = scope.spawn(move || daemon.rpc().request("upgrade", target(fault)));
            thread::sleep(SECOND / 2);
            // The gate is shut, and stays so: no request is served, but every command is answered.
            read_one(&mut raw);
            assert_eq!(
                raw.used(SECOND).expect("memory"),
                None,
                "a request was served behind a shut gate"
            );
            let asked = Instant::now();
            let status = daemon.rpc().request("status", json!({})).expect("an answer");
            assert!(asked.elapsed() < SECOND, "`status` took {:?}", asked.elapsed());
            assert_eq!(status["state"], "upgrading", "{status}");
            let refuse = json!({"name": "ramdisk", "when_busy": "refuse"});
            assert_eq!(
                daemon.rpc().request("upgrade", refuse).expect_err("one is under way").name(),
                "busy"
            );
            let reply = upgrade.join().expect("no panic").expect("it was only late");
            assert!(reply["phases_us"]["pause"].as_u64().expect("a number") > 2_500_000, "{reply}");
            // What was kicked while the gate was shut is served without another kick.
            assert_eq!(raw.used(SECOND).expect("memory"), Some((0, 513)));
        });
        drop(raw);
        good_client_works(&daemon, "after a hang");
    }
}

#[test]
fn a_panic_with_the_client_gone_and_another_one_come() {
    for last in ["disconnect", "reset", "stop ring"] {
        let (daemon, mut raw) = set_up(Some("request:panic"));
        read_one(&mut raw);
        // Only one frontend is served at a time.
        drop(act(last, raw));
        good_client_works(&daemon, last);
        let status = daemon.status();
        assert_eq!(status["upgrades"]["takeovers"], 1, "{last}: {status}");
        assert_eq!(
            (&status["state"], &status["generation"]),
            (&json!("serving"), &json!(3)),
            "{last}: {status}"
        );
    }
}

/// The signal comes before the worker has taken the request, while it is inside the domain, before,
/// in, and after the takeover. The domain that lives then has what was flushed, and flushes what
/// was not.
#[test]
fn a_panic_and_sigterm_at_once_end_cleanly() {
    const STEPS: u32 = 60;
    let mut failed = Vec::new();
    // In the third request of its life, after a write and a flush, or in the first, with a worker
    // that is still on its way: it is this one, or the last flush.
    for fault in ["request:panic:3", "request:panic"] {
        for delay in (0..STEPS).map(|step| step * Duration::from_micros(50)) {
            let what = format!("{fault}, {delay:?}");
            let (mut daemon, mut raw) = set_up(Some(fault));
            let disk = memory_of_the_disk(&daemon);
            let (sector, mut expected) = ([0x5a; 512], [0; 512]);
            if fault.ends_with('3') {
                for (head, kind) in [(0, OUT), (8, FLUSH)] {
                    ask(&mut raw, head, kind, &sector);
                    assert!(raw.used(PATIENCE).expect("memory").is_some(), "{what}: no answer");
                }
                expected = sector;
            }
            ask(&mut raw, 16, OUT, &sector);
            let offered = Instant::now();
            while offered.elapsed() < delay {
                std::hint::spin_loop();
            }
            let (code, took) = daemon.stop();
            assert!(took < 5 * SECOND, "{what}: {took:?}");
            assert!(!daemon.socket().exists() && !daemon.control().exists(), "{what}");
            let mut found = [0; 512];
            disk.read_exact_at(&mut found, 0).expect("the region outlives its daemon");
            // The write that broke it has been run again, or was never taken.
            assert!(found == expected || found == sector, "{what}: what was flushed is not there");
            if code != 0 {
                failed.push((what, daemon.log()));
            }
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {} did not end cleanly: {:?}",
        failed.len(),
        2 * STEPS,
        failed[0]
    );
}

/// Types of requests (virtio 1.2, 5.2.6).
const OUT: u32 = 1;
const FLUSH: u32 = 4;

/// Offers a write of `data` to the first sector, or a flush, as the chain from `head` on.
fn ask(raw: &mut RawSession, head: u16, kind: u32, data: &[u8]) {
    let [header, buffer, status] =
        [0, 0x1000, 0x800].map(|offset| FREE + 0x2000 * u64::from(head / 8) + offset);
    let mut words = [0; 16];
    words[..4].copy_from_slice(&kind.to_le_bytes());
    raw.put(header, &words).expect("memory");
    raw.put(buffer, data).expect("memory");
    let at = |offset| GUEST_BASE + offset;
    let mut buffers = vec![(at(header), 16, 0), (at(status), 1, WRITE)];
    if kind == OUT {
        buffers.insert(1, (at(buffer), data.len() as u32, 0));
    }
    raw.chain(head, &buffers).expect("memory");
    raw.offer(head).expect("a kick");
}

/// The region that a `ramdisk` and its like keep their data in.
fn memory_of_the_disk(daemon: &Daemon) -> File {
    let fds =
        std::fs::read_dir(format!("/proc/{}/fd", daemon.server_pid())).expect("the daemon lives");
    let is_disk = |path: &PathBuf| {
        std::fs::read_link(path)
            .is_ok_and(|name| name.to_string_lossy().starts_with("/memfd:hotswap-region-disk"))
    };
    let path =
        fds.map(|fd| fd.expect("an entry").path()).find(is_disk).expect("a region of that name");
    File::open(path).expect("its memory")
}

#[test]
fn the_pause_of_a_handover_does_not_depend_on_the_size_of_the_disk() {
    let pause = |size: &str| {
        let daemon = Daemon::start(&["--domain", "ramdisk", "--param", size]);
        let mut client = guest_tests::client::Client::connect(daemon.socket(), &Default::default())
            .expect("connected");
        let data = vec![1; 64 << 10];
        for block in 0..800 {
            let request = guest_tests::client::Request::Write { offset: block << 16, data: &data };
            client.queue(0).execute(request, PATIENCE).expect("an answer");
        }
        let mut control = daemon.rpc();
        let mut pauses: Vec<_> = (0..21)
            .map(|round| {
                let name = if round % 2 == 0 { "ramdisk_v2" } else { "ramdisk" };
                let reply = control.request("upgrade", json!({ "name": name })).expect("committed");
                reply["phases_us"]["pause"].as_u64().expect("a number")
            })
            .collect();
        pauses.sort_unstable();
        pauses[pauses.len() / 2].max(1)
    };
    let (small, large) = (pause("size=64M"), pause("size=8G"));
    println!("median pause: 64M {small} us, 8G {large} us");
    assert!(large < small * 50, "64M: {small} us, 8G: {large} us");
}
