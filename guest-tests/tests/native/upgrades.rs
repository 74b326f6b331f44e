//! A thousand upgrades in a row under a load that checks every block: the promise of the whole
//! project.
//!
//! After each one: the generation is one higher, the mode is the one that was asked for, every
//! phase was timed, and in a swap no queue was paused. At the end: not one error, wrong block or
//! lost request, as many commits as there were calls, and no pile of modules.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status};
use guest_tests::daemon::{Control, Daemon, disk_directory};
use guest_tests::stamp::{Load, LoadOptions, assert_intact};
use rustix::process::{Resource, geteuid, getrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

const PHASES: [&str; 9] =
    ["verify", "load", "prepare", "drain", "quiesce", "activate", "pause", "grace", "retire"];
/// The live module, the standby, and two that may still be on their way out.
const RESIDENT_LIMIT: u64 = 4;

/// Checks every reply on its way and remembers what the next one must be.
struct Upgrader {
    control: Control,
    generation: u64,
    upgrades: u64,
    rollbacks: u64,
    pauses_us: Vec<f64>,
    /// What each module's content was, by the name that it was asked for with.
    contents: BTreeMap<String, Value>,
}

impl Upgrader {
    fn new(daemon: &Daemon) -> Upgrader {
        let generation = daemon.status()["generation"].as_u64().expect("a generation");
        let control = daemon.rpc();
        let (pauses_us, contents) = (Vec::new(), BTreeMap::new());
        Upgrader { control, generation, upgrades: 0, rollbacks: 0, pauses_us, contents }
    }

    /// Upgrades to the module `to`; two builds of one domain differ in a suffix of the file's name.
    fn upgrade(&mut self, params: Value, mode: &str, to: &str) {
        let reply = self
            .control
            .request("upgrade", params.clone())
            .unwrap_or_else(|e| panic!("{params}: {e:?}"));
        self.upgrades += 1;
        self.check(&reply, mode);
        assert_eq!(reply["to"]["name"], to.trim_end_matches("_v2"), "{reply}");
        let content =
            self.contents.entry(to.to_owned()).or_insert_with(|| reply["to"]["sha256"].clone());
        assert_eq!(*content, reply["to"]["sha256"], "{to} is not what it was: {reply}");
        let mut others = self.contents.iter().filter(|(name, _)| *name != to);
        assert!(
            others.all(|(_, content)| *content != reply["to"]["sha256"]),
            "two modules are one: {reply}"
        );
    }

    fn roll_back(&mut self, mode: &str) {
        let reply = self
            .control
            .request("rollback", json!({}))
            .unwrap_or_else(|e| panic!("rollback: {e:?}"));
        self.rollbacks += 1;
        self.check(&reply, mode);
    }

    fn check(&mut self, reply: &Value, mode: &str) {
        self.generation += 1;
        assert_eq!(reply["generation"], self.generation, "the generation of {reply}");
        assert_eq!(reply["mode"], mode, "{reply}");
        for side in ["from", "to"] {
            for key in ["name", "version", "sha256"] {
                assert!(
                    reply[side][key].as_str().is_some_and(|text| !text.is_empty()),
                    "{side}.{key} in {reply}"
                );
            }
        }
        for phase in PHASES {
            assert!(reply["phases_us"][phase].is_number(), "{phase} was not timed: {reply}");
        }
        let pause = reply["phases_us"]["pause"].as_f64().expect("a number");
        assert!(mode != "swap" || pause == 0.0, "a swap pauses no queue: {reply}");
        self.pauses_us.push(pause);
    }

    /// What the daemon counts must be what was done, and nothing may pile up.
    fn settle(mut self, daemon: &Daemon) {
        let status = daemon.status();
        assert_eq!(status["generation"], self.generation, "{status}");
        assert_eq!(status["state"], "serving", "{status}");
        assert_eq!(status["upgrades"]["committed"], self.upgrades, "{status}");
        assert_eq!(status["upgrades"]["rolled_back"], self.rollbacks, "{status}");
        assert_eq!(status["upgrades"]["refused"], 0, "{status}");
        let resident = count(&status["resident_modules"]);
        assert!(resident <= RESIDENT_LIMIT, "{resident} modules are resident: {status}");
        let history = self.control.request("history", json!({})).expect("a history");
        assert!(
            count(&history) > 0 || count(&history["entries"]) > 0,
            "an empty history: {history}"
        );
        self.pauses_us.sort_by(f64::total_cmp);
        let at = |share: f64| self.pauses_us[(self.pauses_us.len() as f64 * share) as usize];
        println!(
            "pause of {} upgrades: p50 {} us, p99 {} us",
            self.pauses_us.len(),
            at(0.5),
            at(0.99)
        );
    }
}

/// A number, or the length of a list.
fn count(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_array().map(|list| list.len() as u64)).unwrap_or(0)
}

