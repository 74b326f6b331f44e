//! One client of the control socket: its lines in, its replies and events out.
//!
//! Requests are answered one after the other, in the order in which they came. A client that
//! watches goes on being answered: between two events there is always room for a request, and
//! between two requests for an event.
//!
//! Invariants: at most one line and one read are kept in memory; a line that has no end is never
//! acted on, because half a command may be another command; whoever does not fetch its replies is
//! cut off, not waited for.
//!
//! It does not know how many other clients there are, nor who may be one.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::{Value, json};

use super::rpc::{self, Method, RpcError};
use super::server::Idle;
use super::{Limits, Operations};

/// How long a watching client's thread waits for an event before it looks at its socket again.
const WATCH_STEP: Duration = Duration::from_millis(100);
/// How much is read at once.
const CHUNK: usize = 16 << 10;

/// A connected client.
pub(super) struct Connection<O> {
    stream: Arc<UnixStream>,
    operations: Arc<O>,
    limits: Limits,
    lines: Lines,
    /// The number of the last event sent, once the client watches.
    watching: Option<u64>,
}

impl<O: Operations> Connection<O> {
    pub(super) fn new(stream: Arc<UnixStream>, operations: Arc<O>, limits: Limits) -> Self {
        Self { stream, operations, limits, lines: Lines::new(limits.line), watching: None }
    }

