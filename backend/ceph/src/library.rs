//! librados and librbd, opened when the first image is asked for: nothing of Ceph is needed to
//! build, or on a host that has no such image.
//!
//! They are never closed: librbd has symbols that the dynamic linker keeps (`STB_GNU_UNIQUE`), so a
//! `dlclose` would leave it mapped, and threads of it may still run.

use libc::{c_char, c_int, c_void, iovec};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::sync::Mutex;

/// The sonames of the versions that there are since 2012 (librados) and 2010 (librbd).
const RADOS: &str = "librados.so.2";
const RBD: &str = "librbd.so.1";

/// `rados_t`, `rados_ioctx_t`, `rbd_image_t`, `rbd_completion_t`.
pub(crate) type Opaque = *mut c_void;

/// What is called when an asynchronous request has ended: `rbd_callback_t`.
pub(crate) type Callback = unsafe extern "C" fn(completion: Opaque, arg: *mut c_void);

/// `librbd_progress_fn_t`. librbd calls it without a look at whether there is one.
pub(crate) type Progress = unsafe extern "C" fn(done: u64, of: u64, arg: *mut c_void) -> c_int;

/// `rbd_image_watcher_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawWatcher {
    pub(crate) address: *mut c_char,
    pub(crate) id: i64,
    pub(crate) cookie: u64,
}

/// `rbd_config_option_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawSetting {
    pub(crate) name: *mut c_char,
    pub(crate) value: *mut c_char,
    pub(crate) source: c_int,
}

macro_rules! functions {
    ($($library:ident { $($name:ident($($arg:ty),*) $(-> $result:ty)?;)* })*) => {
        /// What is called of them, as `rados/librados.h` and `rbd/librbd.h` declare it.
        #[derive(Debug)]
        pub(crate) struct Functions {
            $($(pub(crate) $name: unsafe extern "C" fn($($arg),*) $(-> $result)?,)*)*
        }

        impl Functions {
            fn of(rados: &Library, rbd: &Library) -> Result<Self, String> {
                let libraries = Libraries { rados, rbd };
                Ok(Self { $($($name: {
                    let name = concat!(stringify!($name), "\0");
                    // SAFETY: a function of this name has had this type in each version of the
                    // library since it came (the headers named above); the library stays mapped.
                    let found = unsafe { libraries.$library.get(name.as_bytes()) };
                    *found.map_err(|error: libloading::Error| too_old(stringify!($name), &error))?
                },)*)* })
            }
        }
    };
}

struct Libraries<'l> {
    rados: &'l Library,
    rbd: &'l Library,
}

functions! {
    rados {
        rados_create(*mut Opaque, *const c_char) -> c_int;
        rados_conf_read_file(Opaque, *const c_char) -> c_int;
        rados_conf_set(Opaque, *const c_char, *const c_char) -> c_int;
        rados_connect(Opaque) -> c_int;
        rados_shutdown(Opaque);
        rados_cluster_fsid(Opaque, *mut c_char, usize) -> c_int;
        rados_ioctx_create(Opaque, *const c_char, *mut Opaque) -> c_int;
        rados_ioctx_destroy(Opaque);
        rados_ioctx_set_namespace(Opaque, *const c_char);
        rados_ioctx_get_id(Opaque) -> i64;
        rados_set_pool_full_try(Opaque);
    }
    rbd {
        rbd_open(Opaque, *const c_char, *mut Opaque, *const c_char) -> c_int;
        rbd_open_read_only(Opaque, *const c_char, *mut Opaque, *const c_char) -> c_int;
        rbd_close(Opaque) -> c_int;
        rbd_get_size(Opaque, *mut u64) -> c_int;
        rbd_get_features(Opaque, *mut u64) -> c_int;
        rbd_get_id(Opaque, *mut c_char, usize) -> c_int;
        rbd_config_image_list(Opaque, *mut RawSetting, *mut c_int) -> c_int;
        rbd_config_image_list_cleanup(*mut RawSetting, c_int);
        rbd_resize2(Opaque, u64, bool, Progress, *mut c_void) -> c_int;
        rbd_lock_acquire(Opaque, c_int) -> c_int;
        rbd_lock_release(Opaque) -> c_int;
        rbd_lock_get_owners(Opaque, *mut c_int, *mut *mut c_char, *mut usize) -> c_int;
        rbd_lock_get_owners_cleanup(*mut *mut c_char, usize);
        rbd_lock_break(Opaque, c_int, *const c_char) -> c_int;
        rbd_is_exclusive_lock_owner(Opaque, *mut c_int) -> c_int;
        rbd_metadata_get(Opaque, *const c_char, *mut c_char, *mut usize) -> c_int;
        rbd_metadata_set(Opaque, *const c_char, *const c_char) -> c_int;
        rbd_watchers_list(Opaque, *mut RawWatcher, *mut usize) -> c_int;
        rbd_watchers_list_cleanup(*mut RawWatcher, usize);
        rbd_aio_create_completion(*mut c_void, Callback, *mut Opaque) -> c_int;
        rbd_aio_get_return_value(Opaque) -> isize;
        rbd_aio_release(Opaque);
        rbd_aio_readv(Opaque, *const iovec, c_int, u64, Opaque) -> c_int;
        rbd_aio_writev(Opaque, *const iovec, c_int, u64, Opaque) -> c_int;
        rbd_aio_flush(Opaque, Opaque) -> c_int;
        rbd_aio_discard(Opaque, u64, u64, Opaque) -> c_int;
        rbd_aio_write_zeroes(Opaque, u64, usize, Opaque, c_int, c_int) -> c_int;
    }
}

fn too_old(name: &str, error: &libloading::Error) -> String {
    format!(
        "Ceph's library has no `{name}` ({error}); it is older than 16.2, install a newer librbd1"
    )
}

/// The libraries, once they are there. A failure is not kept: they may be installed meanwhile.
pub(crate) fn functions() -> Result<&'static Functions, String> {
    static LOADED: Mutex<Option<&'static Functions>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(functions) = *loaded {
        return Ok(functions);
    }
    let open = |name: &str| {
        // SAFETY: its initializers are Ceph's own, which do no more than any program that is linked
        // with it has done at its start; they may run on any thread.
        unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
            format!(
                "Ceph's library {name} cannot be loaded ({error}); install it: the package is librbd1 (Debian, Fedora) or librbd (Arch)"
            )
        })
    };
    let (rados, rbd) = (open(RADOS)?, open(RBD)?);
    let functions = Functions::of(&rados, &rbd);
    // Mapped for as long as the process, see above.
    std::mem::forget((rados, rbd));
    let functions: &'static Functions = Box::leak(Box::new(functions?));
    *loaded = Some(functions);
    Ok(functions)
}
