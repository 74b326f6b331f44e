//! Modules that stayed mapped though nothing needs them, looked at again whenever that is asked.

use crate::signal::lock;
use domain_host::{Residency, Resident};
use std::sync::Mutex;

/// Whose modules stayed mapped when they were last looked at, and how to look again.
#[derive(Default)]
pub(crate) struct Residents(Mutex<Vec<(String, Resident)>>);

impl Residents {
    /// Notes what became of the module of `label`, if it is not gone.
    pub(crate) fn note(&self, label: &str, residency: &Residency) {
        if let Residency::Resident(left) | Residency::Running(left) = residency {
            log::warn!("the module of {label} stays resident: {}", left.reason());
            lock(&self.0).push((label.to_owned(), left.clone()));
        }
    }

    /// What is mapped now though nothing needs it, and why.
    pub(crate) fn look(&self) -> Vec<String> {
        let known = lock(&self.0).clone();
        // Without the lock: a look may have to finish and unmap a module.
        let (gone, there): (Vec<_>, Vec<_>) =
            known.into_iter().partition(|(_, left)| left.is_gone());
        lock(&self.0).retain(|(label, left)| {
            let is_gone = gone.iter().any(|(_, other)| other.is(left));
            if is_gone {
                log::info!("the module of {label} is gone now");
            }
            !is_gone
        });
        there.iter().map(|(label, left)| format!("{label}: {}", left.reason())).collect()
    }
}