#[test]
fn five_hundred_handovers_under_load() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    load.wait_for(1000);
    let mut upgrader = Upgrader::new(&daemon);
    let mut names = ["ramdisk_v2", "ramdisk"].into_iter().cycle();
    for round in 0..500 {
        let mode = if round % 2 == 0 { "auto" } else { "handover" };
        let name = names.next().expect("endless");
        upgrader.upgrade(json!({"name": name, "mode": mode}), "handover", name);
        if round % 25 == 24 {
            upgrader.roll_back("handover");
            load.wait_for(1);
        }
    }
    load.wait_for(1000);
    let report = load.stop();
    report.assert_clean();
    upgrader.settle(&daemon);
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.terminate(), 0);
}

#[test]
fn a_large_disk_keeps_all_its_data() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=256M", "--queues", "2"]);
    let mut options = LoadOptions::new(2, 32);
    // The whole disk, half of it for each queue.
    options.blocks_per_queue = (128 << 20) / 4096;
    let load = Load::start(daemon.socket(), &options);
    load.wait_for(40_000);
    let mut upgrader = Upgrader::new(&daemon);
    for name in ["ramdisk_v2", "ramdisk", "ramdisk_v2"] {
        upgrader.upgrade(json!({"name": name}), "handover", name);
        load.wait_for(1000);
    }
    let report = load.stop();
    report.assert_clean();
    upgrader.settle(&daemon);
    assert_intact(daemon.socket(), &report.ledgers);
}

/// A raw image of zeros in memory, where there is memory to put it in, or else on disk.
fn image() -> (TempDir, PathBuf) {
    let shared_memory = Path::new("/dev/shm");
    let directory = tempfile::tempdir_in(if shared_memory.is_dir() {
        shared_memory
    } else {
        Path::new("/tmp")
    });
    let directory = directory.expect("a temporary directory");
    let path = directory.path().join("disk.img");
    File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("an image");
    (directory, path)
}

