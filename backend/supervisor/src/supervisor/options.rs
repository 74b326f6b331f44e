//! What a supervisor is started with.

use super::Metrics;
use crate::process::Program;
use channel::Settings;
use control::SocketFile;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;
use telemetry::Book;

/// Where frontends come in.
#[derive(Debug)]
pub enum ListenSocket {
    /// A socket of our own, whose name is removed at the end.
    Path(SocketFile),
    /// A socket that was given.
    Inherited(UnixListener),
}

impl ListenSocket {
    pub(super) fn listener(&self) -> &UnixListener {
        match self {
            Self::Path(socket) => socket.listener(),
            Self::Inherited(listener) => listener,
        }
    }
}

/// How the process that serves is looked after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Supervision {
    /// Another one is ready for when it dies.
    pub has_spare: bool,
    /// It is ended when its workers have not moved for so long.
    pub hang_timeout: Option<Duration>,
}

/// How the signals that end the daemon are kept from getting lost while the program is exchanged.
#[derive(Debug, Clone, Copy)]
pub struct Signals {
    /// None is delivered from now on; over an `exec`, too.
    pub hold: fn(),
    /// What was held is delivered; what signals do is set again, in case a failed `exec` has
    /// changed it.
    pub release: fn(),
}

/// What a supervisor is started with.
#[derive(Debug)]
pub struct Options {
    /// Where frontends come in.
    pub frontends: ListenSocket,
    /// Where clients of `hotswapctl` come in, from when there is a device on.
    pub control_path: PathBuf,
    /// What servers run.
    pub program: Program,
    /// What does not change.
    pub settings: Settings,
    /// The first module: a name or a path.
    pub domain: String,
    /// Its parameters.
    pub params: BTreeMap<String, String>,
    /// Metrics, if they are wanted.
    pub metrics: Option<Metrics>,
    /// What has happened before, and where it is kept.
    pub book: Book,
    /// How servers are looked after.
    pub supervision: Supervision,
    /// What asks for the end: a word for the log, and a descriptor that is readable then.
    pub ends: Vec<(String, OwnedFd)>,
    /// How signals are held.
    pub signals: Signals,
}
