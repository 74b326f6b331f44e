//! A driver, a process that serves it, and the bytes between them.

use crate::inflight::Marked;
use crate::inflight::layout::{Entry, Header};

pub(super) const SIZE: u16 = 4;
pub(super) const PART: usize = size_of::<Header>() + SIZE as usize * size_of::<Entry>();
pub(super) const USED: usize = 4 + 8 * SIZE as usize;
pub(super) const USED_AT: u64 = 0x2000;
/// The queue whose part is used, and that there is another in front of it.
pub(super) const QUEUE: usize = 1;
/// No head of the ring's.
pub(super) const NO_HEAD: u16 = SIZE + 5;

/// The bytes that outlive a process.
#[derive(Clone, Hash)]
pub(super) struct Memory {
    pub(super) part: [u8; PART],
    pub(super) used: [u8; USED],
}

impl Memory {
    pub(super) fn used_idx(&self) -> u16 {
        u16::from_le_bytes([self.used[2], self.used[3]])
    }
}

/// A process that serves the ring. Requests are called by their place in what was offered.
#[derive(Clone, Hash)]
pub(super) struct Process {
    pub(super) counter: u64,
    pub(super) last_batch_head: u16,
    pub(super) unmarked: u16,
    pub(super) next: usize,
    /// With the domain.
    pub(super) held: Vec<usize>,
    /// To be submitted again.
    pub(super) replay: Vec<usize>,
    pub(super) is_cautious: bool,
}

#[derive(Clone, Hash)]
pub(super) struct World {
    pub(super) memory: Memory,
    /// The driver's: the heads that it has offered, and which of them were answered.
    pub(super) offered: Vec<u16>,
    pub(super) answered: Vec<bool>,
    pub(super) first: u16,
    pub(super) seen: u16,
    pub(super) process: Option<Process>,
    pub(super) kills: u8,
    pub(super) resets: u8,
    /// How often chains have gone back to the ring.
    pub(super) returns: u8,
}

impl World {
    pub(super) fn outstanding(&self) -> impl Iterator<Item = usize> {
        (0..self.offered.len()).filter(|&place| !self.answered[place])
    }

    pub(super) fn avail_idx(&self) -> u16 {
        self.first.wrapping_add(self.offered.len() as u16)
    }

    /// The request that the driver knows by `head`.
    pub(super) fn place(&self, head: u16) -> Option<usize> {
        self.outstanding().find(|&place| self.offered[place] == head)
    }

    /// The driver looks at the used ring.
    pub(super) fn look(&mut self) -> Result<(), String> {
        while self.seen != self.memory.used_idx() {
            let at = 4 + 8 * usize::from(self.seen % SIZE);
            let head = u16::from_le_bytes([self.memory.used[at], self.memory.used[at + 1]]);
            let place = self.place(head).ok_or(format!("{head} is not a head"))?;
            self.answered[place] = true;
            self.seen = self.seen.wrapping_add(1);
        }
        Ok(())
    }

    pub(super) fn process(&self) -> &Process {
        self.process.as_ref().expect("it lives")
    }

    pub(super) fn process_mut(&mut self) -> &mut Process {
        self.process.as_mut().expect("it lives")
    }
}

/// What a recovery says must be what the driver waits for.
pub(super) fn check(world: &World, resubmit: &[Marked], next: usize) -> Result<Vec<usize>, String> {
    let lost = |what: &str| Err(format!("{what}: {resubmit:?}, {next} of {:?}", world.offered));
    if next > world.offered.len() {
        return lost("the position is behind what was offered");
    }
    let mut replay = Vec::new();
    for marked in resubmit {
        match world.place(marked.head) {
            Some(place) if place < next => replay.push(place),
            Some(_) => return lost("run again and taken from the ring"),
            None => return lost("run again after its answer"),
        }
    }
    if !replay.is_sorted_by(|one, other| one < other) {
        return lost("not in the driver's order");
    }
    let found: Vec<_> = replay.iter().copied().chain(next..world.offered.len()).collect();
    if !world.outstanding().eq(found) {
        return lost("not what the driver waits for");
    }
    Ok(replay)
}
