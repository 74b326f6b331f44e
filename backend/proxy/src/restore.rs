//! A device that another process had, gone on with in this one.
//!
//! ```text
//!   storage filled, owned by the host -> live module verified, loaded, prepared
//!     -> (the other process gives the device up) -> storage filled with what there is then
//!     -> activated, published: same generation -> the standby
//! ```
//!
//! As an upgrade of a faulted device: nothing serves until the module is activated. Everything up
//! to that only looks at what is in storage, so the other process may serve meanwhile.

use crate::change::prepare::Preparer;
use crate::device::{DomainProxy, Live};
use crate::domain::LoadedDomain;
use crate::keeping::KeptModule;
use crate::record::report::{DomainRecord, Phases, Refusal};
use crate::signal::lock;
use domain_abi::Capabilities;
use domain_host::{ModuleLoader, QUEUE_LIMIT};
use std::sync::Arc;
use std::time::Duration;
use storage::Filling;

/// What another process has left; see [`Kept`](crate::Kept).
#[derive(Debug)]
pub struct Saved {
    /// Number of the live instance.
    pub generation: u64,
    /// The live module; none if the device is faulted.
    pub live: Option<KeptModule>,
    /// The standby's.
    pub standby: Option<KeptModule>,
    /// Why nothing serves, if nothing does.
    pub fault: Option<String>,
    /// What the guest was told of the device.
    pub told: DomainRecord,
    /// What is in storage.
    pub storage: Filling,
    /// What guests rely on.
    pub required: Capabilities,
    /// The generation that was on trial, if one was.
    pub canary: Option<u64>,
}

/// A device that is prepared, and not this process's yet.
pub struct Restoring {
    preparer: Preparer,
    queues: usize,
    saved: Saved,
    /// What is to serve, and what it was made of.
    next: Option<(LoadedDomain, KeptModule)>,
}

impl Restoring {
    /// Prepares a device of `queues` queues to go on with `saved`.
    ///
    /// # Errors
    /// Why its live module cannot be used.
    ///
    /// # Panics
    /// If `queues` is 0 or above [`QUEUE_LIMIT`]: the caller has checked its arguments.
    pub fn prepare(
        loader: Box<dyn ModuleLoader>,
        saved: Saved,
        queues: usize,
    ) -> Result<Self, Refusal> {
        assert!((1..=QUEUE_LIMIT).contains(&queues), "{queues} queues");
        let preparer = Preparer::new(loader, queues);
        let mut restoring = Self { preparer, queues, saved, next: None };
        restoring.fill();
        restoring.prepare_live()?;
        Ok(restoring)
    }

    /// The other process has gone on meanwhile: `saved` is what it has left now. Its live module is
    /// prepared anew where it is another one, or has other parameters.
    ///
    /// # Errors
    /// Why its live module cannot be used.
    pub fn update(&mut self, saved: Saved) -> Result<(), Refusal> {
        self.saved = saved;
        self.fill();
        self.prepare_live()
    }

    fn fill(&mut self) {
        self.preparer.storage.fill(std::mem::take(&mut self.saved.storage));
    }

    /// A generation that was on trial when its server died, perhaps by its doing, is not gone on
    /// with if there is a standby: that it could be was made sure of before.
    fn take_canary_back(&mut self) {
        let saved = &mut self.saved;
        if saved.canary == Some(saved.generation)
            && let Some(standby) = saved.standby.take()
        {
            log::warn!(
                "generation {} was on trial when its server died: `{}` {} serves again",
                saved.generation,
                standby.name,
                standby.version
            );
            saved.live = Some(standby);
            saved.generation += 1;
        }
    }

    fn prepare_live(&mut self) -> Result<(), Refusal> {
        self.take_canary_back();
        let Some(live) = &self.saved.live else {
            self.next = None;
            return Ok(());
        };
        if !self.next.as_ref().is_some_and(|(_, module)| module.is_same(live)) {
            self.next = None;
            self.next = Some((self.preparer.prepare_kept(live)?, live.clone()));
        }
        Ok(())
    }

    /// The device is this process's from now on, and serves, unless it was faulted. Comes back with
    /// what is to be [its standby](DomainProxy::take_standby).
    ///
    /// # Errors
    /// Why its live module cannot be used.
    pub fn activate(self) -> Result<(Arc<DomainProxy>, Option<KeptModule>), Refusal> {
        let Self { preparer, queues, saved, next } = self;
        let Saved { generation, standby, fault, told, required, canary, .. } = saved;
        let why = fault.unwrap_or_else(|| "the server before had no live domain".to_owned());
        let told = Arc::new(told);
        let live = Live::Faulted(why);
        let record = Arc::clone(&told);
        let proxy = DomainProxy::assemble(preparer, queues, None, live, record, generation);
        proxy.require(required);
        if let Some(canary) = canary.filter(|&canary| canary < generation) {
            proxy.canary.taken_back_before(canary);
        }
        if let Some((next, _)) = next {
            proxy.check_compatible(&told.info, &next)?;
            proxy.recover(&next, generation, &mut Phases::default())?;
        }
        Ok((proxy, standby))
    }
}

impl DomainProxy {
    /// Has the standby of the process before stand by again, unless there is another one by now.
    ///
    /// # Errors
    /// Why there is none.
    pub fn take_standby(self: &Arc<Self>, module: &KeptModule) -> Result<(), Refusal> {
        let _operator = lock(&self.operator);
        let prepared = self.check_stopping().and_then(|()| self.preparer.prepare_kept(module));
        let mut others = self.lock_changes();
        match prepared {
            Ok(domain) if others.standby.is_none() => others.standby = Some(domain),
            Ok(domain) => {
                // It was never live, so it has no requests.
                let limit = Duration::from_secs(1);
                let _ = self.retire(domain, limit, &mut Phases::default());
            }
            Err(refusal) => {
                self.show(&others);
                return Err(refusal);
            }
        }
        self.show(&others);
        Ok(())
    }
}
