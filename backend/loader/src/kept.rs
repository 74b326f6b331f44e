//! The module that was unloaded last is kept, verified as it is, in case it comes back.
//!
//! Why: most of what verifying takes is making the copy and hashing it, and to upgrade to the same module again, with other parameters, after a refusal or back and
//! forth, needs neither. Whether it is the same is decided by comparing all of the bytes; nothing is believed of a file's times.
//!
//! Invariant: what is kept is mapped nowhere; whoever takes it has it alone, so two loads still never share a mapping.
//!
//! Deliberately absent: more than one, and large ones.

use crate::Verified;
use crate::error::Error;
use std::fs::File;
use std::io::Seek;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Largest module that is kept, in bytes.
const LIMIT: u64 = 4 << 20;

static KEPT: Mutex<Option<Verified>> = Mutex::new(None);

fn kept() -> MutexGuard<'static, Option<Verified>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a module that is mapped no more, in place of the one before.
pub(crate) fn keep(module: Verified) {
    if module.sealed.len() <= LIMIT {
        *kept() = Some(module);
    }
}

/// Takes the kept module if `file`, from its beginning, has the same bytes. If not, it stays, and `file` is at its beginning again.
pub(crate) fn take(file: &mut File) -> Result<Option<Verified>, Error> {
    let Some(candidate) = kept().take() else { return Ok(None) };
    // Other modules differ in the first piece: the build ID is there.
    if candidate.sealed.is_copy_of(file).map_err(Error::Unreadable)? {
        return Ok(Some(candidate));
    }
    kept().get_or_insert(candidate);
    file.rewind().map_err(Error::Unreadable)?;
    Ok(None)
}
