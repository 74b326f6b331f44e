//! One client of the control socket: its lines in, its replies and events out.
//!
//! Requests are answered one after the other, in the order in which they came. A client that
//! watches goes on being answered: between two events there is always room for a request, and
//! between two requests for an event.
//!
//! Invariants: at most one line and one read are kept in memory; a line that has no end is never
//! acted on, because half a command may be another command; a client that does not fetch its
//! replies is cut off, not waited for.
//!
//! It does not know how many other clients there are, nor which users may be one.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::{Value, json};

use crate::clients::Activity;
use crate::code::Code;
use crate::limits::Limits;
use crate::lines::{Line, Lines};
use crate::operations::Operations;
use crate::rpc::{self, Action, Method, RpcError};

/// How long a watching client's thread waits for an event before it looks at its socket again.
const WATCH_STEP: Duration = Duration::from_millis(100);

/// A connected client.
pub(crate) struct Connection<O> {
    stream: Arc<UnixStream>,
    operations: Arc<O>,
    limits: Limits,
    lines: Lines,
    /// The number of the last event sent, once the client watches.
    watching: Option<u64>,
}

impl<O: Operations> Connection<O> {
    pub(crate) fn new(stream: Arc<UnixStream>, operations: Arc<O>, limits: Limits) -> Self {
        Self { stream, operations, limits, lines: Lines::new(limits.line), watching: None }
    }

    /// Serves the client until it leaves, is cut off, or `stopping` is set and its socket shut
    /// down.
    ///
    /// Says in `activity` when it waits for the client to say something.
    pub(crate) fn run(mut self, stopping: &AtomicBool, activity: &Activity) {
        let ended = self
            .stream
            .set_write_timeout(Some(self.limits.write_timeout))
            .and_then(|()| self.talk(stopping, activity));
        match ended {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                log::warn!(
                    "a client of the control socket does not read what it asked for; it is cut off"
                );
            }
            Err(e) => log::debug!("a client of the control socket is gone: {e}"),
        }
    }

    fn talk(&mut self, stopping: &AtomicBool, activity: &Activity) -> io::Result<()> {
        // Whether the client has ended its side. One that watches may still be listening.
        let mut ended = false;
        loop {
            let line = self.lines.next_line();
            let idle = line.is_none();
            match line {
                Some(_) if stopping.load(Ordering::Relaxed) => return Ok(()),
                Some(line) => self.answer(line)?,
                None if ended => {}
                None if self.watching.is_some() && !self.readable()? => {}
                None if self.watching.is_some() => ended = !self.lines.fill(&*self.stream)?,
                None => match activity.idle_during(|| self.lines.fill(&*self.stream)) {
                    Some(more) => ended = !more?,
                    None => return Ok(()),
                },
            }
            if ended
                && idle
                && let Some(half) = self.lines.finish()
            {
                self.answer(half)?;
            }
            match self.watching {
                None if ended && idle => return Ok(()),
                None => {}
                Some(_) if stopping.load(Ordering::Relaxed) || (ended && self.hung_up()?) => {
                    return Ok(());
                }
                Some(after) => {
                    self.pass_event_on(after, if idle { WATCH_STEP } else { Duration::ZERO })?
                }
            }
        }
    }

    fn answer(&mut self, line: Line) -> io::Result<()> {
        let call = match rpc::parse_line(&line, self.limits.line) {
            Ok(call) => call,
            Err((id, error)) => return self.send(&rpc::reply(id, Err(error))),
        };
        // The daemon ends its connections when it is told to end, so the reply has to be out
        // before.
        let shutdown = matches!(&call.method, Ok(method) if method.action == Action::Shutdown);
        let result = call.method.and_then(|method| self.perform(method));
        let shutdown = shutdown && result.is_ok();
        let sent = call.id.map_or(Ok(()), |id| self.send(&rpc::reply(id, result)));
        if shutdown {
            self.operations.shutdown();
        }
        sent
    }

    /// Does what a method says; a panic in it is the client's to hear of, and not its thread's end.
    fn perform(&mut self, method: Method) -> Result<Value, RpcError> {
        let operations = &*self.operations;
        method.check_device(operations.device())?;
        let watching = &mut self.watching;
        // Unwind safety: all that a panic can leave half done is behind `operations`, whose own
        // affair it is.
        let done = catch_unwind(AssertUnwindSafe(|| match method.action {
            Action::Status => Ok(operations.status()),
            Action::History => Ok(operations.history()),
            Action::Check(request) => Ok(operations.check(request)?),
            Action::Upgrade(request) => Ok(operations.upgrade(request)?),
            Action::Rollback(request) => Ok(operations.rollback(request)?),
            Action::UpgradeDaemon(_) => Err(RpcError::new(
                Code::NoSupervisor,
                "this daemon is one process, and cannot be exchanged under its guest; start it anew",
            )),
            Action::Metrics => Ok(operations.metrics()?),
            Action::Resize(request) => Ok(operations.resize(request)?),
            Action::Limit(request) => Ok(operations.limit(request)?),
            Action::Watch => {
                // Watching twice is watching.
                watching.get_or_insert_with(|| operations.last_event());
                Ok(json!({"watching": true}))
            }
            Action::Shutdown => Ok(json!({"shutting_down": true})),
        }));
        done.unwrap_or_else(|_| {
            log::error!("an operation of the control socket has panicked");
            Err(RpcError::new(
                Code::InternalError,
                "the daemon has failed at this; its log says where",
            ))
        })
    }

    fn pass_event_on(&mut self, after: u64, timeout: Duration) -> io::Result<()> {
        if let Some((number, event)) = self.operations.next_event(after, timeout) {
            assert!(number > after, "events are numbered upwards");
            self.watching = Some(number);
            self.send(&rpc::event(number, event))?;
        }
        Ok(())
    }

    /// Sends a line, in a bounded time even to a client that takes it byte by byte.
    fn send(&self, message: &Value) -> io::Result<()> {
        let line = format!("{message}\n");
        let mut rest = line.as_bytes();
        let deadline = Instant::now() + self.limits.write_timeout;
        while !rest.is_empty() {
            match (&*self.stream).write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written..],
                // This is how a write says that its time is over.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if !rest.is_empty() && Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// Whether a read would not wait.
    fn readable(&self) -> io::Result<bool> {
        Ok(!self.look(PollFlags::IN)?.is_empty())
    }

    /// Whether the client has closed its socket altogether, not just ended its side.
    fn hung_up(&self) -> io::Result<bool> {
        Ok(self.look(PollFlags::empty())?.intersects(PollFlags::HUP | PollFlags::ERR))
    }

    fn look(&self, interest: PollFlags) -> io::Result<PollFlags> {
        let mut fds = [PollFd::new(&*self.stream, interest)];
        match rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(_) => Ok(fds[0].revents()),
            Err(rustix::io::Errno::INTR) => Ok(PollFlags::empty()),
            Err(e) => Err(e.into()),
        }
    }
}
