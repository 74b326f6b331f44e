//! The demo: a Linux guest does checked I/O on two vhost-user disks while the code behind them is
//! replaced again and again, and the processes that serve them are killed and exchanged.
//!
//! It tells what it does while it does it, and in the end what the guest felt. Everything that is
//! shown happened: upgrades are done by `hotswapctl`, latencies come from the guest's own log of
//! every request, and the exit status is 0 only if no request failed, no block was wrong, and no
//! upgrade ended otherwise than announced.
//!
//! `--sabotage` lets one request fail on purpose, to see that the demo notices.

mod guest_view;
mod screen;

use std::fs::{self, File};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::daemon::{Daemon, module};
use guest_tests::debian::Debian;
use guest_tests::guest::{Guest, GuestOptions};
use guest_tests::peer::Peer;
use guest_view::{GuestView, Latencies, Run};
use rustix::process::Signal;
use screen::{Screen, Tone, grouped};
use serde_json::{Value, json};

/// How long `fio` runs on the disk in memory, and on the image file.
const MEMORY_SECONDS: u64 = 24;
const FILE_SECONDS: u64 = 16;
/// How long it runs while the daemon's processes are replaced, and while a peer is restarted.
const DAEMON_SECONDS: u64 = 11;
const PEER_SECONDS: u64 = 6;
/// How often a server is killed.
const KILLS: usize = 5;
/// What is felt of a restart comes until then: QEMU comes back after a second.
const RESTART: Duration = Duration::from_secs(2);
/// Upgrades in a row come this often.
const BURST_INTERVAL: Duration = Duration::from_millis(100);
const IMAGE_MIB: u64 = 64;

/// A file system is made, filled, read back by another mount, and checked.
const FILE_SYSTEM: &str = "set -e
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
for file in 1 2 3 4 5 6 7 8; do head -c 1000000 /dev/urandom >/mnt/file$file; done
sha256sum /mnt/file* >/run/sums
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 -o ro /dev/vda /mnt
sha256sum -c /run/sums
umount /mnt
e2fsck -fn /dev/vda >/run/e2fsck 2>&1 || { cat /run/e2fsck; exit 1; }";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let sabotage = match arguments.as_slice() {
        [] => false,
        [only] if only == "--sabotage" => true,
        _ => {
            eprintln!("usage: demo [--sabotage]");
            return ExitCode::from(2);
        }
    };
    // The harness says what went wrong by panicking, with the ends of the guest's console and of
    // the daemon's log.
    match catch_unwind(AssertUnwindSafe(|| Demo::new(sabotage).run())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) => {
            println!("\nThe demo FAILED; what it found stands above.");
            ExitCode::FAILURE
        }
    }
}

/// Something that was done to a device.
struct Change {
    from: Instant,
    to: Instant,
    /// The reply; nothing if it was refused.
    reply: Option<Value>,
    rollback: bool,
}

impl Change {
    fn mode(&self) -> &str {
        self.reply.as_ref().and_then(|reply| reply["mode"].as_str()).unwrap_or("refused")
    }

    fn pause_us(&self) -> u64 {
        let pause = self.reply.as_ref().and_then(|reply| reply["phases_us"]["pause"].as_u64());
        pause.unwrap_or(0)
    }
}

struct Demo {
    screen: Screen,
    sabotage: bool,
    changes: Vec<Change>,
    /// When processes were killed or exchanged.
    touches: Vec<(Instant, Instant)>,
    troubles: Vec<String>,
}

impl Demo {
    fn new(sabotage: bool) -> Self {
        Self {
            screen: Screen::new(),
            sabotage,
            changes: Vec::new(),
            touches: Vec::new(),
            troubles: Vec::new(),
        }
    }

