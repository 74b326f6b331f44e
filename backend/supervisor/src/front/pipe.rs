//! One stream of lines, both ways, that never waits.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use control::lines::{Line, Lines};
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};

use crate::slots::{Missing, Packing, Slot, Unpacking};

/// A stream, what has come in and was not taken, and what was said and could not be sent.
#[derive(Debug)]
pub(super) struct Pipe {
    stream: UnixStream,
    lines: Lines,
    out: Vec<u8>,
    /// Since when there is something in `out`.
    unsent_since: Option<Instant>,
    /// The other side says nothing more.
    ended: bool,
    /// The other side is gone altogether.
    hung_up: bool,
}

/// A [`Pipe`] in a packed state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PackedPipe {
    stream: Slot,
    rest: Vec<u8>,
    skipping: bool,
    out: Vec<u8>,
    ended: bool,
    hung_up: bool,
}

impl Pipe {
    /// Lines have at most `longest` bytes.
    pub(super) fn new(stream: UnixStream, longest: usize) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let lines = Lines::new(longest);
        Ok(Self {
            stream,
            lines,
            out: Vec::new(),
            unsent_since: None,
            ended: false,
            hung_up: false,
        })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// What to look for: lines if `hear`, and room for what could not be sent. `None`: there is
    /// nothing to look for, not even the end.
    pub(super) fn interest(&self, hear: bool) -> Option<PollFlags> {
        if self.hung_up {
            return None;
        }
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, hear && !self.ended);
        interest.set(PollFlags::OUT, !self.out.is_empty());
        Some(interest)
    }

    /// The other side is gone altogether; what it has said before can still be heard.
    pub(super) const fn hang_up(&mut self) {
        self.hung_up = true;
    }

    pub(super) const fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Whether nothing more will come, and everything was taken.
    pub(super) fn is_over(&self) -> bool {
        self.ended && self.lines.rest().0.is_empty()
    }

    /// Whether nothing has come that was not taken.
    pub(super) fn is_empty(&self) -> bool {
        self.lines.rest().0.is_empty()
    }

    /// The next line, if it is here, or can be read without waiting. After the last one comes a
    /// half one, if there is.
    pub(super) fn next_line(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(line) = self.lines.next_line() {
                return Ok(Some(line));
            }
            if self.ended {
                return Ok(self.lines.finish());
            }
            match self.lines.fill(&self.stream) {
                Ok(more) => self.ended = !more,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // How a stream ends whose other side left something unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.ended = true,
                Err(error) => return Err(error),
            }
        }
    }

    /// Says a line, whose end is added; what cannot be sent now is kept.
    pub(super) fn say(&mut self, line: &[u8]) -> io::Result<()> {
        self.out.extend_from_slice(line);
        self.out.push(b'\n');
        self.flush()
    }

    /// Sends what can be sent.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match (&self.stream).write(&self.out) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.out.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.unsent_since.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        self.unsent_since = None;
        Ok(())
    }

    /// Whether everything that was said has been sent.
    pub(super) fn is_sent(&self) -> bool {
        self.out.is_empty()
    }

    /// When what was said must have been sent.
    pub(super) fn deadline(&self, patience: Duration) -> Option<Instant> {
        self.unsent_since.map(|since| since + patience)
    }

    pub(super) fn pack<'a>(&'a self, packing: &mut Packing<'a>) -> PackedPipe {
        let (rest, skipping) = self.lines.rest();
        PackedPipe {
            stream: packing.put(self.stream.as_fd()),
            rest: rest.to_vec(),
            skipping,
            out: self.out.clone(),
            ended: self.ended,
            hung_up: self.hung_up,
        }
    }

    pub(super) fn unpack(
        packed: PackedPipe,
        longest: usize,
        unpacking: &mut Unpacking,
    ) -> Result<Self, Missing> {
        let PackedPipe { stream, rest, skipping, out, ended, hung_up } = packed;
        Ok(Self {
            stream: unpacking.take(stream)?.into(),
            lines: Lines::resume(longest, rest, skipping),
            unsent_since: (!out.is_empty()).then(Instant::now),
            out,
            ended,
            hung_up,
        })
    }
}
