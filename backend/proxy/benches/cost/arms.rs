//! The two arms: the same rounds of the same requests, through the proxy or straight to the domain.
//!
//! Each arm does what a queue's worker has to do with it and nothing else: no ring is read, no
//! status written. Rounds are alike, so that two runs that differ in their number differ in nothing
//! but instructions of rounds.

use domain_abi::{self as abi, RawCompletion, RawRequest};
use domain_api::{BlockDomain, Params, Status};
use domain_conformance::StaticModule;
use domain_conformance::direct::{Direct, requests};
use domain_conformance::{TestHost, TestStorage};
use domain_empty::Empty;
use domain_file::FileDisk;
use domain_host::{CompletionBuffer, LoadError, ModuleLoader, VerifiedModule};
use domain_ramdisk::Ramdisk;
use proxy::{DomainProxy, Gate, Notifier, Worker};
use rustix::event::{EventfdFlags, eventfd};
use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const BLOCK: usize = 4096;
const CAPACITY: u64 = 8 << 20;
/// Different requests, used in turn.
const POOL: usize = 256;

/// What is run: `DOMAIN/OP/BATCH`, with `DEPTH` requests in flight where the domain lets them be.
#[derive(Debug, Clone)]
pub struct Cell {
    /// `empty`, `ramdisk`, `tmpfs`, `cached` or `direct`; the last three are `file`.
    pub domain: String,
    /// `read` or `write`.
    pub op: String,
    /// Requests in one submit.
    pub batch: usize,
}

impl Cell {
    /// Reads a cell's name.
    pub fn parse(name: &str) -> Self {
        let mut parts = name.split('/');
        let mut part = || parts.next().expect("DOMAIN/OP/BATCH").to_owned();
        Self { domain: part(), op: part(), batch: part().parse().expect("a batch") }
    }

    /// Requests in a round.
    pub fn depth(&self) -> usize {
        if self.batch == 1 { 1 } else { self.batch.max(32) }
    }
}

/// What the completions said, so that looking at them is not optimised away.
///
/// In memory in both arms, as a worker's own books are, and atomic so that it stays there: in one
/// of them the compiler could keep all this in registers, which no worker can.
#[derive(Debug, Default)]
struct Tally {
    ended: AtomicU64,
    errors: AtomicU64,
    slots: AtomicU64,
}

impl Tally {
    #[inline(always)]
    fn note(&self, slot: usize, status: Status) {
        let change = |of: &AtomicU64, how: fn(u64, u64) -> u64, by: u64| {
            of.store(how(of.load(Ordering::Relaxed), by), Ordering::Relaxed);
        };
        change(&self.ended, u64::wrapping_add, 1);
        change(&self.slots, |slots, slot| slots ^ slot, slot as u64);
        if status != Status::Ok {
            change(&self.errors, u64::wrapping_add, 1);
        }
    }
}

trait Arm {
    /// How a request is named by its slot.
    fn tags(&self) -> impl Fn(&mut RawRequest, usize) + use<Self>;
    fn begin(&mut self);
    fn submit(&mut self, requests: &mut [RawRequest], tally: &Tally) -> usize;
    fn reap(&mut self, tally: &Tally);
}

struct Straight<D: BlockDomain> {
    domain: Direct<D>,
    completions: CompletionBuffer,
    generation: u64,
}

impl<D: BlockDomain> Straight<D> {
    #[inline(always)]
    fn tell(&self, tally: &Tally) {
        for completion in self.completions.completed() {
            // As in the proxy: the usual case by itself.
            if completion.status != abi::status::OK {
                went_wrong(completion);
            }
            tally.note(completion.tag as usize, Status::Ok);
        }
    }
}

#[cold]
#[inline(never)]
fn went_wrong(completion: &RawCompletion) -> ! {
    panic!("{completion:?}");
}

impl<D: BlockDomain> Arm for Straight<D> {
    fn tags(&self) -> impl Fn(&mut RawRequest, usize) + use<D> {
        let generation = self.generation;
        move |request, slot| (request.tag, request.generation) = (slot as u64, generation)
    }

    #[inline]
    fn begin(&mut self) {}

    #[inline]
    fn submit(&mut self, requests: &mut [RawRequest], tally: &Tally) -> usize {
        let accepted = self.domain.submit(requests, &mut self.completions);
        self.tell(tally);
        accepted
    }

    #[inline]
    fn reap(&mut self, tally: &Tally) {
        self.domain.reap(&mut self.completions);
        self.tell(tally);
    }
}

impl Arm for Worker {
    fn tags(&self) -> impl Fn(&mut RawRequest, usize) + use<> {
        let tags = Self::tags(self);
        move |request, slot| tags.name(request, slot)
    }

    #[inline]
    fn begin(&mut self) {
        assert_eq!(self.gate(), Gate::Open);
    }