    /// Everything, in order. Whether all is well.
    fn run(mut self) -> bool {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let image = directory.path().join("disk.img");
        File::create(&image).and_then(|file| file.set_len(IMAGE_MIB << 20)).expect("an image");

        self.screen.heading("vhost-hotswap: replacing a disk's code while a guest uses the disk");
        self.screen.say("Starting two daemons, each with one disk");
        self.screen.command("vhost-hotswap --socket-path a.sock --domain ramdisk");
        self.screen.command("vhost-hotswap --socket-path b.sock --blk-file disk.img");
        let memory = Daemon::start(&["--domain", "ramdisk", "--queues", "2"]);
        let path = image.to_str().expect("a path of text");
        let file = Daemon::start(&["--blk-file", path, "--queues", "2"]);
        let peers = directory.path().join("peer.img");
        File::create(&peers).and_then(|file| file.set_len(IMAGE_MIB << 20)).expect("an image");
        let peers = format!("driver=file,filename={},aio=threads", peers.display());
        let mut peer = Peer::start(&peers, false).unwrap_or_else(|error| panic!("{error}"));
        self.screen.say("Booting Linux in QEMU with both (waits if another guest is running)");
        let reconnect = Debian::chosen().reconnect(1);
        let options = GuestOptions {
            vhost_sockets: vec![memory.socket().to_owned(), file.socket().to_owned()],
            // The disks of the daemons are not to come back.
            extra_args: vec![
                "-chardev".to_owned(),
                format!("socket,id=peer,path={}{reconnect}", peer.socket().display()),
                "-device".to_owned(),
                "vhost-user-blk-pci,chardev=peer,num-queues=1".to_owned(),
            ],
            ..GuestOptions::default()
        };
        let guest = Guest::boot(options).unwrap_or_else(|error| panic!("{error}"));
        self.screen.tell(
            Tone::Good,
            &format!(
                "Linux {} is up after {:.1} s, {} CPUs, {}",
                guest.sh("uname -r"),
                guest.boot_time().as_secs_f64(),
                guest.sh("nproc"),
                accelerator(&guest)
            ),
        );

        let in_memory = self.act_of_memory(&memory, &guest, directory.path());
        let files_ok = self.act_of_files(&memory, &guest);
        let in_file = self.act_of_the_image(&file, &guest);
        let over_deaths = self.act_of_the_daemon(&memory, &guest);
        let over_restart = self.act_of_the_peer(&mut peer, &guest);
        let views = [in_memory, in_file, over_deaths, over_restart];
        self.end(memory, file, guest, &image, views, files_ok)
    }

    /// A disk whose state is handed over.
    fn act_of_memory(&mut self, daemon: &Daemon, guest: &Guest, directory: &Path) -> GuestView {
        self.screen.heading("1. A disk in memory: handover, the state changes owner");
        let run = Run::start(guest, "vda", MEMORY_SECONDS);
        self.screen.say("fio in the guest: two jobs write random 4 KiB blocks, 16 at a time,");
        self.screen.say("and check each block that they read; a third measures, one at a time");
        wait_for_io(daemon);
        let began = Instant::now();
        let at = |second: f64| until(began + Duration::from_secs_f64(second));
        at(5.3);
        let mut next = ["ramdisk_v2", "ramdisk"].into_iter().cycle();
        self.screen.command("hotswapctl --control-path a.sock.control upgrade ramdisk_v2");
        for second in 5..9 {
            at(f64::from(second) + 0.3);
            self.upgrade(daemon, next.next().expect("endless"), &[], true);
        }
        if self.sabotage {
            self.screen.tell(Tone::Bad, "Sabotage: a domain that fails one request");
            self.upgrade(daemon, "faulty", &["--param", "fault=request:fail:3000"], true);
        }
        at(12.3);
        let broken = directory.join("broken.so");
        let bytes = fs::read(module("ramdisk_v2")).expect("the module can be read");
        fs::write(&broken, &bytes[..bytes.len() / 2]).expect("a module cut in half");
        self.screen.say("Half a module: refused before any of its code runs, no pause");
        self.screen.command("hotswapctl --control-path a.sock.control upgrade ./broken.so");
        self.refuse(daemon, broken.to_str().expect("a path of text"), &[]);
        at(13.3);
        self.screen.say("A module that panics with the gate shut: the old one resumes");
        self.refuse(daemon, "faulty", &["--param", "fault=activate:panic"]);
        at(14.3);
        self.screen.say("Back to the previous version, which is still loaded");
        self.screen.command("hotswapctl --control-path a.sock.control rollback");
        self.rollback(daemon);
        next.next();
        at(18.2);
        self.burst(daemon, &run, 22.0, began, || {
            (next.next().expect("endless").to_owned(), Vec::new())
        });
        let view = run.finish(&self.touched());
        self.after(&view);
        view
    }

