//! Storage as a domain sees it: regions, bytes and file descriptors by key, owned by the host.
//!
//! Whatever must survive an upgrade lives here, and it must be valid at every instant, not only
//! after `quiesce`: the instance may die in the middle of a request, and its successor takes up
//! what is there.

use crate::buffer::Buffer;
use crate::host::{Host, with_message};
use domain_abi::{DomainError, RawRegion, raw_bytes};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// The storage of the device.
///
/// Looking works from [`BlockDomain::prepare`](crate::BlockDomain::prepare) on; opening regions and
/// changing anything takes ownership, which begins with [`activate`](crate::BlockDomain::activate).
#[derive(Debug, Clone, Copy)]
pub struct Storage {
    host: Host,
}

impl Host {
    /// The storage: what outlives instances.
    #[must_use]
    pub const fn storage(self) -> Storage {
        Storage { host: self }
    }
}

impl Storage {
    /// Number of the layout that the storage has now; 0 for an empty storage.
    #[must_use]
    pub fn schema(&self) -> u32 {
        let vtable = self.host.vtable();
        // SAFETY: only `ctx` is passed.
        unsafe { (vtable.schema)(vtable.ctx) }
    }

    /// Sets the number of the layout.
    ///
    /// # Errors
    /// The storage is not ours.
    pub fn set_schema(&self, schema: u32) -> Result<(), DomainError> {
        let vtable = self.host.vtable();
        // SAFETY: `message` is valid for the call.
        with_message(|message| unsafe { (vtable.set_schema)(vtable.ctx, schema, message) })
    }

    /// Length of the region at `key` in bytes, 0 if there is none.
    #[must_use]
    pub fn region_len(&self, key: &str) -> u64 {
        let vtable = self.host.vtable();
        // SAFETY: `key` is borrowed for the call.
        unsafe { (vtable.region_len)(vtable.ctx, raw_bytes(key.as_bytes())) }
    }

    /// Opens the region at `key`, or makes it, with `len` zero bytes.
    ///
    /// # Errors
    /// The storage is not ours, the region has another length, or there is no memory.
    pub fn region(&self, key: &str, len: u64) -> Result<Region, DomainError> {
        let vtable = self.host.vtable();
        let mut raw = RawRegion { base: std::ptr::null_mut(), len: 0, fd: -1 };
        // SAFETY: all pointers are valid for the call.
        with_message(|message| unsafe {
            (vtable.region)(vtable.ctx, raw_bytes(key.as_bytes()), len, &raw mut raw, message)
        })?;
        Ok(Region { base: raw.base, len: AtomicU64::new(raw.len as u64), fd: raw.fd })
    }

    /// Makes the region at `key` `len` bytes long, with zeros behind what is there, and has
    /// `region`, which was opened before, know it. It stays where it is: requests may go on in it
    /// meanwhile. Of a region that is as long already, maybe grown by another instance, this one
    /// only learns so.
    ///
    /// # Errors
    /// The storage is not ours, `region` is another one, it is longer than that, or it cannot be as
    /// long: how far a region can grow is settled when it is made. Or the host is too old to do
    /// so.
    pub fn grow_region(&self, key: &str, region: &Region, len: u64) -> Result<(), DomainError> {
        if region.len() == len {
            return Ok(());
        }
        let vtable = self.host.vtable();
        let mut raw = RawRegion { base: std::ptr::null_mut(), len: 0, fd: -1 };
        // SAFETY: all pointers are valid for the call.
        with_message(|message| unsafe {
            (vtable.region_grow)(vtable.ctx, raw_bytes(key.as_bytes()), len, &raw mut raw, message)
        })?;
        if raw.base != region.base {
            return Err(DomainError::new(format!("region `{key}` is not the one that was opened")));
        }
        // Release pairs with the Acquire in `Region::len`. A region never shrinks.
        region.len.fetch_max(raw.len as u64, Ordering::Release);
        Ok(())
    }

    /// A copy of the bytes at `key`.
    #[must_use]
    pub fn bytes(&self, key: &str) -> Option<Vec<u8>> {
        let vtable = self.host.vtable();
        // SAFETY: `key` is borrowed, and `out` has room for `capacity` bytes.
        copied(|out, capacity| unsafe {
            (vtable.bytes_get)(vtable.ctx, raw_bytes(key.as_bytes()), out, capacity)
        })
    }

    /// Marks the storage: something that was written to it may be lost for good, whichever instance
    /// serves it. `status` says so from now on, and the daemon's end is no success. The first
    /// sentence stays.
    ///
    /// Any instance may call this at any time: a write-back that fails is reported once, and maybe
    /// to one that has been replaced. On a host that is too old the mark is not kept.
    pub fn mark_failed(&self, sentence: &str) {
        let vtable = self.host.vtable();
        // SAFETY: `sentence` is borrowed for the call.
        unsafe { (vtable.storage_failed)(vtable.ctx, raw_bytes(sentence.as_bytes())) };
    }

