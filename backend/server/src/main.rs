//! `vhost-hotswap`: serves one virtio block device to a QEMU guest, and lets its implementation be
//! replaced under it.
//!
//! Start: arguments, domain, sockets. Then one session after the other, until a signal or
//! `hotswapctl shutdown` (`shutdown.rs`). End: the session's workers leave, the sockets are
//! removed, the domain writes down what it has.

use control::{Server, SocketFile};
use loader::{FileLoader, Policy};
use log::Level;
use proxy::DomainProxy;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;
use supervisor::notify::Manager;
use supervisor::supervisor::Supervision;
use vhost_hotswap::args::{Args, Config, Invocation, Listen};
use vhost_hotswap::cpus;
use vhost_hotswap::device::Device;
use vhost_hotswap::inflight::SharedInflight;
use vhost_hotswap::limiter::Limiter;
use vhost_hotswap::log_limit::{self, how_to_have_more};
use vhost_hotswap::logging;
use vhost_hotswap::raw_fd::{ListenVariables, passed};
use vhost_hotswap::second;
use vhost_hotswap::session::{self, Failure, SessionConfig, SessionHandle};
use vhost_hotswap::shutdown::Shutdown;
use vhost_hotswap::signals;
use vhost_hotswap::startup::{
    check_proc, frontends_access, given_listener, raise_descriptor_limit, trusted_keys,
};
use vhost_hotswap::supervised;
use vhost_hotswap::supervision;

/// How long frontends are left alone when one could not be served: it may come again at once.
const AFTER_A_FAILURE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

fn main() -> ExitCode {
    signals::ignore_strays();
    if let Some(status) = supervision::of_another_program() {
        return ExitCode::from(status);
    }
    let invocation = Args::from_command_line();
    logging::start(match &invocation {
        Invocation::Serve(config) => config.watching.log_format,
        Invocation::ServeChannel(_) | Invocation::PrintCapabilities => None,
    });
    let ended = match invocation {
        Invocation::Serve(config) => match config.supervision {
            None => run(*config),
            Some(supervision) => {
                return match supervise(*config, supervision) {
                    Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
                    Err(sentence) => refused(&sentence),
                };
            }
        },
        Invocation::ServeChannel(fd) => {
            supervision::take_name();
            supervised::run(fd)
        }
        // Printed by then.
        Invocation::PrintCapabilities => Ok(Vec::new()),
    };
    let status = match ended {
        Ok(left) if left.is_empty() => ExitCode::SUCCESS,
        Ok(left) => {
            left.iter().for_each(|what| log::error!("left behind: {what}"));
            ExitCode::FAILURE
        }
        Err(sentence) => refused(&sentence),
    };
    // One that was refused may have opened an image, which others would wait for.
    ceph::close_all();
    status
}

fn refused(sentence: &str) -> ExitCode {
    logging::say_last(sentence);
    ExitCode::FAILURE
}

/// What both kinds of process need; then the supervisor.
fn supervise(config: Config, supervision: Supervision) -> Result<i32, String> {
    check_proc()?;
    cpus::check(&config.worker_cpus)?;
    raise_descriptor_limit();
    supervision::supervise(config, supervision)
}

/// Where frontends come in.
enum ListenSocket {
    /// A socket of the daemon's own, removed at the end.
    Path(SocketFile),
    /// A socket that was given.
    Inherited(UnixListener),
}

impl ListenSocket {
    fn listener(&self) -> &UnixListener {
        match self {
            Self::Path(socket) => socket.listener(),
            Self::Inherited(listener) => listener,
        }
    }
}

/// Serves until told to stop. Returns what had to be left.
fn run(config: Config) -> Result<Vec<String>, String> {
    check_proc()?;
    cpus::check(&config.worker_cpus)?;
    raise_descriptor_limit();
    // First of all that is opened, while no other descriptor can have the number.
    let mut passed = passed(&ListenVariables::of_environment())?;
    let given = given_listener(&config.listen, &mut passed)?;
    let access = frontends_access(&config)?;
    let policy = Policy { trusted_keys: trusted_keys(&config)?, ..Policy::default() };
    let manager = Manager::from_environment();
    let shutdown = Shutdown::new().map_err(|error| format!("cannot make an eventfd: {error}"))?;
    shutdown.install_signals().map_err(|error| format!("cannot handle signals: {error}"))?;
    // A process that sees the socket may end this one, so signals are handled by then.
    let socket = match (given, config.listen) {
        (Some(listener), _) => ListenSocket::Inherited(listener),
        (None, Listen::Path(path)) => {
            ListenSocket::Path(shutdown.listen(&path, access).map_err(|error| error.to_string())?)
        }
        (None, Listen::Fd(_) | Listen::Activated) => {
            return Err("there is no listening socket".to_owned());
        }
    };

    let loader = Box::new(FileLoader::with_policy(config.domain_dirs, policy));
    let (opener, queues) = (Some(ceph::opener()), usize::from(config.queues));
    let proxy = DomainProxy::start_with(loader, opener, &config.domain, config.params, queues)
        .map_err(|refusal| refusal.to_string())?;
    let sessions = Arc::new(SessionHandle::default());
    shutdown.serving({
        let (proxy, sessions) = (Arc::clone(&proxy), Arc::clone(&sessions));
        move || {
            proxy.begin_stop();
            sessions.stop();
        }
    });
    let limiter = Arc::new(Limiter::new(config.limits));
    let device = {
        let (proxy, shutdown) = (Arc::clone(&proxy), Arc::clone(&shutdown));
        Arc::new(Device::new(proxy, Arc::clone(&limiter), move || shutdown.begin("shutdown")))
    };
    let control = Server::start(&config.control_path, Arc::clone(&device))
        .map_err(|error| error.to_string())?;
    shutdown.owns(control.name());

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
    if let Some(Err(error)) = manager.map(|manager| manager.say("READY=1\n", None)) {
        log::warn!("the service manager cannot be told anything: {error}");
    }
    let session_config = SessionConfig {
        queues: config.queues,
        queue_size: config.queue_size,
        poll: config.poll,
        worker_cpus: config.worker_cpus,
        inflight: SharedInflight::default(),
        limiter,
        counters: None,
    };
    while wait_for_frontend(socket.listener(), shutdown.wanted())? {
        let connected = device.connected();
        let serve =
            || session::serve(&proxy, &session_config, socket.listener(), &sessions, connected);
        let served = second::turned_away_while(socket.listener(), connected, serve);
        match served.map_err(Failure::from).flatten() {
            Ok(()) => log::info!("the frontend has disconnected"),
            Err(Failure { kind, error }) => {
                let error = how_to_have_more(&error);
                log_limit::say(Level::Warn, kind, format_args!("the session ended: {error}"));
                // The next look finds the end, too.
                let _ = poll(
                    &mut [PollFd::new(shutdown.wanted(), PollFlags::IN)],
                    Some(&AFTER_A_FAILURE),
                );
            }
        }
    }
    drop(control);
    drop(socket);
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
