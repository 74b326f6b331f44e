//! The end of the session that runs now, from any thread.

use super::frontend::Frontend;
use crate::phase::Phase;
use crate::sync::lock;
use std::sync::{Arc, Mutex};
use vhost_user_backend::ShutdownHandle;

/// What it takes to end a session.
pub(super) struct Running {
    pub(super) connection: ShutdownHandle,
    pub(super) frontend: Arc<Frontend>,
}

impl Running {
    /// Lets the frontend go when what is in flight has been answered. Does not wait for that.
    fn end(self) {
        let last = Arc::new(self);
        let end = {
            let last = Arc::clone(&last);
            move || {
                last.frontend.session.drain();
                last.frontend.session.context.phase.advance_to(Phase::Detached);
                last.connection.shutdown();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("drain".to_owned()).spawn(end) {
            log::warn!("no thread to wait for what is in flight: {error}");
            last.connection.shutdown();
        }
    }
}

/// What there is to end.
#[derive(Default)]
enum Slot {
    /// No session now.
    #[default]
    Idle,
    /// This one.
    Running(Running),
    /// The end has been asked for, and there will be no session any more.
    Stopped,
}

/// Makes the session that runs now end, from any thread.
#[derive(Default)]
pub struct SessionHandle {
    slot: Mutex<Slot>,
}

impl SessionHandle {
    /// Ends the session that runs now, when what is in flight has been answered, and every later
    /// one at its start. Does not wait for that.
    pub fn stop(&self) {
        let before = std::mem::replace(&mut *lock(&self.slot), Slot::Stopped);
        if let Slot::Running(running) = before {
            running.end();
        }
    }

    /// Ends the session that runs now, without another word to its ring, and every later one at its
    /// start: what its frontend has been told by now it may already go on from elsewhere. Does not
    /// wait.
    pub fn abandon(&self) {
        let before = std::mem::replace(&mut *lock(&self.slot), Slot::Stopped);
        if let Slot::Running(Running { connection, frontend }) = before {
            frontend.session.context.phase.advance_to(Phase::Detached);
            connection.shutdown();
        }
    }

    /// A session has begun.
    pub(super) fn begin(&self, running: Running) {
        let mut slot = lock(&self.slot);
        if matches!(*slot, Slot::Stopped) {
            drop(slot);
            running.end();
        } else {
            *slot = Slot::Running(running);
        }
    }

    /// The session is over.
    pub(super) fn over(&self) {
        let mut slot = lock(&self.slot);
        if matches!(*slot, Slot::Running(_)) {
            *slot = Slot::Idle;
        }
    }
}
