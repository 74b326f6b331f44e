//! Checks of what requests do to the data, against a shadow copy of the disk.

use super::bench::Bench;
use super::domain::Domain;
use super::lane::{Job, Lane};
use super::test_host::TestStorage;
use super::{Options, Random, Violation, ensure};
use domain_api::{Capabilities, DeviceInfo, Status};
use std::sync::Arc;

/// Largest disk that the suite takes.
const LARGEST: u64 = 64 << 20;

/// An activated instance, its storage and what it announces.
pub(super) struct Subject {
    pub storage: Arc<TestStorage>,
    pub bench: Bench,
    pub info: DeviceInfo,
}

impl Subject {
    pub(super) fn activated(domain: Domain, options: &Options) -> Result<Self, Violation> {
        let storage = TestStorage::new();
        let bench = prepare(domain, &storage, options)?;
        bench.activate().map_err(|error| Violation::new(format!("activate failed: {error}")))?;
        let info = info(&bench)?;
        ensure(
            info.capacity <= LARGEST && info.capacity >= 256 * u64::from(info.block_size),
            || {
                format!(
                    "not tested: a disk of {} bytes; give it 256 blocks to {LARGEST} bytes",
                    info.capacity
                )
            },
        )?;
        Ok(Self { storage, bench, info })
    }

    pub(super) fn can(&self, what: Capabilities) -> bool {
        self.info.capabilities.contains(what)
    }

    pub(super) fn writable(&self) -> bool {
        !self.can(Capabilities::READ_ONLY)
    }

    /// Reads all of the disk.
    pub(super) fn load(&self, options: &Options, lane: &mut Lane) -> Result<Shadow, Violation> {
        Shadow::load(lane, &self.info, options, 0, self.info.capacity)
    }
}

pub(super) fn prepare(
    domain: Domain,
    storage: &Arc<TestStorage>,
    options: &Options,
) -> Result<Bench, Violation> {
    let mut bench = Bench::of(domain.module(), storage, &options.params)
        .map_err(|error| Violation::new(format!("prepare failed: {error}")))?;
    bench.deadline = options.deadline;
    Ok(bench)
}

pub(super) fn info(bench: &Bench) -> Result<DeviceInfo, Violation> {
    bench.instance.info().map_err(|error| Violation::new(format!("info failed: {error}")))
}

/// What a range of the disk must read as.
pub(super) struct Shadow {
    base: u64,
    bytes: Vec<u8>,
    block: u64,
    /// Whether the disk keeps what is written; else it reads as zeros.
    keeps: bool,
}

impl Shadow {
    pub(super) fn load(
        lane: &mut Lane,
        info: &DeviceInfo,
        options: &Options,
        base: u64,
        len: u64,
    ) -> Result<Self, Violation> {
        let block = u64::from(info.block_size);
        let mut shadow = Self { base, bytes: vec![0; len as usize], block, keeps: options.data };
        if shadow.keeps {
            shadow.bytes = shadow.read_all(lane)?;
        }
        Ok(shadow)
    }

    fn read_all(&self, lane: &mut Lane) -> Result<Vec<u8>, Violation> {
        let piece = self.block * 256;
        let len = self.bytes.len() as u64;
        let jobs = (0..len)
            .step_by(piece as usize)
            .map(|at| Job::read(self.base + at, piece.min(len - at)));
        let mut bytes = Vec::with_capacity(self.bytes.len());
        for done in lane.run(jobs.collect())? {
            bytes.append(&mut done.ok()?);
        }
        Ok(bytes)
    }

    fn wrote(&mut self, offset: u64, data: &[u8]) {
        if self.keeps {
            let at = (offset - self.base) as usize;
            self.bytes[at..at + data.len()].copy_from_slice(data);
        }
    }

    fn zeroed(&mut self, offset: u64, len: u64) {
        let at = (offset - self.base) as usize;
        self.bytes[at..at + len as usize].fill(0);
    }

    fn check(&self, offset: u64, data: &[u8]) -> Result<(), Violation> {
        let at = (offset - self.base) as usize;
        let expected = &self.bytes[at..at + data.len()];
        match data.iter().zip(expected).position(|(is, should)| is != should) {
            None => Ok(()),
            Some(i) => Err(Violation::new(format!(
                "the disk reads {:#04x} at byte {}, it should be {:#04x}",
                data[i],
                offset + i as u64,
                expected[i]
            ))),
        }
    }

