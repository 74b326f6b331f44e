//! The power is cut: what the guest was promised to be durable is there afterwards.
//!
//! The daemon serves a file on a disk of ours that forgets what was not synced
//! ([`guest_tests::power`]). In the middle of a load, upgrades included, the power goes, and the
//! daemon with it (SIGKILL). Then each block must be as new as the guest may expect: with a write
//! cache, as what had ended before the last flush that was answered was submitted; without one, as
//! the last write that was answered.
//!
//! What it cannot show: the kernel's FUSE lets no write end while the file is being synced, so a
//! flush that hides behind one which began too early is not found here.

use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::client::{Client, Options, Queue, Request, Status, features};
use guest_tests::daemon::Daemon;
use guest_tests::power::Disk;
use guest_tests::stamp::{BLOCK, Stamp};

const BLOCKS: usize = 256;
const DEPTH: usize = 12;
/// How often the power is cut in each test.
const CUTS: u64 = 4;
/// Longest time that a request may take.
const LIMIT: Duration = Duration::from_secs(20);

/// One thing that was done to a block, and how.
#[derive(Clone, Copy, Debug)]
struct Change {
    sequence: u64,
    zeros: bool,
}

/// What a request in flight is about.
enum Job {
    Change(usize, u64),
    /// Per block what had ended when the flush was submitted.
    Flush(Vec<u64>),
}

/// What the guest knows.
struct Books {
    changes: Vec<Vec<Change>>,
    /// Per block the newest change that has ended.
    ended: Vec<u64>,
    /// Per block the newest change that has to survive.
    promised: Vec<u64>,
    jobs: HashMap<u64, Job>,
    next: u64,
    random: u64,
    write_cache: bool,
    flushes: u64,
}

