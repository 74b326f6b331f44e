//! A load on a whole device: one thread per queue, started, watched and stopped from a test.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use super::verifier::Verifier;
use super::{BLOCK, Ledger, LoadReport};
use crate::PATIENCE;
use crate::client::{Client, Options, Request, Status};

/// How to load a device.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// How to connect; one thread per queue.
    pub client: Options,
    /// Requests in flight per queue.
    pub depth: usize,
    /// Blocks that each queue works on; queue 0 starts at block 0, the others follow.
    pub blocks_per_queue: u64,
    /// The longest request, in blocks; every fourth request is longer than one.
    pub longest: u64,
    /// Look into what was read. Off for a device that keeps nothing.
    pub check_data: bool,
    /// The disk may hold anything at first, so only blocks that were written before are checked.
    pub unknown_content: bool,
    /// How long a request may take before it counts as unanswered.
    pub patience: Duration,
    /// Start of the random numbers; printed, and taken from `HOTSWAP_SEED` when that is set.
    pub seed: u64,
    /// Print nothing.
    pub is_quiet: bool,
}

impl LoadOptions {
    /// `queues` queues with `depth` requests in flight on each, 8 MiB of disk per queue.
    pub fn new(queues: usize, depth: usize) -> LoadOptions {
        let queue_size = (depth * 4).next_power_of_two().max(16) as u16;
        let clock = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(1, |d| d.as_nanos() as u64);
        let given = std::env::var("HOTSWAP_SEED").ok().and_then(|seed| seed.parse().ok());
        LoadOptions {
            client: Options { queues, queue_size, ..Options::default() },
            depth,
            blocks_per_queue: 2048,
            longest: 8,
            check_data: true,
            unknown_content: false,
            patience: Duration::from_secs(20),
            seed: given.unwrap_or(clock),
            is_quiet: false,
        }
    }

    /// The same load on a disk with old content.
    pub fn on_unknown_content(self) -> LoadOptions {
        LoadOptions { unknown_content: true, ..self }
    }

    /// The same load on a device that keeps nothing.
    pub fn without_data_check(self) -> LoadOptions {
        LoadOptions { check_data: false, ..self }
    }
}

pub(super) const GO_ON: u8 = 0;
pub(super) const FINISH: u8 = 1;
const ABANDON: u8 = 2;

/// What a running load shares with what watches it.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) order: AtomicU8,
    pub(super) ios: AtomicU64,
    pub(super) faults: AtomicU64,
}

/// A load that runs until it is told to stop.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<LoadReport>>,
    is_quiet: bool,
}

impl Load {
    /// Connects and starts one thread per queue on a disk that reads as zeros, or on one of unknown
    /// content.
    pub fn start(socket: &Path, options: &LoadOptions) -> Load {
        let count = options.blocks_per_queue;
        let make = if options.unknown_content { Ledger::unknown } else { Ledger::fresh };
        let ledger = |queue| make(options.seed.wrapping_add(queue), queue * count, count);
        Load::resume(socket, options, (0..options.client.queues as u64).map(ledger).collect())
    }

    /// Connects and goes on where an earlier load, whose ledgers these are, has ended.
    pub fn resume(socket: &Path, options: &LoadOptions, ledgers: Vec<Ledger>) -> Load {
        if !options.is_quiet {
            println!("load: HOTSWAP_SEED={}", options.seed);
        }
        let client =
            Client::connect(socket, &options.client).unwrap_or_else(|e| panic!("connecting: {e}"));
        Load::resume_with(client, options, ledgers)
    }

    /// As [`resume`](Self::resume), with a client that is connected as `options` say.
    pub fn resume_with(client: Client, options: &LoadOptions, ledgers: Vec<Ledger>) -> Load {
        assert_eq!(ledgers.len(), options.client.queues, "one ledger per queue");
        let needed = options.client.queues as u64 * options.blocks_per_queue * BLOCK as u64;
        assert!(client.capacity() >= needed, "the disk is too small: {}", client.capacity());
        let offered = client.features();
        let shared = Arc::new(Shared::default());
        let threads = client
            .into_queues()
            .into_iter()
            .zip(ledgers)
            .map(|(queue, ledger)| {
                let verifier = Verifier::new(queue, ledger, options, offered, Arc::clone(&shared));
                thread::spawn(move || verifier.run())
            })
            .collect();
        Load { shared, threads, is_quiet: options.is_quiet }
    }

    /// Requests answered OK so far.
    pub fn ios(&self) -> u64 {
        self.shared.ios.load(Ordering::Relaxed)
    }

    /// Faults of any kind so far.
    pub fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }

    /// Waits until `count` more requests have been answered; panics when that takes over a minute.
    pub fn wait_for(&self, count: u64) {
        let goal = self.ios() + count;
        let deadline = Instant::now() + PATIENCE;
        while self.ios() < goal {
            assert!(
                Instant::now() < deadline,
                "the load stands still at {} of {goal} I/Os",
                self.ios()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops submitting, waits for what is in flight, disconnects.
    pub fn stop(self) -> LoadReport {
        self.end(FINISH)
    }

    /// Disconnects with requests in flight, as a killed frontend does.
    pub fn abandon(self) -> LoadReport {
        self.end(ABANDON)
    }

    fn end(self, order: u8) -> LoadReport {
        self.shared.order.store(order, Ordering::Relaxed);
        let mut report = LoadReport::default();
        for thread in self.threads {
            report.merge(thread.join().expect("a load thread does not panic"));
        }
        if !self.is_quiet {
            println!("load: {report:?}");
        }
        report
    }
}

/// Loads a fresh disk for a while.
pub fn run_load(socket: &Path, options: &LoadOptions, duration: Duration) -> LoadReport {
    let load = Load::start(socket, options);
    thread::sleep(duration);
    // A busy machine may have given it no time yet.
    load.wait_for(u64::from(load.ios() == 0));
    load.stop()
}

/// Reads every block of `ledgers` and says which ones do not hold what they should.
pub fn damage(socket: &Path, ledgers: &[Ledger]) -> Vec<String> {
    let mut client =
        Client::connect(socket, &Options::default()).unwrap_or_else(|e| panic!("connecting: {e}"));
    let mut wrong = Vec::new();
    for mut ledger in ledgers.iter().cloned() {
        for index in 0..ledger.blocks.len() {
            let offset = (ledger.first + index as u64) * BLOCK as u64;
            let read = Request::Read { offset, len: BLOCK };
            match client.queue(0).execute(read, Duration::from_secs(20)) {
                Ok((Status::Ok, data)) => wrong.extend(ledger.check(index, &data).err()),
                other => wrong
                    .push(format!("reading at {offset}: {:?}", other.map(|(status, _)| status))),
            }
        }
    }
    wrong
}

/// Panics unless every block of `ledgers` holds what it should.
pub fn assert_intact(socket: &Path, ledgers: &[Ledger]) {
    let wrong = damage(socket, ledgers);
    assert!(wrong.is_empty(), "{} blocks are wrong, the first: {}", wrong.len(), wrong[0]);
}
