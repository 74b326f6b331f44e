//! The three words that everything is said with: the cell's, a reader slot's, and the count of
//! those who are missing.
//!
//! All carry an *epoch*, which only grows and never comes back, so that an old claim, arrival or
//! announcement can be told from a new one without clearing anything. The narrowest has 48 bits for
//! it ([`Pending`]): 4 years of a million handovers per second, and an assertion
//! ([`Word::next_epoch`]).

/// What the cell says to its readers: the epoch, and whether the gate is shut.
///
/// Each change of either, publishing or shutting or opening, is a new epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

impl Word {
    pub(crate) const FIRST: Self = Self::open(1);
    /// Never said by a cell: what a reader has seen that has seen nothing.
    pub(crate) const NONE: Self = Self::open(0);

    pub(crate) const fn open(epoch: u64) -> Self {
        Self(epoch << 1)
    }

    pub(crate) const fn shut(epoch: u64) -> Self {
        Self(epoch << 1 | 1)
    }

    pub(crate) const fn epoch(self) -> u64 {
        self.0 >> 1
    }

    pub(crate) fn next_epoch(self) -> u64 {
        let next = self.epoch() + 1;
        assert!(next < Pending::EPOCHS, "the cell's 48-bit epoch is used up");
        next
    }

    pub(crate) const fn is_shut(self) -> bool {
        self.0 & 1 == 1
    }
}

/// What a reader slot says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Kind {
    /// No reader.
    Absent = 0,
    /// A reader outside any read section that owes nothing.
    Asleep = 1,
    /// A reader outside any read section that owes completions: not to be claimed, it must come by
    /// itself.
    Owing = 2,
    /// A reader that may be in a read section.
    Online = 3,
    /// A reader that waits at the gate.
    Arrived = 4,
}

/// A slot: its kind, and an epoch whose meaning depends on it.
///
/// `Online`, `Owing`: the last epoch at which the reader was between two read sections, 0 if it has
/// not looked yet. `Absent`, `Asleep`, `Arrived`: if it is the epoch at which the gate was shut,
/// the slot counts as arrived there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotWord(pub(crate) u64);

impl SlotWord {
    pub(crate) const fn new(epoch: u64, kind: Kind) -> Self {
        Self(epoch << 3 | kind as u64)
    }

    pub(crate) const fn epoch(self) -> u64 {
        self.0 >> 3
    }

    /// Whether it can count as arrived.
    pub(crate) fn is_outside(self) -> bool {
        matches!(self.kind(), Kind::Absent | Kind::Asleep | Kind::Arrived)
    }

    pub(crate) fn kind(self) -> Kind {
        match self.0 & 7 {
            0 => Kind::Absent,
            1 => Kind::Asleep,
            2 => Kind::Owing,
            3 => Kind::Online,
            4 => Kind::Arrived,
            other => unreachable!("slot kind {other} was never stored"),
        }
    }
}

/// How many slots have not arrived yet at the gate that was shut at an epoch: 48 bits of epoch, 16
/// of count.
///
/// Epoch 0 stands for no gate. Count 0 of a live epoch: the last one runs the exchange.
/// A cell has at most 65,535 slots, and a count starts there and only goes down, so it fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pending(pub(crate) u64);

impl Pending {
    pub(crate) const NONE: Self = Self(0);
    const EPOCHS: u64 = 1 << 48;

    pub(crate) const fn new(epoch: u64, count: u64) -> Self {
        Self(epoch << 16 | count)
    }

    pub(crate) const fn epoch(self) -> u64 {
        self.0 >> 16
    }

    pub(crate) const fn count(self) -> u64 {
        self.0 & 0xffff
    }
}
