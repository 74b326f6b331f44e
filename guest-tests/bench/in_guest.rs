//! The same questions, asked by `fio` in a real guest.
//!
//! Where the guest's CPUs are emulated, a request costs the guest itself tens of microseconds,
//! which hides most of what servers differ in; these numbers say what a guest feels, not what a
//! server could do. All disks of a comparison are in one guest.

use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cells::image;
use crate::options::Options;
use crate::server::{Recipe, Server};
use crate::stats::{Spread, rate, ratios, time, times};
use crate::upgrade::Operator;
use guest_tests::daemon::Daemon;
use guest_tests::guest::{Guest, GuestOptions, Job};
use guest_tests::peer::Peer;

/// Upgrades while `fio` runs come this often.
const INTERVAL: Duration = Duration::from_millis(500);
/// Size of each disk.
const DISK_BYTES: u64 = 64 << 20;

/// What `fio` says of one run.
struct Felt {
    iops: f64,
    p50_ns: f64,
    p99_ns: f64,
    longest_ns: f64,
}

impl Felt {
    fn json(&self) -> Value {
        json!({ "iops": self.iops, "p50_ns": self.p50_ns, "p99_ns": self.p99_ns, "longest_ns": self.longest_ns })
    }
}

fn boot(sockets: Vec<PathBuf>, reconnect: Option<u32>) -> io::Result<Guest> {
    let options =
        GuestOptions { vhost_sockets: sockets, queues: 1, reconnect, ..GuestOptions::default() };
    Guest::boot(options).map_err(|error| io::Error::other(error.to_string()))
}

fn fio<'guest>(
    guest: &'guest Guest,
    disk: &str,
    rw: &str,
    depth: usize,
    seconds: u64,
) -> Job<'guest> {
    guest.spawn(&format!(
        "cd /run && fio --name=bench --filename=/dev/{disk} --ioengine=io_uring --direct=1 --rw={rw} --bs=4k \
         --iodepth={depth} --size=100% --time_based --runtime={seconds} --ramp_time=1 --norandommap \
         --output-format=json --output=bench.json; status=$?; cat bench.json; exit $status"
    ))
}

fn felt(job: Job<'_>, seconds: u64) -> io::Result<Felt> {
    let output = job.wait(Duration::from_secs(seconds + 60));
    if output.status != 0 {
        return Err(io::Error::other(format!(
            "fio exited with {}: {}",
            output.status, output.stdout
        )));
    }
    let start = output.stdout.find("{\n").ok_or_else(|| io::Error::other(output.stdout.clone()))?;
    let mut stream =
        serde_json::Deserializer::from_str(&output.stdout[start..]).into_iter::<Value>();
    let report =
        stream.next().ok_or_else(|| io::Error::other("no report"))?.map_err(io::Error::other)?;
    let job = &report["jobs"][0];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let sides = [&job["read"], &job["write"]];
    let slower = |of: &dyn Fn(&Value) -> f64| sides.iter().map(|side| of(side)).fold(0.0, f64::max);
    Ok(Felt {
        iops: sides.iter().map(|side| number(&side["iops"])).sum(),
        p50_ns: slower(&|side| number(&side["clat_ns"]["percentile"]["50.000000"])),
        p99_ns: slower(&|side| number(&side["clat_ns"]["percentile"]["99.000000"])),
        longest_ns: slower(&|side| number(&side["clat_ns"]["max"])),
    })
}

/// Rows of a picture: names, and a ratio for each series.
type Bars = Vec<(String, Vec<(String, Spread)>)>;

/// Throughput and latency of a handful of cells, all contenders in one guest.
pub(super) fn data(options: &Options) -> io::Result<(Value, Bars)> {
    let mut keep = Vec::new();
    let mut recipes = vec![
        ("null", "daemon", ours(&["--domain", "empty"])),
        (
            "null",
            "null-co",
            peer(&format!("driver=null-co,size={DISK_BYTES},read-zeroes=on,latency-ns=0")),
        ),
    ];
    for (label, aio) in [
        ("daemon", ""),
        ("threads", "aio=threads"),
        ("io_uring", "aio=io_uring"),
        ("native, direct", "aio=native,cache.direct=on"),
    ] {
        // One image each: the peer locks it, and all are open at once.
        let (directory, path) = image("/dev/shm".as_ref(), DISK_BYTES)?;
        keep.push(directory);
        let path = path.display();
        let recipe = match aio {
            "" => ours(&["--blk-file", &path.to_string()]),
            aio => peer(&format!("driver=file,filename={path},{aio}")),
        };
        recipes.push(("tmpfs", label, recipe));
    }
    let servers = recipes
        .iter()
        .map(|(.., recipe)| recipe.start(None))
        .collect::<io::Result<Vec<Server>>>()?;
    let guest = boot(servers.iter().map(|server| server.socket().to_owned()).collect(), None)?;
    println!(
        "fio in a guest that was up after {:.1} s; {} rounds",
        guest.boot_time().as_secs_f64(),
        options.pairs
    );
    let all = [("null", "randread"), ("tmpfs", "randread"), ("tmpfs", "randwrite")];
    let cells = all.iter().flat_map(|&(backing, rw)| [1, 32].map(|depth| (backing, rw, depth)));
    let (mut rows, mut bars) = (Vec::new(), Vec::new());
    for (backing, rw, depth) in cells {
        let seconds = options.seconds.ceil() as u64;
        let contenders: Vec<usize> =
            (0..recipes.len()).filter(|&index| recipes[index].0 == backing).collect();
        let mut runs: Vec<Vec<Felt>> = contenders.iter().map(|_| Vec::new()).collect();
        for _ in 0..options.pairs {
            for (runs, &index) in runs.iter_mut().zip(&contenders) {
                let disk = format!("vd{}", char::from(b'a' + index as u8));
                runs.push(felt(fio(&guest, &disk, rw, depth, seconds), seconds)?);
            }
        }
        let labels: Vec<&str> = contenders.iter().map(|&index| recipes[index].1).collect();
        let name = format!("guest/{backing}/d{depth}/4k/{rw}");
        let (row, ratio) = report(&name, &labels, &runs);
        rows.push(row);
        bars.push((name, vec![("daemon".to_owned(), ratio)]));
    }
    guest.shutdown().map_err(|error| io::Error::other(error.to_string()))?;
    Ok((Value::Array(rows), bars))
}

