//! What a host does to its processes, and what a disk must not end or be lost by.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::{Daemon, binary, disk_directory, run_ctl};
use guest_tests::stamp::{Load, LoadOptions, run_load};
use rustix::process::{Pid, Signal, kill_process};

const SECOND: Duration = Duration::from_secs(1);

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A file of zeros.
fn image(path: &Path, bytes: u64) {
    File::create(path).and_then(|file| file.set_len(bytes)).expect("an image");
}

/// Runs a program, unless it is not installed or the system does not let us.
fn permitted(program: &str, args: &[&str]) -> bool {
    let worked =
        Command::new(program).args(args).output().is_ok_and(|output| output.status.success());
    if !worked {
        println!("skipped: {program} {args:?} does not work here");
    }
    worked
}

/// Those that end the daemon as its table says (HUP, INT, QUIT, TERM, XCPU), those that say that
/// it is broken, and the two that no process can refuse.
const FATAL: [i32; 14] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 19, 24, 31];

#[test]
fn a_stray_signal_takes_no_disk_away() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=1M"]);
    let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a session");
    for signal in (1..=64).filter(|signal| !FATAL.contains(signal)) {
        let kill = format!("kill -{signal} {}", daemon.pid());
        let sent = Command::new("sh").args(["-c", &kill]).status().expect("a shell");
        assert!(sent.success(), "{kill}");
        let (status, _) = client
            .queue(0)
            .execute(Request::Write { offset: 0, data: &[1; 512] }, 10 * SECOND)
            .unwrap_or_else(|error| panic!("after signal {signal}: {error}"));
        assert_eq!(status, Status::Ok, "after signal {signal}");
        assert_eq!(daemon.status()["state"], "serving", "after signal {signal}");
    }
    drop(client);
    assert_eq!(daemon.terminate(), 0);
}

/// As a debugger, a terminal and a container's freezer do it: waits are interrupted.
#[test]
fn a_stop_is_a_pause_and_no_more() {
    for domain in ["ramdisk", "file"] {
        let directory = disk_directory();
        let path = directory.path().join("disk.img");
        image(&path, 64 << 20);
        let args = match domain {
            "file" => vec!["--blk-file", text(&path), "--param", "direct=true", "--queues", "2"],
            _ => vec!["--domain", domain, "--queues", "2"],
        };
        let daemon = Daemon::start(&args);
        let load = Load::start(daemon.socket(), &LoadOptions::new(2, 16));
        for _ in 0..30 {
            load.wait_for(50);
            daemon.signal(Signal::STOP);
            thread::sleep(SECOND / 100);
            daemon.signal(Signal::CONT);
        }
        load.stop().assert_clean();
        // And while everything sleeps.
        daemon.signal(Signal::STOP);
        daemon.signal(Signal::CONT);
        run_load(daemon.socket(), &LoadOptions::new(2, 16).on_unknown_content(), SECOND / 5)
            .assert_clean();
        assert_eq!(daemon.terminate(), 0);
    }
}

#[test]
fn the_end_of_the_cpu_time_is_an_end_in_order() {
    let mut daemon = Daemon::start(&["--domain", "ramdisk"]);
    let (code, _) = daemon.stop_with(Signal::XCPU);
    assert_eq!(code, 0, "{}", daemon.log());
    assert!(!daemon.socket().exists() && !daemon.control().exists(), "the sockets are left");
}

#[test]
fn a_daemon_whose_socket_can_be_seen_can_be_ended() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for start in 0..100 {
        let socket = directory.path().join(start.to_string());
        let mut child = Command::new(binary("vhost-hotswap"))
            .arg("--socket-path")
            .arg(&socket)
            .args(["--domain", "empty"])
            .stderr(Stdio::null())
            .spawn()
            .expect("vhost-hotswap can be started");
        wait_until("a socket", || socket.symlink_metadata().is_ok());
        kill_process(Pid::from_child(&child), Signal::TERM).expect("it lives");
        let status = child.wait().expect("the child can be waited for");
        assert_eq!(status.code(), Some(0), "start {start}: {status}");
        assert!(
            fs::read_dir(directory.path()).expect("the directory").next().is_none(),
            "start {start}"
        );
    }
}

