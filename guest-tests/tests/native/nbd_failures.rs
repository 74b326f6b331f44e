//! A disk behind an NBD server that ends, dies, fails or holds things up, under a load that checks
//! every block: the guest waits, and nothing is lost, doubled or undone.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::{Daemon, run_daemon};
use guest_tests::nbd::NbdServer;
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

fn serve(server: &NbdServer, more: &[&str]) -> Daemon {
    let uri = server.uri("");
    let args = ["--domain", "nbd", "--param", &uri, "--queues", "2"];
    Daemon::start(&[&args[..], more].concat())
}

fn counter(daemon: &Daemon, name: &str) -> u64 {
    daemon.status()["counters"][name].as_u64().unwrap_or(0)
}

fn image(server: &NbdServer, bytes: u64) -> PathBuf {
    let path = server.folder().join("image");
    fs::File::create(&path).and_then(|file| file.set_len(bytes)).expect("an image");
    path
}

/// A server of an image of 64 MiB, `IMAGE` in its command.
fn of_image(command: &[&str]) -> NbdServer {
    let command: Vec<String> =
        command.iter().map(|word| word.replace("IMAGE", "FOLDER/image")).collect();
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let mut server = NbdServer::prepared(&command, &[]);
    image(&server, 64 * MIB);
    server.start();
    server
}

const NBDKIT: &[&str] = &["nbdkit", "-f", "--unix", "SOCKET", "file", "IMAGE"];
const QEMU_NBD: &[&str] = &["qemu-nbd", "-t", "-k", "SOCKET", "-f", "raw", "-e", "4", "IMAGE"];

/// Ends the server twenty times under load, and starts it again.
fn ended_twenty_times(command: &[&str], end: impl Fn(&mut NbdServer)) {
    let mut server = of_image(command);
    let mut daemon = serve(&server, &[]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    for round in 0..20 {
        load.wait_for(100);
        end(&mut server);
        thread::sleep(Duration::from_millis(30));
        server.start();
        load.wait_for(100);
        assert_eq!(load.faults(), 0, "in round {round}:\n{}", daemon.log());
    }
    let report = load.stop();
    report.assert_clean();
    assert!(counter(&daemon, "nbd_reconnects") >= 20, "{}", daemon.status());
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
}

#[test]
fn nbdkit_is_killed_twenty_times() {
    ended_twenty_times(NBDKIT, NbdServer::kill);
}

#[test]
fn nbdkit_is_ended_twenty_times() {
    ended_twenty_times(NBDKIT, NbdServer::terminate);
}

#[test]
fn qemu_nbd_is_killed_twenty_times() {
    ended_twenty_times(QEMU_NBD, NbdServer::kill);
}

#[test]
fn qemu_nbd_is_ended_twenty_times() {
    ended_twenty_times(QEMU_NBD, NbdServer::terminate);
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid as i32).expect("a process id");
    kill_process(pid, Signal::KILL).expect("it lives");
}

#[test]
fn our_own_process_is_killed_and_the_server_lives_on() {
    let server = of_image(NBDKIT);
    // Less than the load's patience.
    let mut daemon = serve(&server, &["--param", "settle=10"]);
    // nbdkit 1.32 may fail an assertion (`raw_send_socket`) when a client with requests in flight
    // has gone.
    let server = server.keep_running();
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 8));
    let mut unknown = 0;
    for round in 1..=10 {
        load.wait_for(100);
        kill(daemon.server_pid());
        let deadline = Instant::now() + PATIENCE;
        while daemon.status()["server"]["recoveries"].as_u64() < Some(round) {
            assert!(Instant::now() < deadline, "{}", daemon.log());
            thread::sleep(Duration::from_millis(2));
        }
        load.wait_for(500);
        assert_eq!(load.faults(), 0, "in round {round}:\n{}", daemon.log());
        unknown = counter(&daemon, "nbd_unknown_changes");
    }
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
    // Some 80 were in flight. Their answers were waiting in the sockets, but for those of a server
    // that has failed itself: up to 16 each time.
    println!("changes of which it was not known whether they had ended: {unknown}");
    assert!(unknown < 30 + 16 * server.end(), "{unknown} changes are waited for in vain");
}