    /// A file system on the same disk.
    fn act_of_files(&mut self, daemon: &Daemon, guest: &Guest) -> bool {
        self.screen.heading("2. A file system on it, upgraded under mkfs, writes and checks");
        let first = self.changes.len();
        let job = guest.spawn(FILE_SYSTEM);
        let mut next = ["ramdisk_v2", "ramdisk"].into_iter().cycle();
        while !job.has_ended() {
            self.upgrade(daemon, next.next().expect("endless"), &[], false);
            thread::sleep(BURST_INTERVAL);
        }
        let output = job.wait(Duration::from_secs(60));
        let right = output.stdout.lines().filter(|line| line.ends_with(": OK")).count();
        let well = output.status == 0 && right == 8;
        if well {
            self.screen.tell(
                Tone::Good,
                &format!(
                    "ext4 made, 8 files written, read back right, checked; {} upgrades",
                    self.changes.len() - first
                ),
            );
        } else {
            self.trouble(format!("the file system is not right: {}", output.stdout));
        }
        well
    }

    /// A disk whose state is elsewhere.
    fn act_of_the_image(&mut self, daemon: &Daemon, guest: &Guest) -> GuestView {
        self.screen.heading("3. A disk in an image file: swap, without a pause");
        let run = Run::start(guest, "vdb", FILE_SECONDS);
        wait_for_io(daemon);
        let began = Instant::now();
        let at = |second: f64| until(began + Duration::from_secs_f64(second));
        self.screen.say("The same fio on /dev/vdb; the module is loaded anew each time");
        at(4.3);
        self.screen.command("hotswapctl --control-path b.sock.control upgrade file");
        for second in 4..6 {
            at(f64::from(second) + 0.3);
            self.upgrade(daemon, "file", &[], true);
        }
        at(6.3);
        self.rollback(daemon);
        at(11.2);
        self.burst(daemon, &run, FILE_SECONDS as f64 - 1.2, began, || {
            ("file".to_owned(), Vec::new())
        });
        let view = run.finish(&self.touched());
        self.after(&view);
        view
    }

