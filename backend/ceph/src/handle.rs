//! An image that librbd has open, as a safe value: every call into it is here.
//!
//! Invariants: what was made is ended in the opposite order, once (`Drop`); a request's memory is
//! librbd's until its callback, which ends it.

use crate::fate::Fate;
use crate::library::{Functions, Opaque, RawSetting, RawWatcher, functions};
use crate::settings::{self, MONITOR_SECONDS, SETTINGS};
use crate::spec::Spec;
use domain_abi::{RawRequest, op};
use domain_host::ImageEnd;
use libc::{c_char, c_int, c_void, iovec};
use std::ffi::{CStr, CString};
use std::ptr::{null, null_mut};
use std::sync::Arc;

/// `RBD_LOCK_MODE_EXCLUSIVE`.
const EXCLUSIVE: c_int = 0;
/// `RBD_FEATURE_EXCLUSIVE_LOCK`.
const EXCLUSIVE_LOCK: u64 = 1 << 2;
/// `RBD_WRITE_ZEROES_FLAG_THICK_PROVISION`.
const THICK: c_int = 1;

/// Why an image was not opened.
#[derive(Debug)]
pub(crate) enum Unopened {
    /// The cluster does not answer; it may later.
    Silent(String),
    /// This is in the way.
    Refused(String),
}

impl From<String> for Unopened {
    fn from(why: String) -> Self {
        Self::Refused(why)
    }
}

/// An open image, with its connection to the cluster.
#[derive(Debug)]
pub(crate) struct Handle {
    functions: &'static Functions,
    cluster: Opaque,
    pool: Opaque,
    image: Opaque,
    fate: Arc<Fate>,
}

// SAFETY: librados and librbd take calls for one handle from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// What is done, if librbd says so; if not, with which `errno`.
fn done(result: c_int) -> Result<(), i32> {
    if result < 0 { Err(-result) } else { Ok(()) }
}

/// What an `errno` means, for people.
pub(crate) fn meaning(errno: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno)
}

fn c_text(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|_| format!("`{text:?}` has a zero byte in it"))
}

impl Handle {
    /// Opens an image. It may take for ever.
    pub(crate) fn open(spec: &Spec, fate: Arc<Fate>) -> Result<Self, Unopened> {
        let functions = functions()?;
        let mut handle =
            Self { functions, cluster: null_mut(), pool: null_mut(), image: null_mut(), fate };
        handle.connect(spec)?;
        handle.open_pool(spec)?;
        handle.open_image(spec)?;
        Ok(handle)
    }

    fn connect(&mut self, spec: &Spec) -> Result<(), Unopened> {
        let (f, user) = (self.functions, &spec.id);
        let id = c_text(user)?;
        // SAFETY: room for a handle, and a text.
        let created = unsafe { (f.rados_create)(&raw mut self.cluster, id.as_ptr()) };
        if let Err(errno) = done(created) {
            self.cluster = null_mut();
            return Err(format!("Ceph's library does not begin: {}", meaning(errno)).into());
        }
        let conf = c_text(&spec.conf)?;
        let path = if spec.conf.is_empty() { null() } else { conf.as_ptr() };
        // SAFETY: a live handle; a text, or none for the places where Ceph looks.
        done(unsafe { (f.rados_conf_read_file)(self.cluster, path) }).map_err(|errno| {
            let conf = if spec.conf.is_empty() { "/etc/ceph/ceph.conf" } else { &spec.conf };
            format!(
                "Ceph's configuration `{conf}` cannot be read: {}; name the cluster's with conf=PATH",
                meaning(errno)
            )
        })?;
        for (key, value) in SETTINGS {
            let value = c_text(value)?;
            // Newer versions may have done away with one.
            // SAFETY: a live handle and two texts.
            let _ = unsafe { (f.rados_conf_set)(self.cluster, key.as_ptr(), value.as_ptr()) };
        }
        // SAFETY: a live handle.
        done(unsafe { (f.rados_connect)(self.cluster) }).map_err(|errno| Unopened::Refused(match errno {
            libc::ETIMEDOUT => return Unopened::Silent(format!(
                "no monitor of the cluster has answered for {MONITOR_SECONDS} s; look whether they run, and at `mon_host` in the configuration"
            )),
            libc::ENOENT => format!(
                "there is no key for client.{user}; put its keyring where `keyring` of the configuration says, readable for the daemon's user, or name another user with id=NAME"
            ),
            libc::EACCES | libc::EPERM => format!(
                "the cluster does not let client.{user} in: its key is not the one that the cluster has (`ceph auth get client.{user}`)"
            ),
            libc::EINVAL => "the configuration names no monitors; set `mon_host`".to_owned(),
            errno => format!("the cluster cannot be reached: {}", meaning(errno)),
        }))
    }

