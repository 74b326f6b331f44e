//! What has happened to a device, numbered: kept while its processes come and go, and in a file if
//! there is to be one.
//!
//! The file has one JSON object a line. Lines are appended as things happen, by a thread of their
//! own: what that has written outlives the process, and a loss of power may take the last lines. A
//! line that is cut off, or is no record, is left out when the file is read, and the file is
//! written anew. It is bounded: what is not kept any more is taken out when the file has twice as
//! many lines. So is what has happened: of an event that is too long, the longest members are left
//! out.

use crate::writer::{Ledger, NAME, Writer};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open, openat};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How many changes are kept, and how many other things.
pub const KEPT: usize = 1024;
/// Most lines of the file.
const MOST_LINES: usize = 4 * KEPT;
/// Most bytes that are read of the file: its last ones, which have more than [`KEPT`] of the
/// longest events.
const MOST_BYTES: u64 = 32 << 20;
/// Most bytes of an event, as JSON.
pub const LONGEST: usize = 15 << 10;

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number: one more than that of the one before.
    pub sequence: u64,
    /// What; `event` names it.
    #[serde(flatten)]
    pub event: Map<String, Value>,
}

/// A record's line in the file.
fn line(record: &Record) -> Vec<u8> {
    // Strings, numbers and what is made of them can always be written.
    let mut line = serde_json::to_vec(record).unwrap_or_default();
    line.push(b'\n');
    line
}

impl Record {
    fn is_change(&self) -> bool {
        self.event.get("event").is_some_and(|event| event == "ended")
    }
}

/// Makes an event one that can be kept. It has no number of its own, and as many members as there
/// is room for, the shortest first; `left_out` says how many are missing.
#[must_use]
pub fn fit(mut event: Map<String, Value>) -> Map<String, Value> {
    event.remove("sequence");
    let length = |value: &Value| value.to_string().len();
    if serde_json::to_string(&event).map_or(0, |text| text.len()) <= LONGEST {
        return event;
    }
    let mut members: Vec<_> =
        event.into_iter().map(|(name, value)| (name.len() + length(&value), name, value)).collect();
    members.sort_by_key(|(length, ..)| *length);
    let (mut room, mut left_out) = (LONGEST - 64, 0_u64);
    let mut event = Map::new();
    for (length, name, value) in members {
        // Quotes, a colon and a comma; a name may have to be escaped.
        let needed = length + 8 + 5 * name.len();
        if needed <= room {
            room -= needed;
            event.insert(name, value);
        } else {
            left_out += 1;
        }
    }
    event.insert("left_out".to_owned(), left_out.into());
    event
}

/// Where it is kept.
#[derive(Debug)]
struct Kept {
    /// Locked: one daemon at a time writes there.
    directory: Arc<OwnedFd>,
    /// Nothing while it cannot be started, or has been ended.
    writer: Option<Writer>,
    /// Of the file, once all is written.
    lines: usize,
    /// The writer could not be started.
    trouble: Option<String>,
}

/// All that is kept.
#[derive(Debug, Default)]
pub struct Book {
    last: u64,
    records: VecDeque<Record>,
    kept: Option<Kept>,
}

/// A [`Book`] for another process, without its file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Packed {
    last: u64,
    records: VecDeque<Record>,
}

