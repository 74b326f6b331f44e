//! The modules that were given back to the linker and stayed.
//!
//! They are listed for their memfd: it stays open as long as the module is mapped, so that the path
//! under which debuggers and backtraces know it leads to it.

use crate::sealed::Sealed;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What one loader could not unmap.
#[derive(Debug, Default)]
pub(crate) struct Residents {
    /// Each with the path that it was loaded from.
    modules: Mutex<Vec<(Sealed, String)>>,
}

impl Residents {
    /// Takes a fresh look, and forgets what is gone.
    fn look_again(&self) -> MutexGuard<'_, Vec<(Sealed, String)>> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if !modules.is_empty()
            && let Ok(maps) = std::fs::read("/proc/self/maps")
        {
            modules.retain(|(sealed, _)| sealed.is_in(&maps));
        }
        modules
    }

    /// Lets go of what is gone.
    pub(crate) fn sweep(&self) {
        drop(self.look_again());
    }

    /// Adds a module that stayed.
    pub(crate) fn add(&self, sealed: Sealed, path: String) {
        self.modules.lock().unwrap_or_else(PoisonError::into_inner).push((sealed, path));
    }

    /// The paths of those that are still mapped, by a fresh look.
    pub(crate) fn paths(&self) -> Vec<String> {
        self.look_again().iter().map(|(_, path)| path.clone()).collect()
    }

    /// Whether the copy of that number is mapped no more, by a fresh look.
    pub(crate) fn is_gone(&self, number: u64) -> bool {
        self.look_again().iter().all(|(sealed, _)| sealed.number() != number)
    }
}

impl Drop for Residents {
    fn drop(&mut self) {
        // This was the last look. What is still mapped keeps its memfd until the process ends,
        // because no later look can tell when it may go.
        std::mem::take(&mut *self.look_again()).into_iter().for_each(std::mem::forget);
    }
}
