//! A service manager that keeps what the daemon stores in it, as systemd does, and hands it to the
//! next start.
//!
//! As systemd, it refuses nothing aloud: what finds no room, and a file that is there already under
//! another name, is dropped without a word; and the order in which entries come back is turned
//! round at each start.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, IoSliceMut, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tempfile::TempDir;

use crate::PATIENCE;
use crate::daemon::binary;

/// Descriptors are handed over from numbers that none of those has which they are to get.
const AWAY: RawFd = 200;

/// What it has.
#[derive(Debug, Default)]
struct Shelf {
    limit: usize,
    entries: Vec<(String, File)>,
    texts: Vec<String>,
}

/// A manager.
#[derive(Debug)]
pub struct Manager {
    directory: TempDir,
    shelf: Arc<Mutex<Shelf>>,
    says_limit: bool,
    listeners: Vec<(String, UnixListener)>,
    is_turned: bool,
    _handed_over: Vec<OwnedFd>,
}

impl Manager {
    /// One that has room for `limit` entries, and says so.
    pub fn new(limit: usize) -> Manager {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let socket = UnixDatagram::bind(directory.path().join("notify")).expect("a socket");
        let shelf = Arc::new(Mutex::new(Shelf { limit, ..Shelf::default() }));
        let told = Arc::clone(&shelf);
        // It ends with the process.
        thread::spawn(move || {
            while let Some((text, descriptors)) = receive(&socket) {
                lock(&told).is_told(&text, descriptors);
            }
        });
        Manager {
            directory,
            shelf,
            says_limit: true,
            listeners: Vec::new(),
            is_turned: false,
            _handed_over: Vec::new(),
        }
    }

    /// It does not say how much room there is.
    pub fn without_a_word(mut self) -> Manager {
        self.says_limit = false;
        self
    }

    /// A socket unit's socket, which it passes under this name.
    pub fn listen(&mut self, name: &str, file: &str) -> std::path::PathBuf {
        let path = self.directory.path().join(file);
        let listener = UnixListener::bind(&path).expect("a listening socket");
        self.listeners.push((name.to_owned(), listener));
        path
    }

    /// A command that starts the daemon with what there is; its arguments are to be added.
    pub fn command(&mut self) -> Command {
        let shelf = lock(&self.shelf);
        let mut stored: Vec<_> = shelf.entries.iter().collect();
        self.is_turned = !self.is_turned;
        if self.is_turned {
            stored.reverse();
        }
        let mut passed: Vec<(String, OwnedFd)> = Vec::new();
        for (name, listener) in &self.listeners {
            let away = fcntl_dupfd_cloexec(listener, AWAY).expect("a descriptor");
            passed.push((name.clone(), away));
        }
        for (name, file) in stored {
            let away = fcntl_dupfd_cloexec(file, AWAY).expect("a descriptor");
            passed.push((name.clone(), away));
        }
        let mut script = String::from("export LISTEN_PID=$$; exec \"$0\" \"$@\"");
        for (number, (_, away)) in (3..).zip(&passed) {
            fcntl_setfd(away, FdFlags::empty()).expect("flags");
            script.push_str(&format!(" {number}<&{}-", away.as_raw_fd()));
        }
        let names: Vec<&str> = passed.iter().map(|(name, _)| name.as_str()).collect();
        let mut command = Command::new("bash");
        command.arg("-c").arg(script).arg(binary("vhost-hotswap"));
        command.env("NOTIFY_SOCKET", self.directory.path().join("notify"));
        command.env("LISTEN_FDS", passed.len().to_string());
        command.env("LISTEN_FDNAMES", names.join(":"));
        if self.says_limit {
            command.env("FDSTORE", shelf.limit.to_string());
        }
        drop(shelf);
        // Until the next start at least.
        self._handed_over = passed.into_iter().map(|(_, away)| away).collect();
        command
    }

    /// The names of what is stored, in order.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            lock(&self.shelf).entries.iter().map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names
    }

    /// Waits until it was told this.
    ///
    /// # Panics
    ///
    /// Panics when it is not within 10 s.
    pub fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !lock(&self.shelf).texts.iter().any(|told| told.contains(text)) {
            assert!(Instant::now() < deadline, "{text}: {:?}", lock(&self.shelf).texts);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Does something to what is stored.
    pub fn spoil(&self, spoil: impl FnOnce(&mut Vec<(String, File)>)) {
        spoil(&mut lock(&self.shelf).entries);
    }
}

impl Shelf {
    fn is_told(&mut self, text: &str, descriptors: Vec<OwnedFd>) {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        let name = value("FDNAME=").unwrap_or("stored").to_owned();
        if value("FDSTOREREMOVE=").is_some() {
            self.entries.retain(|(other, _)| *other != name);
        } else if value("FDSTORE=").is_some() {
            for file in descriptors.into_iter().map(File::from) {
                let is_same = |(_, other): &(String, File)| identity(other) == identity(&file);
                if self.entries.len() < self.limit && !self.entries.iter().any(is_same) {
                    self.entries.push((name.clone(), file));
                }
            }
        } else if value("BARRIER=").is_none() {
            self.texts.push(text.to_owned());
        }
    }
}

fn identity(file: &File) -> (u64, u64) {
    let metadata = file.metadata().expect("a file");
    (metadata.dev(), metadata.ino())
}

fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut text)];
    let received = recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC).ok()?;
    let rights = |message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    };
    let descriptors = ancillary.drain().flat_map(rights).collect();
    Some((String::from_utf8_lossy(&text[..received.bytes]).into_owned(), descriptors))
}

fn lock(shelf: &Mutex<Shelf>) -> MutexGuard<'_, Shelf> {
    shelf.lock().unwrap_or_else(PoisonError::into_inner)
}
