//! How far a session is on its way to its end.

use std::sync::atomic::{AtomicU8, Ordering};

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

/// The phase of one session.
#[derive(Debug)]
pub(crate) struct PhaseCell(AtomicU8);

impl Default for PhaseCell {
    fn default() -> Self {
        Self(AtomicU8::new(Phase::Serving as u8))
    }
}

impl PhaseCell {
    /// Release pairs with the Acquire in [`is_at`](Self::is_at): what came before is seen by the
    /// thread that sees the phase.
    pub(crate) fn advance_to(&self, phase: Phase) {
        self.0.fetch_max(phase as u8, Ordering::AcqRel);
    }

    /// Whether the session has got to `phase`.
    #[inline]
    pub(crate) fn is_at(&self, phase: Phase) -> bool {
        self.0.load(Ordering::Acquire) >= phase as u8
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
}
