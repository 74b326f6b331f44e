//! The module's side of the ABI: from a [`BlockDomain`] to a [`ModuleVtable`].
//!
//! [`Exported`] is generic, so the same domain can be exported by a module
//! ([`export_domain!`](crate::export_domain)) and linked statically by tests and benchmarks, which
//! take [`Exported::MODULE`] directly. Each entry point catches what unwinds; nothing that was
//! allocated here is freed by the host.

use crate::author::{BlockDomain, QueueContext};
use crate::host::Host;
use crate::request::{Batch, Completions};
use domain_abi::descriptor::Descriptor;
use domain_abi::{
    self as abi, HostVtable, ModuleVtable, RawBytes, RawCompletions, RawDeviceInfo, RawMessage,
    RawRequest,
};
use domain_abi::{DomainError, MAX_QUEUES, Params, QueueIndex, Swap};
use std::any::Any;
use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Exports a type that implements [`BlockDomain`] from a `cdylib` that is built with the crate's
/// feature `module`.
///
/// Without the feature it does nothing, so that two domains can be linked into one test.
#[macro_export]
macro_rules! export_domain {
    ($domain:ty) => {
        #[cfg(feature = "module")]
        const _: () = {
            #[used]
            #[unsafe(link_section = ".hotswap.domain")]
            static DESCRIPTOR: $crate::abi::descriptor::Descriptor =
                $crate::Exported::<$domain>::DESCRIPTOR;

            #[unsafe(no_mangle)]
            #[allow(non_upper_case_globals)]
            static hotswap_domain_module: $crate::abi::ModuleVtable =
                $crate::Exported::<$domain>::EXPORTED;
        };
    };
}

/// A domain behind the ABI.
#[derive(Debug)]
pub struct Exported<D>(PhantomData<D>);

impl<D: BlockDomain> Exported<D> {
    /// What the module says about itself.
    pub const DESCRIPTOR: Descriptor = Descriptor::new(
        D::NAME,
        D::VERSION,
        D::SCHEMA_NAME,
        D::SCHEMA,
        D::ACCEPTED_SCHEMAS,
        D::PARAMS,
        D::INHERITED,
    );

    /// Its functions, for a module of its own: with a panic hook.
    pub const EXPORTED: ModuleVtable = ModuleVtable {
        init: shim::install_panic_hook,
        fini: shim::remove_panic_hook,
        ..Self::MODULE
    };

    /// Its functions, for static linking: the process keeps its panic hook.
    pub const MODULE: ModuleVtable = ModuleVtable {
        size: size_of::<ModuleVtable>() as u32,
        abi_version: abi::ABI_VERSION,
        init: shim::nothing,
        fini: shim::nothing,
        create: shim::create::<D>,
        destroy: shim::destroy::<D>,
        info: shim::info::<D>,
        attach_queue: shim::attach_queue::<D>,
        detach_queue: shim::detach_queue::<D>,
        submit: shim::submit::<D>,
        reap: shim::reap::<D>,
        quiesce: shim::quiesce::<D>,
        activate: shim::activate::<D>,
        resume: shim::resume::<D>,
        cancel: shim::cancel::<D>,
        memory_changed: shim::memory_changed::<D>,
        set_write_cache: shim::set_write_cache::<D>,
        resize: shim::resize::<D>,
        claim: shim::claim::<D>,
        release: shim::release::<D>,
    };
}

/// What `create` allocates and the host's `instance` pointer points to.
struct Exposed<D: BlockDomain> {
    domain: D,
    queues: Box<[QueueCell<D>; MAX_QUEUES]>,
}

/// One queue's state. Only the thread that serves the queue looks inside.
struct QueueCell<D: BlockDomain>(UnsafeCell<Option<D::Queue>>);

// SAFETY: `domain` is Sync by its trait; each queue's cell is touched only by the calls for that
// queue, which the host makes from one thread at a time (abi::ModuleVtable), and what is inside is
// Send.
unsafe impl<D: BlockDomain> Sync for Exposed<D> {}

/// The entry points. Public for the macro only.
#[doc(hidden)]
pub mod shim {
    use super::*;

    fn say(message: *mut RawMessage, text: &str) {
        // SAFETY: null, or a valid message whose bytes have room for `capacity` (host's contract).
        let Some(message) = (unsafe { message.as_mut() }) else { return };
        let mut len = text.len().min(message.capacity);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        // SAFETY: `len` bytes fit, and the host's buffer cannot overlap our text.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), message.bytes, len) };
        message.len = len;
    }