fn ours(args: &[&str]) -> Recipe {
    Recipe::Ours(args.iter().map(|&arg| arg.to_owned()).collect())
}

fn peer(blockdev: &str) -> Recipe {
    Recipe::Peer { blockdev: blockdev.to_owned(), iothread: false }
}

/// Prints a cell, the first contender against the best of the others.
fn report(name: &str, labels: &[&str], runs: &[Vec<Felt>]) -> (Value, Spread) {
    let iops = |index: usize| runs[index].iter().map(|felt| felt.iops).collect::<Vec<f64>>();
    let median = |index: usize| Spread::of(iops(index)).median;
    println!("\n{name}");
    for (index, label) in labels.iter().enumerate() {
        let spread = |of: fn(&Felt) -> f64| time(Spread::of(runs[index].iter().map(of)).median);
        let (p50, p99) = (spread(|felt| felt.p50_ns), spread(|felt| felt.p99_ns));
        println!(
            "  {label:<16} {:>26}/s   p50 {p50:>8}  p99 {p99:>8}",
            Spread::of(iops(index)).show(rate)
        );
    }
    let best = (1..labels.len()).max_by(|&a, &b| median(a).total_cmp(&median(b))).unwrap_or(0);
    let ratio = Spread::of(ratios(&iops(0), &iops(best)));
    println!("  daemon / peer's best ({}): {}", labels[best], ratio.show(times));
    let all = labels.iter().zip(runs).map(
        |(label, runs)| json!({ "label": label, "runs": runs.iter().map(Felt::json).collect::<Vec<_>>() }),
    );
    let row = json!({
        "name": name,
        "contenders": all.collect::<Vec<_>>(),
        "best_peer": labels[best],
        "iops_ratio_to_best_peer": ratio.json(),
    });
    (row, ratio)
}

/// `fio`'s longest latency: with upgrades over without, and with a restart of the peer, in guests
/// that reconnect after 1 s.
pub(super) fn upgrades(options: &Options) -> io::Result<Value> {
    let seconds = 6;
    println!(
        "\nfio in a guest, depth 4, 4 KiB, half writes, {seconds} s: the longest latency of {} runs each",
        options.pairs
    );
    let (_images, path) = image("/dev/shm".as_ref(), DISK_BYTES)?;
    let (_more_images, peers_path) = image("/dev/shm".as_ref(), DISK_BYTES)?;
    let file = Daemon::start(&["--blk-file", &path.to_string_lossy()]);
    let memory = Daemon::start(&["--domain", "ramdisk"]);
    let mut peer =
        Peer::start(&format!("driver=file,filename={},aio=threads", peers_path.display()), false)?;
    let sockets =
        vec![file.socket().to_owned(), memory.socket().to_owned(), peer.socket().to_owned()];
    let guest = boot(sockets, Some(1))?;
    let mut swaps = Operator::new(&file, &["file"], "swap");
    let mut handovers = Operator::new(&memory, &["ramdisk_v2", "ramdisk"], "handover");
    let names = [
        "file: no upgrades",
        "file: swaps, 2 per second",
        "ramdisk: no upgrades",
        "ramdisk: handovers, 2 per second",
        "qemu-storage-daemon, file: nothing",
        "qemu-storage-daemon, file: one restart, QEMU reconnects after 1 s",
    ];
    let mut found: Vec<Vec<Felt>> = names.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.pairs {
        for (index, runs) in found.iter_mut().enumerate() {
            let disk = ["vda", "vdb", "vdc"][index / 2];
            let job = fio(&guest, disk, "randrw", 4, seconds);
            let begin = Instant::now();
            // After fio's start and its ramp.
            thread::sleep(Duration::from_secs(3));
            let left = Duration::from_secs(seconds - 1).saturating_sub(begin.elapsed());
            match index {
                1 => drop(swaps.upgrade_every(INTERVAL, left)?),
                3 => drop(handovers.upgrade_every(INTERVAL, left)?),
                5 => {
                    peer.end()?;
                    peer.begin()?;
                }
                _ => {}
            }
            runs.push(felt(job, seconds)?);
        }
    }
    let mut rows = Vec::new();
    for (name, runs) in names.iter().zip(&found) {
        let longest = Spread::of(runs.iter().map(|felt| felt.longest_ns));
        let iops = Spread::of(runs.iter().map(|felt| felt.iops));
        println!("  {name:<68} {:>32}   {} requests/s", longest.show(time), rate(iops.median));
        rows.push(json!({ "name": name, "runs": runs.iter().map(Felt::json).collect::<Vec<_>>() }));
    }
    for (quiet, with) in [(0, 1), (2, 3), (4, 5)] {
        let longest =
            |index: usize| Spread::of(found[index].iter().map(|felt| felt.longest_ns)).median;
        println!(
            "  {} over {}: x {:.2}",
            names[with],
            names[quiet],
            longest(with) / longest(quiet)
        );
    }
    Ok(Value::Array(rows))
}