    /// What the storage was marked with ([`mark_failed`](Self::mark_failed)), by any instance.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let vtable = self.host.vtable();
        // SAFETY: `out` has room for `capacity` bytes.
        let sentence =
            copied(|out, capacity| unsafe { (vtable.storage_failure)(vtable.ctx, out, capacity) })?;
        Some(String::from_utf8_lossy(&sentence).into_owned())
    }

    /// Sets the bytes at `key`.
    ///
    /// # Errors
    /// The storage is not ours.
    pub fn set_bytes(&self, key: &str, value: &[u8]) -> Result<(), DomainError> {
        let vtable = self.host.vtable();
        // SAFETY: `key` and `value` are borrowed for the call.
        with_message(|message| unsafe {
            (vtable.bytes_put)(vtable.ctx, raw_bytes(key.as_bytes()), raw_bytes(value), message)
        })
    }

    /// A file of our own on a dup of the descriptor at `key`, if there is one.
    ///
    /// # Errors
    /// There is one, and no descriptor is left for a dup. A host that is too old says that there is
    /// none.
    pub fn file(&self, key: &str) -> io::Result<Option<File>> {
        let vtable = self.host.vtable();
        // SAFETY: `key` is borrowed for the call.
        let fd = unsafe { (vtable.fd_dup)(vtable.ctx, raw_bytes(key.as_bytes())) };
        match fd {
            // SAFETY: the host gives away a fresh descriptor.
            0.. => Ok(Some(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))),
            -1 => Ok(None),
            _ => Err(io::Error::from_raw_os_error(fd.saturating_neg())),
        }
    }

    /// Keeps a dup of `file`'s descriptor at `key`.
    ///
    /// # Errors
    /// The storage is not ours, or there are no descriptors left.
    pub fn set_file(&self, key: &str, file: &File) -> Result<(), DomainError> {
        let vtable = self.host.vtable();
        // SAFETY: `key` is borrowed, and the descriptor is open, for the call.
        with_message(|message| unsafe {
            (vtable.fd_put)(vtable.ctx, raw_bytes(key.as_bytes()), file.as_raw_fd(), message)
        })
    }
}

/// Bytes of the host's, of which it says at each call how many there are; `None` if there are none.
fn copied(mut get: impl FnMut(*mut u8, usize) -> u64) -> Option<Vec<u8>> {
    let mut value = Vec::new();
    loop {
        let len = get(value.as_mut_ptr(), value.len());
        let len = usize::try_from(len).ok().filter(|&len| len < isize::MAX as usize)?;
        if len <= value.len() {
            value.truncate(len);
            return Some(value);
        }
        value.resize(len, 0);
    }
}

/// Host-owned memory, shared by all workers and, over time, by all instances.
///
/// Like guest memory it is only ever copied, never borrowed: two requests that overlap may race, as
/// on any disk. A range outside the region is a panic, because the host has checked each request
/// against the capacity that the domain announced.
#[derive(Debug)]
pub struct Region {
    base: *mut u8,
    /// It only grows.
    len: AtomicU64,
    fd: RawFd,
}

impl Clone for Region {
    /// Both are the same memory, but each knows for itself how far it goes
    /// ([`Storage::grow_region`]).
    fn clone(&self) -> Self {
        Self { base: self.base, len: AtomicU64::new(self.len()), fd: self.fd }
    }
}

// SAFETY: the mapping stays until this module's code cannot run any more (abi::RawRegion), and it
// is accessed by raw copies only.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Length in bytes.
    #[must_use]
    #[inline]
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[inline]
    fn at(&self, offset: u64, len: usize) -> *mut u8 {
        let end = offset.checked_add(len as u64);
        assert!(
            end.is_some_and(|end| end <= self.len()),
            "range {offset}+{len} is outside a region of {} bytes",
            self.len()
        );
        self.base.wrapping_add(offset as usize)
    }

    /// Copies from the region at `offset` into the whole of `buffer`.
    #[inline]
    pub fn read(&self, offset: u64, buffer: &Buffer<'_>) {
        let mut at = offset;
        for segment in buffer.segments() {
            let from = self.at(at, segment.len());
            // SAFETY: source checked by `at`, destination is a mapped segment; `copy`, because a
            // hostile frontend could have us map one file as both.
            unsafe { std::ptr::copy(from.cast_const(), segment.base(), segment.len()) };
            at += segment.len() as u64;
        }
    }

    /// Copies the whole of `buffer` into the region at `offset`.
    #[inline]
    pub fn write(&self, offset: u64, buffer: &Buffer<'_>) {
        let mut at = offset;
        for segment in buffer.segments() {
            let to = self.at(at, segment.len());
            // SAFETY: as in `read`, in the other direction.
            unsafe { std::ptr::copy(segment.base().cast_const(), to, segment.len()) };
            at += segment.len() as u64;
        }
    }

    /// Sets `len` bytes at `offset` to zero by writing them.
    pub fn zero(&self, offset: u64, len: u64) {
        let to = self.at(
            offset,
            usize::try_from(len).expect("checked against the region's length by the host"),
        );
        // SAFETY: the range is checked by `at`.
        unsafe { std::ptr::write_bytes(to, 0, len as usize) };
    }

    /// Sets `len` bytes at `offset` to zero by giving their memory back, as far as whole pages go.
    ///
    /// # Errors
    /// What `fallocate` says.
    pub fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = self.at(offset, usize::try_from(len).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the host keeps the descriptor open as long as the mapping.
        let file = unsafe { BorrowedFd::borrow_raw(self.fd) };
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(file, how, offset, len)?)
    }

    /// Copies bytes out, for a domain's own records.
    pub fn copy_to_slice(&self, offset: u64, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        // SAFETY: source checked by `at`; a private slice cannot overlap the region.
        unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), to.as_mut_ptr(), to.len()) };
    }

    /// Copies bytes in, for a domain's own records.
    pub fn copy_from_slice(&self, offset: u64, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: as in `copy_to_slice`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }
}
