//! The image: which file it is, how it is opened, and what size and blocks it has.
//!
//! The first instance opens the file by its path and leaves the descriptor in storage. From then on
//! the *descriptor* says which file the guest's disk is, for a path can be renamed, replaced or
//! removed under a running guest. A successor works on
//!
//! * a dup of the storage's descriptor, where that was opened as it wants it (cached or direct,
//!   writable or not). One open file description means that an error of a write-back that the
//!   predecessor did not see is seen by the successor's `fdatasync`;
//! * else the same inode opened anew through the descriptor, because such flags belong to the
//!   description and cannot be changed on a dup without the predecessor feeling it.
//!
//! The path is inherited, so a successor cannot tell whether the operator gave it. The storage
//! remembers the path in use: the same text again means "this disk", whatever lies there now;
//! another text must lead to the same file, or it is refused, since moving a disk is not what an
//! upgrade does.
//!
//! What the guest is told of the disk is the disk's as well (`announced`). Only what the I/O has to
//! be aligned to is asked of the host anew by each instance, and again when the kernel refuses one:
//! it is no property of the guest's disk, because what does not fit is carried out on a range that
//! does (`domain_io::engine::ranges`).
//!
//! Linux reports a write-back that failed once to each open file description, and then forgets it.
//! So each queue syncs through a description of its own, opened before it may be needed. The disk
//! has one more, the *witness*, which lies in storage: the first sync of an instance, each time
//! that it is activated, asks it what was reported to a predecessor that did not live to say so.
//! Nothing else is synced through it, and no data goes through it.
//!
//! The first instance locks the image, so that no other program writes to it, and leaves the
//! description that has the lock in storage as well: it is the disk's, whichever instance serves
//! it. From then on the lock follows the rings: it is given back when they have stopped, and taken
//! again before they run, so that a guest can go from one daemon to another.

use crate::announced::Announced;
use crate::format;
use crate::open::{
    LARGEST_ALIGNMENT, Locking, PATH, alignment, check_kind, check_size, check_writable, identity,
    lock, open, open_to_sync, stand_behind, take_up,
};
use domain_api::{Claim, DomainError, Host, Level};
use domain_io::file_io::{self, Alignment, ImageLock, OpenMode};
use domain_io::uring::Files;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Storage key of the descriptor.
const DESCRIPTOR: &str = "image";
/// Storage key of the descriptor whose locks other programs see.
const LOCK: &str = "claim";
/// Storage key of the description that remembers.
const WITNESS: &str = "witness";

const SECTOR_SIZE: u32 = 512;

/// What an instance is asked to make of the image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) mode: OpenMode,
    /// Whether to see to it that no other program writes to it.
    pub(crate) locking: Locking,
    /// The logical block size to announce, if the operator has said so.
    pub(crate) block_size: Option<u32>,
    /// The operator says that it is a raw disk, whatever it begins with.
    pub(crate) is_raw: bool,
}

/// An image that is open.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    path: String,
    mode: OpenMode,
    announced: Announced,
    /// What addresses of I/O must be multiples of, in bytes.
    memory_alignment: u32,
    /// What offsets and lengths must be multiples of. It may grow.
    alignment: AtomicU32,
    /// What that was at first.
    first_alignment: u32,
    /// Sectors of the block device that it is, if it is one.
    device_sector: Option<u32>,
    in_memory: bool,
    /// `RWF_DSYNC` says of each write by itself whether it is durable.
    writes_durably: bool,
    /// The same file through the page cache, for the end of one whose length is not aligned.
    cached: Option<File>,
    witness: File,
    /// How others see that the image is in use, if storage has nothing to that end. A description
    /// of its own: what the rings use is closed some time after the process is gone, and only with
    /// direct I/O is that of use.
    lock: Option<File>,
    /// Something may have been written, by this instance or one before it.
    is_used: AtomicBool,
}

/// A dup of what storage has at `key`. That there is no descriptor left for it does not mean that
/// it has nothing: the image would be opened anew, or served without its lock.
pub(crate) fn kept(host: Host, key: &str) -> Result<Option<File>, DomainError> {
    host.storage().file(key).map_err(|error| {
        DomainError::new(format!("no descriptor for what there is of the disk (`{key}`): {error}"))
    })
}

