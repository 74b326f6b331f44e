//! A device that another process had, gone on with in this one.
//!
//! ```text
//!   storage filled, owned by the host -> live module verified, loaded, prepared
//!     -> (the other process gives the device up) -> storage filled with what there is then
//!     -> activated, published: same generation -> the standby
//! ```
//!
//! Where the other process has died with a generation on trial, its standby is the live module of
//! this; if that cannot serve, the one on trial does after all, because nothing else would.
//!
//! As an upgrade of a faulted device: nothing serves until the module is activated. Everything up
//! to that only looks at what is in storage, so the other process may serve meanwhile.

use crate::change::prepare::Preparer;
use crate::device::{DomainProxy, Live};
use crate::domain::LoadedDomain;
use crate::keeping::KeptModule;
use crate::record::canary::CanaryReport;
use crate::record::code::Code;
use crate::record::report::{DomainRecord, Options, Phases, Refusal};
use crate::signal::lock;
use domain_abi::Capabilities;
use domain_host::{ImageOpener, ModuleLoader, QUEUE_LIMIT};
use std::sync::Arc;
use std::time::Duration;
use storage::Filling;

/// How long a domain that was never live is waited for.
const TO_RETIRE: Duration = Duration::from_secs(1);

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

/// What is to serve, and what if that is refused.
struct Plan {
    saved: Saved,
    /// The module that was on trial when its server died; `saved.live` is its standby then.
    canary: Option<KeptModule>,
    /// Why that standby cannot serve again, so that the canary is `saved.live` again.
    refused: Option<Refusal>,
}

impl Plan {
    /// A generation that was on trial when its server died, perhaps by its doing, is not gone on
    /// with if there is a standby.
    fn new(mut saved: Saved) -> Self {
        let mut canary = None;
        if saved.canary == Some(saved.generation)
            && let Some(standby) = saved.standby.take()
        {
            log::warn!(
                "generation {} was on trial when its server died: `{}` {} is to serve again",
                saved.generation,
                standby.name,
                standby.version
            );
            canary = saved.live.replace(standby);
            saved.generation += 1;
        }
        Self { saved, canary, refused: None }
    }

    /// The standby cannot serve, because of `refusal`: a device on the canary is better than none.
    ///
    /// # Errors
    /// There is no canary. It is the same refusal.
    fn put_canary_back(&mut self, refusal: Refusal) -> Result<(), Refusal> {
        let Some(canary) = self.canary.take() else { return Err(refusal) };
        let saved = &mut self.saved;
        saved.standby = saved.live.replace(canary);
        saved.generation -= 1;
        log::error!(
            "generation {} was on trial when its server died, and serves on: its standby does not ({}): {refusal}",
            saved.generation,
            refusal.code
        );
        self.refused = Some(refusal);
        Ok(())
    }

    /// What was on trial, and why it serves on if it does.
    fn verdict(&self) -> Option<CanaryReport> {
        let canary = self.saved.canary?;
        match &self.refused {
            Some(refusal) => {
                let refused = format!("({}): {refusal}", refusal.code);
                Some(CanaryReport::of_stuck_before(canary, &refused))
            }
            None => (canary < self.saved.generation).then(|| CanaryReport::of_before(canary)),
        }
    }
}

/// A device that is prepared, and not this process's yet.
pub struct Restoring {
    preparer: Preparer,
    queues: usize,
    plan: Plan,
    /// What is to serve, and what it was made of.
    next: Option<(LoadedDomain, KeptModule)>,
}

impl Restoring {
    /// Prepares a device of `queues` queues to go on with `saved`. If it `is_patient`, what does
    /// not answer is waited for, because nothing else serves.
    ///
    /// # Errors
    /// Why its live module cannot be used.
    ///
    /// # Panics
    /// If `queues` is 0 or above [`QUEUE_LIMIT`]: the caller has checked its arguments.
    pub fn prepare(
        loader: Box<dyn ModuleLoader>,
        opener: Option<Arc<dyn ImageOpener>>,
        saved: Saved,
        queues: usize,
        is_patient: bool,
    ) -> Result<Self, Refusal> {
        assert!((1..=QUEUE_LIMIT).contains(&queues), "{queues} queues");
        let preparer = Preparer::new(loader, opener, queues);
        preparer.images.be_patient(is_patient);
        let mut restoring = Self { preparer, queues, plan: Plan::new(saved), next: None };
        restoring.fill_and_prepare()?;
        Ok(restoring)
    }

