//! Mistakes that the models must find, each planted at the place it is about.
//!
//! Outside the model checker nothing is ever planted: [`planted`] is a constant `false`, and the
//! code around it is exactly the code without it. `models.rs` says which model finds which mistake.

/// A mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// The textbook's order: look at the gate first, then say that one is online, and not look
    /// again.
    LookThenCount,
    /// No barrier between coming online and the look at W (cases 2 and 3).
    NoFenceOnline,
    /// No barrier between lying down or leaving and the look at W (case 3).
    NoFenceOutside,
    /// No barrier between the upgrader's store to W and its look at the slots (case 2).
    NoFenceSwap,
    /// The same in a handover (case 3).
    NoFenceShut,
    /// A reader's announcement does not release its uses of the value (case 1).
    RelaxedAnnounce,
    /// The look at a slot does not acquire them (case 1).
    RelaxedPoll,
    /// An arrival is counted without handing on what came before it (case 5).
    RelaxedArrival,
    /// A claim does not take over what the sleeper did before it lay down (case 5).
    RelaxedClaim,
    /// W is stored without releasing what came before it.
    RelaxedOpen,
    /// Who opens the gate does not notify (case 6).
    NoNotify,
    /// A waiter looks at W before it takes the mutex, and not again (case 6).
    NoRecheck,
    /// An exchange that panics leaves the gate shut.
    ShutAfterPanic,
    /// Giving up leaves the gate shut.
    ShutAfterGiveUp,
    /// Giving up does not look whether the exchange has begun (case 5).
    GiveUpBlindly,
    /// A slot is claimed with a store instead of a compare-and-swap: two claimers count it twice
    /// (case 4).
    ClaimByStore,
    /// A slot that is claimed already is claimed again (case 4).
    ClaimTwice,
    /// A claimer that comes late, from a gate that was given up, takes the slot from the gate of
    /// now (case 4).
    ClaimBackwards,
    /// A reader whose slot was claimed for a gate of the past believes that the gate of now has it
    /// (case 3).
    SleepOnAnyClaim,
    /// A reader that wakes goes on although it counts as arrived (case 4).
    WakeHeld,
    /// A reader attaches to a slot that counts as arrived (case 4).
    AttachHeld,
    /// A reader that saw the gate keeps the value of an earlier epoch with the gate's (case 1).
    KeepOldAtGate,
    /// A reader that leaves at a shut gate does not count as arrived (case 3).
    LeaveUncounted,
}

/// Whether a mistake is to be made.
#[cfg(not(loom))]
#[inline(always)]
pub(crate) const fn planted(_: Mutation) -> bool {
    false
}

/// Whether a mistake is to be made: the one that the environment names, in the process that a test
/// started for it.
#[cfg(loom)]
pub(crate) fn planted(mutation: Mutation) -> bool {
    static NAME: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("SRCU_MUTATION").ok());
    NAME.as_ref().is_some_and(|name| *name == format!("{mutation:?}"))
}
