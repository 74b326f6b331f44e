//! The daemon's end: what may ask for it, and what sees to it that it comes.
//!
//! A signal or the control socket asks. While the device is being set up there is nothing to be
//! lost, and the process ends at once, even if a domain does not come back from being prepared.
//! Afterwards the main thread is told, and ends what there is, in its order; if that takes too
//! long, the process ends without.
//!
//! Invariants: nothing waits before the watch over the end has begun; a socket's name is removed
//! once, by the thread that comes first, and only while it is ours.

use crate::signals;
use crate::sync::lock;
use control::{Access, SocketError, SocketFile, SocketName};
use rustix::event::{EventfdFlags, eventfd};
use signal_hook::iterator::Signals;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long stopping may take before what is left is left.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// Tells the threads that do the work that it is over. Must not wait.
type Tell = Box<dyn Fn() + Send>;

enum ProcessState {
    /// There is no device yet.
    Starting,
    /// There is one.
    Serving(Tell),
    /// It has been told.
    Ending,
}

/// The daemon's end.
pub struct Shutdown {
    wanted: OwnedFd,
    state: Mutex<ProcessState>,
    names: Mutex<Vec<Arc<SocketName>>>,
}

impl Shutdown {
    /// Not yet.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn new() -> io::Result<Arc<Self>> {
        let wanted = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Arc::new(Self {
            wanted,
            state: Mutex::new(ProcessState::Starting),
            names: Mutex::default(),
        }))
    }

    /// Readable from when the end is wanted on.
    pub const fn wanted(&self) -> &OwnedFd {
        &self.wanted
    }

    /// Listens on a socket whose name is removed even if its owner does not come to it. A process
    /// that sees it may want the end at once, which therefore waits until the name is noted.
    ///
    /// # Errors
    /// As for [`SocketFile::listen`].
    pub fn listen(&self, path: &Path, access: Access) -> Result<SocketFile, SocketError> {
        let mut names = lock(&self.names);
        let socket = SocketFile::listen(path, access)?;
        names.push(Arc::clone(socket.name()));
        Ok(socket)
    }

    /// Has a name removed even if its owner does not come to it.
    pub fn owns(&self, name: &Arc<SocketName>) {
        lock(&self.names).push(Arc::clone(name));
    }

    /// There is a device from now on: `tell` is how its end begins.
    pub fn serving(&self, tell: impl Fn() + Send + 'static) {
        *lock(&self.state) = ProcessState::Serving(Box::new(tell));
    }

    /// Has [some signals](signals::ending) begin the end, also if they were blocked.
    ///
    /// # Errors
    /// Signals cannot be handled, or there is no thread left.
    pub fn install_signals(self: &Arc<Self>) -> io::Result<()> {
        let mut signals = Signals::new(signals::ending())?;
        signals::unblock();
        let shutdown = Arc::clone(self);
        let watch = move || {
            for signal in signals.forever() {
                shutdown.begin(&format!("signal {signal}"));
            }
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(watch)?;
        Ok(())
    }

    /// Begins the end, and returns at once.
    pub fn begin(self: &Arc<Self>, why: &str) {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut *state, ProcessState::Ending) {
            ProcessState::Starting => {
                log::info!("{why}: stopping before anything is served");
                self.end(0);
            }
            ProcessState::Serving(tell) => {
                self.watch();
                tell();
                let _ = rustix::io::write(&self.wanted, &1u64.to_ne_bytes());
                log::info!("{why}: stopping");
            }
            ProcessState::Ending => log::info!("{why}: stopping already"),
        }
    }

    /// A domain that does not come back must not keep the process.
    fn watch(self: &Arc<Self>) {
        let shutdown = Arc::clone(self);
        let watched = std::thread::Builder::new().name("end".to_owned()).spawn(move || {
            std::thread::sleep(STOP_TIMEOUT);
            log::error!(
                "not stopped after {} s; what is in flight is left",
                STOP_TIMEOUT.as_secs()
            );
            shutdown.end(1);
        });
        if let Err(error) = watched {
            log::warn!("there is no watch over the end: {error}");
        }
    }

    fn end(&self, status: i32) -> ! {
        lock(&self.names).iter().for_each(|name| name.remove());
        std::process::exit(status)
    }
}
