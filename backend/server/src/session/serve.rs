//! A session from its beginning to its end.

use super::beginning::Beginning;
use super::config::SessionConfig;
use super::frontend::{Backend, Failure, Frontend};
use super::handle::{Running, SessionHandle};
use super::state::Session;
use proxy::DomainProxy;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtqueue::GuestMemory;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::epoll::EventSet;

/// Serves one connection, which must be waiting at `listener`, until it ends.
///
/// # Errors
/// The session could not be set up, or the frontend broke the protocol. The device is ready for the
/// next one in any case.
pub fn serve(
    proxy: &Arc<DomainProxy>,
    config: &SessionConfig,
    listener: &UnixListener,
    handle: &SessionHandle,
    connected: &AtomicBool,
) -> Result<(), Failure> {
    serve_from(proxy, config, listener, handle, connected, Beginning::default())
}

/// As [`serve`], with what the frontend does not say.
///
/// # Errors
/// As for [`serve`].
pub fn serve_from(
    proxy: &Arc<DomainProxy>,
    config: &SessionConfig,
    listener: &UnixListener,
    handle: &SessionHandle,
    connected: &AtomicBool,
    beginning: Beginning,
) -> Result<(), Failure> {
    use vhost::vhost_user::Error::{Disconnected, PartialMessage};
    use vhost_user_backend::Error::HandleRequest;

    let memory = GuestMemoryAtomic::new(GuestMemory::new());
    let session = Session::new(proxy, config, memory.clone())?;
    let frontend = Arc::new(Frontend::new(session));
    frontend.begin(beginning);
    let Session { context, queues, exit_events } = &frontend.session;

    let other = |error: vhost_user_backend::Error| io::Error::other(error.to_string());
    let backend = Backend(Arc::clone(&frontend));
    let mut daemon =
        VhostUserDaemon::new("vhost-user".to_owned(), backend, memory).map_err(other)?;
    let threads = daemon.get_epoll_handlers();
    for (control, thread) in queues.iter().zip(&threads) {
        thread.register_listener(control.wake_fd(), EventSet::IN, frontend.wake_id())?;
        thread.register_listener(control.alarm_fd(), EventSet::IN, frontend.alarm_id())?;
    }
    if let Some(first) = threads.first() {
        first.register_listener(context.lookout.fd(), EventSet::IN, frontend.look_id())?;
    }
    drop(threads);
    // Each thread has been here once before the frontend can break it: from then on its end is
    // noticed.
    for queue in 0..queues.len() {
        frontend.session.drain_queue(queue).map_err(io::Error::other)?;
    }
    let started = daemon
        .start(&mut Listener::from(listener.try_clone()?))
        .map_err(|error| Failure::from(other(error)));
    let ended = started.and_then(|()| {
        if let Some(connection) = daemon.shutdown_handle() {
            handle.begin(Running { connection, frontend: Arc::clone(&frontend) });
        }
        context.connection.set(daemon.shutdown_handle());
        connected.store(true, Ordering::Relaxed);
        proxy.connected(true);
        let ended = daemon.wait();
        connected.store(false, Ordering::Relaxed);
        proxy.connected(false);
        handle.over();
        context.connection.set(None);
        match ended {
            // How frontends go: between two messages, or in the middle of one.
            Err(HandleRequest(Disconnected | PartialMessage)) => Ok(()),
            ended => ended.map_err(|error| frontend.explain(&error)),
        }
    });
    frontend.session.close();
    // Joins the threads; their workers have left.
    drop(daemon);
    exit_events.close();
    ended
}
