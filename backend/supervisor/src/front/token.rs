//! What the loop looks at for the front.

use rustix::event::PollFlags;
use std::os::fd::BorrowedFd;

/// Names one of the front's descriptors, until the next call of
/// [`Front::polled`](super::Front::polled).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token(pub(super) u64);

impl Token {
    pub(super) const LISTENER: Self = Self(u64::MAX);
    pub(super) const OBSERVER: Self = Self(u64::MAX - 1);

    /// Whether clients wait there to be let in.
    #[must_use]
    pub const fn is_listener(self) -> bool {
        self.0 == Self::LISTENER.0
    }

    pub(super) const fn of(client: u64, is_server: bool) -> Self {
        Self(client << 1 | is_server as u64)
    }
}

/// A descriptor to look at.
#[derive(Debug)]
pub struct Polled<'a> {
    /// Comes back with [`Front::ready`](super::Front::ready).
    pub token: Token,
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// What to look for.
    pub interest: PollFlags,
}
