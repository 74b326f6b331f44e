//! A disk behind NBD servers that are slow, fail now and then, or keep a format of their own: what
//! is on the disk in the end, and what was made durable, is looked at where the server has it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::{Daemon, disk_directory};
use guest_tests::nbd::NbdServer;
use guest_tests::operator::Operator;
use guest_tests::stamp::{BLOCK, Load, LoadOptions, LoadReport, assert_intact};
use rustix::process::{Pid, Signal, kill_process};

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

fn serve(uri: &str) -> Daemon {
    Daemon::start(&["--domain", "nbd", "--param", uri, "--queues", "2"])
}

/// Few blocks, so that all of them can be read from a server that takes its time.
fn small_load() -> LoadOptions {
    LoadOptions { blocks_per_queue: 256, ..LoadOptions::new(2, 16) }
}

/// Loads a disk, with upgrades, rollbacks and two exchanges in the middle, until `is_enough`.
fn loaded_and_upgraded(
    daemon: &Daemon,
    options: &LoadOptions,
    is_enough: impl Fn() -> bool,
) -> LoadReport {
    let load = Load::start(daemon.socket(), options);
    let mut operator = Operator::new(daemon);
    let deadline = Instant::now() + 2 * PATIENCE;
    let mut round = 0;
    while round < 10 || !is_enough() {
        load.wait_for(50);
        operator.upgrade("nbd", "handover", &[]);
        if round % 5 == 4 {
            operator.roll_back("handover");
            daemon.call(&["upgrade-daemon", "--only", "server"]);
            operator = Operator::new(daemon);
        }
        round += 1;
        assert!(Instant::now() < deadline, "it does not come to that:\n{}", daemon.log());
    }
    load.wait_for(50);
    load.stop()
}

/// The requests of nbdkit's log filter that have failed.
fn failed(log: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).expect("nbdkit logs");
    text.lines().filter(|line| line.contains("return=-1")).map(str::to_owned).collect()
}

#[test]
fn a_server_that_takes_its_time_is_upgraded_over() {
    let delays = ["delay-read=8ms", "delay-write=12ms", "delay-zero=20ms", "delay-trim=20ms"];
    let server = NbdServer::nbdkit(&[&["--filter=delay", "memory", "64M"], &delays[..]].concat());
    let mut daemon = serve(&server.uri(""));
    let report = loaded_and_upgraded(&daemon, &small_load(), || true);
    report.assert_clean();
    let middle = report.latency.quantile(0.5);
    assert!(middle >= Duration::from_millis(8), "it was to take its time: {middle:?}");
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn each_error_of_the_server_is_one_of_the_guest_and_the_rest_is_right() {
    let mut server = NbdServer::prepared(
        &[
            "nbdkit",
            "--foreground",
            "--unix",
            "SOCKET",
            "--filter=log",
            "--filter=error",
            "memory",
            "64M",
            "logfile=FOLDER/log",
            "error-rate=3%",
            "error-file=FOLDER/fail",
        ],
        &[],
    );
    let (log, fail) = (server.folder().join("log"), server.folder().join("fail"));
    fs::write(&fail, "").expect("a file");
    server.start();
    let mut daemon = serve(&server.uri(""));
    let report = loaded_and_upgraded(&daemon, &small_load(), || failed(&log).len() > 20);
    fs::remove_file(&fail).expect("it was there");
    assert_eq!((report.mismatches, report.unanswered, report.spurious), (0, 0, 0), "{report:?}");
    assert_eq!(report.errors, failed(&log).len() as u64, "{report:?}");
    // What has failed holds the one or the other, and all else what was written.
    assert_intact(daemon.socket(), &report.ledgers);
    let lost = &daemon.status()["counters"]["nbd_connections_lost"];
    assert_eq!(lost.as_u64().unwrap_or(0), 0, "{}", daemon.log());
    daemon.stop();
}

#[test]
fn what_a_server_tries_again_the_guest_waits_for() {
    let server = NbdServer::nbdkit(&[
        "--filter=retry",
        "--filter=log",
        "--filter=error",
        "memory",
        "64M",
        "logfile=FOLDER/log",
        "error-rate=0.3%",
        "retry-delay=1",
        "retry-exponential=no",
        "retries=20",
    ]);
    let log = server.folder().join("log");
    let mut daemon = serve(&server.uri(""));
    let report = loaded_and_upgraded(&daemon, &small_load(), || failed(&log).len() >= 3);
    report.assert_clean();
    let longest = report.latency.quantile(1.0);
    assert!(longest >= SECOND, "nothing was tried again: {longest:?}");
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output();
    let output = output.expect("`scripts/setup` installs qemu-img");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said));
}

