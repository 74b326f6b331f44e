//! A second frontend, where there is room for one.
//!
//! Without a supervisor one session is served at a time. A frontend that connects meanwhile would
//! stay in the backlog, and its whole guest with it. So it is let in and closed, which its QEMU
//! takes as an error.

use crate::log_limit;
use log::Level;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

/// How long one that has connected is left alone: it may be the first one, which has hung up and
/// comes again, and that is known by then.
const TO_HANG_UP: Timespec = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };

/// Serves a frontend with `serve`, and turns away those that come to `listener` while it is
/// `connected`.
///
/// # Errors
/// There is no descriptor for the end.
pub fn turned_away_while<T>(
    listener: &UnixListener,
    connected: &AtomicBool,
    serve: impl FnOnce() -> T,
) -> io::Result<T> {
    let over = eventfd(0, EventfdFlags::CLOEXEC)?;
    Ok(std::thread::scope(|scope| {
        let turn_away = || turn_away(listener, connected, &over);
        if let Err(error) =
            std::thread::Builder::new().name("second".to_owned()).spawn_scoped(scope, turn_away)
        {
            log::warn!("no thread to turn a second frontend away: {error}");
        }
        let served = serve();
        // An eventfd that was not written to has room.
        let _ = rustix::io::write(&over, &1_u64.to_ne_bytes());
        served
    }))
}

/// Until it is `over`.
fn turn_away(listener: &UnixListener, connected: &AtomicBool, over: &OwnedFd) {
    loop {
        // Before it is connected, what comes is the one to be served.
        let serves = connected.load(Ordering::Relaxed);
        let wants = if serves { PollFlags::IN } else { PollFlags::empty() };
        let mut fds =
            [PollFd::new(over, PollFlags::IN), PollFd::from_borrowed_fd(listener.as_fd(), wants)];
        let limit = (!serves).then_some(TO_HANG_UP);
        let polled = poll(&mut fds, limit.as_ref());
        if !fds[0].revents().is_empty() || polled.is_err_and(|e| e != rustix::io::Errno::INTR) {
            return;
        }
        if !serves || fds[1].revents().is_empty() {
            continue;
        }
        if poll(&mut fds[..1], Some(&TO_HANG_UP)) != Ok(0) || !connected.load(Ordering::Relaxed) {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                drop(stream);
                log_limit::say(
                    Level::Warn,
                    "second frontend",
                    format_args!(
                        "a second frontend has connected, and is turned away: one is served, and only with a supervisor can another one wait"
                    ),
                );
            }
            // It has gone.
            Err(_) => continue,
        }
    }
}
