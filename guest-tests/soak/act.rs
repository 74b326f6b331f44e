//! What can happen.

/// One thing that happens to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// To the next module that fits, by swap or handover.
    Upgrade,
    /// Back to the standby.
    Rollback,
    /// An upgrade that is refused: no such module.
    Refusal,
    /// The live domain dies in one of its next requests, and the standby takes over.
    Panic,
    /// The frontend disconnects in good order, and comes again.
    Reconnect,
    /// The frontend is gone with requests in flight, and comes again.
    Abandon,
    /// The disk grows.
    Resize,
    /// The serving process is killed.
    Kill,
    /// The serving process is exchanged.
    Exchange,
    /// The supervisor executes its program anew.
    ReExec,
    /// Both processes are killed, and the daemon is started again.
    Whole,
    /// The guest's machine is reset, with requests in flight.
    Reset,
}

impl Act {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Upgrade,
        Self::Rollback,
        Self::Refusal,
        Self::Panic,
        Self::Reconnect,
        Self::Abandon,
        Self::Resize,
        Self::Kill,
        Self::Exchange,
        Self::ReExec,
        Self::Whole,
        Self::Reset,
    ];

    /// As `--only` has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Upgrade => "upgrade",
            Self::Rollback => "rollback",
            Self::Refusal => "refusal",
            Self::Panic => "panic",
            Self::Reconnect => "reconnect",
            Self::Abandon => "abandon",
            Self::Resize => "resize",
            Self::Kill => "kill",
            Self::Exchange => "exchange",
            Self::ReExec => "re-exec",
            Self::Whole => "whole-kill",
            Self::Reset => "reset",
        }
    }

    /// Whether it takes seconds in a guest: it comes less often than the others.
    pub const fn is_slow(self) -> bool {
        matches!(self, Self::Whole | Self::Reset)
    }
}
