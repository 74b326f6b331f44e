//! The host's side of the ABI: modules, instances and queues as safe values.
//!
//! Ownership does what the ABI demands. An [`Instance`] owns its module, so no code of it can run
//! after the unmapping; a [`QueueHandle`] is the only way to submit, there is one per queue, and it
//! is used by one thread at a time (`&mut`); it keeps its instance alive, and dropping it detaches
//! the queue. [`Instance::retire`] is the one way down: destroy, join the tasks, take the panic
//! hook out, unmap, and look whether the module is really gone.
//!
//! Deliberately absent: when to do any of this. That is the proxy's.

mod answer;
mod disk;
mod image;
mod module;
mod older;
mod patience;
mod region;
mod resident;
mod scratch;
mod services;
mod tasks;

pub use image::{HostImage, ImageEnd, ImageOpener};
pub use module::{
    Identity, LoadError, LoadedModule, ModuleLoader, Residency, Resident, VerifiedModule,
};
pub use region::HostRegion;
pub use scratch::CompletionBuffer;
pub use services::{HostServices, leaked_table};

use domain_abi::descriptor::Description;
use domain_abi::{self as abi, ModuleVtable, RawDeviceInfo, RawMessage, RawRequest};
use domain_abi::{Capabilities, DeviceInfo, MAX_QUEUES, Params, QueueIndex, Swap, raw_bytes};
use older::completed;
use resident::ResidentModule;
use scratch::MessageBuffer;
use services::HostSide;
use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Most queues that a device can have.
pub const QUEUE_LIMIT: usize = MAX_QUEUES;

/// How long retiring waits for threads that a domain started, of their own time.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a call into a domain did not do what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The domain said no.
    #[error("{0}")]
    Failed(String),
    /// The domain panicked and must not be called again.
    #[error("{0}")]
    Panicked(String),
}

/// A prepared domain, and the module it comes from.
pub struct Instance {
    module: Option<Box<dyn LoadedModule>>,
    vtable: ModuleVtable,
    raw: *mut c_void,
    host: Option<Arc<HostSide>>,
    attached: [AtomicBool; MAX_QUEUES],
    /// Set by the first panic: then there is no call but `destroy` any more.
    dead: AtomicBool,
    generation: AtomicU64,
}

// SAFETY: `raw` is a `Sync` domain behind the ABI, whose functions take calls from any thread
// (abi::ModuleVtable); calls for one queue go through its only `QueueHandle`.
unsafe impl Send for Instance {}
// SAFETY: as above.
unsafe impl Sync for Instance {}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Instance").field("name", &self.description().name).finish_non_exhaustive()
    }
}

impl Instance {
    /// Prepares an instance of `module` with `params`. Nothing of the predecessor is touched.
    ///
    /// # Errors
    /// What the domain says; the module is unmapped again, and where that fails, the residency
    /// comes with the error.
    pub fn prepare(
        module: Box<dyn LoadedModule>,
        services: Arc<dyn HostServices>,
        params: &Params,
    ) -> Result<Self, (CallError, Residency)> {
        // SAFETY: valid until `unload` (LoadedModule), copied here; each version has these two.
        let (size, version) = unsafe { ((*module.vtable()).size, (*module.vtable()).abi_version) };
        if (size as usize) < ModuleVtable::FIRST_SIZE || version != abi::ABI_VERSION {
            let error = CallError::Failed(format!(
                "its function table has {size} bytes of ABI {version}, this host needs {} bytes of ABI {}",
                ModuleVtable::FIRST_SIZE,
                abi::ABI_VERSION
            ));
            return Err((error, module.unload()));
        }
        // SAFETY: `size` bytes of it are valid (LoadedModule), and enough (just checked).
        let vtable = unsafe { completed(module.vtable(), size as usize) };
        let host = HostSide::new(services);
        // SAFETY: called once, before anything else (abi::ModuleVtable).
        unsafe { (vtable.init)() };
        let pairs: Vec<_> = params
            .iter()
            .flat_map(|(k, v)| [raw_bytes(k.as_bytes()), raw_bytes(v.as_bytes())])
            .collect();
        let mut raw = std::ptr::null_mut();
        // SAFETY: all pointers are valid for the call, and the host table until `fini`, because
        // `host` is dropped after it.
        let created = MessageBuffer::call(|message| unsafe {
            (vtable.create)(host.vtable(), pairs.as_ptr(), pairs.len(), &raw mut raw, message)
        });
        let mut instance = Self {
            module: Some(module),
            vtable,
            raw,
            host: Some(host),
            attached: [const { AtomicBool::new(false) }; MAX_QUEUES],
            dead: AtomicBool::new(false),
            generation: AtomicU64::new(0),
        };
        match created {
            Ok(()) => Ok(instance),
            Err(error) => {
                instance.raw = std::ptr::null_mut();
                let residency = instance.take_down().residency;
                Err((error, residency))
            }
        }
    }

