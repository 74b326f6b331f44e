//! The host's end of the command channel; `initramfs/init` is the other end and documents the
//! protocol.
//!
//! A thread reads replies as they come and files them by id, so that a long job and short commands
//! run side by side. Ids never repeat, not even across reboots of the guest: a late reply finds
//! no waiter and is kept from being taken for another one's.
//!
//! This file does not know why a reply fails to come; the caller of [`Agent::wait`] says how to
//! find out.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often a waiting thread looks whether waiting still makes sense.
const LOOK_AROUND: Duration = Duration::from_millis(100);

/// How a command in the guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit status as the guest's shell sees it: 128 + N for a command that signal N ended.
    pub status: i32,
    /// Standard output and standard error in the order in which they were written.
    pub stdout: String,
}

/// A command that was sent, and the boot it was sent to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    id: u64,
    boot: u64,
}

#[derive(Default)]
struct State {
    /// How many times the guest said `ready`.
    boots: u64,
    last_id: u64,
    replies: HashMap<u64, Output>,
    /// How many connections there have been.
    connections: u64,
    /// Why the reader of the last connection gave up, once it did.
    ended: Option<String>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked while holding the lock has failed already; the others may still
        // finish.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The command channel of one QEMU process, across all boots of its guest.
pub(super) struct Agent {
    shared: Arc<Shared>,
    sender: Mutex<UnixStream>,
}

impl Agent {
    /// Takes the connection that QEMU made to us and starts to read it; the thread ends with the
    /// connection.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        let agent =
            Agent { shared: Arc::new(Shared::default()), sender: Mutex::new(stream.try_clone()?) };
        agent.read_from(stream)?;
        Ok(agent)
    }

    /// The guest goes on in another QEMU, which has made this connection. What it answers from now
    /// on comes there.
    pub(super) fn follow(&self, stream: UnixStream) -> io::Result<()> {
        *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = stream.try_clone()?;
        self.read_from(stream)
    }

    fn read_from(&self, stream: UnixStream) -> io::Result<()> {
        let reader = BufReader::new(stream);
        let sink = Arc::clone(&self.shared);
        let mut state = sink.lock();
        state.connections += 1;
        state.ended = None;
        let connection = state.connections;
        drop(state);
        thread::Builder::new().name("guest-agent".into()).spawn(move || {
            let why = match read_replies(reader, &sink) {
                Ok(()) => "QEMU closed the command channel".to_owned(),
                Err(error) => format!("the command channel broke: {error}"),
            };
            let mut state = sink.lock();
            if state.connections == connection {
                state.ended = Some(why);
            }
            drop(state);
            sink.changed.notify_all();
        })?;
        Ok(())
    }

    /// How many times the guest came up so far.
    pub(super) fn boots(&self) -> u64 {
        self.shared.lock().boots
    }

    /// Waits until the guest has come up more often than `boots`.
    pub(super) fn wait_for_boot(
        &self,
        boots: u64,
        within: Duration,
        trouble: impl Fn() -> Option<String>,
    ) -> Result<(), String> {
        self.wait_until(within, trouble, |state| (state.boots > boots).then_some(Ok(())))
            .unwrap_or_else(|| Err(format!("the guest was not up within {within:?}")))
    }

    /// Sends a shell script to the guest.
    pub(super) fn send(&self, script: &str) -> io::Result<Ticket> {
        let ticket = {
            let mut state = self.shared.lock();
            state.last_id += 1;
            Ticket { id: state.last_id, boot: state.boots }
        };
        let line = format!("{} {}\n", ticket.id, one_line(script));
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender.write_all(line.as_bytes())?;
        Ok(ticket)
    }

    /// Waits for the reply to a command. `trouble` is asked now and then for a reason to stop
    /// waiting.
    pub(super) fn wait(
        &self,
        ticket: Ticket,
        within: Duration,
        trouble: impl Fn() -> Option<String>,
    ) -> Result<Output, String> {
        self.wait_until(within, trouble, |state| match state.replies.remove(&ticket.id) {
            Some(output) => Some(Ok(output)),
            None if state.boots > ticket.boot => {
                Some(Err("the guest was rebooted while the command ran".to_owned()))
            }
            None => None,
        })
        .unwrap_or_else(|| Err(format!("no answer within {within:?}")))
    }

    /// Whether the reply has come already.
    pub(super) fn has_ended(&self, ticket: Ticket) -> bool {
        let state = self.shared.lock();
        state.replies.contains_key(&ticket.id) || state.boots > ticket.boot || state.ended.is_some()
    }

    /// `None` when time ran out.
    fn wait_until<T>(
        &self,
        within: Duration,
        trouble: impl Fn() -> Option<String>,
        mut look: impl FnMut(&mut State) -> Option<Result<T, String>>,
    ) -> Option<Result<T, String>> {
        let deadline = Instant::now() + within;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = look(&mut state) {
                return Some(found);
            }
            if let Some(why) = &state.ended {
                return Some(Err(why.clone()));
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self
                .shared
                .changed
                .wait_timeout(state, left.min(LOOK_AROUND))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if let Some(why) = trouble() {
                return Some(Err(why));
            }
        }
    }
}

/// Puts a script on one line such that `printf %b` in the guest gives it back.
fn one_line(script: &str) -> String {
    script.trim().replace('\\', "\\\\").replace('\n', "\\n")
}

fn read_replies(mut reader: impl BufRead, sink: &Shared) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        // A reset can cut a reply short; what then follows on the same line is the new boot's
        // greeting.
        if line.ends_with(b"ready\n") {
            sink.lock().boots += 1;
        } else if let Some((id, status, length)) = parse_reply(&line) {
            let mut bytes = vec![0; length];
            reader.read_exact(&mut bytes)?;
            let output = Output { status, stdout: String::from_utf8_lossy(&bytes).into_owned() };
            sink.lock().replies.insert(id, output);
        } else {
            let text = String::from_utf8_lossy(&line);
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("not a reply: {text:?}"),
            ));
        }
        sink.changed.notify_all();
    }
}

/// `ID STATUS LENGTH`, the line before the output itself.
fn parse_reply(line: &[u8]) -> Option<(u64, i32, usize)> {
    let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
    let reply =
        (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    words.next().is_none().then_some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_filed_by_id_and_keep_every_byte_of_their_output() {
        let sink = Shared::default();
        read_replies(&b"ready\n2 0 5\na\nb\r\n1 137 0\n"[..], &sink).unwrap();
        let state = sink.lock();
        assert_eq!(state.boots, 1);
        assert_eq!(state.replies[&2], Output { status: 0, stdout: "a\nb\r\n".into() });
        assert_eq!(state.replies[&1], Output { status: 137, stdout: String::new() });
    }

    #[test]
    fn a_line_that_is_no_reply_is_an_error_and_not_skipped() {
        assert!(read_replies(&b"ready\nwhat\n"[..], &Shared::default()).is_err());
    }

    #[test]
    fn a_script_stays_one_line_whatever_is_in_it() {
        assert_eq!(one_line("echo 'a\\nb'\nfalse\n"), "echo 'a\\\\nb'\\nfalse");
    }
}
