//! A disk whose image the host has open through a library: one that stands in for Ceph's, so that
//! no cluster is needed. `ceph` and `ceph_failures` beside this are the same with a real one.

use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::ceph::StandIn;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::Daemon;
use guest_tests::operator::Operator;
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::Signal;

const SECOND: Duration = Duration::from_secs(1);

fn connect(daemon: &Daemon) -> Client {
    Client::connect(daemon.socket(), &Options::default()).expect("a client")
}

fn write(client: &mut Client, offset: u64) -> Status {
    let request = Request::Write { offset, data: &[9; 4096] };
    client.queue(0).execute(request, PATIENCE).expect("an answer").0
}

fn read(client: &mut Client, offset: u64) -> Status {
    let request = Request::Read { offset, len: 4096 };
    client.queue(0).execute(request, PATIENCE).expect("an answer").0
}

/// The descriptors of a process that lead to this file.
fn opened(daemon: &Daemon, path: &std::path::Path) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon.server_pid())).expect("it lives");
    fds.filter(|fd| std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to == path))
        .count()
}

#[test]
fn upgrades_keep_image_and_lock_and_exchanges_move_the_lock() {
    let cluster = StandIn::new(64);
    let mut daemon = cluster.serve(&["--queues", "2"]);
    assert_eq!(cluster.owner(), None, "no ring runs");
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    load.wait_for(500);
    let owner = cluster.owner();
    assert!(owner.is_some(), "rings run");
    let mut operator = Operator::new(&daemon);
    for round in 0..20 {
        let mode = if round % 2 == 0 { "swap" } else { "handover" };
        operator.upgrade("rbd", mode, &[]);
        if round % 5 == 4 {
            operator.roll_back("swap");
        }
        load.wait_for(50);
    }
    assert_eq!(cluster.owner(), owner, "an upgrade has moved the lock");
    assert_eq!(opened(&daemon, &cluster.file("rbd.disk")), 1, "it was opened again");
    let sentence = operator.upgrade_refused("rbd", &["--param", "id=other"]);
    assert!(sentence.contains("`conf` and `id` cannot be changed"), "{sentence}");
    let sentence = operator.upgrade_refused("rbd", &["--param", "image=rbd/other"]);
    assert!(sentence.contains("is another image than the guest's disk, `rbd/disk`"), "{sentence}");
    for _ in 0..5 {
        let reply = daemon.call(&["upgrade-daemon", "--only", "server"]);
        println!("exchange: {}", reply["phases_us"]);
        load.wait_for(50);
    }
    assert_ne!(cluster.owner(), owner, "the lock is still the first server's");
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    daemon.wait_until("it is claimed without a ring", |now| now["claim"] == "free");
    assert_eq!(cluster.owner(), None);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
    assert_eq!(cluster.watchers(), [""; 0], "servers have left without closing it");
}

