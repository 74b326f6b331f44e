//! The modules that were unloaded last are kept, checked as they are, in case one comes back.
//!
//! Why: most of what verifying takes is making the copy and hashing it, and to upgrade to the same
//! module again, back and forth, with other parameters or after a refusal, needs neither. Whether
//! it is the same is decided by comparing all of the bytes; nothing is believed of a file's times.
//!
//! Invariant: what is kept is mapped nowhere; a caller that takes it has it alone, so two loads
//! still never share a mapping.

use crate::checked::Checked;
use std::fs::File;
use std::io::Seek;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most bytes that are kept.
const LIMIT: u64 = 4 << 20;
/// Most modules that are kept.
const MOST: usize = 8;

/// The checked modules that one loader keeps.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    /// The oldest first; no two of the same bytes.
    modules: Mutex<Vec<Checked>>,
}

impl Cache {
    fn lock(&self) -> MutexGuard<'_, Vec<Checked>> {
        self.modules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a module that is mapped nowhere, if need be in place of the oldest ones.
    pub(crate) fn put(&self, module: Checked) {
        let mut modules = self.lock();
        modules.retain(|other| other.sealed.sha256() != module.sealed.sha256());
        modules.push(module);
        let bytes =
            |modules: &[Checked]| modules.iter().map(|module| module.sealed.len()).sum::<u64>();
        while modules.len() > MOST || bytes(&modules) > LIMIT {
            modules.remove(0);
        }
    }

    /// Takes the module that has the bytes of `file`, which is `len` long and at its beginning. If
    /// there is none, `file` is there again.
    pub(crate) fn take(&self, file: &mut File, len: u64) -> Option<Checked> {
        let is_candidate = |module: &mut Checked| module.sealed.len() == len;
        let candidates: Vec<_> = self.lock().extract_if(.., is_candidate).collect();
        let mut found = None;
        for candidate in candidates {
            // Different modules of one length differ in the first piece: the build ID is there. A
            // file that cannot be read is refused when it is copied.
            if found.is_none() && matches!(candidate.sealed.is_copy_of(file), Ok(true)) {
                found = Some(candidate);
                continue;
            }
            let _ = file.rewind();
            self.put(candidate);
        }
        found
    }
}