    fn open_pool(&mut self, spec: &Spec) -> Result<(), String> {
        let f = self.functions;
        let pool = c_text(&spec.pool)?;
        // SAFETY: a connected handle, a text and room for a handle.
        let made = done(unsafe {
            (f.rados_ioctx_create)(self.cluster, pool.as_ptr(), &raw mut self.pool)
        });
        made.map_err(|errno| {
            self.pool = null_mut();
            match errno {
                libc::ENOENT => format!(
                    "the cluster has no pool `{}`; `ceph osd pool ls` says which there are",
                    spec.pool
                ),
                errno => format!("the pool `{}` cannot be used: {}", spec.pool, meaning(errno)),
            }
        })?;
        let namespace = c_text(&spec.namespace)?;
        // SAFETY: a live handle and a text. With full-try, what a full pool does not take fails
        // instead of waiting.
        unsafe {
            (f.rados_ioctx_set_namespace)(self.pool, namespace.as_ptr());
            (f.rados_set_pool_full_try)(self.pool);
        }
        Ok(())
    }

    fn open_image(&mut self, spec: &Spec) -> Result<(), String> {
        let f = self.functions;
        let (name, snapshot) =
            (c_text(&spec.name)?, spec.snapshot.as_deref().map(c_text).transpose()?);
        let snapshot = snapshot.as_ref().map_or(null(), |snapshot| snapshot.as_ptr());
        let open = if spec.read_only { f.rbd_open_read_only } else { f.rbd_open };
        // SAFETY: a live handle, texts that outlive the call, and room for a handle.
        let opened = done(unsafe { open(self.pool, name.as_ptr(), &raw mut self.image, snapshot) });
        opened.map_err(|errno| {
            self.image = null_mut();
            let (label, user) = (&self.fate.label, &spec.id);
            match errno {
                libc::ENOENT => format!(
                    "there is no image {label}; `rbd ls {}` says which there are, `rbd create` makes one",
                    spec.pool
                ),
                libc::EACCES | libc::EPERM => format!(
                    "client.{user} may not use image {label}; give it the capabilities mon 'profile rbd' osd 'profile rbd pool={}'",
                    spec.pool
                ),
                libc::EDQUOT | libc::ENOSPC => format!(
                    "image {label} cannot be opened, because its pool is full; raise the quota, or make room"
                ),
                errno => format!("image {label} cannot be opened: {}", meaning(errno)),
            }
        })?;
        if spec.read_only {
            return Ok(());
        }
        let mut features = 0;
        // SAFETY: a live handle and room for a number.
        done(unsafe { (f.rbd_get_features)(self.image, &raw mut features) })
            .map_err(|errno| format!("features of {}: {}", self.fate.label, meaning(errno)))?;
        if features & EXCLUSIVE_LOCK == 0 {
            return Err(format!(
                "image {0} has no exclusive lock, without which another writer could not be kept off; turn it on with `rbd feature enable {0} exclusive-lock`, or serve it with readonly=true",
                self.fate.label
            ));
        }
        let found = self.settings();
        let found =
            found.map_err(|errno| format!("settings of {}: {}", self.label(), meaning(errno)))?;
        settings::check(&found, self.label(), &spec.pool)
    }

