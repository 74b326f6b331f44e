//! A disk whose power can be cut: a file in user space (FUSE) that forgets what it was not asked
//! to keep.
//!
//! The kernel in between is the real one, and the daemon is what is shipped, io_uring and all; only
//! what lies below the file is played. A write ends when it is in the disk's volatile cache;
//! `fsync` makes durable what was in the cache when it began, takes its time, and writes go on
//! meanwhile. After the cut nothing is answered any more, and what is left is [`Disk::image`]:
//! nothing that was not synced.
//!
//! With a page cache in front of it ([`Disk::mount_cached`]) writes come when the kernel writes
//! back, and can be made to fail then ([`Disk::set_full`]), as on storage that is full behind a
//! file system that had promised room.
//!
//! The protocol is that of `include/uapi/linux/fuse.h`; the mount point is a file, so that there
//! are no names to look up. It wants `/dev/fuse` and the right to mount, which root has; where that
//! is missing, [`Disk::mount`] says so.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::NamedTempFile;

/// What the disk writes at once or not at all.
const SECTOR: usize = 512;
/// How long making anything durable takes: long enough for a hasty answer to overtake it.
const SYNC_TIME: Duration = Duration::from_millis(2);
/// The largest write that is taken, and room for the headers in front of it.
const MAX_WRITE: u32 = 128 << 10;
const BUFFER: usize = MAX_WRITE as usize + 8192;

const GETATTR: u32 = 3;
const FORGET: u32 = 2;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const ENOSYS: i32 = 38;
const ENOSPC: i32 = 28;
/// FUSE_WRITEBACK_CACHE.
const WRITEBACK_CACHE: u32 = 1 << 16;

struct Sectors {
    /// What reads see.
    current: Vec<u8>,
    /// What a power cut leaves.
    durable: Vec<u8>,
    /// Which sectors differ, as far as is known.
    dirty: Vec<bool>,
    cut: bool,
    full: bool,
    syncs: u64,
}

struct Shared {
    device: File,
    sectors: Mutex<Sectors>,
    /// One sync at a time, so that one that finds nothing left to do does not end before the one
    /// that does it.
    syncing: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic in the disk")
}

/// The disk. Dropping it takes it away from its users.
pub struct Disk {
    point: NamedTempFile,
    shared: Arc<Shared>,
    server: Option<JoinHandle<()>>,
}

impl Disk {
    /// A disk of `len` zero bytes.
    ///
    /// Fails where there is no FUSE, or no right to mount.
    pub fn mount(len: usize) -> io::Result<Disk> {
        Disk::mount_with(len, 0)
    }

    /// As [`mount`](Self::mount), with writes that stay in the kernel's page cache until it writes
    /// them back.
    pub fn mount_cached(len: usize) -> io::Result<Disk> {
        let disk = Disk::mount_with(len, WRITEBACK_CACHE)?;
        // With such a cache the kernel is the one who knows the size, and it begins with 0.
        File::options().write(true).open(disk.path())?.set_len(len as u64)?;
        Ok(disk)
    }

    fn mount_with(len: usize, flags: u32) -> io::Result<Disk> {
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let point = NamedTempFile::with_prefix("hotswap-power-")?;
        let options = format!("fd={},rootmode=100000,user_id=0,group_id=0\0", device.as_raw_fd());
        let options =
            std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).expect("ends with a zero");
        mount("power", point.path(), "fuse", MountFlags::NOSUID | MountFlags::NODEV, options)?;
        let sectors = Sectors {
            current: vec![0; len],
            durable: vec![0; len],
            dirty: vec![false; len / SECTOR],
            cut: false,
            full: false,
            syncs: 0,
        };
        let shared =
            Arc::new(Shared { device, sectors: Mutex::new(sectors), syncing: Mutex::default() });
        let served = Arc::clone(&shared);
        let server = Some(thread::spawn(move || served.serve(flags)));
        Ok(Disk { point, shared, server })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.point.path()
    }

    /// From now on nothing is made durable, and no request is answered.
    pub fn cut_power(&self) {
        lock(&self.shared.sectors).cut = true;
    }

    /// Whether writes fail from now on, because there is no room.
    pub fn set_full(&self, full: bool) {
        lock(&self.shared.sectors).full = full;
    }

    /// Ends whatever still waits for an answer, with an error. A process that waits cannot even be
    /// killed before this.
    pub fn take_away(&mut self) {
        if let Some(server) = self.server.take() {
            // Fails only if another has done it.
            let _ = unmount(self.path(), UnmountFlags::FORCE | UnmountFlags::DETACH);
            server.join().expect("the disk's thread does not panic");
        }
    }

    /// What is durable.
    pub fn image(&self) -> Vec<u8> {
        lock(&self.shared.sectors).durable.clone()
    }

    /// How often something was made durable.
    pub fn syncs(&self) -> u64 {
        lock(&self.shared.sectors).syncs
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.take_away();
    }
}

/// A number of a request's body.
fn number<const BYTES: usize>(body: &[u8], at: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..BYTES].copy_from_slice(&body[at..at + BYTES]);
    u64::from_le_bytes(wide)
}

