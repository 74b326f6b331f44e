//! The file of what has happened, and the thread that writes it: a disk that stalls or is full
//! holds nothing else up.
//!
//! What is not written yet is bounded. If there is more, or a program goes on with what another one
//! has left, the file is written anew, of all that is kept in memory.

use rustix::fs::{Mode, OFlags, fsync, openat, renameat};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// The file's name in its directory, and of what becomes it.
pub(crate) const NAME: &str = "history.jsonl";
const NEW: &str = "history.jsonl.new";
/// Most bytes of lines that wait.
const MOST_WAITING: usize = 1 << 20;
/// How long to leave the disk alone after it has failed, which is doubled up to the longest.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(64);
/// How long the end of a process waits for the disk.
const PATIENCE: Duration = Duration::from_secs(2);

/// The file.
#[derive(Debug)]
pub(crate) struct Ledger {
    directory: Arc<OwnedFd>,
    /// Once it is open, and how many of its bytes are whole lines.
    file: Option<(File, u64)>,
}

impl Ledger {
    pub(crate) const fn new(directory: Arc<OwnedFd>) -> Self {
        Self { directory, file: None }
    }

    /// Puts whole lines behind the others.
    pub(crate) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
            let file = openat(&*self.directory, NAME, flags, Mode::from_raw_mode(0o600))?;
            let file = File::from(file);
            let len = file.metadata()?.len();
            self.file = Some((file, len));
        }
        let Some((file, len)) = &mut self.file else { return Ok(()) };
        // What a write has left that failed in the middle of a line.
        if file.metadata()?.len() != *len {
            file.set_len(*len)?;
        }
        file.write_all(lines)?;
        *len += lines.len() as u64;
        Ok(())
    }

    /// Puts whole lines in place of all that there are. They are on the disk before.
    pub(crate) fn write_anew(&mut self, lines: &[u8]) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let mut new = File::from(openat(&*self.directory, NEW, flags | OFlags::APPEND, mode)?);
        new.write_all(lines)?;
        new.sync_all()?;
        renameat(&*self.directory, NEW, &*self.directory, NAME)?;
        self.file = Some((new, lines.len() as u64));
        // Until that is on the disk the old one is there, which is whole as well.
        let _ = fsync(&*self.directory);
        Ok(())
    }
}

/// What the thread is to do.
#[derive(Debug, Default)]
struct Work {
    /// All that is to be in the file.
    anew: Option<Vec<u8>>,
    /// What comes behind that.
    lines: Vec<u8>,
    /// The thread has taken something, and is not done with it.
    is_busy: bool,
    /// Lines were left out.
    is_behind: bool,
    /// The thread is to end when nothing is left to do, or the disk fails.
    is_over: bool,
    has_ended: bool,
    trouble: Option<String>,
}

#[derive(Debug, Default)]
struct Common {
    work: Mutex<Work>,
    changed: Condvar,
}

impl Common {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `until` is so, for at most so long.
    fn wait<'a>(
        &self,
        work: MutexGuard<'a, Work>,
        patience: Duration,
        mut until: impl FnMut(&Work) -> bool,
    ) -> MutexGuard<'a, Work> {
        self.changed
            .wait_timeout_while(work, patience, |work| !until(work))
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }
}

/// The thread that writes.
#[derive(Debug)]
pub(crate) struct Writer {
    common: Arc<Common>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(crate) fn start(ledger: Ledger) -> io::Result<Self> {
        let common = Arc::new(Common::default());
        let theirs = Arc::clone(&common);
        let thread = Builder::new().name("history".to_owned());
        let thread = thread.spawn(move || write_all(&theirs, ledger))?;
        Ok(Self { common, thread: Some(thread) })
    }

    /// A line is to be written. `false` if all are to be [written anew](Self::write_anew), this
    /// one with them.
    pub(crate) fn append(&self, line: &[u8]) -> bool {
        let mut work = self.common.lock();
        if work.is_behind {
            return work.is_busy;
        }
        if work.lines.len() + line.len() > MOST_WAITING {
            work.lines = Vec::new();
            work.is_behind = true;
            work.trouble = Some("the disk does not keep up".to_owned());
            return work.is_busy;
        }
        work.lines.extend_from_slice(line);
        self.common.changed.notify_all();
        true
    }