    /// What is set for the image.
    fn settings(&self) -> Result<Vec<(String, String)>, i32> {
        let f = self.functions;
        let nothing = RawSetting { name: null_mut(), value: null_mut(), source: 0 };
        let mut list = vec![nothing; 256];
        loop {
            let mut count = c_int::try_from(list.len()).map_err(|_| libc::ERANGE)?;
            // SAFETY: a live handle, and room for as many as `count` says.
            let listed = unsafe {
                let (list, count) = (list.as_mut_ptr(), &raw mut count);
                done((f.rbd_config_image_list)(self.image, list, count))
            };
            let found = usize::try_from(count).unwrap_or(0);
            match listed {
                Err(libc::ERANGE) => list.resize(found.max(list.len() + 1), nothing),
                listed => {
                    listed?;
                    // SAFETY: texts of librbd's.
                    let text =
                        |text| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
                    let settings =
                        list[..found].iter().map(|one| (text(one.name), text(one.value))).collect();
                    // SAFETY: the list that was filled in, with its length.
                    unsafe { (f.rbd_config_image_list_cleanup)(list.as_mut_ptr(), count) };
                    return Ok(settings);
                }
            }
        }
    }

    /// For people.
    pub(crate) fn label(&self) -> &str {
        &self.fate.label
    }

    /// As [`done`], of a call for the image: once the cluster has locked this client out, that is
    /// the end of the image, whatever was asked.
    fn asked(&self, result: c_int) -> Result<(), i32> {
        done(result).inspect_err(|&errno| self.fate.has_failed(errno))
    }

    pub(crate) fn size(&self) -> Result<u64, i32> {
        let mut size = 0;
        // SAFETY: a live handle and room for a number.
        self.asked(unsafe { (self.functions.rbd_get_size)(self.image, &raw mut size) })?;
        Ok(size)
    }

    /// Which image it is, whatever it is called: cluster, pool and the image's own name for itself.
    pub(crate) fn identity(&self) -> Result<String, i32> {
        let f = self.functions;
        let (mut fsid, mut id) = ([0 as c_char; 64], [0 as c_char; 256]);
        // SAFETY: live handles, and buffers with their lengths.
        unsafe {
            done((f.rados_cluster_fsid)(self.cluster, fsid.as_mut_ptr(), fsid.len()))?;
            done((f.rbd_get_id)(self.image, id.as_mut_ptr(), id.len()))?;
            let pool = (f.rados_ioctx_get_id)(self.pool);
            Ok(format!("{}/{pool}/{}", text(&fsid), text(&id)))
        }
    }

    /// Makes it larger. One that is larger by then is not made smaller (`EINVAL`).
    pub(crate) fn enlarge(&self, size: u64) -> Result<(), i32> {
        let resize = self.functions.rbd_resize2;
        // SAFETY: a live handle, and a function that needs no argument.
        self.asked(unsafe { resize(self.image, size, false, progresses, null_mut()) })
    }

    // The lock.

