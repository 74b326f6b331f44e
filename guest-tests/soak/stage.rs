//! The device under soak, what does I/O on it, and its operator.

use crate::Random;
use crate::act::Act;
use crate::options::{Disk, Options};
use crate::witness::Witness;
use guest_tests::daemon::{Daemon, disk_directory};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long the device may take to be as it should be again.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How large the disk is at first, and how large it may become.
const MEGABYTES: u64 = 64;
const MOST_MEGABYTES: u64 = 256;

/// A daemon as the options want it, and what it keeps its disk in.
pub fn start_daemon(options: &Options) -> (Daemon, Option<TempDir>) {
    let size = format!("size={MEGABYTES}M");
    let queues = options.queues.to_string();
    let mut args = vec!["--queues", &queues];
    let (mut image, mut path) = (None, String::new());
    if options.disk != Disk::Ramdisk {
        let directory = disk_directory();
        let file = directory.path().join("disk.img");
        File::create(&file)
            .and_then(|file| file.set_len(MEGABYTES << 20))
            .expect("room for an image");
        path = file.to_str().expect("UTF-8").to_owned();
        image = Some(directory);
    }
    match options.disk {
        Disk::Ramdisk => args.extend(["--domain", "ramdisk", "--param", &size]),
        Disk::File => args.extend(["--blk-file", &path]),
        Disk::Direct => args.extend(["--blk-file", &path, "--param", "direct=true"]),
    }
    (Daemon::start(&args), image)
}

/// See the module's page.
pub struct Stage<'guest> {
    daemon: Daemon,
    disk: Disk,
    witness: Box<dyn Witness + 'guest>,
    /// The modules that the disk can go to, and which is next.
    modules: [&'static str; 2],
    turn: usize,
    megabytes: u64,
    generation: u64,
    has_standby: bool,
    /// How long the load had no answer from each kill on, and each phase of an exchange took.
    waits: BTreeMap<String, Vec<Duration>>,
    /// Exchanges that the disk was too slow for.
    refusals: u64,
}

impl<'guest> Stage<'guest> {
    pub fn new(daemon: Daemon, disk: Disk, witness: Box<dyn Witness + 'guest>) -> Self {
        let modules = match disk {
            Disk::Ramdisk => ["ramdisk_v2", "ramdisk"],
            Disk::File | Disk::Direct => ["file", "file"],
        };
        Self {
            generation: generation(&daemon.status()),
            daemon,
            disk,
            witness,
            modules,
            turn: 0,
            megabytes: MEGABYTES,
            has_standby: false,
            waits: BTreeMap::new(),
            refusals: 0,
        }
    }

    /// Whether this daemon, with this disk, can do that.
    pub fn offers(&self, act: Act) -> bool {
        let has_supervisor = || self.daemon.status()["server"].is_object();
        let can = match act {
            Act::Kill | Act::Exchange | Act::ReExec => has_supervisor(),
            Act::Panic => self.disk == Disk::Ramdisk,
            // What is in memory is lost then.
            Act::Whole => self.disk != Disk::Ramdisk,
            Act::Resize => self.daemon.ctl(&["resize", "--help"]).status == 0,
            _ => true,
        };
        can && self.witness.offers(act)
    }

    /// Lets the I/O go on for a moment.
    pub fn breathe(&mut self, random: &mut Random) {
        self.witness.breathe(&self.daemon, random);
    }

    pub fn perform(&mut self, act: Act, random: &mut Random) {
        match act {
            Act::Upgrade => self.upgrade(random),
            Act::Rollback => self.roll_back(),
            Act::Refusal => {
                let error = self.daemon.rpc().request("upgrade", json!({"name": "no_such_domain"}));
                assert_eq!(error.expect_err("there is none").name(), "module_not_found");
            }
            Act::Panic => self.panic(random),
            Act::Reconnect => self.witness.reconnect(false),
            Act::Abandon => self.witness.reconnect(true),
            Act::Resize => self.resize(random),
            Act::Kill => self.kill(random),
            Act::Exchange => {
                let Some(reply) = self.exchange() else { return };
                for (phase, us) in reply["phases_us"].as_object().expect("how long each took") {
                    let us = us.as_u64().expect("a number of microseconds");
                    let phase = format!("exchange, {phase}");
                    self.waits.entry(phase).or_default().push(Duration::from_micros(us));
                }
            }
            Act::ReExec => {
                self.upgrade_daemon("supervisor");
            }
            Act::Whole => self.kill_whole(),
            Act::Reset => self.witness.reset(),
        }
        self.wait_until_it_serves(act);
    }

    pub fn word(&self) -> String {
        let status = self.daemon.status();
        format!(
            "generation {}, {} of {}M",
            self.generation, status["domain"]["name"], self.megabytes
        )
    }

    /// Ends the I/O.
    pub fn end(mut self) -> Daemon {
        self.witness.end();
        self.daemon
    }

    fn request(&self, method: &str, params: Value) -> Value {
        let reply = self.daemon.rpc().request(method, params.clone());
        reply.unwrap_or_else(|error| panic!("{method} {params}: {error:?}\n{}", self.daemon.log()))
    }

