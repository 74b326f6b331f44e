//! Lines out of a stream of bytes: of bounded length, however the bytes arrive.

use std::io::{self, Read};

/// How much is read at once.
const CHUNK: usize = 16 << 10;

/// What came in.
#[derive(Debug, PartialEq)]
pub enum Line {
    /// A line, without its end.
    Whole(Vec<u8>),
    /// A line of more than the allowed bytes. Said once, as soon as that is clear; its rest is
    /// dropped.
    TooLong,
    /// Bytes without an end of line at the end of the connection.
    Half,
}

/// Cuts a stream of bytes into lines of bounded length.
#[derive(Debug)]
pub struct Lines {
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
    /// No bytes yet; `most` bytes may a line have.
    pub fn new(most: usize) -> Self {
        Self { most, buffer: Vec::new(), begin: 0, searched: 0, skipping: false }
    }

    /// The next line, if it is here.
    pub fn next_line(&mut self) -> Option<Line> {
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
    pub fn fill(&mut self, mut stream: impl Read) -> io::Result<bool> {
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
    pub fn finish(&mut self) -> Option<Line> {
        let half = self.buffer.len() > self.begin && !self.skipping;
        self.clear();
        half.then_some(Line::Half)
    }

    /// What has arrived and was not taken, and whether it is the rest of a line that was too long.
    #[must_use]
    pub fn rest(&self) -> (&[u8], bool) {
        (&self.buffer[self.begin..], self.skipping)
    }

    /// Goes on with the [`rest`](Self::rest) of another one.
    #[must_use]
    pub fn resume(most: usize, buffer: Vec<u8>, skipping: bool) -> Self {
        Self { most, buffer, begin: 0, searched: 0, skipping }
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
            found.extend(std::iter::from_fn(|| lines.next_line()));
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
    fn lines_go_on_wherever_they_are_resumed() {
        let bytes = b"ab\n1234567890\n1234\nab";
        for first in 0..=bytes.len() {
            let mut before = Lines::new(4);
            before.fill(&bytes[..first]).unwrap();
            let mut found: Vec<_> = std::iter::from_fn(|| before.next_line()).take(1).collect();
            let (rest, skipping) = before.rest();
            let mut after = Lines::resume(4, rest.to_vec(), skipping);
            after.fill(&bytes[first..]).unwrap();
            found.extend(std::iter::from_fn(|| after.next_line()));
            found.extend(after.finish());
            assert_eq!(found, lines(bytes, bytes.len()), "{first}");
        }
    }

    #[test]
    fn a_line_without_end_is_not_collected() {
        let mut lines = Lines::new(4);
        for _ in 0..1000 {
            lines.fill(&[b'x'; 100][..]).unwrap();
            while lines.next_line().is_some() {}
            assert!(lines.buffer.capacity() < 1000);
        }
    }
}
