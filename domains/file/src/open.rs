//! Opening an image: what is looked at first, and the sentence for each way in which it cannot be
//! the disk.

use crate::announced::Announced;
use domain_api::{DomainError, Host, Level, Params};
use domain_io::file_io::{self, Alignment, ImageLock, OpenMode};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// Storage key of the path that it was opened by.
pub(crate) const PATH: &str = "path";
/// How long a lock is waited for: the program that has it may just be ending.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// The largest alignment that can be had: pieces of what is moved in pieces are multiples of it.
pub(crate) const LARGEST_ALIGNMENT: u32 = 256 << 10;

/// What direct I/O has to be aligned to.
pub(crate) fn alignment(file: &File, path: &str) -> Result<Alignment, DomainError> {
    let found = file_io::direct_alignment(file).map_err(|error| {
        DomainError::new(format!(
            "cannot do direct I/O on `{path}`: {error}; leave direct=true out"
        ))
    })?;
    if found.offset.max(found.memory) > LARGEST_ALIGNMENT {
        return Err(DomainError::new(format!(
            "direct I/O on `{path}` takes {} bytes at a time, which is more than {LARGEST_ALIGNMENT}; leave direct=true out",
            found.offset.max(found.memory)
        )));
    }
    Ok(found)
}

/// Another open file description, to sync through: for reading only, because that is all it takes,
/// and because to close one that was open for writing is an event for others.
pub(crate) fn open_to_sync(host: Host, file: &File, path: &str) -> io::Result<File> {
    file_io::reopen(file, OpenMode { write: false, direct: false }).or_else(|error| {
        host.log(
            Level::Warn,
            &format!(
                "`{path}` cannot be opened once more ({error}): of flushes at the same time, not each may be told that the storage has failed"
            ),
        );
        file.try_clone()
    })
}

/// Whether the file can stand behind what the guest was told.
pub(crate) fn stand_behind(
    host: Host,
    path: &str,
    size: u64,
    announced: Announced,
    block_size: Option<u32>,
) -> Result<(), DomainError> {
    if let Some(wanted) = block_size.filter(|&wanted| wanted != announced.block_size) {
        return Err(DomainError::new(format!(
            "`block_size` is {wanted}, and the guest was told {}; leave it as it was",
            announced.block_size
        )));
    }
    if size < announced.capacity {
        return Err(DomainError::new(format!(
            "`{path}` has {size} bytes, and the guest was told {}; restore its size with `truncate -s {} {path}`",
            announced.capacity, announced.capacity
        )));
    }
    if size > announced.capacity {
        let line = format!(
            "`{path}` has grown to {size} bytes; the guest goes on with the {} that it was told, until the disk is resized",
            announced.capacity
        );
        host.log(Level::Info, &line);
    }
    Ok(())
}

pub(crate) fn identity(about: &Metadata) -> (u64, u64) {
    if about.file_type().is_block_device() { (about.rdev(), 0) } else { (about.dev(), about.ino()) }
}

pub(crate) fn open(path: &str, mode: OpenMode) -> Result<File, DomainError> {
    // Looked at first: opening a FIFO for reading would wait for a writer.
    let about = std::fs::metadata(path).map_err(|error| {
        DomainError::new(match error.kind() {
            io::ErrorKind::NotFound => format!(
                "there is no `{path}`; correct `path`, or make an image with `truncate -s SIZE {path}`"
            ),
            _ => format!("cannot look at `{path}`: {error}; correct `path` or its permissions"),
        })
    })?;
    check_kind(path, &about)?;
    file_io::open(Path::new(path), mode).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::InvalidInput if mode.direct => {
                "; its file system does no direct I/O, leave direct=true out"
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if mode.write => {
                "; make it writable, or serve it with readonly=true"
            }
            io::ErrorKind::PermissionDenied => "; make it readable",
            _ => "",
        };
        let purpose = if mode.write { "for writing" } else { "for reading" };
        DomainError::new(format!("cannot open `{path}` {purpose}: {error}{advice}"))
    })
}

/// Whether other programs are kept off the image, and from when on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Locking {
    /// They are not.
    Never,
    /// While rings run; and it must be free when the daemon starts.
    Always,
    /// While rings run.
    Late,
}

impl Locking {
    pub(crate) fn of(params: &Params) -> Result<Self, DomainError> {
        match params.get("locking") {
            Some("late") => Ok(Self::Late),
            None | Some("true") => Ok(Self::Always),
            Some("false") => Ok(Self::Never),
            Some(other) => Err(DomainError::new(format!(
                "parameter `locking` is `{other}`; it must be true, late or false"
            ))),
        }
    }
}