impl Book {
    /// One that is kept in a directory, which is made if it is not there, and with what is there.
    ///
    /// # Errors
    /// In a sentence: it cannot be read or written, or another daemon keeps its own there.
    pub fn open(directory: &Path) -> Result<Self, String> {
        let about = |error: io::Error| format!("{}: {error}", directory.display());
        std::fs::create_dir_all(directory).map_err(about)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let held = open(directory, flags, Mode::empty()).map_err(|error| about(error.into()))?;
        flock(&held, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            format!(
                "{} is in use by another daemon; give each a state directory of its own",
                directory.display()
            )
        })?;
        let mut book = Self::default();
        let (is_whole, lines) = book.read(held.as_fd()).map_err(about)?;
        let directory = Arc::new(held);
        let mut ledger = Ledger::new(Arc::clone(&directory));
        let mut kept = Kept { directory, writer: None, lines, trouble: None };
        if is_whole && lines <= MOST_LINES {
            // Whether it can be written.
            ledger.append(b"").map_err(about)?;
        } else {
            ledger.write_anew(&book.text()).map_err(about)?;
            kept.lines = book.records.len();
        }
        kept.writer = Some(Writer::start(ledger).map_err(about)?);
        book.kept = Some(kept);
        Ok(book)
    }

    /// Reads the file: whether all that is in it is records, and how many lines it has.
    fn read(&mut self, directory: BorrowedFd<'_>) -> io::Result<(bool, usize)> {
        let mut file =
            match openat(directory, NAME, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
                Ok(file) => File::from(file),
                Err(rustix::io::Errno::NOENT) => return Ok((true, 0)),
                Err(error) => return Err(error.into()),
            };
        let too_many = file.metadata()?.len().saturating_sub(MOST_BYTES);
        file.seek(SeekFrom::Start(too_many))?;
        let mut bytes = Vec::new();
        file.take(MOST_BYTES).read_to_end(&mut bytes)?;
        let mut is_whole = too_many == 0 && (bytes.is_empty() || bytes.ends_with(b"\n"));
        let mut lines = 0;
        for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            lines += 1;
            match serde_json::from_slice::<Record>(line) {
                Ok(record) if record.sequence > self.last => self.push(record),
                _ => is_whole = false,
            }
        }
        Ok((is_whole, lines))
    }

    /// Packs it for another process, which gets the [directory](Self::directory) beside that.
    #[must_use]
    pub fn pack(&self) -> Packed {
        Packed { last: self.last, records: self.records.clone() }
    }

    /// What it is kept in, if it is.
    #[must_use]
    pub fn directory(&self) -> Option<BorrowedFd<'_>> {
        self.kept.as_ref().map(|kept| kept.directory.as_fd())
    }

    /// Goes on with what another process has packed. Its file is written anew: the other one may
    /// not have written all of it.
    #[must_use]
    pub fn unpack(packed: Packed, directory: Option<OwnedFd>) -> Self {
        let mut book = Self { last: packed.last, ..Self::default() };
        for record in packed.records {
            book.push(Record { event: fit(record.event), ..record });
        }
        // Numbers up to this one were given.
        book.last = packed.last.max(book.last);
        book.kept = directory.map(|directory| Kept {
            directory: Arc::new(directory),
            writer: None,
            lines: 0,
            trouble: None,
        });
        book.write_anew();
        book
    }

    /// Writes down what is not written, and does no more in this process until something happens.
    /// `false` if the disk takes longer than `patience`.
    pub fn rest(&mut self, patience: Duration) -> bool {
        let Some(kept) = &mut self.kept else { return true };
        let Some(writer) = &mut kept.writer else { return true };
        let has_ended = writer.end(patience);
        if has_ended {
            kept.trouble = writer.trouble().or(kept.trouble.take());
            kept.writer = None;
        }
        has_ended
    }

    /// Why something could not be written down, said once.
    pub fn trouble(&mut self) -> Option<String> {
        let kept = self.kept.as_mut()?;
        kept.trouble.take().or_else(|| kept.writer.as_ref()?.trouble())
    }

    /// The number of what has happened last.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// Numbers up to this one were used for what is not in the book.
    pub fn skip_to(&mut self, number: u64) {
        self.last = self.last.max(number);
    }

    /// Something has happened. Returns its number.
    pub fn note(&mut self, event: Map<String, Value>) -> u64 {
        let record = Record { sequence: self.last + 1, event: fit(event) };
        let line = line(&record);
        self.push(record);
        if let Some(kept) = &mut self.kept {
            kept.lines += 1;
            let writer = kept.writer.as_ref().filter(|_| kept.lines <= MOST_LINES);
            if !writer.is_some_and(|writer| writer.append(&line)) {
                self.write_anew();
            }
        }
        self.last
    }

    fn push(&mut self, record: Record) {
        self.last = record.sequence;
        let is_change = record.is_change();
        let alike = |record: &Record| record.is_change() == is_change;
        if self.records.iter().filter(|record| alike(record)).count() >= KEPT
            && let Some(oldest) = self.records.iter().position(alike)
        {
            self.records.remove(oldest);
        }
        self.records.push_back(record);
    }

    /// The whole file.
    fn text(&self) -> Vec<u8> {
        self.records.iter().flat_map(line).collect()
    }

    fn write_anew(&mut self) {
        let Some(kept) = &mut self.kept else { return };
        if kept.writer.is_none() {
            match Writer::start(Ledger::new(Arc::clone(&kept.directory))) {
                Ok(writer) => kept.writer = Some(writer),
                Err(error) => kept.trouble = Some(error.to_string()),
            }
        }
        if kept.writer.is_some() {
            kept.lines = self.records.len();
            let text = self.text();
            let writer = self.kept.as_ref().and_then(|kept| kept.writer.as_ref());
            writer.inspect(|writer| writer.write_anew(text));
        }
    }

    /// What has happened after number `after`, oldest first, as far as it is kept.
    pub fn after(&self, after: u64) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(move |record| record.sequence > after)
    }

    /// How changes ended, oldest first: the last [`KEPT`].
    #[must_use]
    pub fn history(&self) -> Value {
        let entry = |record: &Record| {
            let mut entry = record.event.clone();
            entry.remove("event");
            entry.insert("sequence".to_owned(), record.sequence.into());
            Value::Object(entry)
        };
        self.records.iter().filter(|record| record.is_change()).map(entry).collect()
    }
}

#[cfg(test)]
mod tests;