impl Books {
    fn new(seed: u64, write_cache: bool) -> Books {
        Books {
            changes: vec![vec![Change { sequence: 0, zeros: true }]; BLOCKS],
            ended: vec![0; BLOCKS],
            promised: vec![0; BLOCKS],
            jobs: HashMap::new(),
            next: 0,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            write_cache,
            flushes: 0,
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    fn submit_one(&mut self, queue: &mut Queue) {
        self.next += 1;
        let context = self.next;
        if self.write_cache && self.below(12) == 0 {
            self.jobs.insert(context, Job::Flush(self.ended.clone()));
            queue.submit(Request::Flush, context).expect("room in the ring");
            return;
        }
        // Two changes of a block at the same time may end either way, so there is one.
        let block = loop {
            let block = self.below(BLOCKS as u64) as usize;
            if !self.jobs.values().any(|job| matches!(job, Job::Change(busy, _) if *busy == block))
            {
                break block;
            }
        };
        let offset = (block * BLOCK) as u64;
        let zeros = self.below(8) == 0;
        self.changes[block].push(Change { sequence: context, zeros });
        self.jobs.insert(context, Job::Change(block, context));
        let mut data = [0; BLOCK];
        Stamp { block: block as u64, sequence: context, writer: 1 }.write(&mut data);
        let unmap = self.below(2) == 0;
        let request = if zeros {
            Request::WriteZeroes { offset, len: BLOCK as u64, unmap }
        } else {
            Request::Write { offset, data: &data }
        };
        queue.submit(request, context).expect("room in the ring");
    }

    fn end(&mut self, context: u64, status: Status) {
        assert_eq!(status, Status::Ok, "request {context}");
        match self.jobs.remove(&context).expect("in flight") {
            Job::Change(block, sequence) => {
                self.ended[block] = sequence;
                if !self.write_cache {
                    self.promised[block] = sequence;
                }
            }
            Job::Flush(covered) => {
                self.flushes += 1;
                for (promised, covered) in self.promised.iter_mut().zip(covered) {
                    *promised = covered.max(*promised);
                }
            }
        }
    }

    /// Runs `count` requests to their ends, and leaves more of them in flight.
    fn load(&mut self, queue: &mut Queue, count: usize) {
        let mut done = 0;
        while done < count {
            while self.jobs.len() < DEPTH {
                self.submit_one(queue);
            }
            queue.kick().expect("a kick");
            done += queue.reap(|completion| self.end(completion.context, completion.status));
            assert!(queue.overdue(LIMIT).is_empty(), "a request is not answered");
            queue.wait(Duration::from_millis(100)).expect("a wait");
        }
    }

    /// What is wrong with a block that was found after the cut.
    fn fault(&self, block: usize, bytes: &[u8]) -> Option<String> {
        let promised = self.promised[block];
        let found = match Stamp::read(bytes) {
            Ok(stamp) if stamp.block == block as u64 => Some(stamp.sequence),
            Ok(stamp) => return Some(format!("block {block} holds {stamp:?}")),
            Err("zeros") => None,
            Err(what) => return Some(format!("block {block} holds {what}")),
        };
        let new_enough = self.changes[block].iter().any(|change| {
            change.sequence >= promised
                && found.map_or(change.zeros, |found| found == change.sequence)
        });
        (!new_enough).then(|| {
            format!(
                "block {block}: change {promised} was to be durable, and there is {found:?} of {:?}",
                self.changes[block]
            )
        })
    }
}

fn survives(params: &[&str], write_cache: bool) {
    for seed in 1..=CUTS {
        let mut disk = match Disk::mount(BLOCKS * BLOCK) {
            Ok(disk) => disk,
            Err(error) => {
                eprintln!("skipped: cannot mount a FUSE file: {error}");
                return;
            }
        };
        let path = format!("path={}", disk.path().display());
        let mut args = vec!["--domain", "file", "--param", &path];
        params.iter().for_each(|param| args.extend(["--param", param]));
        let daemon = Daemon::start(&args);
        // Without FLUSH the driver has no way to empty a cache, so the device must have none
        // (virtio 1.2, 5.2.6.2).
        let wanted = if write_cache { features::USUAL } else { features::USUAL & !features::FLUSH };
        let options = Options { features: wanted, ..Options::default() };
        let mut client = Client::connect(daemon.socket(), &options).expect("connected");
        let mut books = Books::new(seed, write_cache);
        let queue = client.queue(0);
        let first = 20 + books.below(100) as usize;
        books.load(queue, first);
        thread::scope(|scope| {
            // What one instance wrote is covered by flushes of the next one.
            let upgrade = scope.spawn(|| {
                // The disk may be busy with what others write.
                daemon.call(&["upgrade", "file", "--drain-timeout-ms", "10000"])
            });
            let deadline = Instant::now() + LIMIT;
            while !upgrade.is_finished() && Instant::now() < deadline {
                books.load(queue, 10);
            }
            upgrade.join().expect("an upgrade");
        });
        let last = 20 + books.below(200) as usize;
        books.load(queue, last);
        // Whatever the client has not seen by now it was not promised.
        disk.cut_power();
        daemon.kill_whole();
        disk.take_away();
        drop(daemon);
        let image = disk.image();
        let faults: Vec<_> = image
            .chunks(BLOCK)
            .enumerate()
            .filter_map(|(block, bytes)| books.fault(block, bytes))
            .collect();
        assert!(faults.is_empty(), "{params:?}, seed {seed}: {}", faults.join("\n"));
        let kept = books.promised.iter().filter(|&&promised| promised > 0).count();
        assert!(kept > 20, "only {kept} blocks were promised anything: this test saw nothing");
        if write_cache {
            // Were each write synced, there would be nothing to lose, and flushes would prove
            // nothing.
            assert!(disk.syncs() <= books.flushes + 2 * DEPTH as u64, "{} syncs", disk.syncs());
        }
    }
}

#[test]
fn a_flush_that_was_answered_survives() {
    survives(&[], true);
}

#[test]
fn a_flush_that_was_answered_survives_without_io_uring() {
    survives(&["aio=sync"], true);
}

#[test]
fn a_flush_that_was_answered_survives_with_direct_io() {
    survives(&["direct=true"], true);
}

#[test]
fn without_a_write_cache_a_write_that_was_answered_survives() {
    survives(&[], false);
}

#[test]
fn without_a_write_cache_a_write_that_was_answered_survives_without_io_uring() {
    survives(&["aio=sync"], false);
}

#[test]
fn without_a_write_cache_a_write_that_was_answered_survives_with_direct_io() {
    survives(&["direct=true"], false);
}