    /// Writes, and remembers what.
    pub(super) fn write(
        &mut self,
        lane: &mut Lane,
        offset: u64,
        data: Vec<u8>,
    ) -> Result<(), Violation> {
        lane.one(Job::write(offset, data.clone()))?.ok()?;
        self.wrote(offset, &data);
        Ok(())
    }

    /// Compares all of it with the disk.
    pub(super) fn verify(&self, lane: &mut Lane) -> Result<(), Violation> {
        self.check(self.base, &self.read_all(lane)?)
    }
}

/// A kind of request that does not exist yet is answered, not dropped. A write to a read-only disk
/// fails.
pub(super) fn unknown_requests(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    let mut lane = subject.bench.lane(0)?;
    let status = lane.one(Job::of_kind(4711))?.status;
    ensure(status == Status::Unsupported, || {
        format!("a request of an unknown kind ended with {status:?}, not Unsupported")
    })?;
    if !subject.writable() {
        let before = subject.load(options, &mut lane)?;
        let status = lane.one(Job::write(0, vec![0x5a; subject.info.block_size as usize]))?.status;
        ensure(status != Status::Ok, || "a write to a read-only disk ended well".to_owned())?;
        before.verify(&mut lane)?;
    }
    drop(lane);
    subject.bench.retire()
}

/// The disk can be read from end to end, and reads the same twice.
pub(super) fn reads(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    let mut lane = subject.bench.lane(0)?;
    let block = u64::from(subject.info.block_size);
    let shadow = subject.load(options, &mut lane)?;
    shadow.verify(&mut lane)?;
    for offset in [0, block, subject.info.capacity - block] {
        shadow.check(offset, &lane.one(Job::read(offset, block).in_pieces(&[1]))?.ok()?)?;
    }
    drop(lane);
    subject.bench.retire()
}

/// Data survives any way of cutting it into pieces, at both ends of the disk, and nothing beside it
/// changes.
pub(super) fn segments(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    let mut lane = subject.bench.lane(0)?;
    let mut shadow = subject.load(options, &mut lane)?;
    if subject.writable() {
        let mut random = Random::new(options.seed);
        let (block, end) = (u64::from(subject.info.block_size), subject.info.capacity);
        // Long enough in pieces of one byte for more than the 1024 iovecs that the kernel takes at
        // a time.
        let long = (4096 / block).max(1) * block * 3;
        let cuts: [&[usize]; 6] =
            [&[1 << 30], &[512], &[1], &[511, 1, 513], &[0, 700, 0], &[4095, 4097, 3]];
        for (offset, len) in [(0, block), (end - block, block), (block, long), (end - long, long)] {
            for cut in cuts {
                let data = random.bytes(len as usize);
                lane.one(Job::write(offset, data.clone()).in_pieces(cut))?.ok()?;
                shadow.wrote(offset, &data);
                for cut in [cuts[0], cuts[3], cut] {
                    shadow
                        .check(offset, &lane.one(Job::read(offset, len).in_pieces(cut))?.ok()?)?;
                }
            }
        }
    }
    shadow.verify(&mut lane)?;
    drop(lane);
    subject.bench.retire()
}

/// What is neither read nor write, on ranges that are no whole pages; nothing beside the range
/// changes.
pub(super) fn other_requests(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    let mut lane = subject.bench.lane(0)?;
    let mut shadow = subject.load(options, &mut lane)?;
    let mut random = Random::new(options.seed);
    let (block, end) = (u64::from(subject.info.block_size), subject.info.capacity);
    if subject.can(Capabilities::FLUSH) {
        lane.one(Job::flush())?.ok()?;
    }
    if subject.writable() {
        // On a disk of zeros a zero too many is not seen.
        for offset in (0..end).step_by(256 * block as usize) {
            let len = (256 * block).min(end - offset);
            shadow.write(&mut lane, offset, random.bytes(len as usize))?;
        }
    }
    let ranges =
        [(0, block), (end - block, block), (block, 3 * block), (3 * block, 100 * block), (0, end)];
    for (offset, len) in ranges {
        if !subject.writable() {
            break;
        }
        for may_unmap in [false, true] {
            if subject.can(Capabilities::WRITE_ZEROES) {
                shadow.write(&mut lane, offset, random.bytes(len as usize))?;
                lane.one(Job::write_zeroes(offset, len, may_unmap))?.ok()?;
                shadow.zeroed(offset, len);
                shadow.verify(&mut lane)?;
            }
        }
        if subject.can(Capabilities::DISCARD) {
            lane.one(Job::discard(offset, len))?.ok()?;
            // What a discarded range reads as is open, until it is written again.
            shadow.write(&mut lane, offset, random.bytes(len as usize))?;
            shadow.verify(&mut lane)?;
        }
    }
    if subject.can(Capabilities::FLUSH) {
        lane.one(Job::flush())?.ok()?;
    }
    drop(lane);
    subject.bench.retire()
}

