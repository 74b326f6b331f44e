//! A listening Unix socket at a path that is ours alone.
//!
//! A path outlives the process that bound it, so a daemon that starts finds one of three things:
//! nothing, the remains of a dead daemon, or a living one. Only the remains may be replaced, and at
//! the end only our own may be removed.
//!
//! Invariants:
//! * A client that can see the name can connect. The socket is bound under another name beside it,
//!   a draft, and gets its own when it listens.
//! * The mode is set on the socket *before* it is bound, so neither name ever exists with a wider
//!   one. (On Linux `bind` makes the inode with the mode of the socket, less the umask.)
//! * A path is taken from another only if a connection to it was refused, and both happen under a
//!   lock on the directory, so that of two daemons that start at once one wins and the other is
//!   told. Where the directory cannot be locked, what is replaced comes out under the draft's name
//!   and is probed once more there: if it lives, it is put back.
//! * A name is removed only if it still leads to the inode that was bound. The kernel keeps that
//!   inode as long as the socket is open, so its number cannot come back as another socket's while
//!   it is compared.
//!
//! A daemon that is killed between the two names leaves a draft. Drafts of a name are recognized by
//! their form, and those that refuse a connection are removed by the next daemon that wants it.
//!
//! Deliberately absent: abstract names, which have no mode, and waiting for the other daemon to
//! end.

mod form;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Gid, geteuid};
use serde::{Deserialize, Serialize};

use form::DraftForm;
pub use form::SOCKET_PATH_MAX;

/// How many clients may wait to be accepted.
const BACKLOG: i32 = 128;
/// How long another process may keep the directory locked before we go on without the lock.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// How long another process that has come between is given first.
const OTHERS_TURN: Duration = Duration::from_millis(2);

/// How often a process that does not take the lock may come between.
const ATTEMPTS: usize = 10;

/// Why a path cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// A daemon answers there.
    #[error("another daemon listens on {0}; stop it, or choose another path")]
    InUse(PathBuf),
    /// Something is there that no daemon has left.
    #[error("{0} exists and is not a socket; remove it, or choose another path")]
    NotASocket(PathBuf),
    /// The group is not this process's to give.
    #[error(
        "cannot give {path} to group {group}: {source}; run as root or as a member of the group"
    )]
    Group {
        /// The path.
        path: PathBuf,
        /// The group's number.
        group: u32,
        /// What the system said.
        source: io::Error,
    },
    /// The system refused.
    #[error("cannot listen on {path}: {source}")]
    System {
        /// The path.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// Which processes may connect to a socket: those that may write to its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The name's mode.
    pub mode: u32,
    /// The name's group; the process's own if none.
    pub group: Option<u32>,
}

impl From<u32> for Access {
    fn from(mode: u32) -> Self {
        Self { mode, group: None }
    }
}

/// The name of a [`SocketFile`], for what has to remove it from elsewhere.
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
        let Some(ours) = self.identity.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        let _lock = lock_directory(&self.path);
        if rustix::fs::lstat(&self.path).is_ok_and(|stat| identity(&stat) == ours)
            && let Err(e) = rustix::fs::unlink(&self.path)
        {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

/// What another program in the same process needs to go on with a [`SocketFile`], beside its
/// descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptName {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

/// A listening socket and its name in the file system, which goes when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    name: Arc<SocketName>,
}

impl SocketFile {
    /// Listens on `path`, which gets `access`; replaces what a dead daemon has left there.
    ///
    /// # Errors
    /// The path belongs to a living daemon, is no socket, or cannot be bound or given to the group.
    pub fn listen(path: &Path, access: impl Into<Access>) -> Result<SocketFile, SocketError> {
        let access = access.into();
        let system = |e: Errno| SocketError::System { path: path.to_owned(), source: e.into() };
        if path.as_os_str().is_empty() {
            // It would bind to an abstract name of the kernel's choice.
            return Err(system(Errno::INVAL));
        }
        let address = SocketAddrUnix::new(path).map_err(system)?;
        let form = DraftForm::of(path).ok_or_else(|| system(Errno::ISDIR))?;
        let lock = lock_directory(path);
        if lock.is_some() {
            remove_remains(&form);
        }
        // What goes wrong here is done by a process that does not take the lock: no daemon of ours.
        for _ in 0..ATTEMPTS {
            let replaces = match look(path, &address).map_err(system)? {
                Found::Nothing => false,
                Found::Remains => true,
                Found::Living => return Err(SocketError::InUse(path.to_owned())),
                Found::SomethingElse => return Err(SocketError::NotASocket(path.to_owned())),
            };
            let draft = Draft::listen(&form, access).map_err(|Refused(is_group, e)| {
                match (is_group, access) {
                    (true, Access { group: Some(group), .. }) => {
                        SocketError::Group { path: path.to_owned(), group, source: e.into() }
                    }
                    _ => system(e),
                }
            })?;
            match draft.publish(&form, path, replaces) {
                Ok(socket) => return Ok(socket),
                Err(Errno::EXIST | Errno::NOENT) => {}
                Err(e) => return Err(system(e)),
            }
        }
        Err(SocketError::InUse(path.to_owned()))
    }

