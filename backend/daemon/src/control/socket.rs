//! A listening Unix socket at a path that is ours alone.
//!
//! A path outlives the process that bound it, so whoever starts finds one of three things: nothing, the remains of
//! a dead daemon, or a living one. Only the remains may be replaced, and at the end only our own may be removed.
//!
//! Invariants:
//! * The mode is set on the socket *before* it is bound, so the name never exists with another one. (On Linux
//!   `bind` makes the inode with the mode of the socket, less the umask.)
//! * A path is taken from another only if a connection to it was refused, and both happen under a lock on the
//!   directory, so that of two daemons that start at once one wins and the other is told.
//! * A name is removed only if it still leads to the inode that was bound. The kernel keeps that inode as long as
//!   the socket is open, so its number cannot come back as somebody else's while we compare.
//!
//! Deliberately absent: abstract names, which have no mode, and waiting for the other daemon to end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// How many clients may wait to be accepted.
const BACKLOG: i32 = 128;
/// How long another process may keep the directory locked before we go on without the lock.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Why a path cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Somebody answers there.
    #[error("another daemon listens on {0}; stop it, or choose another path")]
    InUse(PathBuf),
    /// Something is there that no daemon has left.
    #[error("{0} exists and is not a socket; remove it, or choose another path")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {path}: {source}")]
    System {
        /// The path.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// The name of a [`SocketFile`], for whoever has to remove it from elsewhere.
#[derive(Debug)]
pub struct SocketName {
    path: PathBuf,
    /// Device and inode of what was bound, until the name has been removed.
    identity: Mutex<Option<(u64, u64)>>,
}

impl SocketName {
    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the name, once, if it is still ours.
    pub fn remove(&self) {
        let Some(ours) = self.identity.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let _lock = lock_directory(&self.path);
        if rustix::fs::lstat(&self.path).is_ok_and(|stat| identity(&stat) == ours)
            && let Err(e) = rustix::fs::unlink(&self.path)
        {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

/// A listening socket and its name in the file system, which goes when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    name: Arc<SocketName>,
}

impl SocketFile {
    /// Listens on `path`, which gets `mode` (less the umask); replaces what a dead daemon has left there.
    ///
    /// # Errors
    /// The path belongs to a living daemon, is no socket, or cannot be bound.
    pub fn listen(path: &Path, mode: u32) -> Result<SocketFile, SocketError> {
        let system = |e: Errno| SocketError::System { path: path.to_owned(), source: e.into() };
        if path.as_os_str().is_empty() {
            // It would bind to an abstract name of the kernel's choice.
            return Err(system(Errno::INVAL));
        }
        let address = SocketAddrUnix::new(path).map_err(system)?;
        let _lock = lock_directory(path);
        let mut socket = open_socket(mode).map_err(system)?;
        if let Err(e) = rustix::net::bind(&socket, &address) {
            if e != Errno::ADDRINUSE {
                return Err(system(e));
            }
            remove_remains(path, &address)?;
            socket = open_socket(mode).map_err(system)?;
            // A second refusal is somebody who does not take the lock: no daemon of ours.
            rustix::net::bind(&socket, &address).map_err(|e| match e {
                Errno::ADDRINUSE => SocketError::InUse(path.to_owned()),
                e => system(e),
            })?;
        }
        let identity = rustix::fs::lstat(path).map(|stat| identity(&stat)).map_err(system)?;
        rustix::net::listen(&socket, BACKLOG).map_err(system)?;
        let name = SocketName { path: path.to_owned(), identity: Mutex::new(Some(identity)) };
        Ok(SocketFile { listener: UnixListener::from(socket), name: Arc::new(name) })
    }

    /// The socket to accept from.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The name in the file system.
    #[must_use]
    pub const fn name(&self) -> &Arc<SocketName> {
        &self.name
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Before the socket is closed: after that its inode's number may be somebody else's.
        self.name.remove();
    }
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn open_socket(mode: u32) -> Result<OwnedFd, Errno> {
    let socket = stream_socket(SocketFlags::CLOEXEC)?;
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(mode))?;
    Ok(socket)
}

fn stream_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Removes a socket that nobody listens on, and nothing else.
fn remove_remains(path: &Path, address: &SocketAddrUnix) -> Result<(), SocketError> {
    let system = |e: Errno| SocketError::System { path: path.to_owned(), source: e.into() };
    match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(system(e)),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    // Non-blocking, because a living daemon with a full backlog would keep us waiting.
    let probe = stream_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).map_err(system)?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => match rustix::fs::unlink(path) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(system(e)),
        },
        Err(Errno::NOENT) => Ok(()),
        // Somebody is there: with a full backlog, or with a socket of another type.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(SocketError::InUse(path.to_owned())),
        Err(e) => Err(system(e)),
    }
}

/// Locks the directory of `path` among daemons, for as long as the descriptor is open.
///
/// It guards against accidents only, so it is given up rather than waited for: in a directory like `/tmp` anybody
/// can hold such a lock, and must not be able to keep a daemon from starting or ending.
fn lock_directory(path: &Path) -> Option<OwnedFd> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, parent, flags, Mode::empty()).ok()?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match rustix::fs::flock(directory.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(e) => {
                log::debug!("{} stays unlocked: {e}", parent.display());
                return None;
            }
        }
    }
}
