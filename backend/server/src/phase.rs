//! How far a session is on its way to its end.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use virtqueue::DirtyLog;

/// How far a session is. It only ever goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Requests are taken and answered.
    Serving,
    /// Nothing more is taken; what is in flight is waited for and answered.
    Draining,
    /// The frontend is gone, or is let go now: what ends is not published any more. Whatever
    /// reconnects goes on at the used index that it finds.
    Detached,
    /// As well, and what is in flight has been waited for in vain: there is no patience left.
    GaveUp,
}

/// What is below a phase in the cell.
const SHIFT: u32 = 2;
const LOGGED: u8 = 1;
const HUSHED: u8 = 2;

/// The phase of one session, and what else changes how its queues answer: it is looked at with one
/// load.
pub(crate) struct PhaseCell {
    cell: AtomicU8,
    /// Queues whose requests in flight are left to another process, a bit each.
    hushed: AtomicU64,
    /// Where a migration's log is.
    log: Arc<DirtyLog>,
    /// Told of what was written and could not be marked there.
    unlogged: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Default for PhaseCell {
    fn default() -> Self {
        Self {
            cell: AtomicU8::new((Phase::Serving as u8) << SHIFT),
            hushed: AtomicU64::new(0),
            log: Arc::default(),
            unlogged: OnceLock::new(),
        }
    }
}

impl PhaseCell {
    /// Release pairs with the Acquire in [`is_at`](Self::is_at): what came before is seen by the
    /// thread that sees the phase.
    pub(crate) fn advance_to(&self, phase: Phase) {
        self.change(|cell| cell.max((phase as u8) << SHIFT | cell & (LOGGED | HUSHED)));
    }

    fn change(&self, change: impl Fn(u8) -> u8) {
        let changed = |cell| Some(change(cell));
        // It is never none.
        let _ = self.cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
    }

    fn set(&self, flag: u8, on: bool) {
        self.change(|cell| if on { cell | flag } else { cell & !flag });
    }

    /// Whether the session has got to `phase`.
    #[inline]
    pub(crate) fn is_at(&self, phase: Phase) -> bool {
        self.cell.load(Ordering::Acquire) >= (phase as u8) << SHIFT
    }

    /// Whether answers are published, and nothing else is to be done about them.
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.cell.load(Ordering::Acquire) & !((Phase::Draining as u8) << SHIFT) == 0
    }

    /// Where writes into guest memory are marked.
    pub(crate) const fn log(&self) -> &Arc<DirtyLog> {
        &self.log
    }

    /// What is published from now on is marked in the log first, or is not any more. Holds for
    /// each queue when its ring's lock was held once. Returns whether that is a change.
    pub(crate) fn turn_log(&self, on: bool) -> bool {
        let is_change = self.log.turn(on);
        self.set(LOGGED, on);
        is_change
    }

    /// Whether what is published is to be marked in the log.
    pub(crate) fn is_logged(&self) -> bool {
        self.cell.load(Ordering::Acquire) & LOGGED != 0
    }

    /// Has `hook` called, with a ring's lock, whenever something was written that could not be
    /// marked in the log. A second hook is not called.
    pub(crate) fn on_unlogged(&self, hook: impl Fn() + Send + Sync + 'static) {
        let _ = self.unlogged.set(Box::new(hook));
    }

    /// Something was written that could not be marked.
    pub(crate) fn tell_unlogged(&self) {
        self.unlogged.get().into_iter().for_each(|hook| hook());
    }

    /// Nothing that a queue has in flight is answered any more. To be called with its ring's lock.
    pub(crate) fn hush(&self, queue: usize) {
        self.hushed.fetch_or(1 << queue, Ordering::AcqRel);
        self.set(HUSHED, true);
    }

    /// A hushed queue has nothing in flight any more. To be called with its ring's lock.
    pub(crate) fn speak(&self, queue: usize) {
        self.hushed.fetch_and(!(1 << queue), Ordering::AcqRel);
    }

    /// Whether nothing that the queue has in flight is answered any more.
    pub(crate) fn is_hushed(&self, queue: usize) -> bool {
        self.hushed.load(Ordering::Acquire) & 1 << queue != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_never_left_for_an_earlier_one() {
        let all = [Phase::Serving, Phase::Draining, Phase::Detached, Phase::GaveUp];
        for first in all {
            for second in all {
                let cell = PhaseCell::default();
                cell.advance_to(first);
                cell.advance_to(second);
                for phase in all {
                    let expected = phase <= first.max(second);
                    assert_eq!(cell.is_at(phase), expected, "{first:?}, {second:?}: {phase:?}");
                }
            }
        }
    }

    #[test]
    fn what_else_there_is_neither_changes_the_phase_nor_is_changed_by_it() {
        for phase in [Phase::Serving, Phase::Draining, Phase::Detached, Phase::GaveUp] {
            let cell = PhaseCell::default();
            assert!(cell.turn_log(true) && !cell.turn_log(true) && !cell.is_plain());
            cell.hush(3);
            cell.advance_to(phase);
            assert!(cell.is_logged() && cell.is_hushed(3) && !cell.is_hushed(2));
            assert!(cell.is_at(phase) && !cell.is_plain());
            assert_eq!(cell.is_at(Phase::GaveUp), phase == Phase::GaveUp);
            cell.speak(3);
            assert!(cell.turn_log(false) && !cell.is_logged() && !cell.is_hushed(3));
            assert!(!cell.is_plain(), "it was hushed once");
        }
        let cell = PhaseCell::default();
        for (phase, is_plain) in
            [(Phase::Serving, true), (Phase::Draining, true), (Phase::Detached, false)]
        {
            cell.advance_to(phase);
            assert_eq!(cell.is_plain(), is_plain, "{phase:?}");
        }
    }
}