#[test]
fn a_parent_that_blocks_or_ignores_signals_leaves_ways_to_end_the_daemon() {
    for how in ["--block-signal", "--ignore-signal=TERM,CHLD,PIPE"] {
        if !permitted("env", &[how, "true"]) {
            continue;
        }
        let mut command = Command::new("env");
        command.arg(how).arg(binary("vhost-hotswap"));
        let daemon = Daemon::start_command(command, &["--domain", "ramdisk"]);
        assert_eq!(daemon.terminate(), 0, "{how}");
    }
}

#[test]
fn a_write_beyond_the_limit_of_a_files_size_fails_alone() {
    let directory = disk_directory();
    let path = directory.path().join("disk.img");
    for direct in ["false", "true"] {
        image(&path, 8 << 20);
        // In units of 512 bytes: half of the image.
        let daemon = Daemon::start_with_ulimit(
            "-f 8192",
            &["--blk-file", text(&path), "--param", &format!("direct={direct}")],
        );
        let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a session");
        let mut write = |offset: u64, what: u8| {
            let request = Request::Write { offset, data: &[what; 8192] };
            client.queue(0).execute(request, PATIENCE).expect("an answer").0
        };
        assert_eq!(write(0, 1), Status::Ok);
        assert_eq!(write(6 << 20, 2), Status::IoError, "direct={direct}");
        assert_eq!(write((4 << 20) - 4096, 3), Status::IoError, "direct={direct}: half of it");
        assert_eq!(write(4096, 4), Status::Ok);
        let status = daemon.status();
        assert_eq!(
            (&status["state"], &status["queues"][0]["errors"]),
            (&"serving".into(), &2.into())
        );
        drop(client);
        assert_eq!(daemon.terminate(), 0);
        let mut block = [0; 12288];
        File::open(&path).and_then(|file| file.read_exact_at(&mut block, 0)).expect("the image");
        assert!(block[..4096] == [1; 4096] && block[4096..] == [4; 8192], "direct={direct}");
    }
}

#[test]
fn a_log_that_has_reached_the_limit_of_a_files_size_stops_nothing() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let log = directory.path().join("log");
    image(&log, 8 << 20);
    let stderr = File::options().append(true).open(&log).expect("the log");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 8192 && exec \"$0\" \"$@\""]).arg(binary("vhost-hotswap"));
    let daemon = Daemon::start_command_with_stderr(
        command,
        stderr.into(),
        &["--domain", "ramdisk", "--param", "size=1M"],
    );
    daemon.refuse(&["upgrade", "no_such_domain"]);
    assert_eq!(daemon.status()["state"], "serving");
    assert_eq!(daemon.terminate(), 0);
    assert_eq!(fs::metadata(&log).expect("the log").len(), 8 << 20);
}

/// Runs what follows in a namespace of its own, and ends it with the program that made it.
fn in_namespace(which: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command.args(which).args(["--fork", "--kill-child"]).arg(binary("vhost-hotswap"));
    command
}

#[test]
fn whoever_is_outside_of_the_daemons_pid_namespace_can_command_it() {
    if !permitted("unshare", &["--pid", "--fork", "true"]) {
        return;
    }
    let daemon = Daemon::start_command(in_namespace(&["--pid"]), &["--domain", "ramdisk"]);
    assert_eq!(daemon.call(&["upgrade", "ramdisk_v2"])["generation"], 2);
    daemon.call(&["shutdown"]);
}

