//! Disks in a real Ceph, under a load that checks every block. `scripts/try-ceph` runs these; they
//! are ignored elsewhere, because they need a cluster.

use std::thread;
use std::time::{Duration, Instant};

use guest_tests::ceph::{Ceph, Image, wait_until};
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::Daemon;
use guest_tests::operator::Operator;
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::Signal;
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);

fn start(params: &[String], more: &[&str]) -> Daemon {
    let params: Vec<&str> = params.iter().map(String::as_str).collect();
    Daemon::start(&[&params, more].concat())
}

fn serve(image: &Image<'_>) -> Daemon {
    start(&image.params(), &["--queues", "2"])
}

/// A load that waits for as long as a cluster may take.
fn patient(queues: usize, depth: usize) -> LoadOptions {
    LoadOptions { patience: 90 * SECOND, ..LoadOptions::new(queues, depth) }
}

fn ask(client: &mut Client, request: Request<'_>) -> (Status, Vec<u8>) {
    client.queue(0).execute(request, 60 * SECOND).expect("an answer")
}

fn middle(mut all: Vec<u64>) -> u64 {
    all.sort_unstable();
    all[all.len() / 2]
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn upgrades_exchanges_and_an_osd_that_goes_lose_nothing() {
    let ceph = Ceph::given();
    let image = ceph.image("upgraded", 64);
    let mut daemon = serve(&image);
    let load = Load::start(daemon.socket(), &patient(2, 16));
    load.wait_for(200);
    let mut operator = Operator::new(&daemon);
    let pause = |reply: &Value| reply["phases_us"]["pause"].as_f64().expect("a number") as u64;
    let mut pauses = Vec::new();
    for round in 0..50 {
        // A handover waits for what is in flight; nothing waits in a swap.
        if round % 2 == 0 {
            operator.upgrade("rbd", "swap", &[]);
        } else {
            pauses.push(pause(&operator.upgrade("rbd", "handover", &[])));
        }
        if round % 10 == 9 {
            operator.roll_back("swap");
        }
        load.wait_for(5);
    }
    println!("pause of 25 handovers under load: median {} us", middle(pauses));
    ceph.kill("osd.0");
    thread::sleep(10 * SECOND);
    ceph.start("osd.0");
    load.wait_for(100);
    let mut pauses = Vec::new();
    for _ in 0..10 {
        let reply = daemon.call(&["upgrade-daemon", "--only", "server"]);
        println!("exchange: {}", reply["phases_us"]);
        pauses.push(pause(&reply));
        load.wait_for(20);
    }
    println!("pause of 10 exchanges: median {} us", middle(pauses));
    load.wait_for(100);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn a_killed_server_or_daemon_breaks_its_own_lock_and_goes_on() {
    let ceph = Ceph::given();
    let image = ceph.image("killed", 64);
    let mut daemon = serve(&image);
    let load = Load::start(daemon.socket(), &patient(2, 16));
    for round in 1..=3u64 {
        load.wait_for(50);
        let begun = Instant::now();
        daemon.signal_server(Signal::KILL);
        wait_until(&daemon, 20 * SECOND, |now| now["server"]["recoveries"].as_u64() >= Some(round));
        load.wait_for(1);
        println!("after the kill of the server: serving again in {:?}", begun.elapsed());
        assert!(begun.elapsed() < 5 * SECOND, "{:?}\n{}", begun.elapsed(), daemon.log());
    }
    load.wait_for(50);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    // Both processes: there is no vault, only what is noted in the image.
    let client = Client::connect(daemon.socket(), &Options::default()).expect("a client");
    assert!(ceph.run(&format!("rbd lock ls {}", image.name())).contains("client."));
    daemon.stop_with(Signal::KILL);
    drop(client);
    let begun = Instant::now();
    daemon.start_again();
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a client");
    let data = vec![7; 4096];
    let write = Request::Write { offset: 0, data: &data };
    assert_eq!(ask(&mut client, write).0, Status::Ok);
    println!("after the kill of both: serving again in {:?}", begun.elapsed());
    assert!(begun.elapsed() < 5 * SECOND, "{:?}\n{}", begun.elapsed(), daemon.log());
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
    let clean = ceph.run(&format!("rbd status {}", image.name()));
    assert!(clean.contains("Watchers: none"), "it was not closed: {clean}");
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn flush_discard_zeroes_resize_and_snapshots() {
    let ceph = Ceph::given();
    let image = ceph.image("plain", 64);
    let mut daemon = serve(&image);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a client");
    const PIECE: u64 = 64 << 10;
    const MIB: u64 = 1 << 20;
    let data = vec![0x5a; PIECE as usize];
    for at in 0..8 {
        let write = Request::Write { offset: at * PIECE, data: &data };
        assert_eq!(ask(&mut client, write).0, Status::Ok);
    }
    assert_eq!(ask(&mut client, Request::Flush).0, Status::Ok);
    let used = || {
        let text = ceph.run(&format!("rbd diff {} --format json", image.name()));
        let extents: Value = serde_json::from_str(&text).expect("JSON");
        let extents = extents.as_array().expect("a list").iter();
        extents
            .filter(|e| e["exists"] == "true")
            .map(|e| e["length"].as_u64().unwrap())
            .sum::<u64>()
    };
    // In an object of its own.
    let write = Request::Write { offset: 4 * MIB, data: &data };
    assert_eq!(ask(&mut client, write).0, Status::Ok);
    assert_eq!(used(), 9 * PIECE);
    let zeroes = |offset, unmap| Request::WriteZeroes { offset, len: PIECE, unmap };
    assert_eq!(ask(&mut client, zeroes(0, true)).0, Status::Ok);
    assert_eq!(ask(&mut client, zeroes(PIECE, false)).0, Status::Ok);
    let discard = Request::Discard { offset: 4 * MIB, len: 4 * MIB };
    assert_eq!(ask(&mut client, discard).0, Status::Ok);
    for at in 0..2 {
        let read = Request::Read { offset: at * PIECE, len: PIECE as usize };
        let (status, data) = ask(&mut client, read);
        assert!(status == Status::Ok && data.iter().all(|&byte| byte == 0), "{at}");
    }
    assert_eq!(used(), 8 * PIECE, "nothing was given back");
    ceph.run(&format!("rbd snap create --no-progress {}@then", image.name()));
    let other = vec![0xa5; PIECE as usize];
    let write = Request::Write { offset: 7 * PIECE, data: &other };
    assert_eq!(ask(&mut client, write).0, Status::Ok);
    // Larger, by the daemon and by another program; and smaller is not the guest's disk.
    daemon.call(&["resize", "96M"]);
    assert!(ceph.run(&format!("rbd info {}", image.name())).contains("size 96 MiB"));
    ceph.run(&format!("rbd resize --no-progress {} --size 128M", image.name()));
    daemon.call(&["resize", "128M"]);
    assert_eq!(client.read_capacity().expect("an answer"), 128 * MIB);
    let end = Request::Write { offset: 127 * MIB, data: &data };
    assert_eq!(ask(&mut client, end).0, Status::Ok);
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
    // As it was, and it cannot be written.
    let snapshot = format!("{}@then", image.name());
    let mut daemon = start(&ceph.params(&snapshot), &[]);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a client");
    assert_eq!(client.capacity(), 64 * MIB);
    let then = Request::Read { offset: 7 * PIECE, len: PIECE as usize };
    let (status, data) = ask(&mut client, then);
    assert!(status == Status::Ok && data.iter().all(|&byte| byte == 0x5a));
    let write = Request::Write { offset: 0, data: &data };
    assert_eq!(ask(&mut client, write).0, Status::IoError);
    daemon.call(&["upgrade", "rbd"]);
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}
