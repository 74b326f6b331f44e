//! What may go wrong with a disk in Ceph: at its start, with its lock, its pool and its OSDs.
//! `scripts/try-ceph` runs these; they are ignored elsewhere, because they need a cluster.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::ceph::{Ceph, wait_until};
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::{Daemon, run_daemon};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);

fn start(params: &[String], more: &[&str]) -> Daemon {
    let params: Vec<&str> = params.iter().map(String::as_str).collect();
    Daemon::start(&[&params, more].concat())
}

fn ask(client: &mut Client, request: Request<'_>, limit: Duration) -> Status {
    client.queue(0).execute(request, limit).expect("an answer").0
}

fn write(client: &mut Client, offset: u64) -> Status {
    ask(client, Request::Write { offset, data: &[9; 4096] }, 60 * SECOND)
}

fn read(client: &mut Client, offset: u64) -> Status {
    ask(client, Request::Read { offset, len: 4096 }, 60 * SECOND)
}

fn connect(daemon: &Daemon) -> Client {
    Client::connect(daemon.socket(), &Options::default()).expect("a client")
}

/// What the daemon says when it cannot start with these parameters, the later ones of a kind
/// counting.
#[track_caller]
fn refused(ceph: &Ceph, changed: &[&str], sentence: &str) {
    let folder = guest_tests::daemon::disk_directory();
    let socket = folder.path().join("v.sock");
    let usual = [format!("conf={}", ceph.conf().display()), "id=vm".to_owned()];
    let mut args = vec!["--socket-path", socket.to_str().expect("UTF-8"), "--domain", "rbd"];
    let key = |pair: &str| pair.split('=').next().map(str::to_owned);
    let kept = usual.iter().filter(|usual| !changed.iter().any(|it| key(it) == key(usual)));
    for pair in kept.map(String::as_str).chain(changed.iter().copied()) {
        args.extend(["--param", pair]);
    }
    let begun = Instant::now();
    let output = run_daemon(&args);
    assert_eq!(output.status, 1, "{}", output.stderr);
    assert!(output.stderr.contains(sentence), "{changed:?}: {}", output.stderr);
    println!("{changed:?} after {:?}: {}", begun.elapsed(), output.stderr.trim());
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn what_cannot_be_the_disk_is_refused_with_what_to_do() {
    let ceph = Ceph::given();
    let image = ceph.image("good", 16);
    let image = format!("image={}", image.name());
    refused(&ceph, &["image=rbd/none"], "there is no image rbd/none");
    refused(&ceph, &[&format!("{image}@none")], "there is no image rbd/good@none");
    refused(&ceph, &["image=nopool/good"], "the cluster has no pool `nopool`");
    refused(&ceph, &["image=good"], "write image=POOL/NAME");
    refused(&ceph, &[&image, "namespace=none"], "there is no image rbd/none/good");
    refused(&ceph, &[&image, "conf=/none/ceph.conf"], "Ceph's configuration `/none/ceph.conf`");
    refused(&ceph, &[&image, "id=stranger"], "there is no key for client.stranger");
    let with_line = |name: &str, line: &str| {
        let conf = std::fs::read_to_string(ceph.conf()).expect("the configuration");
        let path = ceph.folder().join(name);
        std::fs::write(&path, format!("{conf}\n{line}\n")).expect("written");
        format!("conf={}", path.display())
    };
    let wrong = ceph.folder().join("wrong.keyring");
    let wrong = with_line("wrong.conf", &format!("[client.vm]\nkeyring = {}", wrong.display()));
    refused(&ceph, &[&image, &wrong], "does not let client.vm in");
    ceph.run("rbd create rbd/unlocked --size 16M --image-feature layering");
    refused(&ceph, &["image=rbd/unlocked"], "rbd feature enable rbd/unlocked exclusive-lock");
    let mut daemon = start(&ceph.params("rbd/unlocked"), &["--param", "readonly=true"]);
    assert_eq!(daemon.stop().0, 0);
    ceph.run("rbd rm --no-progress rbd/unlocked");
    // Settings of its own, or of its pool, go before those of a client.
    let name = image.strip_prefix("image=").expect("its name");
    for (set, remove) in [
        (format!("image set {name} rbd_cache true"), format!("image rm {name} rbd_cache")),
        ("pool set rbd rbd_cache true".to_owned(), "pool rm rbd rbd_cache".to_owned()),
    ] {
        ceph.run(&format!("rbd config {set}"));
        refused(&ceph, &[&image], &format!("rbd config {remove}"));
        ceph.run(&format!("rbd config {remove}"));
    }
    // What may look and not use.
    ceph.run(&format!(
        "ceph auth get-or-create client.poor mon 'profile rbd' > {}/client.poor.keyring",
        ceph.folder().display()
    ));
    refused(&ceph, &[&image, "id=poor"], "client.poor may not use image rbd/good");
    ceph.run("ceph auth del client.poor");
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn a_monitor_that_is_down_is_waited_for_ten_seconds_at_the_start_and_by_no_guest() {
    let ceph = Ceph::given();
    let image = ceph.image("unmonitored", 16);
    let mut daemon = start(&image.params(), &[]);
    let mut client = connect(&daemon);
    assert_eq!(write(&mut client, 0), Status::Ok);
    ceph.kill("mon.a");
    let begun = Instant::now();
    let folder = guest_tests::daemon::disk_directory();
    let socket = folder.path().join("v.sock");
    let (image, conf) = (format!("image={}", image.name()), ceph.conf());
    let conf = format!("conf={}", conf.display());
    let command = guest_tests::daemon::binary("vhost-hotswap");
    let output = std::process::Command::new(command)
        .args(["--socket-path", socket.to_str().unwrap(), "--domain", "rbd"])
        .args(["--param", &image, "--param", &conf, "--param", "id=vm"])
        .output()
        .expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no monitor of the cluster has answered for 10 s"), "{said}");
    assert!(begun.elapsed() < 20 * SECOND, "{:?}", begun.elapsed());
    // What is connected goes on.
    assert_eq!(write(&mut client, 4096), Status::Ok);
    daemon.call(&["upgrade", "rbd"]);
    ceph.start("mon.a");
    ceph.run("ceph -s");
    assert_eq!(write(&mut client, 8192), Status::Ok);
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn a_second_daemon_is_refused_at_its_start() {
    let ceph = Ceph::given();
    let image = ceph.image("shared", 16);
    let mut first = start(&image.params(), &[]);
    let mut client = connect(&first);
    assert_eq!(write(&mut client, 0), Status::Ok);
    refused(&ceph, &[&format!("image={}", image.name())], "another program uses image rbd/shared");
    // One that waits for a guest by migration starts, and its guest's rings wait.
    let mut second = start(&image.params(), &["--param", "locking=late"]);
    let mut other = connect(&second);
    let early = other.queue(0).execute(Request::Read { offset: 0, len: 4096 }, SECOND);
    assert!(early.is_err(), "both run: {early:?}");
    assert_eq!(write(&mut client, 4096), Status::Ok);
    let status = wait_until(&second, 10 * SECOND, |now| now["claim"] == "waiting");
    println!("{}", status["claim"]);
    drop(client);
    // What it was asked before is answered now.
    wait_until(&second, 20 * SECOND, |now| now["claim"] == "claimed");
    drop(other);
    let mut other = connect(&second);
    assert_eq!(write(&mut other, 0), Status::Ok);
    // Another program does not get in between, either.
    let bench = format!("timeout 20 rbd bench --io-type write --io-total 4K {}", image.name());
    assert!(!ceph.succeeds(&bench), "another program wrote");
    assert_eq!(write(&mut other, 4096), Status::Ok);
    drop(other);
    assert_eq!((first.stop().0, second.stop().0), (0, 0), "{}{}", first.log(), second.log());
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn a_lock_that_was_broken_ends_the_disk_until_an_upgrade() {
    let ceph = Ceph::given();
    let image = ceph.image("broken", 16);
    let mut daemon = start(&image.params(), &[]);
    daemon.call(&["upgrade", "rbd"]);
    let mut client = connect(&daemon);
    assert_eq!(write(&mut client, 0), Status::Ok);
    // As another host would, whose operator says so.
    let name = image.name();
    let lock = ceph.run(&format!("rbd lock ls {name} --format json"));
    let lock: Value = serde_json::from_str(&lock).expect("JSON");
    let text = |key: &str| lock[0][key].as_str().expect("a text").to_owned();
    ceph.run(&format!("rbd lock rm {name} '{}' {}", text("id"), text("locker")));
    let status = write(&mut client, 4096);
    assert_eq!(status, Status::IoError, "{}", daemon.log());
    let status = wait_until(&daemon, 20 * SECOND, |now| now["state"] == "faulted");
    println!("{}", status["fault"]);
    assert!(daemon.log().contains("the lock of image rbd/broken was broken"), "{}", daemon.log());
    assert_eq!(write(&mut client, 8192), Status::IoError);
    assert_eq!(read(&mut client, 0), Status::IoError);
    daemon.call(&["upgrade", "rbd"]);
    assert_eq!(write(&mut client, 8192), Status::Ok, "{}", daemon.log());
    assert_eq!(read(&mut client, 0), Status::Ok);
    assert!(ceph.run(&format!("rbd lock ls {name}")).contains("client."), "it was not claimed");
    drop(client);
    daemon.stop();
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn a_full_pool_fails_writes_and_nothing_hangs() {
    let ceph = Ceph::given();
    let image = ceph.image("full", 64);
    let mut daemon = start(&image.params(), &[]);
    let mut client = connect(&daemon);
    assert_eq!(write(&mut client, 0), Status::Ok);
    let quota = Quota::new(&ceph);
    let deadline = Instant::now() + 120 * SECOND;
    // What is there can be changed.
    let mut offset = 1 << 20;
    while write(&mut client, offset) == Status::Ok {
        offset += 4096;
        assert!(Instant::now() < deadline, "the quota has no effect");
        thread::sleep(SECOND / 2);
    }
    let begun = Instant::now();
    assert_eq!(write(&mut client, 40 << 20), Status::IoError);
    assert_eq!(read(&mut client, 0), Status::Ok);
    ask(&mut client, Request::Flush, 10 * SECOND);
    daemon.call(&["upgrade", "rbd"]);
    assert!(begun.elapsed() < 10 * SECOND, "{:?}", begun.elapsed());
    assert!(daemon.log().contains("the pool is full"), "{}", daemon.log());
    drop(client);
    println!("stopped in {:?}", daemon.stop());
    // Whether one starts or says why not, it does so soon.
    let begun = Instant::now();
    let folder = guest_tests::daemon::disk_directory();
    let said = started(&ceph, &image.name(), folder.path());
    println!("on a full pool, after {:?}: {said}", begun.elapsed());
    assert!(begun.elapsed() < 30 * SECOND, "{:?}", begun.elapsed());
    drop(quota);
    let mut daemon = start(&image.params(), &[]);
    let mut client = connect(&daemon);
    assert_eq!(write(&mut client, 2 << 20), Status::Ok);
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

/// The pool has no room while this is there.
struct Quota<'ceph>(&'ceph Ceph);

impl<'ceph> Quota<'ceph> {
    fn new(ceph: &'ceph Ceph) -> Self {
        ceph.run("ceph osd pool set-quota rbd max_bytes 1");
        Quota(ceph)
    }
}

impl Drop for Quota<'_> {
    fn drop(&mut self) {
        self.0.succeeds("ceph osd pool set-quota rbd max_bytes 0");
        let deadline = Instant::now() + 120 * SECOND;
        while !self.0.succeeds("! ceph health detail | grep POOL_FULL") {
            if Instant::now() > deadline {
                return println!("the quota stays");
            }
            thread::sleep(SECOND / 2);
        }
    }
}

/// Starts a daemon for 5 s; what it has said.
fn started(ceph: &Ceph, image: &str, folder: &Path) -> String {
    let mut command = std::process::Command::new("timeout");
    command.arg("5").arg(guest_tests::daemon::binary("vhost-hotswap"));
    command.arg("--socket-path").arg(folder.join("v.sock")).args(ceph.params(image));
    let output = command.output().expect("it ends");
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn with_its_osd_down_requests_wait_and_commands_do_not() {
    let ceph = Ceph::given();
    let image = ceph.image("stalled", 64);
    let daemon = start(&image.params(), &[]);
    daemon.call(&["upgrade", "rbd"]);
    let options = LoadOptions { patience: 90 * SECOND, ..LoadOptions::new(1, 8) };
    let load = Load::start(daemon.socket(), &options);
    load.wait_for(50);
    ceph.kill("osd.0");
    thread::sleep(2 * SECOND);
    let before = load.ios();
    let begun = Instant::now();
    let sentence = daemon.refuse(&["upgrade", "rbd", "--mode", "handover"]);
    assert!(sentence.contains("drain_timeout"), "{sentence}");
    println!("with its OSD down, after {:?}: {sentence}", begun.elapsed());
    assert!(begun.elapsed() < 5 * SECOND, "{:?}", begun.elapsed());
    let status = daemon.status();
    assert_eq!(status["state"], "serving", "{status}");
    assert!(status["queues"][0]["in_flight"].as_u64() > Some(0), "{status}");
    assert_eq!(load.ios(), before, "what waits does not fail");
    ceph.start("osd.0");
    load.wait_for(100);
    daemon.call(&["upgrade", "rbd", "--drain-timeout-ms", "10000"]);
    load.wait_for(20);
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    // Nor does the end.
    let mut client = connect(&daemon);
    ceph.kill("osd.0");
    let offset = 4096;
    let stuck = client.queue(0).execute(Request::Write { offset, data: &[1; 4096] }, SECOND);
    assert!(stuck.is_err(), "{stuck:?}");
    let begun = Instant::now();
    daemon.signal(rustix::process::Signal::TERM);
    thread::sleep(SECOND);
    drop(client);
    let ended = (0..300).any(|_| {
        thread::sleep(SECOND / 10);
        !Path::new(&format!("/proc/{}/exe", daemon.pid())).exists()
            || std::fs::read_link(format!("/proc/{}/exe", daemon.pid())).is_err()
    });
    println!("ended after {:?}", begun.elapsed());
    ceph.start("osd.0");
    assert!(ended, "it does not end:\n{}", daemon.log());
}