/// A raw copy of what was written and can be read. Where there may be anything, after a discard,
/// there is what `found` has.
fn copy_of(report: &LoadReport, len: u64, found: &Path, copy: &Path) {
    let found = fs::File::open(found).expect("what was found");
    let copy = fs::File::create(copy).expect("a file");
    copy.set_len(len).expect("its size");
    let (mut known, mut unknown) = (0, 0);
    for (offset, content) in report.ledgers.iter().flat_map(|ledger| ledger.contents()) {
        let content = content.unwrap_or_else(|| {
            let mut block = vec![0; BLOCK];
            found.read_exact_at(&mut block, offset).expect("as long as the disk");
            unknown += 1;
            block
        });
        known += 1;
        copy.write_all_at(&content, offset).expect("written");
    }
    assert!(unknown * 4 < known, "{unknown} of {known} blocks may hold anything");
}

#[test]
fn what_is_written_is_what_a_qcow2_image_holds_afterwards() {
    let folder = disk_directory();
    let at = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let (disk, found, copy) = (at("disk"), at("found"), at("copy"));
    qemu_img(&["create", "-q", "-f", "qcow2", &disk, "64M"]);
    let mut server = NbdServer::qemu_nbd(&["-e", "4", "-f", "qcow2", &disk]);
    let mut daemon = serve(&server.uri(""));
    let report = loaded_and_upgraded(&daemon, &LoadOptions::new(2, 16), || true);
    report.assert_clean();
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
    server.terminate();
    qemu_img(&["check", "-f", "qcow2", &disk]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &disk, &found]);
    copy_of(&report, 64 * MIB, Path::new(&found), Path::new(&copy));
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &disk, &copy]);
}

/// A library that counts what the server it is loaded into makes durable.
fn counter_of_syncs(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("stand-ins/syncs.c");
    let library = folder.join("syncs.so");
    let built = Command::new("cc")
        .args(["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status()
        .expect("cc, which builds Rust programs as well");
    assert!(built.success());
    library
}

/// Each flush of the guest is one sync of the server, and nothing else is.
fn assert_each_flush_is_a_sync(uri: &str, syncs: &Path) {
    let count = || fs::metadata(syncs).map_or(0, |file| file.len());
    let mut daemon = serve(uri);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a client");
    let mut execute = |request| {
        let answer = client.queue(0).execute(request, PATIENCE);
        assert_eq!(answer.expect("an answer").0, Status::Ok);
    };
    let data = vec![5; 4096];
    for round in 0..10 {
        let before = count();
        for block in 0..3 {
            execute(Request::Write { offset: (round * 3 + block) * 4096, data: &data });
        }
        assert_eq!(count(), before, "a write is not durable, and need not be");
        execute(Request::Flush);
        assert_eq!(count(), before + 1, "in round {round}");
    }
    drop(client);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn each_flush_of_the_guest_is_a_sync_of_qemu_nbd() {
    let folder = disk_directory();
    let syncs = folder.path().join("syncs");
    let library = counter_of_syncs(folder.path());
    let environment = [
        ("LD_PRELOAD", library.to_str().expect("UTF-8")),
        ("SYNCS", syncs.to_str().expect("UTF-8")),
    ];
    let image = folder.path().join("image");
    fs::File::create(&image).and_then(|file| file.set_len(MIB)).expect("an image");
    let image = image.to_str().expect("UTF-8");
    let server = NbdServer::with_environment(
        &["qemu-nbd", "--persistent", "--socket", "SOCKET", "-f", "raw", "-e", "4", image],
        &environment,
    );
    assert_each_flush_is_a_sync(&server.uri(""), &syncs);
}

#[test]
fn each_flush_of_the_guest_is_a_sync_of_nbd_server() {
    let folder = disk_directory();
    let at = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    fs::File::create(at("image")).and_then(|file| file.set_len(MIB)).expect("an image");
    let config = format!(
        "[generic]\nunixsock = {}\n[disk]\nexportname = {}\nfilesize = {MIB}\nflush = true\n",
        at("socket"),
        at("image")
    );
    fs::write(at("config"), config).expect("written");
    // It goes on in the background, and says which process that is.
    let started = Command::new("nbd-server")
        .args(["-C", &at("config"), "-p", &at("pid")])
        .env("LD_PRELOAD", counter_of_syncs(folder.path()))
        .env("SYNCS", at("syncs"))
        .status()
        .expect("`scripts/setup` installs it");
    assert!(started.success());
    let deadline = Instant::now() + PATIENCE;
    let pid = loop {
        let text = fs::read_to_string(at("pid")).unwrap_or_default();
        match text.trim().parse().ok().and_then(Pid::from_raw) {
            Some(pid) if UnixStream::connect(at("socket")).is_ok() => break pid,
            _ => thread::sleep(Duration::from_millis(2)),
        }
        assert!(Instant::now() < deadline, "nbd-server does not listen");
    };
    let uri = format!("uri=nbd+unix:///disk?socket={}", at("socket"));
    let tried = std::panic::catch_unwind(|| {
        assert_each_flush_is_a_sync(&uri, Path::new(&at("syncs")));
    });
    kill_process(pid, Signal::TERM).expect("it lives");
    if let Err(panic) = tried {
        std::panic::resume_unwind(panic);
    }
}
