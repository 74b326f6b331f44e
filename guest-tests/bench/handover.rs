//! Handovers: for how long the gate is shut, beside the least that this machine can do.
//!
//! A small and a large disk take turns, because a pause that depends on how much a disk holds would
//! be a fault. The bare rendezvous of as many threads runs in the same minutes; a polling client is
//! one more thread that keeps a CPU busy.

use std::io;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cpu::{self, Places};
use crate::drive::{Driver, Load, Mix, Wait};
use crate::machine::memory_kib;
use crate::options::Options;
use crate::rendezvous::{self, Work};
use crate::stats::{quantile, sorted};
use crate::swap::sane;
use crate::upgrade::{Done, Operator, print_pauses, print_total};
use guest_tests::client::{self, Client, Request, Status};
use guest_tests::daemon::Daemon;

const SMALL_MIB: u64 = 64;
const LARGE_MIB: u64 = 8 << 10;
/// What is left to the rest of the machine beside the large disk.
const SPARE_MIB: u64 = 2 << 10;

/// Two builds of one domain, in turn.
const MODULES: [&str; 2] = ["ramdisk_v2", "ramdisk"];
const INTERVAL: Duration = Duration::from_millis(40);
/// A disk's turn.
const TURN: Duration = Duration::from_secs(1);

/// A daemon with a disk full of data.
struct Disk {
    label: String,
    daemon: Daemon,
    operator: Operator,
}

impl Disk {
    fn start(mib: u64) -> io::Result<Disk> {
        let size = format!("size={mib}M");
        let daemon = Daemon::start(&["--domain", "ramdisk", "--param", &size]);
        Driver::fill(daemon.socket())?;
        let operator = Operator::new(&daemon, &MODULES, "handover");
        let label = if mib < 1024 {
            format!("{mib} MiB")
        } else {
            format!("{:.3} GiB", mib as f64 / 1024.0)
        };
        Ok(Disk { label: label.replace(".000", ""), daemon, operator })
    }
}

/// All of it.
pub(super) fn run(options: &Options, places: Places) -> io::Result<Value> {
    let available = memory_kib("MemAvailable:") / 1024;
    let large = LARGE_MIB.min(available.saturating_sub(SPARE_MIB) / 512 * 512).max(2 * SMALL_MIB);
    if large < LARGE_MIB {
        println!("\nonly {available} MiB of memory are available: the large disk has {large} MiB");
    }
    println!("\nhandover: gate shut to gate open, {} upgrades each", options.upgrades);
    println!("  {:<76}{:>6}{:>9}{:>9}{:>9}{:>9}", "", "n", "median", "90 %", "99 %", "longest");
    let mut disks = [Disk::start(SMALL_MIB)?, Disk::start(large)?];
    let mut rows = Vec::new();
    let mut totals = Vec::new();
    for wait in [Wait::Polled, Wait::Sleeping] {
        let found = under_load(&mut disks, wait, options.upgrades, places)?;
        let who = if wait == Wait::Polled { "polled" } else { "sleeping" };
        let mut medians = Vec::new();
        for (disk, done) in disks.iter().zip(found) {
            let pauses: Vec<f64> = done.iter().map(|done| done.pause_ns).collect();
            medians.push(quantile(&sorted(pauses.iter().copied()), 0.5));
            let label = format!("ramdisk {}, 1 queue, depth 32, {who} client", disk.label);
            rows.push(print_pauses(&label, &pauses));
            totals.push((label, done));
        }
        let ratio = medians[1] / medians[0].max(1.0);
        println!("  {:<76}x {ratio:.2}", format!("    {} over {}", disks[1].label, disks[0].label));
        rows.push(json!({ "label": format!("large over small, {who} client"), "ratio": ratio }));
    }
    drop(disks);
    let polling = polling_workers(options.upgrades)?;
    let pauses: Vec<f64> = polling.iter().map(|done| done.pause_ns).collect();
    rows.push(print_pauses("2 polling workers, empty rings", &pauses));
    totals.push(("2 polling workers, empty rings".to_owned(), polling));

    let copies = (Work::Copies(32), "batches of 32 x 4 KiB copies");
    for (work, what) in [(Work::Nothing, "bare"), copies] {
        for (threads, bystanders) in [(1, 0), (1, 1), (2, 0)] {
            let times = rendezvous::measure(threads, bystanders, work, options.upgrades, INTERVAL);
            let beside = if bystanders > 0 { " beside a busy one" } else { "" };
            let label = format!("the limit: {threads} thread(s){beside}, {what}");
            rows.push(print_pauses(&label, &times));
        }
    }
    let totals: Vec<Value> = totals.iter().map(|(label, done)| print_total(label, done)).collect();
    Ok(json!({ "pauses_ns": rows, "command_to_reply": totals }))
}

/// The disks in turn, until each has been upgraded often enough.
fn under_load(
    disks: &mut [Disk; 2],
    wait: Wait,
    upgrades: usize,
    places: Places,
) -> io::Result<[Vec<Done>; 2]> {
    let load = Load { depth: 32, wait, bytes: 4096, mix: Mix::Mixed };
    let mut found = [Vec::new(), Vec::new()];
    while found.iter().any(|done| done.len() < upgrades) {
        for (disk, done) in disks.iter_mut().zip(&mut found) {
            let mut driver = Driver::connect(disk.daemon.socket(), load)?;
            driver.warm_up(places.client)?;
            cpu::pin_workers(disk.daemon.server_pid(), places.server)?;
            let operator = &mut disk.operator;
            // The load begins before the upgrades and ends after them.
            let beside = || {
                thread::sleep(Duration::from_millis(20));
                operator.upgrade_every(INTERVAL, TURN)
            };
            let (measured, more) = driver.run_beside(
                TURN + Duration::from_millis(200),
                false,
                places.client,
                beside,
            )?;
            sane(&measured)?;
            done.extend(more?);
        }
    }
    Ok(found)
}

/// Workers that look at empty rings all the time, on as many CPUs as there are workers or fewer.
fn polling_workers(upgrades: usize) -> io::Result<Vec<Done>> {
    let daemon = Daemon::start(&["--domain", "ramdisk", "--queues", "2", "--poll-us", "1000000"]);
    let options = client::Options { queues: 2, ..client::Options::default() };
    let mut client = Client::connect(daemon.socket(), &options)?;
    let mut operator = Operator::new(&daemon, &MODULES, "handover");
    let mut done = Vec::new();
    for _ in 0..upgrades {
        // Workers poll for a second after each request.
        for queue in 0..2 {
            let read = Request::Read { offset: 0, len: 4096 };
            let (status, _) = client.queue(queue).execute(read, Duration::from_secs(10))?;
            if status != Status::Ok {
                return Err(io::Error::other(format!("a read ended with {status:?}")));
            }
        }
        thread::sleep(INTERVAL);
        done.push(operator.upgrade()?);
    }
    Ok(done)
}