/// A server whose first write of all takes 2.5 s, even if nothing waits for it any more. `options`
/// are nbdkit's.
fn slow_once(options: &[&str]) -> NbdServer {
    const PWRITE: &str = "pwrite=cat > FOLDER/data.$$; \
         if mkdir FOLDER/slow 2>/dev/null; then sleep 2.5; fi; \
         dd if=FOLDER/data.$$ of=FOLDER/image oflag=seek_bytes conv=notrunc seek=$4 2>/dev/null; \
         rm FOLDER/data.$$";
    let eval = [
        "eval",
        "thread_model=echo parallel",
        "get_size=echo 1048576",
        "can_multi_conn=exit 0",
        "can_flush=exit 0",
        "flush=exit 0",
        "can_write=exit 0",
        "pread=dd if=FOLDER/image iflag=skip_bytes,count_bytes skip=$4 count=$3 2>/dev/null",
        PWRITE,
    ];
    let command = [&["nbdkit", "--unix", "SOCKET"], options, &eval].concat();
    let mut server = NbdServer::prepared(&command, &[]);
    image(&server, MIB);
    server.start();
    server
}

/// What a block holds in the end that was written with 1, held up, its connection cut, and then
/// with 2.
fn written_over(server: &NbdServer, settle: &str) -> (u8, Duration) {
    let mut daemon = serve(server, &["--param", settle]);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a client");
    let write = |client: &mut Client, byte: u8| {
        let data = vec![byte; 4096];
        let answer =
            client.queue(0).execute(Request::Write { offset: 8192, data: &data }, PATIENCE);
        assert_eq!(answer.expect("an answer").0, Status::Ok, "{}", daemon.log());
    };
    let process = daemon.server_pid();
    let cut = thread::spawn(move || {
        thread::sleep(Duration::from_millis(700));
        kill(process);
    });
    let begun = Instant::now();
    write(&mut client, 1);
    cut.join().expect("killed");
    assert!(begun.elapsed() < Duration::from_millis(2400), "it was to be held up and cut");
    // What does not overlap it goes on.
    let data = vec![3; 4096];
    let other = client.queue(0).execute(Request::Write { offset: 0, data: &data }, SECOND);
    assert_eq!(other.expect("at once").0, Status::Ok);
    write(&mut client, 2);
    let waited = begun.elapsed();
    thread::sleep(Duration::from_millis(3500).saturating_sub(begun.elapsed()));
    let read = client.queue(0).execute(Request::Read { offset: 8192, len: 4096 }, PATIENCE);
    let data = read.expect("an answer").1;
    assert!(data.iter().all(|byte| *byte == data[0]), "one of the two");
    drop(client);
    daemon.stop();
    (data[0], waited)
}

#[test]
fn an_old_write_does_not_land_on_a_newer_one() {
    let (found, waited) = written_over(&slow_once(&["-f"]), "settle=3");
    assert_eq!(found, 2, "the newer write was undone");
    assert!(waited > 3 * SECOND, "{waited:?}");
}

/// What listens has ended then, and is not the server.
#[test]
fn an_old_write_does_not_land_on_a_newer_one_of_a_server_in_the_background() {
    let server = slow_once(&["-P", "FOLDER/pid"]);
    let (found, waited) = written_over(&server, "settle=3");
    let pid = fs::read_to_string(server.folder().join("pid")).expect("it says which it is");
    kill(pid.trim().parse().expect("a process id"));
    assert_eq!(found, 2, "the newer write was undone");
    assert!(waited > 3 * SECOND, "{waited:?}");
}

#[test]
fn without_the_wait_it_does() {
    let (found, _) = written_over(&slow_once(&["-f"]), "settle=0");
    assert_eq!(found, 1, "this shows what the wait is good for");
}

#[test]
fn a_request_that_kills_its_server_is_answered_with_an_error_and_the_rest_goes_on() {
    let mut server = NbdServer::prepared(
        &[
            "nbdkit",
            "-f",
            "--unix",
            "SOCKET",
            "-P",
            "FOLDER/pid",
            "eval",
            "thread_model=echo parallel",
            "get_size=echo 1048576",
            "can_multi_conn=exit 0",
            "can_flush=exit 0",
            "pread=if [ $4 = 4096 ]; then kill -9 $(cat FOLDER/pid); fi; head -c $3 /dev/zero",
        ],
        &[],
    );
    server.start();
    let mut daemon = serve(&server, &["--param", "readonly=true"]);
    let options = Options { queues: 2, ..Options::default() };
    let client = Client::connect(daemon.socket(), &options).expect("a client");
    let server = server.keep_running();
    let mut queues = client.into_queues();
    let mut other = queues.pop().expect("two");
    let rest = thread::spawn(move || {
        for _ in 0..60 {
            let read = Request::Read { offset: 65536, len: 4096 };
            let status = other.execute(read, PATIENCE).expect("an answer").0;
            assert_eq!(status, Status::Ok);
            thread::sleep(Duration::from_millis(20));
        }
    });
    let read = Request::Read { offset: 4096, len: 512 };
    let status = queues[0].execute(read, PATIENCE).expect("an answer").0;
    assert_eq!(status, Status::IoError, "{}", daemon.log());
    rest.join().unwrap_or_else(|_| panic!("the rest goes on:\n{}", daemon.log()));
    assert!(server.end() > 0);
    assert_eq!(counter(&daemon, "nbd_quarantined"), 1, "{}", daemon.status());
    assert_eq!(daemon.stop().0, 0);
}

