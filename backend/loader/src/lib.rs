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
//! * with trusted keys, the bytes that are mapped are those that one of them has signed;
//! * a wrong name is an error that lists the right ones, never another module.
//!
//! **A check is no trust.** ELF constructors run inside `dlopen`, before any `catch_unwind` of ours
//! or of the module's: a constructor that aborts, exits or unwinds ends the daemon, and one that is
//! malicious owns it. Whether a module may be loaded at all is decided by who can write to it and
//! to its directories (`guard`), and by signatures (`signature`).
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
mod guard;
mod map;
mod policy;
mod residents;
mod sealed;
mod signature;
mod verify;

pub use error::CODES;
pub use policy::Policy;
pub use signature::TrustedKey;

use checked::Checked;
use domain_abi::descriptor::Description;
use domain_host::{Identity, LoadError, LoadedModule, ModuleLoader, VerifiedModule};
use error::{Error, printable};
use guard::Seen;
use map::{Loaded, Mapped, Shelf};
use sealed::Sealed;
use std::fs::File;
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
        let signature = || origin.signature.clone().ok_or(Error::Unsigned);
        let verified = sealed::open(&path).and_then(|(mut file, len)| {
            let signature = self.asks_for_signatures().then(signature).transpose()?;
            let verified = self.verify_open(&mut file, len, &origin.path, signature)?;
            if verified.checked().identity.sha256 == origin.sha256 {
                Ok(verified)
            } else {
                Err(Error::OtherBytes)
            }
        });
        let about = || format!("the kept module `{}`", printable(&origin.path));
        Ok(Box::new(verified.map_err(|e| e.about(&about()))?))
    }
}

impl FileLoader {
    const fn asks_for_signatures(&self) -> bool {
        !self.policy.trusted_keys.is_empty()
    }

    fn verify_file(&self, path: &Path) -> Result<Verified, Error> {
        let (mut file, len) = sealed::open(path)?;
        let metadata = file.metadata().map_err(Error::Unreadable)?;
        let real = guard::check(path, &metadata, self.asks_for_signatures())?;
        let name = path.to_string_lossy();
        if !self.asks_for_signatures() {
            return self.verify_open(&mut file, len, &name, None);
        }
        let seen = Seen::of(&metadata);
        let signature = signature::beside(&real)?;
        let verified = self.verify_open(&mut file, len, &name, Some(signature));
        // What has come between may be why it is refused.
        if seen.is_still(&file, path).map_err(Error::Unreadable)? {
            verified
        } else {
            Err(Error::Swapped)
        }
    }

    /// Checks the file, which is at its beginning, and calls it `name`.
    fn verify_open(
        &self,
        file: &mut File,
        len: u64,
        name: &str,
        signature: Option<String>,
    ) -> Result<Verified, Error> {
        let name = name.to_owned();
        let checked = match self.shelf.cache.take(file, len) {
            Some(mut cached) => {
                cached.identity.path = name;
                cached
            }
            None => {
                let sealed = Sealed::copy_of(file, Path::new(&name))?;
                let bytes = sealed.bytes()?;
                // Before anything in it is looked at.
                if let Some(signature) = &signature {
                    signature::verify(&self.policy.trusted_keys, signature, &bytes)?;
                }
                let facts = verify::inspect(&bytes, &self.policy)?;
                let (description, build_id) = (facts.description, facts.build_id.map(hex));
                let sha256 = hex(sealed.sha256());
                let identity =
                    Identity { path: name, sha256, build_id, signature: signature.clone() };
                Checked { description, identity, sealed }
            }
        };
        // It goes back to the cache if it is refused.
        let mut verified = Verified { checked: Some(checked), shelf: Arc::clone(&self.shelf) };
        verified.is_signed_by(&self.policy.trusted_keys, signature)?;
        Ok(verified)
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

    /// Has it go by this signature from now on, which is verified where it was not yet.
    fn is_signed_by(
        &mut self,
        keys: &[TrustedKey],
        signature: Option<String>,
    ) -> Result<(), Error> {
        let Some(checked) = &mut self.checked else { return Ok(()) };
        if let Some(new) = &signature
            && checked.identity.signature != signature
        {
            signature::verify(keys, new, &checked.sealed.bytes()?)?;
        }
        checked.identity.signature = signature;
        Ok(())
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
