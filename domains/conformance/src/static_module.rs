//! Modules that need no file: domains that are linked into this program, for tests and for
//! measuring what the ABI costs.
//!
//! They go the same way as those from files, through the same table of functions; only finding,
//! checking and mapping falls away.

use domain_abi::ModuleVtable;
use domain_abi::descriptor::Description;
use domain_host::{Identity, LoadError, LoadedModule, Residency, VerifiedModule};

/// A domain that is linked into this program instead of loaded: for tests and for measuring what
/// the ABI costs.
///
/// What is loaded is unmapped with its instance; this is not, so a domain must not leave a copy of
/// its `Host` or of a `Region` behind its end, not in a static and not on a thread of its own: the
/// table behind it is gone then.
#[derive(Debug)]
pub struct StaticModule {
    vtable: &'static ModuleVtable,
    description: Description,
    identity: Identity,
}

impl StaticModule {
    /// Wraps a domain, as a module that is loaded.
    ///
    /// # Panics
    /// If the domain's constants make no valid descriptor.
    #[must_use]
    pub fn of<D: domain_api::BlockDomain>() -> Box<dyn LoadedModule> {
        Self::new::<D>()
    }

    /// Wraps a domain, as what a loader has checked and not loaded yet.
    ///
    /// # Panics
    /// As for [`of`](Self::of).
    #[must_use]
    pub fn verified<D: domain_api::BlockDomain>() -> Box<dyn VerifiedModule> {
        Self::new::<D>()
    }

    fn new<D: domain_api::BlockDomain>() -> Box<Self> {
        let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let description = Description {
            name: D::NAME.to_owned(),
            version: D::VERSION.to_owned(),
            schema_name: D::SCHEMA_NAME.to_owned(),
            schema: D::SCHEMA,
            accepted_schemas: D::ACCEPTED_SCHEMAS.to_vec(),
            params: names(D::PARAMS),
            inherited: names(D::INHERITED),
        };
        Box::new(Self {
            vtable: const { &domain_api::Exported::<D>::MODULE },
            description,
            identity: Identity { path: "(static)".to_owned(), ..Identity::default() },
        })
    }
}

impl VerifiedModule for StaticModule {
    fn description(&self) -> &Description {
        &self.description
    }
    fn identity(&self) -> &Identity {
        &self.identity
    }
    fn load(self: Box<Self>) -> Result<Box<dyn LoadedModule>, LoadError> {
        Ok(self)
    }
}

// SAFETY: the table is a constant of this program.
unsafe impl LoadedModule for StaticModule {
    fn vtable(&self) -> *const ModuleVtable {
        self.vtable
    }
    fn description(&self) -> &Description {
        &self.description
    }
    fn identity(&self) -> &Identity {
        &self.identity
    }
    fn unload(self: Box<Self>) -> Residency {
        Residency::Gone
    }
}