    /// The other process has gone on meanwhile: `saved` is what it has left now. Its live module is
    /// prepared anew where it is another one, or has other parameters.
    ///
    /// # Errors
    /// Why its live module cannot be used.
    pub fn update(&mut self, saved: Saved) -> Result<(), Refusal> {
        self.plan = Plan::new(saved);
        self.fill_and_prepare()
    }

    fn fill_and_prepare(&mut self) -> Result<(), Refusal> {
        self.preparer.storage.fill(std::mem::take(&mut self.plan.saved.storage));
        self.prepare_live().or_else(|refusal| {
            self.plan.put_canary_back(refusal)?;
            self.prepare_live()
        })
    }

    fn prepare_live(&mut self) -> Result<(), Refusal> {
        let Some(live) = &self.plan.saved.live else {
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
        let Self { preparer, queues, mut plan, next } = self;
        preparer.images.be_patient(false);
        let why = plan.saved.fault.take();
        let why = why.unwrap_or_else(|| "the server before had no live domain".to_owned());
        let told = Arc::new(plan.saved.told.clone());
        let generation = plan.saved.generation;
        let live = Live::Faulted(why);
        let proxy = DomainProxy::assemble(preparer, queues, None, live, told, generation);
        proxy.require(plan.saved.required);
        // Whether it was claimed the process before knew: it is given back once no ring runs.
        lock(&proxy.claims.held).is_ours = true;
        if let Some((next, _)) = next
            && let Err(refusal) = proxy.go_on_with(next, &plan)
        {
            plan.put_canary_back(refusal)?;
            if let Some(canary) = &plan.saved.live {
                proxy.go_on_with(proxy.preparer.prepare_kept(canary)?, &plan)?;
            }
        }
        if let Some(verdict) = plan.verdict() {
            proxy.canary.judged_before(verdict);
        }
        Ok((proxy, plan.saved.standby))
    }
}

impl DomainProxy {
    /// Has `next` serve where nothing does.
    fn go_on_with(self: &Arc<Self>, next: LoadedDomain, plan: &Plan) -> Result<(), Refusal> {
        let Saved { told, generation, .. } = &plan.saved;
        let (limit, mut phases) = (Options::default().limit(), Phases::default());
        let served = self
            .check_compatible(&told.info, &next)
            .and_then(|()| self.recover(&next, *generation, limit, &mut phases));
        if served.is_err() {
            self.retire_unused(next);
        }
        served
    }

    /// Ends one that was never live, so that it has no requests.
    fn retire_unused(&self, domain: LoadedDomain) {
        let _ = self.retire(domain, TO_RETIRE, &mut Phases::default());
    }

    /// Has the standby of the process before stand by again, unless there is another one by now, or
    /// the live domain dies meanwhile: then it takes over. Calls `has_begun` once operators'
    /// commands, and a takeover, wait for it.
    ///
    /// # Errors
    /// Why there is none.
    pub fn take_standby(
        self: &Arc<Self>,
        module: &KeptModule,
        has_begun: impl FnOnce(),
    ) -> Result<(), Refusal> {
        let operator = lock(&self.operator);
        let coming = self.coming.begin(&self.signal);
        // From now on they wait for what is on its way, as long as that is of use.
        drop(operator);
        has_begun();
        let prepared = self.check_stopping().and_then(|()| self.preparer.prepare_kept(module));
        let taken = prepared.and_then(|domain| {
            coming.arrived(domain).map_err(|late| {
                self.retire_unused(late);
                let message = "it was loaded too late: a takeover has waited for it in vain";
                Refusal::new(Code::NoStandby, message)
            })
        });
        let mut others = self.lock_changes();
        // A takeover may have had it.
        if let Some(domain) = self.coming.take() {
            if others.standby.is_none() {
                others.standby = Some(domain);
            } else {
                self.retire_unused(domain);
            }
        }
        self.show(&others);
        taken
    }
}
