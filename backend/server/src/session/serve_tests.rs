//! Sessions from beginning to end, with a frontend that says nothing.

use super::config::SessionConfig;
use super::handle::SessionHandle;
use super::serve::serve;
use crate::inflight::SharedInflight;
use crate::testing::{PATIENCE, Puppets, SIZE, Silent, until};
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// A device that waits for frontends.
struct Bench {
    puppets: Puppets,
    directory: TempDir,
    listener: UnixListener,
    handle: SessionHandle,
    is_connected: AtomicBool,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(directory.path().join("socket")).expect("a socket");
        let (handle, is_connected) = (SessionHandle::default(), AtomicBool::new(false));
        Self { puppets: Puppets::start(2, &[]), directory, listener, handle, is_connected }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("socket")).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }

    /// Serves one frontend, which must end well.
    fn serve(&self) {
        let config = SessionConfig {
            queues: 2,
            queue_size: SIZE,
            poll: Duration::ZERO,
            worker_cpus: Vec::new(),
            inflight: SharedInflight::default(),
            limiter: std::sync::Arc::default(),
            counters: None,
        };
        let proxy = &self.puppets.proxy;
        serve(proxy, &config, &self.listener, &self.handle, &self.is_connected)
            .expect("the session ends well");
        assert!(!self.is_connected.load(Ordering::Relaxed));
    }

    /// Serves a frontend that goes.
    fn one_session(&self) {
        let frontend = self.connect();
        std::thread::scope(|scope| {
            let session = scope.spawn(|| self.serve());
            self.wait_connected();
            drop(frontend);
            session.join().expect("no panic");
        });
    }

    /// Serves a frontend that stays, after `when`. Returns whether it is let go.
    fn is_let_go(&self, when: impl FnOnce(&Self)) -> bool {
        let mut frontend = self.connect();
        std::thread::scope(|scope| {
            let session = scope.spawn(|| self.serve());
            when(self);
            let is_closed = matches!(frontend.read(&mut [0; 16]), Ok(0));
            // So that a session that was not ended is.
            drop(frontend);
            session.join().expect("no panic");
            is_closed
        })
    }

    fn wait_connected(&self) {
        until("no session", || self.is_connected.load(Ordering::Relaxed));
    }
}

#[test]
fn frontends_come_and_go_one_after_the_other() {
    let bench = Bench::new();
    (0..3).for_each(|_| bench.one_session());
    let lines = |what| bench.puppets.stage.lines("a", what).len();
    assert_eq!(lines("detach"), 6, "each worker of each session has left");
    assert!(bench.puppets.proxy.worker(0, 4, Box::new(Silent)).is_some());
}

#[test]
fn a_session_that_is_stopped_lets_its_frontend_go() {
    let bench = Bench::new();
    assert!(bench.is_let_go(|bench| {
        bench.wait_connected();
        bench.handle.stop();
    }));
}

#[test]
fn after_a_stop_each_session_ends_at_its_start() {
    let bench = Bench::new();
    bench.handle.stop();
    assert!(bench.is_let_go(|_| {}));
    assert!(bench.is_let_go(|_| {}));
}

#[test]
fn a_stop_between_two_sessions_is_not_forgotten() {
    let bench = Bench::new();
    bench.one_session();
    bench.handle.stop();
    bench.handle.stop();
    assert!(bench.is_let_go(|_| {}));
}