fn is_hidden(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
}

impl Image {
    /// Opens and checks the image, or takes up the one in storage.
    pub(crate) fn prepare(host: Host, path: &str, wanted: Wanted) -> Result<Self, DomainError> {
        let mode = wanted.mode;
        let served = kept(host, DESCRIPTOR)?;
        // What is there may be served while we are prepared: to begin to lock it is not late then.
        let late = wanted.locking == Locking::Late && served.is_none();
        let file = match served {
            None => {
                let file = open(path, mode)?;
                if !wanted.is_raw {
                    // Through the page cache: direct I/O wants aligned memory.
                    let cached = file_io::reopen(&file, OpenMode { write: false, direct: false });
                    format::check(host, cached.as_ref().unwrap_or(&file), path, mode.write)?;
                }
                file
            }
            Some(served) => take_up(host, served, path, mode)?,
        };
        check_writable(&file, path, mode)?;
        let locks = wanted.locking != Locking::Never && kept(host, LOCK)?.is_none();
        let lock = if locks { lock(host, &file, path, mode, late)? } else { None };
        Ok(Self { lock, ..Self::describe(host, file, path, wanted)? })
    }

    fn describe(host: Host, file: File, path: &str, wanted: Wanted) -> Result<Self, DomainError> {
        let mode = wanted.mode;
        let cannot = |what: &str, error: io::Error| {
            DomainError::new(format!("cannot {what} `{path}`: {error}"))
        };
        let about = file.metadata().map_err(|error| cannot("look at", error))?;
        check_kind(path, &about)?;
        let device = about.file_type().is_block_device();
        let size = size(&file, &about).map_err(|error| cannot("read the size of", error))?;
        let device_sector = if device {
            Some(
                file_io::device_sector_size(&file)
                    .map_err(|error| cannot("read the sectors of", error))?,
            )
        } else {
            None
        };
        let alignment = if mode.direct { alignment(&file, path)? } else { Alignment::SECTORS };
        // A device's node is on a file system in memory, and says nothing of the device.
        let in_memory = !device
            && file_io::is_in_memory(&file)
                .map_err(|error| cannot("look at the file system of", error))?;
        let writes_durably =
            mode.direct && (device || file_io::is_truly_direct(&file).unwrap_or(false));
        let is_cut = !device && !size.is_multiple_of(u64::from(alignment.offset));
        let cached = (mode.direct && is_cut)
            .then(|| file_io::reopen(&file, OpenMode { direct: false, ..mode }))
            .transpose()
            .map_err(|error| cannot("open once more, for the end of it,", error))?;
        let witness = match kept(host, WITNESS)? {
            Some(witness) => witness,
            None => {
                open_to_sync(host, &file, path).map_err(|error| cannot("open once more", error))?
            }
        };
        let announced = match Announced::inherited(host) {
            Some(announced) => {
                stand_behind(host, path, size, announced, wanted.block_size)?;
                announced
            }
            None => {
                let block_size = wanted.block_size.unwrap_or(SECTOR_SIZE);
                check_size(path, size, block_size, device)?;
                let preferred = u32::try_from(about.blksize()).unwrap_or(0);
                let usable = preferred.is_power_of_two() && preferred <= 1 << 20;
                Announced {
                    capacity: size,
                    block_size,
                    physical_block_size: if usable { preferred } else { 0 }
                        .max(alignment.offset)
                        .max(device_sector.unwrap_or(0))
                        .max(block_size),
                    discard: mode.write
                        && if device {
                            file_io::can_discard_device(&file)
                        } else {
                            file_io::can_punch_hole(&file, size)
                        },
                    id: identity(&about),
                }
            }
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            mode,
            announced,
            memory_alignment: alignment.memory,
            alignment: AtomicU32::new(alignment.offset),
            first_alignment: alignment.offset,
            device_sector,
            in_memory,
            writes_durably,
            cached,
            witness,
            lock: None,
            is_used: AtomicBool::new(kept(host, DESCRIPTOR)?.is_some()),
        })
    }

    /// Leaves the descriptor in storage for successors, where there is none yet or one that was
    /// opened otherwise.
    pub(crate) fn keep(&self, host: Host) -> Result<(), DomainError> {
        let storage = host.storage();
        let served = kept(host, DESCRIPTOR)?;
        let fits =
            served.as_ref().is_some_and(|file| file_io::open_mode(file).ok() == Some(self.mode));
        if !fits {
            storage.set_file(DESCRIPTOR, &self.file)?;
        }
        if let Some(lock) = &self.lock
            && kept(host, LOCK)?.is_none()
        {
            storage.set_file(LOCK, lock)?;
        }
        if kept(host, WITNESS)?.is_none() {
            storage.set_file(WITNESS, &self.witness)?;
        }
        if storage.bytes(PATH).as_deref() != Some(self.path.as_bytes()) {
            storage.set_bytes(PATH, self.path.as_bytes())?;
        }
        self.announced.keep(host)
    }

    /// What the guest was told that the disk has, in bytes.
    pub(crate) fn capacity(&self, host: Host) -> u64 {
        Announced::inherited(host).unwrap_or(self.announced).capacity
    }

    /// Has no other program use the image from now on, as locks go.
    pub(crate) fn claim(&self, host: Host) -> Result<Claim, DomainError> {
        self.is_used.store(true, Ordering::Relaxed);
        let Some(lock) = kept(host, LOCK)? else { return Ok(Claim::Nothing) };
        let write = self.mode.write;
        // Not to be locked again: one that looks, and backs off from our lock in a moment, would be
        // taken for its owner, and ours be given up. Nor has anybody else written.
        match file_io::has_locked(&lock, write) {
            Ok(true) => return Ok(Claim::Ours),
            Ok(false) => {}
            // There is no such list.
            Err(error) if is_hidden(&error) => {}
            Err(error) => {
                return Err(DomainError::new(format!(
                    "it cannot be told whether `{}` is locked: {error}",
                    self.path
                )));
            }
        }
        let stale = !self.mode.direct && file_io::is_of_many_hosts(&self.file).unwrap_or(true);
        match file_io::lock_image(&lock, write) {
            ImageLock::Ours => {}
            ImageLock::Taken => return Ok(Claim::Taken),
            ImageLock::Impossible(error) => {
                return Err(DomainError::new(format!("`{}` cannot be locked: {error}", self.path)));
            }
        }
        if stale && let Err(error) = file_io::forget_cached(&self.file) {
            host.log(
                Level::Warn,
                &format!("what is cached of `{}` may be older than what another host has written: {error}", self.path),
            );
        }
        Ok(Claim::Ours)
    }

    /// The description that has the lock: with the rings that hold it, others see the image in use
    /// until the kernel has ended the last request.
    pub(crate) fn lock_in_use(&self, host: Host) -> io::Result<Option<File>> {
        host.storage().file(LOCK)
    }

    /// Whether something may have been written.
    pub(crate) fn may_be_written(&self) -> bool {
        self.mode.write && self.is_used.load(Ordering::Relaxed)
    }

    /// Lets other programs use the image. What was written is durable by now.
    ///
    /// # Errors
    /// There is no descriptor left: nothing is unlocked.
    pub(crate) fn release(&self, host: Host) -> Result<(), DomainError> {
        if let Some(lock) = kept(host, LOCK)? {
            file_io::unlock_image(&lock, self.mode.write);
        }
        Ok(())
    }

    /// Announces `capacity` bytes from now on, and makes the file as long if it is shorter. What
    /// cannot be made longer from here must have grown before.
    pub(crate) fn resize(&self, host: Host, capacity: u64) -> Result<(), DomainError> {
        let path = &self.path;
        let cannot = |error: io::Error| {
            DomainError::new(format!("cannot make `{path}` {capacity} bytes long: {error}"))
        };
        let about = self.file.metadata().map_err(cannot)?;
        let size = size(&self.file, &about).map_err(cannot)?;
        if size < capacity {
            let why = if about.file_type().is_block_device() {
                "a block device is made larger by what it comes from"
            } else if !self.mode.write {
                "it is served with readonly=true"
            } else {
                ""
            };
            if !why.is_empty() {
                return Err(DomainError::new(format!(
                    "`{path}` has {size} bytes, and {why}; make it {capacity} bytes long first"
                )));
            }
            self.file.set_len(capacity).map_err(cannot)?;
        }
        Announced::inherited(host).unwrap_or(self.announced).resize(host, capacity)
    }

    pub(crate) const fn file(&self) -> &File {
        &self.file
    }

    pub(crate) const fn mode(&self) -> OpenMode {
        self.mode
    }

    pub(crate) const fn announced(&self) -> &Announced {
        &self.announced
    }

    /// A description of its own to sync through.
    pub(crate) fn sync_file(&self, host: Host) -> io::Result<File> {
        open_to_sync(host, &self.file, &self.path)
    }

    /// What remembers for all instances.
    pub(crate) const fn witness(&self) -> &File {
        &self.witness
    }

    /// What a ring uses, for a queue that syncs through `sync`.
    pub(crate) const fn files<'a>(&'a self, sync: &'a File) -> Files<'a> {
        Files { image: &self.file, sync, witness: &self.witness }
    }

    /// The same file through the page cache.
    pub(crate) fn cached(&self) -> io::Result<Cached<'_>> {
        match &self.cached {
            Some(file) => Ok(Cached::Ours(file)),
            None => {
                let mode = OpenMode { direct: false, ..self.mode };
                file_io::reopen(&self.file, mode).map(Cached::New)
            }
        }
    }

    /// Whether each direct write can be told to be durable by itself.
    pub(crate) const fn writes_durably(&self) -> bool {
        self.writes_durably
    }

    /// What addresses of I/O must be multiples of, in bytes.
    pub(crate) const fn memory_alignment(&self) -> usize {
        self.memory_alignment as usize
    }

    /// What offsets and lengths of I/O must be multiples of, in bytes.
    #[inline]
    pub(crate) fn alignment(&self) -> u64 {
        // SeqCst pairs with `grow`: see `Ranges` for what has to see what.
        u64::from(self.alignment.load(Ordering::SeqCst))
    }

    /// Whether that has grown since this instance was prepared.
    pub(crate) fn has_grown(&self) -> bool {
        self.alignment() > u64::from(self.first_alignment)
    }

    /// Asks what direct I/O has to be aligned to now, also where it is not stated.
    #[cold]
    pub(crate) fn ask_alignment_again(&self) {
        if let Ok(now) = file_io::direct_alignment(&self.file) {
            self.grow(now);
        }
    }

    /// Asks what direct I/O has to be aligned to now. XFS takes what is aligned to less than it
    /// says through the page cache, without a word, once a file shares blocks with another.
    pub(crate) fn follow_alignment(&self) {
        if self.mode.direct
            && let Ok(Some(now)) = file_io::stated_alignment(&self.file)
        {
            self.grow(now);
        }
    }

    fn grow(&self, now: Alignment) {
        if now.offset <= LARGEST_ALIGNMENT {
            self.alignment.fetch_max(now.offset, Ordering::SeqCst);
        }
    }

    /// Whether requests that the guest may send are carried out by reading, changing and writing.
    pub(crate) fn may_modify(&self) -> bool {
        self.mode.direct && self.alignment() > u64::from(self.announced.block_size)
    }

    /// Sectors of the block device that it is, if it is one.
    pub(crate) const fn device_sector(&self) -> Option<u32> {
        self.device_sector
    }

    /// Whether reading and writing it is copying, and waits for no device.
    pub(crate) const fn is_in_memory(&self) -> bool {
        self.in_memory
    }
}

/// How many bytes there are.
fn size(file: &File, about: &Metadata) -> io::Result<u64> {
    if about.file_type().is_block_device() {
        file_io::block_device_size(file)
    } else {
        Ok(about.len())
    }
}

/// The same file through the page cache.
pub(crate) enum Cached<'a> {
    Ours(&'a File),
    New(File),
}

impl std::ops::Deref for Cached<'_> {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            Self::Ours(file) => file,
            Self::New(file) => file,
        }
    }
}
