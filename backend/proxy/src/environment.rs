//! What a domain is told about its surroundings, and its successor must be told too: guest memory
//! and the write cache.

use crate::domain::{Domain, LoadedDomain};
use crate::signal::lock;
use domain_host::CallError;
use std::sync::{Arc, Mutex, Weak};

#[derive(Default)]
struct Inner {
    memory: Vec<(usize, usize)>,
    write_cache: Option<bool>,
    domains: Vec<Weak<Domain>>,
}

/// The surroundings, and every domain that lives in them: live, standby or in preparation.
#[derive(Default)]
pub(crate) struct Environment {
    inner: Mutex<Inner>,
}

fn report(what: &str, result: Result<(), CallError>) {
    if let Err(error) = result {
        log::warn!("telling a domain of {what}: {error}");
    }
}

impl Environment {
    /// Tells a new domain everything, and from now on every change.
    pub(crate) fn apply(&self, domain: &LoadedDomain) {
        let mut inner = lock(&self.inner);
        for &(address, len) in &inner.memory {
            report("guest memory", domain.instance.memory_changed(address, len, true));
        }
        if let Some(on) = inner.write_cache {
            report("the write cache", domain.instance.set_write_cache(on));
        }
        inner.domains.retain(|known| known.upgrade().is_some());
        inner.domains.push(Arc::downgrade(domain));
    }

    /// Returns which domains have died of it.
    pub(crate) fn memory_changed(
        &self,
        address: usize,
        len: usize,
        added: bool,
    ) -> Vec<Weak<Domain>> {
        let mut inner = lock(&self.inner);
        if added {
            inner.memory.push((address, len));
        } else {
            inner.memory.retain(|&range| range != (address, len));
        }
        let mut dead = Vec::new();
        inner.each(|domain| {
            report("guest memory", domain.instance.memory_changed(address, len, added));
            if domain.is_dead() {
                dead.push(Arc::downgrade(domain));
            }
        });
        dead
    }

    /// Returns whether it is news, and which domains did not do it, and why.
    pub(crate) fn set_write_cache(&self, on: bool) -> (bool, Vec<(Weak<Domain>, CallError)>) {
        let mut inner = lock(&self.inner);
        let mut failed = Vec::new();
        let is_new = inner.write_cache.replace(on) != Some(on);
        if is_new {
            inner.each(|domain| {
                if let Err(error) = domain.instance.set_write_cache(on) {
                    log::warn!("telling a domain of the write cache: {error}");
                    // Weak: a domain that has died is ended when nothing has it.
                    failed.push((Arc::downgrade(domain), error));
                }
            });
        }
        (is_new, failed)
    }

    /// Tells a domain once more that the write cache is off, because another has died and may have
    /// completed something until then that is not durable. The lock is held meanwhile, so that no
    /// change of the cache comes between.
    pub(crate) fn catch_up(&self, successor: &LoadedDomain) -> Result<(), CallError> {
        match lock(&self.inner).write_cache {
            Some(false) => successor.enter().set_write_cache(false),
            _ => Ok(()),
        }
    }
}

impl Inner {
    /// Calls `f` for each domain that lives, which counts as used meanwhile.
    fn each(&self, mut f: impl FnMut(&LoadedDomain)) {
        let domains = self.domains.iter().filter_map(Weak::upgrade);
        for domain in domains.filter(|domain| !domain.is_dead()) {
            let _call = domain.enter();
            f(&domain);
        }
    }
}
