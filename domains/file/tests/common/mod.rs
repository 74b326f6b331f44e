//! Images to test with.

#![allow(dead_code, reason = "each test program uses some of it")]

use domain_abi::{self as abi, RawRequest, RawSegment};
use domain_api::Params;
use std::ffi::CString;
use std::os::fd::AsRawFd;
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

/// Parameters with this path, and more `KEY=VALUE` pairs. Without a lock, if nothing else is said:
/// many a test has the same image twice.
pub fn params(path: &Path, more: &[&str]) -> Params {
    let mut params = Params::from_pairs(more).unwrap();
    if params.get("locking").is_none() {
        params.set("locking", "false");
    }
    params.set("path", path.to_str().unwrap());
    params
}

/// Mounts a new tmpfs on `dir`, for this thread only. Returns whether that is allowed here.
pub fn mount_tmpfs(dir: &Path, options: &std::ffi::CStr) -> bool {
    let dir = CString::new(dir.as_os_str().as_bytes()).unwrap();
    // SAFETY: the strings are valid for the calls. Only this thread gets a namespace of its own,
    // and it is made private before the mount.
    unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
            && libc::mount(
                c"tmpfs".as_ptr(),
                dir.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                options.as_ptr().cast(),
            ) == 0
    }
}

/// Reads made by hand, without the suite's bookkeeping.
pub struct Raw {
    memory: Vec<u8>,
    _segments: Vec<RawSegment>,
    requests: Vec<RawRequest>,
}

impl Raw {
    /// `count` requests of `len` bytes all over a disk of `size` bytes, tagged from 0. Their memory
    /// is aligned for direct I/O.
    pub fn reads(count: usize, len: usize, size: u64) -> Self {
        Self::new(abi::op::READ, count, len, size)
    }

    /// Requests of any kind.
    pub fn new(op: u32, count: usize, len: usize, size: u64) -> Self {
        let mut memory = vec![1u8; count * len + 4096];
        let start = memory.as_ptr().align_offset(4096);
        let base = memory.as_mut_ptr();
        let segments: Vec<RawSegment> = (0..count)
            // SAFETY: inside the memory, which the tests keep until the requests have ended, and
            // access through `mark` and `is_marked` only then.
            .map(|i| unsafe { RawSegment::new(base.add(start + i * len), len) })
            .collect();
        let request = |(i, segment): (usize, &RawSegment)| {
            let offset = (i as u64).wrapping_mul(7919) % (size / len as u64) * len as u64;
            // SAFETY: the list is not touched again, and kept as long as the memory.
            let mut raw = unsafe {
                RawRequest::new(op, 0, offset, len as u64, std::slice::from_ref(segment))
            };
            raw.tag = i as u64;
            raw
        };
        let requests = segments.iter().enumerate().map(request).collect();
        Self { memory, _segments: segments, requests }
    }

    pub fn requests(&mut self) -> &[RawRequest] {
        &self.requests
    }

    /// Puts a mark everywhere.
    pub fn mark(&mut self) {
        self.memory.fill(0xa5);
    }

    /// Whether it is still there.
    pub fn is_marked(&self) -> bool {
        self.memory.iter().all(|&byte| byte == 0xa5)
    }
}

/// How many pages of `file` are in the page cache and not on the disk (`cachestat`, Linux 6.5);
/// `None` if the kernel does not say.
pub fn dirty_pages(file: &std::fs::File) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = [0u64, 0];
    // nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted
    let mut counts = [0u64; 5];
    // SAFETY: two numbers to read, five to write, and an open descriptor.
    let code = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0)
    };
    (code == 0).then_some(counts[1] + counts[2])
}

/// Runs `f` on a thread where `io_uring_setup` fails with EPERM, as under many a seccomp profile.
/// Returns whether such a thread could be had.
pub fn without_io_uring(f: impl FnOnce() + Send) -> bool {
    let forbidden = || {
        let code = |code: u32, k: u32, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
        let program = [
            code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            code(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                libc::SYS_io_uring_setup as u32,
                0,
                1,
            ),
            code(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0, 0),
            code(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
        ];
        let filter =
            libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
        // SAFETY: the filter is valid for the call, and holds for this thread only.
        unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
                    == 0
        }
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let able = forbidden();
            if able {
                f();
            }
            able
        });
        thread.join().unwrap()
    })
}