    fn upgrade(&mut self, random: &mut Random) {
        let name = self.modules[self.turn % 2];
        self.turn += 1;
        let mode = ["auto", "auto", "handover"][random.below(3) as usize];
        let params = json!({"name": name, "mode": mode, "drain_timeout_ms": 20_000});
        let reply = self.request("upgrade", params);
        self.generation += 1;
        self.has_standby = true;
        assert_eq!(reply["generation"], self.generation, "{reply}");
    }

    fn roll_back(&mut self) {
        if !self.has_standby {
            let error = self.daemon.rpc().request("rollback", json!({}));
            assert_eq!(error.expect_err("nothing to go back to").name(), "no_standby");
            return;
        }
        let reply = self.request("rollback", json!({"drain_timeout_ms": 20_000}));
        self.generation += 1;
        assert_eq!(reply["generation"], self.generation, "{reply}");
    }

    fn panic(&mut self, random: &mut Random) {
        let fault = format!("fault=request:panic:{}", 1 + random.below(100));
        let (key, value) = fault.split_once('=').expect("a pair");
        self.request("upgrade", json!({"name": "faulty", "params": {key: value}}));
        // What comes next is the takeover's.
        self.generation += 2;
    }

    fn resize(&mut self, random: &mut Random) {
        if self.megabytes < MOST_MEGABYTES {
            self.megabytes += 1 + random.below(4);
            self.daemon.call(&["resize", &format!("{}M", self.megabytes)]);
        } else {
            self.daemon.refuse(&["resize", "1M"]);
        }
        assert_eq!(self.daemon.status()["capacity"], self.megabytes << 20);
        self.witness.is_told_of(self.megabytes);
    }

    fn kill(&mut self, random: &mut Random) {
        // One that has not served for so long is given more and more time.
        if random.below(8) != 0 {
            thread::sleep(Duration::from_millis(120));
        }
        self.witness.answered();
        // To ask for it takes milliseconds.
        let server = self.daemon.server();
        let killed = Instant::now();
        server.signal(Signal::KILL);
        let wait = || {
            assert!(killed.elapsed() < PATIENCE, "no answer:\n{}", self.daemon.log());
            thread::sleep(Duration::from_micros(50));
        };
        while server.runs() {
            wait();
        }
        let answered = self.witness.answered();
        while self.witness.answered() <= answered {
            wait();
        }
        let what = "from a kill to an answer".to_owned();
        self.waits.entry(what).or_default().push(killed.elapsed());
    }

    /// All of the daemon; the next one has the disk, and nothing else.
    fn kill_whole(&mut self) {
        self.witness.lets_go();
        self.daemon.end_whole();
        self.daemon.start_again();
        (self.generation, self.has_standby) = (1, false);
        self.witness.comes_back();
    }

    /// None if it was refused because the disk had not done its requests by then.
    fn exchange(&mut self) -> Option<Value> {
        if self.disk == Disk::Ramdisk {
            return Some(self.upgrade_daemon("server"));
        }
        let output = self.daemon.ctl(&["upgrade-daemon", "--only", "server"]);
        if output.status == 0 {
            return Some(serde_json::from_str(&output.stdout).expect("JSON"));
        }
        let is_slow = output.stderr.contains("not drained after");
        assert!(is_slow, "{output:?}\n{}", self.daemon.log());
        self.refusals += 1;
        None
    }

    fn upgrade_daemon(&self, only: &str) -> Value {
        self.daemon.call(&["upgrade-daemon", "--only", only])
    }

    /// How long the load waited in kills and exchanges, and in which of their phases.
    pub fn say_waits(&mut self) {
        if self.refusals > 0 {
            println!("soak: {} exchanges refused: the disk was too slow", self.refusals);
        }
        for (what, times) in &mut self.waits {
            times.sort_unstable();
            if let Some(&most) = times.last() {
                let at = |share: usize| times[(times.len() - 1) * share / 100];
                let (median, much) = (at(50), at(99));
                println!("soak: {what}: median {median:.1?}, 99 % {much:.1?}, most {most:.1?}");
            }
        }
    }

    /// Waits until the device serves, in the generation that it should be in.
    fn wait_until_it_serves(&mut self, act: Act) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A domain may be about to panic at a request.
            self.witness.answered();
            let status = self.daemon.status();
            let is_served = status["state"] == "serving" && generation(&status) == self.generation;
            let has_standby = status["standby"].is_object();
            // A takeover uses it up, or leaves the one from before; it may not follow a resize.
            // Another server has it again, after it serves.
            let may_go = matches!(act, Act::Panic | Act::Resize);
            if is_served && (has_standby == self.has_standby || may_go) {
                self.has_standby = has_standby;
                return;
            }
            assert!(
                Instant::now() < deadline,
                "after {}: generation {} is not served, standby {}: {status}\n{}",
                act.name(),
                self.generation,
                self.has_standby,
                self.daemon.log()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }
}

fn generation(status: &Value) -> u64 {
    status["generation"].as_u64().unwrap_or(0)
}
