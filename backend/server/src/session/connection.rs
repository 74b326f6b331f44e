//! The frontend's connection, as far as it is ended from this side.

use crate::sync::lock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vhost_user_backend::ShutdownHandle;

/// How long a frontend that is refused something may take to read that.
const TO_READ_A_REFUSAL: Duration = Duration::from_millis(200);

/// The connection of one session.
#[derive(Default)]
pub(super) struct Connection {
    /// Ends it, once there is one.
    shutdown: Mutex<Option<ShutdownHandle>>,
    /// The frontend was refused something, and its connection is about to be ended.
    is_refused: AtomicBool,
}

impl Connection {
    /// There is one from now on, or, with `None`, not any more.
    pub(super) fn set(&self, shutdown: Option<ShutdownHandle>) {
        *lock(&self.shutdown) = shutdown;
    }

    /// Ends it now.
    pub(super) fn end(&self) {
        if let Some(handle) = lock(&self.shutdown).as_ref() {
            handle.shutdown();
        }
    }

    /// Whether it is about to be ended because its frontend was refused something.
    pub(super) fn is_refused(&self) -> bool {
        self.is_refused.load(Ordering::Relaxed)
    }

    /// Ends it when its frontend has had the time to read an answer that refuses it something. The
    /// `vhost` crate's frontend (Cloud Hypervisor's, for one) would wait for the rest of such an
    /// answer for ever; QEMU's gives up by itself.
    pub(super) fn end_soon(self: &Arc<Self>) {
        if self.is_refused.swap(true, Ordering::Relaxed) {
            return;
        }
        let connection = Arc::downgrade(self);
        let end = move || {
            std::thread::sleep(TO_READ_A_REFUSAL);
            if let Some(connection) = connection.upgrade() {
                connection.end();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("refuse".to_owned()).spawn(end) {
            log::warn!("no thread to end the session that was refused something: {error}");
        }
    }
}
