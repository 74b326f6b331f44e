//! What another process asks of the device: what must outlive this one, and whether it hangs.

use super::DomainProxy;
use crate::datapath::queue::Footprint;
use crate::keeping::{Keeper, KeptModule, Modules};
use crate::signal::lock;
use std::sync::Arc;

impl DomainProxy {
    /// From now on `keeper` is told of what must outlive this process, as it is now and after each
    /// change. `standby` is what is to become the standby, and is not loaded yet.
    pub fn keep_with(&self, keeper: Box<dyn Keeper>, standby: Option<KeptModule>) {
        let others = self.lock_changes();
        let view = lock(&self.view);
        let modules = Modules {
            generation: view.generation,
            live: None,
            // Of another process's numbers; this one's begin with 1.
            standby: standby.map(|module| KeptModule { number: 0, ..module }),
            fault: view.fault().cloned(),
            told: Arc::clone(&view.record),
        };
        let live = view.live.domain().cloned();
        drop(view);
        let modules = modules.with(live.as_ref(), others.standby.as_ref());
        self.keeping.begin(keeper, modules);
    }

    /// Tells the keeper once more, because of something that it has to add.
    pub fn keep_again(&self) {
        self.keeping.tell();
    }

    /// Has each worker look at its queue.
    pub fn wake_workers(&self) {
        self.queues.notify_all();
    }

    /// Where all workers are on their way.
    #[must_use]
    pub fn footprints(&self) -> Vec<Footprint> {
        self.queues.footprints()
    }
}
