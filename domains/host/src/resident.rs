//! What is left of an instance that has ended and whose module could not be unmapped.
//!
//! ```text
//!   Running --(its thread ends)--> Mapped --(the linker lets go)--> Gone
//! ```
//!
//! Nobody is told when what keeps a module ends, so it is looked at when somebody wants to know
//! ([`Resident::is_gone`]), and the look does what the end of the instance could not do then: the
//! module is finished and unmapped.
//!
//! Invariant: what the module may still use (its host table, the regions that it was lent) goes
//! after the module, or never.

use crate::services::HostSide;
use crate::{LoadedModule, Residency};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A module that stayed mapped: why, and a way to look whether it still is.
#[derive(Clone)]
pub struct Resident {
    reason: Arc<str>,
    look: Arc<dyn Fn() -> bool + Send + Sync>,
}

impl Resident {
    /// Stays for `reason`, until `is_gone` says otherwise. Both sides of a look may take a lock, so
    /// it is not to be made under one.
    pub fn new(reason: &str, is_gone: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { reason: reason.into(), look: Arc::new(is_gone) }
    }

    /// Stays as long as the process.
    #[must_use]
    pub fn for_good(reason: &str) -> Self {
        Self::new(reason, || false)
    }

    /// Why it stayed.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Looks afresh. Unmaps the module, if what it was kept for has ended meanwhile.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        (self.look)()
    }

    /// Whether both speak of the same module.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.look, &other.look)
    }
}

impl PartialEq for Resident {
    fn eq(&self, other: &Self) -> bool {
        self.is(other)
    }
}

impl Eq for Resident {}

impl std::fmt::Debug for Resident {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Resident").field(&self.reason).finish()
    }
}

enum Stage {
    /// A thread that the host runs for it has not ended.
    Running {
        host: Arc<HostSide>,
        module: Box<dyn LoadedModule>,
        fini: unsafe extern "C" fn(),
    },
    /// It was given back, and is still mapped.
    Mapped {
        host: Arc<HostSide>,
        module: Resident,
    },
    Gone,
}

/// What a [`Resident`] looks at.
pub(crate) struct ResidentModule(Mutex<Stage>);

impl ResidentModule {
    /// Of an instance that is destroyed, and of whose tasks one still runs.
    pub(crate) fn running(
        reason: &str,
        host: Arc<HostSide>,
        module: Box<dyn LoadedModule>,
        fini: unsafe extern "C" fn(),
    ) -> Resident {
        Self::watched(reason, Stage::Running { host, module, fini })
    }

    /// Of an instance whose module was given back and stayed.
    pub(crate) fn mapped(host: Arc<HostSide>, module: Resident) -> Resident {
        let reason = Arc::clone(&module.reason);
        Self::watched(&reason, Stage::Mapped { host, module })
    }

    fn watched(reason: &str, stage: Stage) -> Resident {
        let remains = Self(Mutex::new(stage));
        Resident::new(reason, move || remains.look())
    }

    fn look(&self) -> bool {
        let mut stage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *stage = match std::mem::replace(&mut *stage, Stage::Gone) {
            Stage::Running { host, module, fini } => {
                if host.tasks().join(Duration::ZERO).is_err() {
                    Stage::Running { host, module, fini }
                } else {
                    // SAFETY: the instance was destroyed before this was made, and no task is left,
                    // so no other thread runs code of the module.
                    unsafe { fini() };
                    match module.unload() {
                        Residency::Gone => Stage::Gone,
                        Residency::Resident(module) | Residency::Running(module) => {
                            Stage::Mapped { host, module }
                        }
                    }
                }
            }
            Stage::Mapped { host, module } if !module.is_gone() => Stage::Mapped { host, module },
            Stage::Mapped { .. } | Stage::Gone => Stage::Gone,
        };
        matches!(*stage, Stage::Gone)
    }
}

impl Drop for ResidentModule {
    fn drop(&mut self) {
        // Nobody will look again: it stays, with everything that it may use.
        let stage = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        std::mem::forget(std::mem::replace(stage, Stage::Gone));
    }
}
