//! What has happened to a device, numbered: kept while its processes come and go, and in a file if
//! there is to be one.
//!
//! The file has one JSON object a line. Lines are appended as things happen, without waiting for
//! the disk: what a process has written outlives it, and a loss of power may take the last lines. A
//! line that is cut off, or is no record, is left out when the file is read, and the file is
//! written anew. It is bounded: what is not kept any more is taken out when the file has twice as
//! many lines.

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open, openat, renameat};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// How many changes are kept, and how many other things.
pub const KEPT: usize = 1024;
/// The file's name in its directory, and of what becomes it.
const NAME: &str = "history.jsonl";
const NEW: &str = "history.jsonl.new";
/// Most bytes that are read of it.
const MOST_BYTES: u64 = 32 << 20;

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number: one more than that of the one before.
    pub sequence: u64,
    /// What; `event` names it.
    #[serde(flatten)]
    pub event: Map<String, Value>,
}

impl Record {
    fn is_change(&self) -> bool {
        self.event.get("event").is_some_and(|event| event == "ended")
    }
}

/// Where it is kept.
#[derive(Debug)]
struct Kept {
    /// Locked: one daemon at a time writes there.
    directory: OwnedFd,
    file: File,
    lines: usize,
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
        let is_whole = book.read(held.as_fd()).map_err(about)?;
        book.keep(held).map_err(about)?;
        if !is_whole || book.is_long() {
            book.write_anew().map_err(about)?;
        }
        Ok(book)
    }

    /// Reads the file. `false` if there is something in it that is no record.
    fn read(&mut self, directory: BorrowedFd<'_>) -> io::Result<bool> {
        let file = match openat(directory, NAME, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = Vec::new();
        file.take(MOST_BYTES).read_to_end(&mut bytes)?;
        let mut is_whole = bytes.is_empty() || bytes.ends_with(b"\n");
        for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Record>(line) {
                Ok(record) if record.sequence > self.last => self.push(record),
                _ => is_whole = false,
            }
        }
        Ok(is_whole)
    }

    fn keep(&mut self, directory: OwnedFd) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
        let file = openat(&directory, NAME, flags, Mode::from_raw_mode(0o600))?.into();
        self.kept = Some(Kept { directory, file, lines: self.records.len() });
        Ok(())
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

    /// Goes on with what another process has packed. Nothing is written down any more if the file
    /// in its directory cannot be.
    #[must_use]
    pub fn unpack(packed: Packed, directory: Option<OwnedFd>) -> Self {
        let mut book = Self { last: packed.last, records: packed.records, kept: None };
        if let Some(directory) = directory
            && book.keep(directory).is_err()
        {
            book.kept = None;
        }
        book
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

    /// Something has happened. Returns its number, and why it could not be written down, if it
    /// could not.
    pub fn note(&mut self, event: Map<String, Value>) -> (u64, io::Result<()>) {
        let record = Record { sequence: self.last + 1, event };
        let written = self.write(&record);
        self.push(record);
        let written = match written {
            Ok(()) if self.is_long() => self.write_anew(),
            written => written,
        };
        (self.last, written)
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

    fn is_long(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.lines > 4 * KEPT)
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        kept.lines += 1;
        kept.file.write_all(&line)
    }

    fn write_anew(&mut self) -> io::Result<()> {
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let mut text = Vec::new();
        for record in &self.records {
            serde_json::to_writer(&mut text, record)?;
            text.push(b'\n');
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let new = openat(&kept.directory, NEW, flags | OFlags::APPEND, Mode::from_raw_mode(0o600))?;
        let mut new = File::from(new);
        new.write_all(&text)?;
        renameat(&kept.directory, NEW, &kept.directory, NAME)?;
        (kept.file, kept.lines) = (new, self.records.len());
        Ok(())
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
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    fn event(name: &str, number: usize) -> Map<String, Value> {
        let event = json!({"event": name, "change": "upgrade", "generation": number});
        event.as_object().unwrap().clone()
    }

    fn numbers(book: &Book) -> Vec<u64> {
        book.after(0).map(|record| record.sequence).collect()
    }

    #[test]
    fn the_newest_of_each_kind_are_kept_and_numbers_go_on() {
        let mut book = Book::default();
        book.note(event("ended", 0)).1.unwrap();
        for number in 0..2 * KEPT {
            book.note(event("connected", number)).1.unwrap();
        }
        book.skip_to(9_000);
        assert_eq!(book.note(event("ended", 1)).0, 9_001);
        assert_eq!(book.after(0).count(), KEPT + 2);
        let told = json!([
            {"change": "upgrade", "generation": 0, "sequence": 1},
            {"change": "upgrade", "generation": 1, "sequence": 9_001},
        ]);
        assert_eq!(book.history(), told);
        assert_eq!(
            book.after(2 * KEPT as u64).map(|it| it.sequence).collect::<Vec<_>>(),
            [2049, 9001]
        );
        let next = Book::unpack(book.pack(), None);
        assert_eq!((next.history(), next.last()), (told, 9_001));
    }

    #[test]
    fn a_file_is_gone_on_with_and_another_daemon_has_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let mut book = Book::open(&path).unwrap();
        book.note(event("ended", 1)).1.unwrap();
        book.note(event("connected", 2)).1.unwrap();
        let refused = Book::open(&path).unwrap_err();
        assert!(refused.contains("in use by another daemon"), "{refused}");
        // Another program of the same process holds the lock on.
        let held = book.directory().unwrap().try_clone_to_owned().unwrap();
        let mut next = Book::unpack(book.pack(), Some(held));
        drop(book);
        assert!(Book::open(&path).is_err());
        next.note(event("ended", 3)).1.unwrap();
        drop(next);
        let book = Book::open(&path).unwrap();
        assert_eq!((numbers(&book), book.last()), (vec![1, 2, 3], 3));
        assert_eq!(book.history()[1]["generation"], 3);
    }

    #[test]
    fn a_torn_tail_and_lines_that_are_no_records_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let mut book = Book::open(directory.path()).unwrap();
        (1..=3).for_each(|number| book.note(event("ended", number)).1.unwrap());
        drop(book);
        let path = directory.path().join(NAME);
        let whole = fs::read(&path).unwrap();
        let last = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
        // Cut off at each byte of the last line.
        for len in last..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let mut book = Book::open(directory.path()).unwrap();
            // Only its line's end is missing in the last of them.
            let expected: &[u64] = if len == whole.len() - 1 { &[1, 2, 3] } else { &[1, 2] };
            assert_eq!(numbers(&book), expected, "cut off at {len}");
            book.note(event("ended", 9)).1.unwrap();
            drop(book);
            let book = Book::open(directory.path()).unwrap();
            assert_eq!(numbers(&book).len(), expected.len() + 1, "cut off at {len}");
        }
        let odd =
            [&b"\0\xff{}\n[]\n{\"sequence\":1}\n"[..], &whole[..last], &whole[..last]].concat();
        fs::write(&path, odd).unwrap();
        let book = Book::open(directory.path()).unwrap();
        assert_eq!(numbers(&book), [1, 2], "numbers that came before are no news");
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
    }

    #[test]
    fn the_file_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let mut book = Book::open(directory.path()).unwrap();
        for number in 0..6 * KEPT {
            book.note(event("connected", number)).1.unwrap();
            assert!(book.kept.as_ref().unwrap().lines <= 4 * KEPT);
        }
        drop(book);
        let lines = fs::read_to_string(directory.path().join(NAME)).unwrap().lines().count();
        assert!(lines <= 4 * KEPT, "{lines}");
        let book = Book::open(directory.path()).unwrap();
        assert_eq!((book.after(0).count(), book.last()), (KEPT, 6 * KEPT as u64));
    }
}
