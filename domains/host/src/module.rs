//! Modules, as an instance needs them: found, checked, mapped, and maybe never unmapped.

use domain_abi::ModuleVtable;
use domain_abi::descriptor::Description;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Which module it is, by content.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Where it was read from.
    pub path: String,
    /// SHA-256 of the file, in hex.
    pub sha256: String,
    /// The GNU build id, in hex, where it has one.
    pub build_id: Option<String>,
    /// By which it was found to be of trusted origin, if that was asked for.
    pub signature: Option<String>,
}

/// What became of a module's mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Residency {
    /// Unmapped; nothing of it is left.
    Gone,
    /// Still mapped, for the reason given.
    Resident(Resident),
    /// Still mapped, because code of it still runs, for the reason given.
    Running(Resident),
}

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

/// Why a module was not loaded: a stable code and a sentence that says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LoadError {
    /// Stable, e.g. `module_not_found`.
    pub code: &'static str,
    /// For the operator.
    pub message: String,
}

/// Finds modules by name or path.
pub trait ModuleLoader: Send + Sync {
    /// Reads and checks a module without running any of its code.
    ///
    /// # Errors
    /// Whatever makes it unfit.
    fn verify(&self, name: &str) -> Result<Box<dyn VerifiedModule>, LoadError>;

    /// Checks a module whose bytes were [kept](LoadedModule::image), in the same way. `origin` says
    /// where it was read from, and which bytes it has to have.
    ///
    /// # Errors
    /// Whatever makes it unfit; or this loader's modules have no bytes.
    fn verify_kept(
        &self,
        image: OwnedFd,
        origin: &Identity,
    ) -> Result<Box<dyn VerifiedModule>, LoadError> {
        drop(image);
        let message = format!("`{}` has no bytes that could be kept", origin.path);
        Err(LoadError { code: "module_not_found", message })
    }
}

/// A module that was read and checked, and is not mapped yet.
pub trait VerifiedModule: Send {
    /// What it says about itself.
    fn description(&self) -> &Description;
    /// Which one it is.
    fn identity(&self) -> &Identity;
    /// Maps it.
    ///
    /// # Errors
    /// What the dynamic linker says.
    fn load(self: Box<Self>) -> Result<Box<dyn LoadedModule>, LoadError>;
}

/// A mapped module.
///
/// # Safety
/// What `vtable` points to, and the code behind it, stays mapped and unchanged until `unload` is
/// called or the value is dropped.
pub unsafe trait LoadedModule: Send + Sync {
    /// Its functions.
    fn vtable(&self) -> *const ModuleVtable;
    /// What it says about itself.
    fn description(&self) -> &Description;
    /// Which one it is.
    fn identity(&self) -> &Identity;
    /// Its bytes, as a sealed memfd, where it has such a thing.
    fn image(&self) -> Option<OwnedFd> {
        None
    }
    /// Unmaps it and looks whether it is gone.
    fn unload(self: Box<Self>) -> Residency;
}