    /// What [`resume`](Self::resume) needs of its name.
    #[must_use]
    pub fn keep(&self) -> KeptName {
        let identity = *self.name.identity.lock().unwrap_or_else(PoisonError::into_inner);
        KeptName { path: self.name.path.clone(), identity }
    }

    /// Goes on with a socket that another program has made in this process.
    #[must_use]
    pub fn resume(kept: KeptName, listener: OwnedFd) -> Self {
        let KeptName { path, identity } = kept;
        let name = SocketName { path, identity: Mutex::new(identity) };
        SocketFile { listener: UnixListener::from(listener), name: Arc::new(name) }
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
        // Before the socket is closed: after that its inode's number may be another's.
        self.name.remove();
    }
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn stream_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// What is at a path.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A socket that refuses connections.
    Remains,
    /// A socket that takes connections.
    Living,
    SomethingElse,
}

fn look(path: &Path, address: &SocketAddrUnix) -> Result<Found, Errno> {
    match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => return Ok(Found::Nothing),
        Err(e) => return Err(e),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return Ok(Found::SomethingElse);
        }
        Ok(_) => {}
    }
    // Non-blocking, because a living daemon with a full backlog would keep us waiting.
    let probe = stream_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => Ok(Found::Remains),
        Err(Errno::NOENT) => Ok(Found::Nothing),
        // A process listens there: with a full backlog, or with a socket of another type.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Ok(Found::Living),
        Err(e) => Err(e),
    }
}

/// Removes what daemons of this user have left that were killed. What cannot be looked at stays.
fn remove_remains(form: &DraftForm) {
    let Ok(entries) = std::fs::read_dir(form.directory()) else { return };
    for name in entries.flatten().map(|entry| entry.file_name()) {
        if !form.fits(name.as_bytes()) {
            continue;
        }
        let path = form.path(name.as_bytes());
        let is_ours = rustix::fs::lstat(&path).is_ok_and(|stat| stat.st_uid == geteuid().as_raw());
        if is_ours && is_remains(&path) {
            log::debug!("{} is what a daemon that was killed has left", path.display());
            drop(DraftName(path));
        }
    }
}

/// A draft's name, which goes when this is dropped.
#[derive(Debug)]
struct DraftName(PathBuf);

impl Drop for DraftName {
    fn drop(&mut self) {
        // Empty if it has become another's. The next one that wants the name tries again.
        if !self.0.as_os_str().is_empty() {
            let _ = rustix::fs::unlink(&self.0);
        }
    }
}

/// A listening socket that has no public name yet.
struct Draft {
    socket: OwnedFd,
    name: DraftName,
    identity: (u64, u64),
}

/// Why there is no draft, and whether it was refused to the group.
#[derive(Debug)]
struct Refused(bool, Errno);

impl From<Errno> for Refused {
    fn from(e: Errno) -> Self {
        Refused(false, e)
    }
}