#[test]
fn with_a_timeout_requests_end_with_errors_until_the_server_is_back() {
    let mut server = NbdServer::nbdkit(&["memory", "1M"]);
    let mut daemon = serve(&server, &["--param", "timeout=1"]);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a client");
    let mut read = |limit| {
        let begun = Instant::now();
        let read = Request::Read { offset: 0, len: 4096 };
        (client.queue(0).execute(read, limit).expect("an answer").0, begun.elapsed())
    };
    assert_eq!(read(5 * SECOND).0, Status::Ok);
    server.kill();
    let (status, took) = read(10 * SECOND);
    assert_eq!(status, Status::IoError);
    assert!(took > SECOND / 2 && took < 5 * SECOND, "{took:?}");
    server.start();
    let deadline = Instant::now() + PATIENCE;
    while read(10 * SECOND).0 != Status::Ok {
        assert!(Instant::now() < deadline, "{}", daemon.log());
    }
    assert_eq!(daemon.stop().0, 0);
}

#[test]
fn a_sector_that_cannot_be_read_is_an_error_each_time_and_no_more() {
    const INJECT: &str = "driver=blkdebug,image.driver=file,image.filename=FOLDER/image,\
         inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,\
         inject-error.0.sector=100000";
    let mut server = NbdServer::prepared(
        &["qemu-nbd", "-t", "-k", "SOCKET", "-e", "4", "--image-opts", INJECT],
        &[],
    );
    image(&server, 64 * MIB);
    server.start();
    let mut daemon = serve(&server, &[]);
    let options = LoadOptions::new(2, 16);
    let load = Load::start(daemon.socket(), &options);
    load.wait_for(200);
    drop(load.stop());
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a client");
    for _ in 0..5 {
        let read = Request::Read { offset: 100_000 * 512, len: 512 };
        assert_eq!(client.queue(0).execute(read, PATIENCE).expect("an answer").0, Status::IoError);
        let read = Request::Read { offset: 100_001 * 512, len: 512 };
        assert_eq!(client.queue(0).execute(read, PATIENCE).expect("an answer").0, Status::Ok);
    }
    assert_eq!(counter(&daemon, "nbd_connections_lost"), 0, "{}", daemon.log());
    drop(client);
    assert_eq!(daemon.stop().0, 0);
}

/// What the daemon says when it cannot start with these parameters.
fn refused(socket: &str, args: &[&str]) -> String {
    let output = run_daemon(&[&["--socket-path", socket, "--domain", "nbd"], args].concat());
    assert_eq!(output.status, 1, "{}", output.stderr);
    output.stderr
}

