//! Every run of a small ring, with the process killed at every store.
//!
//! The steps are those of the product: its code runs on a region and a ring in memory, and each of
//! its stores is recorded. A process that is killed leaves what was stored until then; the next one
//! recovers, by the product's code, and may be killed at each of its stores as well. What a driver
//! may do between is all tried: which chains it offers, and when; so is what a domain may do: how
//! many it takes, and in which order it answers. States that were seen are not gone through again.
//!
//! The truth is the driver's: what it has offered, and what the used index of the ring says was
//! answered. After each recovery, what runs again and what is left in the ring must be what the
//! driver waits for, each once, and in the driver's order.
//!
//! The mutations change the recorded stores, or what a recovery says: each has to be found out.

mod mutations;
mod world;

use super::layout::{Entry, Header, queue_bytes};
use super::region::Part;
use super::trace::{Store, record};
use super::{Region, Ring, Tracker};
use crate::dirty::GuestMemory;
use crate::memory::Snapshot;
use crate::ring::publish_tracked;
use crate::view::{RingView, Used};
use mutations::{MUTATIONS, Mutation, Step, What, mutate};
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, VolatileMemory,
};

use world::{Memory, NO_HEAD, PART, Process, QUEUE, SIZE, USED, USED_AT, World, check};

/// How far it goes.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Chains that the driver offers.
    chains: usize,
    /// Most that are taken, or published, at once.
    batch: usize,
    /// How often the process is killed.
    kills: u8,
    /// How often chains go back to the ring.
    returns: u8,
    /// How often the driver begins anew.
    resets: u8,
    /// The ring's indices at first.
    first: u16,
    /// The driver offers a head that there is not, once.
    has_no_head: bool,
}

/// All orders of up to `most` of `of`.
fn arrangements(of: &[usize], most: usize) -> Vec<Vec<usize>> {
    let mut all = vec![vec![]];
    let mut from = 0;
    for _ in 0..most {
        let until = all.len();
        for index in from..until {
            for &one in of {
                if !all[index].contains(&one) {
                    let mut longer = all[index].clone();
                    longer.push(one);
                    all.push(longer);
                }
            }
        }
        from = until;
    }
    all.retain(|one| !one.is_empty());
    all
}

struct Explorer {
    bounds: Bounds,
    mutation: Option<Mutation>,
    region: Arc<Region>,
    /// Where the part is, and the used ring.
    part_at: usize,
    used_at: usize,
    guest: GuestMemoryAtomic<GuestMemory>,
    queue: Queue,
    view: RingView,
    /// Hashes of what was seen, of 128 bits.
    seen: HashSet<(u64, u64)>,
    hashers: [RandomState; 2],
    todo: Vec<World>,
    recoveries: usize,
}

impl Explorer {
    fn new(bounds: Bounds, mutation: Option<Mutation>) -> Self {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(Region::bytes(2, SIZE)).expect("a length");
        let region = Region::map(file, 0, Region::bytes(2, SIZE), 2, SIZE).expect("a region");
        let map = GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory");
        let guest = GuestMemoryAtomic::new(map);
        let mut queue = Queue::new(SIZE).expect("a queue");
        queue.set_avail_ring_address(Some(0x1000), None);
        queue.set_used_ring_address(Some(USED_AT as u32), None);
        let view = RingView::new(&Snapshot::take(&guest, 1), &queue).expect("a ring");
        let part_at = region.map.as_ptr() as usize + QUEUE * queue_bytes(SIZE);
        let used_at = guest.memory().get_host_address(GuestAddress(USED_AT)).expect("the ring");
        Self {
            bounds,
            mutation,
            part_at,
            used_at: used_at as usize,
            region: Arc::new(region),
            guest,
            queue,
            view,
            seen: HashSet::new(),
            hashers: [RandomState::new(), RandomState::new()],
            todo: Vec::new(),
            recoveries: 0,
        }
    }

    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// Goes through all that can be. Says how many states there were, or what was wrong in one.
    fn run(mut self) -> Result<(usize, usize), String> {
        let mut memory = Memory { part: [0; PART], used: [0; USED] };
        memory.used[2..4].copy_from_slice(&self.bounds.first.to_le_bytes());
        // What is in a fresh region need not be nothing.
        for (head, counter) in [(0, 5), (1, 3)] {
            let entry = &mut memory.part[size_of::<Header>() + head * size_of::<Entry>()..];
            (entry[0], entry[8]) = (1, counter);
        }
        let first = self.bounds.first;
        self.visit(World {
            memory,
            offered: vec![0, 1],
            answered: vec![false; 2],
            first,
            seen: first,
            process: None,
            kills: 0,
            resets: 0,
            returns: 0,
        });
        while let Some(world) = self.todo.pop() {
            match world.process {
                None => self.start(&world)?,
                Some(_) => self.go_on(&world)?,
            }
        }
        Ok((self.seen.len(), self.recoveries))
    }

