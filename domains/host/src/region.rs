//! Storage regions: memory that outlives every instance.
//!
//! A region is a sealed-size memfd, mapped once by the host. It is a memfd so that it could be
//! handed to another process, and so that holes can be punched into it; it is mapped once so that
//! its address is the same for every instance that ever uses it.

use memmap2::{MmapOptions, MmapRaw};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A mapped memfd.
#[derive(Debug)]
pub struct HostRegion {
    map: MmapRaw,
    file: File,
}

impl HostRegion {
    /// Makes a region of `len` zero bytes, named `name` in `/proc`.
    ///
    /// # Errors
    /// What the kernel says, e.g. too little address space.
    pub fn create(name: &str, len: u64) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len_usize = usize::try_from(len).ok().filter(|&len| len > 0).ok_or_else(invalid)?;
        let name = CString::new(format!("hotswap-region-{name}")).map_err(|_| invalid())?;
        // SAFETY: `name` is a C string.
        let fd = unsafe {
            libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave it to us.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(len)?;
        // A region that shrinks would turn accesses into SIGBUS.
        // SAFETY: no pointers; the descriptor is open.
        if unsafe {
            libc::fcntl(
                file.as_raw_fd(),
                libc::F_ADD_SEALS,
                libc::F_SEAL_SHRINK | libc::F_SEAL_GROW,
            )
        } < 0
        {
            return Err(io::Error::last_os_error());
        }
        let map = MmapOptions::new().len(len_usize).map_raw(&file)?;
        Ok(Self { map, file })
    }

    /// The region whose memfd `file` is, as [`fd`](Self::fd) has told another process of it.
    ///
    /// # Errors
    /// It is no memfd of a sealed size, or has not `len` bytes; or what the kernel says.
    pub fn from_memfd(file: File, len: u64) -> io::Result<Self> {
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        // SAFETY: no pointers; the descriptor is open.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        let sized = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        if seals < 0 || seals & sized != sized {
            return Err(invalid("it is no memfd whose size is sealed"));
        }
        if len == 0 || file.metadata()?.len() != len {
            return Err(invalid("it has another length"));
        }
        let len = usize::try_from(len).map_err(|_| invalid("it is too long"))?;
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        Ok(Self { map, file })
    }

    /// First byte.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether it has no bytes; a region always has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// The memfd.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The memfd, to be sent to another process.
    #[must_use]
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
