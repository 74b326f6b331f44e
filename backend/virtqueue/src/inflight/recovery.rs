//! What a process makes of the marks of the one before it.

use super::layout::{Cell, FRESH, VERSION};
use super::region::Part;

/// A request that was in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Marked {
    /// Its number in the order of all.
    pub counter: u64,
    /// Its chain's first descriptor.
    pub head: u16,
}

/// Where a ring goes on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recovery {
    /// What was in flight, and is to run again before anything new, in this order. It is marked.
    pub resubmit: Vec<Marked>,
    /// The position of the next chain, whatever the frontend says. None if the region was fresh:
    /// then the frontend's is the one.
    pub next_avail: Option<u16>,
    /// The region contradicts itself or the ring, in this way. What it says of that is left out.
    pub contradiction: Option<Contradiction>,
}

/// What cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// A batch was published, and its list is none.
    #[error(
        "{published} answers were given since marks were last cleared, and the list of them is none"
    )]
    List {
        /// The used index of the ring, less that of the region.
        published: u16,
    },
    /// More is in flight than the driver waits for.
    #[error("{marked} requests are marked, and the driver waits for {outstanding}")]
    Marks {
        /// How many marks there are.
        marked: usize,
        /// The available index of the ring, less its used index.
        outstanding: u16,
    },
}

/// A ring when it is turned on.
#[derive(Debug, Clone, Copy)]
pub struct Ring {
    /// Its size.
    pub size: u16,
    /// Its used index.
    pub used_idx: u16,
    /// Its available index.
    pub avail_idx: u16,
}

/// Looks at what is marked, and brings it up to date. Can be done again at any point of it.
pub(super) fn recover(part: &Part, ring: Ring) -> Recovery {
    if part.header().version.get() == FRESH {
        initialise(part, ring);
        return Recovery::default();
    }
    let mut contradiction = clear_last_batch(part, ring);
    let mut resubmit = Vec::new();
    for head in 0..part.len() {
        let entry = part.entry(head);
        if entry.inflight.get() == 0 {
            continue;
        }
        if head < ring.size {
            resubmit.push(Marked { counter: entry.counter.get(), head });
        } else {
            // No chain of this ring begins there.
            entry.inflight.put(0);
        }
    }
    let outstanding = ring.avail_idx.wrapping_sub(ring.used_idx);
    if resubmit.len() > usize::from(outstanding) {
        contradiction = Some(Contradiction::Marks { marked: resubmit.len(), outstanding });
        // The marks are of another ring.
        initialise(part, ring);
        return Recovery { contradiction, ..Recovery::default() };
    }
    if resubmit.is_empty() {
        // As after a ring that was stopped with nothing in flight, and set up anew.
        contradiction = None;
    }
    resubmit.sort_unstable();
    let next_avail = Some(ring.used_idx.wrapping_add(resubmit.len() as u16));
    Recovery { resubmit, next_avail, contradiction }
}

/// Says that nothing is in flight.
fn initialise(part: &Part, ring: Ring) {
    let header = part.header();
    // From here on until the version is there again, nothing in it is looked at.
    header.version.put(FRESH);
    (0..part.len()).for_each(|head| part.entry(head).inflight.put(0));
    header.desc_num.put(part.len());
    header.last_batch_head.put(0);
    // Not 0: a ring that comes from elsewhere has been used before, and the difference would be
    // taken for a batch.
    header.used_idx.put(ring.used_idx);
    header.version.put(VERSION);
}

/// Clears the marks of the batch that was being published, if the guest has got it (steps 1.a to
/// 1.c of the specification's "When reconnecting").
fn clear_last_batch(part: &Part, ring: Ring) -> Option<Contradiction> {
    let header = part.header();
    let published = ring.used_idx.wrapping_sub(header.used_idx.get());
    if published == 0 {
        return None;
    }
    let list = last_batch(part, ring.size, published);
    list.iter().flatten().for_each(|&head| part.entry(head).inflight.put(0));
    // Last: as long as it is not there, all of this is done again.
    header.used_idx.put(ring.used_idx);
    list.is_none().then_some(Contradiction::List { published })
}

/// The heads of the last batch, of which there are `published`. None if the list is not that long:
/// then no such batch was written down, and clearing part of it would lose requests.
fn last_batch(part: &Part, size: u16, published: u16) -> Option<Vec<u16>> {
    if published > size {
        return None;
    }
    let mut is_in_list = vec![false; usize::from(size)];
    let mut list = Vec::with_capacity(usize::from(published));
    let mut head = part.header().last_batch_head.get();
    for _ in 0..published {
        let seen = is_in_list.get_mut(usize::from(head))?;
        if std::mem::replace(seen, true) {
            return None;
        }
        list.push(head);
        head = part.entry(head).next.get();
    }
    Some(list)
}