#[test]
fn what_cannot_be_the_disk_is_refused_with_what_to_do() {
    let folder = guest_tests::daemon::disk_directory();
    let at = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let missing = format!("uri=nbd+unix:///?socket={}", at("none"));
    let said = refused(&at("v.sock"), &["--param", &missing]);
    assert!(said.contains("start the server"), "{said}");
    // nbd-server, with what its configuration has by default, and with what cures it.
    for (flush, works) in [("", false), ("flush = true\n", true)] {
        // It removes its own when it ends.
        let pid_file = at(&format!("pid{works}"));
        fs::File::create(at("image")).and_then(|file| file.set_len(MIB)).expect("an image");
        let config = format!(
            "[generic]\nunixsock = {}\n[disk]\nexportname = {}\nfilesize = {MIB}\n{flush}",
            at("socket"),
            at("image")
        );
        fs::write(at("config"), config).expect("written");
        let _ = fs::remove_file(at("socket"));
        // It goes on in the background.
        let started = Command::new("nbd-server")
            .args(["-C", &at("config"), "-p", &pid_file])
            .status()
            .expect("`scripts/setup` installs it");
        assert!(started.success());
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(at("socket")).is_err() {
            assert!(Instant::now() < deadline, "nbd-server does not listen");
            thread::sleep(Duration::from_millis(2));
        }
        // It may be written after the socket is there.
        let read =
            || fs::read_to_string(&pid_file).ok()?.trim().parse().ok().and_then(Pid::from_raw);
        let pid = loop {
            assert!(Instant::now() < deadline, "nbd-server does not say which process it is");
            match read() {
                Some(pid) => break pid,
                None => thread::sleep(Duration::from_millis(2)),
            }
        };
        let uri = format!("uri=nbd+unix:///disk?socket={}", at("socket"));
        if works {
            let wrong = format!("uri=nbd+unix:///disc?socket={}", at("socket"));
            let said = refused(&at("v.sock"), &["--param", &wrong]);
            assert!(said.contains("no export of this name"), "{said}");
            let mut daemon = Daemon::start(&["--domain", "nbd", "--param", &uri]);
            let mut client =
                Client::connect(daemon.socket(), &Options::default()).expect("a client");
            let data = vec![7; 4096];
            for request in [Request::Write { offset: 0, data: &data }, Request::Flush] {
                let status = client.queue(0).execute(request, PATIENCE).expect("an answer").0;
                assert_eq!(status, Status::Ok);
            }
            drop(client);
            assert_eq!(daemon.stop().0, 0);
        } else {
            let said = refused(&at("v.sock"), &["--param", &uri]);
            assert!(said.contains("flush = true"), "{said}");
        }
        kill_process(pid, Signal::TERM).expect("it lives");
    }
}

/// Formats that qemu-nbd serves.
fn of_format(format: &str, more: &[&str]) {
    let folder = guest_tests::daemon::disk_directory();
    let path = folder.path().join("disk").to_str().expect("UTF-8").to_owned();
    let secret = "secret,id=key,data=secret";
    let mut create = vec!["create", "-q", "--object", secret, "-f", format];
    create.extend_from_slice(more);
    create.extend_from_slice(&[&path, "64M"]);
    // To make a LUKS header it measures how fast the CPU is, and fails where it is given too little
    // of one ("Unable to get accurate CPU usage").
    let is_made =
        |_: &i32| Command::new("qemu-img").args(&create).status().expect("it runs").success();
    assert!((0..50).find(is_made).is_some(), "qemu-img makes no {format}");
    let options = match format {
        "luks" => format!("driver=luks,key-secret=key,file.filename={path}"),
        _ => format!("driver={format},file.filename={path}"),
    };
    let server = NbdServer::qemu_nbd(&["-e", "4", "--object", secret, "--image-opts", &options]);
    let mut daemon = serve(&server, &[]);
    // A new encrypted disk holds anything.
    let options = LoadOptions::new(2, 16);
    let options = if format == "luks" { options.on_unknown_content() } else { options };
    let load = Load::start(daemon.socket(), &options);
    for _ in 0..10 {
        load.wait_for(100);
        daemon.call(&["upgrade", "nbd"]);
    }
    let report = load.stop();
    report.assert_clean();
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.stop().0, 0, "{}", daemon.log());
    let mut server = server;
    server.terminate();
    if format == "qcow2" {
        let check = Command::new("qemu-img").args(["check", &path]).output().expect("it runs");
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    }
}

#[test]
fn a_qcow2_image_is_served_by_qemu_nbd_and_is_clean_afterwards() {
    of_format("qcow2", &[]);
}

#[test]
fn an_encrypted_image_is_served_by_qemu_nbd() {
    of_format("luks", &["-o", "key-secret=key,iter-time=10"]);
}

/// A daemon whose status is looked at: the counters there are documented.
#[test]
fn counters_say_what_has_happened() {
    let mut server = NbdServer::nbdkit(&["memory", "1M"]);
    let mut daemon = serve(&server, &[]);
    server.kill();
    server.start();
    let deadline = Instant::now() + PATIENCE;
    while counter(&daemon, "nbd_reconnects") == 0 {
        assert!(Instant::now() < deadline, "{}", daemon.log());
        thread::sleep(Duration::from_millis(5));
    }
    let status: Value = daemon.status();
    assert_eq!(status["counters"]["nbd_connections_lost"], 1, "{status}");
    assert_eq!(daemon.stop().0, 0);
}