    /// These are to be all lines.
    pub(crate) fn write_anew(&self, lines: Vec<u8>) {
        let mut work = self.common.lock();
        work.lines = Vec::new();
        work.anew = Some(lines);
        work.is_behind = false;
        self.common.changed.notify_all();
    }

    /// Why something could not be written, said once.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.common.lock().trouble.take()
    }

    /// Writes what is left, and ends the thread. `false` if the disk takes longer than this.
    pub(crate) fn end(&mut self, patience: Duration) -> bool {
        let mut work = self.common.lock();
        work.is_over = true;
        self.common.changed.notify_all();
        work = self.common.wait(work, patience, |work| work.has_ended);
        let has_ended = work.has_ended;
        // Otherwise it goes on.
        work.is_over = has_ended;
        drop(work);
        if has_ended && let Some(thread) = self.thread.take() {
            // It has nothing left to do.
            let _ = thread.join();
        }
        has_ended
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.end(PATIENCE) {
            self.common.lock().is_over = true;
        }
    }
}

/// The thread.
fn write_all(common: &Common, mut ledger: Ledger) {
    let mut wait = FIRST_WAIT;
    let mut work = common.lock();
    loop {
        if work.anew.is_none() && work.lines.is_empty() {
            if work.is_over {
                break;
            }
            work = common.changed.wait(work).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let (anew, lines) = (work.anew.take(), std::mem::take(&mut work.lines));
        work.is_busy = true;
        drop(work);
        let written = match &anew {
            // In one piece, so that nothing is done twice.
            Some(all) => ledger.write_anew(&[&all[..], &lines].concat()),
            None => ledger.append(&lines),
        };
        work = common.lock();
        work.is_busy = false;
        let Err(error) = written else {
            wait = FIRST_WAIT;
            continue;
        };
        work.trouble = Some(error.to_string());
        // What has come meanwhile comes behind that, or in its place.
        if work.anew.is_none() && !work.is_behind {
            let more = std::mem::replace(&mut work.lines, lines);
            work.lines.extend(more);
            work.anew = anew;
        }
        if work.is_over {
            break;
        }
        let again = Instant::now() + wait;
        work = common.wait(work, wait, |work| work.is_over || Instant::now() >= again);
        wait = (2 * wait).min(LONGEST_WAIT);
    }
    work.has_ended = true;
    common.changed.notify_all();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn ledger(path: &Path) -> Ledger {
        Ledger::new(Arc::new(File::open(path).unwrap().into()))
    }

    #[test]
    fn what_a_failed_write_leaves_is_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = ledger(directory.path());
        let path = directory.path().join(NAME);
        ledger.append(b"one\n").unwrap();
        // As a disk does that is full in the middle of a line.
        let mut other = fs::OpenOptions::new().append(true).open(&path).unwrap();
        other.write_all(b"tw").unwrap();
        ledger.append(b"three\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\nthree\n");
        ledger.write_anew(b"four\n").unwrap();
        ledger.append(b"five\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "four\nfive\n");
    }

    #[test]
    fn a_disk_that_fails_is_tried_again_and_nothing_is_lost() {
        let directory = tempfile::tempdir().unwrap();
        // What cannot be opened for writing by anyone.
        let path = directory.path().join(NAME);
        fs::create_dir(&path).unwrap();
        let writer = Writer::start(ledger(directory.path())).unwrap();
        assert!(writer.append(b"one\n"));
        let end = Instant::now() + Duration::from_secs(20);
        let trouble = loop {
            if let Some(trouble) = writer.trouble() {
                break trouble;
            }
            assert!(Instant::now() < end, "nothing is said");
            std::thread::sleep(Duration::from_millis(1));
        };
        assert!(trouble.contains("directory"), "{trouble}");
        // It is left alone for a while, however much comes.
        for _ in 0..100 {
            assert!(writer.append(b"two\n"));
        }
        std::thread::sleep(FIRST_WAIT / 4);
        assert_eq!(writer.trouble(), None, "it is not left alone");
        fs::remove_dir(&path).unwrap();
        drop(writer);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("one\n{}", "two\n".repeat(100)));
    }
}