/// Locks the image for this process, unless it is to be `late` and another program has it now.
/// `None` if that cannot be done with it.
pub(crate) fn lock(
    host: Host,
    file: &File,
    path: &str,
    mode: OpenMode,
    late: bool,
) -> Result<Option<File>, DomainError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let own = file_io::reopen(file, OpenMode { write: false, direct: false });
    loop {
        let outcome = match &own {
            Ok(own) => file_io::lock_image(own, mode.write),
            Err(error) => ImageLock::Impossible(error.kind().into()),
        };
        match outcome {
            ImageLock::Ours => return Ok(own.ok()),
            ImageLock::Taken if late => {
                host.log(
                    Level::Info,
                    &format!("another program uses `{path}` now: the guest's rings will wait until it does not any more"),
                );
                return Ok(own.ok());
            }
            ImageLock::Taken if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10))
            }
            ImageLock::Taken => {
                return Err(DomainError::new(format!(
                    "another program uses `{path}`, and both would write to it or rely on what it holds; end that one (`lslocks` may show which it is), give locking=late if its guest is to come here by migration, or locking=false if you know better"
                )));
            }
            ImageLock::Impossible(error) => {
                host.log(
                    Level::Warn,
                    &format!("`{path}` cannot be locked ({error}): see to it that nobody else writes to it"),
                );
                return Ok(None);
            }
        }
    }
}

/// The predecessor's file, opened as we want it.
pub(crate) fn take_up(
    host: Host,
    served: File,
    path: &str,
    mode: OpenMode,
) -> Result<File, DomainError> {
    let cannot = |error: io::Error| {
        DomainError::new(format!("cannot take up the descriptor of `{path}`: {error}"))
    };
    let id = identity(&served.metadata().map_err(cannot)?);
    let there = std::fs::metadata(path).map(|about| identity(&about));
    let renamed = !matches!(&there, Ok(there) if *there == id);
    if renamed && host.storage().bytes(PATH).as_deref() != Some(path.as_bytes()) {
        return Err(DomainError::new(match there {
            Ok(_) => format!(
                "`{path}` is another file than the guest's disk; an upgrade does not move a disk, leave `path` out"
            ),
            Err(error) => {
                format!(
                    "cannot look at `{path}`: {error}; leave `path` out to go on with the same file"
                )
            }
        }));
    }
    if renamed {
        host.log(
            Level::Warn,
            &format!(
                "`{path}` is not the guest's disk any more; going on with the file that is open"
            ),
        );
    }
    if file_io::open_mode(&served).map_err(cannot)? == mode {
        return Ok(served);
    }
    file_io::reopen(&served, mode).map_err(|error| {
        DomainError::new(format!(
            "cannot open the file of `{path}` anew with the wanted `direct` and `readonly`: {error}; leave them as they were"
        ))
    })
}

/// A device or a memory file may be opened for writing and take no writes.
pub(crate) fn check_writable(file: &File, path: &str, mode: OpenMode) -> Result<(), DomainError> {
    if !mode.write {
        return Ok(());
    }
    let what = if file_io::is_read_only_device(file).unwrap_or(false) {
        "is a read-only device"
    } else if file_io::is_write_sealed(file) {
        "is sealed against writing"
    } else {
        return Ok(());
    };
    Err(DomainError::new(format!(
        "`{path}` {what}; make it writable, or serve it with readonly=true"
    )))
}

pub(crate) fn check_kind(path: &str, about: &Metadata) -> Result<(), DomainError> {
    let kind = about.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let what = if kind.is_dir() { "a directory" } else { "no file that holds data" };
    Err(DomainError::new(format!(
        "`{path}` is {what}; `path` must name a raw image file or a block device"
    )))
}

pub(crate) fn check_size(
    path: &str,
    size: u64,
    block_size: u32,
    device: bool,
) -> Result<(), DomainError> {
    if size == 0 {
        let advice = if device {
            "insert a medium".into()
        } else {
            format!("use `truncate -s SIZE {path}`")
        };
        return Err(DomainError::new(format!("`{path}` is empty; {advice}")));
    }
    if size.is_multiple_of(u64::from(block_size)) {
        return Ok(());
    }
    let fit = size.next_multiple_of(u64::from(block_size));
    Err(DomainError::new(format!(
        "`{path}` has {size} bytes, which is no multiple of {block_size}; extend it with `truncate -s {fit} {path}`"
    )))
}