#[test]
fn the_lock_of_one_that_was_killed_is_broken_and_that_of_another_is_not() {
    let cluster = StandIn::new(64);
    let mut daemon = cluster.serve(&["--queues", "2"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
    for _ in 0..5 {
        load.wait_for(200);
        let before = cluster.owner().expect("rings run");
        daemon.end_server(Signal::KILL);
        load.wait_for(200);
        assert_ne!(cluster.owner().as_ref(), Some(&before));
        assert!(cluster.file(&format!("blocked.{before}")).exists(), "it is not locked out");
    }
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    // Both processes.
    let client = connect(&daemon);
    daemon.wait_until("not claimed", |_| cluster.owner().is_some());
    daemon.end_whole();
    drop(client);
    let note = std::fs::read_to_string(cluster.file("rbd.disk.note.vhost-hotswap.client"));
    let note = note.expect("it has written down who it is");
    // As if it had been on another host: then it may live.
    let elsewhere = note.replace("boot=", "boot=x");
    cluster.put("rbd.disk.note.vhost-hotswap.client", &elsewhere);
    let output = cluster.refused(&["image=rbd/disk"]);
    assert!(output.stderr.contains("another program uses image rbd/disk"), "{}", output.stderr);
    cluster.put("rbd.disk.note.vhost-hotswap.client", &note);
    cluster.serve_again(&mut daemon);
    assert_eq!(write(&mut connect(&daemon), 0), Status::Ok);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn a_lock_that_was_broken_ends_the_disk_until_an_upgrade() {
    let cluster = StandIn::new(16);
    let mut daemon = cluster.serve(&[]);
    daemon.call(&["upgrade", "rbd"]);
    let mut client = connect(&daemon);
    assert_eq!(write(&mut client, 0), Status::Ok);
    let owner = cluster.owner().expect("rings run");
    cluster.put(&format!("blocked.{owner}"), "");
    cluster.put("rbd.disk.lock", "another");
    cluster.put("rbd.disk.watch.another", "");
    assert_eq!(write(&mut client, 4096), Status::IoError);
    daemon.wait_until("not faulted", |now| now["state"] == "faulted");
    assert!(daemon.log().contains("the lock of image rbd/disk was broken"), "{}", daemon.log());
    assert_eq!(read(&mut client, 0), Status::IoError);
    // It is in use elsewhere, and stays so.
    let sentence = daemon.refuse(&["upgrade", "rbd"]);
    assert!(sentence.contains("another program uses"), "{sentence}");
    assert_eq!(cluster.owner().as_deref(), Some("another"));
    cluster.remove("rbd.disk.lock");
    daemon.call(&["upgrade", "rbd"]);
    assert_eq!(write(&mut client, 4096), Status::Ok);
    assert!(cluster.owner().is_some_and(|owner| owner != "another"), "it is not claimed");
    drop(client);
    // The guest has had errors, and nothing else is left behind.
    daemon.stop();
}

/// The lock of the one that has the image open is broken, for another that is not there.
fn break_lock(cluster: &StandIn) {
    let [owner] = &cluster.watchers()[..] else { panic!("{:?}", cluster.watchers()) };
    cluster.put(&format!("blocked.{owner}"), "");
    let _ = std::fs::remove_file(cluster.file("rbd.disk.lock"));
}

#[test]
fn a_lock_that_was_broken_while_no_ring_ran_is_had_again_by_an_upgrade() {
    let cluster = StandIn::new(16);
    let mut daemon = cluster.serve(&[]);
    assert_eq!(write(&mut connect(&daemon), 0), Status::Ok);
    daemon.wait_until("it is claimed without a ring", |now| now["claim"] == "free");
    break_lock(&cluster);
    let mut client = connect(&daemon);
    let early = client.queue(0).execute(Request::Read { offset: 0, len: 4096 }, SECOND);
    assert!(early.is_err(), "a client that is locked out has claimed it: {early:?}");
    assert!(daemon.log().contains("the lock of image rbd/disk was broken"), "{}", daemon.log());
    daemon.call(&["upgrade", "rbd"]);
    daemon.wait_until("it is not claimed", |_| cluster.owner().is_some());
    drop(client);
    assert_eq!(write(&mut connect(&daemon), 4096), Status::Ok);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn a_lock_that_was_broken_is_found_when_it_is_given_back() {
    let cluster = StandIn::new(16);
    let mut daemon = cluster.serve(&[]);
    let mut client = connect(&daemon);
    assert_eq!(write(&mut client, 0), Status::Ok);
    break_lock(&cluster);
    drop(client);
    daemon.wait_until("it is claimed without a ring", |now| now["claim"] == "free");
    assert!(daemon.log().contains("the lock of image rbd/disk was broken"), "{}", daemon.log());
    daemon.call(&["upgrade", "rbd"]);
    assert_eq!(write(&mut connect(&daemon), 4096), Status::Ok);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

/// No request has failed, so the domain lives, and its rings run.
#[test]
fn what_is_opened_in_place_of_a_lost_image_is_claimed_before_it_serves() {
    let cluster = StandIn::new(16);
    let mut daemon = cluster.serve(&[]);
    let mut client = connect(&daemon);
    assert_eq!(write(&mut client, 0), Status::Ok);
    break_lock(&cluster);
    let sentence = daemon.refuse(&["resize", "24M"]);
    assert!(sentence.contains("the lock of image rbd/disk was broken"), "{sentence}");
    cluster.put("rbd.disk.lock", "another");
    cluster.put("rbd.disk.watch.another", "");
    for mode in ["swap", "handover"] {
        let sentence = daemon.refuse(&["upgrade", "rbd", "--mode", mode]);
        assert!(sentence.contains("another program uses"), "{sentence}");
    }
    cluster.remove("rbd.disk.lock");
    daemon.call(&["upgrade", "rbd"]);
    let owner = cluster.owner();
    assert!(owner.is_some_and(|owner| owner != "another"), "it serves without a claim");
    assert_eq!(write(&mut client, 4096), Status::Ok);
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn an_upgrade_after_a_broken_lock_waits_for_a_cluster_that_is_slow() {
    let cluster = StandIn::new(16);
    let mut daemon = cluster.serve(&[]);
    let mut client = connect(&daemon);
    assert_eq!(write(&mut client, 0), Status::Ok);
    break_lock(&cluster);
    assert_eq!(write(&mut client, 0), Status::IoError);
    daemon.wait_until("not faulted", |now| now["state"] == "faulted");
    cluster.put("slow", "700");
    daemon.call(&["upgrade", "rbd"]);
    assert_eq!(write(&mut client, 0), Status::Ok);
    drop(client);
    daemon.stop();
}

#[test]
fn a_spare_that_is_not_needed_closes_its_image() {
    let cluster = StandIn::new(16);
    let mut daemon = cluster.serve(&["--spare"]);
    let mut client = connect(&daemon);
    assert_eq!(write(&mut client, 0), Status::Ok);
    let of_server = format!("{}-", daemon.server_pid());
    let others = || -> Vec<String> {
        let all = cluster.watchers().into_iter();
        all.filter(|watcher| !watcher.starts_with(&of_server)).collect()
    };
    let spare = |before: &str| {
        daemon.wait_until(
            "there is no other spare, or too many",
            |_| matches!(&others()[..], [spare] if spare != before),
        );
        others().remove(0)
    };
    // A spare is stale when another module serves: one of other bytes.
    let upgrade = |round: usize| {
        let mut bytes = std::fs::read(guest_tests::daemon::module("rbd")).expect("the module");
        bytes.resize(bytes.len() + round, 0);
        let path = cluster.file(&format!("rbd{round}.so"));
        std::fs::write(&path, bytes).expect("written");
        daemon.call(&["upgrade", path.to_str().expect("UTF-8")]);
    };
    let mut now = spare("");
    for round in 1..4 {
        upgrade(round);
        now = spare(&now);
    }
    // One that is about to open it, while the cluster does not answer.
    cluster.put("down", "");
    let pid = now.split_once('-').expect("a process").0.parse().expect("its number");
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::KILL)
        .expect("it lives");
    cluster.remove(&format!("rbd.disk.watch.{now}"));
    let opening = spare(&now);
    upgrade(4);
    cluster.remove("down");
    let now = spare(&opening);
    // Its successor would wait for one that is gone.
    let begun = Instant::now();
    daemon.call(&["upgrade-daemon", "--only", "server"]);
    assert_eq!(write(&mut client, 0), Status::Ok);
    assert!(begun.elapsed() < 4 * SECOND, "{:?}", begun.elapsed());
    assert!(!cluster.watchers().contains(&now), "it was killed");
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
    assert_eq!(cluster.watchers(), [""; 0], "not all have closed it");
}

#[test]
fn an_image_that_another_program_enlarges_meanwhile_is_not_made_smaller() {
    let cluster = StandIn::new(16);
    let mut daemon = cluster.serve(&[]);
    let mut client = connect(&daemon);
    cluster.put("enlarge", &(32 << 20).to_string());
    daemon.call(&["resize", "24M"]);
    let image = std::fs::metadata(cluster.file("rbd.disk")).expect("the image");
    assert_eq!(image.len(), 32 << 20);
    assert_eq!(client.read_capacity().expect("an answer"), 24 << 20);
    assert_eq!(write(&mut client, 23 << 20), Status::Ok);
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

/// Whatever the configuration says.
#[test]
fn what_the_order_of_writes_rests_on_is_set() {
    let cluster = StandIn::new(16);
    assert_eq!(cluster.serve(&[]).terminate(), 0);
    for (key, value) in [("rbd_cache", "false"), ("rbd_blocklist_on_break_lock", "true")] {
        let set = std::fs::read_to_string(cluster.file(&format!("conf.{key}")));
        assert_eq!(set.ok().as_deref(), Some(value), "{key}");
    }
}

#[test]
fn a_second_daemon_is_refused_or_waits() {
    let cluster = StandIn::new(16);
    let mut first = cluster.serve(&[]);
    let mut client = connect(&first);
    assert_eq!(write(&mut client, 0), Status::Ok);
    let output = cluster.refused(&["image=rbd/disk"]);
    assert_eq!(output.status, 1);
    assert!(output.stderr.contains("another program uses image rbd/disk"), "{}", output.stderr);
    let mut second = cluster.serve(&["--param", "locking=late"]);
    let mut other = connect(&second);
    let early = other.queue(0).execute(Request::Read { offset: 0, len: 4096 }, SECOND / 2);
    assert!(early.is_err(), "both run: {early:?}");
    second.wait_until("it does not wait", |now| now["claim"] == "waiting");
    drop(client);
    second.wait_until("it has not its turn", |now| now["claim"] == "claimed");
    drop(other);
    assert_eq!(write(&mut connect(&second), 0), Status::Ok);
    // One that only reads needs no lock.
    let mut reader = cluster.serve(&["--param", "readonly=true"]);
    assert_eq!(read(&mut connect(&reader), 0), Status::Ok);
    assert_eq!(write(&mut connect(&reader), 0), Status::IoError);
    for daemon in [&mut first, &mut second, &mut reader] {
        assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
    }
}

#[test]
fn with_its_osd_down_requests_wait_and_commands_do_not() {
    let cluster = StandIn::new(16);
    let mut daemon = cluster.serve(&[]);
    daemon.call(&["upgrade", "rbd"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 8));
    load.wait_for(100);
    cluster.put("down", "");
    thread::sleep(SECOND / 5);
    let (before, begun) = (load.ios(), Instant::now());
    let handover = ["upgrade", "rbd", "--mode", "handover"];
    let sentence = daemon.refuse(&handover);
    assert!(sentence.contains("in flight"), "{sentence}");
    assert!(begun.elapsed() < 8 * SECOND, "{:?}", begun.elapsed());
    // Another process would have to open the image.
    let sentence = daemon.refuse(&["upgrade-daemon", "--only", "server"]);
    assert!(sentence.contains("was not opened for 15 s"), "{sentence}");
    assert_eq!(daemon.status()["state"], "serving");
    assert_eq!((load.ios(), load.faults()), (before, 0), "what waits does not fail");
    cluster.remove("down");
    load.wait_for(100);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn a_full_pool_fails_writes_and_a_disk_grows() {
    let cluster = StandIn::new(16);
    let mut daemon = cluster.serve(&[]);
    let mut client = connect(&daemon);
    cluster.put("full", "");
    assert_eq!(write(&mut client, 0), Status::IoError);
    assert_eq!(read(&mut client, 0), Status::Ok);
    assert!(daemon.log().contains("the pool is full"), "{}", daemon.log());
    cluster.remove("full");
    assert_eq!(write(&mut client, 0), Status::Ok);
    daemon.call(&["resize", "24M"]);
    assert_eq!(client.read_capacity().expect("an answer"), 24 << 20);
    assert_eq!(write(&mut client, 23 << 20), Status::Ok);
    // Another program has made it larger.
    let image = std::fs::File::options().write(true).open(cluster.file("rbd.disk")).unwrap();
    image.set_len(32 << 20).unwrap();
    daemon.call(&["resize", "32M"]);
    assert_eq!(client.read_capacity().expect("an answer"), 32 << 20);
    assert_eq!(write(&mut client, 31 << 20), Status::Ok);
    daemon.end_server(Signal::KILL);
    assert_eq!(write(&mut client, 31 << 20), Status::Ok);
    assert_eq!(daemon.status()["capacity"], 32 << 20);
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn what_cannot_be_the_disk_is_refused_with_what_to_do() {
    let cluster = StandIn::new(16);
    let refused = |params: &[&str], sentence: &str| {
        let output = cluster.refused(params);
        assert_eq!(output.status, 1, "{params:?}: {}", output.stderr);
        assert!(output.stderr.contains(sentence), "{params:?}: {}", output.stderr);
    };
    refused(&[], "image=POOL/NAME");
    refused(&["image=disk"], "image=POOL/NAME");
    refused(&["image=rbd/none"], "there is no image rbd/none");
    refused(&["image=none/disk"], "the cluster has no pool `none`");
    refused(&["image=rbd/disk", "conf=/none"], "Ceph's configuration `/none` cannot be read");
    refused(&["image=rbd/disk", "id=client.vm"], "write id=vm");
    cluster.put("rbd.disk.unlocked", "");
    refused(&["image=rbd/disk"], "rbd feature enable rbd/disk exclusive-lock");
    cluster.remove("rbd.disk.unlocked");
    // It goes before what the client sets, and what is acknowledged would be in its process.
    cluster.put("rbd.disk.own.rbd_cache", "true");
    refused(&["image=rbd/disk"], "rbd config image rm rbd/disk rbd_cache");
    cluster.remove("rbd.disk.own.rbd_cache");
    cluster.put("stranger", "");
    refused(&["image=rbd/disk", "id=vm"], "does not let client.vm in");
    cluster.remove("stranger");
    cluster.put("deaf", "");
    refused(&["image=rbd/disk"], "no monitor of the cluster has answered");
    cluster.remove("deaf");
    // Opening does not end: it is given up.
    cluster.put("down", "");
    refused(&["image=rbd/disk"], "was not opened for 15 s");
    cluster.remove("down");
    assert_eq!(cluster.serve(&[]).terminate(), 0);
}

#[test]
fn without_the_library_the_package_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    // Whatever this system has: the linker looks here first, and finds no library.
    std::fs::write(folder.path().join("librados.so.2"), "no library").expect("written");
    let output = std::process::Command::new(guest_tests::daemon::binary("vhost-hotswap"))
        .env("LD_LIBRARY_PATH", folder.path())
        .arg("--socket-path")
        .arg(folder.path().join("v.sock"))
        .args(["--domain", "rbd", "--param", "image=rbd/disk"])
        .output()
        .expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("the package is librbd1"), "{said}");
}
