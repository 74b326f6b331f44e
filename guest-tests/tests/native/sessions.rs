//! Clients that come, go and vanish, and upgrades at moments when no client, or hardly one, is
//! there.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::raw::RawSession;
use guest_tests::client::{Client, Options, Request, Status, features};
use guest_tests::daemon::Daemon;
use guest_tests::stamp::{Load, LoadOptions, assert_intact, run_load};
use serde_json::json;
use vhost::VhostBackend;

const SECOND: Duration = Duration::from_secs(1);

fn ramdisk() -> Daemon {
    Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"])
}

/// Waits until `status` says whether a client is connected.
fn wait_for_connected(daemon: &Daemon, connected: bool) {
    let deadline = Instant::now() + PATIENCE;
    let mut control = daemon.rpc();
    while control.request("status", json!({})).expect("a status")["connected"] != connected {
        assert!(
            Instant::now() < deadline,
            "`connected` never becomes {connected}: {}",
            daemon.status()
        );
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn an_upgrade_without_any_client() {
    let daemon = ramdisk();
    assert_eq!(daemon.status()["connected"], false);
    let reply = daemon.call(&["upgrade", "ramdisk_v2"]);
    assert_eq!(reply["generation"], 2);
    assert_eq!(daemon.call(&["rollback"])["generation"], 3);
    run_load(daemon.socket(), &LoadOptions::new(2, 32), SECOND / 2).assert_clean();
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn an_upgrade_between_two_clients_keeps_the_data() {
    let daemon = ramdisk();
    let options = LoadOptions::new(2, 32);
    let first = run_load(daemon.socket(), &options, SECOND / 2);
    first.assert_clean();
    assert_intact(daemon.socket(), &first.ledgers);
    wait_for_connected(&daemon, false);
    daemon.call(&["upgrade", "ramdisk_v2"]);
    assert_intact(daemon.socket(), &first.ledgers);
    let second = Load::resume(daemon.socket(), &options, first.ledgers);
    second.wait_for(5000);
    let second = second.stop();
    second.assert_clean();
    assert_intact(daemon.socket(), &second.ledgers);
}

#[test]
fn an_upgrade_at_every_step_of_the_set_up() {
    let daemon = ramdisk();
    let upgrade = |generation: u64, name: &str| {
        let reply = daemon.call(&["upgrade", name]);
        assert_eq!(reply["generation"], generation, "{reply}");
    };
    let mut raw = RawSession::connect(daemon.socket(), features::USUAL).expect("a connection");
    upgrade(2, "ramdisk_v2");
    raw.share_memory().expect("memory shared");
    upgrade(3, "ramdisk");
    raw.start_ring(64).expect("a ring");
    upgrade(4, "ramdisk_v2");
    raw.assert_one_read();
    upgrade(5, "ramdisk");
    raw.assert_one_read();
    assert_eq!(raw.stop_ring().expect("stopped"), 2, "the next chain to be taken");
    upgrade(6, "ramdisk_v2");
    raw.start_ring(64).expect("started again");
    raw.assert_one_read();
}

#[test]
fn upgrades_with_an_idle_client_wake_nobody_and_break_nothing() {
    let daemon = ramdisk();
    let mut client = Client::connect(daemon.socket(), &Options { queues: 2, ..Options::default() })
        .expect("connected");
    let data = vec![0xa5; 4096];
    let write = |client: &mut Client, queue: usize, offset| {
        let request = Request::Write { offset, data: &data };
        assert_eq!(
            client.queue(queue).execute(request, PATIENCE).expect("an answer").0,
            Status::Ok
        );
    };
    for (round, name) in ["ramdisk_v2", "ramdisk"].into_iter().cycle().take(20).enumerate() {
        write(&mut client, round % 2, round as u64 * 4096);
        daemon.call(&["upgrade", name]);
    }
    for round in 0..20 {
        let read = Request::Read { offset: round * 4096, len: 4096 };
        let answer = client.queue(1).execute(read, PATIENCE).expect("an answer");
        assert_eq!(answer, (Status::Ok, data.clone()), "block {round}");
    }
}

#[test]
fn a_thousand_sessions_leave_nothing_behind() {
    const SLACK_KIB: u64 = 2048;
    let daemon = ramdisk();
    let server = daemon.server();
    let sessions = |count: usize| {
        for round in 0..count {
            let queues = 1 + round % 2;
            let mut client =
                Client::connect(daemon.socket(), &Options { queues, ..Options::default() })
                    .expect("connected");
            // Always the same block, so that the ramdisk itself does not grow.
            let request = Request::Write { offset: 0, data: &[round as u8; 4096] };
            assert_eq!(
                client.queue(queues - 1).execute(request, PATIENCE).expect("an answer").0,
                Status::Ok
            );
            if round % 3 == 0 {
                // Gone without having waited for the answer.
                client
                    .queue(0)
                    .submit(Request::Read { offset: 0, len: 4096 }, 0)
                    .expect("submitted");
                client.queue(0).kick().expect("kicked");
            }
        }
        wait_for_connected(&daemon, false);
    };
    sessions(100);
    // The last session is taken down behind `connected`.
    thread::sleep(SECOND / 5);
    let (before, rss_kib) = (server.held(), server.rss_kib());
    sessions(1000);
    let after = server.gives_back(before);
    let rss_kib_after = server.rss_kib();
    println!("{before:?} -> {after:?}, rss {rss_kib} -> {rss_kib_after} KiB");
    assert!(rss_kib_after <= rss_kib + SLACK_KIB, "memory leaks: {rss_kib} -> {rss_kib_after} KiB");
}

#[test]
fn a_client_that_vanishes_with_requests_in_flight_is_followed_by_another() {
    let daemon = ramdisk();
    let options = LoadOptions::new(2, 32);
    let mut ledgers = None;
    for round in 0..20 {
        let load = match ledgers.take() {
            None => Load::start(daemon.socket(), &options),
            Some(ledgers) => Load::resume(daemon.socket(), &options, ledgers),
        };
        load.wait_for(500);
        if round % 4 == 3 {
            daemon.call(&["upgrade", if round % 8 == 3 { "ramdisk_v2" } else { "ramdisk" }]);
        }
        let report = load.abandon();
        report.assert_clean();
        ledgers = Some(report.ledgers);
    }
    assert_intact(daemon.socket(), &ledgers.expect("twenty rounds"));
    assert_eq!(daemon.status()["state"], "serving");
}

/// A worker that would look for its next request for longer than a session's end waits for it at a
/// time.
#[test]
fn a_worker_that_looks_for_long_holds_up_no_session() {
    let args = ["--domain", "ramdisk", "--param", "size=1M", "--queues", "2"];
    let daemon = Daemon::start(&[&args[..], &["--poll-us", "1000000"]].concat());
    for round in 0..10 {
        let options = Options { queues: 2, ..Options::default() };
        let mut client = Client::connect(daemon.socket(), &options).expect("connected");
        let read = Request::Read { offset: 0, len: 4096 };
        let answer = client.queue(round % 2).execute(read, PATIENCE).expect("an answer");
        assert_eq!(answer.0, Status::Ok);
    }
    assert!(!daemon.log().contains("still in flight"), "{}", daemon.log());
}

#[test]
fn clients_vanish_while_upgrades_run() {
    let daemon = ramdisk();
    let options = LoadOptions::new(2, 32);
    let mut report = run_load(daemon.socket(), &options, SECOND / 10);
    for round in 0..20 {
        let load = Load::resume(daemon.socket(), &options, report.ledgers);
        load.wait_for(100);
        report = thread::scope(|scope| {
            let name = if round % 2 == 0 { "ramdisk_v2" } else { "ramdisk" };
            let daemon = &daemon;
            let upgrade =
                scope.spawn(move || daemon.rpc().request("upgrade", json!({"name": name})));
            let report = load.abandon();
            let reply =
                upgrade.join().expect("no panic").unwrap_or_else(|e| panic!("upgrade: {e:?}"));
            assert_eq!(reply["generation"], round + 2, "{reply}");
            report
        });
        report.assert_clean();
    }
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn sigterm_under_load_ends_quickly_and_cleanly() {
    let mut daemon = ramdisk();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    load.wait_for(1000);
    let (code, took) = daemon.stop();
    assert_eq!(code, 0, "{}", daemon.log());
    assert!(took < 5 * SECOND, "SIGTERM took {took:?}");
    assert!(!daemon.socket().exists(), "the vhost-user socket is left");
    assert!(!daemon.control().exists(), "the control socket is left");
    // What was not answered before the end is unanswered; what was answered was answered rightly.
    let report = load.abandon();
    assert_eq!((report.errors, report.mismatches, report.spurious), (0, 0, 0), "{report:?}");
}

#[test]
fn shutdown_by_command_ends_as_sigterm_does() {
    let daemon = ramdisk();
    let output = daemon.ctl(&["shutdown"]);
    assert_eq!(output.status, 0, "{output:?}");
    let deadline = Instant::now() + PATIENCE;
    while daemon.control().exists() || daemon.socket().exists() {
        assert!(Instant::now() < deadline, "the sockets are still there:\n{}", daemon.log());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_control_socket_is_private_and_a_stale_one_is_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let daemon = ramdisk();
    let mode = |path: &Path| path.metadata().expect("a socket").permissions().mode() & 0o777;
    assert_eq!(mode(daemon.control()), 0o600);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let stale = directory.path().join("stale.control");
    drop(
        std::os::unix::net::UnixListener::bind(&stale).expect("a socket that refuses connections"),
    );
    let second = Daemon::start(&["--control-path", stale.to_str().expect("UTF-8")]);
    assert_eq!(second.status()["generation"], 1);
}

#[test]
fn workers_are_kept_on_the_cpus_that_are_asked_for() {
    let allowed = std::fs::read_to_string("/proc/self/status").expect("a process has a status");
    let allowed = allowed.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t"));
    let allowed = allowed.expect("the kernel says where a process may run");
    let digits = allowed.find(|c: char| !c.is_ascii_digit()).unwrap_or(allowed.len());
    let (first, has_one) = (&allowed[..digits], digits == allowed.len());
    let cpus = format!("{first},{first}-{first}");
    let daemon = Daemon::start(&["--domain", "empty", "--queues", "3", "--worker-cpus", &cpus]);
    let mut client = Client::connect(daemon.socket(), &Options { queues: 3, ..Options::default() })
        .expect("connected");
    for queue in 0..3 {
        let read = Request::Read { offset: 0, len: 4096 };
        assert_eq!(client.queue(queue).execute(read, PATIENCE).expect("an answer").0, Status::Ok);
    }
    let mut workers = 0;
    for task in
        std::fs::read_dir(format!("/proc/{}/task", daemon.server_pid())).expect("the daemon lives")
    {
        let task = task.expect("a thread").path();
        let read = |file: &str| std::fs::read_to_string(task.join(file));
        // A thread that has served a client of the control socket may just have ended.
        let (Ok(name), Ok(status)) = (read("comm"), read("status")) else { continue };
        let is_worker = name.starts_with("vring_worker");
        let kept = format!("Cpus_allowed_list:\t{first}");
        let is_kept = status.lines().any(|line| line == kept);
        // Where there is one CPU, all are kept on it.
        assert_eq!(is_kept, is_worker || has_one, "{}", task.display());
        workers += usize::from(is_worker);
    }
    assert_eq!(workers, 3);
}

/// Rings as large as QEMU makes them (`queue-size=`) are served without an option.
#[test]
fn the_largest_ring_is_served_by_default() {
    let daemon = ramdisk();
    for size in [1024, 512, 128] {
        let mut raw = RawSession::start(daemon.socket(), features::USUAL, size).expect("a session");
        raw.assert_one_read();
    }
}

#[test]
fn a_ring_that_is_too_large_is_refused_with_the_name_of_the_option() {
    let start = || Daemon::start(&["--domain", "ramdisk", "--queue-size", "256"]);
    let started = Instant::now();
    let lines = |daemon: &Daemon, what: &str| {
        daemon.log().lines().filter(|line| line.contains(what)).count()
    };
    // A line is repeated after ten seconds, which are long.
    let most = || 1 + started.elapsed().as_secs() as usize / 10;
    let once = |daemon: &Daemon, what: &str| (1..=most()).contains(&lines(daemon, what));
    let daemon = start();
    for _ in 0..3 {
        assert!(
            RawSession::start(daemon.socket(), features::USUAL, 512).is_err(),
            "512 is accepted"
        );
        wait_for_connected(&daemon, false);
    }
    assert!(once(&daemon, "start the daemon with --queue-size 512"), "{}", daemon.log());
    // Another size is of the same kind, so another has to say it.
    let daemon = start();
    for _ in 0..3 {
        assert!(
            RawSession::start(daemon.socket(), features::USUAL, 100).is_err(),
            "100 is accepted"
        );
        wait_for_connected(&daemon, false);
    }
    assert!(once(&daemon, "100 entries, which is no power of two"), "{}", daemon.log());
    // One that does not wish to be told goes on, and is let go.
    for _ in 0..3 {
        let raw = RawSession::connect(daemon.socket(), features::USUAL).expect("a connection");
        raw.share_memory().expect("memory");
        let _ = raw.frontend.set_vring_num(0, 100);
        raw.place_ring(0, 0x1_0000, 0x2_0000).expect_err("a ring of another size");
        assert!(raw.wait_for_end(PATIENCE).expect("a connection"), "the session goes on");
        wait_for_connected(&daemon, false);
    }
    assert!(
        once(&daemon, "the session ended: failed to handle request: invalid parameters"),
        "{}",
        daemon.log()
    );
    let mut raw = RawSession::start(daemon.socket(), features::USUAL, 256).expect("a session");
    raw.assert_one_read();
}

/// Memory follows what is in flight, and not what could be.
#[test]
fn rings_that_are_not_used_cost_no_memory() {
    use guest_tests::client::raw::{Descriptor, FREE, GUEST_BASE, NEXT, WRITE};
    const SLACK_KIB: u64 = 2048;
    // A session with all its workers, in KiB: idle, then with a deep queue on one of them.
    let resident = |size: &str| {
        let daemon =
            Daemon::start(&["--domain", "ramdisk", "--queues", "64", "--queue-size", size]);
        let mut raw = RawSession::start(daemon.socket(), features::USUAL, 64).expect("a session");
        raw.assert_one_read();
        let idle = daemon.rss_kib();
        raw.put(FREE, &[0; 16]).expect("memory");
        // A header for each, and the data and status of all.
        let at = GUEST_BASE + FREE;
        raw.chain(62, &[(at + 0x2000, 512, WRITE), (at + 0x1000, 1, WRITE)]).expect("memory");
        for head in 0..62 {
            let header = Descriptor { addr: at, len: 16, flags: NEXT, next: 62 };
            raw.describe(head, header).expect("memory");
        }
        (0..62).for_each(|head| raw.offer(head).expect("a kick"));
        for _ in 0..62 {
            assert!(raw.used(PATIENCE).expect("memory").is_some(), "no answer");
        }
        (idle, daemon.rss_kib())
    };
    let (small, large) = (resident("64"), resident("1024"));
    println!("64 queues of 64: {small:?} KiB, of 1024: {large:?} KiB");
    assert!(large.0 <= small.0 + SLACK_KIB, "idle: {small:?} -> {large:?} KiB");
    assert!(large.1 <= small.1 + SLACK_KIB, "in use: {small:?} -> {large:?} KiB");
}