    /// The address of the client that has the lock, if one has.
    pub(crate) fn owner(&self) -> Result<Option<String>, i32> {
        let f = self.functions;
        let (mut mode, mut count) = (0, 1);
        let mut owners = [null_mut::<c_char>(); 1];
        // SAFETY: a live handle, room for a number and for as many texts as `count` says.
        let result = self.asked(unsafe {
            let (owners, count) = (owners.as_mut_ptr(), &raw mut count);
            (f.rbd_lock_get_owners)(self.image, &raw mut mode, owners, count)
        });
        match result {
            Err(libc::ENOENT) => return Ok(None),
            result => result?,
        }
        if count == 0 || owners[0].is_null() {
            return Ok(None);
        }
        // SAFETY: a text of librbd's, given back after it was copied.
        let owner = unsafe {
            let owner = CStr::from_ptr(owners[0]).to_string_lossy().into_owned();
            (f.rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), count);
            owner
        };
        Ok(Some(owner))
    }

    /// Whether this handle has the lock.
    pub(crate) fn is_owner(&self) -> Result<bool, i32> {
        let mut is_owner = 0;
        // SAFETY: a live handle and room for a number.
        self.asked(unsafe {
            (self.functions.rbd_is_exclusive_lock_owner)(self.image, &raw mut is_owner)
        })?;
        Ok(is_owner != 0)
    }

    /// Takes the lock, for good: others that ask for it are refused.
    pub(crate) fn acquire(&self) -> Result<(), i32> {
        // SAFETY: a live handle.
        self.asked(unsafe { (self.functions.rbd_lock_acquire)(self.image, EXCLUSIVE) })
    }

    pub(crate) fn release(&self) -> Result<(), i32> {
        // SAFETY: a live handle.
        self.asked(unsafe { (self.functions.rbd_lock_release)(self.image) })
    }

    /// Takes the lock away from the client with this address, which is locked out of the cluster.
    pub(crate) fn break_lock(&self, owner: &str) -> Result<(), i32> {
        let owner = CString::new(owner).map_err(|_| libc::EINVAL)?;
        // SAFETY: a live handle and a text.
        self.asked(unsafe {
            (self.functions.rbd_lock_break)(self.image, EXCLUSIVE, owner.as_ptr())
        })
    }

    /// Whether a client with this address has the image open.
    pub(crate) fn is_watched_by(&self, address: &str) -> Result<bool, i32> {
        let f = self.functions;
        let nothing = RawWatcher { address: null_mut(), id: 0, cookie: 0 };
        let mut watchers = vec![nothing; 64];
        loop {
            let mut count = watchers.len();
            // SAFETY: a live handle, and room for as many as `count` says.
            let listed = unsafe {
                let (list, count) = (watchers.as_mut_ptr(), &raw mut count);
                self.asked((f.rbd_watchers_list)(self.image, list, count))
            };
            match listed {
                Err(libc::ERANGE) => watchers.resize(count.max(watchers.len() + 1), nothing),
                listed => {
                    listed?;
                    let is_it = |watcher: &RawWatcher| {
                        // SAFETY: a text of librbd's.
                        unsafe { CStr::from_ptr(watcher.address) }.to_bytes() == address.as_bytes()
                    };
                    let found = watchers[..count].iter().any(is_it);
                    // SAFETY: the list that was filled in, with its length.
                    unsafe { (f.rbd_watchers_list_cleanup)(watchers.as_mut_ptr(), count) };
                    return Ok(found);
                }
            }
        }
    }

    /// What is noted in the image under `key`.
    pub(crate) fn note(&self, key: &str) -> Result<Option<String>, i32> {
        let key = CString::new(key).map_err(|_| libc::EINVAL)?;
        let mut value = [0 as c_char; 1024];
        let (mut len, get) = (value.len(), self.functions.rbd_metadata_get);
        // SAFETY: a live handle, a text, and a buffer with its length.
        let read =
            self.asked(unsafe { get(self.image, key.as_ptr(), value.as_mut_ptr(), &raw mut len) });
        match read {
            Ok(()) => Ok(Some(text(&value))),
            // None, or none of ours: it would be shorter.
            Err(libc::ENOENT | libc::ERANGE) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn set_note(&self, key: &str, value: &str) -> Result<(), i32> {
        let key = CString::new(key).map_err(|_| libc::EINVAL)?;
        let value = CString::new(value).map_err(|_| libc::EINVAL)?;
        let set = self.functions.rbd_metadata_set;
        // SAFETY: a live handle and two texts.
        self.asked(unsafe { set(self.image, key.as_ptr(), value.as_ptr()) })
    }

    // Requests.

    /// Begins a request, which `end` ends.
    ///
    /// # Safety
    /// All that `request` points to stays valid until `end` is completed or dropped.
    pub(crate) unsafe fn begin(&self, request: &RawRequest, end: ImageEnd) {
        let f = self.functions;
        let begun = Box::into_raw(Box::new(Begun {
            functions: f,
            fate: Arc::clone(&self.fate),
            expected: if request.op() == op::READ { request.len() } else { 0 },
            end,
        }));
        let mut completion = null_mut();
        // SAFETY: `ended` takes the box, once.
        let made =
            unsafe { (f.rbd_aio_create_completion)(begun.cast(), ended, &raw mut completion) };
        let result = match done(made) {
            // SAFETY: the caller's contract.
            Ok(()) => done(unsafe { self.submit(request, completion) }).inspect_err(|_| {
                // SAFETY: it was not begun, so its callback does not come.
                unsafe { (f.rbd_aio_release)(completion) }
            }),
            Err(errno) => Err(errno),
        };
        if let Err(errno) = result {
            // SAFETY: librbd has refused it, so the callback does not come, and the box is ours.
            unsafe { Box::from_raw(begun) }.end(-(errno as isize));
        }
    }

    /// # Safety
    /// All that `request` points to stays valid until `completion` is called back.
    unsafe fn submit(&self, request: &RawRequest, completion: Opaque) -> c_int {
        let (f, image) = (self.functions, self.image);
        let (offset, len) = (request.offset(), request.len());
        let (segments, count) = request.segments();
        let (vectors, count) = (segments.cast::<iovec>(), count as c_int);
        // SAFETY: a live handle, a completion of its own; a segment has the layout of an iovec
        // (domain_abi::RawSegment), and list and memory are valid as the caller has promised.
        unsafe {
            match request.op() {
                op::READ => (f.rbd_aio_readv)(image, vectors, count, offset, completion),
                op::WRITE => (f.rbd_aio_writev)(image, vectors, count, offset, completion),
                op::FLUSH => (f.rbd_aio_flush)(image, completion),
                op::DISCARD => (f.rbd_aio_discard)(image, offset, len, completion),
                op::WRITE_ZEROES => {
                    let keep = request.flags() & domain_abi::REQUEST_MAY_UNMAP == 0;
                    let how = if keep { THICK } else { 0 };
                    (f.rbd_aio_write_zeroes)(image, offset, len as usize, completion, how, 0)
                }
                _ => -libc::EOPNOTSUPP,
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let f = self.functions;
        // SAFETY: each was made, if it is not null, and is used no more: what was begun has ended
        // when `rbd_close` comes back.
        unsafe {
            if !self.image.is_null() {
                (f.rbd_close)(self.image);
            }
            if !self.pool.is_null() {
                (f.rados_ioctx_destroy)(self.pool);
            }
            if !self.cluster.is_null() {
                (f.rados_shutdown)(self.cluster);
            }
        }
    }
}

/// A request that librbd has.
struct Begun {
    functions: &'static Functions,
    fate: Arc<Fate>,
    /// How many bytes a read has if it is whole.
    expected: u64,
    end: ImageEnd,
}

impl Begun {
    fn end(self, result: isize) {
        let Self { fate, expected, end, .. } = self;
        end.complete(match result {
            ..0 => {
                let errno = i32::try_from(-result).unwrap_or(libc::EIO);
                fate.has_failed(errno);
                Err(errno)
            }
            got if (got as u64) < expected => Err(libc::EIO),
            _ => Ok(()),
        });
    }
}

/// What is called while an image is resized.
unsafe extern "C" fn progresses(_: u64, _: u64, _: *mut c_void) -> c_int {
    0
}

/// The callback of each request, on a thread of librbd's.
unsafe extern "C" fn ended(completion: Opaque, arg: *mut c_void) {
    // SAFETY: `begin` gave the box away to this, and it comes once.
    let begun = unsafe { Box::from_raw(arg.cast::<Begun>()) };
    let f = begun.functions;
    // SAFETY: the completion of this request, which is let go of here.
    let result = unsafe {
        let result = (f.rbd_aio_get_return_value)(completion);
        (f.rbd_aio_release)(completion);
        result
    };
    // Nothing may unwind into librbd.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| begun.end(result)));
}

/// The text in a buffer that a C function has filled in.
fn text(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> =
        buffer.iter().map(|&c| c.cast_unsigned()).take_while(|&b| b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
