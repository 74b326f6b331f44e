//! `vhost-hotswap`: serves one virtio block device to a QEMU guest, and lets its implementation be
//! replaced under it.
//!
//! Start: arguments, domain, sockets. Then one session after the other, until a signal or
//! `hotswapctl shutdown` (`ending.rs`). End: the session's workers leave, the sockets are removed,
//! the domain writes down what it has.

use control::{Server, SocketFile};
use loader::FileLoader;
use log::Level;
use proxy::DomainProxy;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use vhost_hotswap::args::{Args, Config, Listen};
use vhost_hotswap::cpus;
use vhost_hotswap::device::Device;
use vhost_hotswap::ending::Ending;
use vhost_hotswap::log_limit::{self, how_to_have_more};
use vhost_hotswap::logging;
use vhost_hotswap::raw_fd::inherited;
use vhost_hotswap::session::{self, SessionConfig, SessionHandle};
use vhost_hotswap::signals;

/// How long frontends are left alone when one could not be served: it may come again at once.
const AFTER_A_FAILURE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

fn main() -> ExitCode {
    signals::ignore_strays();
    let config = Args::from_command_line();
    logging::start();
    match run(config) {
        Ok(left) if left.is_empty() => ExitCode::SUCCESS,
        Ok(left) => {
            left.iter().for_each(|what| log::error!("left behind: {what}"));
            ExitCode::FAILURE
        }
        Err(sentence) => {
            // It may not be possible to say it; that is no reason to panic.
            let _ = writeln!(std::io::stderr(), "vhost-hotswap: {sentence}");
            ExitCode::FAILURE
        }
    }
}

/// What there is to listen on, before anybody does.
enum Given {
    Path(PathBuf),
    Listener(UnixListener),
}

/// Where frontends come in.
enum Front {
    /// A socket of ours, removed at the end.
    Path(SocketFile),
    /// A socket that we were given.
    Inherited(UnixListener),
}

impl Front {
    fn listener(&self) -> &UnixListener {
        match self {
            Self::Path(socket) => socket.listener(),
            Self::Inherited(listener) => listener,
        }
    }
}

/// As many descriptors as are allowed: a queue takes up to 22 in an upgrade, and what many systems
/// begin with is 1024, for the sake of programs that use `select`.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        log::warn!("the limit of open descriptors stays {:?}: {error}", limit.current);
    }
}

/// Descriptors are opened by their names in `/proc`: each module, and an image once more.
fn check_proc() -> Result<(), String> {
    std::fs::symlink_metadata("/proc/self/fd").map(drop).map_err(|error| {
        format!(
            "/proc is not that of this process, and modules are loaded by it: mount it ({error})"
        )
    })
}

/// Serves until told to stop. Returns what had to be left.
fn run(config: Config) -> Result<Vec<String>, String> {
    check_proc()?;
    cpus::check(&config.worker_cpus)?;
    raise_descriptor_limit();
    // First of all that is opened, while no other descriptor can have the number.
    let given = match config.listen {
        Listen::Fd(fd) => Given::Listener(inherited(fd)?),
        Listen::Path(path) => Given::Path(path),
    };
    let ending = Ending::new().map_err(|error| format!("cannot make an eventfd: {error}"))?;
    ending.install_signals().map_err(|error| format!("cannot handle signals: {error}"))?;
    // Whoever sees a socket of ours may end us, so signals are heeded by then.
    let front = match given {
        Given::Path(path) => {
            Front::Path(ending.listen(&path, 0o600).map_err(|error| error.to_string())?)
        }
        Given::Listener(listener) => Front::Inherited(listener),
    };

    let loader = Box::new(FileLoader::new(config.domain_dirs));
    let proxy =
        DomainProxy::start(loader, &config.domain, config.params, usize::from(config.queues))
            .map_err(|refusal| refusal.to_string())?;
    let sessions = Arc::new(SessionHandle::default());
    ending.serving({
        let (proxy, sessions) = (Arc::clone(&proxy), Arc::clone(&sessions));
        move || {
            proxy.begin_stop();
            sessions.stop();
        }
    });
    let device = {
        let ending = Arc::clone(&ending);
        Arc::new(Device::new(Arc::clone(&proxy), move || ending.begin("shutdown")))
    };
    let control = Server::start(&config.control_path, Arc::clone(&device))
        .map_err(|error| error.to_string())?;
    ending.owns(control.name());

    let domain = proxy.domain();
    log::info!(
        "serving `{}` {} of {} bytes, {} queues of {}; commands at {}",
        domain.name,
        domain.version,
        domain.info.capacity,
        config.queues,
        config.queue_size,
        config.control_path.display()
    );
    let session_config = SessionConfig {
        queues: config.queues,
        queue_size: config.queue_size,
        poll: config.poll,
        worker_cpus: config.worker_cpus,
    };
    while wait_for_frontend(front.listener(), ending.wanted())? {
        match session::serve(
            &proxy,
            &session_config,
            front.listener(),
            &sessions,
            device.connected(),
        ) {
            Ok(()) => log::info!("the frontend has disconnected"),
            Err(session::Failure { kind, error }) => {
                let error = how_to_have_more(&error);
                log_limit::say(Level::Warn, kind, format_args!("the session ended: {error}"));
                // The next look finds the end, too.
                let _ = poll(
                    &mut [PollFd::new(ending.wanted(), PollFlags::IN)],
                    Some(&AFTER_A_FAILURE),
                );
            }
        }
    }
    drop(control);
    drop(front);
    Ok(proxy.stop())
}

/// Waits until a frontend wants in. `false` if it is time to stop.
fn wait_for_frontend(listener: &UnixListener, stop: &OwnedFd) -> Result<bool, String> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return Ok(false),
            Ok(_) if !fds[0].revents().is_empty() => return Ok(true),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("cannot wait for a frontend: {error}")),
        }
    }
}
