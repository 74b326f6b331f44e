//! What a worker knows of its ring while the ring is on.

use super::inputs::Memory;
use vhost_user_backend::VringState;
use virtio_queue::QueueT;
use virtqueue::{RingView, ViewCache};

/// Begins anew when the ring is turned off.
#[derive(Default)]
pub(super) struct RingState {
    pub(super) views: ViewCache,
    /// The position of the next chain when the lock was held last; only good for a look.
    pub(super) next_avail: u16,
    /// The driver was asked not to kick, and not yet to kick again.
    pub(super) kicks_suppressed: bool,
    /// How many answers the guest has been given since its requests were last taken.
    pub(super) answers: usize,
    /// The ring made no sense; it is left alone until it is set up again.
    pub(super) is_broken: bool,
    /// It was on when it was looked at last, and made sense.
    pub(super) is_on: bool,
}

impl RingState {
    /// Whether chains have come since, as far as can be seen without the lock. The view may be of a
    /// ring that the frontend has given up, but it is mapped.
    #[inline]
    pub(super) fn has_more(&self) -> bool {
        self.views.last().is_some_and(|view| view.avail_idx() != self.next_avail)
    }

    /// Whether the driver has never written to the ring, as far as can be seen.
    pub(super) fn is_blank(&self) -> bool {
        let is_blank = |view: &RingView| view.avail_flags() == 0 && view.avail_idx() == 0;
        self.views.last().is_some_and(is_blank)
    }
}

/// Whether the frontend has started and enabled the ring (vhost-user, "Ring states").
pub(super) fn is_on(state: &VringState<Memory>) -> bool {
    state.get_queue().ready() && state.is_enabled()
}