    #[inline]
    fn submit(&mut self, requests: &mut [RawRequest], tally: &Tally) -> usize {
        Self::submit(self, requests, move |ended| tally.note(ended.slot, ended.status))
    }

    #[inline]
    fn reap(&mut self, tally: &Tally) {
        Self::reap(self, |ended| tally.note(ended.slot, ended.status));
    }
}

/// `rounds` of `depth` requests, in batches.
#[inline(never)]
fn drive(arm: &mut impl Arm, cell: &Cell, rounds: usize, pool: &mut [RawRequest]) {
    let (depth, tally, mut next, mut expected) = (cell.depth(), Tally::default(), 0, 0);
    for _ in 0..rounds {
        for first in (0..depth).step_by(cell.batch) {
            let batch = &mut pool[next..next + cell.batch];
            next = (next + cell.batch) % POOL;
            arm.begin();
            let name = arm.tags();
            for (slot, request) in batch.iter_mut().enumerate() {
                name(request, first + slot);
            }
            let accepted = arm.submit(black_box(&mut *batch), &tally);
            assert_eq!(accepted, batch.len(), "a round is a round only if all is taken");
        }
        expected += depth as u64;
        while tally.ended.load(Ordering::Relaxed) < expected {
            // Long enough for all of them, so that every round reaps as often.
            std::thread::sleep(Duration::from_millis(5));
            arm.begin();
            arm.reap(&tally);
        }
    }
    assert_eq!(tally.errors.load(Ordering::Relaxed), 0);
    black_box(tally.slots.load(Ordering::Relaxed));
}

struct Linked<D>(std::marker::PhantomData<fn() -> D>);

impl<D: BlockDomain> ModuleLoader for Linked<D> {
    fn verify(&self, _: &str) -> Result<Box<dyn VerifiedModule>, LoadError> {
        Ok(StaticModule::verified::<D>())
    }
}

/// What waits looks again by itself. The descriptor is there because a file without one does
/// not use io_uring.
struct Silent(OwnedFd);

impl Silent {
    fn new() -> Self {
        Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"))
    }
}

impl Notifier for Silent {
    fn notify(&self) {}

    fn fd(&self) -> Option<OwnedFd> {
        self.0.try_clone().ok()
    }
}

/// Runs one arm.
pub fn run(arm: &str, cell: &str, rounds: usize) {
    let cell = Cell::parse(cell);
    let size = CAPACITY.to_string();
    match cell.domain.as_str() {
        "empty" => with::<Empty>(arm, &cell, rounds, &["size", &size]),
        "ramdisk" => with::<Ramdisk>(arm, &cell, rounds, &["size", &size]),
        "tmpfs" => with_file(arm, &cell, rounds, "/dev/shm", "false"),
        "cached" => with_file(arm, &cell, rounds, &on_disk(), "false"),
        "direct" => with_file(arm, &cell, rounds, &on_disk(), "true"),
        other => panic!("no domain `{other}`"),
    }
}

/// A directory on a disk: where this was built.
fn on_disk() -> String {
    let running = std::env::current_exe().expect("a program");
    running.parent().and_then(|directory| directory.to_str()).expect("a directory").to_owned()
}

fn with_file(arm: &str, cell: &Cell, rounds: usize, directory: &str, direct: &str) {
    let mut image = tempfile::NamedTempFile::new_in(directory).expect("an image");
    image.write_all(&vec![0xa5; CAPACITY as usize]).expect("its content");
    image.as_file().sync_all().expect("on the disk");
    std::io::copy(&mut File::open(image.path()).expect("just made"), &mut std::io::sink())
        .expect("cached");
    with::<FileDisk>(
        arm,
        cell,
        rounds,
        &["path", image.path().to_str().expect("UTF-8"), "direct", direct],
    );
}

fn with<D: BlockDomain>(arm: &str, cell: &Cell, rounds: usize, pairs: &[&str]) {
    let op = if cell.op == "read" { abi::op::READ } else { abi::op::WRITE };
    let mut pool = requests(op, POOL, BLOCK, CAPACITY);
    let mut params = Params::default();
    for pair in pairs.chunks_exact(2) {
        params.set(pair[0], pair[1]);
    }
    match arm {
        "direct" => {
            let host = TestHost::new(&TestStorage::new());
            host.own_storage();
            let domain = Direct::<D>::activated(host, &params).expect("a domain");
            let completions = CompletionBuffer::new(POOL);
            drive(
                &mut Straight { domain, completions, generation: black_box(1) },
                cell,
                rounds,
                &mut pool,
            );
        }
        "proxy" => {
            let loader = Box::new(Linked::<D>(std::marker::PhantomData));
            let proxy: Arc<DomainProxy> =
                DomainProxy::start(loader, D::NAME, params, 1).expect("a device");
            let mut worker = proxy.worker(0, POOL, Box::new(Silent::new())).expect("a worker");
            drive(&mut worker, cell, rounds, &mut pool);
        }
        other => panic!("no arm `{other}`"),
    }
}
