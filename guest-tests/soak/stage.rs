//! The device under soak, its load, and its operator.

use crate::Random;
use crate::act::Act;
use crate::options::{Disk, Options};
use guest_tests::daemon::{Daemon, disk_directory};
use guest_tests::stamp::{Ledger, Load, LoadOptions, LoadReport};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long the device may take to be as it should be again.
const PATIENCE: Duration = Duration::from_secs(60);
/// How large the disk is at first, and how large it may become.
const MEGABYTES: u64 = 64;
const MOST_MEGABYTES: u64 = 256;

/// See the module's page.
pub struct Stage {
    daemon: Daemon,
    disk: Disk,
    load_options: LoadOptions,
    load: Option<Load>,
    /// Of the loads that have ended.
    sum: LoadReport,
    /// The modules that the disk can go to, and which is next.
    modules: [&'static str; 2],
    turn: usize,
    megabytes: u64,
    generation: u64,
    has_standby: bool,
    /// How long the load had no answer from each kill on, and each phase of an exchange took.
    waits: BTreeMap<String, Vec<Duration>>,
    _image: Option<TempDir>,
}

impl Stage {
    pub fn new(options: &Options) -> Self {
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
        let daemon = Daemon::start(&args);
        let mut load_options = LoadOptions::new(options.queues, options.depth);
        load_options.seed = options.seed;
        load_options.patience = PATIENCE;
        load_options.is_quiet = true;
        let load = Load::start(daemon.socket(), &load_options);
        let modules = match options.disk {
            Disk::Ramdisk => ["ramdisk_v2", "ramdisk"],
            Disk::File | Disk::Direct => ["file", "file"],
        };
        Self {
            generation: generation(&daemon.status()),
            daemon,
            disk: options.disk,
            load_options,
            load: Some(load),
            sum: LoadReport::default(),
            modules,
            turn: 0,
            megabytes: MEGABYTES,
            has_standby: false,
            waits: BTreeMap::new(),
            _image: image,
        }
    }

    /// Whether this daemon, with this disk, can do that.
    pub fn offers(&self, act: Act) -> bool {
        match act {
            Act::Kill | Act::Exchange | Act::ReExec => self.daemon.status()["server"].is_object(),
            Act::Panic => self.disk == Disk::Ramdisk,
            Act::Resize => self.daemon.ctl(&["resize", "--help"]).status == 0,
            _ => true,
        }
    }

    /// Lets the load run for a moment; it must not stand still.
    pub fn breathe(&mut self, random: &mut Random) {
        let load = self.load.as_ref().expect("a load between acts");
        if random.below(4) == 0 {
            load.wait_for(random.below(200));
        } else {
            thread::sleep(Duration::from_micros(random.below(3000)));
        }
        assert_eq!(load.faults(), 0, "the load has seen a fault:\n{}", self.daemon.log());
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
            Act::Reconnect => self.reconnect(false),
            Act::Abandon => self.reconnect(true),
            Act::Resize => self.resize(random),
            Act::Kill => self.kill(random),
            Act::Exchange => {
                let reply = self.upgrade_daemon("server");
                for (phase, us) in reply["phases_us"].as_object().expect("how long each took") {
                    let us = us.as_u64().expect("a number of microseconds");
                    let phase = format!("exchange, {phase}");
                    self.waits.entry(phase).or_default().push(Duration::from_micros(us));
                }
            }
            Act::ReExec => {
                self.upgrade_daemon("supervisor");
            }
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

    /// Ends the load. The report is of all loads; its ledgers are the last one's.
    pub fn end(mut self) -> (Daemon, LoadReport) {
        let report = self.load.take().expect("a load between acts").stop();
        let ledgers = self.add(report);
        self.sum.ledgers = ledgers;
        (self.daemon, self.sum)
    }

    /// Adds a report to the sum. Returns its ledgers.
    fn add(&mut self, mut report: LoadReport) -> Vec<Ledger> {
        let ledgers = std::mem::take(&mut report.ledgers);
        let elapsed = self.sum.elapsed + report.elapsed;
        self.sum.merge(report);
        self.sum.elapsed = elapsed;
        ledgers
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

    fn reconnect(&mut self, with_requests_in_flight: bool) {
        let load = self.load.take().expect("a load between acts");
        let report = if with_requests_in_flight { load.abandon() } else { load.stop() };
        let ledgers = self.add(report);
        self.load = Some(Load::resume(self.daemon.socket(), &self.load_options, ledgers));
    }

    fn resize(&mut self, random: &mut Random) {
        if self.megabytes < MOST_MEGABYTES {
            self.megabytes += 1 + random.below(4);
            self.daemon.call(&["resize", &format!("{}M", self.megabytes)]);
        } else {
            self.daemon.refuse(&["resize", "1M"]);
        }
        assert_eq!(self.daemon.status()["capacity"], self.megabytes << 20);
    }

    fn kill(&mut self, random: &mut Random) {
        // One that has not served for so long is given more and more time.
        if random.below(8) != 0 {
            thread::sleep(Duration::from_millis(120));
        }
        let number = self.daemon.server_pid();
        let pid = Pid::from_raw(number as i32).expect("a process");
        let load = self.load.as_ref().expect("a load between acts");
        let killed = Instant::now();
        kill_process(pid, Signal::KILL).expect("the server lives");
        let state = || fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
        let wait = |done: &dyn Fn() -> bool| {
            while !done() {
                assert!(killed.elapsed() < PATIENCE, "no answer:\n{}", self.daemon.log());
                thread::sleep(Duration::from_micros(50));
            }
        };
        wait(&|| {
            let state = state();
            state.is_empty() || state.contains(") Z ")
        });
        let answered = load.ios();
        wait(&|| load.ios() > answered);
        let what = "from a kill to an answer".to_owned();
        self.waits.entry(what).or_default().push(killed.elapsed());
    }

    fn upgrade_daemon(&self, only: &str) -> Value {
        self.daemon.call(&["upgrade-daemon", "--only", only])
    }

    /// How long the load waited in kills and exchanges, and in which of their phases.
    pub fn say_waits(&mut self) {
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