    fn panic_text(payload: &(dyn Any + Send)) -> String {
        let text = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "panicked without a message".to_owned());
        format!("panicked: {text}")
    }

    #[inline]
    fn guarded(message: *mut RawMessage, f: impl FnOnce() -> Result<(), DomainError>) -> u32 {
        match catch_unwind(AssertUnwindSafe(f)) {
            Ok(Ok(())) => abi::CALL_OK,
            Ok(Err(error)) => refused(message, &error),
            Err(payload) => panicked(message, payload),
        }
    }

    // Out of the way of calls that go well, which are made for every batch.
    #[cold]
    #[inline(never)]
    fn refused(message: *mut RawMessage, error: &DomainError) -> u32 {
        say(message, &error.to_string());
        abi::CALL_FAILED
    }

    #[cold]
    #[inline(never)]
    fn panicked(message: *mut RawMessage, payload: Box<dyn Any + Send>) -> u32 {
        say(message, &panic_text(&*payload));
        // A payload whose drop panics would unwind into the host.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(payload)));
        abi::CALL_PANICKED
    }

    /// # Safety
    /// `instance` is what `create::<D>` returned, not yet destroyed.
    #[inline]
    unsafe fn exposed<'a, D: BlockDomain>(instance: *mut c_void) -> &'a Exposed<D> {
        // SAFETY: the caller's contract; `create` made it from exactly this type.
        unsafe { &*instance.cast::<Exposed<D>>() }
    }

    /// # Safety
    /// Called by the thread that serves `queue`, and no other reference to the queue's state is
    /// alive.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    unsafe fn queue_state<D: BlockDomain>(
        exposed: &Exposed<D>,
        queue: u32,
    ) -> Result<&mut Option<D::Queue>, DomainError> {
        let cell = exposed.queues.get(queue as usize).ok_or_else(|| no_queue(queue))?;
        // SAFETY: the caller's contract.
        Ok(unsafe { &mut *cell.0.get() })
    }

    /// # Safety
    /// None: it does nothing.
    pub unsafe extern "C" fn nothing() {}

    /// # Safety
    /// Called once, before anything else of the module.
    pub unsafe extern "C" fn install_panic_hook() {
        // The default hook prints, and with RUST_BACKTRACE it loads symbols that are never freed.
        // The message reaches the host through the payload instead.
        std::panic::set_hook(Box::new(|_| {}));
    }

    /// # Safety
    /// Called once, when no other thread runs code of the module.
    pub unsafe extern "C" fn remove_panic_hook() {
        drop(std::panic::take_hook());
    }

    /// # Safety
    /// As [`ModuleVtable::create`] says.
    pub unsafe extern "C" fn create<D: BlockDomain>(
        host: *const HostVtable,
        params: *const RawBytes,
        param_count: usize,
        out: *mut *mut c_void,
        message: *mut RawMessage,
    ) -> u32 {
        guarded(message, || {
            let mut texts = Vec::with_capacity(param_count);
            for i in 0..param_count {
                // SAFETY: `params` points to `param_count` entries, each of valid bytes, for the
                // length of the call.
                let bytes = unsafe {
                    let raw = *params.add(i);
                    if raw.len == 0 {
                        &[][..]
                    } else {
                        std::slice::from_raw_parts(raw.bytes, raw.len)
                    }
                };
                texts.push(String::from_utf8_lossy(bytes).into_owned());
            }
            let mut given = Params::default();
            for pair in texts.chunks_exact(2) {
                given.set(pair[0].clone(), pair[1].clone());
            }
            given.check_known(D::PARAMS)?;
            // SAFETY: the host keeps its table until `fini` (abi::HostVtable).
            let domain = D::prepare(unsafe { Host::from_vtable(host) }, &given)?;
            // Made where it stays: a queue's state can be large.
            let queues: Box<[_]> =
                (0..MAX_QUEUES).map(|_| QueueCell(UnsafeCell::new(None))).collect();
            let queues = queues.try_into().unwrap_or_else(|_| unreachable!("as many as there are"));
            let exposed = Box::new(Exposed { domain, queues });
            // SAFETY: `out` is valid for one pointer.
            unsafe { out.write(Box::into_raw(exposed).cast()) };
            Ok(())
        })
    }

    /// # Safety
    /// As [`ModuleVtable::destroy`] says.
    pub unsafe extern "C" fn destroy<D: BlockDomain>(
        instance: *mut c_void,
        message: *mut RawMessage,
    ) -> u32 {
        guarded(message, || {
            // SAFETY: `create::<D>` made it with `Box::into_raw`, and the host does not use it
            // again.
            drop(unsafe { Box::from_raw(instance.cast::<Exposed<D>>()) });
            Ok(())
        })
    }

    fn fixed<const N: usize>(text: &str, what: &str) -> Result<[u8; N], DomainError> {
        let mut out = [0; N];
        out.get_mut(..text.len())
            .ok_or_else(|| DomainError::new(format!("{what} `{text}` is longer than {N} bytes")))?
            .copy_from_slice(text.as_bytes());
        Ok(out)
    }

    /// # Safety
    /// As [`ModuleVtable::info`] says.
    pub unsafe extern "C" fn info<D: BlockDomain>(
        instance: *mut c_void,
        out: *mut RawDeviceInfo,
        message: *mut RawMessage,
    ) -> u32 {
        guarded(message, || {
            // SAFETY: the host passes a live instance.
            let info = unsafe { exposed::<D>(instance) }.domain.info();
            let raw = RawDeviceInfo {
                size: size_of::<RawDeviceInfo>() as u32,
                block_size: info.block_size,
                capacity: info.capacity,
                capabilities: info.capabilities.0,
                physical_block_size: info.physical_block_size,
                optimal_io_size: info.optimal_io_size,
                discard_granularity: info.discard_granularity,
                swap: u32::from(info.swap == Swap::SameBacking),
                backing_kind: fixed(&info.backing_kind, "backing kind")?,
                backing_device: info.backing_id.0,
                backing_inode: info.backing_id.1,
                backing_cache: info.backing_cache,
                serial: fixed(&info.serial, "serial number")?,
            };
            // SAFETY: `out` is valid for one structure of this ABI version's size; the host checks
            // `size` in ours before it made the call.
            unsafe { out.write(raw) };
            Ok(())
        })
    }

    /// # Safety
    /// As [`ModuleVtable::attach_queue`] says.
    pub unsafe extern "C" fn attach_queue<D: BlockDomain>(
        instance: *mut c_void,
        queue: u32,
        message: *mut RawMessage,
    ) -> u32 {
        guarded(message, || {
            // SAFETY: a live instance, called by the queue's thread.
            let exposed = unsafe { exposed::<D>(instance) };
            // SAFETY: as above; this is the only reference in this call.
            let state = unsafe { queue_state(exposed, queue) }?;
            *state = Some(exposed.domain.attach_queue(QueueContext { queue: QueueIndex(queue) })?);
            Ok(())
        })
    }

    /// # Safety
    /// As [`ModuleVtable::detach_queue`] says.
    pub unsafe extern "C" fn detach_queue<D: BlockDomain>(
        instance: *mut c_void,
        queue: u32,
        message: *mut RawMessage,
    ) -> u32 {
        guarded(message, || {
            // SAFETY: a live instance, called by the queue's thread.
            let exposed = unsafe { exposed::<D>(instance) };
            // SAFETY: as above; this is the only reference in this call.
            if let Some(state) = unsafe { queue_state(exposed, queue) }?.take() {
                exposed.domain.detach_queue(state);
            }
            Ok(())
        })
    }

    #[cold]
    fn no_queue(queue: u32) -> DomainError {
        DomainError::new(format!("there is no queue {queue}, the last is {}", MAX_QUEUES - 1))
    }

    /// The state of a queue that is attached.
    ///
    /// # Safety
    /// As for [`queue_state`].
    #[inline]
    #[allow(clippy::mut_from_ref)]
    unsafe fn attached<D: BlockDomain>(exposed: &Exposed<D>, queue: u32) -> Option<&mut D::Queue> {
        let cell = exposed.queues.get(queue as usize)?;
        // SAFETY: the caller's contract.
        unsafe { &mut *cell.0.get() }.as_mut()
    }

    #[cold]
    #[inline(never)]
    fn not_attached(message: *mut RawMessage, queue: u32) -> u32 {
        refused(message, &DomainError::new(format!("queue {queue} is not attached")))
    }

    /// # Safety
    /// As [`ModuleVtable::submit`] says.
    pub unsafe extern "C" fn submit<D: BlockDomain>(
        instance: *mut c_void,
        queue: u32,
        requests: *const RawRequest,
        count: usize,
        completions: *mut RawCompletions,
        accepted: *mut usize,
        message: *mut RawMessage,
    ) -> u32 {
        // SAFETY: a live instance, called by the queue's thread.
        let exposed = unsafe { exposed::<D>(instance) };
        // SAFETY: as above; this is the only reference in this call.
        let Some(state) = (unsafe { attached(exposed, queue) }) else {
            return not_attached(message, queue);
        };
        guarded(message, || {
            // SAFETY: `requests` points to `count` requests, `accepted` and `completions` to host
            // memory that nothing else uses during the call.
            let (requests, accepted, completions) = unsafe {
                (std::slice::from_raw_parts(requests, count), &mut *accepted, &mut *completions)
            };
            // SAFETY: each request is the instance's once it is taken, and is not offered again
            // (ModuleVtable::submit); the host's list has room for `capacity` entries
            // (abi::RawCompletions).
            let (mut batch, mut completions) =
                unsafe { (Batch::new(requests, accepted), Completions::new(completions)) };
            exposed.domain.submit(state, &mut batch, &mut completions);
            Ok(())
        })
    }

    /// # Safety
    /// As [`ModuleVtable::reap`] says.
    pub unsafe extern "C" fn reap<D: BlockDomain>(
        instance: *mut c_void,
        queue: u32,
        completions: *mut RawCompletions,
        message: *mut RawMessage,
    ) -> u32 {
        // SAFETY: a live instance, called by the queue's thread.
        let exposed = unsafe { exposed::<D>(instance) };
        // SAFETY: as above; this is the only reference in this call.
        let Some(state) = (unsafe { attached(exposed, queue) }) else {
            return not_attached(message, queue);
        };
        guarded(message, || {
            // SAFETY: `completions` is host memory that nothing else uses during the call, with
            // room for `capacity` entries.
            let mut completions = unsafe { Completions::new(&mut *completions) };
            exposed.domain.reap(state, &mut completions);
            Ok(())
        })
    }

    macro_rules! phases {
        ($($name:ident),*) => {$(
            #[doc = concat!("# Safety\nAs [`ModuleVtable::", stringify!($name), "`] says.")]
            pub unsafe extern "C" fn $name<D: BlockDomain>(instance: *mut c_void, message: *mut RawMessage) -> u32 {
                // SAFETY: the host passes a live instance.
                guarded(message, || unsafe { exposed::<D>(instance) }.domain.$name())
            }
        )*};
    }
    phases!(quiesce, activate, resume, release);

    /// # Safety
    /// As [`ModuleVtable::cancel`] says.
    pub unsafe extern "C" fn cancel<D: BlockDomain>(
        instance: *mut c_void,
        message: *mut RawMessage,
    ) -> u32 {
        guarded(message, || {
            // SAFETY: the host passes a live instance.
            unsafe { exposed::<D>(instance) }.domain.cancel();
            Ok(())
        })
    }

    /// # Safety
    /// As [`ModuleVtable::memory_changed`] says.
    pub unsafe extern "C" fn memory_changed<D: BlockDomain>(
        instance: *mut c_void,
        base: *mut u8,
        len: usize,
        added: u32,
        message: *mut RawMessage,
    ) -> u32 {
        guarded(message, || {
            // SAFETY: the host passes a live instance.
            unsafe { exposed::<D>(instance) }.domain.memory_changed(base as usize, len, added != 0);
            Ok(())
        })
    }

    /// # Safety
    /// As [`ModuleVtable::set_write_cache`] says.
    pub unsafe extern "C" fn set_write_cache<D: BlockDomain>(
        instance: *mut c_void,
        on: u32,
        message: *mut RawMessage,
    ) -> u32 {
        guarded(message, || {
            // SAFETY: the host passes a live instance.
            unsafe { exposed::<D>(instance) }.domain.set_write_cache(on != 0);
            Ok(())
        })
    }

    /// # Safety
    /// As [`ModuleVtable::resize`] says.
    pub unsafe extern "C" fn resize<D: BlockDomain>(
        instance: *mut c_void,
        capacity: u64,
        message: *mut RawMessage,
    ) -> u32 {
        // SAFETY: the host passes a live instance.
        guarded(message, || unsafe { exposed::<D>(instance) }.domain.resize(capacity))
    }

    /// # Safety
    /// As [`ModuleVtable::claim`] says.
    pub unsafe extern "C" fn claim<D: BlockDomain>(
        instance: *mut c_void,
        out: *mut u32,
        message: *mut RawMessage,
    ) -> u32 {
        guarded(message, || {
            // SAFETY: the host passes a live instance.
            let claim = unsafe { exposed::<D>(instance) }.domain.claim()?;
            // SAFETY: `out` is valid for one number.
            unsafe { out.write(claim as u32) };
            Ok(())
        })
    }
}
