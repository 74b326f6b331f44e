//! Into the process, and out of it.
//!
//! ```text
//!   Sealed --dlopen--> Mapped --dlclose--> gone
//!                                 |
//!                                 `------> resident --(a later look)--> gone
//! ```
//!
//! Why so careful. `dlopen` compares *names* first: a path that was used before gives the old
//! library, if that is still mapped, whatever the path leads to now. So each load goes through a
//! spelling of `/proc/self/fd/N` that this process never used. And `dlclose` returns success for a
//! library that stays, for instance because a live thread has yet to run a thread-local destructor
//! of it. So what counts is what is mapped: if nothing is at the module's table any more, all of it
//! is gone, because the linker unmaps a library with one call. If something is there, which may be
//! another mapping already, `/proc/self/maps` tells; reading that takes as long as the unmapping.
//!
//! Invariants: the memfd stays open as long as the module is mapped, so that the path under which
//! debuggers and backtraces know it leads to it, and not to what got its number next; a module is
//! given back to the linker once.
//!
//! Deliberately absent: forcing anything out. What the linker keeps, something still refers to.

use crate::cache::Cache;
use crate::checked::Checked;
use crate::error::{Error, printable};
use crate::residents::Residents;
use crate::sealed::Sealed;
use domain_abi::descriptor::Description;
use domain_abi::{ENTRY_SYMBOL, ModuleVtable};
use domain_host::{Identity, LoadedModule, Residency, Resident};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Number of the next mapping. Of the process and not of a loader, because the linker's names are.
/// Only uniqueness matters, so nothing is ordered by it.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// What the modules of one loader share: what comes back, and what stays.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    pub(crate) cache: Cache,
    pub(crate) residents: Residents,
}

/// A module in the linker's hands.
#[derive(Debug)]
pub(crate) struct Mapped {
    /// Taken together, when the module is given back.
    parts: Option<(Library, Sealed)>,
    path: String,
    table: *const ModuleVtable,
    shelf: Arc<Shelf>,
}

// SAFETY: `table` is an address of read-only data of the module, valid in every thread for as long
// as `parts` is there, and `Library` is Send itself.
unsafe impl Send for Mapped {}
// SAFETY: as above; `&Mapped` gives out nothing but the address.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps `sealed`, resolves everything it needs, and runs its constructors. `path` is where it
    /// comes from, for messages.
    pub(crate) fn open(sealed: Sealed, path: &str, shelf: Arc<Shelf>) -> Result<Self, Error> {
        let link_path = fresh_path(&sealed);
        // NOW: a symbol that is missing must fail here, and not end the process at its first use.
        // SAFETY: dlopen runs the module's constructors, and dlclose its destructors. No check can
        // make foreign code sound; who installs a module vouches for it, as for the daemon itself
        // (crate documentation). What can be checked was: the file is complete, its segments lie in
        // it, and it cannot change (`verify`, `sealed`).
        let opened = unsafe { Library::open(Some(&link_path), RTLD_NOW | RTLD_LOCAL) };
        let library = opened.map_err(|e| refused(&e, &link_path))?;
        // From here on, giving up means `shut`.
        let parts = Some((library, sealed));
        let mut mapped = Self { parts, path: path.to_owned(), table: std::ptr::null(), shelf };
        let (library, _) = mapped.parts.as_ref().expect("put in above");
        // SAFETY: the type that is looked up is a bare pointer, which is only stored. That it
        // points to a table is the module's promise, backed by `verify`: an object of at least that
        // size, alignment and ABI version.
        let symbol = unsafe { library.get::<*const ModuleVtable>(ENTRY_SYMBOL) };
        mapped.table = symbol.map_err(|e| refused(&e, &link_path))?.into_raw().cast_const().cast();
        if mapped.table.is_null() {
            return Err(Error::NoEntry);
        }
        Ok(mapped)
    }

    /// Gives the module back and looks what became of it. If it is gone, its copy is left. Nothing
    /// happens the second time.
    fn shut(&mut self) -> Result<Option<Sealed>, Resident> {
        let Some((library, sealed)) = self.parts.take() else { return Ok(None) };
        let table = std::mem::replace(&mut self.table, std::ptr::null());
        let closed = library.close();
        let there = || Ok(is_mapped(table) && sealed.is_in(&std::fs::read("/proc/self/maps")?));
        let why = match (closed, there()) {
            (Ok(()), Ok(false)) => {
                self.shelf.residents.sweep();
                return Ok(Some(sealed));
            }
            (Ok(()), Ok(true)) => {
                "a live thread has yet to run a thread-local destructor of it, or another module refers to it; \
                 it goes when that has ended"
                    .to_owned()
            }
            (Err(e), _) => format!("dlclose failed: {}", printable(&e.to_string())),
            (_, Err::<_, std::io::Error>(e)) => format!("whether it is gone is unknown, /proc/self/maps cannot be read: {e}"),
        };
        let reason = format!("module `{}` is still mapped: {why}", printable(&self.path));
        let number = sealed.number();
        self.shelf.residents.add(sealed, std::mem::take(&mut self.path));
        let shelf = Arc::clone(&self.shelf);
        let is_gone = move || shelf.residents.is_gone(number);
        Err(Resident::new(&reason, is_gone))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = self.shut();
    }
}