impl Draft {
    fn listen(form: &DraftForm, access: Access) -> Result<Draft, Refused> {
        let socket = stream_socket(SocketFlags::CLOEXEC)?;
        let mode = Mode::from_raw_mode(access.mode);
        // Another group than it is to have gets nothing meanwhile.
        let first = if access.group.is_some() { mode & Mode::RWXU } else { mode };
        rustix::fs::fchmod(&socket, first)?;
        let name = Self::bind(form, &socket)?;
        if let Some(group) = access.group {
            rustix::fs::chown(&name.0, None, Some(Gid::from_raw(group)))
                .map_err(|e| Refused(true, e))?;
        }
        let stat = rustix::fs::lstat(&name.0)?;
        if Mode::from_raw_mode(stat.st_mode) != mode {
            // The umask took away what the owner needs.
            rustix::fs::chmod(&name.0, mode)?;
        }
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Draft { socket, name, identity: identity(&stat) })
    }

    fn bind(form: &DraftForm, socket: &OwnedFd) -> Result<DraftName, Errno> {
        let mut attempt = 1;
        loop {
            let path = form.new_path();
            match rustix::net::bind(socket, &SocketAddrUnix::new(&path)?) {
                Ok(()) => return Ok(DraftName(path)),
                Err(Errno::ADDRINUSE) if attempt < ATTEMPTS => attempt += 1,
                Err(e) => return Err(e),
            }
        }
    }

    /// Gives it its name. `replaces`: remains are there, which may go. [`Errno::EXIST`] if another
    /// process has come.
    fn publish(self, form: &DraftForm, path: &Path, replaces: bool) -> Result<SocketFile, Errno> {
        let flags = if replaces { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
        let is_left = match rustix::fs::renameat_with(CWD, &self.name.0, CWD, path, flags) {
            Ok(()) if replaces && !is_remains(&self.name.0) => {
                self.undo(path);
                return Err(Errno::EXIST);
            }
            Ok(()) => replaces,
            // Not every file system can, nor every sandbox.
            Err(Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
                self.link(form, path, replaces)?;
                true
            }
            Err(e) => return Err(e),
        };
        Ok(self.published(path, is_left))
    }

    /// It has its name. `is_left`: there is something under the draft's name, which goes.
    fn published(mut self, path: &Path, is_left: bool) -> SocketFile {
        if !is_left {
            self.name.0 = PathBuf::new();
        }
        let name = SocketName { path: path.to_owned(), identity: Mutex::new(Some(self.identity)) };
        SocketFile { listener: UnixListener::from(self.socket), name: Arc::new(name) }
    }

    /// Puts back what was exchanged for this one and may not go.
    ///
    /// Others may do the same at the same time, and then each finds another's under its draft's
    /// name. So each goes on until it has its own: when all have, the path has the first one's. The
    /// process that finds its own at the path is done with one exchange more. If none does, one of
    /// theirs has to get there first.
    fn undo(mut self, path: &Path) {
        let is_ours = |path: &Path| {
            rustix::fs::lstat(path).is_ok_and(|stat| identity(&stat) == self.identity)
        };
        let deadline = Instant::now() + LOCK_PATIENCE;
        while !is_ours(&self.name.0) {
            let soon = Instant::now() + OTHERS_TURN;
            while !is_ours(path) && Instant::now() < soon {
                thread::sleep(Duration::from_micros(100));
            }
            let exchanged =
                rustix::fs::renameat_with(CWD, &self.name.0, CWD, path, RenameFlags::EXCHANGE);
            if (exchanged.is_err() || Instant::now() > deadline) && !is_ours(&self.name.0) {
                // It is not ours to remove.
                self.name.0 = PathBuf::new();
                return;
            }
        }
    }

    /// Gives it its name where there is no rename that spares what is there: a link does.
    fn link(&self, form: &DraftForm, path: &Path, replaces: bool) -> Result<(), Errno> {
        if replaces {
            let aside = form.new_path();
            rustix::fs::rename(path, &aside)?;
            if !is_remains(&aside) {
                rustix::fs::link(&aside, path)?;
                rustix::fs::unlink(&aside)?;
                return Err(Errno::EXIST);
            }
            let _ = rustix::fs::unlink(&aside);
        }
        rustix::fs::link(&self.name.0, path)
    }
}

/// Whether `path`, which is a socket, refuses connections.
fn is_remains(path: &Path) -> bool {
    SocketAddrUnix::new(path).and_then(|address| look(path, &address)) == Ok(Found::Remains)
}

/// Locks the directory of `path` among daemons, for as long as the descriptor is open.
///
/// It guards against accidents only, so it is given up rather than waited for: in a directory like
/// `/tmp` any user can hold such a lock, and must not be able to keep a daemon from starting or
/// ending.
fn lock_directory(path: &Path) -> Option<OwnedFd> {
    let parent =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::net::UnixStream;

    /// How a draft gets its name, and what it is told.
    type Way = fn(Draft, &DraftForm, &Path, bool) -> Result<SocketFile, Errno>;

    const WAYS: [(&str, Way); 2] = [
        ("by renaming", Draft::publish),
        ("by a link", |draft, form, path, replaces| {
            draft.link(form, path, replaces)?;
            Ok(draft.published(path, true))
        }),
    ];

    #[test]
    fn what_has_come_since_the_look_is_spared() {
        for (how, way) in WAYS {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let form = DraftForm::of(&path).unwrap();
            let publish =
                |replaces| way(Draft::listen(&form, 0o600.into()).unwrap(), &form, &path, replaces);
            let names = || fs::read_dir(directory.path()).unwrap().count();
            fs::write(&path, "precious").unwrap();
            for replaces in [false, true] {
                assert_eq!(publish(replaces).err(), Some(Errno::EXIST), "{how}");
                assert_eq!(fs::read_to_string(&path).unwrap(), "precious", "{how}");
                assert_eq!(names(), 1, "{how}");
            }
            fs::remove_file(&path).unwrap();
            let living = UnixListener::bind(&path).unwrap();
            for replaces in [false, true] {
                assert_eq!(publish(replaces).err(), Some(Errno::EXIST), "{how}");
                drop(UnixStream::connect(&path).unwrap());
                living.accept().unwrap();
                assert_eq!(names(), 1, "{how}");
            }
            drop(living);
            for replaces in [true, false] {
                let socket = publish(replaces).unwrap();
                UnixStream::connect(&path).unwrap();
                assert_eq!(names(), 1, "{how}");
                drop(socket);
                assert_eq!(names(), 0, "{how}");
            }
        }
    }
}
