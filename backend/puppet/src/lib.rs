//! Puppets, for tests: domains whose every step is a parameter, and a loader that knows them by
//! name.
//!
//! Puppets are linked statically, so they share statics with the test: what they did is written to
//! a [`Stage`], which also tells those that wait when to go on. Each test has a stage of its own,
//! named in the parameters, so that tests can run side by side.

#![forbid(unsafe_code)]

mod puppet;

pub use puppet::{Kind, Narrow, Other, Plain, Puppet, Stage, Wide};

use domain_conformance::StaticModule;
use domain_host::{LoadError, ModuleLoader, VerifiedModule};

/// Finds the puppets `plain`, `wide`, `narrow` and `other`.
#[derive(Debug, Clone, Copy)]
pub struct PuppetLoader;

impl ModuleLoader for PuppetLoader {
    fn verify(&self, name: &str) -> Result<Box<dyn VerifiedModule>, LoadError> {
        match name {
            "plain" => Ok(StaticModule::verified::<Puppet<Plain>>()),
            "wide" => Ok(StaticModule::verified::<Puppet<Wide>>()),
            "narrow" => Ok(StaticModule::verified::<Puppet<Narrow>>()),
            "other" => Ok(StaticModule::verified::<Puppet<Other>>()),
            _ => Err(LoadError {
                code: "module_not_found",
                message: format!("there is no module `{name}`"),
            }),
        }
    }
}