    /// The module's bytes, as a sealed memfd, where it has such a thing.
    #[must_use]
    pub fn image(&self) -> Option<OwnedFd> {
        self.module.as_ref().and_then(|module| module.image())
    }

    /// What the module says about itself.
    #[must_use]
    pub fn description(&self) -> &Description {
        self.module().description()
    }

    /// Which module it comes from.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        self.module().identity()
    }

    fn module(&self) -> &dyn LoadedModule {
        &**self.module.as_ref().expect("an instance has its module until it is taken down")
    }

    /// The generation that it serves, or served last; 0 before its first.
    #[must_use]
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Sets the generation; workers read it when they attach, after the publication that this call
    /// precedes.
    pub fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Relaxed);
    }

    /// From now on it counts as having panicked.
    pub fn mark_dead(&self) {
        self.dead.store(true, Ordering::Relaxed);
    }

    /// Whether it has panicked.
    #[must_use]
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    fn call(&self, f: impl FnOnce(*mut c_void, *mut RawMessage) -> u32) -> Result<(), CallError> {
        self.call_with(&mut MessageBuffer::new(), f)
    }

    #[inline(always)]
    fn call_with(
        &self,
        buffer: &mut MessageBuffer,
        f: impl FnOnce(*mut c_void, *mut RawMessage) -> u32,
    ) -> Result<(), CallError> {
        if self.is_dead() {
            return Err(Self::was_dead());
        }
        let code = f(self.raw, buffer.scratch());
        if code == abi::CALL_OK { Ok(()) } else { Err(self.failed(buffer, code)) }
    }

    #[cold]
    fn was_dead() -> CallError {
        CallError::Failed("it has panicked before".to_owned())
    }

    #[cold]
    fn failed(&self, buffer: &mut MessageBuffer, code: u32) -> CallError {
        let error = buffer.error(code);
        if matches!(error, CallError::Panicked(_)) {
            self.mark_dead();
        }
        error
    }

    /// What the device announces, checked.
    ///
    /// # Errors
    /// What the domain says, or what makes its announcement unusable.
    pub fn info(&self) -> Result<DeviceInfo, CallError> {
        // SAFETY: a structure of integers and byte arrays: all zeros is one.
        let mut raw: RawDeviceInfo = unsafe { std::mem::zeroed() };
        raw.size = size_of::<RawDeviceInfo>() as u32;
        // SAFETY: `raw` and the message are valid for the call.
        self.call(|instance, message| unsafe {
            (self.vtable.info)(instance, &raw mut raw, message)
        })?;
        let text = |bytes: &[u8]| {
            let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
            String::from_utf8_lossy(&bytes[..end]).into_owned()
        };
        let info = DeviceInfo {
            capacity: raw.capacity,
            block_size: raw.block_size,
            physical_block_size: raw.physical_block_size,
            optimal_io_size: raw.optimal_io_size,
            discard_granularity: raw.discard_granularity,
            capabilities: Capabilities(raw.capabilities),
            swap: if raw.swap == 1 { Swap::SameBacking } else { Swap::No },
            backing_kind: text(&raw.backing_kind),
            backing_id: (raw.backing_device, raw.backing_inode),
            backing_cache: raw.backing_cache,
            serial: text(&raw.serial),
        };
        let usable = |size: u32| size.is_power_of_two() && (512..=1 << 20).contains(&size);
        if !usable(info.block_size) || !usable(info.physical_block_size) {
            return Err(CallError::Failed(format!(
                "it announces blocks of {} and {} bytes; both must be powers of two from 512 to 1M",
                info.block_size, info.physical_block_size
            )));
        }
        if info.capacity == 0 || !info.capacity.is_multiple_of(u64::from(info.block_size)) {
            return Err(CallError::Failed(format!(
                "it announces {} bytes, which is no positive multiple of its block size of {}",
                info.capacity, info.block_size
            )));
        }
        Ok(info)
    }

    /// See `BlockDomain::quiesce`.
    ///
    /// A panic here does not end the instance: no request was touched, and it is to resume.
    ///
    /// # Errors
    /// What the domain says.
    pub fn quiesce(&self) -> Result<(), CallError> {
        if self.is_dead() {
            return Err(Self::was_dead());
        }
        // SAFETY: a live instance and a valid message.
        MessageBuffer::call(|message| unsafe { (self.vtable.quiesce)(self.raw, message) })
    }

    /// See `BlockDomain::activate`.
    ///
    /// # Errors
    /// What the domain says.
    pub fn activate(&self) -> Result<(), CallError> {
        // SAFETY: a live instance and a valid message.
        self.call(|instance, message| unsafe { (self.vtable.activate)(instance, message) })
    }

    /// See `BlockDomain::resume`.
    ///
    /// # Errors
    /// What the domain says.
    pub fn resume(&self) -> Result<(), CallError> {
        // SAFETY: a live instance and a valid message.
        self.call(|instance, message| unsafe { (self.vtable.resume)(instance, message) })
    }

    /// See `BlockDomain::cancel`.
    ///
    /// # Errors
    /// What the domain says.
    pub fn cancel(&self) -> Result<(), CallError> {
        // SAFETY: a live instance and a valid message.
        self.call(|instance, message| unsafe { (self.vtable.cancel)(instance, message) })
    }

    /// See `BlockDomain::memory_changed`.
    ///
    /// # Errors
    /// What the domain says.
    pub fn memory_changed(&self, address: usize, len: usize, added: bool) -> Result<(), CallError> {
        let base = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: a live instance and a valid message; the range is only named.
        self.call(|instance, message| unsafe {
            (self.vtable.memory_changed)(instance, base, len, u32::from(added), message)
        })
    }

    /// See `BlockDomain::set_write_cache`.
    ///
    /// # Errors
    /// What the domain says.
    pub fn set_write_cache(&self, on: bool) -> Result<(), CallError> {
        // SAFETY: a live instance and a valid message.
        self.call(|instance, message| unsafe {
            (self.vtable.set_write_cache)(instance, u32::from(on), message)
        })
    }

    /// Attaches a queue, on the thread that will serve it.
    ///
    /// # Errors
    /// What the domain says; or the queue is attached already.
    pub fn attach(self: &Arc<Self>, queue: QueueIndex) -> Result<QueueHandle, CallError> {
        let taken = self
            .attached
            .get(queue.0 as usize)
            .ok_or_else(|| CallError::Failed(format!("there is no queue {}", queue.0)))?;
        // Acquire pairs with the Release in QueueHandle::drop: the next thread sees what the last
        // one did to the queue's state.
        if taken.swap(true, Ordering::Acquire) {
            return Err(CallError::Failed(format!("queue {} is attached already", queue.0)));
        }
        // SAFETY: a live instance and a valid message, and the flag makes us the queue's only
        // thread.
        let attached = self.call(|instance, message| unsafe {
            (self.vtable.attach_queue)(instance, queue.0, message)
        });
        if let Err(error) = attached {
            taken.store(false, Ordering::Release);
            return Err(error);
        }
        Ok(QueueHandle { instance: Arc::clone(self), queue, message: MessageBuffer::new() })
    }

    /// Ends the instance and unmaps its module.
    #[must_use = "the module may still be resident"]
    pub fn retire(mut self) -> Retired {
        self.take_down()
    }

    fn take_down(&mut self) -> Retired {
        let Some(module) = self.module.take() else {
            return Retired { destroyed: Ok(()), residency: Residency::Gone };
        };
        let raw = std::mem::replace(&mut self.raw, std::ptr::null_mut());
        let destroyed = if raw.is_null() {
            Ok(())
        } else {
            // SAFETY: no queue handle is left (each holds an `Arc` of us), so no other thread is in
            // the instance, and `raw` is forgotten.
            MessageBuffer::call(|message| unsafe { (self.vtable.destroy)(raw, message) })
        };
        let host = self.host.take().expect("taken together with the module");
        if let Err(stuck) = host.tasks().join(JOIN_TIMEOUT) {
            // Code of the module still runs: neither it nor what it refers to may go yet.
            let reason = format!(
                "its {stuck} still runs {} s after the instance ended",
                JOIN_TIMEOUT.as_secs()
            );
            let resident = ResidentModule::running(&reason, host, module, self.vtable.fini);
            return Retired { destroyed, residency: Residency::Running(resident) };
        }
        // SAFETY: no instance is left, no task runs, so no other thread runs code of the module.
        unsafe { (self.vtable.fini)() };
        let residency = match module.unload() {
            Residency::Gone => Residency::Gone,
            // Something of it may still run one day; what it may use must stay valid until then.
            Residency::Resident(module) => {
                Residency::Resident(ResidentModule::mapped(host, module))
            }
            Residency::Running(module) => Residency::Running(ResidentModule::mapped(host, module)),
        };
        Retired { destroyed, residency }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.take_down();
    }
}

