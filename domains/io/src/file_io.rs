//! Reading and writing files straight from and to guest memory.
//!
//! The kernel gets the request's segments as iovecs (`preadv`, `pwritev`), so that data is copied
//! once and no Rust slice over guest memory exists. Short transfers are finished here; what a
//! caller sees is all or an error.

mod device;
mod image_lock;
mod open;

pub use device::{
    block_device_size, can_discard_device, device_sector_size, discard_device, is_read_only_device,
    is_write_sealed,
};
pub use image_lock::{ImageLock, has_locked, lock_image, unlock_image};
pub use open::{Alignment, OpenMode, direct_alignment, open, open_mode, reopen, stated_alignment};

use domain_abi::RawSegment;
use domain_api::Buffer;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

/// The kernel's limit of iovecs in one call (`IOV_MAX` in limits.h).
const IOV_MAX: usize = 1024;

/// Reads from `file` at `offset` until `buffer` is full.
///
/// # Errors
/// What `preadv` says; [`io::ErrorKind::UnexpectedEof`] where the file ends too early.
pub fn read_at(file: &File, offset: u64, buffer: &Buffer<'_>) -> io::Result<()> {
    transfer(file, offset, buffer, io::ErrorKind::UnexpectedEof, |fd, iov, count, at| {
        // SAFETY: `iov` points to `count` iovecs (`RawSegment` has the layout of `struct iovec`)
        // over memory that is mapped writable while `buffer` lives; the kernel copies into it and
        // keeps nothing.
        unsafe { libc::preadv(fd, iov, count, at) }
    })
}

/// Writes all of `buffer` to `file` at `offset`.
///
/// # Errors
/// What `pwritev` says; [`io::ErrorKind::WriteZero`] where it writes nothing.
pub fn write_at(file: &File, offset: u64, buffer: &Buffer<'_>) -> io::Result<()> {
    transfer(file, offset, buffer, io::ErrorKind::WriteZero, |fd, iov, count, at| {
        // SAFETY: as in `read_at`; the kernel only reads the segments.
        unsafe { libc::pwritev(fd, iov, count, at) }
    })
}

/// Writes all of `buffer` to `file` at `offset`, and returns when it is durable (`RWF_DSYNC`).
///
/// # Errors
/// As for [`write_at`].
pub fn write_at_durably(file: &File, offset: u64, buffer: &Buffer<'_>) -> io::Result<()> {
    transfer(file, offset, buffer, io::ErrorKind::WriteZero, |fd, iov, count, at| {
        // SAFETY: as in `write_at`.
        unsafe { libc::pwritev2(fd, iov, count, at, libc::RWF_DSYNC) }
    })
}

/// Reads from `file` at `offset` what is there without waiting for a device (`RWF_NOWAIT`): from
/// the page cache. Returns how many bytes from the front of `buffer` that was.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] where nothing is; [`io::ErrorKind::Unsupported`] where the file
/// system cannot tell; [`io::ErrorKind::UnexpectedEof`] where the file ends.
pub fn read_at_once(file: &File, offset: u64, buffer: &Buffer<'_>) -> io::Result<u64> {
    attempt(file, offset, buffer, io::ErrorKind::UnexpectedEof, |fd, iov, count, at| {
        // SAFETY: as in `read_at`.
        unsafe { libc::preadv2(fd, iov, count, at, libc::RWF_NOWAIT) }
    })
}

/// Writes to `file` at `offset` what can be written without waiting. Returns how many bytes from
/// the front of `buffer` that was.
///
/// # Errors
/// As for [`read_at_once`]; [`io::ErrorKind::WriteZero`] where it writes nothing.
pub fn write_at_once(file: &File, offset: u64, buffer: &Buffer<'_>) -> io::Result<u64> {
    attempt(file, offset, buffer, io::ErrorKind::WriteZero, |fd, iov, count, at| {
        // SAFETY: as in `write_at`.
        unsafe { libc::pwritev2(fd, iov, count, at, libc::RWF_NOWAIT) }
    })
}

/// One call for as much as it moves.
fn attempt(
    file: &File,
    offset: u64,
    buffer: &Buffer<'_>,
    nothing: io::ErrorKind,
    call: impl Fn(i32, *const libc::iovec, i32, i64) -> isize,
) -> io::Result<u64> {
    let at = i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let segments = buffer.segments();
    let count = segments.len().min(IOV_MAX) as i32;
    let moved = call(file.as_raw_fd(), segments.as_ptr().cast(), count, at);
    match u64::try_from(moved) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(0) if !buffer.is_empty() => Err(nothing.into()),
        Ok(moved) => Ok(moved),
    }
}

/// Whether `file` is in memory (tmpfs, ramfs, hugetlbfs), so that reading and writing it is
/// copying.
///
/// # Errors
/// What `fstatfs` says.
pub fn is_in_memory(file: &File) -> io::Result<bool> {
    const RAMFS_MAGIC: i64 = 0x8584_58f6; // linux/magic.h
    Ok([libc::TMPFS_MAGIC, libc::HUGETLBFS_MAGIC, RAMFS_MAGIC].contains(&file_system(file)?))
}

/// Whether direct I/O on the file system of `file` goes past the page cache for certain, where it
/// is aligned as the file system says. Some take what they do not like through it, without a word.
///
/// # Errors
/// What `fstatfs` says.
pub fn is_truly_direct(file: &File) -> io::Result<bool> {
    Ok([libc::EXT4_SUPER_MAGIC, libc::XFS_SUPER_MAGIC].contains(&file_system(file)?))
}

