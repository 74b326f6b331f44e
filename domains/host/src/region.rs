//! Storage regions: memory that outlives every instance.
//!
//! A region is a memfd that never shrinks, mapped once by the host. It is a memfd so that it could
//! be handed to another process, and so that holes can be punched into it; it is mapped once so
//! that its address is the same for every instance that ever uses it.
//!
//! **Growth.** The mapping is longer than the memfd: what is behind the memfd's end is address
//! space in reserve, which costs nothing, and which no request comes to. To grow is to make the
//! memfd longer, so nothing is mapped anew, nothing moves, and what runs in the region does not
//! notice. How far a region can grow is settled when it is made: to [`RESERVE`], or twice its
//! length if that is more, or to what the system grants (`RLIMIT_AS`, small address spaces).

use memmap2::{Advice, MmapOptions, MmapRaw};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Address space for a region: one hundred and twenty-eighth of what a process has on x86-64.
const RESERVE: usize = 1 << 40;

/// What mappings are multiples of, on all that this is built for.
const LARGEST_PAGE: usize = 64 << 10;

/// A mapped memfd.
#[derive(Debug)]
pub struct HostRegion {
    /// As long as the region can become.
    map: MmapRaw,
    file: File,
    len: AtomicUsize,
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
        let file = memfd(&name)?;
        file.set_len(len)?;
        // A region that shrinks would turn accesses into SIGBUS.
        // SAFETY: no pointers; the descriptor is open.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Self::mapped(file, len_usize)
    }

    fn mapped(file: File, len: usize) -> io::Result<Self> {
        let map = map_with_reserve(&file, len)?;
        let region = Self { map, file, len: AtomicUsize::new(len) };
        // A core dump would look at each page of the reserve.
        region.advise(Advice::DontDump, len..region.most());
        Ok(region)
    }

    /// Makes the region `len` bytes long, where it is mapped; what is new is zero. One that is as
    /// long, or longer, stays as it is.
    ///
    /// # Errors
    /// It has too little address space, or what the kernel says.
    pub fn grow(&self, len: u64) -> io::Result<()> {
        let wanted = usize::try_from(len).ok().filter(|&len| len <= self.most());
        let wanted = wanted.ok_or_else(|| {
            io::Error::other(format!(
                "its address space ends after {} bytes, which was settled when it was made",
                self.most()
            ))
        })?;
        let there = self.len();
        if wanted <= there {
            return Ok(());
        }
        // It may be longer already, see `from_memfd`.
        if self.file.metadata()?.len() < len {
            self.file.set_len(len)?;
        }
        self.advise(Advice::DoDump, there..wanted);
        // Release pairs with the Acquire in `len`: what is told of the bytes can use them.
        self.len.fetch_max(wanted, Ordering::Release);
        Ok(())
    }

    /// As far as whole pages go. Only core dumps feel whether it works.
    fn advise(&self, advice: Advice, range: std::ops::Range<usize>) {
        // What a dump has of a page that is shared with the reserve is zeros.
        let start = match advice {
            Advice::DontDump => range.start.next_multiple_of(LARGEST_PAGE),
            _ => range.start / LARGEST_PAGE * LARGEST_PAGE,
        };
        if start < range.end {
            let _ = self.map.advise_range(advice, start, range.end - start);
        }
    }

    /// The region whose memfd `file` is, as [`fd`](Self::fd) has told another process of it.
    ///
    /// # Errors
    /// It is a memfd that can be cut, or has fewer than `len` bytes; or what the kernel says. It
    /// may have more: the other process may have ended before it could say how far the region has
    /// grown.
    pub fn from_memfd(file: File, len: u64) -> io::Result<Self> {
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        // SAFETY: no pointers; the descriptor is open.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(invalid("it is no memfd that is sealed against being cut"));
        }
        if len == 0 || file.metadata()?.len() < len {
            return Err(invalid("it is shorter"));
        }
        let len = usize::try_from(len).map_err(|_| invalid("it is too long"))?;
        Self::mapped(file, len)
    }

    /// First byte.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Whether it has no bytes; a region always has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How long it can become.
    #[must_use]
    pub fn most(&self) -> usize {
        self.map.len()
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

/// Maps the file, and as much behind its end as can be had of what a region is to grow to.
fn map_with_reserve(file: &File, len: usize) -> io::Result<MmapRaw> {
    let mut reserve = RESERVE.max(len.saturating_mul(2));
    loop {
        let whole = reserve.max(len);
        match MmapOptions::new().len(whole).map_raw(file) {
            Err(_) if whole > len => reserve /= 2,
            mapped => return mapped,
        }
    }
}

/// A memfd that can be sealed, and that no program can be executed from: where `vm.memfd_noexec` is
/// 2 there are no others, and Linux 6.3 to 6.5 refuses what does not say so.
fn memfd(name: &CStr) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: `name` is a C string.
    let create = |flags| unsafe { libc::memfd_create(name.as_ptr(), flags) };
    let mut fd = create(flags | libc::MFD_NOEXEC_SEAL);
    if fd < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        // Linux before 6.3 does not know the flag.
        fd = create(flags);
    }
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave it to us.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "a memfd")]
    fn a_region_grows_where_it_is_and_never_shrinks() {
        let region = HostRegion::create("test", 5000).unwrap();
        let base = region.base();
        // SAFETY: inside the region, which is alive.
        unsafe { base.add(4999).write(7) };
        for len in [5000, 4096, 5001, 1 << 20, 64 << 20] {
            region.grow(len).unwrap();
        }
        assert_eq!((region.len(), region.base()), (64 << 20, base));
        // SAFETY: as above.
        let at = |offset: usize| unsafe { base.add(offset).read() };
        assert_eq!((at(4999), at(5000), at((64 << 20) - 1)), (7, 0, 0));
        // SAFETY: as above.
        unsafe { base.add((64 << 20) - 1).write(9) };
        assert_eq!(at((64 << 20) - 1), 9);
        assert!(region.file.set_len(5000).is_err(), "its memfd can be cut");
        let error = region.grow(region.most() as u64 + 1).unwrap_err().to_string();
        assert!(error.contains(&region.most().to_string()), "{error}");
        assert_eq!(region.len(), 64 << 20);
        // As another process may find it that was not told of all of it.
        let of = |len| HostRegion::from_memfd(region.file.try_clone().unwrap(), len);
        let other = of(5000).unwrap();
        assert_eq!((other.len(), of((64 << 20) + 1).is_err()), (5000, true));
        other.grow(32 << 20).unwrap();
        other.grow(128 << 20).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { other.base().add((64 << 20) - 1).read() }, 9);
        assert_eq!(other.len(), 128 << 20);
    }
}
