//! Images to test with.

#![allow(dead_code, reason = "each test program uses some of it")]

use domain_api::Params;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A directory on a disk, where direct I/O works: where this was built.
pub fn real_dir() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

/// An image of `len` zero bytes that vanishes with the value.
pub fn image_in(dir: &Path, len: u64) -> NamedTempFile {
    let image = NamedTempFile::new_in(dir).unwrap();
    image.as_file().set_len(len).unwrap();
    image
}

/// Parameters with this path, and more `KEY=VALUE` pairs.
pub fn params(path: &Path, more: &[&str]) -> Params {
    let mut params = Params::from_pairs(more).unwrap();
    params.set("path", path.to_str().unwrap());
    params
}

/// Mounts a new tmpfs on `dir`, for this thread only. Returns whether that is allowed here.
pub fn mount_tmpfs(dir: &Path, options: &std::ffi::CStr) -> bool {
    let dir = CString::new(dir.as_os_str().as_bytes()).unwrap();
    // SAFETY: the strings are valid for the calls. Only this thread gets a namespace of its own, and it is made private before the mount.
    unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
            && libc::mount(c"tmpfs".as_ptr(), dir.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast())
                == 0
    }
}