    fn visit(&mut self, world: World) {
        let [one, other] = self.hashers.each_ref().map(|hasher| hasher.hash_one(&world));
        if self.seen.insert((one, other)) {
            self.todo.push(world);
        }
    }

    /// Puts bytes where the product finds them.
    fn load(&mut self, world: &World) {
        let at = QUEUE * queue_bytes(SIZE);
        let part = self.region.map.get_slice(at, PART).expect("the part");
        part.copy_from(&world.memory.part);
        let used = &world.memory.used;
        self.guest.memory().write_slice(used, GuestAddress(USED_AT)).expect("the ring");
        self.queue.set_next_used(world.memory.used_idx());
    }

    /// Where a store goes.
    fn target<'m>(&self, memory: &'m mut Memory, store: Store) -> (&'m mut [u8], What) {
        if let Some(at) = store.at.checked_sub(self.part_at).filter(|at| *at < PART) {
            let what = match (at, at % size_of::<Entry>()) {
                (0, _) => What::Features,
                (8, _) => What::Version,
                (10, _) => What::DescNum,
                (12, _) => What::LastBatchHead,
                (14, _) => What::RegionIndex,
                (16.., 0) => What::Mark,
                (16.., 6) => What::Next,
                (16.., 8) => What::Counter,
                _ => panic!("there is no number at {at}"),
            };
            return (&mut memory.part[at..at + store.len], what);
        }
        let at = store.at.wrapping_sub(self.used_at);
        assert!(at < USED, "a store to nowhere");
        let what = if at == 2 { What::RingIndex } else { What::Element };
        (&mut memory.used[at..at + store.len], what)
    }

    fn what(&self, store: Store) -> What {
        self.target(&mut Memory { part: [0; PART], used: [0; USED] }, store).1
    }

    /// What becomes of the world with these stores: `killed` gets it before each of them and after
    /// all, and the last is returned.
    fn apply(
        &mut self,
        mut world: World,
        step: Step,
        mut stores: Vec<Store>,
    ) -> Result<World, String> {
        if let Some(mutation) = self.mutation {
            mutate(mutation, step, &mut stores, |store| self.what(store));
        }
        for store in stores {
            self.kill(&world);
            let bytes = store.value.to_ne_bytes();
            self.target(&mut world.memory, store).0.copy_from_slice(&bytes[..store.len]);
            world.look()?;
        }
        self.kill(&world);
        Ok(world)
    }

    /// The process is killed here.
    fn kill(&mut self, world: &World) {
        if world.kills < self.bounds.kills {
            let kills = world.kills + 1;
            self.visit(World { process: None, kills, ..world.clone() });
        }
    }

    /// The marks of a world's process.
    fn tracker(&self, world: &World) -> Tracker {
        let process = world.process();
        Tracker {
            part: Part::new(&self.region, QUEUE, SIZE).expect("a part"),
            counter: process.counter,
            last_batch_head: process.last_batch_head,
            unmarked: process.unmarked,
        }
    }

    /// What the product does for one step of a process, as its stores.
    fn step(
        &mut self,
        world: &World,
        step: Step,
        run: impl FnOnce(&mut Tracker, &mut Queue, &RingView),
    ) -> Result<World, String> {
        self.load(world);
        let mut tracker = self.tracker(world);
        let ((), stores) = record(|| run(&mut tracker, &mut self.queue, &self.view));
        let mut world = world.clone();
        let process = world.process_mut();
        process.counter = tracker.counter;
        process.last_batch_head = tracker.last_batch_head;
        process.unmarked = tracker.unmarked;
        self.apply(world, step, stores)
    }

    /// A process begins.
    fn start(&mut self, world: &World) -> Result<(), String> {
        let mut world = world.clone();
        let used_idx = world.memory.used_idx();
        if self.is(Mutation::LastBatchNotCleared) {
            world.memory.part[14..16].copy_from_slice(&used_idx.to_ne_bytes());
        }
        self.load(&world);
        self.recoveries += 1;
        let ring = Ring { size: SIZE, used_idx, avail_idx: world.avail_idx() };
        let (started, stores) = record(|| Tracker::start(&self.region, QUEUE, ring));
        let (tracker, mut recovery) = started.map_err(|error| error.to_string())?;
        if self.is(Mutation::OrderByHead) {
            recovery.resubmit.sort_by_key(|marked| marked.head);
        }
        // A frontend says the used index; a region that is not fresh must not need it.
        let mut next_avail = recovery.next_avail.unwrap_or(used_idx);
        if self.is(Mutation::PositionOfTheUsedIndex) {
            next_avail = used_idx;
        }
        let next = usize::from(next_avail.wrapping_sub(world.first));
        let replay = check(&world, &recovery.resubmit, next)?;
        let is_from_zero = self.is(Mutation::CounterFromZero);
        for is_cautious in [false, true] {
            let process = Process {
                counter: if is_from_zero { 0 } else { tracker.counter },
                last_batch_head: tracker.last_batch_head,
                unmarked: 0,
                next,
                held: Vec::new(),
                replay: replay.clone(),
                is_cautious,
            };
            let world = World { process: Some(process), ..world.clone() };
            let started = self.apply(world, Step::Start, stores.clone())?;
            self.visit(started);
        }
        Ok(())
    }

    /// All that can come next.
    fn go_on(&mut self, world: &World) -> Result<(), String> {
        let process = world.process();
        let heads = |places: &[usize]| places.iter().map(|&p| world.offered[p]).collect();
        // A head that there is not is answered in the round in which it was taken.
        let urgent = process.held.iter().copied().find(|&place| world.offered[place] == NO_HEAD);
        for batch in arrangements(&process.held, self.bounds.batch) {
            if urgent.is_none() || batch.last().copied() == urgent {
                let heads: Vec<u16> = heads(&batch);
                let used: Vec<_> = heads.iter().map(|&head| Used { head, len: 1 }).collect();
                let mut next = self.step(world, Step::Publish, |tracker, queue, view| {
                    publish_tracked(queue, view, &used, tracker);
                })?;
                next.process_mut().held.retain(|place| !batch.contains(place));
                self.visit(next);
            }
        }
        if urgent.is_some() {
            return Ok(());
        }
        self.offer(world);
        if !process.replay.is_empty() {
            // One at a time, or some at a time.
            let most = if process.is_cautious { 1 } else { process.replay.len() };
            if !process.is_cautious || process.held.is_empty() {
                for count in 1..=most {
                    let mut next = world.clone();
                    let process = next.process_mut();
                    process.held.extend(process.replay.drain(..count));
                    self.visit(next);
                }
            }
            return Ok(());
        }
        if process.held.is_empty() || self.is(Mutation::ForgetInFlight) {
            self.stop(world);
        }
        if process.is_cautious && !process.held.is_empty() {
            // Some of it may run again.
            return Ok(());
        }
        let waiting = &world.offered[process.next..];
        for count in 1..=waiting.len().min(self.bounds.batch) {
            if waiting[..count - 1].contains(&NO_HEAD) {
                // It ends its batch.
                break;
            }
            let most = if world.returns < self.bounds.returns { count } else { 0 };
            for returned in 0..=most {
                let heads = &waiting[..count];
                let mut next = self.step(world, Step::Take, |tracker, _, _| {
                    for &head in heads {
                        tracker.mark_any(head);
                    }
                    heads.iter().rev().take(returned).for_each(|&head| tracker.unmark(head));
                })?;
                let process = next.process_mut();
                let taken = process.next..process.next + count - returned;
                process.held.extend(taken.clone());
                process.next = taken.end;
                process.is_cautious = false;
                next.returns += u8::from(returned > 0);
                self.visit(next);
            }
        }
        Ok(())
    }

    /// The driver offers a chain.
    fn offer(&mut self, world: &World) {
        if world.offered.len() == self.bounds.chains {
            return;
        }
        let free: Vec<_> = (0..SIZE).filter(|&head| world.place(head).is_none()).collect();
        let mut heads = vec![];
        heads.extend(free.first());
        heads.extend(free.last());
        heads.dedup();
        if self.bounds.has_no_head && !free.is_empty() && !world.offered.contains(&NO_HEAD) {
            heads.push(NO_HEAD);
        }
        for head in heads {
            let mut next = world.clone();
            next.offered.push(head);
            next.answered.push(false);
            self.visit(next);
        }
    }

    /// The ring is stopped with nothing in flight, and started again: as it is, or by a driver that
    /// begins anew. What keeps the region may have forgotten what it says.
    fn stop(&mut self, world: &World) {
        let has_reset = world.resets < self.bounds.resets;
        for (is_forgotten, is_reset) in [(false, false), (true, false), (false, true), (true, true)]
        {
            let mut next = World { process: None, ..world.clone() };
            if is_forgotten {
                next.memory.part[..size_of::<Header>()].fill(0);
            }
            if is_reset {
                next.memory.used = [0; USED];
                (next.offered, next.answered) = (Vec::new(), Vec::new());
                (next.first, next.seen, next.resets) = (0, 0, world.resets + 1);
            }
            if has_reset || !is_reset {
                self.visit(next);
            }
        }
    }
}