/// Whether anything is mapped at `table`. Of a module that was refused before its table was found,
/// nothing is known.
fn is_mapped(table: *const ModuleVtable) -> bool {
    if table.is_null() {
        return true;
    }
    let page = table.map_addr(|address| address & !(rustix::param::page_size() - 1));
    let mut residence = 0_u8;
    // SAFETY: mincore(2) touches no memory but `residence`: a byte for each page asked about, which
    // is one. The address need not be mapped.
    let answer = unsafe { libc::mincore(page.cast_mut().cast(), 1, &raw mut residence) };
    answer == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ENOMEM)
}

/// A path to the memfd that was never used in this process.
///
/// The linker compares paths as text, the kernel does not care how often `/` and `/.` are repeated:
/// so a number that was not used yet is written in these two, a binary digit each. The result has
/// at most 2 * 64 characters more than the plain path.
fn fresh_path(sealed: &Sealed) -> String {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let digits: String =
        format!("{number:b}").chars().map(|digit| if digit == '1' { "/." } else { "/" }).collect();
    format!("/proc{digits}/self/fd/{}", sealed.raw_fd())
}

/// The linker's sentence, without the path that means nothing to the reader.
fn refused(error: &libloading::Error, link_path: &str) -> Error {
    // The first level says "dlopen failed", the source says why.
    let why =
        std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    let why = why.replace(&format!("{link_path}: "), "").replace(link_path, "it");
    Error::Link(printable(why.trim()))
}

/// A mapped module with its papers.
#[derive(Debug)]
pub(crate) struct Loaded {
    mapped: Mapped,
    description: Description,
    identity: Identity,
}

impl Loaded {
    pub(crate) const fn new(mapped: Mapped, description: Description, identity: Identity) -> Self {
        Self { mapped, description, identity }
    }
}

// SAFETY: `Mapped` holds the handle and gives it back in `unload` or when it is dropped, both of
// which end this value. Until then the linker keeps the mapping, and the bytes behind it cannot
// change (`sealed`); what the linker itself put into the private pages of the table, it has put
// there before `open` returned.
unsafe impl LoadedModule for Loaded {
    fn vtable(&self) -> *const ModuleVtable {
        self.mapped.table
    }

    fn description(&self) -> &Description {
        &self.description
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn image(&self) -> Option<OwnedFd> {
        self.mapped.parts.as_ref().and_then(|(_, sealed)| sealed.dup().ok())
    }

    fn unload(mut self: Box<Self>) -> Residency {
        match self.mapped.shut() {
            Ok(sealed) => {
                let Self { mapped, description, identity } = *self;
                if let Some(sealed) = sealed {
                    mapped.shelf.cache.put(Checked { sealed, description, identity });
                }
                Residency::Gone
            }
            Err(left) => Residency::Resident(left),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::fs::File;
    use std::path::Path;

    #[test]
    fn no_path_is_used_twice_and_each_leads_to_its_copy() {
        let mut seen = HashSet::new();
        for round in 0..300_u32 {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("m");
            std::fs::write(&file, round.to_le_bytes()).unwrap();
            // Dropped at once, so that all have the same descriptor number.
            let sealed = Sealed::copy_of(&mut File::open(&file).unwrap(), &file).unwrap();
            let path = fresh_path(&sealed);
            assert!(path.len() < 200, "{path}");
            assert_eq!(std::fs::read(Path::new(&path)).unwrap(), round.to_le_bytes());
            assert!(seen.insert(path));
            assert!(seen.insert(fresh_path(&sealed)), "not even for the same copy");
        }
    }
}
