//! What is left of an instance that has ended and whose module could not be unmapped.
//!
//! ```text
//!   Running --(its thread ends)--> Mapped --(the linker lets go)--> Gone
//! ```
//!
//! There is no event when what keeps a module ends, so it is looked at when that matters
//! ([`Resident::is_gone`]), and the look does what the end of the instance could not do then: the
//! module is finished and unmapped.
//!
//! Invariant: what the module may still use (its host table, the regions that it has mapped) goes
//! after the module, or never.

use crate::module::{LoadedModule, Residency, Resident};
use crate::services::HostSide;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

enum ResidentState {
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
pub(crate) struct ResidentModule(Mutex<ResidentState>);

impl ResidentModule {
    /// Of an instance that is destroyed, and of whose tasks one still runs.
    pub(crate) fn running(
        reason: &str,
        host: Arc<HostSide>,
        module: Box<dyn LoadedModule>,
        fini: unsafe extern "C" fn(),
    ) -> Resident {
        Self::watched(reason, ResidentState::Running { host, module, fini })
    }

    /// Of an instance whose module was given back and stayed.
    pub(crate) fn mapped(host: Arc<HostSide>, module: Resident) -> Resident {
        let reason = module.reason().to_owned();
        Self::watched(&reason, ResidentState::Mapped { host, module })
    }

    fn watched(reason: &str, state: ResidentState) -> Resident {
        let resident = Self(Mutex::new(state));
        Resident::new(reason, move || resident.look())
    }

    fn look(&self) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state = match std::mem::replace(&mut *state, ResidentState::Gone) {
            ResidentState::Running { host, module, fini } => {
                if host.tasks().join(Duration::ZERO).is_err() {
                    ResidentState::Running { host, module, fini }
                } else {
                    // SAFETY: the instance was destroyed before this was made, and no task is left,
                    // so no other thread runs code of the module.
                    unsafe { fini() };
                    match module.unload() {
                        Residency::Gone => ResidentState::Gone,
                        Residency::Resident(module) | Residency::Running(module) => {
                            ResidentState::Mapped { host, module }
                        }
                    }
                }
            }
            ResidentState::Mapped { host, module } if !module.is_gone() => {
                ResidentState::Mapped { host, module }
            }
            ResidentState::Mapped { .. } | ResidentState::Gone => ResidentState::Gone,
        };
        matches!(*state, ResidentState::Gone)
    }
}

impl Drop for ResidentModule {
    fn drop(&mut self) {
        // There will be no look again: it stays, with everything that it may use.
        let state = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        std::mem::forget(std::mem::replace(state, ResidentState::Gone));
    }
}