/// Many more requests than fit in flight: all are answered, once.
pub(super) fn deep_queue(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    let mut lane = subject.bench.lane(0)?;
    let mut shadow = subject.load(options, &mut lane)?;
    let mut random = Random::new(options.seed);
    let block = u64::from(subject.info.block_size);
    let blocks = (subject.info.capacity / block).min(1000);
    if subject.writable() {
        let mut jobs = Vec::new();
        for i in 0..blocks {
            let data = random.bytes(block as usize);
            shadow.wrote(i * block, &data);
            jobs.push(Job::write(i * block, data));
            if i % 97 == 0 && subject.can(Capabilities::FLUSH) {
                jobs.push(Job::flush());
            }
        }
        for done in lane.run(jobs)? {
            done.ok()?;
        }
    }
    let reads = lane.run((0..blocks).map(|i| Job::read(i * block, block)).collect())?;
    for (i, done) in reads.into_iter().enumerate() {
        shadow.check(i as u64 * block, &done.ok()?)?;
    }
    drop(lane);
    subject.bench.retire()
}

/// Each queue works on a band of the disk of its own, from a thread of its own.
pub(super) fn several_queues(domain: Domain, options: &Options) -> Result<(), Violation> {
    let subject = Subject::activated(domain, options)?;
    std::thread::scope(|scope| {
        let subject = &subject;
        let workers: Vec<_> = (0..options.queues)
            .map(|queue| scope.spawn(move || random_requests(subject, options, queue)))
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| Err(Violation::new("the suite panicked on a worker")))
        })
    })?;
    subject.bench.retire()
}

fn random_requests(subject: &Subject, options: &Options, queue: u32) -> Result<(), Violation> {
    const SLOTS: u64 = 8;
    let block = u64::from(subject.info.block_size);
    let slot_blocks = subject.info.capacity / block / u64::from(options.queues) / SLOTS;
    let band = slot_blocks * SLOTS * block;
    let mut lane = subject.bench.lane(queue)?;
    let mut shadow =
        Shadow::load(&mut lane, &subject.info, options, u64::from(queue) * band, band)?;
    let mut random = Random::new(options.seed ^ u64::from(queue + 1) << 40);
    for _ in 0..60 {
        // One request per slot: none of a round overlaps another.
        let mut jobs = Vec::new();
        let mut reads = Vec::new();
        for slot in 0..SLOTS {
            let first = random.below(slot_blocks);
            let len = (1 + random.below((slot_blocks - first).min(32))) * block;
            let offset = shadow.base + (slot * slot_blocks + first) * block;
            let pieces = [1 + random.below(3000) as usize, 1 + random.below(9000) as usize];
            match random.below(8) {
                0..3 if subject.writable() => {
                    let data = random.bytes(len as usize);
                    shadow.wrote(offset, &data);
                    jobs.push(Job::write(offset, data).in_pieces(&pieces));
                }
                3 if subject.writable() && subject.can(Capabilities::WRITE_ZEROES) => {
                    shadow.zeroed(offset, len);
                    jobs.push(Job::write_zeroes(offset, len, random.below(2) == 0));
                }
                4 if subject.can(Capabilities::FLUSH) => jobs.push(Job::flush()),
                _ => {
                    reads.push((jobs.len(), offset));
                    jobs.push(Job::read(offset, len).in_pieces(&pieces));
                }
            }
        }
        let mut results =
            lane.run(jobs)?.into_iter().map(super::Done::ok).collect::<Result<Vec<_>, _>>()?;
        for (number, offset) in reads {
            shadow.check(offset, &std::mem::take(&mut results[number]))?;
        }
    }
    shadow.verify(&mut lane)
}