/// What is gone through in each run of the tests.
const BOUNDS: [Bounds; 4] = [
    // Two processes in a row are killed.
    Bounds { chains: 3, batch: 2, kills: 2, returns: 1, ..BASE },
    // The indices wrap.
    Bounds { chains: 4, batch: 2, returns: 1, first: 65534, ..BASE },
    Bounds { chains: 3, batch: 3, resets: 1, ..BASE },
    Bounds { chains: 4, batch: 2, has_no_head: true, ..BASE },
];

/// What takes minutes.
const FAR_BOUNDS: [Bounds; 3] = [
    Bounds { chains: 4, batch: 2, kills: 2, returns: 1, first: 65534, ..BASE },
    Bounds { chains: 4, batch: 3, returns: 2, first: 65534, has_no_head: true, ..BASE },
    Bounds { chains: 5, batch: 2, first: 65533, ..BASE },
];

/// The ring was used before, without a region.
const BASE: Bounds =
    Bounds { chains: 2, batch: 2, kills: 1, returns: 0, resets: 0, first: 1, has_no_head: false };

fn explore(all: &[Bounds]) {
    for &bounds in all {
        let (states, recoveries) = Explorer::new(bounds, None).run().expect("nothing is wrong");
        println!("{bounds:?}: {states} states, {recoveries} recoveries");
        assert!(states > 10_000 && recoveries > 1_000, "{bounds:?}: {states}, {recoveries}");
    }
}

#[test]
fn no_kill_loses_a_request_or_runs_it_again_after_its_answer() {
    explore(&BOUNDS);
}

#[test]
#[ignore = "takes minutes, and memory"]
fn no_kill_does_so_in_longer_runs() {
    explore(&FAR_BOUNDS);
}

#[test]
fn each_mutation_is_found_out() {
    for mutation in MUTATIONS {
        let run = |&bounds| Explorer::new(bounds, Some(mutation)).run().err();
        let found = BOUNDS.iter().find_map(run);
        println!("{mutation:?}: {found:?}");
        assert!(found.is_some(), "{mutation:?}");
    }
}