#[test]
fn five_hundred_swaps_of_a_real_file_under_load() {
    let (_directory, path) = image();
    let path = path.to_str().expect("a path in UTF-8");
    let daemon = Daemon::start(&["--blk-file", path, "--queues", "2"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    load.wait_for(1000);
    let mut upgrader = Upgrader::new(&daemon);
    for round in 0..500 {
        let mode = if round % 2 == 0 { "auto" } else { "swap" };
        upgrader.upgrade(
            json!({"name": "file", "mode": mode, "params": {"path": path}}),
            "swap",
            "file",
        );
        if round % 25 == 24 {
            upgrader.roll_back("swap");
            load.wait_for(1);
        }
    }
    load.wait_for(1000);
    let report = load.stop();
    report.assert_clean();
    upgrader.settle(&daemon);
    assert_intact(daemon.socket(), &report.ledgers);
    assert_eq!(daemon.terminate(), 0);
}

/// How many queues can have a ring in three instances at a time, beside other tests of this user.
/// Linux charges a ring's memory, some 50 KiB for the domain's, to RLIMIT_MEMLOCK of a user without
/// CAP_IPC_LOCK, and that limit is 8 MiB on many systems.
fn queues_with_rings() -> usize {
    let limit = getrlimit(Resource::Memlock).current;
    if geteuid().is_root() || limit.is_none_or(|limit| limit >= 64 << 20) { 64 } else { 12 }
}

#[test]
fn as_many_queues_of_a_file_as_there_can_be_keep_their_rings() {
    let directory = disk_directory();
    let path = directory.path().join("disk.img");
    File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("an image");
    let path = path.to_str().expect("UTF-8");
    // A ring takes three descriptors, a queue ten more. The daemon asks for as many as it may have.
    let queues = queues_with_rings();
    let count = queues.to_string();
    let args = ["--blk-file", path, "--param", "direct=true", "--queues", &count];
    let daemon = Daemon::start_with_ulimit(&format!("-S -n {}", 4 * queues), &args);
    let options = Options { queues, ..Options::default() };
    let mut client = Client::connect(daemon.socket(), &options).expect("connected");
    let data = vec![0x5a; 4096];
    let all_write = |client: &mut Client| {
        for queue in 0..queues {
            let request = Request::Write { offset: queue as u64 * 4096, data: &data };
            let answer = client.queue(queue).execute(request, PATIENCE);
            assert_eq!(answer.expect("an answer").0, Status::Ok);
        }
    };
    all_write(&mut client);
    for _ in 0..3 {
        daemon.call(&["upgrade", "file"]);
        all_write(&mut client);
    }
    daemon.call(&["rollback"]);
    all_write(&mut client);
    assert!(!daemon.log().contains("no io_uring"), "{}", daemon.log());
    let open = daemon.open_fds();
    assert!(
        open > queues * (10 + 2 * 3),
        "{open} descriptors: the live domain and the standby have no rings"
    );
}

#[test]
fn a_handover_of_a_real_file_is_possible_when_asked_for() {
    let (_directory, path) = image();
    let path = path.to_str().expect("a path in UTF-8");
    let daemon = Daemon::start(&["--blk-file", path, "--queues", "2"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32));
    let mut upgrader = Upgrader::new(&daemon);
    for _ in 0..50 {
        load.wait_for(10);
        upgrader.upgrade(
            json!({"name": "file", "mode": "handover", "params": {"path": path}}),
            "handover",
            "file",
        );
    }
    let report = load.stop();
    report.assert_clean();
    upgrader.settle(&daemon);
    assert_intact(daemon.socket(), &report.ledgers);
}

#[test]
fn a_hundred_swaps_of_the_null_device() {
    let daemon = Daemon::start(&["--domain", "empty", "--queues", "2"]);
    let load = Load::start(daemon.socket(), &LoadOptions::new(2, 32).without_data_check());
    load.wait_for(1000);
    let mut upgrader = Upgrader::new(&daemon);
    for _ in 0..100 {
        upgrader.upgrade(json!({"name": "empty"}), "swap", "empty");
    }
    load.wait_for(1000);
    load.stop().assert_clean();
    upgrader.settle(&daemon);
}

#[test]
fn upgrades_without_event_index_lose_no_kick() {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=64M", "--queues", "2"]);
    let mut options = LoadOptions::new(2, 1);
    options.client.features = guest_tests::client::features::WITHOUT_EVENT_IDX;
    // One request at a time: every single one needs its own kick, so a lost one stops the load.
    let load = Load::start(daemon.socket(), &options);
    let mut upgrader = Upgrader::new(&daemon);
    let mut names = ["ramdisk_v2", "ramdisk"].into_iter().cycle();
    for _ in 0..200 {
        let name = names.next().expect("endless");
        upgrader.upgrade(json!({"name": name}), "handover", name);
        load.wait_for(2);
    }
    load.stop().assert_clean();
    upgrader.settle(&daemon);
}
