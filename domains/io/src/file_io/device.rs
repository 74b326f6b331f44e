//! What block devices, and memory files, say of themselves beside what `open` and `stat` say.
//!
//! The numbers of the ioctls are those of linux/fs.h.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const BLKROGET: libc::c_ulong = 0x125e;
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

/// An ioctl that fills in a number.
///
/// # Safety
/// `request` is an ioctl that writes one `T`.
unsafe fn number<T: Default>(file: &File, request: libc::c_ulong) -> io::Result<T> {
    let mut number = T::default();
    // SAFETY: the caller's contract; the pointer is valid for one `T`.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut number) } == 0 {
        Ok(number)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Size in bytes of a block device.
///
/// # Errors
/// What the ioctl says, e.g. for a file that is no block device.
pub fn block_device_size(file: &File) -> io::Result<u64> {
    // SAFETY: linux/fs.h: a 64-bit number of bytes.
    unsafe { number(file, BLKGETSIZE64) }
}

/// Size in bytes of a block device's logical sectors.
///
/// # Errors
/// As for [`block_device_size`].
pub fn device_sector_size(file: &File) -> io::Result<u32> {
    // SAFETY: linux/fs.h: an int.
    unsafe { number::<libc::c_int>(file, BLKSSZGET) }.map(libc::c_int::cast_unsigned)
}

/// Whether a block device takes no writes. It can be opened for writing all the same.
///
/// # Errors
/// As for [`block_device_size`].
pub fn is_read_only_device(file: &File) -> io::Result<bool> {
    // SAFETY: linux/fs.h: an int.
    unsafe { number::<libc::c_int>(file, BLKROGET) }.map(|flag| flag != 0)
}

/// Whether `file` is a memory file that is sealed against writing. It can be opened for writing all
/// the same.
#[must_use]
pub fn is_write_sealed(file: &File) -> bool {
    // SAFETY: no pointers. Files that cannot be sealed fail with EINVAL.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals > 0 && seals & (libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) != 0
}

/// Tells a block device that `offset..offset + len` is not needed. Multiples of its sectors only.
///
/// # Errors
/// What the ioctl says; `EOPNOTSUPP` where the device has no use for it.
pub fn discard_device(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the ioctl reads two numbers from the pointer.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether a block device, open for writing, has a use for [`discard_device`].
#[must_use]
pub fn can_discard_device(file: &File) -> bool {
    // A range that no device can take, because it begins inside a sector: the kernel asks for the
    // ability first. Nothing is discarded in either case.
    let refused = discard_device(file, 1, 512);
    !matches!(refused, Err(error) if error.kind() == io::ErrorKind::Unsupported)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    #[test]
    fn plain_files_are_no_devices() {
        let file = File::open("/proc/self/exe").unwrap();
        assert!(block_device_size(&file).is_err());
        assert!(device_sector_size(&file).is_err());
        assert!(is_read_only_device(&file).is_err());
        assert!(!is_write_sealed(&file));
    }

    #[test]
    fn seals_are_seen() {
        // SAFETY: a C string.
        let fd = unsafe { libc::memfd_create(c"sealed".as_ptr(), libc::MFD_ALLOW_SEALING) };
        // SAFETY: a fresh descriptor.
        let file = unsafe { File::from_raw_fd(fd) };
        assert!(!is_write_sealed(&file));
        // SAFETY: no pointers.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }, 0);
        assert!(is_write_sealed(&file));
    }
}