impl Shared {
    fn serve(self: Arc<Self>, flags: u32) {
        let mut buffer = vec![0; BUFFER];
        loop {
            let len = match (&self.device).read(&mut buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A request that was taken back before we had it.
                Err(error) if error.raw_os_error() == Some(2) => continue,
                Err(_) => return,
            };
            // fuse_in_header: length, opcode, unique, and 24 bytes about who it is.
            let (opcode, unique) = (number::<4>(&buffer, 4) as u32, number::<8>(&buffer, 8));
            let body = &buffer[40..len];
            if opcode == FSYNC {
                let shared = Arc::clone(&self);
                thread::spawn(move || shared.sync(unique));
            } else if ![FORGET, BATCH_FORGET, INTERRUPT].contains(&opcode) {
                let mut sectors = lock(&self.sectors);
                if !sectors.cut {
                    let answer = sectors.answer(opcode, body, flags);
                    self.reply(unique, answer);
                }
            }
        }
    }

    fn reply(&self, unique: u64, answer: Result<Vec<u8>, i32>) {
        let (error, body) = answer.map_or_else(|error| (-error, Vec::new()), |body| (0, body));
        // fuse_out_header.
        let mut bytes = ((16 + body.len()) as u32).to_le_bytes().to_vec();
        bytes.extend(error.to_le_bytes());
        bytes.extend(unique.to_le_bytes());
        bytes.extend(body);
        // Fails if the one that asked has gone.
        let _ = (&self.device).write(&bytes);
    }

    fn sync(&self, unique: u64) {
        let _turn = lock(&self.syncing);
        let written: Vec<(usize, Vec<u8>)> = {
            let mut sectors = lock(&self.sectors);
            let Sectors { current, dirty, .. } = &mut *sectors;
            let found = dirty
                .iter_mut()
                .enumerate()
                .filter_map(|(at, dirty)| std::mem::take(dirty).then_some(at * SECTOR));
            found.map(|at| (at, current[at..at + SECTOR].to_vec())).collect()
        };
        thread::sleep(SYNC_TIME);
        let mut sectors = lock(&self.sectors);
        if sectors.cut {
            return;
        }
        for (at, bytes) in written {
            sectors.durable[at..at + SECTOR].copy_from_slice(&bytes);
        }
        sectors.syncs += 1;
        self.reply(unique, Ok(Vec::new()));
    }
}

impl Sectors {
    fn answer(&mut self, opcode: u32, body: &[u8], flags: u32) -> Result<Vec<u8>, i32> {
        match opcode {
            INIT => Ok(init(number::<4>(body, 8) as u32, flags)),
            WRITE | FALLOCATE if self.full => Err(ENOSPC),
            GETATTR | SETATTR => Ok(self.attributes()),
            OPEN => Ok(vec![0; 16]),
            // How much room there is is not asked.
            STATFS => Ok(vec![0; 80]),
            RELEASE | FLUSH => Ok(Vec::new()),
            READ => {
                let (at, len) = (number::<8>(body, 8) as usize, number::<4>(body, 16) as usize);
                let end = (at + len).min(self.current.len());
                Ok(self.current.get(at..end).unwrap_or_default().to_vec())
            }
            WRITE => {
                let (at, len) = (number::<8>(body, 8) as usize, number::<4>(body, 16) as usize);
                self.change(at, len).copy_from_slice(&body[40..40 + len]);
                Ok((len as u64).to_le_bytes().to_vec())
            }
            // Punching holes and zeroing are the same here.
            FALLOCATE => {
                // There is nothing behind the end.
                let (at, len) = (number::<8>(body, 8) as usize, number::<8>(body, 16) as usize);
                let len = len.min(self.current.len().saturating_sub(at));
                if len > 0 {
                    self.change(at, len).fill(0);
                }
                Ok(Vec::new())
            }
            _ => Err(ENOSYS),
        }
    }

    /// A range that is about to become another one.
    fn change(&mut self, at: usize, len: usize) -> &mut [u8] {
        self.dirty[at / SECTOR..(at + len).div_ceil(SECTOR)].fill(true);
        &mut self.current[at..at + len]
    }

    /// fuse_attr_out: a regular file, good for an hour.
    fn attributes(&self) -> Vec<u8> {
        let len = self.current.len() as u64;
        let mut out: Vec<u8> =
            [3600, 0, 1, len, len / 512, 0, 0, 0].into_iter().flat_map(u64::to_le_bytes).collect();
        // Nanoseconds of three times, mode, links, owner, group, device, block size, flags.
        out.extend(
            [0u32, 0, 0, 0o100_600, 1, 0, 0, 0, 4096, 0].into_iter().flat_map(u32::to_le_bytes),
        );
        out
    }
}

/// fuse_init_out. Without a write-back cache in the kernel a write is here when it ends.
fn init(readahead: u32, flags: u32) -> Vec<u8> {
    let mut out: Vec<u8> =
        [7u32, 31, readahead, flags].into_iter().flat_map(u32::to_le_bytes).collect();
    out.extend([64u16, 48].into_iter().flat_map(u16::to_le_bytes));
    out.extend([MAX_WRITE, 1].into_iter().flat_map(u32::to_le_bytes));
    out.resize(64, 0);
    out
}
