//! What must outlive this process: told to a [`Keeper`], as it is after each change.
//!
//! What is told is always something that a device can go on with: a domain and the storage that it
//! has taken up. So both change in one step: what serves is noted here before the storage's
//! transaction is committed, and the storage tells of that.
//!
//! Deliberately absent: what becomes of it. Nothing here waits for it, or learns of it.

use crate::domain::LoadedDomain;
use crate::record::report::DomainRecord;
use crate::signal::lock;
use domain_abi::{Capabilities, Params};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use storage::{Contents, Storage};

/// What keeps it.
pub trait Keeper: Send + Sync {
    /// Something may have changed; `kept` says what there is now. Called from any thread, also
    /// while the guest waits for it. Of two calls at a time the one that asks `kept` later has what
    /// is newer.
    fn keep(&self, kept: &dyn Fn() -> Kept);

    /// What may be there soon, but for what is in storage then. Called while nothing waits for it,
    /// so that what can be made ready is.
    fn expect(&self, _soon: &Kept) {}
}

/// A module, with its bytes.
#[derive(Debug, Clone)]
pub struct KeptModule {
    /// Its instance's number; another instance of the process never has it.
    pub number: u64,
    /// Its bytes: a sealed memfd.
    pub image: Arc<OwnedFd>,
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Where it was read from.
    pub path: String,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
    /// By which it was found to be of trusted origin, if that was asked for.
    pub signature: Option<String>,
    /// Its parameters, inherited ones included.
    pub params: Params,
}

impl KeptModule {
    /// That of a domain; `None` if its bytes cannot be had.
    fn of(domain: &LoadedDomain) -> Option<Self> {
        let Some(image) = domain.instance.image() else {
            log::error!("{}: its module cannot be kept for another server", domain.label());
            return None;
        };
        let record = domain.record();
        Some(Self {
            number: domain.id.0,
            image: Arc::new(image),
            name: record.name.clone(),
            version: record.version.clone(),
            path: record.path.clone(),
            sha256: record.sha256.clone(),
            signature: domain.instance.identity().signature.clone(),
            params: record.params.clone(),
        })
    }

    /// Whether a domain would be the same.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        (&self.sha256, &self.params) == (&other.sha256, &other.params)
    }
}

/// What there is at a moment.
#[derive(Debug)]
pub struct Kept {
    /// Number of the live instance, or of the last one that was.
    pub generation: u64,
    /// The live module; none if the device is faulted.
    pub live: Option<KeptModule>,
    /// The standby's.
    pub standby: Option<KeptModule>,
    /// Why nothing serves, if nothing does.
    pub fault: Option<String>,
    /// What the guest was told of the device.
    pub told: Arc<DomainRecord>,
    /// What is in storage.
    pub storage: Contents,
    /// What guests rely on.
    pub required: Capabilities,
    /// The generation that is on trial, if one is, or is about to be: one that a server dies with
    /// is not gone on with.
    pub canary: Option<u64>,
}

/// What is not in storage.
#[derive(Debug, Clone)]
pub(crate) struct Modules {
    pub(crate) generation: u64,
    pub(crate) live: Option<KeptModule>,
    pub(crate) standby: Option<KeptModule>,
    pub(crate) fault: Option<String>,
    pub(crate) told: Arc<DomainRecord>,
}

impl Modules {
    /// With these, where they are.
    pub(crate) fn with(
        mut self,
        live: Option<&LoadedDomain>,
        standby: Option<&LoadedDomain>,
    ) -> Self {
        note(&mut self.live, live);
        if standby.is_some() {
            note(&mut self.standby, standby);
        }
        self
    }
}

impl Modules {
    fn served_by(&mut self, next: &LoadedDomain, generation: u64, replaced: Option<&LoadedDomain>) {
        self.generation = generation;
        self.fault = None;
        self.told = next.record();
        note(&mut self.live, Some(next));
        if replaced.is_some() {
            note(&mut self.standby, replaced);
        }
    }
}

/// What is told, and to what.
pub(crate) struct Keeping {
    storage: Arc<Storage>,
    required: AtomicU64,
    /// 0 is none.
    canary: AtomicU64,
    /// Nothing before there is a keeper.
    modules: Mutex<Option<Modules>>,
    /// As they will be when what is under way works.
    expected: Mutex<Option<Modules>>,
    keeper: OnceLock<Box<dyn Keeper>>,
}

impl Keeping {
    pub(crate) fn new(storage: &Arc<Storage>) -> Arc<Self> {
        Arc::new(Self {
            storage: Arc::clone(storage),
            required: AtomicU64::new(0),
            canary: AtomicU64::new(0),
            modules: Mutex::default(),
            expected: Mutex::default(),
            keeper: OnceLock::new(),
        })
    }

