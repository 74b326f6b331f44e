//! What all queues of a session share.

use super::claim::SessionClaim;
use super::config::SessionConfig;
use super::connection::Connection;
use super::lookout::Lookout;
use super::memory::SharedMemory;
use super::offer::Offer;
use crate::phase::PhaseCell;
use proxy::DomainProxy;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use virtqueue::GuestMemory;
use vm_memory::GuestMemoryAtomic;

/// The parts of one session that belong to no queue.
pub(super) struct Context {
    pub(super) proxy: Arc<DomainProxy>,
    pub(super) config: SessionConfig,
    pub(super) phase: Arc<PhaseCell>,
    pub(super) offer: Offer,
    pub(super) memory: SharedMemory,
    pub(super) connection: Arc<Connection>,
    pub(super) lookout: Lookout,
    pub(super) claim: Arc<SessionClaim>,
}

impl Context {
    /// Of a session that begins, with the map that its frontend fills.
    ///
    /// # Errors
    /// There are no descriptors left, or an upgrade takes longer than `patience`.
    pub(super) fn new(
        proxy: &Arc<DomainProxy>,
        config: &SessionConfig,
        map: GuestMemoryAtomic<GuestMemory>,
        patience: Duration,
    ) -> io::Result<Self> {
        let offer = Offer::new(proxy, config, patience).ok_or_else(|| {
            io::Error::new(io::ErrorKind::TimedOut, "an upgrade is under way, and does not end")
        })?;
        let (phase, connection) = (Arc::<PhaseCell>::default(), Arc::<Connection>::default());
        phase.on_unlogged({
            let connection = Arc::clone(&connection);
            move || connection.end()
        });
        Ok(Self {
            proxy: Arc::clone(proxy),
            config: config.clone(),
            phase,
            offer,
            memory: SharedMemory::new(map),
            connection,
            lookout: Lookout::new()?,
            claim: SessionClaim::new(proxy),
        })
    }
}
