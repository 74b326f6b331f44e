//! The log of a migration as a frontend has it: a bitmap in shared memory, one bit for each 4 KiB
//! of guest-physical address space.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};

use super::raw::{AVAIL, DESCRIPTORS, GUEST_BASE, RawSession, USED, USER_BASE, other};

/// Bytes that a bit stands for.
pub const PAGE: u64 = 4096;

/// The feature bit that turns it on.
const LOG_ALL: u64 = 1 << 26;
/// The flag of a ring that is logged.
const F_LOG: u32 = 1;

/// A bitmap.
pub struct DirtyLog {
    file: File,
    len: u64,
}

impl DirtyLog {
    /// One for guest memory up to `end`.
    pub fn new(end: u64) -> io::Result<DirtyLog> {
        let file = File::from(memfd_create("dirty-log", MemfdFlags::CLOEXEC)?);
        let len = (end / PAGE).div_ceil(8).next_multiple_of(4096);
        ftruncate(&file, len)?;
        Ok(DirtyLog { file, len })
    }

    /// The marked pages, by number.
    pub fn pages(&self) -> io::Result<BTreeSet<u64>> {
        let mut bytes = vec![0; self.len as usize];
        self.file.read_exact_at(&mut bytes, 0)?;
        let marked = |at: &usize| bytes[at / 8] & 1 << (at % 8) != 0;
        Ok((0..bytes.len() * 8).filter(marked).map(|page| page as u64).collect())
    }

    /// Clears it. Nothing must be in flight: a mark that comes meanwhile would be lost.
    pub fn clear(&self) -> io::Result<()> {
        self.file.write_all_at(&vec![0; self.len as usize], 0)
    }
}

impl RawSession {
    /// Gives the backend a log (SET_LOG_BASE).
    pub fn give_log(&self, log: &DirtyLog) -> io::Result<()> {
        self.give_log_of(log, log.len)
    }

    /// As [`give_log`](Self::give_log), of which only so many bytes are said to be there.
    pub fn give_log_of(&self, log: &DirtyLog, len: u64) -> io::Result<()> {
        let region = VhostUserDirtyLogRegion {
            mmap_size: len,
            mmap_offset: 0,
            mmap_handle: log.file.as_raw_fd(),
        };
        self.frontend.set_log_base(0, Some(region)).map_err(other)
    }

    /// Turns the log on or off while the ring runs, as QEMU does when a migration begins or is
    /// cancelled: SET_FEATURES, and SET_VRING_ADDR with the same addresses.
    pub fn turn_log(&self, on: bool) -> io::Result<()> {
        let features = if on { self.features | LOG_ALL } else { self.features };
        self.frontend.set_features(features).map_err(other)?;
        let ring = VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: if on { F_LOG } else { 0 },
            desc_table_addr: USER_BASE + DESCRIPTORS,
            avail_ring_addr: USER_BASE + AVAIL,
            used_ring_addr: USER_BASE + USED,
            log_addr: on.then_some(GUEST_BASE + USED),
        };
        self.frontend.set_vring_addr(0, &ring).map_err(other)
    }
}
