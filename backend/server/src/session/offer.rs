//! What a session's guest is offered, and what it has made of it: feature bits and the
//! configuration space.

use super::beginning::TellBelief;
use super::config::SessionConfig;
use crate::sync::lock;
use domain_abi::DeviceInfo;
use proxy::DomainProxy;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use virtio_blk::{Belief, ConfigSpace, Limits, features};

/// The device as one session's guest sees it.
///
/// All of it stays as it was when the session began, but for the capacity: that is looked at when
/// the frontend asks for the configuration space, which is how a guest hears of it. What requests
/// are held against follows at that moment, before the frontend has its answer.
pub(super) struct Offer {
    proxy: Arc<DomainProxy>,
    /// As the session found it.
    info: DeviceInfo,
    space: Mutex<ConfigSpace>,
    limits: Mutex<Arc<Limits>>,
    acked: AtomicU64,
    /// Told what the driver believes, under the lock of the space.
    believes: OnceLock<TellBelief>,
}

impl Offer {
    /// What the device is now. Returns `None` if an upgrade takes longer than `patience`.
    pub(super) fn new(
        proxy: &Arc<DomainProxy>,
        config: &SessionConfig,
        patience: Duration,
    ) -> Option<Self> {
        let space = |info: &DeviceInfo| ConfigSpace::new(info, config.queues, config.queue_size);
        let info = proxy.offer(patience, |info| space(info).required_capabilities())?;
        Some(Self {
            proxy: Arc::clone(proxy),
            space: Mutex::new(space(&info)),
            limits: Mutex::new(Arc::new(Limits::new(&info, 0))),
            acked: AtomicU64::new(0),
            believes: OnceLock::new(),
            info,
        })
    }

    /// The driver goes on with what another process has offered it, and believes this.
    pub(super) fn resume(&self, belief: Belief) {
        lock(&self.space).resume(belief);
    }

    /// Has `tell` told what the driver believes, from now on.
    pub(super) fn tell_belief(&self, tell: TellBelief) {
        let space = lock(&self.space);
        tell(space.belief());
        let _ = self.believes.set(tell);
    }

    /// The feature bits that are offered.
    pub(super) fn features(&self) -> u64 {
        features::offered(&self.info)
    }

    /// The guest has acknowledged `acked` of them.
    pub(super) fn acknowledge(&self, acked: u64) {
        self.acked.store(acked, Ordering::Relaxed);
        let mut limits = lock(&self.limits);
        // The same features are acknowledged again when a migration's log is turned on or off. A
        // worker that serves keeps what it has found, and hears of a larger disk in that only.
        if limits.features != acked {
            let capacity = limits.capacity.get();
            *limits = Arc::new(Limits::new(&DeviceInfo { capacity, ..self.info.clone() }, acked));
        }
        drop(limits);
        self.configure(|space| space.set_acked_features(acked));
    }

    /// The guest begins anew.
    pub(super) fn reset(&self) {
        self.acked.store(0, Ordering::Relaxed);
        self.configure(ConfigSpace::reset);
    }

    /// Reads the configuration space, or whatever needs it as it is now: the guest is told by it.
    pub(super) fn tell<T>(&self, read: impl FnOnce(&mut ConfigSpace) -> T) -> T {
        self.configure(|space| {
            let capacity = self.proxy.capacity();
            let limits = lock(&self.limits);
            if limits.capacity.get() != capacity {
                limits.capacity.set(capacity);
                space.set_capacity(capacity);
            }
            drop(limits);
            read(space)
        })
    }

    /// What requests are held against.
    pub(super) fn limits(&self) -> Arc<Limits> {
        Arc::clone(&lock(&self.limits))
    }

    /// Does something to the configuration space; afterwards the domain's write cache is in the
    /// mode that it says.
    pub(super) fn configure<T>(&self, change: impl FnOnce(&mut ConfigSpace) -> T) -> T {
        let mut space = lock(&self.space);
        let before = space.belief();
        let result = change(&mut space);
        // Under the lock, so that the last to change it is the last to tell.
        self.proxy.set_write_cache(space.write_cache());
        if let Some(tell) = self.believes.get()
            && space.belief() != before
        {
            tell(space.belief());
        }
        result
    }

    /// The session is over. A frontend that comes back with the same guest relies on what that
    /// guest has acknowledged.
    pub(super) fn close(&self) {
        self.proxy.require(features::required_capabilities(self.acked.load(Ordering::Relaxed)));
    }
}