    /// The process that serves dies, and is exchanged; what holds the connection becomes another
    /// program.
    fn act_of_the_daemon(&mut self, daemon: &Daemon, guest: &Guest) -> GuestView {
        self.screen.heading("4. The daemon itself: killed and exchanged, on one connection");
        let run = Run::start(guest, "vda", DAEMON_SECONDS);
        wait_for_io(daemon);
        let began = Instant::now();
        let at = |second: f64| until(began + Duration::from_secs_f64(second));
        self.screen.say("The same fio on /dev/vda, the disk in memory");
        at(3.3);
        self.screen.say("kill -9 of the process that serves, five times:");
        let mut waits = Vec::new();
        for kill in 0..KILLS {
            at(3.3 + 0.4 * kill as f64);
            waits.push(self.kill(daemon).to_string());
        }
        self.screen.say(&format!("another one served after {} ms", waits.join(", ")));
        at(7.3);
        for only in ["server", "supervisor"] {
            self.screen.command(&format!(
                "hotswapctl --control-path a.sock.control upgrade-daemon --only {only}"
            ));
            let before = daemon.status();
            let from = Instant::now();
            let reply = daemon.call(&["upgrade-daemon", "--only", only]);
            self.touches.push((from, Instant::now()));
            let pause = micros(reply["phases_us"]["pause"].as_u64().unwrap_or(0));
            self.screen.say(&match only {
                "server" => format!("another process serves, of the same file; paused {pause}"),
                _ => format!("process {} is a new program; paused {pause}", daemon.pid()),
            });
            let is_other = before["server"]["pid"] != daemon.status()["server"]["pid"];
            if is_other != (only == "server") {
                self.trouble(format!("upgrade-daemon has not exchanged the {only}"));
            }
        }
        let view = run.finish(&self.touched());
        self.after(&view);
        let status = daemon.status();
        if status["server"]["deaths"] != KILLS || status["connected"] != true {
            self.trouble(format!("the daemon does not have it in its books: {status}"));
        }
        if daemon.log().contains("the frontend has disconnected") {
            self.trouble("QEMU has lost its connection".to_owned());
        }
        view
    }

    /// Kills the server; milliseconds until another one served.
    fn kill(&mut self, daemon: &Daemon) -> u64 {
        let mut watch = daemon.rpc();
        watch.request("watch", json!({})).expect("a watch");
        let server = daemon.server();
        let from = Instant::now();
        server.signal(Signal::KILL);
        loop {
            let event = watch.receive().expect("an event").expect("a connection");
            if event["params"]["event"] == "recovered" {
                self.touches.push((from, Instant::now()));
                return from.elapsed().as_millis() as u64;
            }
        }
    }

    /// What is done where there is none of this.
    fn act_of_the_peer(&mut self, peer: &mut Peer, guest: &Guest) -> GuestView {
        self.screen.heading("5. Beside it: qemu-storage-daemon, which has to be restarted");
        // Of several that end out of order, version 7.2 of the peer may lose some.
        let run = Run::start_probe(guest, "vdc", PEER_SECONDS);
        self.screen.say("fio on /dev/vdc, one request at a time, so that none is lost with it;");
        self.screen.say("QEMU comes back after a second");
        thread::sleep(Duration::from_millis(2300));
        let from = Instant::now();
        peer.end().and_then(|()| peer.begin()).unwrap_or_else(|error| panic!("{error}"));
        self.screen.say(&format!(
            "ended by SIGTERM and started again, which took {}",
            micros(from.elapsed().as_micros() as u64)
        ));
        let view = run.finish(&[(from, from + RESTART)]);
        match view.complaint.as_str() {
            "" => self.screen.say(&format!("{} requests, no error", grouped(view.requests))),
            complaint => self.trouble(complaint.to_owned()),
        }
        view
    }

