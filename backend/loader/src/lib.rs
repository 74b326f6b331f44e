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
//! Every refusal is a [`LoadError`] with one of the stable [`CODES`].

mod cache;
mod checked;
mod elf;
mod error;
mod find;
mod map;
mod policy;
mod residents;
mod sealed;
mod verify;

pub use error::CODES;
pub use policy::Policy;

use checked::Checked;
use domain_abi::descriptor::Description;
use domain_host::{Identity, LoadError, LoadedModule, ModuleLoader, VerifiedModule};
use error::printable;
use map::{Loaded, Mapped, Shelf};
use sealed::Sealed;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Loads modules from files: a name from a list of directories, a path from where it points.
///
/// Clones share what they keep: the modules that were unloaded last, and those that stayed mapped.
#[derive(Debug, Clone)]
pub struct FileLoader {
    dirs: Vec<PathBuf>,
    policy: Policy,
    shelf: Arc<Shelf>,
}

impl FileLoader {
    /// Looks names up in `domain_dirs`, in that order.
    #[must_use]
    pub fn new(domain_dirs: Vec<PathBuf>) -> Self {
        Self::with_policy(domain_dirs, Policy::default())
    }

    /// As [`new`](Self::new), with another policy than the default one.
    #[must_use]
    pub fn with_policy(domain_dirs: Vec<PathBuf>, policy: Policy) -> Self {
        Self { dirs: domain_dirs, policy, shelf: Arc::default() }
    }

    /// The paths of modules that were unloaded and are still mapped, by a fresh look.
    ///
    /// A module leaves this list when what kept it has ended and the linker has noticed, which it
    /// does at the next unload of any module.
    #[must_use]
    pub fn resident_modules(&self) -> Vec<String> {
        self.shelf.residents.paths()
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
        let verified = self
            .verify_file(&path)
            .map_err(|e| e.about(&format!("module `{}`", printable(&path.to_string_lossy()))))?;
        Ok(Box::new(verified))
    }

    /// The bytes are copied once more, so that nothing depends on what another process has sealed,
    /// or called its memfd.
    fn verify_kept(
        &self,
        image: OwnedFd,
        origin: &Identity,
    ) -> Result<Box<dyn VerifiedModule>, LoadError> {
        // Opened anew: a description that was sent has its position in common with its sender's.
        let path = PathBuf::from(format!("/proc/self/fd/{}", image.as_raw_fd()));
        let verified = self.verify_open(&path, &origin.path).and_then(|verified| {
            if verified.checked().identity.sha256 == origin.sha256 {
                Ok(verified)
            } else {
                Err(error::Error::OtherBytes)
            }
        });
        let about = || format!("the kept module `{}`", printable(&origin.path));
        Ok(Box::new(verified.map_err(|e| e.about(&about()))?))
    }
}

impl FileLoader {
    fn verify_file(&self, path: &Path) -> Result<Verified, error::Error> {
        self.verify_open(path, &path.to_string_lossy())
    }

    /// Checks what is at `path` now, and calls it `name`.
    fn verify_open(&self, path: &Path, name: &str) -> Result<Verified, error::Error> {
        let (mut file, len) = sealed::open(path)?;
        let name = name.to_owned();
        let checked = match self.shelf.cache.take(&mut file, len) {
            Some(mut cached) => {
                cached.identity.path = name;
                cached
            }
            None => {
                let sealed = Sealed::copy_of(&mut file, Path::new(&name))?;
                let bytes = sealed.bytes()?;
                let facts = verify::inspect(&bytes, &self.policy)?;
                let (description, build_id) = (facts.description, facts.build_id.map(hex));
                let identity = Identity { path: name, sha256: hex(sealed.sha256()), build_id };
                Checked { description, identity, sealed }
            }
        };
        Ok(Verified { checked: Some(checked), shelf: Arc::clone(&self.shelf) })
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A copy that was checked, for a caller that has asked. What is not loaded goes back to the cache.
#[derive(Debug)]
struct Verified {
    checked: Option<Checked>,
    shelf: Arc<Shelf>,
}

impl Verified {
    fn checked(&self) -> &Checked {
        self.checked.as_ref().expect("only loading and dropping take it, and end this value")
    }
}

impl Drop for Verified {
    fn drop(&mut self) {
        if let Some(checked) = self.checked.take() {
            self.shelf.cache.put(checked);
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
            self.checked.take().expect("only loading and dropping take it, and end this value");
        let mapped = Mapped::open(sealed, &identity.path, Arc::clone(&self.shelf))
            .map_err(|e| e.about(&format!("module `{}`", printable(&identity.path))))?;
        Ok(Box::new(Loaded::new(mapped, description, identity)))
    }
}