/// How retiring went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retired {
    /// What the domain's own end said.
    pub destroyed: Result<(), CallError>,
    /// What became of the module.
    pub residency: Residency,
}

/// The right to use one queue of one instance, on one thread.
#[derive(Debug)]
pub struct QueueHandle {
    instance: Arc<Instance>,
    queue: QueueIndex,
    message: MessageBuffer,
}

impl QueueHandle {
    /// Whose queue it is.
    #[must_use]
    #[inline]
    pub const fn instance(&self) -> &Arc<Instance> {
        &self.instance
    }

    /// Offers requests; returns how many from the front the domain says that it took, which a
    /// domain with a fault may say more of than there were. What ended at once, even before a
    /// panic, is in `completions`.
    ///
    /// The caller has looked whether the instance is [dead](Instance::is_dead), before this batch:
    /// it costs a load, so it is done once.
    ///
    /// # Errors
    /// A panic, or a failing call; how many were taken is then unknown, and `completions` says what
    /// is done.
    #[inline(always)]
    pub fn submit(
        &mut self,
        requests: &[RawRequest],
        completions: &mut CompletionBuffer,
    ) -> Result<usize, CallError> {
        let (instance, mut accepted) = (&*self.instance, 0);
        // SAFETY: an instance that was not destroyed; we are the queue's only thread (`&mut self`);
        // all pointers are valid for the call, and the maker of the requests answers for what they
        // point to (RawRequest::new).
        let code = unsafe {
            (instance.vtable.submit)(
                instance.raw,
                self.queue.0,
                requests.as_ptr(),
                requests.len(),
                completions.scratch(),
                &raw mut accepted,
                self.message.scratch(),
            )
        };
        if code != abi::CALL_OK {
            return Err(instance.failed(&mut self.message, code));
        }
        Ok(accepted)
    }

    /// Collects what completed since.
    ///
    /// # Errors
    /// As for `submit`.
    #[inline]
    pub fn reap(&mut self, completions: &mut CompletionBuffer) -> Result<(), CallError> {
        let out = completions.scratch();
        // SAFETY: as in `submit`.
        self.instance.call_with(&mut self.message, |instance, message| unsafe {
            (self.instance.vtable.reap)(instance, self.queue.0, out, message)
        })
    }
}

impl Drop for QueueHandle {
    fn drop(&mut self) {
        // What a dead instance keeps for the queue goes with the instance.
        if !self.instance.is_dead() {
            // SAFETY: a live instance, and we are the queue's only thread.
            let detached = self.instance.call(|instance, message| unsafe {
                (self.instance.vtable.detach_queue)(instance, self.queue.0, message)
            });
            if let (Err(error), Some(host)) = (detached, &self.instance.host) {
                host.services().log(
                    domain_abi::Level::Warn,
                    &format!("detaching queue {}: {error}", self.queue.0),
                );
            }
        }
        // Release pairs with the Acquire in `attach`.
        self.instance.attached[self.queue.0 as usize].store(false, Ordering::Release);
    }
}