/// Whether another host may have the same file open, and the page cache of this one not know what
/// it writes: on a block device, or on a file system that comes over a network.
///
/// # Errors
/// What `fstat` and `fstatfs` say.
pub fn is_of_many_hosts(file: &File) -> io::Result<bool> {
    // linux/magic.h, and the sources of the file systems that it leaves out.
    const REMOTE: [i64; 12] = [
        0x6969,      // NFS
        0x517b,      // SMB
        0xff53_4d42, // CIFS
        0xfe53_4d42, // SMB2
        0x00c3_6400, // Ceph
        0x6573_5546, // FUSE, which GlusterFS and others are
        0x0102_1997, // 9P
        0x0116_1970, // GFS2
        0x7461_636f, // OCFS2
        0x0bd0_0bd0, // Lustre
        0x4750_4653, // GPFS
        0x6b41_4653, // kAFS
    ];
    let is_device = file.metadata()?.file_type().is_block_device();
    Ok(is_device || REMOTE.contains(&file_system(file)?))
}

/// Has the kernel forget what it has cached of `file` and need not write back, so that the next
/// look is at the storage.
///
/// # Errors
/// What `fdatasync` and `posix_fadvise` say.
pub fn forget_cached(file: &File) -> io::Result<()> {
    // What has to be written back stays.
    file.sync_data()?;
    // SAFETY: no pointers; the descriptor is open because `file` is borrowed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Which kind of file system `file` is on, as linux/magic.h has it.
fn file_system(file: &File) -> io::Result<i64> {
    let mut about = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: room for the structure, and the descriptor is open because `file` is borrowed.
    if unsafe { libc::fstatfs(file.as_raw_fd(), about.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled by the call, which succeeded.
    Ok(unsafe { about.assume_init() }.f_type)
}

fn transfer(
    file: &File,
    offset: u64,
    buffer: &Buffer<'_>,
    nothing: io::ErrorKind,
    call: impl Fn(i32, *const libc::iovec, i32, i64) -> isize,
) -> io::Result<()> {
    let fd = file.as_raw_fd();
    let mut at = i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut segments = buffer.segments();
    // What is left of a segment that was transferred in part.
    let mut rest: Option<RawSegment> = None;
    loop {
        while rest.is_none() && segments.first().is_some_and(|s| s.is_empty()) {
            segments = &segments[1..];
        }
        let (iov, count) = match &rest {
            Some(segment) => (std::ptr::from_ref(segment), 1),
            None if segments.is_empty() => return Ok(()),
            None => (segments.as_ptr(), segments.len().min(IOV_MAX)),
        };
        let moved = call(fd, iov.cast(), count as i32, at);
        if moved < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if moved == 0 {
            return Err(nothing.into());
        }
        at += moved as i64;
        let mut moved = moved as usize;
        if let Some(segment) = rest.take() {
            if moved < segment.len() {
                rest = Some(segment.without_first(moved));
            }
            continue;
        }
        while let Some(segment) = segments.first() {
            if moved < segment.len() {
                if moved > 0 {
                    rest = Some(segment.without_first(moved));
                    segments = &segments[1..];
                }
                break;
            }
            moved -= segment.len();
            segments = &segments[1..];
        }
    }
}

/// Gives the space of `offset..offset + len` back; it reads as zeros afterwards
/// (`FALLOC_FL_PUNCH_HOLE`).
///
/// # Errors
/// What `fallocate` says; `EOPNOTSUPP` where the file system or device cannot.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    allocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// Whether the file system of `file`, open for writing, can punch holes. Tried behind its end,
/// where there is nothing to lose.
#[must_use]
pub fn can_punch_hole(file: &File, size: u64) -> bool {
    let behind = size.next_multiple_of(1 << 20);
    !matches!(punch_hole(file, behind, 1 << 20), Err(error) if error.kind() == io::ErrorKind::Unsupported)
}

/// Makes `offset..offset + len` read as zeros, keeping the space (`FALLOC_FL_ZERO_RANGE`).
///
/// # Errors
/// What `fallocate` says; `EOPNOTSUPP` where the file system or device cannot.
pub fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    allocate(file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

fn allocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let (offset, len) =
        (i64::try_from(offset).map_err(invalid)?, i64::try_from(len).map_err(invalid)?);
    loop {
        // SAFETY: no pointers; the descriptor is open because `file` is borrowed.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_buffer<R>(parts: &mut [Vec<u8>], f: impl FnOnce(&Buffer<'_>) -> R) -> R {
        let segments: Vec<_> =
            // SAFETY: the vectors outlive the buffer and are not touched meanwhile.
            parts.iter_mut().map(|p| unsafe { RawSegment::new(p.as_mut_ptr(), p.len()) }).collect();
        // SAFETY: as above.
        f(&unsafe { Buffer::from_segments(&segments) })
    }

    #[test]
    fn what_is_written_is_read_across_many_segments() {
        let path = std::env::temp_dir().join(format!("hotswap-file-io-{}", std::process::id()));
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        let mut out: Vec<Vec<u8>> = (0..1500).map(|i| vec![i as u8; i % 7]).collect();
        let len: usize = out.iter().map(Vec::len).sum();
        with_buffer(&mut out, |b| write_at(&file, 4096, b)).unwrap();
        let mut back = vec![vec![0u8; 1000], vec![0u8; len - 1000]];
        with_buffer(&mut back, |b| read_at(&file, 4096, b)).unwrap();
        assert_eq!(back.concat(), out.concat());
        let mut beyond = vec![vec![0u8; 512], vec![0u8; 512]];
        let error =
            with_buffer(&mut beyond, |b| read_at(&file, 4096 + len as u64 - 700, b)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        punch_hole(&file, 4096, len as u64).unwrap();
        with_buffer(&mut back, |b| read_at(&file, 4096, b)).unwrap();
        assert!(back.concat().iter().all(|&b| b == 0));
        std::fs::remove_file(path).unwrap();
    }
}
