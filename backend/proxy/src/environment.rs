//! What a domain is told about its surroundings, and its successor must be told too: guest memory
//! and the write cache.

use crate::upgrade::lock;
use domain_host::{CallError, Instance};
use std::sync::{Arc, Mutex, Weak};

#[derive(Default)]
struct Inner {
    memory: Vec<(usize, usize)>,
    write_cache: Option<bool>,
    instances: Vec<Weak<Instance>>,
}

/// The surroundings, and every instance that lives in them: live, standby or in preparation.
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
    /// Tells a new instance everything, and from now on every change.
    pub(crate) fn apply(&self, instance: &Arc<Instance>) {
        let mut inner = lock(&self.inner);
        for &(address, len) in &inner.memory {
            report("guest memory", instance.memory_changed(address, len, true));
        }
        if let Some(on) = inner.write_cache {
            report("the write cache", instance.set_write_cache(on));
        }
        inner.instances.retain(|known| known.strong_count() > 0);
        inner.instances.push(Arc::downgrade(instance));
    }

    /// Returns who has died of it.
    pub(crate) fn memory_changed(
        &self,
        address: usize,
        len: usize,
        added: bool,
    ) -> Vec<Weak<Instance>> {
        let mut inner = lock(&self.inner);
        if added {
            inner.memory.push((address, len));
        } else {
            inner.memory.retain(|&range| range != (address, len));
        }
        let mut dead = Vec::new();
        inner.each(|instance| {
            report("guest memory", instance.memory_changed(address, len, added));
            if instance.is_dead() {
                dead.push(Arc::downgrade(instance));
            }
        });
        dead
    }

    /// Returns whether it is news, and who did not do it, and why.
    pub(crate) fn set_write_cache(&self, on: bool) -> (bool, Vec<(Weak<Instance>, CallError)>) {
        let mut inner = lock(&self.inner);
        let mut failed = Vec::new();
        let is_new = inner.write_cache.replace(on) != Some(on);
        if is_new {
            inner.each(|instance| {
                if let Err(error) = instance.set_write_cache(on) {
                    log::warn!("telling a domain of the write cache: {error}");
                    // Weak: whoever has died is waited for until nobody has it.
                    failed.push((Arc::downgrade(instance), error));
                }
            });
        }
        (is_new, failed)
    }

    /// Tells an instance once more that the write cache is off, because another has died and may
    /// have completed something until then that is not durable. The lock is held meanwhile, so that
    /// no change of the cache comes between.
    pub(crate) fn catch_up(&self, successor: &Instance) -> Result<(), CallError> {
        match lock(&self.inner).write_cache {
            Some(false) => successor.set_write_cache(false),
            _ => Ok(()),
        }
    }
}

impl Inner {
    fn each(&self, mut f: impl FnMut(&Arc<Instance>)) {
        for instance in
            self.instances.iter().filter_map(Weak::upgrade).filter(|instance| !instance.is_dead())
        {
            f(&instance);
        }
    }
}
