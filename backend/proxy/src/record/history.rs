//! How changes ended: the newest in full, all of them as counts.

use crate::record::report::{Change, Entry};
use serde::Serialize;
use std::collections::VecDeque;

/// How many entries the history keeps.
const KEPT: usize = 1024;

/// How many changes ended how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Committed upgrades.
    pub committed: u64,
    /// Refused upgrades and rollbacks.
    pub refused: u64,
    /// Committed rollbacks.
    pub rolled_back: u64,
    /// Takeovers by the standby.
    pub takeovers: u64,
}

/// All changes that have ended.
#[derive(Default)]
pub(crate) struct History {
    counts: Counts,
    entries: VecDeque<Entry>,
}

impl History {
    pub(crate) fn push(&mut self, entry: Entry) {
        match (entry.change, &entry.result) {
            (Change::Takeover, Ok(_)) => self.counts.takeovers += 1,
            // The fault is what is told of it.
            (Change::Takeover, Err(_)) => {}
            // These are counts of upgrades.
            (Change::Resize, _) => {}
            (_, Err(_)) => self.counts.refused += 1,
            (Change::Upgrade, Ok(_)) => self.counts.committed += 1,
            (Change::Rollback, Ok(_)) => self.counts.rolled_back += 1,
        }
        if self.entries.len() == KEPT {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
    }

    pub(crate) const fn counts(&self) -> Counts {
        self.counts
    }

    /// Oldest first.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }
}