    /// Serves the client until it leaves, is cut off, or `stopping` is set and its socket shut
    /// down.
    ///
    /// Says in `idle` when it waits for the client to say something.
    pub(super) fn run(mut self, stopping: &AtomicBool, idle: &Idle) {
        let ended = self
            .stream
            .set_write_timeout(Some(self.limits.write_timeout))
            .and_then(|()| self.talk(stopping, idle));
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

    fn talk(&mut self, stopping: &AtomicBool, silence: &Idle) -> io::Result<()> {
        // Whether the client has ended its side. One that watches may still be listening.
        let mut ended = false;
        loop {
            let line = self.lines.next();
            let idle = line.is_none();
            match line {
                Some(_) if stopping.load(Ordering::Relaxed) => return Ok(()),
                Some(line) => self.answer(line)?,
                None if ended => {}
                None if self.watching.is_some() && !self.readable()? => {}
                None if self.watching.is_some() => ended = !self.lines.fill(&*self.stream)?,
                None => match silence.during(|| self.lines.fill(&*self.stream)) {
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
        let parsed = match &line {
            Line::Whole(line) => rpc::parse(line),
            Line::TooLong => {
                let most = self.limits.line;
                let error = RpcError::invalid_request(format!(
                    "a line has at most {most} bytes; this one is skipped"
                ));
                Err((Value::Null, error))
            }
            Line::Half => {
                Err((Value::Null, RpcError::parse_error("the last line has no end; it is ignored")))
            }
        };
        let call = match parsed {
            Ok(call) => call,
            Err((id, error)) => return self.send(&rpc::reply(id, Err(error))),
        };
        // The daemon ends its connections when it is told to end, so the reply has to be out
        // before.
        let shutdown = matches!(call.method, Ok(Method::Shutdown));
        let result = call.method.and_then(|method| self.perform(method));
        let sent = call.id.map_or(Ok(()), |id| self.send(&rpc::reply(id, result)));
        if shutdown {
            self.operations.shutdown();
        }
        sent
    }

    /// Does what a method says; a panic in it is the client's to hear of, and not its thread's end.
    fn perform(&mut self, method: Method) -> Result<Value, RpcError> {
        let operations = &*self.operations;
        let watching = &mut self.watching;
        // Unwind safety: all that a panic can leave half done is behind `operations`, whose own
        // affair it is.
        let done = catch_unwind(AssertUnwindSafe(|| match method {
            Method::Status => Ok(operations.status()),
            Method::History => Ok(operations.history()),
            Method::Upgrade(request) => Ok(operations.upgrade(request)?),
            Method::Rollback(request) => Ok(operations.rollback(request)?),
            Method::Watch => {
                // Watching twice is watching.
                watching.get_or_insert_with(|| operations.last_event());
                Ok(json!({"watching": true}))
            }
            Method::Shutdown => Ok(json!({"shutting_down": true})),
        }));
        done.unwrap_or_else(|_| {
            log::error!("an operation of the control socket has panicked");
            Err(RpcError::internal("the daemon has failed at this; its log says where"))
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

/// What came in.
#[derive(Debug, PartialEq)]
enum Line {
    /// A line, without its end.
    Whole(Vec<u8>),
    /// A line of more than the allowed bytes. Said once, as soon as that is clear; its rest is
    /// dropped.
    TooLong,
    /// Bytes without an end of line at the end of the connection.
    Half,
}

/// Cuts a stream of bytes into lines of bounded length.
struct Lines {
    most: usize,
    buffer: Vec<u8>,
    /// Where in `buffer` the next line begins; before it is what has been taken.
    begin: usize,
    /// How far `buffer` has been searched for an end of line.
    searched: usize,
    /// Whether the rest of a line that was too long is being dropped.
    skipping: bool,
}

impl Lines {
    fn new(most: usize) -> Self {
        Self { most, buffer: Vec::new(), begin: 0, searched: 0, skipping: false }
    }

    /// The next line, if it is here.
    fn next(&mut self) -> Option<Line> {
        loop {
            let end = self.buffer[self.searched..]
                .iter()
                .position(|&byte| byte == b'\n')
                .map(|at| self.searched + at);
            let length = end.unwrap_or(self.buffer.len()) - self.begin;
            let line = match end {
                Some(end) => &self.buffer[self.begin..end],
                None => {
                    self.searched = self.buffer.len();
                    if self.skipping || length > self.most {
                        self.clear();
                    }
                    if self.skipping || length <= self.most {
                        return None;
                    }
                    self.skipping = true;
                    return Some(Line::TooLong);
                }
            };
            let line = if length > self.most { Line::TooLong } else { Line::Whole(line.to_vec()) };
            self.begin += length + 1;
            self.searched = self.begin;
            if !std::mem::take(&mut self.skipping) {
                return Some(line);
            }
        }
    }

    /// Reads more; `false` at the end of the stream.
    fn fill(&mut self, mut stream: impl Read) -> io::Result<bool> {
        self.buffer.drain(..self.begin);
        self.searched -= self.begin;
        self.begin = 0;
        let mut chunk = [0; CHUNK];
        loop {
            match stream.read(&mut chunk) {
                Ok(read) => {
                    self.buffer.extend_from_slice(&chunk[..read]);
                    return Ok(read > 0);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// At the end of the stream: what is left without an end, once.
    fn finish(&mut self) -> Option<Line> {
        let half = self.buffer.len() > self.begin && !self.skipping;
        self.clear();
        half.then_some(Line::Half)
    }

    fn clear(&mut self) {
        self.buffer.clear();
        self.begin = 0;
        self.searched = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All lines of a stream that arrives in pieces of `step` bytes.
    fn lines(bytes: &[u8], step: usize) -> Vec<Line> {
        let mut lines = Lines::new(4);
        let mut found = Vec::new();
        for piece in bytes.chunks(step) {
            assert!(lines.fill(piece).unwrap());
            found.extend(std::iter::from_fn(|| lines.next()));
        }
        found.extend(lines.finish());
        found
    }

    #[test]
    fn lines_are_cut_however_they_arrive() {
        let whole = |text: &str| Line::Whole(text.into());
        for step in 1..40 {
            assert_eq!(
                lines(b"ab\n\n1234\n", step),
                [whole("ab"), whole(""), whole("1234")],
                "{step}"
            );
            assert_eq!(lines(b"12345\nab\n", step), [Line::TooLong, whole("ab")], "{step}");
            assert_eq!(
                lines(b"1234567890\n123456789012\nab", step),
                [Line::TooLong, Line::TooLong, Line::Half]
            );
            assert_eq!(lines(b"ab\n123456789", step), [whole("ab"), Line::TooLong], "{step}");
        }
    }

    #[test]
    fn a_line_without_end_is_not_collected() {
        let mut lines = Lines::new(4);
        for _ in 0..1000 {
            lines.fill(&[b'x'; 100][..]).unwrap();
            while lines.next().is_some() {}
            assert!(lines.buffer.capacity() < 1000);
        }
    }
}
