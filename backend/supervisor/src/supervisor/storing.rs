//! What the service manager's store has of the device.

use super::Supervisor;
use crate::store::KeptDisk;
use crate::store::record::StartedAs;
use std::time::Instant;

impl Supervisor {
    fn started_as(&self) -> StartedAs {
        StartedAs { domain: self.options.domain.clone(), params: self.options.params.clone() }
    }

    /// The device is the one that was in the store, whatever the command line says.
    pub(super) fn go_on_with(&mut self, kept: KeptDisk) {
        let KeptDisk { vault, sessions, started_as } = kept;
        if let Some(list) = vault.list() {
            let live = list.live.as_ref().map_or("no domain", |module| &module.name);
            log::info!(
                "going on with the disk that the service manager has kept: `{live}`, generation {}",
                list.generation
            );
        }
        if started_as != self.started_as() {
            log::warn!(
                "the command line asks for another disk than the one that was kept (`{}`), which \
                 goes on; for another one, end the service, and where its store is preserved \
                 `systemctl clean --what=fdstore` it",
                started_as.domain
            );
        }
        (self.vault, self.sessions, self.is_kept) = (vault, sessions, true);
    }

    /// The vault is another one.
    pub(super) fn keep_in_store(&mut self) {
        // What ends leaves the disk as it was.
        let has_live = self.vault.list().is_some_and(|list| list.live.is_some());
        if self.ending.is_some() && !has_live {
            self.store.owe_nothing();
            return;
        }
        let before = self.store.facts();
        self.store.keep(&self.vault, self.sessions, &self.started_as());
        if self.store.facts() != before {
            self.tell_facts();
        }
    }

    pub(super) fn settle_store(&mut self, now: Instant) {
        if self.store.deadline().is_some_and(|at| at <= now) {
            if self.store.is_to_keep(now) {
                self.keep_in_store();
            }
            self.store.pump(now);
            self.tell_facts();
        }
    }

    /// The manager has looked at all that it was told.
    pub(super) fn store_has_looked(&mut self) {
        self.store.has_looked();
        self.tell_facts();
    }
}
