//! A domain as the checks see it: a value and not a type parameter, so that they are compiled once
//! and not for every domain.

use super::static_module::StaticModule;
use domain_abi::descriptor::Descriptor;
use domain_api::{BlockDomain, Exported};
use domain_host::LoadedModule;

/// A domain: its constants, and how to make a module of it.
#[derive(Clone, Copy)]
pub(crate) struct Domain {
    module: fn() -> Box<dyn LoadedModule>,
    pub descriptor: &'static Descriptor,
    pub name: &'static str,
    pub version: &'static str,
    pub schema: u32,
    pub params: &'static [&'static str],
}

impl Domain {
    pub(crate) fn of<D: BlockDomain>() -> Self {
        Self {
            module: StaticModule::of::<D>,
            descriptor: const { &Exported::<D>::DESCRIPTOR },
            name: D::NAME,
            version: D::VERSION,
            schema: D::SCHEMA,
            params: D::PARAMS,
        }
    }

    pub(crate) fn module(self) -> Box<dyn LoadedModule> {
        (self.module)()
    }
}