    /// Upgrades one after the other until second `until_second` of the run; one line per second.
    fn burst(
        &mut self,
        daemon: &Daemon,
        run: &Run<'_>,
        until_second: f64,
        began: Instant,
        mut what: impl FnMut() -> (String, Vec<&'static str>),
    ) {
        self.screen.say("Ten upgrades a second:");
        while run.is_running() && began.elapsed().as_secs_f64() < until_second {
            let first = self.changes.len();
            let second = Instant::now() + Duration::from_secs(1);
            while Instant::now() < second && run.is_running() {
                let due = Instant::now() + BURST_INTERVAL;
                let (name, more) = what();
                self.upgrade(daemon, &name, &more, false);
                until(due);
            }
            let these = &self.changes[first..];
            let pauses: Vec<u64> = these.iter().map(Change::pause_us).collect();
            let (Some(&shortest), Some(&longest)) = (pauses.iter().min(), pauses.iter().max())
            else {
                break;
            };
            let mode = these[0].mode().to_owned();
            let generation = these.last().and_then(|change| change.reply.as_ref());
            let generation =
                generation.map_or(0, |reply| reply["generation"].as_u64().unwrap_or(0));
            let pauses = if mode == "swap" {
                "no pause".to_owned()
            } else {
                format!("paused {} to {}", micros(shortest), micros(longest))
            };
            self.screen.say(&format!(
                "{:>3} by {mode:<8}  now generation {generation:<4} {pauses}",
                these.len()
            ));
        }
    }

    fn upgrade(&mut self, daemon: &Daemon, name: &str, more: &[&str], told: bool) {
        let from = Instant::now();
        let reply =
            daemon.call(&[&["upgrade", name, "--drain-timeout-ms", "10000"], more].concat());
        self.committed(from, reply, false, told);
    }

    fn rollback(&mut self, daemon: &Daemon) {
        let from = Instant::now();
        let reply = daemon.call(&["rollback", "--drain-timeout-ms", "10000"]);
        self.committed(from, reply, true, true);
    }

    fn committed(&mut self, from: Instant, reply: Value, rollback: bool, told: bool) {
        let to = Instant::now();
        if told {
            let domain = |side: &str| {
                let word = |key: &str| reply[side][key].as_str().unwrap_or("?").to_owned();
                format!("{} {}", word("name"), word("version"))
            };
            let pause = match reply["mode"].as_str() {
                Some("swap") => "no pause".to_owned(),
                _ => {
                    format!("paused {}", micros(reply["phases_us"]["pause"].as_u64().unwrap_or(0)))
                }
            };
            let mode = reply["mode"].as_str().unwrap_or("?");
            self.screen.say(&format!(
                "generation {}: {} -> {}, {mode}, {pause}",
                reply["generation"],
                domain("from"),
                domain("to")
            ));
        }
        self.changes.push(Change { from, to, reply: Some(reply), rollback });
    }

    /// A change that must be refused, and must leave the device as it was.
    fn refuse(&mut self, daemon: &Daemon, name: &str, more: &[&str]) {
        let before = daemon.status();
        let from = Instant::now();
        let sentence = daemon.refuse(&[&["upgrade", name], more].concat());
        let to = Instant::now();
        let after = daemon.status();
        // The path is that of a temporary directory, and says nothing.
        let sentence = sentence.replace(
            &format!("{}/", Path::new(name).parent().unwrap_or(Path::new("")).display()),
            "",
        );
        self.screen.tell(Tone::Odd, &sentence);
        if (&before["generation"], &after["state"])
            != (&after["generation"], &Value::from("serving"))
        {
            self.trouble(format!("the refusal has left its mark: {after}"));
        }
        thread::sleep(Duration::from_millis(200));
        let more = requests(&daemon.status()).saturating_sub(requests(&before));
        self.screen.say(&format!(
            "still generation {}; {} requests served meanwhile",
            after["generation"],
            grouped(more)
        ));
        if more == 0 {
            self.trouble("the guest's I/O has stopped".to_owned());
        }
        self.changes.push(Change { from, to, reply: None, rollback: false });
    }

    /// When something was done.
    fn touched(&self) -> Vec<(Instant, Instant)> {
        let changes = self.changes.iter().map(|change| (change.from, change.to));
        changes.chain(self.touches.iter().copied()).collect()
    }

    /// What a run of `fio` says on its own.
    fn after(&mut self, view: &GuestView) {
        if view.complaint.is_empty() {
            self.screen.tell(
                Tone::Good,
                &format!(
                    "fio has ended: {} requests, no error, no wrong block",
                    grouped(view.requests)
                ),
            );
        } else {
            self.trouble(view.complaint.clone());
        }
    }

    fn trouble(&mut self, what: String) {
        self.screen.tell(Tone::Bad, &what);
        self.troubles.push(what);
    }

    /// Takes everything down, compares what is left, and says what the guest felt.
    fn end(
        mut self,
        memory: Daemon,
        file: Daemon,
        guest: Guest,
        image: &Path,
        view: [GuestView; 4],
        files_ok: bool,
    ) -> bool {
        self.screen.heading("6. The end");
        let in_guest = guest.run_within("sha256sum /dev/vdb", Duration::from_secs(60)).stdout;
        let errors: u64 = [&memory, &file].iter().map(|daemon| errors(&daemon.status())).sum();
        let resident = [&memory, &file].iter().any(|daemon| {
            daemon.status()["resident_modules"].as_array().is_none_or(|modules| !modules.is_empty())
        });
        if resident {
            self.trouble("a module that was replaced is still in memory".to_owned());
        }
        let kernel = guest.sh("dmesg");
        let complaints = ["I/O error", "EXT4-fs error", "hung", "reset"]
            .map(|word| kernel.matches(word).count());
        if complaints.iter().sum::<usize>() > 0 {
            self.trouble("the guest's kernel has complained about its disks".to_owned());
        }
        guest.shutdown().unwrap_or_else(|error| panic!("{error}"));
        for (name, daemon) in [("a", memory), ("b", file)] {
            let code = daemon.terminate();
            if code != 0 {
                self.trouble(format!("daemon {name} has ended with {code} after SIGTERM"));
            }
        }
        let on_host = sha256(image);
        if in_guest.split_whitespace().next() == Some(on_host.as_str()) {
            self.screen.tell(
                Tone::Good,
                "The guest is off, the daemons ended with 0 after SIGTERM, and the image on the host has the SHA-256 that the guest saw on /dev/vdb",
            );
        } else {
            self.trouble(format!("the image on the host is {on_host}, the guest saw {in_guest}"));
        }
        self.verdict(&view, errors, files_ok)
    }

    fn verdict(&self, view: &[GuestView; 4], daemon_errors: u64, files_ok: bool) -> bool {
        let screen = &self.screen;
        let sum = |of: fn(&GuestView) -> u64| view.iter().map(of).sum::<u64>();
        let (errors, mismatches) =
            (sum(|run| run.errors).max(daemon_errors), sum(|run| run.mismatches));
        screen.heading("What the guest felt");
        let row = |bad: bool, name: &str, value: String| {
            screen
                .row(if bad { Tone::Bad } else { Tone::Plain }, &format!("{name:<28}{value:>10}"));
        };
        row(false, "requests done by fio", grouped(sum(|run| run.requests)));
        row(errors > 0, "failed", errors.to_string());
        row(mismatches > 0, "blocks with wrong content", mismatches.to_string());
        row(
            !files_ok,
            "files with wrong content",
            if files_ok { "0 of 8".into() } else { "some".into() },
        );

        let count =
            |of: &dyn Fn(&Change) -> bool| self.changes.iter().filter(|change| of(change)).count();
        println!();
        row(
            false,
            "upgrades",
            count(&|change| change.reply.is_some() && !change.rollback).to_string(),
        );
        row(false, "rollbacks", count(&|change| change.rollback).to_string());
        row(
            false,
            "refused, device as before",
            count(&|change| change.reply.is_none()).to_string(),
        );

        row(false, "kill -9 of the server", KILLS.to_string());
        row(false, "server, supervisor exchanged", "1, 1".to_owned());

        for mode in ["handover", "swap"] {
            let mut pauses: Vec<u64> = self
                .changes
                .iter()
                .filter(|change| change.mode() == mode)
                .map(Change::pause_us)
                .collect();
            println!();
            if pauses.iter().all(|&pause| pause == 0) {
                screen.row(
                    Tone::Plain,
                    &format!("{} by {mode}: none of them paused a request", pauses.len()),
                );
                continue;
            }
            let each = pauses.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
            pauses.sort_unstable();
            screen.row(
                Tone::Plain,
                &format!(
                    "{} by {mode}: paused {} (median), {} at most; each, in us:",
                    pauses.len(),
                    micros(pauses[pauses.len() / 2]),
                    micros(pauses.last().copied().unwrap_or(0)),
                ),
            );
            screen.paragraph(&each);
        }

        println!();
        screen
            .row(Tone::Plain, "latency in the guest, in seconds without and with changes, in ms:");
        screen.row(
            Tone::Plain,
            "                       seconds   requests    50 %    99 %  99.9 %  longest",
        );
        for (name, run) in ["memory", "image", "kills", "peer"].iter().zip(view) {
            latencies(screen, &format!("{name}, without"), &run.quiet);
            latencies(screen, &format!("{name}, with"), &run.busy);
        }
        let longest = |run: &GuestView| micros(run.busy.quantile(1.0).as_micros() as u64);
        let [_, _, kills, restart] = view;
        screen.row(
            Tone::Plain,
            &format!(
                "{KILLS} kills and 2 exchanges: {} at most; one restart of the peer: {}",
                longest(kills),
                longest(restart)
            ),
        );
        let uncertain = view.iter().map(|run| run.uncertain.as_millis()).max().unwrap_or(0);
        screen.row(
            Tone::Plain,
            &format!(
                "(clocks matched to {uncertain} ms; fio's first second, warming up, is left out)"
            ),
        );

        let well = self.troubles.is_empty() && errors == 0 && mismatches == 0;
        println!();
        if well {
            screen.row(Tone::Good, "Nothing was lost.");
        } else {
            screen.row(Tone::Bad, "SOMETHING WAS LOST:");
            self.troubles.iter().for_each(|what| screen.paragraph(what));
        }
        well
    }
}

fn latencies(screen: &Screen, name: &str, of: &Latencies) {
    let ms = |duration: Duration| format!("{:.2}", duration.as_secs_f64() * 1000.0);
    screen.row(
        Tone::Plain,
        &format!(
            "{name:<22} {:>7} {:>10} {:>7} {:>7} {:>7} {:>8}",
            of.seconds,
            grouped(of.sorted_ns.len() as u64),
            ms(of.quantile(0.5)),
            ms(of.quantile(0.99)),
            ms(of.quantile(0.999)),
            ms(of.quantile(1.0))
        ),
    );
}

/// Microseconds in words: `87 us`, `1.25 ms`.
fn micros(us: u64) -> String {
    if us < 1000 { format!("{us} us") } else { format!("{:.2} ms", us as f64 / 1000.0) }
}

fn until(moment: Instant) {
    thread::sleep(moment.saturating_duration_since(Instant::now()));
}

/// Waits until the daemon has served a few requests more.
fn wait_for_io(daemon: &Daemon) {
    let before = requests(&daemon.status());
    let deadline = Instant::now() + Duration::from_secs(20);
    while requests(&daemon.status()) < before + 100 {
        assert!(Instant::now() < deadline, "fio does no I/O");
        thread::sleep(Duration::from_millis(20));
    }
}

fn requests(status: &Value) -> u64 {
    sum_of(status, "requests")
}

fn errors(status: &Value) -> u64 {
    sum_of(status, "errors")
}

fn sum_of(status: &Value, key: &str) -> u64 {
    let queues = status["queues"].as_array().expect("queues in the status");
    queues.iter().map(|queue| queue[key].as_u64().unwrap_or(0)).sum()
}

/// What QEMU runs the guest with.
fn accelerator(guest: &Guest) -> &'static str {
    match guest.qmp("query-kvm") {
        Ok(answer) if answer["enabled"] == true => "KVM",
        _ => "emulated",
    }
}

/// As `sha256sum` says it.
fn sha256(path: &Path) -> String {
    let mut output = String::new();
    let mut child = std::process::Command::new("sha256sum")
        .arg(path)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("sha256sum can be started");
    child.stdout.take().expect("a pipe").read_to_string(&mut output).expect("its output");
    let _ = child.wait();
    output.split_whitespace().next().unwrap_or("").to_owned()
}
