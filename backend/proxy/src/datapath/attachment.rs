//! A worker's use of one domain.

use crate::datapath::inflight::TagScheme;
use crate::domain::{Attachment, LoadedDomain};

/// One queue of one instance, as long as something is in flight there or it is the live one.
pub(super) struct QueueAttachment {
    pub(super) attachment: Attachment,
    pub(super) tags: TagScheme,
    pub(super) in_flight: usize,
}

impl QueueAttachment {
    /// Whether the instance has panicked.
    #[inline(always)]
    pub(super) fn is_dead(&self) -> bool {
        self.attachment.handle.instance().is_dead()
    }

    /// Whether it is a queue of this domain.
    pub(super) fn is_of(&self, domain: &LoadedDomain) -> bool {
        self.attachment.domain().id == domain.id
    }
}
