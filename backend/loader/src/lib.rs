//! Modules from files: found, read once, checked without running them, mapped, and unmapped for
//! good.
//!
//! Why a crate of its own: the dynamic linker was made for programs that load a library and keep
//! it. Here the same file name is loaded again with other contents, code goes away while the
//! process lives on, and a module that does not fit must be refused while nothing of it has run.
//!
//! Invariants:
//! * what is checked, hashed and mapped are the same bytes: a private copy in a sealed memfd; the
//!   file may be overwritten, truncated or deleted at any time;
//! * nothing of a module runs before [`VerifiedModule::load`], and no bytes make the checks panic;
//! * two loads never share a mapping, and a module is only called gone after a look at what is
//!   mapped;
//! * a wrong name is an error that lists the right ones, never another module.
//!
//! **A check is no trust.** ELF constructors run inside `dlopen`, before any `catch_unwind` of ours
//! or of the module's: a constructor that aborts, exits or unwinds ends the daemon, and one that is
//! malicious owns it. Whether a module may be loaded at all is decided by who can write to the
//! module directories, and by signatures; not here.
//!
//! Deliberately absent: calling into a module, instances, upgrades, and any policy of which module
//! to use.
//!
//! # Codes
//!
//! Every refusal is a [`LoadError`] with a stable code:
//!
//! | code | meaning |
//! |---|---|
//! | `module_not_found` | no such name in the module directories, or no such path |
//! | `module_unreadable` | not a regular file, or it cannot be opened or read |
//! | `module_too_large` | more than 64 MiB |
//! | `module_not_sealed` | no sealed copy could be made of it |
//! | `module_not_elf` | empty, or not an ELF file |
//! | `module_wrong_machine` | for another architecture, word size or byte order |
//! | `module_not_shared` | an executable or object file, not a shared object |
//! | `module_malformed` | cut off or inconsistent |
//! | `module_no_descriptor` | no (or no recognisable) domain descriptor |
//! | `module_bad_descriptor` | a field of the descriptor is malformed |
//! | `module_wrong_abi` | built for another version of the domain ABI |
//! | `module_wrong_class` | not a block device |
//! | `module_panic_abort` | built with `panic=abort` |
//! | `module_no_entry` | does not export the entry symbol as an object |
//! | `module_search_path` | has an RPATH or RUNPATH |
//! | `module_needs_library` | needs a library that is not on the allow-list |
//! | `module_not_unloadable` | asks not to be unmapped, or would capture other modules |
//! | `module_text_relocations` | wants its code to be written to |
//! | `module_executable_stack` | wants an executable stack |
//! | `module_link_error` | the dynamic linker refused it, e.g. for an undefined symbol |

mod elf;
mod error;
mod find;
mod kept;
mod map;
mod sealed;
mod verify;

pub use map::resident_modules;

use domain_abi::descriptor::Description;
use domain_host::{Identity, LoadError, LoadedModule, ModuleLoader, VerifiedModule};
use error::printable;
use map::{Loaded, Mapped};
use sealed::Sealed;
use std::path::{Path, PathBuf};

/// Loads modules from files: a name from a list of directories, a path from where it points.
#[derive(Debug, Clone)]
pub struct FileLoader {
    dirs: Vec<PathBuf>,
}

impl FileLoader {
    /// Looks names up in `domain_dirs`, in that order.
    #[must_use]
    pub const fn new(domain_dirs: Vec<PathBuf>) -> Self {
        Self { dirs: domain_dirs }
    }

    /// The names that can be looked up now, sorted. Directories that cannot be listed have none.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        find::names(&self.dirs)
    }
}

impl ModuleLoader for FileLoader {
    /// A `name` with a `/` is a path; any other is looked up as `libdomain_NAME.so`.
    fn verify(&self, name: &str) -> Result<Box<dyn VerifiedModule>, LoadError> {
        let path = find::find(&self.dirs, name)
            .map_err(|e| e.about(&format!("domain `{}`", printable(name))))?;
        let verified = verify_file(&path)
            .map_err(|e| e.about(&format!("module `{}`", printable(&path.to_string_lossy()))))?;
        Ok(Box::new(verified))
    }
}

fn verify_file(path: &Path) -> Result<Verified, error::Error> {
    let (mut file, len) = sealed::open(path)?;
    let name = path.to_string_lossy().into_owned();
    if let Some(mut kept) = kept::take(&mut file, len) {
        kept.identity.path = name;
        return Ok(Verified(Some(kept)));
    }
    let sealed = Sealed::copy_of(&mut file, path)?;
    let bytes = sealed.bytes()?;
    let facts = verify::inspect(&bytes)?;
    let identity =
        Identity { path: name, sha256: hex(sealed.sha256()), build_id: facts.build_id.map(hex) };
    Ok(Verified(Some(Checked { description: facts.description, identity, sealed })))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A copy that was checked, and is mapped nowhere.
#[derive(Debug)]
struct Checked {
    sealed: Sealed,
    description: Description,
    identity: Identity,
}

/// A copy that was checked, for somebody who asked. What is not loaded is kept.
#[derive(Debug)]
struct Verified(Option<Checked>);

impl Verified {
    fn checked(&self) -> &Checked {
        self.0.as_ref().expect("only loading and dropping take it, and end this value")
    }
}

impl Drop for Verified {
    fn drop(&mut self) {
        if let Some(checked) = self.0.take() {
            kept::keep(checked);
        }
    }
}

impl VerifiedModule for Verified {
    fn description(&self) -> &Description {
        &self.checked().description
    }

    fn identity(&self) -> &Identity {
        &self.checked().identity
    }

    fn load(mut self: Box<Self>) -> Result<Box<dyn LoadedModule>, LoadError> {
        let Checked { sealed, description, identity } =
            self.0.take().expect("only loading and dropping take it, and end this value");
        let mapped = Mapped::open(sealed, &identity.path)
            .map_err(|e| e.about(&format!("module `{}`", printable(&identity.path))))?;
        Ok(Box::new(Loaded::new(mapped, description, identity)))
    }
}