/// `vm.memfd_noexec` is of a PID namespace. With 2 the kernel gives no memfd that can be executed.
#[test]
fn a_system_without_executable_memfds_has_every_change() {
    let knob = "/proc/sys/vm/memfd_noexec";
    let set = format!("echo 2 > {knob} && test \"$(cat {knob})\" = 2");
    let namespaces = ["--user", "--map-root-user", "--pid", "--fork", "--kill-child"];
    if !permitted("unshare", &[&namespaces[..], &["--mount-proc", "sh", "-c", &set]].concat()) {
        return;
    }
    let mut command = Command::new("unshare");
    command.args(namespaces).args(["--mount-proc", "sh", "-c"]);
    command.arg(format!("{set} && exec \"$0\" \"$@\"")).arg(binary("vhost-hotswap"));
    let daemon = Daemon::start_command(command, &["--domain", "ramdisk", "--param", "size=16M"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(1, 8));
    load.wait_for(100);
    assert_eq!(daemon.call(&["upgrade", "ramdisk_v2"])["generation"], 2);
    load.wait_for(100);
    daemon.call(&["upgrade-daemon"]);
    load.wait_for(100);
    load.stop().assert_clean();
    daemon.call(&["shutdown"]);
}

/// Linux 6.3 to 6.5, where that is 2, refuses a memfd that does not say so itself.
#[test]
fn no_memory_file_of_the_daemon_can_be_executed() {
    /// `F_SEAL_EXEC`, since Linux 6.3.
    const EXEC: u32 = 0x20;
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=16M"]);
    daemon.call(&["upgrade", "ramdisk_v2"]);
    let _client = Client::connect(daemon.socket(), &Options::default()).expect("a session");
    let mut seen = Vec::new();
    for pid in [daemon.pid(), daemon.server_pid()] {
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            let name = target.to_string_lossy().into_owned();
            let is_ours = name.contains("memfd:hotswap-");
            let Some(file) = File::open(fd.path()).ok().filter(|_| is_ours) else { continue };
            let seals = rustix::fs::fcntl_get_seals(&file).expect("it can be sealed");
            seen.push((name, seals.bits() & EXEC != 0));
        }
    }
    if Command::new("uname").arg("-r").output().is_ok_and(|out| is_before_6_3(&out.stdout)) {
        println!("skipped: this kernel has no such memfds");
        return;
    }
    for kind in ["hotswap-module-", "hotswap-region-", "hotswap-inflight"] {
        assert!(seen.iter().any(|(name, _)| name.contains(kind)), "no {kind} in {seen:?}");
    }
    assert!(seen.iter().all(|(_, is_sealed)| *is_sealed), "{seen:?}");
}

fn is_before_6_3(release: &[u8]) -> bool {
    let release = String::from_utf8_lossy(release);
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version < (6, 3)
}

#[test]
fn a_user_without_a_number_in_the_daemons_namespace_is_not_taken_for_its_own() {
    if !permitted("unshare", &["--user", "true"]) {
        return;
    }
    // Without a map every user is 65534 there, the daemon as well.
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("socket");
    let control = directory.path().join("control");
    let mut child = in_namespace(&["--user"])
        .arg("--socket-path")
        .arg(&socket)
        .arg("--control-path")
        .arg(&control)
        .spawn()
        .expect("unshare can be started");
    wait_until("a control socket", || control.exists());
    let output = run_ctl(&["--control-path", text(&control), "status"]);
    let _ = child.kill();
    child.wait().expect("the child can be waited for");
    assert_eq!(output.status, 1, "{output:?}");
    assert!(output.stderr.contains("no number in its user namespace"), "{output:?}");
    assert!(output.stderr.contains("(permission_denied)"), "{output:?}");
}

#[test]
fn root_of_the_daemons_user_namespace_can_command_it() {
    if !permitted("unshare", &["--user", "--map-root-user", "true"]) {
        return;
    }
    let daemon = Daemon::start_command(
        in_namespace(&["--user", "--map-root-user"]),
        &["--domain", "ramdisk"],
    );
    assert_eq!(daemon.status()["state"], "serving");
    daemon.call(&["shutdown"]);
}

#[test]
fn what_can_be_seen_of_a_daemon_that_starts_can_be_connected_to() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let connect_at_sight = |path: &Path| {
        let deadline = Instant::now() + PATIENCE;
        while path.symlink_metadata().is_err() {
            assert!(Instant::now() < deadline, "no {}", path.display());
        }
        UnixStream::connect(path)
    };
    let mut names = Vec::new();
    for start in 0..300 {
        let socket = directory.path().join(format!("{start}.sock"));
        let control = directory.path().join(format!("{start}.sock.control"));
        let mut child = Command::new(binary("vhost-hotswap"))
            .arg("--socket-path")
            .arg(&socket)
            .args(["--domain", "empty"])
            .stderr(Stdio::null())
            .spawn()
            .expect("vhost-hotswap can be started");
        let connected = [connect_at_sight(&socket), connect_at_sight(&control)];
        child.kill().and_then(|()| child.wait()).expect("the daemon lives");
        for (connected, path) in connected.into_iter().zip([socket, control]) {
            connected.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            names.push(path);
        }
    }
    let mut left: Vec<_> = fs::read_dir(directory.path())
        .expect("the directory")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    left.sort();
    names.sort();
    assert_eq!(left, names, "other names are left");
}