    /// From now on `keeper` is told. A second one is not.
    pub(crate) fn begin(self: &Arc<Self>, keeper: Box<dyn Keeper>, modules: Modules) {
        if self.keeper.set(keeper).is_ok() {
            *lock(&self.modules) = Some(modules);
            let keeping = Arc::downgrade(self);
            self.storage.tell(move || {
                if let Some(keeping) = keeping.upgrade() {
                    keeping.tell();
                }
            });
        }
        self.tell();
    }

    /// Tells what there is. Not to be called with the lock of anything that is told.
    pub(crate) fn tell(&self) {
        let Some(keeper) = self.keeper.get() else { return };
        keeper.keep(&|| {
            let modules = lock(&self.modules).clone();
            self.kept(modules.expect("they are there before the keeper is told"))
        });
    }

    fn kept(&self, modules: Modules) -> Kept {
        let Modules { generation, live, standby, fault, told } = modules;
        let (storage, required) = (self.storage.contents(), self.required());
        let canary = Some(self.tried()).filter(|&canary| canary != 0);
        Kept { generation, live, standby, fault, told, storage, required, canary }
    }

    /// `next` may serve soon: as in [`serves`](Self::serves), which has less to do then.
    pub(crate) fn may_serve(&self, next: &LoadedDomain, generation: u64, replaced: &LoadedDomain) {
        let Some(keeper) = self.keeper.get() else { return };
        let modules = lock(&self.modules).clone();
        let Some(mut modules) = modules else { return };
        modules.served_by(next, generation, Some(replaced));
        keeper.expect(&self.kept(modules.clone()));
        *lock(&self.expected) = Some(modules);
    }

    fn change(&self, change: impl FnOnce(&mut Modules)) {
        if let Some(modules) = &mut *lock(&self.modules) {
            change(modules);
        }
    }

    /// `next` is what serves, as `generation`; `replaced` is what does not any more, and lives.
    pub(crate) fn serves(
        &self,
        next: &LoadedDomain,
        generation: u64,
        replaced: Option<&LoadedDomain>,
    ) {
        let is_of = |module: &Option<KeptModule>, domain: Option<&LoadedDomain>| {
            module.as_ref().map(|module| module.number) == domain.map(|domain| domain.id.0)
        };
        let expected = lock(&self.expected).take().filter(|expected| {
            is_of(&expected.live, Some(next)) && is_of(&expected.standby, replaced)
        });
        self.change(|modules| {
            // They are held open already.
            if let Some(expected) = expected {
                (modules.live, modules.standby) = (expected.live, expected.standby);
            }
            modules.served_by(next, generation, replaced);
        });
    }

    /// The disk has another size: what serves, and what would next, are kept with what they are
    /// told of it from now on.
    pub(crate) fn resized(&self, live: &LoadedDomain, standby: Option<&LoadedDomain>) {
        let renew = |module: &mut Option<KeptModule>, domain: &LoadedDomain| {
            if let Some(module) = module.as_mut().filter(|module| module.number == domain.id.0) {
                module.params = domain.record().params.clone();
            }
        };
        self.change(|modules| {
            modules.told = live.record();
            renew(&mut modules.live, live);
            if let Some(standby) = standby {
                renew(&mut modules.standby, standby);
            }
        });
    }

    /// Nothing serves, because of `why`.
    pub(crate) fn is_faulted(&self, why: &str) {
        self.change(|modules| {
            modules.live = None;
            modules.fault = Some(why.to_owned());
        });
    }

    /// What would serve next.
    pub(crate) fn stands_by(&self, standby: Option<&LoadedDomain>) {
        self.change(|modules| note(&mut modules.standby, standby));
    }

    /// `generation` is on trial when it serves; 0 is none.
    pub(crate) fn tries(&self, generation: u64) {
        self.canary.store(generation, Ordering::Relaxed);
    }

    /// The generation on trial, when it serves; 0 is none.
    pub(crate) fn tried(&self) -> u64 {
        self.canary.load(Ordering::Relaxed)
    }

    pub(crate) fn require(&self, capabilities: Capabilities) {
        self.required.store(capabilities.0, Ordering::Relaxed);
    }

    pub(crate) fn required(&self) -> Capabilities {
        Capabilities(self.required.load(Ordering::Relaxed))
    }
}

fn note(module: &mut Option<KeptModule>, domain: Option<&LoadedDomain>) {
    let number = |domain: &LoadedDomain| domain.id.0;
    if module.as_ref().map(|module| module.number) != domain.map(number) {
        *module = domain.and_then(KeptModule::of);
    }
}
