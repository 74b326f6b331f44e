//! The latency of every request around one upgrade, and around one restart of the peer, which is
//! the other way to replace the code behind a disk.
//!
//! A native client at depth 1 does the I/O. When the peer goes away, the client does what QEMU does
//! with `reconnect=1`: it tries again after a second, and then every second. It learns of the break
//! at once, and what it had in flight it submits again; its latency counts from the first time.
//! Because a second is QEMU's choice and not the peer's fault, the same is measured with a client
//! that tries every millisecond, which is the best that restarting could ever be.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cells::image;
use crate::cpu::{self, Places};
use crate::drive::{Driver, Load, Mix, Wait};
use crate::options::Options;
use crate::stats::{Spread, time};
use crate::svg::{self, Cloud};
use crate::upgrade::Operator;
use guest_tests::daemon::Daemon;
use guest_tests::peer::Peer;

/// How long I/O runs before the event, and in all.
const BEFORE: Duration = Duration::from_millis(1000);
const AFTER: Duration = Duration::from_millis(2500);
/// How long a client tries to come back.
const PATIENCE: Duration = Duration::from_secs(20);

const LOAD: Load = Load { depth: 1, wait: Wait::Sleeping, bytes: 4096, mix: Mix::Mixed };

/// Requests as (milliseconds from the event, latency in nanoseconds), and the longest latency.
struct Trace {
    points: Vec<(f64, f64)>,
}

impl Trace {
    /// `event_ns` and the entries count from the same epoch.
    fn new(entries: &[(u64, u64)], event_ns: u64) -> Trace {
        let point =
            |&(end, latency): &(u64, u64)| ((end as f64 - event_ns as f64) / 1e6, latency as f64);
        Trace { points: entries.iter().map(point).collect() }
    }

    fn longest(&self) -> f64 {
        self.points.iter().map(|&(_, ns)| ns).fold(0.0, f64::max)
    }
}

/// Does I/O around something.
type Event<'a> = Box<dyn Fn() -> io::Result<Trace> + 'a>;

/// Everything several times, in turn; the results, and a picture of the median run of each.
pub(super) fn run(options: &Options, places: Places) -> io::Result<(Value, String)> {
    let (_directory, path) = image("/dev/shm".as_ref(), 256 << 20)?;
    let path = path.to_string_lossy().into_owned();
    let blockdev = format!("driver=file,filename={path},aio=threads");
    let file = ["--blk-file", path.as_str()];
    let ramdisk = ["--domain", "ramdisk"];
    let events: [(&str, Event<'_>); 5] = [
        ("nothing (vhost-hotswap, file)", Box::new(|| upgrade(&file, None, places))),
        ("swap (vhost-hotswap, file)", Box::new(|| upgrade(&file, Some(("file", "swap")), places))),
        (
            "handover (vhost-hotswap, ramdisk)",
            Box::new(|| upgrade(&ramdisk, Some(("ramdisk_v2", "handover")), places)),
        ),
        (
            "restart of qemu-storage-daemon (file), client tries to reconnect after 1 s",
            Box::new(|| restart(&blockdev, Duration::from_secs(1), places)),
        ),
        (
            "restart of qemu-storage-daemon (file), client tries to reconnect every 1 ms",
            Box::new(|| restart(&blockdev, Duration::from_millis(1), places)),
        ),
    ];
    println!(
        "\none event under I/O: the longest latency of {} runs each; native client, depth 1, 4 KiB",
        options.pairs
    );
    let mut traces: Vec<Vec<Trace>> = events.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.pairs {
        for ((_, event), traces) in events.iter().zip(&mut traces) {
            traces.push(event()?);
        }
    }
    let mut rows = Vec::new();
    let mut clouds = Vec::new();
    for ((name, _), mut traces) in events.iter().zip(traces) {
        let longest: Vec<f64> = traces.iter().map(Trace::longest).collect();
        println!("  {name:<78} {}", Spread::of(longest.iter().copied()).show(time));
        rows.push(json!({ "event": name, "longest_latency_ns": longest }));
        traces.sort_by(|a, b| a.longest().total_cmp(&b.longest()));
        let points = traces.swap_remove(traces.len() / 2).points;
        clouds.push(Cloud { name: (*name).to_owned(), points });
    }
    let title = "Latency of every request around one event at 0 ms";
    let (from, to) = (-(BEFORE.as_millis() as f64) + 100.0, AFTER.as_millis() as f64 - 100.0);
    Ok((Value::Array(rows), svg::latencies(title, from, to, &clouds)))
}

/// I/O around an upgrade to a module with a protocol, or around nothing.
fn upgrade(
    args: &[&str],
    to: Option<(&'static str, &'static str)>,
    places: Places,
) -> io::Result<Trace> {
    let daemon = Daemon::start(args);
    let epoch = Instant::now();
    let mut driver = Driver::connect_at(daemon.socket(), LOAD, epoch)?;
    driver.warm_up(places.client)?;
    cpu::pin_workers(daemon.server_pid(), places.server)?;
    let beside = || {
        thread::sleep(BEFORE);
        let event = epoch.elapsed();
        if let Some((name, mode)) = to {
            Operator::new(&daemon, &[name], mode).upgrade()?;
        }
        io::Result::Ok(event)
    };
    let (measured, event) = driver.run_beside(BEFORE + AFTER, true, places.client, beside)?;
    crate::swap::sane(&measured)?;
    Ok(Trace::new(&measured.trace, event?.as_nanos() as u64))
}

/// I/O around an end of the peer, and its new beginning.
fn restart(blockdev: &str, retry: Duration, places: Places) -> io::Result<Trace> {
    let mut peer = cpu::pinned(places.server, || Peer::start(blockdev, false))?;
    let epoch = Instant::now();
    let mut driver = Driver::connect_at(peer.socket(), LOAD, epoch)?;
    driver.warm_up(places.client)?;
    let stop = driver.stop();
    let beside = || {
        thread::sleep(BEFORE);
        let event = epoch.elapsed();
        let ended = peer.end();
        stop.now();
        ended.map(|()| event)
    };
    let (first, event) = driver.run_beside(BEFORE + AFTER, true, places.client, beside)?;
    let event = event?;
    // At depth 1 there is always one in flight.
    let lost_since = driver.oldest_in_flight().unwrap_or(event.as_nanos() as u64);
    drop(driver);

    let socket = peer.socket().to_owned();
    let (mut driver, peer) = thread::scope(|scope| {
        let begins = scope.spawn(|| cpu::pinned(places.server, || peer.begin().map(|()| peer)));
        let deadline = Instant::now() + PATIENCE;
        let driver = loop {
            thread::sleep(retry);
            match Driver::connect_at(&socket, LOAD, epoch) {
                Ok(driver) => break Ok(driver),
                Err(error) if Instant::now() > deadline => break Err(error),
                Err(_) => {}
            }
        };
        let peer = begins.join().map_err(|_| io::Error::other("starting the peer panicked"))?;
        io::Result::Ok((driver?, peer?))
    })?;
    let left = (event + AFTER).saturating_sub(epoch.elapsed()).max(Duration::from_millis(200));
    let (second, ()) = driver.run_beside(left, true, places.client, || {})?;
    crate::swap::sane(&second)?;
    drop(peer);

    let mut entries = first.trace;
    let mut rest = second.trace.into_iter();
    entries.extend(rest.next().map(|(end, _)| (end, end - lost_since)));
    entries.extend(rest);
    Ok(Trace::new(&entries, event.as_nanos() as u64))
}