#[test]
fn without_standard_descriptors_nothing_of_the_daemons_goes_to_the_image() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("disk.img");
    image(&path, 1 << 20);
    for closed in ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-", "0<&-"] {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec \"$0\" \"$@\" {closed}")]).arg(binary("vhost-hotswap"));
        let daemon = Daemon::start_command(command, &["--blk-file", text(&path)]);
        daemon.refuse(&["upgrade", "no_such_domain"]);
        let mut client = Client::connect(daemon.socket(), &Options::default()).expect("a session");
        let write = Request::Write { offset: 4096, data: &[7; 4096] };
        assert_eq!(client.queue(0).execute(write, PATIENCE).expect("an answer").0, Status::Ok);
        drop(client);
        assert_eq!(daemon.terminate(), 0, "{closed}");
        let written = fs::read(&path).expect("the image");
        let right = |(at, &byte): (usize, &u8)| byte == if at / 4096 == 1 { 7 } else { 0 };
        assert!(written.len() == 1 << 20 && written.iter().enumerate().all(right), "{closed}");
    }
}

#[test]
fn a_umask_takes_no_socket_away_from_its_owner() {
    use std::os::unix::fs::PermissionsExt;
    for umask in ["777", "277", "0"] {
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")])
            .arg(binary("vhost-hotswap"));
        let daemon = Daemon::start_command(command, &["--domain", "ramdisk"]);
        for path in [daemon.socket(), daemon.control()] {
            let mode = path.metadata().expect("a socket").permissions().mode();
            assert_eq!(mode & 0o7777, 0o600, "{umask}: {}", path.display());
        }
    }
}

#[test]
fn what_is_not_used_need_not_be_known() {
    // As where there are more CPUs than a set of them has room for, or in a sandbox.
    let failing =
        ["-f", "-o", "/dev/null", "-e", "inject=sched_getaffinity,renameat2:error=EINVAL"];
    if !permitted("strace", &[&failing[..], &["true"]].concat()) {
        return;
    }
    let mut command = Command::new("strace");
    command.args(failing).arg(binary("vhost-hotswap"));
    let daemon = Daemon::start_command(command, &["--domain", "ramdisk"]);
    assert_eq!(daemon.call(&["upgrade", "ramdisk_v2"])["generation"], 2);
    daemon.call(&["shutdown"]);
    wait_until("the end", || !daemon.socket().exists());
}

#[test]
fn modules_are_loaded_where_memory_files_must_not_be_executable() {
    // It holds in the PID namespace of the process that sets it.
    let forbid = "echo 2 > /proc/sys/vm/memfd_noexec";
    if !permitted("unshare", &["--pid", "--fork", "sh", "-c", forbid]) {
        return;
    }
    let mut command = Command::new("unshare");
    command.args([
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        &format!("{forbid}; exec \"$0\" \"$@\""),
    ]);
    command.arg(binary("vhost-hotswap"));
    let daemon = Daemon::start_command(command, &["--domain", "ramdisk"]);
    assert_eq!(daemon.call(&["upgrade", "ramdisk_v2"])["generation"], 2);
    daemon.call(&["shutdown"]);
}

#[test]
fn without_proc_the_daemon_says_what_it_misses_and_takes_no_code_from_anywhere_else() {
    let hide = "mount -t tmpfs none /proc";
    if !permitted("unshare", &["--mount", "sh", "-c", hide]) {
        return;
    }
    // Modules in the current directory are none of its own.
    let modules = binary("vhost-hotswap").parent().expect("a directory").to_owned();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &format!("{hide}; exec \"$0\" \"$@\"")])
        .arg(binary("vhost-hotswap"))
        .arg("--socket-path")
        .arg(directory.path().join("socket"))
        .args(["--domain", "ramdisk"])
        .current_dir(modules)
        .output()
        .expect("unshare can be started");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("/proc") && said.contains("mount it"), "{said}");
    assert_eq!(fs::read_dir(directory.path()).expect("the directory").count(), 0);
}

#[test]
fn a_sentence_that_cannot_be_said_is_no_panic() {
    // At the limit of a file's size nothing can be written to it.
    let directory = tempfile::tempdir().expect("a temporary directory");
    let log = File::create(directory.path().join("log")).expect("a log");
    let status = Command::new("sh")
        .args(["-c", "ulimit -f 0 && exec \"$0\" \"$@\""])
        .arg(binary("vhost-hotswap"))
        .arg("--socket-path")
        .arg(directory.path().join("socket"))
        .stderr(log)
        .status()
        .expect("a shell");
    assert_eq!(status.code(), Some(1));
}

/// Waits until something is so.
#[track_caller]
fn wait_until(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "it never comes: {what}");
        thread::yield_now();
    }
}
