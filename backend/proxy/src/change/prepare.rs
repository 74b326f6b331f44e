//! Verify, load, prepare: everything of a change that needs nothing of the device but its
//! surroundings. Nothing of the live domain is touched.

use crate::change::refusals;
use crate::datapath::queue::Queues;
use crate::domain::{Domain, LoadedDomain};
use crate::environment::Environment;
use crate::images::Images;
use crate::keeping::KeptModule;
use crate::record::code::Code;
use crate::record::report::{DomainRecord, Phases, Refusal, timed};
use crate::record::residents::Residents;
use crate::services::Services;
use crate::signal::Signal;
use domain_abi::Params;
use domain_host::{
    CallError, Identity, ImageOpener, Instance, LoadError, ModuleLoader, VerifiedModule,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use storage::{DomainId, Storage};

/// Makes domains of modules.
pub(crate) struct Preparer {
    loader: Box<dyn ModuleLoader>,
    pub(crate) storage: Arc<Storage>,
    pub(crate) queues: Arc<Queues>,
    pub(crate) images: Arc<Images>,
    pub(crate) environment: Arc<Environment>,
    pub(crate) residents: Arc<Residents>,
    pub(crate) signal: Arc<Signal>,
    /// How many domains have had an id.
    prepared: AtomicU64,
}

impl Preparer {
    /// With an empty storage, for a device of `queues` queues.
    pub(crate) fn new(
        loader: Box<dyn ModuleLoader>,
        opener: Option<Arc<dyn ImageOpener>>,
        queues: usize,
    ) -> Self {
        Self {
            loader,
            storage: Arc::default(),
            queues: Arc::new(Queues::new(queues)),
            images: Arc::new(Images::new(opener)),
            environment: Arc::default(),
            residents: Arc::default(),
            signal: Arc::default(),
            prepared: AtomicU64::new(0),
        }
    }

    /// Verifies, loads and prepares the module `name`, as a successor of `live` if there is one.
    /// `is_wanted` is asked before any code of it runs.
    ///
    /// # Errors
    /// Why it is refused.
    pub(crate) fn prepare(
        &self,
        name: &str,
        given: Params,
        live: Option<&DomainRecord>,
        is_wanted: impl FnOnce() -> Result<(), Refusal>,
        phases: &mut Phases,
    ) -> Result<LoadedDomain, Refusal> {
        let verified = timed(&mut phases.verify, || self.loader.verify(name)).map_err(loading)?;
        self.prepare_verified(verified, given, live, is_wanted, phases)
    }

    /// As [`prepare`](Self::prepare), of a module that another process had, and with just the
    /// parameters that it had there.
    ///
    /// # Errors
    /// Why it is refused.
    pub(crate) fn prepare_kept(&self, module: &KeptModule) -> Result<LoadedDomain, Refusal> {
        let origin = Identity {
            path: module.path.clone(),
            sha256: module.sha256.clone(),
            signature: module.signature.clone(),
            ..Identity::default()
        };
        let image = module.image.try_clone().map_err(|error| {
            let message = format!("no descriptor for the kept module `{}`: {error}", module.path);
            Refusal::new(Code::Module("module_unreadable"), message)
        })?;
        let verified = self.loader.verify_kept(image, &origin).map_err(loading)?;
        let params = module.params.clone();
        self.prepare_verified(verified, params, None, || Ok(()), &mut Phases::default())
    }

    fn prepare_verified(
        &self,
        verified: Box<dyn VerifiedModule>,
        given: Params,
        live: Option<&DomainRecord>,
        is_wanted: impl FnOnce() -> Result<(), Refusal>,
        phases: &mut Phases,
    ) -> Result<LoadedDomain, Refusal> {
        let description = verified.description().clone();
        let identity = verified.identity().clone();
        let label = format!("`{}` {}", description.name, description.version);
        let mut params = given;
        if let Some(live) = live {
            if live.schema_name != description.schema_name {
                return Err(Refusal::new(
                    Code::SchemaNotAccepted,
                    format!(
                        "{label} keeps its data as `{}`, this disk is kept as `{}`; moving a disk to another kind of storage is no upgrade",
                        description.schema_name, live.schema_name
                    ),
                ));
            }
            let schema = self.storage.schema();
            if schema != 0 && !description.accepted_schemas.contains(&schema) {
                return Err(refusals::schema(&label, &description.accepted_schemas, schema));
            }
            params.inherit(&live.params, &description.inherited);
        }
        params
            .check_known(&description.params)
            .map_err(|error| Refusal::new(Code::BadParameter, format!("{label}: {error}")))?;
        is_wanted()?;
        let module = timed(&mut phases.load, || verified.load()).map_err(loading)?;
        let id = DomainId(self.prepared.fetch_add(1, Ordering::Relaxed) + 1);
        let services = Arc::new(Services {
            id,
            name: description.name.clone(),
            storage: Arc::clone(&self.storage),
            queues: Arc::clone(&self.queues),
            images: Arc::clone(&self.images),
        });
        let prepared = timed(&mut phases.prepare, || {
            let instance = Instance::prepare(module, services, &params)?;
            let info = instance.info();
            Ok((instance, info))
        });
        let refused = |error: CallError| {
            let code = match error {
                CallError::Panicked(_) => Code::PreparePanicked,
                CallError::Failed(_) => Code::PrepareFailed,
            };
            Refusal::new(code, format!("{label} was not prepared: {error}"))
        };
        let (instance, info) = prepared.map_err(|(error, residency)| {
            self.residents.note(&label, &residency);
            refused(error)
        })?;
        let info = match info {
            Ok(info) => info,
            Err(error) => {
                self.residents.note(&label, &instance.retire().residency);
                return Err(refused(error));
            }
        };
        let record = DomainRecord {
            name: description.name,
            version: description.version,
            schema_name: description.schema_name,
            sha256: identity.sha256,
            build_id: identity.build_id,
            path: identity.path,
            params,
            info,
        };
        let domain = Domain::new(id, instance, record, Arc::clone(&self.signal));
        self.environment.apply(&domain);
        Ok(domain)
    }
}

fn loading(error: LoadError) -> Refusal {
    Refusal::new(Code::Module(error.code), error.message)
}
